//! Changes to pictures that their checksums do not give away: PNG's chunks, JPEG's segments, WebP's sizes.

use crate::bytes;
use crate::random::Random;

const PNG: &[u8] = b"\x89PNG\r\n\x1a\n";
const JPEG: &[u8] = b"\xff\xd8";
const WEBP: &[u8] = b"RIFF";

/// Changes a picture; `other` is one to take pieces from.
pub fn mutate(file: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    if random.one_in(4) {
        return bytes::mutate(file, other, random);
    }
    if file.starts_with(PNG) {
        mutate_png(file, other, random);
    } else if file.starts_with(JPEG) {
        mutate_jpeg(file, random);
    } else if file.starts_with(WEBP) {
        mutate_webp(file, random);
    } else {
        bytes::mutate(file, other, random);
    }
}

/// A PNG's chunks: kind and data.
type Chunks = Vec<([u8; 4], Vec<u8>)>;

fn chunks(file: &[u8]) -> Chunks {
    let mut chunks = Vec::new();
    let mut rest = file.get(PNG.len()..).unwrap_or_default();
    while let Some((head, after)) = rest.split_first_chunk::<8>() {
        let [a, b, c, d, kind @ ..] = *head;
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        let Some(data) = after.get(..length) else { break };
        chunks.push((kind, data.to_vec()));
        rest = after.get(length + 4..).unwrap_or_default();
    }
    chunks
}

/// The kinds of chunks that decoders know.
const KINDS: [&[u8; 4]; 14] = [
    b"IHDR", b"IDAT", b"IEND", b"PLTE", b"tRNS", b"gAMA", b"iCCP", b"sRGB", b"eXIf", b"tEXt", b"zTXt", b"iTXt",
    b"acTL", b"fdAT",
];

fn mutate_png(file: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let mut chunks = chunks(file);
    for _ in 0..1 + random.length(3) {
        if chunks.is_empty() {
            break;
        }
        let place = random.below(chunks.len());
        match random.below(7) {
            0 | 1 => change_header(&mut chunks[0].1, random),
            2 => bytes::mutate(&mut chunks[place].1, other, random),
            3 => {
                let chunk = chunks[place].clone();
                chunks.insert(random.below(chunks.len()), chunk);
            }
            4 => {
                chunks.remove(place);
            }
            5 => {
                let mut data = chunks[place].1.clone();
                bytes::mutate(&mut data, other, random);
                chunks.insert(1.min(chunks.len()), (*random.pick(&KINDS), data));
            }
            _ => chunks[place].0 = *random.pick(&KINDS),
        }
    }
    *file = PNG.to_vec();
    for (kind, data) in chunks {
        file.extend((data.len() as u32).to_be_bytes());
        file.extend(kind);
        file.extend(&data);
        let mut sum = crc32fast::Hasher::new();
        sum.update(&kind);
        sum.update(&data);
        let sum = sum.finalize() ^ u32::from(random.one_in(40));
        file.extend(sum.to_be_bytes());
    }
}

/// Sides of pictures that no memory holds, or that are no sides.
const SIDES: [u32; 12] = [
    0,
    1,
    2,
    16,
    1000,
    16_384,
    60_000,
    65_535,
    1_000_000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
];

fn change_header(header: &mut [u8], random: &mut Random) {
    if header.len() < 13 {
        return;
    }
    for first in [0, 4] {
        if random.one_in(2) {
            header[first..first + 4].copy_from_slice(&random.pick(&SIDES).to_be_bytes());
        }
    }
    match random.below(4) {
        0 => header[8] = random.pick(&[0, 1, 2, 4, 8, 16, 32]),
        1 => header[9] = random.pick(&[0, 2, 3, 4, 6, 1]),
        2 => header[12] = random.pick(&[0, 1, 2]),
        _ => {}
    }
}

/// Changes the segments in front of a JPEG's data; those of frames most, which hold the sides.
fn mutate_jpeg(file: &mut [u8], random: &mut Random) {
    let mut segments = Vec::new();
    let mut place = 2;
    while let Some(&[0xff, marker, high, low]) = file.get(place..place + 4) {
        let length = usize::from(u16::from_be_bytes([high, low]));
        segments.push((place, marker, length));
        place += 2 + length;
    }
    for _ in 0..1 + random.length(3) {
        if segments.is_empty() {
            return;
        }
        let frame = segments
            .iter()
            .find(|(_, marker, _)| (0xc0..=0xc2).contains(marker))
            .copied();
        let (place, _, length) = match frame.filter(|_| random.one_in(2)) {
            Some(frame) => frame,
            None => random.pick(&segments),
        };
        let at = match random.below(4) {
            // The segment's length, or its marker.
            0 => place + 1 + random.below(3),
            // Height and width, behind length and precision.
            1 | 2 => place + 5 + random.below(4),
            _ => place + 4 + random.below(length),
        };
        if let Some(byte) = file.get_mut(at) {
            *byte = match random.below(3) {
                0 => random.pick(&[0, 1, 0x7f, 0xff]),
                1 => *byte ^ (1 << random.below(8)),
                _ => random.next() as u8,
            };
        }
    }
}

/// Changes the sizes at a WebP's beginning: of the file, of its chunk, of the picture.
fn mutate_webp(file: &mut [u8], random: &mut Random) {
    for _ in 0..1 + random.length(3) {
        let at = match random.below(3) {
            0 => 4 + random.below(4),
            1 => 12 + random.below(8),
            _ => 20 + random.below(16),
        };
        if let Some(byte) = file.get_mut(at) {
            *byte = match random.below(3) {
                0 => random.pick(&[0, 1, 0x3f, 0xff]),
                1 => *byte ^ (1 << random.below(8)),
                _ => random.next() as u8,
            };
        }
    }
}
