//! Looking up rows of a table.
//!
//! [`embedding`]: `output[b, l] = table[ids[b, l]]` for `table` `[rows, dim]` and i32 `ids` `[batch, tokens]`. On CUDA `dim` is
//! a multiple of 8.
//!
//! Ids must lie in the table. The CPU checks them and returns an error; a kernel cannot, so on CUDA the output row of an
//! id outside the table is NaN, and whoever makes the ids (the tokenizer) validates them before.

use rayon::prelude::*;

use super::{TokenSizes, grid};
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The rows of `table` that `ids` name; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit; on the CPU, when an id lies outside the table.
pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    const OP: &str = "embedding";
    table.ensure_rank(OP, "table", 2, "[rows, dim]")?;
    table.ensure_dtype(OP, "table", table.device().compute_dtype())?;
    ids.ensure_rank(OP, "ids", 2, "[batch, tokens]")?;
    ids.ensure_dtype(OP, "ids", DType::I32)?;
    ids.ensure_device(OP, "ids", &table.device())?;
    let sizes = TokenSizes {
        batch: ids.dim(0),
        tokens: ids.dim(1),
        dim: table.dim(1),
    };
    let mut output = Tensor::empty(&table.device(), [sizes.batch, sizes.tokens, sizes.dim], table.dtype())?;
    let _op = crate::profile::op(OP, ids, 0, 2 * output.bytes());
    match table.cuda() {
        None => cpu_embedding(OP, table, ids, &mut output)?,
        Some(device) => cuda_embedding(OP, device, [table, ids], sizes, &mut output)?,
    }
    Ok(output)
}

fn cpu_embedding(op: &'static str, table: &Tensor, ids: &Tensor, output: &mut Tensor) -> Result<()> {
    let (rows, dim) = (table.dim(0), table.dim(1));
    let ids = ids.as_slice::<i32>()?;
    let in_table = |id: i32| usize::try_from(id).is_ok_and(|id| id < rows);
    if let Some(id) = ids.iter().find(|id| !in_table(**id)) {
        return Err(Error::invalid(format!(
            "{op}: id {id} lies outside a table of {rows} rows"
        )));
    }
    if dim == 0 {
        return Ok(());
    }
    let table = table.as_slice::<f32>()?;
    let outputs = output.as_mut_slice::<f32>()?.par_chunks_mut(dim);
    outputs
        .zip(ids)
        .for_each(|(output, &id)| output.copy_from_slice(&table[id as usize * dim..][..dim]));
    Ok(())
}

fn cuda_embedding(
    op: &'static str,
    device: &CudaDevice,
    [table, ids]: [&Tensor; 2],
    sizes: TokenSizes,
    output: &mut Tensor,
) -> Result<()> {
    sizes.ensure_vectors(op)?;
    let kernel = device.kernel("embedding", op)?;
    let args = Args::new()
        .input(table)?
        .input(ids)?
        .output(output)?
        .long(table.dim(0) as u64)
        .long((sizes.dim / 8) as u64);
    // SAFETY: the arguments are those of `embedding`, of the shapes and types checked at the door; one block per id.
    unsafe { kernel.launch(device, [grid(op, sizes.rows())?, 1, 1], args) }
}
