//! The kernel distance of two sets of features (KID, Bińkowski et al. 2018): the unbiased estimate of the squared maximum mean discrepancy
//! under the kernel (x·y / d + 1)³, its mean over subsets of pictures.
//!
//! Subsets are those of torch-fidelity for the same seed, number and size.

use anyhow::bail;
use nalgebra::DMatrix;
use rayon::prelude::*;

use super::random_state::RandomState;

/// Which subsets.
#[derive(Clone, Copy, Debug)]
pub struct Subsets {
    /// How many.
    pub count: usize,
    /// Pictures in each.
    pub size: usize,
    /// Seed of the choice.
    pub seed: u32,
}

/// Mean and standard deviation over the subsets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kernel {
    /// The mean.
    pub mean: f64,
    /// The deviation, over N.
    pub deviation: f64,
}

/// The distance of two sets with a column per picture. `done` is told after each subset; an error from it ends the work.
///
/// # Errors
/// When the features have other dimensions, or a set has fewer pictures than a subset.
pub fn distance(
    first: &DMatrix<f64>,
    second: &DMatrix<f64>,
    subsets: Subsets,
    done: &(dyn Fn() -> anyhow::Result<()> + Sync),
) -> anyhow::Result<Kernel> {
    if first.nrows() != second.nrows() {
        bail!(
            "features of {} and of {} dimensions cannot be compared: they come from different extractors",
            first.nrows(),
            second.nrows()
        );
    }
    let fewest = first.ncols().min(second.ncols());
    if fewest < subsets.size || subsets.size < 2 {
        bail!(
            "KID takes subsets of {} pictures, but one set has {fewest}: give a --subset-size from 2 to {fewest}",
            subsets.size
        );
    }
    let mut state = RandomState::new(subsets.seed);
    let mut choose = || {
        let mut of = |set: &DMatrix<f64>| state.choice(set.ncols(), subsets.size);
        (of(first), of(second))
    };
    let chosen: Vec<(Vec<usize>, Vec<usize>)> = (0..subsets.count).map(|_| choose()).collect();
    let distances: Vec<f64> = chosen
        .par_iter()
        .map(|(a, b)| {
            let distance = unbiased(&first.select_columns(a), &second.select_columns(b));
            done().map(|()| distance)
        })
        .collect::<anyhow::Result<_>>()?;
    Ok(mean_and_deviation(&distances))
}

/// Mean and deviation over N.
pub fn mean_and_deviation(values: &[f64]) -> Kernel {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
    Kernel {
        mean,
        deviation: variance.sqrt(),
    }
}

fn unbiased(a: &DMatrix<f64>, b: &DMatrix<f64>) -> f64 {
    let (dimensions, size) = (a.nrows() as f64, a.ncols() as f64);
    let (ta, tb) = (a.transpose(), b.transpose());
    let kernel = |rows: &DMatrix<f64>, columns: &DMatrix<f64>| {
        (rows * columns).map(|product| {
            let base = product / dimensions + 1.0;
            base * base * base
        })
    };
    let within = |kernel: DMatrix<f64>| kernel.sum() - kernel.trace();
    let between = kernel(&ta, b).sum();
    (within(kernel(&ta, a)) + within(kernel(&tb, b))) / (size * (size - 1.0)) - 2.0 * between / (size * size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_is_the_sum_over_pairs() {
        let a = DMatrix::from_row_slice(2, 3, &[1.0, 0.0, 2.0, 0.0, 1.0, 1.0]);
        let b = DMatrix::from_row_slice(2, 3, &[0.5, 3.0, 1.0, 0.0, -1.0, 2.0]);
        let k = |x: &DMatrix<f64>, i: usize, y: &DMatrix<f64>, j: usize| {
            (x.column(i).dot(&y.column(j)) / 2.0 + 1.0).powi(3)
        };
        let mut expected = 0.0;
        for i in 0..3 {
            for j in 0..3 {
                if i != j {
                    expected += (k(&a, i, &a, j) + k(&b, i, &b, j)) / 6.0;
                }
                expected -= 2.0 * k(&a, i, &b, j) / 9.0;
            }
        }
        let subsets = Subsets {
            count: 2,
            size: 3,
            seed: 1,
        };
        let found = distance(&a, &b, subsets, &|| Ok(())).unwrap();
        assert!((found.mean - expected).abs() < 1e-12, "{found:?} {expected}");
        assert!(found.deviation < 1e-12);
        let few = Subsets { size: 4, ..subsets };
        let message = distance(&a, &b, few, &|| Ok(())).unwrap_err().to_string();
        assert!(
            message.contains("subsets of 4 pictures, but one set has 3"),
            "{message}"
        );
        assert!(distance(&a, &a.transpose(), subsets, &|| Ok(())).is_err());
    }
}
