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
    let whole = Window {
        start: [0.0; 2],
        extent: [image.width as f64, image.height as f64],
    };
    whole.resized(image, [width, height], filter)
}

impl Filter {
    fn kind(self) -> FilterType {
        match self {
            Filter::Bicubic => FilterType::CatmullRom,
            Filter::Lanczos => FilterType::Lanczos3,
        }
    }

    /// Pixels to either side that have a weight, when nothing shrinks.
    fn radius(self) -> f64 {
        match self {
            Filter::Bicubic => 2.0,
            Filter::Lanczos => 3.0,
        }
    }
}

/// A part of a picture, in its pixels and fractions of them.
#[derive(Clone, Copy, Debug)]
struct Window {
    /// Left and top.
    start: [f64; 2],
    /// Width and height.
    extent: [f64; 2],
}

impl Window {
    /// This part of `image` as a picture of its own, of size `target`. Pixels beside the part have their weight as if all of the
    /// image had been resized.
    ///
    /// Rows first, then columns, by calls of their own: doing both at once, the library takes it that the first pixel of a result
    /// reads the leftmost one of the image. It leaves weights of zero out, however, and where a part's first pixel falls on one of
    /// the image's, its second begins further left: that would be read beside the library's buffer.
    fn resized(self, image: &RgbImage, [width, height]: [usize; 2], filter: Filter) -> Result<RgbImage> {
        let fail = |reason: String| {
            Error::invalid(format!(
                "cannot resize {}x{} pixels to {width}x{height}: {reason}",
                image.width, image.height
            ))
        };
        if [image.width, image.height, width, height].contains(&0) {
            return Err(fail(NO_EXTENT.into()));
        }
        let ([left, top], [across, down]) = (self.start, self.extent);
        let rows = Window {
            start: [0.0, top],
            extent: [image.width as f64, down],
        };
        let columns = Window {
            start: [left, 0.0],
            extent: [across, height as f64],
        };
        let between = rows
            .along_one_axis(image, [image.width, height], filter)
            .map_err(fail)?;
        columns.along_one_axis(&between, [width, height], filter).map_err(fail)
    }

    /// The part as a picture of size `target`, which differs from it along one axis at most; otherwise the reason.
    fn along_one_axis(
        self,
        image: &RgbImage,
        [width, height]: [usize; 2],
        filter: Filter,
    ) -> std::result::Result<RgbImage, String> {
        let extent = |value: usize| u32::try_from(value).map_err(|_| NO_EXTENT.to_string());
        let ([left, top], [across, down]) = (self.start, self.extent);
        let (source_width, source_height) = (extent(image.width)?, extent(image.height)?);
        let source = ImageRef::new(source_width, source_height, &image.pixels, PixelType::U8x3)
            .map_err(|error| error.to_string())?;
        let mut resized = Image::new(extent(width)?, extent(height)?, PixelType::U8x3);
        let options = ResizeOptions::new()
            .resize_alg(ResizeAlg::Convolution(filter.kind()))
            .crop(left, top, across, down);
        Resizer::new()
            .resize(&source, &mut resized, &options)
            .map_err(|error| error.to_string())?;
        RgbImage::new(width, height, resized.into_vec()).map_err(|error| error.to_string())
    }
}

/// Why a picture cannot be resized.
const NO_EXTENT: &str = "an extent is 0 or too large";

/// A picture is resized whole and cropped then, as long as that makes no more than so many times the pixels that are kept. One
/// that is much longer than its new size is cropped first: a picture a million pixels wide and one high would take terabytes at
/// the size that covers a square. Results of both ways differ by the rounding of weights at most.
const MOST_COVERING: u128 = 4;

/// How a picture is resized, keeping its proportions, until it covers a size, and cropped around its centre.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cover {
    size: [usize; 2],
    target: [usize; 2],
    /// All of the picture at the size that covers.
    covering: [usize; 2],
}

impl Cover {
    /// For a picture of `size` that is to cover `target`.
    ///
    /// # Errors
    /// When an extent is 0.
    pub fn new(size: [usize; 2], target: [usize; 2]) -> Result<Self> {
        if size.contains(&0) || target.contains(&0) {
            let ([a, b], [c, d]) = (size, target);
            return Err(Error::invalid(format!(
                "cannot resize {a}x{b} pixels to {c}x{d}: an extent is 0 or too large"
            )));
        }
        let ratio = |axis: usize| target[axis] as f64 / size[axis] as f64;
        let scale = ratio(0).max(ratio(1));
        let covering = [0, 1].map(|axis| ((size[axis] as f64 * scale).round() as usize).max(target[axis]));
        Ok(Cover { size, target, covering })
    }

    /// The part of the picture that is kept, where that is cut out first.
    fn window(&self) -> Option<Window> {
        let pixels = |[width, height]: [usize; 2]| width as u128 * height as u128;
        if pixels(self.covering) <= MOST_COVERING * pixels(self.target) {
            return None;
        }
        let mut window = Window {
            start: [0.0; 2],
            extent: [0.0; 2],
        };
        for axis in 0..2 {
            let first = (self.covering[axis] - self.target[axis]) / 2;
            let pixel = self.size[axis] as f64 / self.covering[axis] as f64;
            window.start[axis] = first as f64 * pixel;
            window.extent[axis] = (self.target[axis] as f64 * pixel).min(self.size[axis] as f64 - window.start[axis]);
        }
        Some(window)
    }

    /// Columns at the left and right, and rows at the top and bottom, that have no weight in the result.
    pub fn margins(&self, filter: Filter) -> [usize; 2] {
        let Some(Window { start, extent }) = self.window() else {
            return [0; 2];
        };
        [0, 1].map(|axis| {
            // When a picture shrinks, the filter widens; one pixel more is for rounding.
            let reach = filter.radius() * (extent[axis] / self.target[axis] as f64).max(1.0) + 1.0;
            let end = self.size[axis] as f64 - (start[axis] + extent[axis]);
            (start[axis].min(end) - reach).max(0.0) as usize
        })
    }

    /// The result, of a picture without those margins.
    ///
    /// # Errors
    /// When an extent is too large.
    pub fn of_part(&self, part: &RgbImage, margins: [usize; 2], filter: Filter) -> Result<RgbImage> {
        let [width, height] = self.target;
        match self.window() {
            Some(mut window) => {
                for (start, margin) in window.start.iter_mut().zip(margins) {
                    *start -= margin as f64;
                }
                window.resized(part, self.target, filter)
            }
            None if self.covering == self.size => centre_crop(part, width, height),
            None => {
                let resized = resize(part, self.covering[0], self.covering[1], filter)?;
                centre_crop(&resized, width, height)
            }
        }
    }
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
    let cover = Cover::new([image.width, image.height], [width, height])?;
    match cover.margins(filter) {
        [0, 0] => cover.of_part(image, [0; 2], filter),
        // What has no weight is cut off first, as it is of a picture that is read by rows: between the passes a picture is as wide
        // as it was, and as high as it becomes.
        [x, y] => {
            let part = centre_crop(image, image.width - 2 * x, image.height - 2 * y)?;
            cover.of_part(&part, [x, y], filter)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number that follows from another without any order (SplitMix64).
    fn scattered(index: u64) -> u64 {
        let mut z = index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn picture(width: usize, height: usize, seed: u64) -> RgbImage {
        let pixels = (0..width * height * 3).map(|index| scattered(seed << 32 | index as u64) as u8);
        RgbImage::new(width, height, pixels.collect()).unwrap()
    }

    /// All of the picture resized, then cropped.
    fn whole_then_cropped(image: &RgbImage, width: usize, height: usize, filter: Filter) -> RgbImage {
        let scale = (width as f64 / image.width as f64).max(height as f64 / image.height as f64);
        let covering = |extent: usize, least: usize| ((extent as f64 * scale).round() as usize).max(least);
        let (all_wide, all_high) = (covering(image.width, width), covering(image.height, height));
        let resized = resize(image, all_wide, all_high, filter).unwrap();
        centre_crop(&resized, width, height).unwrap()
    }

    /// The largest difference of two bytes.
    fn furthest(a: &RgbImage, b: &RgbImage) -> u8 {
        let pairs = a.pixels.iter().zip(&b.pixels);
        pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap_or(0)
    }

    #[test]
    fn cutting_first_comes_to_the_same() {
        let extent = |index: u64, most: u64| 1 + (scattered(index) % most) as usize;
        let mut cut = 0;
        for case in 0..600 {
            let [width, height] = [extent(4 * case, 400), extent(4 * case + 1, 40)];
            let [to_width, to_height] = [extent(4 * case + 2, 60), extent(4 * case + 3, 60)];
            let image = picture(width, height, case);
            for filter in [Filter::Bicubic, Filter::Lanczos] {
                let expected = whole_then_cropped(&image, to_width, to_height, filter);
                let all = Cover::new([width, height], [to_width, to_height]).unwrap();
                let [x, y] = all.margins(filter);
                let part = centre_crop(&image, width - 2 * x, height - 2 * y).unwrap();
                let found = all.of_part(&part, [x, y], filter).unwrap();
                let difference = furthest(&found, &expected);
                let case = format!("{width}x{height} to {to_width}x{to_height} without {x} and {y}: {difference}");
                match all.window() {
                    // Data sets of before keep every bit.
                    None => assert!([x, y] == [0; 2] && difference == 0, "{case}"),
                    Some(_) => assert!(difference <= 2, "{case}"),
                }
                cut += usize::from(x + y > 0);
                let at_once = cover(&image, to_width, to_height, filter).unwrap();
                assert_eq!(furthest(&found, &at_once), 0, "{case}");
            }
        }
        assert!(cut > 200, "{cut}");
    }

    #[test]
    fn a_part_is_no_larger_than_what_it_becomes_needs() {
        let cover = Cover::new([1_000_000, 1], [1024, 1024]).unwrap();
        assert!(1_000_000 - 2 * cover.margins(Filter::Lanczos)[0] < 16);
        let cover = Cover::new([16_384, 1024], [1024, 1024]).unwrap();
        assert!(16_384 - 2 * cover.margins(Filter::Bicubic)[0] < 1040);
        assert!(Cover::new([5, 5], [0, 5]).is_err());
    }
}
