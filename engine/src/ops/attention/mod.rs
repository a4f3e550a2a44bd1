//! Attention, without the matrix of scores ever standing in memory.
//!
//! With `q`, `k`, `v` the rows of one head: `result[i] = Σ_j w[i, j] · v[j]`, `w[i, ·] = softmax_j(scale · q[i] · k[j])`, where `j`
//! runs over the keys that query `i` sees: those below the item's key length, and with `causal` only `j ≤ i`. Queries at or
//! past the key length see the valid keys like all others; without any key the result is zero. With fewer key/value heads
//! than query heads, query head `h` uses key/value head `h / (heads / kv_heads)`.
//!
//! Shapes: packed `qkv` `[batch, tokens, (heads + 2·kv_heads)·head_dim]`, all query heads first, then all key heads, then all
//! value heads; key lengths `[batch]` in i32, taken into 0 ..= tokens; result `[batch, tokens, heads·head_dim]`; log-sum-exp
//! `[batch, heads, tokens]` in f32, the natural logarithm of `Σ_j exp(scale · q[i] · k[j])`, −∞ for a query without keys. What
//! stands in masked keys and values does not matter as long as it is finite.
//!
//! On CUDA `head_dim` is 64, 128 or 512; scores, sums and result are f32, the weights are rounded to bf16 for their product
//! with the values. Source: Vaswani et al., "Attention Is All You Need" (2017); block by block after Dao et al.,
//! "FlashAttention" (2022), on Hopper after Shah et al., "FlashAttention-3" (2024).

mod backward;
mod cpu;
mod cuda;

pub use backward::{AttentionBackwardKernel, AttentionResult, attention_backward, attention_backward_with};

use super::TokenSizes;
use super::quantise::{Activation, Coding, Quantised, Scaling};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::shape::Shape;
use crate::tensor::Tensor;

/// The heads of an attention layer and what its queries see.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; a divisor of `heads`.
    pub kv_heads: usize,
    /// The width of one head.
    pub head_dim: usize,
    /// Whether a query sees only the keys up to its own position.
    pub causal: bool,
    /// The factor of the scores, usually `1/√head_dim`; positive.
    pub scale: f32,
}

/// Which CUDA kernel computes it; the choice is for tests and benchmarks, everybody else takes [`attention`]. On the CPU it
/// changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionKernel {
    /// On Hopper, for heads of 128, one of its own kernels, whichever fills the GPU better; the portable kernel otherwise.
    Auto,
    /// The kernel that runs on every GPU from Ampere on.
    Portable,
    /// Hopper's with 128 queries per block, whose two products overlap.
    Hopper128,
    /// Hopper's with 192 queries per block.
    Hopper192,
}

/// Attention; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit, or there is no CUDA kernel for the head's width.
pub fn attention(qkv: &Tensor, spec: &Attention, key_lengths: Option<&Tensor>) -> Result<Tensor> {
    let (result, _) = compute(AttentionKernel::Auto, qkv, spec, key_lengths, false)?;
    Ok(result)
}

/// [`attention`] in eight bits with a scale per token and head, where `coding` asks for it.
///
/// # Errors
/// As for [`attention`], and when heads are not as wide as the groups of eight-bit numbers.
pub fn attention_in(
    qkv: &Tensor,
    spec: &Attention,
    key_lengths: Option<&Tensor>,
    coding: Option<Coding>,
) -> Result<Activation> {
    let Some(coding) = coding else {
        return attention(qkv, spec, key_lengths).map(Activation::Values);
    };
    let problem = Problem::new(qkv, spec, key_lengths)?;
    let (batch, tokens) = (problem.batch, problem.tokens);
    let fused = qkv.cuda().filter(|device| cuda::makes_codes(device, &problem));
    let Some(device) = fused else {
        return Activation::of(attention(qkv, spec, key_lengths)?, Some(coding), Scaling::Groups);
    };
    let shape = Shape::new(&[batch, tokens, spec.width()]);
    let mut result = Quantised::empty(OP, qkv, shape, coding, Scaling::Groups)?;
    let _op = crate::profile::op(OP, qkv, problem.flops(), qkv.bytes() + result.bytes());
    if batch > 0 && tokens > 0 {
        cuda::attention_codes(device, &problem, &mut result)?;
    }
    Ok(Activation::Codes(result))
}

/// Attention and the log-sum-exp of each query's scores; see the module's head comment.
///
/// # Errors
/// As for [`attention`].
pub fn attention_with_lse(qkv: &Tensor, spec: &Attention, key_lengths: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
    attention_with(AttentionKernel::Auto, qkv, spec, key_lengths)
}

/// [`attention_with_lse`] by a given kernel, for tests and benchmarks.
///
/// # Errors
/// As for [`attention`], and when the device or the head's width does not have the kernel.
pub fn attention_with(
    kernel: AttentionKernel,
    qkv: &Tensor,
    spec: &Attention,
    key_lengths: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let (result, log_sums) = compute(kernel, qkv, spec, key_lengths, true)?;
    Ok((result, log_sums.expect("asked for")))
}

const OP: &str = "attention";

/// What was checked at the door.
struct Problem<'a> {
    qkv: &'a Tensor,
    spec: &'a Attention,
    key_lengths: Option<&'a Tensor>,
    batch: usize,
    tokens: usize,
}

impl<'a> Problem<'a> {
    fn new(qkv: &'a Tensor, spec: &'a Attention, key_lengths: Option<&'a Tensor>) -> Result<Self> {
        let Attention {
            heads,
            kv_heads,
            head_dim,
            scale,
            ..
        } = *spec;
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) || heads == 0 || head_dim == 0 {
            return Err(Error::invalid(format!(
                "{OP}: {heads} query heads of {head_dim} cannot share {kv_heads} key and value heads"
            )));
        }
        if !(scale.is_finite() && scale > 0.0) {
            return Err(Error::invalid(format!(
                "{OP}: the scale is {scale}, expected a positive number"
            )));
        }
        let sizes = TokenSizes::of(OP, "qkv", qkv)?;
        qkv.ensure_shape(OP, "qkv", [sizes.batch, sizes.tokens, spec.packed_width()])?;
        if let Some(lengths) = key_lengths {
            lengths.ensure_shape(OP, "key lengths", [sizes.batch])?;
            lengths.ensure_dtype(OP, "key lengths", DType::I32)?;
            lengths.ensure_device(OP, "key lengths", &qkv.device())?;
        }
        Ok(Problem {
            qkv,
            spec,
            key_lengths,
            batch: sizes.batch,
            tokens: sizes.tokens,
        })
    }
}

impl Problem<'_> {
    fn flops(&self) -> usize {
        4 * self.batch * self.tokens * self.tokens * self.spec.width() / (1 + usize::from(self.spec.causal))
    }
}

impl Attention {
    /// The width of a row of packed queries, keys and values.
    fn packed_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// The width of a row of the result.
    fn width(&self) -> usize {
        self.heads * self.head_dim
    }
}

fn compute(
    kernel: AttentionKernel,
    qkv: &Tensor,
    spec: &Attention,
    key_lengths: Option<&Tensor>,
    with_log_sums: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let problem = Problem::new(qkv, spec, key_lengths)?;
    let (batch, tokens, device) = (problem.batch, problem.tokens, qkv.device());
    let mut result = Tensor::empty(&device, [batch, tokens, spec.width()], qkv.dtype())?;
    let mut log_sums = with_log_sums
        .then(|| Tensor::empty(&device, [batch, spec.heads, tokens], DType::F32))
        .transpose()?;
    let _op = crate::profile::op(OP, qkv, problem.flops(), qkv.bytes() + result.bytes());
    if batch > 0 && tokens > 0 {
        match qkv.cuda() {
            None => cpu::attention(&problem, &mut result, log_sums.as_mut())?,
            Some(device) => cuda::attention(device, kernel, &problem, &mut result, log_sums.as_mut())?,
        }
    }
    Ok((result, log_sums))
}
