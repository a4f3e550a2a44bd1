//! The gate of a SwiGLU feed-forward layer.
//!
//! [`swiglu`]: `silu(gate) · up` for `x` `[.., 2·hidden]`, in which every row holds the gate (`w1 x`) first and then the up
//! projection (`w3 x`); the result is `[.., hidden]`. On CUDA `hidden` is a multiple of 8. Source: Shazeer, "GLU Variants
//! Improve Transformer" (2020).

use rayon::prelude::*;

use super::elementwise::silu_scalar;
use super::grid;
use crate::device::{Args, CudaDevice};
use crate::error::{Error, Result};
use crate::tensor::{Shape, Tensor};

/// `silu(gate) · up`; see the module's head comment.
///
/// # Errors
/// When the innermost extent is odd, the type is not the device's compute type, or the CUDA kernel cannot take the width.
pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    const OP: &str = "swiglu";
    x.expect_dtype(OP, "x", x.device().compute_dtype())?;
    let mut extents = x.shape().to_vec();
    let hidden = match extents.last_mut() {
        Some(last) if last.is_multiple_of(2) => {
            *last /= 2;
            *last
        }
        _ => {
            return Err(Error::Shape {
                op: OP,
                tensor: "x".into(),
                expected: "[.., 2·hidden]".into(),
                found: x.shape(),
            });
        }
    };
    let mut y = Tensor::empty(&x.device(), Shape::new(&extents), x.dtype())?;
    let _op = crate::profile::op(OP, x, 0, x.bytes() + y.bytes());
    match x.cuda() {
        None => cpu_swiglu(x, hidden, &mut y)?,
        Some(device) => cuda_swiglu(OP, device, x, hidden, &mut y)?,
    }
    Ok(y)
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

fn cuda_swiglu(op: &'static str, device: &CudaDevice, x: &Tensor, hidden: usize, y: &mut Tensor) -> Result<()> {
    if !hidden.is_multiple_of(8) {
        return Err(Error::invalid(format!(
            "{op}: a hidden width of {hidden} is not a multiple of 8, which the CUDA kernel needs"
        )));
    }
    let kernel = device.kernel("swiglu", op)?;
    let blocks_per_row = hidden.div_ceil(kernel.info().tile[0] as usize);
    let blocks = grid(op, x.shape().rows() * blocks_per_row)?;
    let args = Args::new().input(x)?.output(y)?.int(hidden).int(blocks_per_row);
    // SAFETY: the arguments are those of `swiglu`, of the shapes and types checked above; the blocks cover every row.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}
