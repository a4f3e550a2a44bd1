//! When two sets of numbers count as the same: the measure that every comparison of the tests uses.
//!
//! # What is bounded
//!
//! A comparison has one tolerance τ, and three things must hold:
//!
//! 1. The error of the whole: ‖a − b‖ ≤ τ·‖b‖.
//! 2. The error of every *part* of m elements: ‖a − b‖ ≤ τ·(1 + 8/√m)·(‖b‖ + √m·r), norms over the part, with r the root
//!    mean square of the whole of b.
//! 3. The error of every element, which is a part with m = 1: |a − b| ≤ 9·τ·(|b| + r), where r is that of the 64 elements
//!    around it if those are larger.
//!
//! The first alone lets a wrong 8×8 corner of a large picture pass: in 4096×4096 it is 2·10⁻³ of the norm. The parts are
//!
//! * runs of 64 consecutive elements: a wrong row of a tile, a head of one token;
//! * all elements that share an index of one dimension: an item, a token, a channel, a row or column of a picture;
//! * tiles of 8×8 of two neighbouring dimensions out of four, of one item each: of pixels in `[batch, height, width, channels]`
//!   with all channels, and in `[batch, channels, height, width]` of one channel.
//!
//! # Why these bounds
//!
//! Rounding makes errors that are independent of each other and in proportion to what was rounded: the result itself, and
//! values on the way to it, which may be larger where a result is the difference of large numbers; hence r beside the size of
//! the part. As τ bounds the error of the whole, τ times that size is at least the standard deviation σ of one error. The norm of
//! m independent errors of deviation σ exceeds σ·(√m + t) with a probability below exp(−t²/2) (the norm is a function of slope 1;
//! for a normal distribution this is the concentration inequality of Borell and Tsirelson, and rounding errors, which are
//! bounded, have thinner tails). With t = 8 that is 10⁻¹⁴ for a part, and about 10⁻⁵ for all of the 10⁹ parts of a run of all
//! tests. An element that is wrong has an error of its own size, which is some 14 times its bound for one operation in bf16; a
//! tile of 8×8 that is off by 2 % is above its bound.
//!
//! Where errors are not independent a second tolerance is for parts and elements ([`Tolerance::of_gradients`]). With a
//! tolerance of zero the numbers must be equal.
//!
//! All operations and models were run with every result, and what kernels keep in bf16 on the way, rounded to bf16: parts and
//! elements then use at most half of their bounds (two thirds for `linear_swiglu` on the way that rounds twice).

use std::fmt::Write as _;
use std::io::Write as _;

use l2p_engine::Shape;

use crate::Outcome;

/// The t of the head comment: by how many standard deviations the norm of a part's errors may exceed what is expected of it.
const DEVIATIONS: f64 = 8.0;

/// Consecutive elements that make a part.
const RUN: usize = 64;

/// The side of a tile of a picture.
const TILE: usize = 8;

/// How far two sets of numbers may be apart; see the module's head comment. A number is a tolerance for everything.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Of the whole.
    pub whole: f64,
    /// Of parts and elements, as if of the whole.
    pub parts: f64,
}

impl From<f64> for Tolerance {
    fn from(whole: f64) -> Self {
        Tolerance { whole, parts: whole }
    }
}

impl Tolerance {
    /// For the gradients of a model's weights through several layers in bf16. A row of such a gradient is a sum over a few tokens
    /// of the gradient at one output times the inputs: the error of one of these numbers runs through the whole row, and the
    /// errors of a row are as large as the layers above make them, whatever the row's own size.
    pub const fn of_gradients(whole: f64) -> Self {
        Tolerance {
            whole,
            parts: 2.5 * whole,
        }
    }
}

/// ‖a − b‖ / ‖b‖ in f64; infinite when a value is not finite or the counts differ.
pub fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() || a.iter().chain(b).any(|value| !value.is_finite()) {
        return f64::INFINITY;
    }
    let mut sums = Sums::default();
    a.iter().zip(b).for_each(|(a, b)| sums.add(*a, *b));
    sums.error.sqrt() / sums.reference.sqrt().max(f64::MIN_POSITIVE)
}

/// Fails unless `found` is `expected`, both of the given shape, to within `tolerance` by the module's measure.
///
/// # Errors
/// Naming `what`, the part that is farthest off, and by how much.
pub fn expect_close(
    what: &str,
    found: &[f32],
    expected: &[f32],
    shape: impl Into<Shape>,
    tolerance: impl Into<Tolerance>,
) -> Outcome {
    let shape = shape.into();
    if shape.elements() != expected.len() {
        return Err(format!("{what}: {} values are expected, of shape {shape}", expected.len()).into());
    }
    compare(what, [found, expected], &shape, (0, 1), tolerance.into())
}

/// As [`expect_close`] for every `step`th element of a tensor of this shape from `start` on.
///
/// # Errors
/// As [`expect_close`].
pub fn expect_sample_close(
    what: &str,
    found: &[f32],
    expected: &[f32],
    shape: &[usize],
    sample: (usize, usize),
    tolerance: impl Into<Tolerance>,
) -> Outcome {
    compare(what, [found, expected], shape, sample, tolerance.into())
}

fn compare(
    what: &str,
    [found, expected]: [&[f32]; 2],
    shape: &[usize],
    (start, step): (usize, usize),
    Tolerance {
        whole: tolerance,
        parts: of_parts,
    }: Tolerance,
) -> Outcome {
    let error = relative_error(found, expected);
    let mut report = format!("relative error {error:.3e}");
    let mut good = error <= tolerance;
    if error.is_finite() && tolerance > 0.0 && !expected.is_empty() {
        let worst = worst_parts(found, expected, shape, (start, step), of_parts);
        for part in &worst {
            good &= part.share <= 1.0;
            write!(report, "; {part}").expect("writing to a string succeeds");
        }
        record(what, tolerance, error, &worst);
    }
    if good {
        return Ok(());
    }
    let place = first_far_off(found, expected).map_or(String::new(), |index| {
        format!(
            "; first far off: {} where {} is expected, at {}",
            found[index],
            expected[index],
            Coordinates(shape, start + index * step)
        )
    });
    Err(format!(
        "{what}: {report}, against a tolerance of {tolerance:.1e} ({} values, {} expected{place})",
        found.len(),
        expected.len(),
    )
    .into())
}

/// The first element whose error is neither small beside its size nor beside one.
fn first_far_off(found: &[f32], expected: &[f32]) -> Option<usize> {
    let mut pairs = found.iter().zip(expected);
    pairs.position(|(a, b)| !a.is_finite() || (a - b).abs() > 0.05 * b.abs().max(1.0))
}

/// Where `L2P_COMPARISONS` names a file, every comparison adds a line to it: the tolerance, and what share of each bound was
/// used. So margins can be read off a run.
fn record(what: &str, tolerance: f64, error: f64, worst: &[Part]) {
    let Some(path) = std::env::var_os("L2P_COMPARISONS") else {
        return;
    };
    let mut line = format!("{tolerance:.2e}\t{:.3}", error / tolerance);
    for part in worst {
        write!(line, "\t{} {:.3}", part.kind, part.share).expect("writing to a string succeeds");
    }
    let file = std::fs::OpenOptions::new().create(true).append(true).open(&path);
    let written = file.and_then(|mut file| writeln!(file, "{line}\t{what}"));
    if let Err(error) = written {
        panic!("{}: {error}", path.display());
    }
}

/// The squares of a part's errors and of what is expected of it.
#[derive(Clone, Copy, Default)]
struct Sums {
    error: f64,
    reference: f64,
    elements: usize,
}

impl Sums {
    fn add(&mut self, found: f32, expected: f32) {
        self.error += (f64::from(found) - f64::from(expected)).powi(2);
        self.reference += f64::from(expected).powi(2);
        self.elements += 1;
    }

    fn root_mean_square(&self) -> f64 {
        (self.reference / self.elements.max(1) as f64).sqrt()
    }

    /// The error as a share of what is allowed; `rms` is that of the whole.
    fn share(&self, tolerance: f64, rms: f64) -> f64 {
        let root = (self.elements as f64).sqrt();
        let size = self.reference.sqrt() + rms * root;
        let allowed = tolerance * (1.0 + DEVIATIONS / root) * size;
        // A whole of zeros allows nothing, and an empty part has nothing.
        match self.error == 0.0 {
            true => 0.0,
            false => self.error.sqrt() / allowed,
        }
    }
}

/// The part of one kind that comes closest to its bound, or is farthest above it.
struct Part {
    kind: &'static str,
    place: String,
    /// Of the bound.
    share: f64,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}: {:.2} of its bound", self.kind, self.place, self.share)
    }
}

/// Which part an element belongs to, for one way to cut a tensor into parts.
#[derive(Clone, Copy)]
enum Cut {
    /// Runs of consecutive elements.
    Runs,
    /// By the index of the dimension with this stride and extent.
    Dimension { stride: usize, extent: usize },
    /// Tiles of the dimensions of these extents, which stand before `inner` elements each.
    Tiles { rows: usize, columns: usize, inner: usize },
}

impl Cut {
    /// The ways to cut a tensor of this shape.
    fn all(shape: &[usize]) -> Vec<Cut> {
        let mut cuts = vec![Cut::Runs];
        let stride = |dimension: usize| shape[dimension + 1..].iter().product();
        if shape.len() > 1 {
            let dimensions = (0..shape.len()).filter(|&dimension| shape[dimension] > 1);
            cuts.extend(dimensions.map(|dimension| Cut::Dimension {
                stride: stride(dimension),
                extent: shape[dimension],
            }));
        }
        if shape.len() == 4 {
            cuts.extend([1, 2].map(|first| Cut::Tiles {
                rows: shape[first],
                columns: shape[first + 1],
                inner: stride(first + 1),
            }));
        }
        cuts
    }

    fn kind(&self) -> &'static str {
        match self {
            Cut::Runs => "run",
            Cut::Dimension { .. } => "slice",
            Cut::Tiles { .. } => "tile",
        }
    }

    fn part_of(&self, element: usize) -> usize {
        match *self {
            Cut::Runs => element / RUN,
            Cut::Dimension { stride, extent } => element / stride % extent,
            Cut::Tiles { rows, columns, inner } => {
                let pixel = element / inner;
                let (plane, row, column) = (pixel / (rows * columns), pixel / columns % rows, pixel % columns);
                (plane * rows.div_ceil(TILE) + row / TILE) * columns.div_ceil(TILE) + column / TILE
            }
        }
    }

    /// The sums of all parts.
    fn sums(&self, found: &[f32], expected: &[f32], (start, step): (usize, usize)) -> Vec<Sums> {
        let mut sums: Vec<Sums> = Vec::new();
        for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
            let part = self.part_of(start + index * step);
            if part >= sums.len() {
                sums.resize(part + 1, Sums::default());
            }
            sums[part].add(*found, *expected);
        }
        sums
    }

    /// Where a part is, in words.
    fn place(&self, part: usize, shape: &[usize]) -> String {
        match *self {
            Cut::Runs => format!("from {}", Coordinates(shape, part * RUN)),
            Cut::Dimension { stride, .. } => {
                let strides = (0..shape.len()).map(|dimension| shape[dimension + 1..].iter().product::<usize>());
                let dimension = strides.filter(|&other| other > stride).count();
                format!("{part} of dimension {dimension} of {shape:?}")
            }
            Cut::Tiles { rows, columns, .. } => {
                let (down, across) = (rows.div_ceil(TILE), columns.div_ceil(TILE));
                let (plane, row, column) = (part / (down * across), part / across % down, part % across);
                format!(
                    "at row {}, column {} of plane {plane} of {shape:?}",
                    row * TILE,
                    column * TILE
                )
            }
        }
    }
}

/// An element's index in each dimension, as text.
struct Coordinates<'a>(&'a [usize], usize);

impl std::fmt::Display for Coordinates<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Coordinates(shape, mut rest) = *self;
        let mut indices: Vec<usize> = shape
            .iter()
            .rev()
            .map(|extent| {
                let index = rest % extent;
                rest /= extent;
                index
            })
            .collect();
        indices.reverse();
        write!(f, "{indices:?} of {shape:?}")
    }
}

/// The worst element, and the worst part of every cut, of finite numbers.
fn worst_parts(found: &[f32], expected: &[f32], shape: &[usize], sample: (usize, usize), tolerance: f64) -> Vec<Part> {
    let square: f64 = expected.iter().map(|value| f64::from(*value).powi(2)).sum();
    let rms = (square / expected.len().max(1) as f64).sqrt();
    let largest = |shares: &mut dyn Iterator<Item = f64>| {
        let numbered = shares.enumerate();
        numbered.fold(
            (0, 0.0),
            |worst, (index, share)| if share > worst.1 { (index, share) } else { worst },
        )
    };
    let runs = Cut::Runs.sums(found, expected, sample);
    let mut elements = found
        .iter()
        .zip(expected)
        .enumerate()
        .map(|(index, (found, expected))| {
            let mut sums = Sums::default();
            sums.add(*found, *expected);
            let around = &runs[Cut::Runs.part_of(sample.0 + index * sample.1)];
            sums.share(tolerance, rms.max(around.root_mean_square()))
        });
    let (element, share) = largest(&mut elements);
    let mut worst = vec![Part {
        kind: "element",
        place: Coordinates(shape, sample.0 + element * sample.1).to_string(),
        share,
    }];
    for cut in Cut::all(shape) {
        let sums = cut.sums(found, expected, sample);
        let (part, share) = largest(&mut sums.iter().map(|sums| sums.share(tolerance, rms)));
        worst.push(Part {
            kind: cut.kind(),
            place: cut.place(part, shape),
            share,
        });
    }
    worst
}

#[cfg(test)]
mod tests;
