//! Query and key normalisation with rotary positions, on the packed projection.
//!
//! [`qk_norm_rope`] takes `qkv` `[batch, tokens, (heads + 2·kv_heads)·head_dim]`, the heads of q, then of k, then of v. Every
//! q and k head is divided by its root mean square and multiplied by its weight, then each of its `head_dim / 2` pairs
//! `(a, b)` is turned by the token's angle for that pair:
//!
//! * `(a, b) ← (a·cos − b·sin, a·sin + b·cos)`, with pairs as [`Rotation`] says
//!
//! v is left as it is. [`qk_norm_rope_from`] leaves `qkv` as it was and gives a new tensor. [`qk_norm_rope_backward`] turns gradients
//! back by the same angles; then, with x̂ the normalised head and g = weight · gradient, each head's is
//! `(g − x̂ · mean(g · x̂)) / rms`, and `d weight = Σ gradient · x̂` over tokens and heads. `table` `[batch or 1, tokens, head_dim / 2, 2]` holds (cos, sin) in f32; a table of batch 1 serves all
//! items. On CUDA `head_dim` is 128. Sources: Su et al., "RoFormer" (2021); Henry et al., "Query-Key Normalization" (2020).

use std::sync::Arc;

use rayon::prelude::*;

use super::rms_norm::inverse_rms;
use super::sum_rows::{cpu_add, cpu_row_sums, cuda_add_partial_sums};
use super::{TokenSizes, ensure_parameter, grid};
use crate::device::{Args, CudaDevice, Kernel};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

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

    fn kernels(self) -> [&'static str; 2] {
        match self {
            Rotation::Interleaved => ["qk_norm_rope_interleaved", "qk_norm_rope_backward_interleaved"],
            Rotation::HalfSplit => ["qk_norm_rope_half_split", "qk_norm_rope_backward_half_split"],
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
    /// Checks what goes with a `qkv` of `[batch, tokens, width]`.
    fn ensure_qkv(&self, op: &'static str, qkv: &Tensor, table: &Tensor) -> Result<()> {
        let sizes = TokenSizes::of(op, "qkv", qkv)?;
        qkv.ensure_shape(op, "qkv", [sizes.batch, sizes.tokens, self.width()])?;
        self.expect(op, sizes.batch, sizes.tokens, table, qkv)
    }

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
        ensure_parameter(op, "q_weight", self.q_weight, &[self.head_dim], input)?;
        ensure_parameter(op, "k_weight", self.k_weight, &[self.head_dim], input)?;
        table.ensure_rank(op, "table", 4, "[batch or 1, tokens, head_dim / 2, 2]")?;
        let table_batch = if table.dim(0) == 1 { 1 } else { batch };
        table.ensure_shape(op, "table", [table_batch, tokens, self.head_dim / 2, 2])?;
        table.ensure_dtype(op, "table", DType::F32)?;
        table.ensure_device(op, "table", &input.device())
    }
}

/// Normalises and rotates the queries and keys in place; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit, or `qkv` shares its buffer.
pub fn qk_norm_rope(qkv: &mut Tensor, spec: &QkNormRope<'_>, table: &Tensor) -> Result<()> {
    const OP: &str = "qk_norm_rope";
    spec.ensure_qkv(OP, qkv, table)?;
    let rotated = qkv.shape().rows() * (spec.heads + spec.kv_heads) * spec.head_dim * qkv.dtype().size();
    let _op = crate::profile::op(OP, qkv, 0, 2 * rotated + table.bytes());
    match qkv.cuda().cloned() {
        None => cpu_qk_norm_rope(qkv, spec, table),
        Some(device) => {
            let address = qkv.device_ptr_mut()?;
            cuda_qk_norm_rope(OP, &device, qkv.shape().rows(), [address; 2], spec, table)
        }
    }
}

/// [`qk_norm_rope`] into a new tensor; see the module's head comment.
///
/// # Errors
/// As for [`qk_norm_rope`].
pub fn qk_norm_rope_from(qkv: &Tensor, spec: &QkNormRope<'_>, table: &Tensor) -> Result<Tensor> {
    const OP: &str = "qk_norm_rope";
    spec.ensure_qkv(OP, qkv, table)?;
    let mut result = Tensor::empty(&qkv.device(), qkv.shape(), qkv.dtype())?;
    match qkv.cuda() {
        None => {
            result.copy_from(qkv)?;
            cpu_qk_norm_rope(&mut result, spec, table)?;
        }
        Some(device) => {
            let addresses = [qkv.device_ptr()?, result.device_ptr_mut()?];
            cuda_qk_norm_rope(OP, device, qkv.shape().rows(), addresses, spec, table)?;
        }
    }
    Ok(result)
}

/// Where the gradients of the two weights go, `[head_dim]` each, added to; `None` for frozen ones.
#[derive(Debug, Default)]
pub struct QkNormGradients<'a> {
    /// Of the query weight.
    pub q: Option<&'a mut Tensor>,
    /// Of the key weight.
    pub k: Option<&'a mut Tensor>,
}

/// Turns the gradient of the result into that of `qkv`, in place; see the module's head comment.
///
/// # Errors
/// As for [`qk_norm_rope`], or when a gradient does not fit.
pub fn qk_norm_rope_backward(
    gradient: &mut Tensor,
    qkv: &Tensor,
    spec: &QkNormRope<'_>,
    table: &Tensor,
    gradients: QkNormGradients<'_>,
) -> Result<()> {
    const OP: &str = "qk_norm_rope_backward";
    spec.ensure_qkv(OP, qkv, table)?;
    gradient.ensure_shape(OP, "gradient", qkv.shape())?;
    gradient.ensure_dtype(OP, "gradient", qkv.dtype())?;
    gradient.ensure_device(OP, "gradient", &qkv.device())?;
    for weight in [&gradients.q, &gradients.k].into_iter().flatten() {
        ensure_parameter(OP, "weight gradient", weight, &[spec.head_dim], qkv)?;
    }
    match qkv.cuda() {
        None => cpu_backward(gradient, qkv, spec, table, gradients),
        Some(device) => cuda_backward(OP, device, gradient, qkv, spec, table, gradients),
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

fn cpu_backward(
    gradient: &mut Tensor,
    qkv: &Tensor,
    spec: &QkNormRope<'_>,
    table: &Tensor,
    gradients: QkNormGradients<'_>,
) -> Result<()> {
    let (head_dim, width) = (spec.head_dim, spec.width());
    let weights = [spec.q_weight.as_slice::<f32>()?, spec.k_weight.as_slice::<f32>()?];
    let table_rows = table.dim(0) * table.dim(1);
    let (table, inputs) = (table.as_slice::<f32>()?, qkv.as_slice::<f32>()?);
    let rotated = (spec.heads + spec.kv_heads) * head_dim;
    if rotated == 0 {
        return Ok(());
    }
    // First back through the rotation, in place; then the weights' sums; then through the normalisation.
    let tokens = gradient.as_mut_slice::<f32>()?.par_chunks_mut(width).enumerate();
    tokens.for_each(|(token, row)| {
        let angles = &table[token % table_rows * head_dim..][..head_dim];
        for head in row[..rotated].chunks_mut(head_dim) {
            for (pair, angle) in angles.chunks(2).enumerate() {
                let (first, second) = spec.rotation.elements(pair, head_dim);
                let (a, b, cos, sin) = (head[first], head[second], angle[0], angle[1]);
                (head[first], head[second]) = (a * cos + b * sin, b * cos - a * sin);
            }
        }
    });
    let turned = gradient.as_slice::<f32>()?;
    let sums = |heads: std::ops::Range<usize>| {
        cpu_row_sums(0..qkv.shape().rows(), head_dim, |token, sums| {
            for head in heads.clone() {
                let range = token * width + head * head_dim..token * width + (head + 1) * head_dim;
                let (turned, input) = (&turned[range.clone()], &inputs[range]);
                let inverse = inverse_rms(input, spec.epsilon);
                for ((sum, gradient), x) in sums.iter_mut().zip(turned).zip(input) {
                    *sum += gradient * (x * inverse);
                }
            }
        })
    };
    if let Some(target) = gradients.q {
        cpu_add(target, &sums(0..spec.heads))?;
    }
    if let Some(target) = gradients.k {
        cpu_add(target, &sums(spec.heads..spec.heads + spec.kv_heads))?;
    }
    let tokens = gradient
        .as_mut_slice::<f32>()?
        .par_chunks_mut(width)
        .zip(inputs.par_chunks(width));
    tokens.for_each(|(gradient, input)| {
        let heads = gradient[..rotated].chunks_mut(head_dim).zip(input.chunks(head_dim));
        for (index, (gradient, input)) in heads.enumerate() {
            let weight = weights[usize::from(index >= spec.heads)];
            let inverse = inverse_rms(input, spec.epsilon);
            let along: f32 = gradient
                .iter()
                .zip(weight)
                .zip(input)
                .map(|((g, w), x)| g * w * x)
                .sum();
            let share = along * inverse * inverse / head_dim as f32;
            for ((gradient, weight), x) in gradient.iter_mut().zip(weight).zip(input) {
                *gradient = inverse * (*gradient * weight - x * share);
            }
        }
    });
    Ok(())
}

/// The kernel `name`, if it is for these heads.
fn kernel(op: &'static str, device: &CudaDevice, name: &'static str, spec: &QkNormRope<'_>) -> Result<Arc<Kernel>> {
    let kernel = device.kernel("qk_norm_rope", name)?;
    let kernel_head_dim = kernel.info().tile[0] as usize;
    if spec.head_dim != kernel_head_dim {
        return Err(Error::invalid(format!(
            "{op}: heads of {} elements; the CUDA kernel handles {kernel_head_dim}",
            spec.head_dim
        )));
    }
    Ok(kernel)
}

fn cuda_qk_norm_rope(
    op: &'static str,
    device: &CudaDevice,
    tokens: usize,
    [qkv, result]: [u64; 2],
    spec: &QkNormRope<'_>,
    table: &Tensor,
) -> Result<()> {
    let kernel = kernel(op, device, spec.rotation.kernels()[0], spec)?;
    let table_rows = table.dim(0) * table.dim(1);
    let args = Args::new()
        .long(qkv)
        .long(result)
        .input(spec.q_weight)?
        .input(spec.k_weight)?
        .input(table)?
        .int(spec.heads)
        .int(spec.kv_heads)
        .int(table_rows)
        .float(spec.epsilon);
    // SAFETY: the arguments are those of both kernels, of the shapes and types checked at the door; one block per token.
    // `table_rows` is at most the number of tokens, which `grid` has checked.
    unsafe { kernel.launch(device, [grid(op, tokens)?, 1, 1], args) }
}

fn cuda_backward(
    op: &'static str,
    device: &CudaDevice,
    gradient: &mut Tensor,
    qkv: &Tensor,
    spec: &QkNormRope<'_>,
    table: &Tensor,
    gradients: QkNormGradients<'_>,
) -> Result<()> {
    let kernel = kernel(op, device, spec.rotation.kernels()[1], spec)?;
    let tokens = grid(op, qkv.shape().rows())?;
    let resident = kernel.resident_blocks(kernel.info().threads)? * device.multiprocessors();
    let blocks = tokens.min(resident.max(1));
    let needed = gradients.q.is_some() || gradients.k.is_some();
    let shape = [2, blocks as usize, spec.head_dim];
    let mut partial = needed
        .then(|| Tensor::empty(&qkv.device(), shape, DType::F32))
        .transpose()?;
    let args = Args::new()
        .output(gradient)?
        .input(qkv)?
        .input(spec.q_weight)?
        .input(spec.k_weight)?
        .input(table)?
        .optional_output(partial.as_mut())?
        .int(tokens as usize)
        .int(spec.heads)
        .int(spec.kv_heads)
        .int(table.dim(0) * table.dim(1))
        .float(spec.epsilon);
    // SAFETY: the arguments are those of both kernels, of the shapes and types checked at the door; every block has its rows
    // of `partial`.
    unsafe { kernel.launch(device, [blocks, 1, 1], args)? };
    let Some(partial) = partial else { return Ok(()) };
    for (index, target) in [gradients.q, gradients.k].into_iter().enumerate() {
        if let Some(target) = target {
            let sums = partial.narrow(index, 1)?.into_shape([blocks as usize, spec.head_dim])?;
            cuda_add_partial_sums(op, device, &sums, target)?;
        }
    }
    Ok(())
}
