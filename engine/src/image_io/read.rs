//! Pictures from files.

use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read, Seek};
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use super::{RgbImage, jpeg_end};
use crate::error::{Error, Result};

/// The most bytes a decoded picture may take: enough for 10240² pixels of four 16-bit channels.
const MAX_DECODED: u64 = 1 << 30;

/// Reads a PNG, JPEG or WebP file as 8-bit RGB. What the file is, its content says, not its name. Turned pictures (EXIF) are
/// set upright, transparent ones laid on white, deeper ones rounded to 8 bits; colour profiles are ignored.
///
/// # Errors
/// Naming the file and what is wrong with it.
pub fn read_image(path: &Path) -> Result<RgbImage> {
    let bytes = std::fs::read(path).map_err(|source| Error::io(path, source))?;
    let decoded = decode(&bytes).map_err(|reason| Error::file(path, reason))?;
    let (width, height) = (decoded.width() as usize, decoded.height() as usize);
    RgbImage::new(width, height, flatten(decoded)).map_err(|error| Error::file(path, error.to_string()))
}

/// The width and height that [`read_image`] would give, from the beginning of the file alone.
///
/// # Errors
/// Naming the file and what is wrong with it.
pub fn read_size(path: &Path) -> Result<(usize, usize)> {
    let file = File::open(path).map_err(|source| Error::io(path, source))?;
    let size = || {
        let mut file = BufReader::new(file);
        let mut start = [0; LONGEST_SIGNATURE];
        let length = read_up_to(&mut file, &mut start).map_err(|error| error.to_string())?;
        file.rewind().map_err(|error| error.to_string())?;
        let mut decoder = decoder(file, known_format(&start[..length])?)?;
        let (width, height) = decoder.dimensions();
        let turned = matches!(
            decoder.orientation().map_err(fail)?,
            Orientation::Rotate90 | Orientation::Rotate270 | Orientation::Rotate90FlipH | Orientation::Rotate270FlipH
        );
        Ok(match turned {
            true => (height as usize, width as usize),
            false => (width as usize, height as usize),
        })
    };
    size().map_err(|reason: String| Error::file(path, reason))
}

/// Bytes that tell every known format.
const LONGEST_SIGNATURE: usize = 16;

fn read_up_to(file: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read(&mut buffer[length..])? {
            0 => break,
            count => length += count,
        }
    }
    Ok(length)
}

fn decode(bytes: &[u8]) -> std::result::Result<DynamicImage, String> {
    let format = known_format(bytes)?;
    if format == ImageFormat::Jpeg && !jpeg_end::is_complete(bytes) {
        return Err("the file ends before the picture does".into());
    }
    let mut decoder = decoder(Cursor::new(bytes), format)?;
    let orientation = decoder.orientation().map_err(fail)?;
    let mut decoded = DynamicImage::from_decoder(decoder).map_err(fail)?;
    decoded.apply_orientation(orientation);
    Ok(decoded)
}

/// The format of a file that begins with these bytes.
fn known_format(bytes: &[u8]) -> std::result::Result<ImageFormat, String> {
    let known = |format: &ImageFormat| matches!(format, ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP);
    let format = image::guess_format(bytes).ok().filter(known);
    format.ok_or("is not a PNG, JPEG or WebP picture".into())
}

fn decoder<'a>(
    source: impl BufRead + Seek + 'a,
    format: ImageFormat,
) -> std::result::Result<impl ImageDecoder + 'a, String> {
    let mut reader = ImageReader::with_format(source, format);
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_DECODED);
    reader.limits(limits);
    reader.into_decoder().map_err(fail)
}

fn fail(error: image::ImageError) -> String {
    format!("cannot be decoded: {error}")
}

/// The pixels in 8-bit RGB, on white.
fn flatten(picture: DynamicImage) -> Vec<u8> {
    if !picture.color().has_alpha() {
        return picture.into_rgb8().into_raw();
    }
    let pixels = picture.into_rgba8();
    let on_white = |channel: u8, alpha: u8| {
        let (channel, alpha) = (u32::from(channel), u32::from(alpha));
        // Divided by 255 to the nearest.
        ((channel * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    pixels
        .pixels()
        .flat_map(|pixel| {
            let [r, g, b, alpha] = pixel.0;
            [on_white(r, alpha), on_white(g, alpha), on_white(b, alpha)]
        })
        .collect()
}
