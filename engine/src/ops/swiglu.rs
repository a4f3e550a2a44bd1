//! The gate of a SwiGLU feed-forward layer.
//!
//! [`swiglu`]: `silu(gate) · up` for `x` `[.., 2·hidden]`, in which every row holds the gate (`w1 x`) first and then the up
//! projection (`w3 x`); the result is `[.., hidden]`. [`swiglu_backward`]: `d gate = dy · up · σ(gate) · (1 + gate · (1 − σ(gate)))`
//! and `d up = dy · silu(gate)`. On CUDA `hidden` is a multiple of 8. Source: Shazeer, "GLU Variants
//! Improve Transformer" (2020).

use std::sync::Arc;

use rayon::prelude::*;

use super::elementwise::{silu_scalar, silu_slope};
use super::grid;
use crate::device::{Args, CudaDevice, Kernel};
use crate::error::{Error, Result};
use crate::shape::Shape;
use crate::tensor::Tensor;

/// `silu(gate) · up`; see the module's head comment.
///
/// # Errors
/// When the innermost extent is odd, the type is not the device's compute type, or the CUDA kernel cannot take the width.
pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    const OP: &str = "swiglu";
    x.ensure_dtype(OP, "x", x.device().compute_dtype())?;
    let (shape, hidden) = output_shape(OP, x)?;
    let mut y = Tensor::empty(&x.device(), shape, x.dtype())?;
    let _op = crate::profile::op(OP, x, 0, x.bytes() + y.bytes());
    match x.cuda() {
        None => cpu_swiglu(x, hidden, &mut y)?,
        Some(device) => cuda_swiglu(OP, device, x, hidden, &mut y)?,
    }
    Ok(y)
}

/// The gradient of `x` for the gradient `dy` of [`swiglu`]'s result, in the buffer of `x` where nobody else holds it; with
/// `again`, also the result itself, made again.
///
/// # Errors
/// As for [`swiglu`], or when `dy` does not fit.
pub fn swiglu_backward(dy: &Tensor, x: Tensor, again: bool) -> Result<(Tensor, Option<Tensor>)> {
    const OP: &str = "swiglu_backward";
    x.ensure_dtype(OP, "x", x.device().compute_dtype())?;
    let (shape, hidden) = output_shape(OP, &x)?;
    dy.ensure_shape(OP, "dy", shape)?;
    dy.ensure_dtype(OP, "dy", x.dtype())?;
    dy.ensure_device(OP, "dy", &x.device())?;
    let mut y = again
        .then(|| Tensor::empty(&x.device(), shape, x.dtype()))
        .transpose()?;
    let mut x = x.into_unshared()?;
    match x.cuda().cloned() {
        None => cpu_swiglu_backward(dy, hidden, &mut x, y.as_mut())?,
        Some(device) => {
            let (kernel, blocks_per_row) = kernel(OP, &device, hidden)?;
            let blocks = grid(OP, x.shape().rows() * blocks_per_row)?;
            let args = Args::new()
                .input(dy)?
                .output(&mut x)?
                .optional_output(y.as_mut())?
                .int(hidden)
                .int(blocks_per_row);
            // SAFETY: the arguments are those of `swiglu_backward`, of the shapes and types checked above; the blocks cover
            // every row.
            unsafe { kernel.launch(&device, [blocks, 1, 1], args)? };
        }
    }
    Ok((x, y))
}

/// The shape of the result, and its innermost extent.
fn output_shape(op: &'static str, x: &Tensor) -> Result<(Shape, usize)> {
    let mut extents = x.shape().to_vec();
    match extents.last_mut() {
        Some(last) if last.is_multiple_of(2) => {
            *last /= 2;
            let hidden = *last;
            Ok((Shape::new(&extents), hidden))
        }
        _ => Err(Error::Shape {
            op,
            tensor: "x".into(),
            expected: "[.., 2·hidden]".into(),
            found: x.shape(),
        }),
    }
}

fn cpu_swiglu(x: &Tensor, hidden: usize, y: &mut Tensor) -> Result<()> {
    if hidden == 0 {
        return Ok(());
    }
    let rows = x.as_slice::<f32>()?.par_chunks(2 * hidden);
    let outputs = y.as_mut_slice::<f32>()?.par_chunks_mut(hidden);
    outputs.zip(rows).for_each(|(output, row)| {
        let (gate, up) = row.split_at(hidden);
        for ((output, gate), up) in output.iter_mut().zip(gate).zip(up) {
            *output = silu_scalar(*gate) * up;
        }
    });
    Ok(())
}

fn cpu_swiglu_backward(dy: &Tensor, hidden: usize, x: &mut Tensor, y: Option<&mut Tensor>) -> Result<()> {
    if hidden == 0 {
        return Ok(());
    }
    if let Some(y) = y {
        cpu_swiglu(x, hidden, y)?;
    }
    let rows = x.as_mut_slice::<f32>()?.par_chunks_mut(2 * hidden);
    let gradients = dy.as_slice::<f32>()?.par_chunks(hidden);
    rows.zip(gradients).for_each(|(row, gradients)| {
        let (gate, up) = row.split_at_mut(hidden);
        for ((gate, up), gradient) in gate.iter_mut().zip(up).zip(gradients) {
            let opened = silu_scalar(*gate);
            (*gate, *up) = (gradient * *up * silu_slope(*gate), gradient * opened);
        }
    });
    Ok(())
}

fn cuda_swiglu(op: &'static str, device: &CudaDevice, x: &Tensor, hidden: usize, y: &mut Tensor) -> Result<()> {
    let (kernel, blocks_per_row) = kernel(op, device, hidden)?;
    let blocks = grid(op, x.shape().rows() * blocks_per_row)?;
    let args = Args::new().input(x)?.output(y)?.int(hidden).int(blocks_per_row);
    // SAFETY: the arguments are those of `swiglu`, of the shapes and types checked above; the blocks cover every row.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}

/// The kernel named `op`, and its blocks per row.
fn kernel(op: &'static str, device: &CudaDevice, hidden: usize) -> Result<(Arc<Kernel>, usize)> {
    if !hidden.is_multiple_of(8) {
        return Err(Error::invalid(format!(
            "{op}: a hidden width of {hidden} is not a multiple of 8, which the CUDA kernel needs"
        )));
    }
    let kernel = device.kernel("swiglu", op)?;
    let blocks_per_row = hidden.div_ceil(kernel.info().tile[0] as usize);
    Ok((kernel, blocks_per_row))
}
