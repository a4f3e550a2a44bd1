//! The packed projection of an attention layer with its queries and keys normalised and rotated.
//!
//! [`linear_qk_norm_rope`] is [`super::linear`] of `x` `[batch, tokens, dim]` by the stacked weight
//! `[(heads + 2·kv_heads)·head_dim, dim]`, then [`super::qk_norm_rope`], in one. On Hopper, where the sizes suit (heads of 128,
//! interleaved pairs), a head is normalised and rotated in the registers that it was summed in, before it is rounded.

use super::TokenSizes;
use super::linear::linear;
use super::linear_hopper::{self, blocks, matrix_map};
use super::qk_norm_rope::{QkNormRope, Rotation, qk_norm_rope};
use crate::device::{Args, CudaDevice};
use crate::error::Result;
use crate::tensor::Tensor;

/// The width of the kernel's heads.
const HEAD_DIM: usize = 128;

/// The packed projection; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn linear_qk_norm_rope(x: &Tensor, weight: &Tensor, spec: &QkNormRope<'_>, table: &Tensor) -> Result<Tensor> {
    const OP: &str = "linear_qk_norm_rope";
    let sizes = TokenSizes::of(OP, "x", x)?;
    let suits = spec.head_dim == HEAD_DIM && spec.rotation == Rotation::Interleaved;
    match linear_hopper::device_for(x, sizes.rows(), sizes.dim) {
        Some(device) if suits => {
            weight.expect_shape(OP, "weight", [spec.width(), sizes.dim])?;
            weight.expect_dtype(OP, "weight", x.dtype())?;
            weight.expect_device(OP, "weight", &x.device())?;
            spec.expect(OP, sizes.batch, sizes.tokens, table, x)?;
            launch(OP, device, x, weight, spec, table)
        }
        _ => {
            let mut qkv = linear(x, weight, None)?;
            qk_norm_rope(&mut qkv, spec, table)?;
            Ok(qkv)
        }
    }
}

fn launch(
    op: &'static str,
    device: &CudaDevice,
    x: &Tensor,
    weight: &Tensor,
    spec: &QkNormRope<'_>,
    table: &Tensor,
) -> Result<Tensor> {
    let (rows, depth) = (x.dim(0) * x.dim(1), x.dim(2));
    let mut output = Tensor::empty(&x.device(), [x.dim(0), x.dim(1), spec.width()], x.dtype())?;
    let bytes = x.bytes() + weight.bytes() + output.bytes() + table.bytes();
    let _op = crate::profile::op(op, x, 2 * rows * depth * spec.width(), bytes);
    let kernel = device.kernel(linear_hopper::IMAGE, if std::env::var_os("L2P_LINEAR_COLUMNS").is_some() { "linear_qk_norm_rope_columns" } else { op })?;
    let args = Args::new()
        .tensor_map(matrix_map(&kernel, x, rows, depth)?)
        .tensor_map(matrix_map(&kernel, weight, weight.dim(0), weight.dim(1))?)
        .output(&mut output)?
        .input(spec.q_weight)?
        .input(spec.k_weight)?
        .input(table)?
        .int(rows)
        .int(depth)
        .int(spec.heads)
        .int(spec.kv_heads)
        .int(table.dim(0) * table.dim(1))
        .float(spec.epsilon);
    let grid = [blocks(device, &kernel, rows, spec.width()), 1, 1];
    // SAFETY: the arguments are those of `linear_qk_norm_rope`, of the shapes and types checked at the door; the blocks share the
    // tiles whatever their number.
    unsafe { kernel.launch(device, grid, args)? };
    Ok(output)
}
