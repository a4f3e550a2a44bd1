//! One transformer block: attention and SwiGLU feed-forward, each between two RMS normalisations.
//!
//! ```text
//! x = x + tanh(gate_msa) · norm2_attn( attn( norm1_attn(x) · (1 + scale_msa) ) )
//! x = x + tanh(gate_mlp) · norm2_ffn ( ffn ( norm1_ffn(x)  · (1 + scale_mlp) ) )
//! ```
//!
//! Blocks without modulation are the same without scale and gate. Each residual addition is fused with the normalisation
//! that follows it, which for the second one is the next block's: blocks are therefore run through [`run_blocks`].

mod backward;

use super::config::DitConfig;
use super::params::ParamSource;
use crate::device::Device;
use crate::error::Result;
use crate::ops::Modulation;
use crate::ops::attention::{Attention, attention};
use crate::ops::linear::{InputActivation, linear, linear_vectors};
use crate::ops::linear_swiglu::linear_swiglu;
use crate::ops::qk_norm_rope::{QkNormRope, Rotation, qk_norm_rope};
use crate::ops::rms_norm::{GatedResidual, RmsNorm, gated_residual_rms_norm, rms_norm_modulate};
use crate::profile;
use crate::tensor::Tensor;

pub(super) use backward::parameter_count;
pub use backward::{Condition, Keep, SavedBlock, backward_blocks, forward_blocks, parameters};

/// Vectors of a modulation table, in the order in which `adaLN_modulation` gives them.
const SCALE_MSA: usize = 0;
const GATE_MSA: usize = 1;
const SCALE_MLP: usize = 2;
const GATE_MLP: usize = 3;
/// Vectors of one block.
pub(super) const VECTORS: usize = 4;

/// A transformer block's parameters. Query, key and value projections are stacked, as are the two inputs of SwiGLU.
pub struct Block {
    /// `[3 · dim, dim]`
    qkv: Tensor,
    /// `[dim, dim]`
    out: Tensor,
    /// `[head_dim]`
    q_norm: Tensor,
    k_norm: Tensor,
    /// `[dim]` each
    attention_norm1: Tensor,
    attention_norm2: Tensor,
    ffn_norm1: Tensor,
    ffn_norm2: Tensor,
    /// `[2 · ffn_dim, dim]`: w1 (gate), then w3 (up)
    w13: Tensor,
    /// `[dim, ffn_dim]`
    w2: Tensor,
    modulation: Option<AdaLn>,
    attention: Attention,
    epsilon: f32,
}

/// The layer that makes a block's modulation table from the timestep embedding.
struct AdaLn {
    weight: Tensor,
    bias: Tensor,
}

impl Block {
    /// Reads the block whose tensors are named `{prefix}.…`.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape, or the device has no room.
    pub fn load(
        params: &dyn ParamSource,
        device: &Device,
        prefix: &str,
        config: &DitConfig,
        modulated: bool,
    ) -> Result<Self> {
        let (dim, ffn_dim) = (config.dim, config.ffn_hidden);
        let name = |suffix: &str| format!("{prefix}.{suffix}");
        let vector = |suffix: &str, size: usize| params.load(device, &name(suffix), &[size]);
        let stacked = |suffixes: &[&str], shape: [usize; 2]| {
            let names: Vec<String> = suffixes.iter().map(|suffix| name(suffix)).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            params.load_stacked(device, &names, &shape)
        };
        let modulation = match modulated {
            true => Some(AdaLn {
                weight: params.load(
                    device,
                    &name("adaLN_modulation.0.weight"),
                    &[VECTORS * dim, config.adaln_width],
                )?,
                bias: vector("adaLN_modulation.0.bias", VECTORS * dim)?,
            }),
            false => None,
        };
        let projections = [
            "attention.to_q.weight",
            "attention.to_k.weight",
            "attention.to_v.weight",
        ];
        Ok(Block {
            qkv: stacked(&projections, [3 * dim, dim])?,
            out: params.load(device, &name("attention.to_out.0.weight"), &[dim, dim])?,
            q_norm: vector("attention.norm_q.weight", config.head_dim)?,
            k_norm: vector("attention.norm_k.weight", config.head_dim)?,
            attention_norm1: vector("attention_norm1.weight", dim)?,
            attention_norm2: vector("attention_norm2.weight", dim)?,
            ffn_norm1: vector("ffn_norm1.weight", dim)?,
            ffn_norm2: vector("ffn_norm2.weight", dim)?,
            w13: stacked(
                &["feed_forward.w1.weight", "feed_forward.w3.weight"],
                [2 * ffn_dim, dim],
            )?,
            w2: params.load(device, &name("feed_forward.w2.weight"), &[dim, ffn_dim])?,
            modulation,
            attention: Attention {
                heads: config.heads,
                kv_heads: config.heads,
                head_dim: config.head_dim,
                causal: false,
                scale: 1.0 / (config.head_dim as f32).sqrt(),
            },
            epsilon: config.norm_eps,
        })
    }

    /// The modulation tables `[vectors, 4, dim]` (f32) for the timestep embeddings `c` `[vectors, adaln_width]`; `None` for
    /// a block without modulation.
    ///
    /// # Errors
    /// When shapes do not fit or the device has no room.
    pub fn modulation_table(&self, c: &Tensor) -> Result<Option<Tensor>> {
        let Some(layer) = &self.modulation else { return Ok(None) };
        let table = linear_vectors(c, InputActivation::None, &layer.weight, Some(&layer.bias))?;
        let dim = table.dim(1) / VECTORS;
        Ok(Some(table.reshape([c.dim(0), VECTORS, dim])?))
    }

    /// The normalisation of the attention's input.
    fn input_norm<'a>(&'a self, vectors: Option<Vectors<'a>>) -> Result<RmsNorm<'a>> {
        let scale = vector(vectors, SCALE_MSA)?;
        Ok(RmsNorm {
            weight: &self.attention_norm1,
            scale,
            epsilon: self.epsilon,
        })
    }

    /// The normalisation and rotation of queries and keys.
    fn qk_norm_rope(&self) -> QkNormRope<'_> {
        QkNormRope {
            heads: self.attention.heads,
            kv_heads: self.attention.kv_heads,
            head_dim: self.attention.head_dim,
            q_weight: &self.q_norm,
            k_weight: &self.k_norm,
            epsilon: self.epsilon,
            rotation: Rotation::Interleaved,
        }
    }

    /// Runs the block on the residual stream `x` and its normalised form; returns the new stream, and its form normalised
    /// by `next` where there is one.
    fn forward(
        &self,
        x: &Tensor,
        normalised: Tensor,
        vectors: Option<Vectors<'_>>,
        sequence: &Sequence<'_>,
        next: Option<&RmsNorm<'_>>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let _range = profile::range(c"block");
        let attended = self.attend(normalised, sequence)?;
        let residual = GatedResidual {
            weight: &self.attention_norm2,
            gate: vector(vectors, GATE_MSA)?,
            epsilon: self.epsilon,
        };
        let norm = RmsNorm {
            weight: &self.ffn_norm1,
            scale: vector(vectors, SCALE_MLP)?,
            epsilon: self.epsilon,
        };
        let (x, normalised) = gated_residual_rms_norm(x, &attended, &residual, Some(&norm))?;
        drop(attended);
        let fed = self.feed_forward(normalised.as_ref().expect("a normalisation was asked for"))?;
        drop(normalised);
        let residual = GatedResidual {
            weight: &self.ffn_norm2,
            gate: vector(vectors, GATE_MLP)?,
            epsilon: self.epsilon,
        };
        gated_residual_rms_norm(&x, &fed, &residual, next)
    }

    fn attend(&self, normalised: Tensor, sequence: &Sequence<'_>) -> Result<Tensor> {
        let mut qkv = linear(&normalised, &self.qkv, None)?;
        drop(normalised);
        qk_norm_rope(&mut qkv, &self.qk_norm_rope(), sequence.rope)?;
        let attended = attention(&qkv, &self.attention, sequence.key_lengths)?;
        drop(qkv);
        linear(&attended, &self.out, None)
    }

    fn feed_forward(&self, normalised: &Tensor) -> Result<Tensor> {
        let hidden = linear_swiglu(normalised, &self.w13)?;
        linear(&hidden, &self.w2, None)
    }
}

/// A block's vectors: a table, and the index of the first of them.
type Vectors<'a> = (&'a Tensor, usize);

fn vector(vectors: Option<Vectors<'_>>, index: usize) -> Result<Option<Modulation<'_>>> {
    vectors
        .map(|(table, first)| Modulation::new(table, first + index))
        .transpose()
}

/// What the tokens of a sequence share through all blocks.
#[derive(Clone, Copy)]
pub struct Sequence<'a> {
    /// `(cos, sin)` per token and pair, `[batch or 1, tokens, pairs, 2]` in f32.
    pub rope: &'a Tensor,
    /// The number of valid keys per item, i32 `[batch]`; all tokens when `None`.
    pub key_lengths: Option<&'a Tensor>,
}

/// Runs `blocks` one after the other on `x` `[batch, tokens, dim]`. `modulation` is a table of vectors, with the index of the first
/// block's first one; `None` for blocks without modulation.
///
/// # Errors
/// When shapes do not fit or the device has no room.
pub fn run_blocks(
    blocks: &[Block],
    modulation: Option<(&Tensor, usize)>,
    x: Tensor,
    sequence: &Sequence<'_>,
) -> Result<Tensor> {
    let Some(first) = blocks.first() else { return Ok(x) };
    let vectors = |index: usize| modulation.map(|(table, first)| (table, first + index * VECTORS));
    let mut normalised = Some(rms_norm_modulate(&x, &first.input_norm(vectors(0))?)?);
    let mut x = x;
    for (index, block) in blocks.iter().enumerate() {
        let next = blocks
            .get(index + 1)
            .map(|next| next.input_norm(vectors(index + 1)))
            .transpose()?;
        let input = normalised
            .take()
            .expect("each block but the last leaves a normalised stream");
        (x, normalised) = block.forward(&x, input, vectors(index), sequence, next.as_ref())?;
    }
    Ok(x)
}
