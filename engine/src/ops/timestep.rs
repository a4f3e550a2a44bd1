//! The sinusoidal embedding of a timestep.
//!
//! For a time `t` in [0, 1] and `half = dim / 2` frequencies `f_i = max_period^(−i / half)` the embedding is `cos(1000·t·f_i)` for
//! all i, then `sin(1000·t·f_i)` for all i, then a zero if `dim` is odd. It is a handful of numbers, so it is computed on the
//! host, in f32 and in the order of operations of the published models: at large angles a frequency that differs in its last
//! bit would change more than an exact one gains. Source: Vaswani et al., "Attention Is All You Need" (2017).

use crate::device::Device;
use crate::error::Result;
use crate::tensor::Tensor;

/// Times run from 0 to 1; the embedding counts them in thousandths.
const TIME_SCALE: f32 = 1000.0;

/// The embeddings of the times `t`, one after the other, `dim` values each; see the module's head comment.
pub fn timestep_embedding(t: &[f32], dim: usize, max_period: f32) -> Vec<f32> {
    let half = dim / 2;
    let log_period = -f64::from(max_period).ln() as f32;
    let frequencies: Vec<f32> = (0..half)
        .map(|index| (log_period * index as f32 / half as f32).exp())
        .collect();
    t.iter()
        .flat_map(|t| {
            let angles = frequencies.iter().map(move |frequency| t * TIME_SCALE * frequency);
            let padding = std::iter::repeat_n(0.0, dim - 2 * half);
            angles.clone().map(f32::cos).chain(angles.map(f32::sin)).chain(padding)
        })
        .collect()
}

/// [`timestep_embedding`] on a device: f32 `[t.len(), dim]`, the input of the timestep's layers.
///
/// # Errors
/// When the device has no room.
pub fn timestep_embedding_on(device: &Device, t: &[f32], dim: usize, max_period: f32) -> Result<Tensor> {
    Tensor::from_slice(device, &timestep_embedding(t, dim, max_period), [t.len(), dim])
}
