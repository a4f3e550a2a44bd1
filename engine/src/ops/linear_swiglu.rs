//! The first half of a SwiGLU feed-forward layer: `silu(x · w1ᵀ) · (x · w3ᵀ)`.
//!
//! [`linear_swiglu`] takes `x` `[.., dim]` and the stacked weight `[2·hidden, dim]`, `w1` first; the result is `[.., hidden]`. It is
//! [`super::linear`] and [`super::swiglu`] in one: on Hopper, where the sizes suit, gate and up projection meet in registers and
//! are never stored, hence not rounded.

use super::linear::{linear, with_last};
use super::linear_hopper::{self, blocks, matrix_map};
use super::swiglu::swiglu;
use crate::device::{Args, CudaDevice};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// `silu(x · w1ᵀ) · (x · w3ᵀ)`; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn linear_swiglu(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    const OP: &str = "linear_swiglu";
    /// Outputs that a kernel's tile is made of.
    const GROUP: usize = 32;
    weight.ensure_rank(OP, "weight", 2, "[2·hidden, dim]")?;
    let (hidden, depth) = (weight.dim(0) / 2, weight.dim(1));
    if !weight.dim(0).is_multiple_of(2) {
        return Err(Error::Shape {
            op: OP,
            tensor: "weight".into(),
            expected: "[2·hidden, dim]".into(),
            found: weight.shape(),
        });
    }
    let rows = x.shape().rows();
    match linear_hopper::device_for(x, rows, depth) {
        Some(device) if hidden.is_multiple_of(GROUP) && x.shape().last() == depth => {
            weight.ensure_dtype(OP, "weight", x.device().compute_dtype())?;
            weight.ensure_device(OP, "weight", &x.device())?;
            x.ensure_dtype(OP, "x", x.device().compute_dtype())?;
            launch(OP, device, x, weight)
        }
        _ => swiglu(&linear(x, weight, None)?),
    }
}

fn launch(op: &'static str, device: &CudaDevice, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (rows, hidden, depth) = (x.shape().rows(), weight.dim(0) / 2, weight.dim(1));
    let mut output = Tensor::empty(&x.device(), with_last(x.shape(), hidden), x.dtype())?;
    let bytes = x.bytes() + weight.bytes() + output.bytes();
    let _op = crate::profile::op(op, x, 2 * rows * depth * 2 * hidden, bytes);
    let kernel = device.kernel(linear_hopper::IMAGE, op)?;
    let args = Args::new()
        .tensor_map(matrix_map(&kernel, x, rows, depth)?)
        .tensor_map(matrix_map(&kernel, weight, weight.dim(0), weight.dim(1))?)
        .output(&mut output)?
        .int(rows)
        .int(hidden)
        .int(depth);
    let grid = [blocks(device, &kernel, rows, 2 * hidden), 1, 1];
    // SAFETY: the arguments are those of `linear_swiglu`, of the shapes and types checked at the door; the blocks share the tiles
    // whatever their number.
    unsafe { kernel.launch(device, grid, args)? };
    Ok(output)
}
