//! Pictures to the sizes that a model takes.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use super::RgbImage;
use crate::error::{Error, Result};

/// How pixels are weighed when a picture is resized. When it shrinks, the filter widens with the factor, so that fine
/// patterns blur instead of turning into coarse ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Filter {
    /// Catmull and Rom's cubic, 4 pixels wide.
    #[default]
    Bicubic,
    /// Lanczos's window of 6 pixels: sharper, with slight halos.
    Lanczos,
}

/// Resizes to `width`x`height`, whatever the proportions.
///
/// # Errors
/// When an extent is 0 or too large.
pub fn resize(image: &RgbImage, width: usize, height: usize, filter: Filter) -> Result<RgbImage> {
    if (image.width, image.height) == (width, height) {
        return Ok(image.clone());
    }
    let fail = |reason: String| {
        Error::invalid(format!(
            "cannot resize {}x{} pixels to {width}x{height}: {reason}",
            image.width, image.height
        ))
    };
    let extent = |value: usize| match u32::try_from(value) {
        Ok(value) if value > 0 => Ok(value),
        _ => Err(fail("an extent is 0 or too large".into())),
    };
    let (source_width, source_height) = (extent(image.width)?, extent(image.height)?);
    let source = ImageRef::new(source_width, source_height, &image.pixels, PixelType::U8x3)
        .map_err(|error| fail(error.to_string()))?;
    let mut target = Image::new(extent(width)?, extent(height)?, PixelType::U8x3);
    let filter = match filter {
        Filter::Bicubic => FilterType::CatmullRom,
        Filter::Lanczos => FilterType::Lanczos3,
    };
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
    Resizer::new()
        .resize(&source, &mut target, &options)
        .map_err(|error| fail(error.to_string()))?;
    RgbImage::new(width, height, target.into_vec())
}

/// The middle `width`x`height` pixels; where the margins are odd, the one at the right or bottom is the larger.
///
/// # Errors
/// When the picture is smaller.
pub fn centre_crop(image: &RgbImage, width: usize, height: usize) -> Result<RgbImage> {
    if width > image.width || height > image.height {
        return Err(Error::invalid(format!(
            "cannot cut {width}x{height} pixels out of {}x{}",
            image.width, image.height
        )));
    }
    let (left, top) = ((image.width - width) / 2, (image.height - height) / 2);
    let rows = image.pixels.chunks_exact(image.width * 3).skip(top).take(height);
    let pixels = rows
        .flat_map(|row| &row[left * 3..(left + width) * 3])
        .copied()
        .collect();
    RgbImage::new(width, height, pixels)
}

/// The largest size of about the same proportions with at most `max_pixels` pixels, never above the original, each side
/// rounded down to a multiple of `multiple`.
///
/// # Errors
/// When a side would be 0.
pub fn fitted_size(width: usize, height: usize, max_pixels: usize, multiple: usize) -> Result<(usize, usize)> {
    let pixels = width as f64 * height as f64;
    let scale = (max_pixels as f64 / pixels).sqrt().min(1.0);
    let side = |extent: usize| (extent as f64 * scale) as usize / multiple.max(1) * multiple;
    match (side(width), side(height)) {
        (0, _) | (_, 0) => Err(Error::invalid(format!(
            "a picture of {width}x{height} pixels is too small for sides that are multiples of {multiple} \
             (and at most {max_pixels} pixels in all)"
        ))),
        size => Ok(size),
    }
}

/// Brings a picture to its [`fitted_size`]: resized until it covers that size, then cropped around its centre.
///
/// # Errors
/// When a side would be 0.
pub fn fit_to_multiple(image: &RgbImage, max_pixels: usize, multiple: usize, filter: Filter) -> Result<RgbImage> {
    let (width, height) = fitted_size(image.width, image.height, max_pixels, multiple)?;
    cover(image, width, height, filter)
}

/// Resizes a picture, keeping its proportions, until it covers `width`x`height` pixels, and crops it around its centre.
///
/// # Errors
/// When an extent is 0 or too large.
pub fn cover(image: &RgbImage, width: usize, height: usize, filter: Filter) -> Result<RgbImage> {
    let scale = (width as f64 / image.width as f64).max(height as f64 / image.height as f64);
    let covering = |extent: usize, least: usize| ((extent as f64 * scale).round() as usize).max(least);
    let resized = resize(
        image,
        covering(image.width, width),
        covering(image.height, height),
        filter,
    )?;
    centre_crop(&resized, width, height)
}
