//! The gradient of attention, recomputing the weights from the log-sum-exp.
//!
//! With the forward contract's names and `dy` the gradient of the result, for every query `i` and key `j` that it sees:
//!
//! * `w[i, j] = exp(scale · q[i] · k[j] − lse[i])`, zero for keys that `i` does not see
//! * `delta[i] = dy[i] · out[i]`, and `ds[i, j] = w[i, j] · (dy[i] · v[j] − delta[i])`
//! * `dq[i] = scale · Σ_j ds[i, j] · k[j]`, `dk[j] = scale · Σ_i ds[i, j] · q[i]`, `dv[j] = Σ_i w[i, j] · dy[i]`
//!
//! Key and value heads that several query heads share get the sum over these. Keys and values at or past an item's key length
//! get zeros; queries there are queries like all others, and their `dy` counts as given.
//!
//! Shapes: `dy` and `out` `[batch, tokens, heads · head_dim]`, `lse` `[batch, heads, tokens]` in f32, the result like the packed
//! `qkv` `[batch, tokens, (heads + 2·kv_heads) · head_dim]`.
//!
//! On CUDA `head_dim` is 64 or 128; products are of bf16 with f32 sums, `w` and `ds` are rounded to bf16 for theirs. Some
//! blocks hold keys and pass over the queries, others hold queries and pass over the keys: each result is summed in one
//! block in one order, so that two runs give the same bits. Source: Dao, "FlashAttention-2" (2023); on Hopper with the schedule
//! of Shah et al., "FlashAttention-3" (2024).

mod cpu;
mod cuda;

use super::{Attention, Problem};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;

const OP: &str = "attention_backward";

/// Which CUDA kernels compute the gradient; the choice is for tests and benchmarks, everybody else takes
/// [`attention_backward`]. On the CPU it changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionBackwardKernel {
    /// On Hopper, for heads of 128, its own kernels; the portable ones otherwise.
    Auto,
    /// The kernels that run on every GPU from Ampere on.
    Portable,
    /// Hopper's.
    Hopper,
}

/// The gradient of [`super::attention`] with respect to `qkv`; see the module's head comment. `out` and `lse` are what
/// [`super::attention_with_lse`] gave for the same `qkv`, `spec` and `key_lengths`.
///
/// # Errors
/// When shapes, types or devices do not fit, or there is no CUDA kernel for the head's width.
pub fn attention_backward(
    dy: &Tensor,
    qkv: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    spec: &Attention,
    key_lengths: Option<&Tensor>,
) -> Result<Tensor> {
    let forward = AttentionResult { qkv, out, lse };
    attention_backward_with(AttentionBackwardKernel::Auto, dy, forward, spec, key_lengths)
}

/// What attention read and what it gave.
#[derive(Clone, Copy, Debug)]
pub struct AttentionResult<'a> {
    /// The packed queries, keys and values.
    pub qkv: &'a Tensor,
    /// The result.
    pub out: &'a Tensor,
    /// The log-sum-exp of each query's scores.
    pub lse: &'a Tensor,
}

/// [`attention_backward`] by given kernels, for tests and benchmarks.
///
/// # Errors
/// As for [`attention_backward`], and when the device or the head's width does not have the kernels.
pub fn attention_backward_with(
    kernel: AttentionBackwardKernel,
    dy: &Tensor,
    forward: AttentionResult<'_>,
    spec: &Attention,
    key_lengths: Option<&Tensor>,
) -> Result<Tensor> {
    let gradient = Gradient::new(dy, forward, spec, key_lengths)?;
    let qkv = forward.qkv;
    let mut dqkv = Tensor::empty(&qkv.device(), qkv.shape(), qkv.dtype())?;
    if qkv.elements() > 0 {
        match qkv.cuda() {
            None => cpu::attention_backward(&gradient, &mut dqkv)?,
            Some(device) => cuda::attention_backward(device, kernel, &gradient, &mut dqkv)?,
        }
    }
    Ok(dqkv)
}

/// What was checked at the door.
struct Gradient<'a> {
    forward: Problem<'a>,
    dy: &'a Tensor,
    out: &'a Tensor,
    lse: &'a Tensor,
}

impl<'a> Gradient<'a> {
    fn new(
        dy: &'a Tensor,
        AttentionResult { qkv, out, lse }: AttentionResult<'a>,
        spec: &'a Attention,
        key_lengths: Option<&'a Tensor>,
    ) -> Result<Self> {
        let forward = Problem::new(qkv, spec, key_lengths)?;
        for (name, tensor) in [("dy", dy), ("out", out)] {
            tensor.ensure_shape(OP, name, [forward.batch, forward.tokens, spec.width()])?;
            tensor.ensure_dtype(OP, name, qkv.dtype())?;
            tensor.ensure_device(OP, name, &qkv.device())?;
        }
        lse.ensure_shape(OP, "lse", [forward.batch, spec.heads, forward.tokens])?;
        lse.ensure_dtype(OP, "lse", DType::F32)?;
        lse.ensure_device(OP, "lse", &qkv.device())?;
        Ok(Gradient { forward, dy, out, lse })
    }
}
