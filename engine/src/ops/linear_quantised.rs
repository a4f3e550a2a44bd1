//! Linear layers in eight bits: `y[r, c] = Σ_g s_x[r, g] · s_w[c] · Σ_k∈g code_x[r, k] · code_w[c, k]`.
//!
//! [`linear_quantised`] takes tokens `[.., in]` and a weight `[out, in]` of the same coding, the weight with a scale per row; the
//! result is `[.., out]` in the compute type. [`linear_quantised_swiglu`] takes the stacked weight `[2·hidden, in]`, gate first, and
//! gives `silu(gate) · up` `[.., hidden]` in eight bits with a scale per group, as the next layer takes it.
//!
//! On Hopper codes are multiplied by kernels of their own: integers exactly, floating point with the tensor cores' sums. Elsewhere, and
//! on the CPU, where it defines the result, both factors are dequantised and multiplied in the compute type.

use std::sync::Arc;

use super::linear::{linear, with_last};
use super::linear_hopper::{blocks, matrix_map};
use super::quantise::{Activation, Coding, GROUP, Quantised, Scaling, dequantise};
use super::swiglu::swiglu;
use crate::device::{Args, CudaDevice, Kernel};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

const IMAGE: &str = "linear_quantised_hopper";

/// `x · weightᵀ`; see the module's head comment.
///
/// # Errors
/// When shapes, codings or devices do not fit.
pub fn linear_quantised(x: &Quantised, weight: &Quantised) -> Result<Tensor> {
    const OP: &str = "linear_quantised";
    ensure_fit(OP, x, weight)?;
    let (rows, outputs, depth) = (x.shape().rows(), weight.shape().rows(), x.shape().last());
    let Some(device) = hopper(x).filter(|_| outputs.is_multiple_of(8)) else {
        return linear(&dequantise(x)?, &dequantise(weight)?, None);
    };
    let mut output = Tensor::empty_compute(&x.codes().device(), with_last(x.shape(), outputs))?;
    let bytes = x.bytes() + weight.bytes() + output.bytes();
    let _op = crate::profile::op(OP, x.codes(), 2 * rows * depth * outputs, bytes);
    if output.elements() == 0 {
        return Ok(output);
    }
    let kernel = choose(device, x, outputs)?;
    let args = Args::new()
        .tensor_map(matrix_map(&kernel, x.codes(), rows, depth)?)
        .tensor_map(matrix_map(&kernel, weight.codes(), outputs, depth)?)
        .output(&mut output)?
        .input(x.scales())?
        .input(weight.scales())?
        .int(rows)
        .int(outputs)
        .int(depth);
    // SAFETY: the arguments are those of `linear_rows_…` and `linear_groups_…`, of the shapes checked at the door; the blocks share the
    // tiles whatever their number.
    unsafe { kernel.launch(device, [blocks(device, &kernel, rows, outputs), 1, 1], args)? };
    Ok(output)
}

/// `silu(gate) · up`, in eight bits where `then` asks for it; see the module's head comment.
///
/// # Errors
/// When shapes, codings or devices do not fit.
pub fn linear_quantised_swiglu(x: &Quantised, weight: &Quantised, then: Option<Coding>) -> Result<Activation> {
    const OP: &str = "linear_quantised_swiglu";
    ensure_fit(OP, x, weight)?;
    let (rows, hidden, depth) = (x.shape().rows(), weight.shape().rows() / 2, x.shape().last());
    let fused = then == Some(x.coding()) && x.scaling() == Scaling::Rows && hidden.is_multiple_of(GROUP) && rows > 0;
    let Some(device) = hopper(x).filter(|_| fused) else {
        return Activation::of(swiglu(&linear_quantised(x, weight)?)?, then, Scaling::Groups);
    };
    let mut output = Quantised::empty(OP, x.codes(), with_last(x.shape(), hidden), x.coding(), Scaling::Groups)?;
    let bytes = x.bytes() + weight.bytes() + output.bytes();
    let _op = crate::profile::op(OP, x.codes(), 2 * rows * depth * 2 * hidden, bytes);
    let kernel = device.kernel(IMAGE, x.coding().of_kernels(["linear_swiglu_s8", "linear_swiglu_e4m3"]))?;
    let [codes, scales] = output.parts_mut();
    let args = Args::new()
        .tensor_map(matrix_map(&kernel, x.codes(), rows, depth)?)
        .tensor_map(matrix_map(&kernel, weight.codes(), 2 * hidden, depth)?)
        .output(codes)?
        .output(scales)?
        .input(x.scales())?
        .input(weight.scales())?
        .int(rows)
        .int(hidden)
        .int(depth);
    // SAFETY: the arguments are those of `linear_swiglu_…`, of the shapes checked at the door; the blocks share the tiles whatever their
    // number.
    unsafe { kernel.launch(device, [blocks(device, &kernel, rows, 2 * hidden), 1, 1], args)? };
    Ok(Activation::Codes(output))
}

/// The device of `x`, if it has these kernels.
fn hopper(x: &Quantised) -> Option<&Arc<CudaDevice>> {
    let rows = x.shape().rows();
    x.codes()
        .cuda()
        .filter(|device| i32::try_from(rows).is_ok() && device.has_hopper_kernels())
}

fn ensure_fit(op: &'static str, x: &Quantised, weight: &Quantised) -> Result<()> {
    weight.codes().ensure_rank(op, "weight", 2, "[out, in]")?;
    weight.codes().ensure_device(op, "weight", &x.codes().device())?;
    if x.shape().last() != weight.shape().last() {
        return Err(Error::Shape {
            op,
            tensor: "x".into(),
            expected: format!("[.., {}]", weight.shape().last()),
            found: x.shape(),
        });
    }
    if x.coding() != weight.coding() || weight.scaling() != Scaling::Rows {
        return Err(Error::invalid(format!(
            "{op}: x in {} cannot be multiplied by a weight in {} with scales of {:?}, expected the same coding and scales of rows",
            x.coding(),
            weight.coding(),
            weight.scaling()
        )));
    }
    Ok(())
}

/// The kernel whose tiles are as wide as lets the busiest multiprocessor do least.
fn choose(device: &CudaDevice, x: &Quantised, outputs: usize) -> Result<Arc<Kernel>> {
    let names: [[&'static str; 2]; 2] = match x.scaling() {
        Scaling::Rows => [
            ["linear_rows_256_s8", "linear_rows_256_e4m3"],
            ["linear_rows_192_s8", "linear_rows_192_e4m3"],
        ],
        Scaling::Groups => [
            ["linear_groups_192_s8", "linear_groups_192_e4m3"],
            ["linear_groups_128_s8", "linear_groups_128_e4m3"],
        ],
    };
    let [wide, narrow] = names.map(|names| device.kernel(IMAGE, x.coding().of_kernels(names)));
    let (wide, narrow) = (wide?, narrow?);
    let rows = x.shape().rows();
    let busiest = |kernel: &Kernel| {
        let [tile_rows, tile_columns, ..] = kernel.info().tile.map(|extent| extent.max(1) as usize);
        let pairs = rows.div_ceil(tile_rows) * outputs.div_ceil(tile_columns).div_ceil(2);
        pairs.div_ceil((device.multiprocessors() as usize / 2).max(1)) * tile_columns
    };
    Ok(if busiest(&narrow) < busiest(&wide) {
        narrow
    } else {
        wide
    })
}
