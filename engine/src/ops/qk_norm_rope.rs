//! Query and key normalisation with rotary positions, in place on the packed projection.
//!
//! [`qk_norm_rope`] takes `qkv` `[batch, tokens, (heads + 2·kv_heads)·head_dim]`, the heads of q, then of k, then of v. Every
//! q and k head is divided by its root mean square and multiplied by its weight, then each of its `head_dim / 2` pairs
//! `(a, b)` is turned by the token's angle for that pair:
//!
//! * `(a, b) ← (a·cos − b·sin, a·sin + b·cos)`, with pairs as [`Rotation`] says
//!
//! v is left as it is. `table` `[batch or 1, tokens, head_dim / 2, 2]` holds (cos, sin) in f32; a table of batch 1 serves all
//! items. On CUDA `head_dim` is 128. Sources: Su et al., "RoFormer" (2021); Henry et al., "Query-Key Normalization" (2020).

use rayon::prelude::*;

use super::rms_norm::inverse_rms;
use super::{TokenSizes, expect_parameter, grid};
use crate::device::{Args, CudaDevice};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Which elements of a head form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// Elements `2i` and `2i + 1` (Z-Image).
    Interleaved,
    /// Elements `i` and `i + head_dim / 2` (GPT-NeoX, Qwen3).
    HalfSplit,
}

impl Rotation {
    /// The elements of pair `pair`.
    fn elements(self, pair: usize, head_dim: usize) -> (usize, usize) {
        match self {
            Rotation::Interleaved => (2 * pair, 2 * pair + 1),
            Rotation::HalfSplit => (pair, pair + head_dim / 2),
        }
    }

    fn kernel(self) -> &'static str {
        match self {
            Rotation::Interleaved => "qk_norm_rope_interleaved",
            Rotation::HalfSplit => "qk_norm_rope_half_split",
        }
    }
}

/// The heads of an attention layer, the normalisation of its queries and keys, and their rotation.
#[derive(Clone, Copy, Debug)]
pub struct QkNormRope<'a> {
    /// Query heads.
    pub heads: usize,
    /// Key heads, and as many value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// The factor per element of every query head, `[head_dim]`.
    pub q_weight: &'a Tensor,
    /// The factor per element of every key head, `[head_dim]`.
    pub k_weight: &'a Tensor,
    /// Added to the mean square.
    pub epsilon: f32,
    /// Which elements form a pair.
    pub rotation: Rotation,
}

impl QkNormRope<'_> {
    /// Elements of one token's q, k and v.
    pub(super) fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Checks weights and table for the given numbers of items and tokens; `input` has their device and type.
    pub(super) fn expect(
        &self,
        op: &'static str,
        batch: usize,
        tokens: usize,
        table: &Tensor,
        input: &Tensor,
    ) -> Result<()> {
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::invalid(format!(
                "{op}: a head of {} elements cannot be divided into pairs",
                self.head_dim
            )));
        }
        expect_parameter(op, "q_weight", self.q_weight, &[self.head_dim], input)?;
        expect_parameter(op, "k_weight", self.k_weight, &[self.head_dim], input)?;
        table.expect_rank(op, "table", 4, "[batch or 1, tokens, head_dim / 2, 2]")?;
        let table_batch = if table.dim(0) == 1 { 1 } else { batch };
        table.expect_shape(op, "table", [table_batch, tokens, self.head_dim / 2, 2])?;
        table.expect_dtype(op, "table", DType::F32)?;
        table.expect_device(op, "table", &input.device())
    }
}

/// Normalises and rotates the queries and keys; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit, or `qkv` shares its buffer.
pub fn qk_norm_rope(qkv: &mut Tensor, spec: &QkNormRope<'_>, table: &Tensor) -> Result<()> {
    const OP: &str = "qk_norm_rope";
    let sizes = TokenSizes::of(OP, "qkv", qkv)?;
    qkv.expect_shape(OP, "qkv", [sizes.batch, sizes.tokens, spec.width()])?;
    spec.expect(OP, sizes.batch, sizes.tokens, table, qkv)?;
    let rotated = sizes.rows() * (spec.heads + spec.kv_heads) * spec.head_dim * qkv.dtype().size();
    let _op = crate::profile::op(OP, qkv, 0, 2 * rotated + table.bytes());
    match qkv.cuda().cloned() {
        None => cpu_qk_norm_rope(qkv, spec, table),
        Some(device) => cuda_qk_norm_rope(OP, &device, qkv, spec, table),
    }
}

fn cpu_qk_norm_rope(qkv: &mut Tensor, spec: &QkNormRope<'_>, table: &Tensor) -> Result<()> {
    let head_dim = spec.head_dim;
    let (q_weight, k_weight) = (spec.q_weight.as_slice::<f32>()?, spec.k_weight.as_slice::<f32>()?);
    let table_rows = table.dim(0) * table.dim(1);
    let table = table.as_slice::<f32>()?;
    let rotated = (spec.heads + spec.kv_heads) * head_dim;
    if rotated == 0 {
        return Ok(());
    }
    let tokens = qkv.as_mut_slice::<f32>()?.par_chunks_mut(spec.width()).enumerate();
    tokens.for_each(|(token, row)| {
        let angles = &table[token % table_rows * head_dim..][..head_dim];
        for (index, head) in row[..rotated].chunks_mut(head_dim).enumerate() {
            let weight = if index < spec.heads { q_weight } else { k_weight };
            let inverse = inverse_rms(head, spec.epsilon);
            for (pair, angle) in angles.chunks(2).enumerate() {
                let (first, second) = spec.rotation.elements(pair, head_dim);
                let (a, b) = (
                    head[first] * inverse * weight[first],
                    head[second] * inverse * weight[second],
                );
                let (cos, sin) = (angle[0], angle[1]);
                head[first] = a * cos - b * sin;
                head[second] = a * sin + b * cos;
            }
        }
    });
    Ok(())
}

fn cuda_qk_norm_rope(
    op: &'static str,
    device: &CudaDevice,
    qkv: &mut Tensor,
    spec: &QkNormRope<'_>,
    table: &Tensor,
) -> Result<()> {
    let kernel = device.kernel("qk_norm_rope", spec.rotation.kernel())?;
    let kernel_head_dim = kernel.info().tile[0] as usize;
    if spec.head_dim != kernel_head_dim {
        return Err(Error::invalid(format!(
            "{op}: heads of {} elements; the CUDA kernel handles {kernel_head_dim}",
            spec.head_dim
        )));
    }
    let blocks = grid(op, qkv.shape().rows())?;
    let table_rows = table.dim(0) * table.dim(1);
    let args = Args::new()
        .output(qkv)?
        .input(spec.q_weight)?
        .input(spec.k_weight)?
        .input(table)?
        .int(spec.heads)
        .int(spec.kv_heads)
        .int(table_rows)
        .float(spec.epsilon);
    // SAFETY: the arguments are those of both kernels, of the shapes and types checked at the door; one block per token.
    // `table_rows` is at most the number of tokens, which `grid` has checked.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}
