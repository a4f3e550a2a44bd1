//! How alike two pictures are, and whether the patches that a picture was drawn in can be seen.
//!
//! * PSNR: 10 log₁₀ (255² / mean square of the differences), over all channels.
//! * SSIM: Wang et al. 2004, with a Gaussian window of 11×11 and deviation 1.5, K₁ 0.01, K₂ 0.03, covariances over N; the mean over the
//!   places where the window lies within the picture, and over channels. The same as scikit-image's `structural_similarity` with
//!   `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`; torchmetrics also counts places at mirrored edges.
//! * Patches of P×P: how far their mean colours are apart (root of the mean square, in levels of 255); how much of the detail within
//!   them there is (the mean of their standard deviations over that of the other picture); and how much neighbouring pixels differ
//!   across the patches' edges, over how much they differ inside: 1 where no seam can be seen.

use std::path::Path;

use anyhow::bail;
use l2p_engine::image_io::{RgbImage, read_image};

/// Side and deviation of SSIM's window.
const WINDOW: usize = 11;
const DEVIATION: f64 = 1.5;

/// Rows that SSIM is computed of at a time.
const BAND: usize = 32;

/// What is found of a pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Likeness {
    /// In dB; infinite for equal pictures.
    pub psnr: f64,
    /// At most 1.
    pub ssim: f64,
    /// The patches, where the pictures hold whole ones.
    pub patches: Option<Patches>,
}

/// See the module's head comment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Patches {
    /// Levels.
    pub colour_error: f64,
    /// Mean standard deviations within patches: of the picture and of the one it is compared with.
    pub detail: [f64; 2],
    /// Differences across edges and inside, of both pictures.
    pub edges: [Edges; 2],
}

/// Sums of absolute differences of neighbouring pixels, and how many.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Edges {
    /// Across the edges of patches.
    pub across: (f64, u64),
    /// Inside patches.
    pub inside: (f64, u64),
}

impl Edges {
    /// These and others.
    pub fn add(&mut self, other: Edges) {
        self.across = (self.across.0 + other.across.0, self.across.1 + other.across.1);
        self.inside = (self.inside.0 + other.inside.0, self.inside.1 + other.inside.1);
    }

    /// The mean across over the mean inside; 1 of a picture of one colour, none where there are no edges.
    pub fn ratio(&self) -> Option<f64> {
        let mean = |(sum, count): (f64, u64)| (count > 0).then(|| sum / count as f64);
        let (across, inside) = (mean(self.across)?, mean(self.inside)?);
        match inside == 0.0 {
            true if across == 0.0 => Some(1.0),
            // No level is exact: half of one stands for nothing.
            true => Some(across / 0.5),
            false => Some(across / inside),
        }
    }
}

/// Compares two files.
///
/// # Errors
/// When one cannot be read, or they differ in size; when they are smaller than SSIM's window.
pub fn compare(drawn: &Path, reference: &Path, patch: usize) -> anyhow::Result<Likeness> {
    let (a, b) = (read_image(drawn)?, read_image(reference)?);
    let size = |image: &RgbImage| (image.width(), image.height());
    if size(&a) != size(&b) {
        bail!(
            "{} has {}x{} pixels, {} has {}x{}: only pictures of one size can be compared",
            drawn.display(),
            a.width(),
            a.height(),
            reference.display(),
            b.width(),
            b.height()
        );
    }
    if a.width().min(a.height()) < WINDOW {
        bail!(
            "{}: has fewer than {WINDOW} pixels along a side, SSIM's window",
            drawn.display()
        );
    }
    Ok(Likeness {
        psnr: psnr(&a, &b),
        ssim: ssim(&a, &b),
        patches: patches(&a, &b, patch),
    })
}

fn psnr(a: &RgbImage, b: &RgbImage) -> f64 {
    let squares = a
        .pixels()
        .iter()
        .zip(b.pixels())
        .map(|(a, b)| u64::from(a.abs_diff(*b)).pow(2));
    let mean = squares.sum::<u64>() as f64 / a.pixels().len() as f64;
    10.0 * (255.0 * 255.0 / mean).log10()
}

/// The weights of the window along one axis.
fn window() -> [f64; WINDOW] {
    let weight = |index: usize| (-(index as f64 - (WINDOW / 2) as f64).powi(2) / (2.0 * DEVIATION * DEVIATION)).exp();
    let weights: [f64; WINDOW] = std::array::from_fn(weight);
    let sum: f64 = weights.iter().sum();
    weights.map(|weight| weight / sum)
}

fn ssim(a: &RgbImage, b: &RgbImage) -> f64 {
    let window = window();
    let rows = a.height() - WINDOW + 1;
    let columns = a.width() - WINDOW + 1;
    let mut sum = 0.0;
    for channel in 0..3 {
        for first in (0..rows).step_by(BAND) {
            sum += band(a, b, channel, [first, (first + BAND).min(rows)], &window);
        }
    }
    sum / (3 * rows * columns) as f64
}

/// The sum of SSIM over the places whose windows begin in some rows.
fn band(a: &RgbImage, b: &RgbImage, channel: usize, [first, end]: [usize; 2], window: &[f64; WINDOW]) -> f64 {
    let (c1, c2) = ((0.01f64 * 255.0).powi(2), (0.03f64 * 255.0).powi(2));
    let width = a.width();
    let columns = width - WINDOW + 1;
    let read = |image: &RgbImage, row: usize| -> Vec<f64> {
        let start = 3 * row * width;
        let row = &image.pixels()[start..start + 3 * width];
        row.iter()
            .skip(channel)
            .step_by(3)
            .map(|level| f64::from(*level))
            .collect()
    };
    // Along rows first: a, b, a², b², ab of each row.
    let lines: Vec<[Vec<f64>; 5]> = (first..end + WINDOW - 1)
        .map(|row| {
            let (a, b) = (read(a, row), read(b, row));
            let along = |value: &dyn Fn(usize) -> f64| -> Vec<f64> {
                let values: Vec<f64> = (0..width).map(value).collect();
                let at = |column: usize| {
                    let part = &values[column..column + WINDOW];
                    part.iter().zip(window).map(|(value, weight)| value * weight).sum()
                };
                (0..columns).map(at).collect()
            };
            [
                along(&|x| a[x]),
                along(&|x| b[x]),
                along(&|x| a[x] * a[x]),
                along(&|x| b[x] * b[x]),
                along(&|x| a[x] * b[x]),
            ]
        })
        .collect();
    let mut sum = 0.0;
    for row in 0..end - first {
        for column in 0..columns {
            let mut means = [0.0; 5];
            for (line, weight) in lines[row..row + WINDOW].iter().zip(window) {
                means
                    .iter_mut()
                    .zip(line)
                    .for_each(|(mean, values)| *mean += weight * values[column]);
            }
            let [x, y, xx, yy, xy] = means;
            let (vx, vy, vxy) = (xx - x * x, yy - y * y, xy - x * y);
            sum += (2.0 * x * y + c1) * (2.0 * vxy + c2) / ((x * x + y * y + c1) * (vx + vy + c2));
        }
    }
    sum
}

/// Of pictures of one size; what goes beyond the last whole patch does not count.
fn patches(a: &RgbImage, b: &RgbImage, side: usize) -> Option<Patches> {
    let (rows, columns) = (a.height() / side, a.width() / side);
    if rows == 0 || columns == 0 {
        return None;
    }
    let (mut square, mut detail) = (0.0, [0.0; 2]);
    for row in 0..rows {
        for column in 0..columns {
            let [first, second] = [a, b].map(|image| moments(image, [row * side, column * side], side));
            square += first.iter().zip(&second).map(|(a, b)| (a.0 - b.0).powi(2)).sum::<f64>();
            for (detail, channels) in detail.iter_mut().zip([first, second]) {
                *detail += channels.iter().map(|(_, deviation)| deviation).sum::<f64>();
            }
        }
    }
    let count = (3 * rows * columns) as f64;
    Some(Patches {
        colour_error: (square / count).sqrt(),
        detail: detail.map(|sum| sum / count),
        edges: [a, b].map(|image| edges(image, [rows * side, columns * side], side)),
    })
}

/// Mean and deviation of each channel of a patch.
fn moments(image: &RgbImage, [top, left]: [usize; 2], side: usize) -> [(f64, f64); 3] {
    let (mut sums, mut squares) = ([0u64; 3], [0u64; 3]);
    for row in top..top + side {
        let start = 3 * (row * image.width() + left);
        for pixel in image.pixels()[start..start + 3 * side].chunks_exact(3) {
            for channel in 0..3 {
                let level = u64::from(pixel[channel]);
                sums[channel] += level;
                squares[channel] += level * level;
            }
        }
    }
    let count = (side * side) as f64;
    std::array::from_fn(|channel| {
        let mean = sums[channel] as f64 / count;
        let variance = squares[channel] as f64 / count - mean * mean;
        (mean, variance.max(0.0).sqrt())
    })
}

/// The differences of neighbours within a part of whole patches.
fn edges(image: &RgbImage, [height, width]: [usize; 2], side: usize) -> Edges {
    let mut edges = Edges::default();
    let pixel = |row: usize, column: usize| {
        let start = 3 * (row * image.width() + column);
        &image.pixels()[start..start + 3]
    };
    let mut add = |is_edge: bool, a: &[u8], b: &[u8]| {
        let difference: u32 = a.iter().zip(b).map(|(a, b)| u32::from(a.abs_diff(*b))).sum();
        let sums = if is_edge { &mut edges.across } else { &mut edges.inside };
        *sums = (sums.0 + f64::from(difference), sums.1 + 3);
    };
    for row in 0..height {
        for column in 0..width {
            if column > 0 {
                add(column % side == 0, pixel(row, column - 1), pixel(row, column));
            }
            if row > 0 {
                add(row % side == 0, pixel(row - 1, column), pixel(row, column));
            }
        }
    }
    edges
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(side: usize, level: impl Fn(usize, usize, usize) -> u8) -> RgbImage {
        let pixels = (0..3 * side * side).map(|index| level(index / (3 * side), index / 3 % side, index % 3));
        RgbImage::new(side, side, pixels.collect()).unwrap()
    }

    #[test]
    fn equal_and_shifted_pictures() {
        let a = image(20, |row, column, channel| (7 * row + 11 * column + 60 * channel) as u8);
        assert_eq!(psnr(&a, &a), f64::INFINITY);
        assert!((ssim(&a, &a) - 1.0).abs() < 1e-12);
        let grey = image(20, |_, _, _| 100);
        let lighter = image(20, |_, _, _| 105);
        assert!((psnr(&grey, &lighter) - 10.0 * (65025.0f64 / 25.0).log10()).abs() < 1e-12);
        let c1 = (0.01f64 * 255.0).powi(2);
        let expected = (2.0 * 100.0 * 105.0 + c1) / (100.0f64.powi(2) + 105.0f64.powi(2) + c1);
        assert!((ssim(&grey, &lighter) - expected).abs() < 1e-9);
    }

    #[test]
    fn seams_are_seen_at_the_side_of_patches() {
        // Each patch of 4 has a level of its own, with a ramp inside.
        let seamed = image(16, |row, column, _| ((row / 4 + column / 4) * 40 + column % 4) as u8);
        let smooth = image(16, |row, column, _| (3 * row + 5 * column) as u8);
        let found = patches(&seamed, &smooth, 4).unwrap();
        let [first, second] = found.edges.map(|edges| edges.ratio().unwrap());
        assert!(first > 20.0 && (second - 1.0).abs() < 1e-9, "{first} {second}");
        assert!(found.colour_error > 1.0 && found.detail[1] > found.detail[0]);
        assert_eq!(patches(&seamed, &seamed, 4).unwrap().colour_error, 0.0);
        let flat = image(16, |_, _, _| 9);
        assert_eq!(patches(&flat, &flat, 4).unwrap().edges[0].ratio(), Some(1.0));
        // One patch has no edges, a smaller picture no patch.
        assert_eq!(patches(&flat, &flat, 16).unwrap().edges[0].ratio(), None);
        assert_eq!(patches(&flat, &flat, 17), None);
    }
}
