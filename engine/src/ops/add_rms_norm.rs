//! The residual sum of a pre-norm transformer, with the normalisation of the sublayer that follows.
//!
//! * [`add`]: `x + y`
//! * [`add_rms_norm`]: `sum = x + y`, and at once `sum / rms(sum) · weight` with `rms(x) = sqrt(mean(x²) + ε)` over the last
//!   dimension; the normalisation reads the sum before it is rounded
//!
//! Shapes: activations `[batch, tokens, dim]`, weight `[dim]`. On CUDA `dim` is a multiple of 8 and at most 32768. Sources:
//! Xiong et al., "On Layer Normalization in the Transformer Architecture" (2020); Zhang and Sennrich, "Root Mean Square Layer
//! Normalization" (2019).

use rayon::prelude::*;

use super::rms_norm::inverse_rms;
use super::{TokenSizes, ensure_parameter, grid, threads_per_row};
use crate::device::{Args, CudaDevice};
use crate::error::Result;
use crate::tensor::Tensor;

/// `x + y`; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    const OP: &str = "add";
    let sizes = ensure_summands(OP, x, y)?;
    let mut sum = Tensor::empty(&x.device(), x.shape(), x.dtype())?;
    let _op = crate::profile::op(OP, x, 0, 3 * x.bytes());
    match x.cuda() {
        None => cpu_add(x, y, &mut sum)?,
        Some(device) => cuda_add_rms_norm(OP, device, [x, y], sizes, &mut sum, None)?,
    }
    Ok(sum)
}

/// `x + y`, and that sum normalised; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn add_rms_norm(x: &Tensor, y: &Tensor, weight: &Tensor, epsilon: f32) -> Result<(Tensor, Tensor)> {
    const OP: &str = "add_rms_norm";
    let sizes = ensure_summands(OP, x, y)?;
    ensure_parameter(OP, "weight", weight, &[sizes.dim], x)?;
    let mut sum = Tensor::empty(&x.device(), x.shape(), x.dtype())?;
    let mut normalised = Tensor::empty(&x.device(), x.shape(), x.dtype())?;
    let _op = crate::profile::op(OP, x, 0, 4 * x.bytes());
    match x.cuda() {
        None => {
            cpu_add(x, y, &mut sum)?;
            cpu_normalise(&sum, weight, epsilon, sizes, &mut normalised)?;
        }
        Some(device) => {
            let next = Normalised {
                weight,
                epsilon,
                output: &mut normalised,
            };
            cuda_add_rms_norm(OP, device, [x, y], sizes, &mut sum, Some(next))?;
        }
    }
    Ok((sum, normalised))
}

fn ensure_summands(op: &'static str, x: &Tensor, y: &Tensor) -> Result<TokenSizes> {
    let sizes = TokenSizes::of(op, "x", x)?;
    y.ensure_shape(op, "y", x.shape())?;
    y.ensure_dtype(op, "y", x.dtype())?;
    y.ensure_device(op, "y", &x.device())?;
    Ok(sizes)
}

fn cpu_add(x: &Tensor, y: &Tensor, sum: &mut Tensor) -> Result<()> {
    let (x, y) = (x.as_slice::<f32>()?, y.as_slice::<f32>()?);
    let summands = x.par_iter().zip(y);
    sum.as_mut_slice::<f32>()?
        .par_iter_mut()
        .zip(summands)
        .for_each(|(sum, (x, y))| *sum = x + y);
    Ok(())
}

fn cpu_normalise(sum: &Tensor, weight: &Tensor, epsilon: f32, sizes: TokenSizes, output: &mut Tensor) -> Result<()> {
    if sizes.dim == 0 {
        return Ok(());
    }
    let weight = weight.as_slice::<f32>()?;
    let rows = sum.as_slice::<f32>()?.par_chunks(sizes.dim);
    let outputs = output.as_mut_slice::<f32>()?.par_chunks_mut(sizes.dim);
    outputs.zip(rows).for_each(|(output, row)| {
        let inverse = inverse_rms(row, epsilon);
        for ((output, value), weight) in output.iter_mut().zip(row).zip(weight) {
            *output = value * inverse * weight;
        }
    });
    Ok(())
}

/// The second result of the kernel.
struct Normalised<'a> {
    weight: &'a Tensor,
    epsilon: f32,
    output: &'a mut Tensor,
}

fn cuda_add_rms_norm(
    op: &'static str,
    device: &CudaDevice,
    [x, y]: [&Tensor; 2],
    sizes: TokenSizes,
    sum: &mut Tensor,
    next: Option<Normalised<'_>>,
) -> Result<()> {
    sizes.ensure_vectors(op)?;
    let kernel = device.kernel("add_rms_norm", "add_rms_norm")?;
    let threads = threads_per_row(op, sizes.dim, kernel.info().tile[0])?;
    let (weight, epsilon, normalised) = match next {
        Some(next) => (Some(next.weight), next.epsilon, Some(next.output)),
        None => (None, 0.0, None),
    };
    let args = Args::new()
        .input(x)?
        .input(y)?
        .output(sum)?
        .optional(weight)?
        .optional_output(normalised)?
        .int(sizes.dim)
        .float(epsilon);
    // SAFETY: the arguments are those of `add_rms_norm`, of the shapes and types checked at the door; one block per row;
    // weight and normalised are both there or both null.
    unsafe { kernel.launch_with(device, [grid(op, sizes.rows())?, 1, 1], threads, args) }
}
