//! The Inception score (Salimans et al. 2016): e to the mean divergence of a picture's classes from those of its part of the set, mean and
//! deviation over parts. Parts are those of torch-fidelity for the same seed and number.

use anyhow::bail;
use nalgebra::DMatrix;

use super::kernel::{Kernel, mean_and_deviation};
use super::random_state::RandomState;

/// The score of a set with a column of logits per picture.
///
/// # Errors
/// When there are fewer pictures than parts, or one class.
pub fn score(logits: &DMatrix<f64>, splits: usize, seed: u32) -> anyhow::Result<Kernel> {
    let (classes, count) = logits.shape();
    if count < splits || splits == 0 {
        bail!(
            "the Inception score takes {splits} parts of a set, but there are {count} pictures: give a smaller --splits"
        );
    }
    if classes < 2 {
        bail!("logits of one class have no Inception score: one column per class is needed");
    }
    let order = RandomState::new(seed).permutation(count);
    let scores: Vec<f64> = (0..splits)
        .map(|split| part(logits, &order[split * count / splits..(split + 1) * count / splits]))
        .collect();
    Ok(mean_and_deviation(&scores))
}

/// The score of some pictures.
fn part(logits: &DMatrix<f64>, pictures: &[usize]) -> f64 {
    let classes = logits.nrows();
    let log_odds = |picture: usize| {
        let column = logits.column(picture);
        let most = column.max();
        let log_sum = most + column.iter().map(|logit| (logit - most).exp()).sum::<f64>().ln();
        column.map(|logit| logit - log_sum)
    };
    let mut mean = vec![0.0; classes];
    for &picture in pictures {
        let column = log_odds(picture);
        mean.iter_mut()
            .zip(column.iter())
            .for_each(|(mean, log)| *mean += log.exp() / pictures.len() as f64);
    }
    let divergence = |picture: usize| -> f64 {
        let column = log_odds(picture);
        // A class that no picture has counts nothing, whatever its logarithm.
        let terms = column.iter().zip(&mean).filter(|(log, _)| log.exp() > 0.0);
        terms.map(|(log, mean)| log.exp() * (log - mean.ln())).sum()
    };
    let total: f64 = pictures.iter().map(|&picture| divergence(picture)).sum();
    (total / pictures.len() as f64).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certain_and_varied_pictures_score_the_number_of_classes() {
        let sure = DMatrix::from_fn(4, 8, |class, picture| if picture % 4 == class { 800.0 } else { 0.0 });
        let found = score(&sure, 1, 2020).unwrap();
        assert!((found.mean - 4.0).abs() < 1e-12, "{found:?}");
        let alike = DMatrix::from_element(4, 8, 0.3);
        assert!((score(&alike, 2, 2020).unwrap().mean - 1.0).abs() < 1e-12);
        assert!(
            score(&alike, 9, 2020)
                .unwrap_err()
                .to_string()
                .contains("there are 8 pictures")
        );
        assert!(
            score(&DMatrix::zeros(1, 8), 1, 0)
                .unwrap_err()
                .to_string()
                .contains("one class")
        );
    }
}
