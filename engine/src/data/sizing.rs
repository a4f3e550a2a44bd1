//! The size at which a picture is used.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::image_io::fitted_size;
use crate::limits::Side;

/// A size in pixels, written `WIDTHxHEIGHT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PictureSize {
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

impl PictureSize {
    /// The number of pixels.
    pub fn pixels(self) -> usize {
        self.width * self.height
    }

    /// How much larger than a picture of size `found` one is that covers this size, keeping its proportions.
    pub fn enlargement(self, found: PictureSize) -> f64 {
        let ratio = |side: usize, found: usize| side as f64 / found as f64;
        ratio(self.width, found.width).max(ratio(self.height, found.height))
    }

    /// The logarithm of the proportions, in which "twice as wide" and "twice as high" are equally far from square.
    fn log_aspect(self) -> f64 {
        (self.width as f64 / self.height as f64).ln()
    }
}

impl fmt::Display for PictureSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

impl FromStr for PictureSize {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let sides = text.split_once(['x', '×']);
        let side = |text: &str| text.trim().parse().ok().map(Side::get);
        match sides.map(|(width, height)| (side(width), side(height))) {
            Some((Some(width), Some(height))) => Ok(PictureSize { width, height }),
            _ => Err(Error::invalid(format!(
                "`{text}` is no size in pixels; write for example 1024x768, with sides of {} to {}",
                Side::LEAST,
                Side::MOST
            ))),
        }
    }
}

/// How the size of each picture follows from the one that it has on disk. In every case a picture is resized, keeping its
/// proportions, until it covers its new size, and cropped around its centre.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sizing {
    /// About its own proportions, at most so many pixels, never enlarged.
    MaxPixels(usize),
    /// The same for all.
    Fixed(PictureSize),
    /// The one of these whose proportions are nearest.
    Buckets(Vec<PictureSize>),
}

impl Sizing {
    /// Checks that the sizes that are given are ones that the model takes: sides that are multiples of `multiple`.
    ///
    /// # Errors
    /// Naming the size that is not, and the next that is.
    pub fn check(&self, multiple: usize) -> Result<()> {
        let sizes = match self {
            Sizing::MaxPixels(pixels) if *pixels < multiple * multiple => {
                return Err(Error::invalid(format!(
                    "max_pixels = {pixels} is less than the smallest picture of this model, {multiple}x{multiple}"
                )));
            }
            Sizing::MaxPixels(_) => &[],
            Sizing::Fixed(size) => std::slice::from_ref(size),
            Sizing::Buckets(sizes) if sizes.is_empty() => return Err(Error::invalid("buckets names no size")),
            Sizing::Buckets(sizes) => sizes.as_slice(),
        };
        let fits = |size: &&PictureSize| size.width.is_multiple_of(multiple) && size.height.is_multiple_of(multiple);
        match sizes.iter().find(|size| !fits(size)) {
            None => Ok(()),
            Some(size) => Err(Error::invalid(format!(
                "this model takes sides that are multiples of {multiple}; {size} is not, {}x{} is",
                size.width.next_multiple_of(multiple),
                size.height.next_multiple_of(multiple)
            ))),
        }
    }

    /// The size at which a picture of size `found` is used.
    ///
    /// # Errors
    /// When it is too small for that.
    pub fn size_for(&self, found: PictureSize, multiple: usize) -> Result<PictureSize> {
        match self {
            Sizing::MaxPixels(most) => {
                let (width, height) = fitted_size(found.width, found.height, *most, multiple)?;
                Ok(PictureSize { width, height })
            }
            Sizing::Fixed(size) => Ok(*size),
            Sizing::Buckets(sizes) => {
                let distance = |size: &PictureSize| (size.log_aspect() - found.log_aspect()).abs();
                let nearest = sizes.iter().min_by(|a, b| distance(a).total_cmp(&distance(b)));
                nearest.copied().ok_or_else(|| Error::invalid("buckets names no size"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(text: &str) -> PictureSize {
        text.parse().unwrap()
    }

    #[test]
    fn sizes_are_read() {
        assert_eq!(
            size("1024x768"),
            PictureSize {
                width: 1024,
                height: 768
            }
        );
        assert_eq!(size("64 x 32").to_string(), "64x32");
        for bad in ["", "64", "64x", "0x5", "64x64x3", "99999999x1"] {
            assert!(bad.parse::<PictureSize>().is_err(), "{bad}");
        }
    }

    #[test]
    fn pictures_get_the_size_that_fits_best() {
        let found = size("300x200");
        let of = |sizing: Sizing| sizing.size_for(found, 16).unwrap().to_string();
        assert_eq!(of(Sizing::MaxPixels(15_000)), "144x96");
        assert_eq!(of(Sizing::MaxPixels(1 << 20)), "288x192");
        assert_eq!(of(Sizing::Fixed(size("64x64"))), "64x64");
        let buckets = Sizing::Buckets(vec![size("64x64"), size("96x64"), size("64x96")]);
        assert_eq!(of(buckets.clone()), "96x64");
        assert_eq!(buckets.size_for(size("10x11"), 16).unwrap(), size("64x64"));
        assert!(Sizing::MaxPixels(15_000).size_for(size("300x8"), 16).is_err());
    }

    #[test]
    fn sizes_that_no_picture_can_have_are_refused() {
        assert!(Sizing::Fixed(size("64x72")).check(8).is_ok());
        let message = Sizing::Fixed(size("64x72")).check(16).unwrap_err().to_string();
        assert!(message.contains("64x72 is not, 64x80 is"), "{message}");
        assert!(Sizing::MaxPixels(255).check(16).is_err());
        assert!(Sizing::Buckets(Vec::new()).check(16).is_err());
    }
}
