//! Layer normalisation without learned factors, and its modulation.
//!
//! [`layer_norm_modulate`]: `(x − mean(x)) / sqrt(var(x) + ε) · (1 + scale)`, mean and (biased) variance over the last
//! dimension, for `x` `[batch, tokens, dim]`; the scale is one f32 vector per batch item. [`layer_norm_shift`] adds another such
//! vector; the gradient of `x` is the same, and that of the shift is [`super::gated_add::item_sums`] of `dy`.
//! [`layer_norm_modulate_backward`], with x̂ the
//! normalised rows and `g = dy · (1 + scale)`: `dx = (g − mean(g) − x̂ · mean(g · x̂)) / sqrt(var(x) + ε)`, `d scale = Σ dy · x̂` over an
//! item's rows. On CUDA `dim` is a multiple of 8 and
//! at most 32768, in the backward pass 8192. Source: Ba et al., "Layer Normalization" (2016); the modulation is that of the final layer of the latent
//! model.

use rayon::prelude::*;

use super::modulation::ensure_gradient_table;
use super::rms_norm::{NormGradients, finish_sums};
use super::sum_rows::cpu_row_sums;
use super::{Modulation, TokenSizes, VectorGradient, grid, threads_per_row};
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The normalised rows of `x`, times `1 + scale`; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn layer_norm_modulate(x: &Tensor, scale: Option<Modulation<'_>>, epsilon: f32) -> Result<Tensor> {
    modulated(x, scale, None, epsilon)
}

/// The normalised rows of `x`, times `1 + scale`, plus `shift`; both are vectors of one table.
///
/// # Errors
/// When shapes, types or devices do not fit, or the vectors are of tables of different sizes.
pub fn layer_norm_shift(x: &Tensor, scale: Modulation<'_>, shift: Modulation<'_>, epsilon: f32) -> Result<Tensor> {
    if scale.stride() != shift.stride() {
        return Err(Error::invalid(
            "layer_norm_shift: scale and shift are of tables of different sizes",
        ));
    }
    modulated(x, Some(scale), Some(shift), epsilon)
}

fn modulated(x: &Tensor, scale: Option<Modulation<'_>>, shift: Option<Modulation<'_>>, epsilon: f32) -> Result<Tensor> {
    const OP: &str = "layer_norm_modulate";
    let sizes = TokenSizes::of(OP, "x", x)?;
    for (name, vectors) in [("scale", &scale), ("shift", &shift)] {
        if let Some(vectors) = vectors {
            vectors.expect(OP, name, sizes.batch, sizes.dim, x)?;
        }
    }
    let vectors = [scale.as_ref(), shift.as_ref()];
    let mut output = Tensor::empty(&x.device(), x.shape(), x.dtype())?;
    let _op = crate::profile::op(OP, x, 0, 2 * x.bytes());
    match x.cuda() {
        None => cpu_layer_norm(x, vectors, epsilon, sizes, &mut output)?,
        Some(device) => cuda_layer_norm(OP, device, x, vectors, epsilon, sizes, &mut output)?,
    }
    Ok(output)
}

/// The gradient of `x` for the gradient `dy` of [`layer_norm_modulate`]'s result; that of the scale overwrites `scale_gradient`.
///
/// # Errors
/// When shapes, types or devices do not fit, or a gradient of a scale is asked for that is not one per item.
pub fn layer_norm_modulate_backward(
    dy: &Tensor,
    x: &Tensor,
    scale: Option<Modulation<'_>>,
    epsilon: f32,
    scale_gradient: Option<VectorGradient<'_>>,
) -> Result<Tensor> {
    const OP: &str = "layer_norm_modulate_backward";
    let sizes = TokenSizes::of(OP, "x", x)?;
    dy.ensure_shape(OP, "dy", x.shape())?;
    dy.ensure_dtype(OP, "dy", x.dtype())?;
    dy.ensure_device(OP, "dy", &x.device())?;
    if let Some(scale) = &scale {
        scale.expect(OP, "scale", sizes.batch, sizes.dim, x)?;
    }
    if let Some(gradient) = &scale_gradient {
        ensure_gradient_table(OP, gradient.table, &[gradient.index], [sizes.batch, sizes.dim], x)?;
        if scale.is_none_or(|scale| scale.items() != sizes.batch) {
            return Err(Error::invalid(format!(
                "{OP}: there is no scale per item to differentiate"
            )));
        }
    }
    let mut dx = Tensor::empty(&x.device(), x.shape(), x.dtype())?;
    match x.cuda() {
        None => cpu_backward([dy, x], scale.as_ref(), epsilon, sizes, &mut dx, scale_gradient)?,
        Some(device) => cuda_backward(
            OP,
            device,
            [dy, x],
            scale.as_ref(),
            epsilon,
            sizes,
            &mut dx,
            scale_gradient,
        )?,
    }
    Ok(dx)
}

/// Mean and inverse deviation of a row.
fn statistics(row: &[f32], epsilon: f32) -> (f32, f32) {
    let mean = row.iter().sum::<f32>() / row.len() as f32;
    let squares: f32 = row.iter().map(|x| (x - mean) * (x - mean)).sum();
    (mean, 1.0 / (squares / row.len() as f32 + epsilon).sqrt())
}

fn cpu_backward(
    [dy, x]: [&Tensor; 2],
    scale: Option<&Modulation<'_>>,
    epsilon: f32,
    sizes: TokenSizes,
    dx: &mut Tensor,
    scale_gradient: Option<VectorGradient<'_>>,
) -> Result<()> {
    if sizes.dim == 0 {
        return Ok(());
    }
    let scales = Modulation::rows_or_none(scale, sizes.batch)?;
    let (dy, x) = (dy.as_slice::<f32>()?, x.as_slice::<f32>()?);
    let rows = dx.as_mut_slice::<f32>()?.par_chunks_mut(sizes.dim).enumerate();
    rows.for_each(|(row, dx)| {
        let range = row * sizes.dim..(row + 1) * sizes.dim;
        let (dy, x) = (&dy[range.clone()], &x[range]);
        let (mean, inverse) = statistics(x, epsilon);
        let scale = scales.as_ref().map(|scales| scales[row / sizes.tokens]);
        for (channel, dx) in dx.iter_mut().enumerate() {
            *dx = dy[channel] * scale.map_or(1.0, |scale| 1.0 + scale[channel]);
        }
        let plain = dx.iter().sum::<f32>() / sizes.dim as f32;
        let along: f32 = dx.iter().zip(x).map(|(g, x)| g * (x - mean) * inverse).sum();
        let share = along / sizes.dim as f32;
        for (dx, x) in dx.iter_mut().zip(x) {
            *dx = inverse * (*dx - plain - (x - mean) * inverse * share);
        }
    });
    let Some(VectorGradient { table, index }) = scale_gradient else {
        return Ok(());
    };
    for item in 0..sizes.batch {
        let sums = cpu_row_sums(
            item * sizes.tokens..(item + 1) * sizes.tokens,
            sizes.dim,
            |row, sums| {
                let range = row * sizes.dim..(row + 1) * sizes.dim;
                let (dy, x) = (&dy[range.clone()], &x[range]);
                let (mean, inverse) = statistics(x, epsilon);
                for ((sum, dy), x) in sums.iter_mut().zip(dy).zip(x) {
                    *sum += dy * (x - mean) * inverse;
                }
            },
        );
        let start = (item * table.dim(1) + index) * sizes.dim;
        table.as_mut_slice::<f32>()?[start..start + sizes.dim].copy_from_slice(&sums);
    }
    Ok(())
}

#[allow(clippy::too_many_arguments)]
fn cuda_backward(
    op: &'static str,
    device: &CudaDevice,
    [dy, x]: [&Tensor; 2],
    scale: Option<&Modulation<'_>>,
    epsilon: f32,
    sizes: TokenSizes,
    dx: &mut Tensor,
    scale_gradient: Option<VectorGradient<'_>>,
) -> Result<()> {
    /// Blocks per multiprocessor.
    const BLOCKS: usize = 2;
    sizes.ensure_vectors(op)?;
    let kernel = device.kernel("layer_norm", op)?;
    let threads = threads_per_row(op, sizes.dim, kernel.info().tile[0])?;
    if threads > kernel.info().threads {
        return Err(Error::invalid(format!(
            "{op}: rows of {} elements are longer than the CUDA kernel's {}",
            sizes.dim,
            kernel.info().threads * kernel.info().tile[0]
        )));
    }
    let rows_per_block = sizes.rows().div_ceil(BLOCKS * device.multiprocessors() as usize).max(1);
    let blocks = sizes.tokens.div_ceil(rows_per_block);
    let mut partial = scale_gradient
        .is_some()
        .then(|| Tensor::empty(&x.device(), [sizes.batch, blocks, sizes.dim], DType::F32))
        .transpose()?;
    let args = Args::new()
        .input(dy)?
        .input(x)?
        .long(Modulation::address_or_null(scale)?)
        .output(dx)?
        .optional_output(partial.as_mut())?
        .int(sizes.dim)
        .int(sizes.tokens)
        .int(scale.map_or(0, Modulation::stride))
        .float(epsilon);
    // SAFETY: the arguments are those of `layer_norm_modulate_backward`, of the shapes and types checked at the door; there are
    // at most as many blocks per item as tokens.
    unsafe { kernel.launch_with(device, [grid(op, blocks)?, grid(op, sizes.batch)?, 1], threads, args)? };
    let Some(partial) = partial else { return Ok(()) };
    let gradients = NormGradients {
        weight: None,
        vector: scale_gradient,
    };
    finish_sums(op, device, &partial, None, None, false, gradients)
}

fn cpu_layer_norm(
    x: &Tensor,
    [scale, shift]: [Option<&Modulation<'_>>; 2],
    epsilon: f32,
    sizes: TokenSizes,
    output: &mut Tensor,
) -> Result<()> {
    if sizes.dim == 0 {
        return Ok(());
    }
    let scales = Modulation::rows_or_none(scale, sizes.batch)?;
    let shifts = Modulation::rows_or_none(shift, sizes.batch)?;
    let rows = x.as_slice::<f32>()?.par_chunks(sizes.dim);
    let outputs = output.as_mut_slice::<f32>()?.par_chunks_mut(sizes.dim);
    outputs.zip(rows).enumerate().for_each(|(row, (output, x))| {
        let (mean, inverse) = statistics(x, epsilon);
        for (output, x) in output.iter_mut().zip(x) {
            *output = (x - mean) * inverse;
        }
        if let Some(scales) = &scales {
            for (output, scale) in output.iter_mut().zip(scales[row / sizes.tokens]) {
                *output *= 1.0 + scale;
            }
        }
        if let Some(shifts) = &shifts {
            for (output, shift) in output.iter_mut().zip(shifts[row / sizes.tokens]) {
                *output += shift;
            }
        }
    });
    Ok(())
}

fn cuda_layer_norm(
    op: &'static str,
    device: &CudaDevice,
    x: &Tensor,
    [scale, shift]: [Option<&Modulation<'_>>; 2],
    epsilon: f32,
    sizes: TokenSizes,
    output: &mut Tensor,
) -> Result<()> {
    sizes.ensure_vectors(op)?;
    let kernel = device.kernel("layer_norm", op)?;
    let threads = threads_per_row(op, sizes.dim, kernel.info().tile[0])?;
    let args = Args::new()
        .input(x)?
        .long(Modulation::address_or_null(scale)?)
        .long(Modulation::address_or_null(shift)?)
        .output(output)?
        .int(sizes.dim)
        .int(sizes.tokens)
        .int(scale.map_or(0, Modulation::stride))
        .float(epsilon);
    // SAFETY: the arguments are those of `layer_norm_modulate`, of the shapes and types checked at the door; scale and
    // shift have one stride; one block per row.
    unsafe { kernel.launch_with(device, [grid(op, sizes.rows())?, 1, 1], threads, args) }
}
