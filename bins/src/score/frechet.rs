//! The Fréchet distance between two sets of features, as if each were drawn from a normal distribution.
//!
//! ‖μ₁ − μ₂‖² + Tr Σ₁ + Tr Σ₂ − 2 Tr (Σ₁Σ₂)^½, with Σ over N − 1 (Heusel et al. 2017, and pytorch-fid). The last trace is that of
//! (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric: its eigenvalues are real and not negative, where those of the product have to be made so.

use anyhow::bail;
use nalgebra::{DMatrix, DVector, SymmetricEigen};
use rayon::prelude::*;

use super::arrays::Features;

/// Pictures whose products are summed at a time.
const CHUNK: usize = 1024;

/// Parts of a set that are summed beside each other.
const PARTS: usize = 8;

/// Mean and covariance of a set.
pub struct Moments {
    mean: DVector<f64>,
    covariance: DMatrix<f64>,
    /// How many pictures they are of, where that is known.
    pub samples: Option<usize>,
}

impl Moments {
    /// Those of features, or the ones that a file has.
    ///
    /// # Errors
    /// With fewer than two pictures, or a covariance that is none.
    pub fn of(features: &Features) -> anyhow::Result<Self> {
        match features {
            Features::Samples(samples) => Moments::of_samples(samples),
            Features::Moments { mean, covariance } => {
                let scale = covariance.amax();
                let asymmetry = (covariance - covariance.transpose()).amax();
                if asymmetry > 1e-6 * scale || covariance.diagonal().iter().any(|variance| *variance < 0.0) {
                    bail!("`sigma` is no covariance: it is not symmetric, or has a variance below zero");
                }
                Ok(Moments {
                    mean: DVector::from_column_slice(mean),
                    covariance: covariance.clone(),
                    samples: None,
                })
            }
        }
    }

    /// Those of features, one column per picture.
    ///
    /// # Errors
    /// With fewer than two pictures.
    pub fn of_samples(samples: &DMatrix<f64>) -> anyhow::Result<Self> {
        let (dimensions, count) = samples.shape();
        if count < 2 {
            bail!(
                "one picture has no covariance: the Fréchet distance needs two at least, and means little below some thousand"
            );
        }
        let mean = samples.column_mean();
        // Each part is summed in order and so are the parts: the same bits on any number of cores.
        let parts: Vec<DMatrix<f64>> = (0..PARTS)
            .into_par_iter()
            .map(|part| {
                let (first, end) = (part * count / PARTS, (part + 1) * count / PARTS);
                let mut sum = DMatrix::zeros(dimensions, dimensions);
                for start in (first..end).step_by(CHUNK) {
                    let mut centred = samples.columns(start, CHUNK.min(end - start)).into_owned();
                    centred.column_iter_mut().for_each(|mut column| column -= &mean);
                    sum.gemm(1.0, &centred, &centred.transpose(), 1.0);
                }
                sum
            })
            .collect();
        let sum = parts
            .into_iter()
            .fold(DMatrix::zeros(dimensions, dimensions), |sum, part| sum + part);
        Ok(Moments {
            mean,
            covariance: sum / (count - 1) as f64,
            samples: Some(count),
        })
    }

    /// Dimensions of the features.
    pub fn dimensions(&self) -> usize {
        self.mean.len()
    }

    /// The distance to another set.
    ///
    /// # Errors
    /// When the features have other dimensions, or the eigenvalues do not converge.
    pub fn distance(&self, other: &Moments) -> anyhow::Result<f64> {
        if self.dimensions() != other.dimensions() {
            bail!(
                "features of {} and of {} dimensions cannot be compared: they come from different extractors",
                self.dimensions(),
                other.dimensions()
            );
        }
        let means = (&self.mean - &other.mean).norm_squared();
        let traces = self.covariance.trace() + other.covariance.trace();
        let distance = means + traces - 2.0 * trace_of_root(&self.covariance, &other.covariance)?;
        // Equal sets are as far apart as the last bits of their traces.
        Ok(if distance.abs() < 1e-12 * (means + traces) {
            0.0
        } else {
            distance
        })
    }
}

/// Tr (AB)^½ of two matrices that are symmetric and have no eigenvalue below zero but by rounding.
fn trace_of_root(a: &DMatrix<f64>, b: &DMatrix<f64>) -> anyhow::Result<f64> {
    let (values, vectors) = eigen(a.clone())?;
    let mut root = vectors;
    for (mut column, value) in root.column_iter_mut().zip(values.iter()) {
        column *= value.max(0.0).sqrt();
    }
    // In the basis of A's eigenvectors, which changes no eigenvalue.
    let inner = root.transpose() * (b * &root);
    let inner = (&inner + inner.transpose()) / 2.0;
    let (values, _) = eigen(inner)?;
    Ok(values.iter().map(|value| value.max(0.0).sqrt()).sum())
}

fn eigen(matrix: DMatrix<f64>) -> anyhow::Result<(DVector<f64>, DMatrix<f64>)> {
    let most = 1000 + 100 * matrix.nrows();
    match SymmetricEigen::try_new(matrix, f64::EPSILON, most) {
        Some(SymmetricEigen {
            eigenvalues,
            eigenvectors,
        }) => Ok((eigenvalues, eigenvectors)),
        None => bail!("the eigenvalues of a covariance do not converge"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_of_diagonal_covariances_are_sums() {
        // Four pictures at ±a, ±b in two dimensions: variance 2 a² / 3 each.
        let set = |a: f64, b: f64, at: f64| {
            let samples = DMatrix::from_row_slice(2, 4, &[a + at, -a + at, at, at, at, at, b + at, -b + at]);
            Moments::of_samples(&samples).unwrap()
        };
        let (first, second) = (set(1.0, 3.0, 0.0), set(2.0, 1.0, 0.5));
        // Means 0.5 apart in both; (σ₁ − σ₂)² of each dimension.
        let expected = 0.5 + 2.0 / 3.0 * ((1.0f64 - 2.0).powi(2) + (3.0f64 - 1.0).powi(2));
        let found = first.distance(&second).unwrap();
        assert!((found - expected).abs() < 1e-12 * expected, "{found} {expected}");
        assert_eq!(first.distance(&first).unwrap(), 0.0);
        // Singular covariances have a root too.
        let (flat, line) = (set(1.0, 0.0, 0.0), set(0.0, 1.0, 0.0));
        assert!((flat.distance(&line).unwrap() - 4.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn what_has_no_distance_is_refused() {
        let one = Moments::of_samples(&DMatrix::zeros(3, 1)).err().unwrap().to_string();
        assert!(one.contains("needs two"), "{one}");
        let of = |dimensions| Moments::of_samples(&DMatrix::from_fn(dimensions, 3, |i, j| (i * j) as f64)).unwrap();
        let message = of(2).distance(&of(3)).unwrap_err().to_string();
        assert!(message.contains("of 2 and of 3 dimensions"), "{message}");
        let sigma = |values: &[f64]| Features::Moments {
            mean: vec![0.0; 2],
            covariance: DMatrix::from_row_slice(2, 2, values),
        };
        for bad in [[1.0, 0.5, 0.0, 1.0], [1.0, 0.0, 0.0, -1.0]] {
            assert!(
                Moments::of(&sigma(&bad))
                    .err()
                    .unwrap()
                    .to_string()
                    .contains("no covariance")
            );
        }
        assert!(Moments::of(&sigma(&[1.0, 0.5, 0.5, 1.0])).is_ok());
    }
}
