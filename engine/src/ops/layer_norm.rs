//! Layer normalisation without learned factors, and its modulation.
//!
//! [`layer_norm_modulate`]: `(x − mean(x)) / sqrt(var(x) + ε) · (1 + scale)`, mean and (biased) variance over the last
//! dimension, for `x` `[batch, tokens, dim]`; the scale is one f32 vector per batch item. On CUDA `dim` is a multiple of 8 and
//! at most 32768. Source: Ba et al., "Layer Normalization" (2016); the modulation is that of the final layer of the latent
//! model.

use rayon::prelude::*;

use super::{Modulation, TokenSizes, grid, threads_per_row};
use crate::device::{Args, CudaDevice};
use crate::error::Result;
use crate::tensor::Tensor;

/// The normalised rows of `x`, times `1 + scale`; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn layer_norm_modulate(x: &Tensor, scale: Option<Modulation<'_>>, epsilon: f32) -> Result<Tensor> {
    const OP: &str = "layer_norm_modulate";
    let sizes = TokenSizes::of(OP, "x", x)?;
    if let Some(scale) = &scale {
        scale.expect(OP, "scale", sizes.batch, sizes.dim, x)?;
    }
    let mut output = Tensor::empty(&x.device(), x.shape(), x.dtype())?;
    let _op = crate::profile::op(OP, x, 0, 2 * x.bytes());
    match x.cuda() {
        None => cpu_layer_norm(x, scale.as_ref(), epsilon, sizes, &mut output)?,
        Some(device) => cuda_layer_norm(OP, device, x, scale.as_ref(), epsilon, sizes, &mut output)?,
    }
    Ok(output)
}

fn cpu_layer_norm(
    x: &Tensor,
    scale: Option<&Modulation<'_>>,
    epsilon: f32,
    sizes: TokenSizes,
    output: &mut Tensor,
) -> Result<()> {
    if sizes.dim == 0 {
        return Ok(());
    }
    let scales = Modulation::rows_or_none(scale, sizes.batch)?;
    let rows = x.as_slice::<f32>()?.par_chunks(sizes.dim);
    let outputs = output.as_mut_slice::<f32>()?.par_chunks_mut(sizes.dim);
    outputs.zip(rows).enumerate().for_each(|(row, (output, x))| {
        let mean = x.iter().sum::<f32>() / sizes.dim as f32;
        let squares: f32 = x.iter().map(|x| (x - mean) * (x - mean)).sum();
        let inverse = 1.0 / (squares / sizes.dim as f32 + epsilon).sqrt();
        for (output, x) in output.iter_mut().zip(x) {
            *output = (x - mean) * inverse;
        }
        if let Some(scales) = &scales {
            for (output, scale) in output.iter_mut().zip(scales[row / sizes.tokens]) {
                *output *= 1.0 + scale;
            }
        }
    });
    Ok(())
}

fn cuda_layer_norm(
    op: &'static str,
    device: &CudaDevice,
    x: &Tensor,
    scale: Option<&Modulation<'_>>,
    epsilon: f32,
    sizes: TokenSizes,
    output: &mut Tensor,
) -> Result<()> {
    sizes.expect_vectors(op)?;
    let kernel = device.kernel("layer_norm", op)?;
    let threads = threads_per_row(op, sizes.dim, kernel.info().tile[0])?;
    let args = Args::new()
        .input(x)?
        .long(Modulation::address_or_null(scale)?)
        .output(output)?
        .int(sizes.dim)
        .int(sizes.tokens)
        .int(scale.map_or(0, Modulation::stride))
        .float(epsilon);
    // SAFETY: the arguments are those of `layer_norm_modulate`, of the shapes and types checked at the door; one block per row.
    unsafe { kernel.launch_with(device, [grid(op, sizes.rows())?, 1, 1], threads, args) }
}
