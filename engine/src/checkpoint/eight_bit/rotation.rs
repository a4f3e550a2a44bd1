//! The rotation that spreads outliers before weights become integers ("ConvRot"): groups of neighbouring inputs are multiplied with
//! a regular Hadamard matrix, the weights' columns beforehand and the layer's inputs at run time, so that products stay the same.
//!
//! ```text
//!      1 ⎡  1  1  1 −1 ⎤
//! H₄ = ─ ⎢  1  1 −1  1 ⎥      H₁₆ = H₄ ⊗ H₄,  H₆₄ = H₁₆ ⊗ H₄,  H₂₅₆ = H₆₄ ⊗ H₄,  …
//!      2 ⎢  1 −1  1  1 ⎥
//!        ⎣ −1  1  1  1 ⎦
//! ```
//!
//! Every row of it has the same sum, unlike Sylvester's, whose first row adds up what outliers have in common. H is symmetric and its
//! own inverse, so that rotating twice gives back what was there: `stored = W · Hᵀ`, `W = stored · H`.
//!
//! Source: Huang et al., "ConvRot" (2025, arXiv 2512.03673), §3; the order of signs is that of the files in use.

/// Inputs that are rotated together where this program writes a file, and where a file says nothing else.
pub const GROUP: usize = 256;

/// Whether there is a matrix of this size, and rows of `width` consist of such groups.
pub fn is_group(group: usize, width: usize) -> bool {
    let is_power_of_4 = group.is_power_of_two() && group.trailing_zeros().is_multiple_of(2);
    group >= 4 && is_power_of_4 && width > 0 && width.is_multiple_of(group)
}

/// Multiplies each group of `values` with the matrix of that size; `values` are whole groups.
pub fn rotate(values: &mut [f32], group: usize) {
    for values in values.chunks_exact_mut(group) {
        // One factor of the Kronecker product at a time: numbers that lie `stride` apart belong together.
        let mut stride = 1;
        while stride < group {
            for block in values.chunks_exact_mut(4 * stride) {
                let (low, high) = block.split_at_mut(2 * stride);
                let ((a, b), (c, d)) = (low.split_at_mut(stride), high.split_at_mut(stride));
                for (((a, b), c), d) in a.iter_mut().zip(b).zip(c).zip(d) {
                    let half = (*a + *b + *c + *d) / 2.0;
                    (*a, *b, *c, *d) = (half - *d, half - *c, half - *b, half - *a);
                }
            }
            stride *= 4;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The entry of the matrix without its factor, from its definition: a product over the digits of base 4.
    fn sign(row: usize, column: usize, group: usize) -> f32 {
        let (mut row, mut column, mut rest, mut sign) = (row, column, group, 1.0);
        while rest > 1 {
            if row % 4 + column % 4 == 3 {
                sign = -sign;
            }
            (row, column, rest) = (row / 4, column / 4, rest / 4);
        }
        sign
    }

    #[test]
    fn the_matrix_is_the_regular_one() {
        for group in [4, 16, 256] {
            for row in [0, 1, group / 2, group - 1] {
                let mut values = vec![0.0; group];
                values[row] = 1.0;
                rotate(&mut values, group);
                let factor = 1.0 / (group as f32).sqrt();
                let expected: Vec<f32> = (0..group).map(|column| factor * sign(row, column, group)).collect();
                assert_eq!(values, expected, "row {row} of {group}");
                // Regular: the sum of a row is the root of its length, the same for all.
                assert_eq!(values.iter().sum::<f32>(), 1.0);
            }
        }
    }

    #[test]
    fn rotating_twice_changes_nothing() {
        let values: Vec<f32> = (0..512).map(|i| ((i * 37) % 101) as f32 - 50.0).collect();
        let mut rotated = values.clone();
        rotate(&mut rotated, 256);
        assert_ne!(rotated, values);
        rotate(&mut rotated, 256);
        for (found, expected) in rotated.iter().zip(&values) {
            assert!((found - expected).abs() < 1e-4, "{found} {expected}");
        }
    }

    #[test]
    fn groups_are_powers_of_4_that_divide_rows() {
        assert!(is_group(256, 512) && is_group(4, 4) && is_group(1024, 3072));
        for (group, width) in [
            (0, 256),
            (1, 256),
            (2, 256),
            (8, 256),
            (128, 256),
            (256, 384),
            (256, 0),
            (1024, 256),
        ] {
            assert!(!is_group(group, width), "{group} {width}");
        }
    }
}
