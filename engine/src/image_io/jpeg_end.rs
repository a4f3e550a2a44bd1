//! Whether a JPEG file is whole. Decoders fill what is missing with grey and say nothing, which would teach a model grey.

/// Whether the picture's end marker is there. Walks the segments by their lengths (a preview inside one has an end marker of
/// its own) and the entropy-coded data byte by byte. Source: ITU-T T.81, annex B.
pub(super) fn is_complete(bytes: &[u8]) -> bool {
    const START_OF_IMAGE: u8 = 0xd8;
    const END_OF_IMAGE: u8 = 0xd9;
    let mut at = 0;
    while let Some(marker) = next_marker(bytes, &mut at) {
        match marker {
            END_OF_IMAGE => return true,
            // Markers without a length: temporary use, restarts.
            0x01 | START_OF_IMAGE | 0xd0..=0xd7 => (),
            _ => {
                let Some(&[high, low]) = bytes.get(at..at + 2) else {
                    return false;
                };
                at += usize::from(u16::from_be_bytes([high, low]));
            }
        }
    }
    false
}

/// Moves behind the next marker and returns its second byte.
fn next_marker(bytes: &[u8], at: &mut usize) -> Option<u8> {
    loop {
        *at += bytes.get(*at..)?.iter().position(|&byte| byte == 0xff)?;
        // Any number of 0xff may stand in front of a marker.
        while *bytes.get(*at)? == 0xff {
            *at += 1;
        }
        let marker = bytes[*at];
        *at += 1;
        if marker != 0 {
            return Some(marker);
        }
    }
}
