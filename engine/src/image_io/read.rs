//! Pictures from files.

use std::io::Cursor;
use std::path::Path;

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

fn decode(bytes: &[u8]) -> std::result::Result<DynamicImage, String> {
    let known = |format: &ImageFormat| matches!(format, ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP);
    let format = image::guess_format(bytes).ok().filter(known);
    let format = format.ok_or("is not a PNG, JPEG or WebP picture")?;
    if format == ImageFormat::Jpeg && !jpeg_end::is_complete(bytes) {
        return Err("the file ends before the picture does".into());
    }
    let fail = |error: image::ImageError| format!("cannot be decoded: {error}");
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_DECODED);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(fail)?;
    let orientation = decoder.orientation().map_err(fail)?;
    let mut decoded = DynamicImage::from_decoder(decoder).map_err(fail)?;
    decoded.apply_orientation(orientation);
    Ok(decoded)
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
