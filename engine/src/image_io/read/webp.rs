//! WebP files, through a decoder that holds the whole picture.

use std::io::{BufRead, Cursor, Read, Seek};

use image::metadata::Orientation;
use image_webp::{DecodingError, WebPDecoder};

use super::colour::{Numbers, Profile};
use super::room::zeros;
use super::rows::{Layout, Part};
use super::{Stored, ensure_few_pixels, part_of};
use crate::limits::PICTURE_METADATA;

/// What the chunks before the pixels say.
pub(super) fn header(mut source: impl BufRead + Seek) -> Result<Stored, String> {
    let frame = largest_frame(&mut source)?;
    source.rewind().map_err(|error| error.to_string())?;
    let mut decoder = open(source)?;
    let (width, height) = decoder.dimensions();
    ensure_few_pixels(width, height)?;
    if (frame.width, frame.height) != (width, height) && !decoder.is_animated() {
        return Err(format!(
            "cannot be decoded: its header says {width}x{height} pixels, its picture {}x{}",
            frame.width, frame.height
        ));
    }
    ensure_few_pixels(frame.width, frame.height)?;
    let opacity = decoder.has_alpha();
    let layout = Layout {
        channels: 3 + usize::from(opacity),
        deep: false,
    };
    let icc = decoder.icc_profile().map_err(fail)?;
    let exif = decoder.exif_metadata().map_err(fail)?;
    let pixels = u64::from(width) * u64::from(height);
    let frame_pixels = u64::from(frame.width) * u64::from(frame.height);
    // Lossless pictures are decoded to four bytes a pixel, lossy ones to three halves and, with opacity, to five more; a frame of
    // an animation comes to four, and is laid on four of the canvas.
    let decoder_bytes = match (frame.lossless, opacity) {
        (true, _) => 4 * frame_pixels,
        (false, false) => 2 * frame_pixels,
        (false, true) => 7 * frame_pixels,
    } + match decoder.is_animated() {
        true => 4 * frame_pixels + 4 * pixels,
        false => 0,
    };
    let orientation = exif.as_deref().and_then(Orientation::from_exif_chunk);
    Ok(Stored {
        width: width as usize,
        height: height as usize,
        orientation: orientation.unwrap_or(Orientation::NoTransforms),
        profile: Profile::of(icc.as_deref(), Numbers::Rgb),
        layout,
        whole: pixels * layout.bytes() as u64,
        decoder: decoder_bytes,
        streams: false,
        as_mask: false,
    })
}

/// The pixels of a part; of an animation those of its first frame.
pub(super) fn decode(bytes: &[u8], stored: &Stored, part: Part) -> Result<Vec<u8>, String> {
    let mut decoder = open(Cursor::new(bytes))?;
    let mut whole = zeros(stored.width * stored.height * stored.layout.bytes())?;
    decoder.read_image(&mut whole).map_err(fail)?;
    part_of(whole, stored, part)
}

fn open<R: BufRead + Seek>(source: R) -> Result<WebPDecoder<R>, String> {
    let mut decoder = WebPDecoder::new(source).map_err(fail)?;
    decoder.set_memory_limit(PICTURE_METADATA as usize);
    Ok(decoder)
}

/// The size that the compressed picture itself says, which the decoder goes by.
struct Frame {
    width: u32,
    height: u32,
    lossless: bool,
}

/// The picture's own header, or that of an animation's first frame. Source: the WebP container specification; RFC 6386 § 9.1;
/// the WebP lossless bitstream specification § 3.
fn largest_frame(source: &mut (impl BufRead + Seek)) -> Result<Frame, String> {
    let lacking = |_| "cannot be decoded: it holds no picture".to_owned();
    let mut riff = [0; 12];
    source.read_exact(&mut riff).map_err(lacking)?;
    loop {
        let mut head = [0; 8];
        source.read_exact(&mut head).map_err(lacking)?;
        let [kind @ .., a, b, c, d] = head;
        let length = u64::from(u32::from_le_bytes([a, b, c, d])).next_multiple_of(2);
        match &kind {
            b"VP8 " => {
                // A frame tag and a start code of three bytes each, then both sides in 14 bits and their scales in 2.
                let mut start = [0; 10];
                source.read_exact(&mut start).map_err(lacking)?;
                let side = |low: u8, high: u8| u32::from(u16::from_le_bytes([low, high]) & 0x3fff);
                return Ok(Frame {
                    width: side(start[6], start[7]),
                    height: side(start[8], start[9]),
                    lossless: false,
                });
            }
            b"VP8L" => {
                // A signature byte, then both sides less one in 14 bits.
                let mut start = [0; 5];
                source.read_exact(&mut start).map_err(lacking)?;
                let sides = u32::from_le_bytes([start[1], start[2], start[3], start[4]]);
                return Ok(Frame {
                    width: (sides & 0x3fff) + 1,
                    height: (sides >> 14 & 0x3fff) + 1,
                    lossless: true,
                });
            }
            // A frame of an animation holds such chunks after 16 bytes of its own.
            b"ANMF" => skip(source, 16)?,
            _ => skip(source, length)?,
        }
    }
}

fn skip(source: &mut (impl Read + Seek), bytes: u64) -> Result<(), String> {
    let bytes = i64::try_from(bytes).map_err(|error| error.to_string())?;
    source
        .seek_relative(bytes)
        .map_err(|error| format!("cannot be decoded: {error}"))
}

fn fail(error: DecodingError) -> String {
    format!("cannot be decoded: {error}")
}
