//! The CLIP score (Hessel et al. 2021, as torchmetrics computes it): a hundred times the mean cosine of a picture's and its caption's
//! features, not below zero.

use anyhow::bail;
use nalgebra::DMatrix;

/// The score of pictures and captions in the same order, a column each.
///
/// # Errors
/// When they are not as many of each, not of the same dimensions, or one has no direction.
pub fn score(pictures: &DMatrix<f64>, captions: &DMatrix<f64>) -> anyhow::Result<f64> {
    if pictures.ncols() != captions.ncols() {
        bail!(
            "there are features of {} pictures and of {} captions: one caption per picture is needed, in the same order",
            pictures.ncols(),
            captions.ncols()
        );
    }
    if pictures.nrows() != captions.nrows() {
        bail!(
            "features of {} and of {} dimensions cannot be compared: pictures and captions must come from one model",
            pictures.nrows(),
            captions.nrows()
        );
    }
    let mut total = 0.0;
    for (number, (picture, caption)) in pictures.column_iter().zip(captions.column_iter()).enumerate() {
        let lengths = picture.norm() * caption.norm();
        if !(lengths.is_finite() && lengths > 0.0) {
            bail!("the features of pair {number} (from 0) are zero or not finite: they have no direction to compare");
        }
        total += picture.dot(&caption) / lengths;
    }
    Ok((100.0 * total / pictures.ncols() as f64).max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_score_is_a_mean_cosine() {
        let pictures = DMatrix::from_row_slice(2, 2, &[3.0, 0.0, 0.0, 2.0]);
        let captions = DMatrix::from_row_slice(2, 2, &[1.0, 1.0, 0.0, 1.0]);
        let found = score(&pictures, &captions).unwrap();
        assert!((found - 50.0 * (1.0 + 0.5f64.sqrt())).abs() < 1e-12, "{found}");
        assert_eq!(score(&pictures, &-captions.clone()).unwrap(), 0.0);
        for bad in [DMatrix::zeros(2, 2), DMatrix::zeros(2, 3), DMatrix::zeros(3, 2)] {
            assert!(score(&pictures, &bad).is_err());
        }
        for value in [f64::NAN, f64::INFINITY] {
            let mut bad = captions.clone();
            bad[(0, 1)] = value;
            assert!(score(&pictures, &bad).is_err(), "{value}");
        }
    }
}
