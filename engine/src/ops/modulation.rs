//! Vectors that modulate every token of a batch item.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// One vector per batch item, picked out of a table `[batch, vectors, dim]` in f32 (such as the output of an
/// `adaLN_modulation` layer, which holds scale and gate vectors side by side). A table of batch 1 serves every item.
#[derive(Clone, Copy, Debug)]
pub struct Modulation<'a> {
    table: &'a Tensor,
    index: usize,
}

impl<'a> Modulation<'a> {
    /// The vectors `table[.., index, ..]`.
    ///
    /// # Errors
    /// When the table has another rank or type, or no such vector.
    pub fn new(table: &'a Tensor, index: usize) -> Result<Self> {
        table.ensure_rank("modulation", "table", 3, "[batch, vectors, dim]")?;
        table.ensure_dtype("modulation", "table", DType::F32)?;
        if index >= table.dim(1) {
            return Err(Error::invalid(format!(
                "modulation: there is no vector {index} in a table of {}",
                table.dim(1)
            )));
        }
        Ok(Modulation { table, index })
    }

    /// Checks that there is a vector of `dim` elements for each of `batch` items, on the device of `input`.
    pub(crate) fn expect(&self, op: &'static str, name: &str, batch: usize, dim: usize, input: &Tensor) -> Result<()> {
        let items = if self.table.dim(0) == 1 { 1 } else { batch };
        self.table.ensure_shape(op, name, [items, self.table.dim(1), dim])?;
        self.table.ensure_device(op, name, &input.device())
    }

    /// The address of the first item's vector in GPU memory.
    pub(crate) fn device_ptr(&self) -> Result<u64> {
        Ok(self.table.device_ptr()? + (self.index * self.table.dim(2) * DType::F32.size()) as u64)
    }

    /// Elements from one item's vector to the next's; 0 when one vector serves all.
    pub(crate) fn stride(&self) -> usize {
        if self.table.dim(0) == 1 {
            0
        } else {
            self.table.dim(1) * self.table.dim(2)
        }
    }

    /// Items that have a vector of their own.
    pub(crate) fn items(&self) -> usize {
        self.table.dim(0)
    }

    /// The vector of batch item `item`, on the CPU.
    pub(crate) fn row(&self, item: usize) -> Result<&'a [f32]> {
        let dim = self.table.dim(2);
        let start = item * self.stride() + self.index * dim;
        Ok(&self.table.as_slice::<f32>()?[start..start + dim])
    }

    /// The vector of every batch item, on the CPU; `None` without vectors.
    pub(crate) fn rows_or_none(vectors: Option<&Self>, batch: usize) -> Result<Option<Vec<&'a [f32]>>> {
        vectors
            .map(|vectors| (0..batch).map(|item| vectors.row(item)).collect())
            .transpose()
    }

    /// The address of the first item's vector in GPU memory; null without vectors.
    pub(crate) fn address_or_null(vectors: Option<&Self>) -> Result<u64> {
        vectors.map_or(Ok(0), |vectors| vectors.device_ptr())
    }
}

/// Where the gradients of one vector per batch item go: `table[.., index, ..]` of f32 `[batch, vectors, dim]`, which an operation's
/// backward overwrites.
#[derive(Debug)]
pub struct VectorGradient<'a> {
    /// The gradients of a whole table of vectors.
    pub table: &'a mut Tensor,
    /// The vector.
    pub index: usize,
}

/// Checks a table of gradients for vectors `indices` of a modulation that has one vector of `dim` elements per item.
pub(crate) fn ensure_gradient_table(
    op: &'static str,
    table: &Tensor,
    indices: &[usize],
    [batch, dim]: [usize; 2],
    input: &Tensor,
) -> Result<()> {
    table.ensure_rank(op, "vector gradients", 3, "[batch, vectors, dim]")?;
    table.ensure_shape(op, "vector gradients", [batch, table.dim(1), dim])?;
    table.ensure_dtype(op, "vector gradients", DType::F32)?;
    table.ensure_device(op, "vector gradients", &input.device())?;
    match indices.iter().find(|&&index| index >= table.dim(1)) {
        None => Ok(()),
        Some(index) => Err(Error::invalid(format!(
            "{op}: there is no vector {index} in a table of {} gradients",
            table.dim(1)
        ))),
    }
}
