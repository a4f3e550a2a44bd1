//! Sums over rows, for gradients of what every row shares: biases, pad tokens, and (by their own partial sums) norms.
//!
//! * [`add_row_sum`]: `target += Σ rows of x`, `x` `[.., dim]`, `target` `[dim]`
//! * [`add_pad_row_sum`]: the same over the rows of `x` `[batch, tokens, dim]` at or past their item's length
//!
//! Both in the device's compute type with f32 sums. On CUDA `dim` is a multiple of 8; sums are taken in two stages of fixed
//! order, so that equal inputs give equal bits.

use rayon::prelude::*;

use super::{TokenSizes, ensure_parameter, grid};
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;

/// Rows that one task of the CPU sums; fixed, so that the order of additions does not depend on the number of threads.
const ROWS_PER_TASK: usize = 32;

/// `target += Σ rows of x`; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit, or `target` shares its buffer.
pub fn add_row_sum(x: &Tensor, target: &mut Tensor) -> Result<()> {
    let rows = x.reshape([1, x.shape().rows(), x.shape().last()])?;
    sum("add_row_sum", &rows, None, target)
}

/// The gradient of the pad token of `fill_pad_tokens`: `target` plus the rows of `x` whose index is at least their item's entry
/// of `lengths` (i32 `[batch]`); see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit, or `target` shares its buffer.
pub fn add_pad_row_sum(x: &Tensor, lengths: &Tensor, target: &mut Tensor) -> Result<()> {
    const OP: &str = "add_pad_row_sum";
    lengths.ensure_shape(OP, "lengths", [x.shape().first().copied().unwrap_or(0)])?;
    lengths.ensure_dtype(OP, "lengths", DType::I32)?;
    lengths.ensure_device(OP, "lengths", &x.device())?;
    sum(OP, x, Some(lengths), target)
}

fn sum(op: &'static str, x: &Tensor, lengths: Option<&Tensor>, target: &mut Tensor) -> Result<()> {
    let sizes = TokenSizes::of(op, "x", x)?;
    ensure_parameter(op, "target", target, &[sizes.dim], x)?;
    if let Some(device) = x.cuda() {
        return cuda_sum(op, device, x, lengths, sizes, target);
    }
    let values = x.as_slice::<f32>()?;
    let lengths = lengths.map(Tensor::as_slice::<i32>).transpose()?;
    let counts = |row: usize| {
        lengths.is_none_or(|lengths| (row % sizes.tokens) as i64 >= i64::from(lengths[row / sizes.tokens]))
    };
    let sums = cpu_row_sums(0..sizes.rows(), sizes.dim, |row, sums| {
        if counts(row) {
            let values = &values[row * sizes.dim..][..sizes.dim];
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
    });
    cpu_add(target, &sums)
}

/// The sums over `rows` of what `add(row, sums)` adds for one row, in an order that does not depend on the threads.
pub(crate) fn cpu_row_sums(
    rows: std::ops::Range<usize>,
    width: usize,
    add: impl Fn(usize, &mut [f32]) + Sync,
) -> Vec<f32> {
    let starts: Vec<usize> = rows.clone().step_by(ROWS_PER_TASK).collect();
    let partial = starts.into_par_iter().map(|start| {
        let mut sums = vec![0.0; width];
        (start..rows.end.min(start + ROWS_PER_TASK)).for_each(|row| add(row, &mut sums));
        sums
    });
    let mut total = vec![0.0; width];
    for sums in partial.collect::<Vec<_>>() {
        total.iter_mut().zip(&sums).for_each(|(total, sum)| *total += sum);
    }
    total
}

/// `target += values` on the CPU.
pub(crate) fn cpu_add(target: &mut Tensor, values: &[f32]) -> Result<()> {
    let target = target.as_mut_slice::<f32>()?;
    target
        .iter_mut()
        .zip(values)
        .for_each(|(target, value)| *target += value);
    Ok(())
}

fn cuda_sum(
    op: &'static str,
    device: &CudaDevice,
    x: &Tensor,
    lengths: Option<&Tensor>,
    sizes: TokenSizes,
    target: &mut Tensor,
) -> Result<()> {
    /// Groups of rows per multiprocessor.
    const GROUPS: usize = 4;
    sizes.ensure_vectors(op)?;
    if sizes.rows() * sizes.dim == 0 {
        return Ok(());
    }
    let kernel = device.kernel("sum_rows", "sum_rows")?;
    let [columns, lanes, ..] = kernel.info().tile.map(|extent| extent as usize);
    let column_tiles = sizes.dim.div_ceil(columns);
    let groups = sizes
        .rows()
        .div_ceil(lanes)
        .min((GROUPS * device.multiprocessors() as usize).div_ceil(column_tiles));
    let mut partial = Tensor::empty(&x.device(), [groups, sizes.dim], DType::F32)?;
    let args = Args::new()
        .input(x)?
        .optional(lengths)?
        .output(&mut partial)?
        .int(grid(op, sizes.rows())? as usize)
        .int(sizes.dim)
        .int(sizes.tokens);
    let blocks = [grid(op, column_tiles)?, grid(op, groups)?, 1];
    // SAFETY: the arguments are those of `sum_rows`, of the shapes and types checked at the door; the blocks cover every
    // column, and every group has a row of `partial`.
    unsafe { kernel.launch(device, blocks, args)? };
    cuda_add_partial_sums(op, device, &partial, target)
}

/// `target += Σ rows of partial`, `partial` f32 `[parts, dim]`, `target` bf16 `[dim]`.
pub(crate) fn cuda_add_partial_sums(
    op: &'static str,
    device: &CudaDevice,
    partial: &Tensor,
    target: &mut Tensor,
) -> Result<()> {
    partial.ensure_shape(op, "partial sums", [partial.dim(0), target.elements()])?;
    partial.ensure_dtype(op, "partial sums", DType::F32)?;
    target.ensure_dtype(op, "target", DType::Bf16)?;
    let kernel = device.kernel("sum_rows", "add_partial_sums")?;
    let blocks = grid(op, partial.dim(1).div_ceil(kernel.info().tile[0] as usize))?;
    let args = Args::new()
        .input(partial)?
        .output(target)?
        .int(partial.dim(0))
        .int(partial.dim(1));
    // SAFETY: the arguments are those of `add_partial_sums`, of the shapes and types checked above; the blocks cover every
    // column.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}
