//! Comparing results with references.

use l2p_engine::{Result, Tensor};

/// ‖found − expected‖ / ‖expected‖; infinite when a value is not finite or the counts differ.
pub fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    if found.len() != expected.len() || found.iter().chain(expected).any(|value| !value.is_finite()) {
        return f64::INFINITY;
    }
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let pairs = found.iter().zip(expected);
    let difference = squares(&mut pairs.map(|(found, expected)| f64::from(*found) - f64::from(*expected)));
    let norm = squares(&mut expected.iter().map(|value| f64::from(*value)));
    difference.sqrt() / norm.sqrt().max(f64::MIN_POSITIVE)
}

/// The larger of two errors; one that is no number wins.
pub fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

/// `count` indices below `extent`, evenly spread, the first and the last among them.
pub fn spread_indices(extent: usize, count: usize) -> Vec<usize> {
    let count = count.min(extent);
    match count {
        0 => Vec::new(),
        1 => vec![0],
        _ => (0..count).map(|index| index * (extent - 1) / (count - 1)).collect(),
    }
}

/// Rows of a tensor, seen as a matrix of its innermost extent, on the host.
///
/// # Errors
/// When the copy from the device fails.
pub fn rows(tensor: &Tensor, indices: &[usize]) -> Result<Vec<f32>> {
    let shape = tensor.shape();
    let matrix = tensor.reshape([shape.rows(), shape.last()])?;
    let mut values = Vec::with_capacity(indices.len() * shape.last());
    for &index in indices {
        values.extend(matrix.narrow(index, 1)?.to_vec_f32()?);
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use l2p_engine::Device;

    #[test]
    fn errors_that_are_no_numbers_are_infinite() {
        assert_eq!(relative_error(&[1.0, 2.0], &[1.0, 2.0]), 0.0);
        assert!((relative_error(&[1.0, 1.0], &[1.0, 0.0]) - 1.0).abs() < 1e-12);
        assert!(relative_error(&[f32::NAN], &[1.0]).is_infinite());
        assert!(relative_error(&[1.0], &[1.0, 2.0]).is_infinite());
        assert!(worse(f64::NAN, 1.0).is_nan() && worse(2.0, 1.0) == 2.0);
    }

    #[test]
    fn indices_reach_from_first_to_last() {
        assert_eq!(spread_indices(100, 4), [0, 33, 66, 99]);
        assert_eq!(spread_indices(2, 4), [0, 1]);
        assert_eq!(spread_indices(1, 4), [0]);
        assert!(spread_indices(0, 4).is_empty());
    }

    #[test]
    fn rows_are_picked() {
        let tensor = Tensor::from_slice(&Device::Cpu, &[0f32, 1.0, 2.0, 3.0, 4.0, 5.0], [1, 3, 2]).unwrap();
        assert_eq!(rows(&tensor, &[2, 0]).unwrap(), [4.0, 5.0, 0.0, 1.0]);
    }
}
