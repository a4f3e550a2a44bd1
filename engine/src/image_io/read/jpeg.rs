//! JPEG files, through a decoder that holds the whole picture.
//!
//! Decoders fill what is missing with grey and say nothing, which would teach a model grey. So a file must end as a picture does,
//! be as long as the least that a picture of its size takes, and hold nothing that the decoder cannot make sense of. Source of
//! markers and sizes: ITU-T T.81, annexes A and B.

use std::io::{BufRead, Seek};

use image::metadata::Orientation;
use zune_jpeg::JpegDecoder;
use zune_jpeg::errors::DecodeErrors;
use zune_jpeg::zune_core::bytestream::{ZByteReaderTrait, ZCursor};
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::colour::{Numbers, Profile};
use super::room::zeros;
use super::rows::{Layout, Part};
use super::{Stored, ensure_few_pixels, part_of};
use crate::limits::PICTURE_METADATA;

/// A byte that begins a marker, and the second bytes of those that matter here.
const MARKER: u8 = 0xff;
const START_OF_IMAGE: u8 = 0xd8;
const END_OF_IMAGE: u8 = 0xd9;
const START_OF_SCAN: u8 = 0xda;
const PROGRESSIVE: u8 = 0xc2;

/// Side of a block of coefficients.
const BLOCK: u64 = 8;

/// What the segments before the pixels say.
pub(super) fn header(mut source: impl BufRead + Seek) -> Result<Stored, String> {
    let frame = Frame::read(&mut source)?;
    ensure_few_pixels(frame.width.into(), frame.height.into())?;
    source.rewind().map_err(|error| error.to_string())?;
    let mut decoder = JpegDecoder::new_with_options(source, options());
    decoder.decode_headers().map_err(fail)?;
    let colours = colours_of(&decoder)?;
    let (width, height) = decoder.dimensions().unwrap_or_default();
    if (width, height) != (frame.width.into(), frame.height.into()) {
        return Err("cannot be decoded: it holds headers of several pictures".into());
    }
    let layout = Layout {
        channels: if colours == ColorSpace::Luma { 1 } else { 3 },
        deep: false,
    };
    let numbers = match decoder.input_colorspace() {
        Some(ColorSpace::Luma) => Numbers::Grey,
        Some(ColorSpace::CMYK | ColorSpace::YCCK) => Numbers::Inks,
        _ => Numbers::Rgb,
    };
    let orientation = decoder.exif().and_then(|exif| Orientation::from_exif_chunk(exif));
    Ok(Stored {
        width,
        height,
        orientation: orientation.unwrap_or(Orientation::NoTransforms),
        profile: Profile::of(decoder.icc_profile().as_deref(), numbers),
        layout,
        whole: (width * height * layout.channels) as u64,
        decoder: frame.decoder_bytes(),
        streams: false,
        as_mask: false,
    })
}

/// The pixels of a part.
pub(super) fn decode(bytes: &[u8], stored: &Stored, part: Part) -> Result<Vec<u8>, String> {
    let frame = Frame::read(&mut std::io::Cursor::new(bytes))?;
    if !is_complete(bytes) || (bytes.len() as u64) < frame.least_bytes() {
        return Err("the file ends before the picture does".into());
    }
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options());
    decoder.decode_headers().map_err(fail)?;
    let colours = colours_of(&decoder)?;
    // Odd bytes between headers do no harm; within the compressed data they mean that it is damaged.
    decoder.set_options(options().jpeg_set_out_colorspace(colours).set_strict_mode(true));
    let mut whole = zeros(stored.whole as usize)?;
    if decoder.output_buffer_size() != Some(whole.len()) {
        return Err("cannot be decoded: it changed while it was read".into());
    }
    decoder.decode_into(&mut whole).map_err(fail)?;
    drop(decoder);
    part_of(whole, stored, part)
}

fn options() -> DecoderOptions {
    // The sides are checked by the number of pixels.
    DecoderOptions::default()
        .set_strict_mode(false)
        .set_max_width(usize::MAX)
        .set_max_height(usize::MAX)
}

/// What the decoder is to make of the picture: grey stays grey, everything else becomes RGB.
fn colours_of<T: ZByteReaderTrait>(decoder: &JpegDecoder<T>) -> Result<ColorSpace, String> {
    match decoder.input_colorspace() {
        Some(ColorSpace::Luma) => Ok(ColorSpace::Luma),
        Some(_) => Ok(ColorSpace::RGB),
        None => Err("cannot be decoded: it has no header".into()),
    }
}

/// The header of the picture, with what decides how much memory the decoder takes.
struct Frame {
    width: u16,
    height: u16,
    /// Horizontal and vertical sampling factors of each component.
    factors: Vec<(u64, u64)>,
    /// Whether coefficients of the whole picture are held before any of it becomes pixels.
    in_scans: bool,
}

impl Frame {
    /// Walks the segments up to the first scan.
    fn read(source: &mut (impl BufRead + Seek)) -> Result<Self, String> {
        let ends = |_| "the file ends before the picture does".to_owned();
        let mut frame: Option<Frame> = None;
        loop {
            let marker = next_marker_of(source).map_err(ends)?;
            if source.stream_position().map_err(ends)? > PICTURE_METADATA {
                return Err(format!(
                    "cannot be decoded: it holds more than {PICTURE_METADATA} bytes before its picture"
                ));
            }
            match marker {
                END_OF_IMAGE => return Err("cannot be decoded: it holds no picture".into()),
                0x01 | START_OF_IMAGE | 0xd0..=0xd7 => continue,
                _ => (),
            }
            let mut length = [0; 2];
            source.read_exact(&mut length).map_err(ends)?;
            let length = u16::from_be_bytes(length).saturating_sub(2);
            match marker {
                START_OF_SCAN => {
                    let mut count = [0];
                    source.read_exact(&mut count).map_err(ends)?;
                    let mut frame = frame.ok_or("cannot be decoded: it holds no picture")?;
                    frame.in_scans |= usize::from(count[0]) < frame.factors.len();
                    return Ok(frame);
                }
                // All kinds of frames, but not the tables and extensions among their numbers.
                0xc0..=0xcf if !matches!(marker, 0xc4 | 0xc8 | 0xcc) => {
                    let mut body = vec![0; length.into()];
                    source.read_exact(&mut body).map_err(ends)?;
                    let earlier = frame.is_some_and(|frame| frame.in_scans);
                    let mut found = Frame::of(&body).ok_or("cannot be decoded: its header is damaged")?;
                    found.in_scans |= earlier || marker == PROGRESSIVE;
                    frame = Some(found);
                }
                _ => source.seek_relative(length.into()).map_err(ends)?,
            }
        }
    }

    /// The content of a frame's header: precision, sides, and three bytes for each component.
    fn of(body: &[u8]) -> Option<Self> {
        let [_, a, b, c, d, _, components @ ..] = body else {
            return None;
        };
        let (components, _) = components.as_chunks::<3>();
        let factors = components
            .iter()
            .map(|[_, factors, _]| (u64::from(factors >> 4), u64::from(factors & 15)))
            .collect::<Vec<_>>();
        let sound = |&(h, v): &(u64, u64)| (1..=4).contains(&h) && (1..=4).contains(&v);
        let few = (1..=4).contains(&factors.len());
        (few && factors.iter().all(sound)).then_some(Frame {
            width: u16::from_be_bytes([*c, *d]),
            height: u16::from_be_bytes([*a, *b]),
            factors,
            in_scans: false,
        })
    }

    fn largest_factors(&self) -> (u64, u64) {
        let most = |of: fn(&(u64, u64)) -> u64| self.factors.iter().map(of).max().unwrap_or(1);
        (most(|factors| factors.0), most(|factors| factors.1))
    }

    /// Bytes that the decoder takes beside the pixels: two for each coefficient, of the whole picture or of some rows.
    fn decoder_bytes(&self) -> u64 {
        let (h_most, v_most) = self.largest_factors();
        let (width, height) = (u64::from(self.width), u64::from(self.height));
        let columns = width.div_ceil(BLOCK * h_most);
        let rows = match self.in_scans {
            true => height.div_ceil(BLOCK * v_most),
            // Those in work, and what is made of them on the way to the picture's size.
            false => 4,
        };
        let blocks: u64 = self.factors.iter().map(|(h, v)| columns * h * rows * v).sum();
        2 * BLOCK * BLOCK * blocks
    }

    /// Bytes that a whole picture of this size has at least: a block takes a bit, whatever it shows and however it is coded.
    fn least_bytes(&self) -> u64 {
        let (h_most, v_most) = self.largest_factors();
        let side = |side: u16, factor: u64, most: u64| (u64::from(side) * factor).div_ceil(most).div_ceil(BLOCK);
        let blocks = self.factors.iter();
        let blocks: u64 = blocks
            .map(|&(h, v)| side(self.width, h, h_most) * side(self.height, v, v_most))
            .sum();
        blocks / 8
    }
}

/// Moves behind the next marker and returns its second byte.
fn next_marker_of(source: &mut impl BufRead) -> std::io::Result<u8> {
    let mut byte = [0];
    loop {
        source.skip_until(MARKER)?;
        // Any number of them may stand in front of a marker.
        byte[0] = MARKER;
        while byte[0] == MARKER {
            source.read_exact(&mut byte)?;
        }
        if byte[0] != 0 {
            return Ok(byte[0]);
        }
    }
}

/// Whether the picture's end marker is there. Walks the segments by their lengths (a preview inside one has an end marker of
/// its own) and the entropy-coded data byte by byte.
fn is_complete(bytes: &[u8]) -> bool {
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
        *at += bytes.get(*at..)?.iter().position(|&byte| byte == MARKER)?;
        while *bytes.get(*at)? == MARKER {
            *at += 1;
        }
        let marker = bytes[*at];
        *at += 1;
        if marker != 0 {
            return Some(marker);
        }
    }
}

fn fail(error: DecodeErrors) -> String {
    format!("cannot be decoded: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The content of a frame's header with these components.
    fn body(width: u16, height: u16, factors: &[u8]) -> Vec<u8> {
        let mut body = vec![8];
        body.extend(height.to_be_bytes());
        body.extend(width.to_be_bytes());
        body.push(factors.len() as u8);
        body.extend(factors.iter().flat_map(|&factors| [1, factors, 0]));
        body
    }

    #[test]
    fn memory_and_least_length_follow_from_the_header() {
        let mut frame = Frame::of(&body(1000, 600, &[0x22, 0x11, 0x11])).unwrap();
        // 63 by 38 units of six blocks when all of it is held; 125 x 75 blocks of brightness and two times 63 x 38 of colour.
        assert_eq!(frame.least_bytes(), (125 * 75 + 2 * 63 * 38) / 8);
        assert_eq!(frame.decoder_bytes(), 2 * 64 * 6 * 63 * 4);
        frame.in_scans = true;
        assert_eq!(frame.decoder_bytes(), 2 * 64 * 6 * 63 * 38);
        for factors in [&[][..], &[0x11; 5], &[0x01], &[0x51]] {
            assert!(Frame::of(&body(8, 8, factors)).is_none(), "{factors:?}");
        }
    }
}
