//! PNG files, row by row: of a picture that is stored in order only the part that is wanted is ever held.

use std::io::{BufRead, Cursor, Seek};

use image::metadata::Orientation;
use png::{Decoder, DecodingError, Limits, Reader, Transformations};

use super::colour::{Numbers, Profile};
use super::room::zeros;
use super::rows::{Layout, Part, Rows};
use super::{Stored, ensure_few_pixels};
use crate::limits::PICTURE_METADATA;

/// What the chunks before the pixels say.
pub(super) fn header(source: impl BufRead + Seek) -> Result<Stored, String> {
    Ok(stored(&open(source)?))
}

/// The pixels of a part.
pub(super) fn decode(bytes: &[u8], stored: &Stored, part: Part) -> Result<Vec<u8>, String> {
    let mut reader = open(Cursor::new(bytes))?;
    let mut rows = Rows::new(stored.width, stored.layout, part, stored.reading())?;
    if reader.info().interlaced {
        let mut whole = zeros(stored.width * stored.height * stored.layout.bytes())?;
        reader.next_frame(&mut whole).map_err(fail)?;
        whole
            .chunks_exact(stored.width * stored.layout.bytes())
            .try_for_each(|row| rows.push(row))?;
    } else {
        while let Some(row) = reader.next_row().map_err(fail)? {
            rows.push(row.data())?;
        }
    }
    rows.finish()
}

fn open<R: BufRead + Seek>(source: R) -> Result<Reader<R>, String> {
    let limits = |row: u64| Limits {
        bytes: (PICTURE_METADATA + row) as usize,
    };
    let mut decoder = Decoder::new_with_limits(source, limits(0));
    decoder.set_ignore_text_chunk(true);
    // Palettes become colours, and fewer than eight bits eight.
    decoder.set_transformations(Transformations::EXPAND);
    let info = decoder.read_header_info().map_err(fail)?;
    // Before the buffers for rows are made.
    ensure_few_pixels(info.width, info.height)?;
    let row = u64::from(info.width) * MOST_BYTES;
    decoder.set_limits(limits(row));
    decoder.read_info().map_err(fail)
}

/// Bytes of a pixel at most: four channels of 16 bits.
const MOST_BYTES: u64 = 8;

fn stored<R: BufRead + Seek>(reader: &Reader<R>) -> Stored {
    let info = reader.info();
    let (colours, depth) = reader.output_color_type();
    let layout = Layout {
        channels: colours.samples(),
        deep: depth == png::BitDepth::Sixteen,
    };
    let numbers = match layout.channels {
        1 | 2 => Numbers::Grey,
        _ => Numbers::Rgb,
    };
    let (width, height) = (info.width as usize, info.height as usize);
    let orientation = info.exif_metadata.as_deref().and_then(Orientation::from_exif_chunk);
    let whole = match info.interlaced {
        true => (width * height * layout.bytes()) as u64,
        false => 0,
    };
    Stored {
        width,
        height,
        orientation: orientation.unwrap_or(Orientation::NoTransforms),
        profile: Profile::of(info.icc_profile.as_deref(), numbers),
        layout,
        whole,
        // The row, the one above, the one in RGB, and what was inflated of the next ones.
        decoder: 6 * MOST_BYTES * width as u64,
        streams: true,
        as_mask: false,
    }
}

fn fail(error: DecodingError) -> String {
    match error {
        DecodingError::LimitsExceeded => format!(
            "cannot be decoded: it holds more than {PICTURE_METADATA} bytes of metadata, or a row that is too long"
        ),
        error => format!("cannot be decoded: {error}"),
    }
}
