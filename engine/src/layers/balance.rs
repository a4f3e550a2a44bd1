//! Factors that are moved from one weight to the next before both are rounded to eight bits.
//!
//! `w2 · (silu(w1 x) · w3 x)` is the same when row k of `w3` is divided and column k of `w2` multiplied by a number. Where a column is much
//! smaller than most, its inputs are as much larger, or it would not matter; rounded beside the others, what is left of its weights would
//! be lost, and their error multiplied by the largest inputs of all. Such a column is made as large as the median one, by a power of two,
//! so that nothing but the rounding changes. Source: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction"
//! (2019), which equalises all channels.

use super::{Balance, Loader, NamedParameter};
use crate::error::Result;
use crate::ops::quantise::Coding;
use crate::tensor::Tensor;

/// Rows that tell how large columns are.
const ROWS: usize = 256;

/// A column so many times smaller than the median one is made larger.
const SMALL: f32 = 8.0;

/// The largest exponent of a factor.
const MOST: f32 = 24.0;

/// The factor of each column of a weight `[out, in]`; `None` where all are 1.
///
/// # Errors
/// When a copy from the device fails.
fn factors(weight: &Tensor) -> Result<Option<Vec<f32>>> {
    let (rows, columns) = (weight.dim(0).min(ROWS), weight.dim(1));
    let mut sizes = vec![0.0_f32; columns];
    for row in weight.narrow(0, rows)?.to_vec_f32()?.chunks(columns.max(1)) {
        sizes
            .iter_mut()
            .zip(row)
            .for_each(|(size, value)| *size += value * value);
    }
    let mut sorted: Vec<f32> = sizes.iter().map(|size| size.sqrt()).collect();
    sorted.sort_unstable_by(f32::total_cmp);
    let median = sorted.get(columns / 2).copied().unwrap_or(0.0);
    let factor = |size: &f32| match median / size.sqrt() {
        ratio if ratio.is_finite() && ratio > SMALL => ratio.log2().round().min(MOST).exp2(),
        _ => 1.0,
    };
    let factors: Vec<f32> = sizes.iter().map(factor).collect();
    Ok(factors.iter().any(|factor| *factor != 1.0).then_some(factors))
}

impl Loader<'_> {
    /// `values` of a weight that is to be kept in `coding`, with the factors that it shares with another one; as they are where either
    /// stays in the compute type.
    pub(super) fn balanced(&self, meta: &NamedParameter, values: Tensor, coding: Option<Coding>) -> Result<Tensor> {
        let other = |of: &NamedParameter| self.params.coding(of).is_some();
        let (Some(_), Some(balance)) = (coding, &meta.balance) else {
            return Ok(values);
        };
        let width = values.dim(1);
        match balance {
            Balance::Columns { of } if other(of) => {
                let Some(factors) = factors(&values)? else {
                    return Ok(values);
                };
                let mut all = values.to_vec_f32()?;
                for row in all.chunks_mut(width) {
                    row.iter_mut()
                        .zip(&factors)
                        .for_each(|(value, factor)| *value *= factor);
                }
                Tensor::from_f32(self.device, &all, values.shape())
            }
            Balance::Rows { part, of } if other(of) => {
                let next = self.params.load(self.device, of.name(), &of.shape())?;
                let Some(factors) = factors(&next)? else {
                    return Ok(values);
                };
                drop(next);
                let mut all = values.to_vec_f32()?;
                let rows = all[meta.range(*part)].chunks_mut(width);
                for (row, factor) in rows.zip(&factors) {
                    row.iter_mut().for_each(|value| *value /= factor);
                }
                Tensor::from_f32(self.device, &all, values.shape())
            }
            _ => Ok(values),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    #[test]
    fn small_columns_get_powers_of_two() {
        let rows: Vec<f32> = (0..300)
            .flat_map(|row| [1.0, -1.1, 0.9, 1e-3, 0.0, 0.3].map(|value| value * (1 + row % 2) as f32))
            .collect();
        let weight = Tensor::from_slice(&Device::Cpu, &rows, [300, 6]).unwrap();
        assert_eq!(factors(&weight).unwrap(), Some(vec![1.0, 1.0, 1.0, 1024.0, 1.0, 1.0]));
        let plain = Tensor::from_slice(&Device::Cpu, &[1.0_f32, 2.0, 0.5, 1.0, -1.0, 0.25], [2, 3]).unwrap();
        assert_eq!(factors(&plain).unwrap(), None);
    }
}
