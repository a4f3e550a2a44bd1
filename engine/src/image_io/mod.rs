//! Picture files.
//!
//! Writing ([`encode_image`] to memory, [`write_image`] to a file): PNG, JPEG and lossless WebP by the path's extension, from 8-bit RGB, beside the target and
//! renamed into place. A PNG carries the [`Settings`] that drew it, and [`read_settings`] gets them back.
//!
//! Reading ([`read_image`]): the same formats, recognised by content, to 8-bit RGB, within the limits that [`crate::limits`] states;
//! [`fit_to_multiple`], [`cover`] and [`read_cover`] bring a picture to a size that a model takes. A [`Mask`] says which of its
//! places may change.

mod mask;
mod png;
mod read;
mod resize;
mod settings;
mod write;

pub use mask::Mask;
pub use read::{Colours, Header, read_cover, read_header, read_image};
pub use resize::{Filter, centre_crop, cover, fit_to_multiple, fitted_size, resize};
pub use settings::{Settings, StartSettings, WeightSettings, read_settings};
pub use write::{ImageFormat, WriteOptions, encode_image, ensure_writable, write_image};

use crate::error::{Error, Result};

/// A picture in 8-bit RGB: rows from top to bottom, pixels from left to right, three bytes each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RgbImage {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl RgbImage {
    /// A picture of the given extents.
    ///
    /// # Errors
    /// When an extent is 0, or `pixels` does not hold three bytes for each of them.
    pub fn new(width: usize, height: usize, pixels: Vec<u8>) -> Result<Self> {
        let bytes = width.checked_mul(height).and_then(|count| count.checked_mul(3));
        if bytes != Some(pixels.len()) || pixels.is_empty() {
            return Err(Error::invalid(format!(
                "{} bytes do not make a picture of {width}x{height} pixels",
                pixels.len()
            )));
        }
        Ok(RgbImage { width, height, pixels })
    }

    /// Pixels in a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// The bytes, without padding between rows.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// Gives the bytes away.
    pub fn into_pixels(self) -> Vec<u8> {
        self.pixels
    }
}
