//! One transformer block: attention and SwiGLU feed-forward, each between two RMS normalisations.
//!
//! ```text
//! x = x + tanh(gate_msa) · norm2_attn( attn( norm1_attn(x) · (1 + scale_msa) ) )
//! x = x + tanh(gate_mlp) · norm2_ffn ( ffn ( norm1_ffn(x)  · (1 + scale_mlp) ) )
//! ```
//!
//! Blocks without modulation are the same without scale and gate. Each residual addition is fused with the normalisation
//! that follows it, which for the second one is the next block's: blocks are therefore run through [`run_blocks`].
//!
//! In training ([`Saving`]) nothing is fused across the boundary of two blocks, so that a block which keeps its input
//! alone gets the same bits when it is run again, and what backward reads is stored before it is normalised, rotated or multiplied.

mod backward;

use crate::device::MemoryTag;
use crate::error::Result;
use crate::layers::{Bare, Described, Group, Linear, Norm, Pass, module};
use crate::model::work::Keep;
use crate::model::zimage::DitConfig;
use crate::ops::Modulation;
use crate::ops::attention::{Attention, attention_in, attention_with_lse};
use crate::ops::linear::InputActivation;
use crate::ops::qk_norm_rope::{QkNormRope, Rotation, qk_norm_rope, qk_norm_rope_from};
use crate::ops::quantise::{Activation, Coding};
use crate::ops::rms_norm::{
    GatedResidual, RmsNorm, gated_residual_rms_norm, gated_residual_rms_norm_in, rms_norm_modulate_in,
};
use crate::ops::swiglu::swiglu;
use crate::profile;
use crate::tensor::Tensor;

pub use backward::{Condition, Sinks, backward_blocks};

/// Vectors of a modulation table, in the order in which `adaLN_modulation` gives them.
const SCALE_MSA: usize = 0;
const GATE_MSA: usize = 1;
const SCALE_MLP: usize = 2;
const GATE_MLP: usize = 3;
/// Vectors of one block.
pub(super) const VECTORS: usize = 4;

module! {
    /// A transformer block. Query, key and value projections are stacked (packed qkv), as are the two inputs of SwiGLU.
    pub struct Block<K> {
        /// `[3 · dim, dim]`
        pub qkv: Linear<K>,
        /// `[dim, dim]`
        pub out: Linear<K>,
        /// `[head_dim]` each
        pub q_norm: Norm<K>,
        /// As `q_norm`.
        pub k_norm: Norm<K>,
        /// `[dim]` each
        pub attention_norm1: Norm<K>,
        /// As `attention_norm1`.
        pub attention_norm2: Norm<K>,
        /// As `attention_norm1`.
        pub ffn_norm1: Norm<K>,
        /// As `attention_norm1`.
        pub ffn_norm2: Norm<K>,
        /// `[2 · ffn_dim, dim]`: w1 (gate), then w3 (up)
        pub w13: Linear<K>,
        /// `[dim, ffn_dim]`
        pub w2: Linear<K>,
        /// `[4 · dim, adaln_width]` with bias: makes the modulation table from the timestep embedding.
        pub modulation: Option<Linear<K>>,
        ;
        attention: Attention,
        epsilon: f32,
    }
}

impl Block<Described> {
    /// The block whose tensors are named `{prefix}.…`.
    pub fn describe(config: &DitConfig, group: Group, prefix: &str, modulated: bool) -> Self {
        let (dim, ffn_dim, head_dim) = (config.dim, config.ffn_hidden, config.head_dim);
        let name = |suffix: &str| format!("{prefix}.{suffix}");
        let stacked = |suffixes: &[&str], rows: usize| {
            let names: Vec<String> = suffixes.iter().map(|suffix| name(suffix)).collect();
            Linear::stacked(group, &names.iter().map(String::as_str).collect::<Vec<_>>(), rows, dim)
        };
        let norm = |suffix: &str, size: usize| Bare::norm(group, &name(suffix), size);
        let modulation = || {
            Linear::new(group, &name("adaLN_modulation.0"), VECTORS * dim, config.adaln_width)
                .precise()
                .with_bias()
        };
        let w13 = stacked(&["feed_forward.w1", "feed_forward.w3"], ffn_dim);
        let (w13, w2) = w13.feeds(1, Linear::new(group, &name("feed_forward.w2"), dim, ffn_dim));
        Block {
            qkv: stacked(&["attention.to_q", "attention.to_k", "attention.to_v"], dim),
            out: Linear::new(group, &name("attention.to_out.0"), dim, dim),
            q_norm: norm("attention.norm_q", head_dim),
            k_norm: norm("attention.norm_k", head_dim),
            attention_norm1: norm("attention_norm1", dim),
            attention_norm2: norm("attention_norm2", dim),
            ffn_norm1: norm("ffn_norm1", dim),
            ffn_norm2: norm("ffn_norm2", dim),
            w13,
            w2,
            modulation: modulated.then(modulation),
            attention: Attention {
                heads: config.heads,
                kv_heads: config.heads,
                head_dim,
                causal: false,
                scale: 1.0 / (head_dim as f32).sqrt(),
            },
            epsilon: config.norm_eps,
        }
    }
}

/// What a block has kept.
pub struct SavedBlock {
    input: Tensor,
    inside: Option<Inside>,
}

/// The tensors between a block's operations. In units of tokens · dim elements a block keeps about 12: its input, q, k and v, the
/// attention's result and its projection, gate and up (2 · ffn_dim / dim), and the feed-forward network's result.
struct Inside {
    attention: SavedAttention,
    projected: Tensor,
    gate_and_up: Tensor,
    fed: Tensor,
}

struct SavedAttention {
    /// Before normalisation and rotation.
    qkv: Tensor,
    attended: Tensor,
    /// Log-sum-exp of each query's scores.
    lse: Tensor,
}

/// A block up to its last residual sum.
struct Halves {
    /// The stream after attention.
    middle: Tensor,
    /// What the feed-forward network adds to it.
    fed: Tensor,
    /// What backward needs beside `fed`, when saving.
    saved: Option<(SavedAttention, Tensor, Tensor)>,
}

/// Runs `make`, when saving with its allocations counted as saved.
fn saved<T>(saving: bool, make: impl FnOnce() -> Result<T>) -> Result<T> {
    let _tag = saving.then(|| MemoryTag::Saved.scope());
    make()
}

impl Block {
    /// The modulation tables `[vectors, 4, dim]` (f32) for the timestep embeddings `c` `[vectors, adaln_width]`; `None` for
    /// a block without modulation.
    ///
    /// # Errors
    /// When shapes do not fit or the device has no room.
    pub fn modulation_table(&self, c: &Tensor) -> Result<Option<Tensor>> {
        let Some(layer) = &self.modulation else { return Ok(None) };
        let table = layer.forward_vectors(c, InputActivation::None)?;
        let dim = table.dim(1) / VECTORS;
        Ok(Some(table.reshape([c.dim(0), VECTORS, dim])?))
    }

    fn norm<'a>(&self, factors: &'a Norm, vectors: Option<Vectors<'a>>, scale: usize) -> Result<RmsNorm<'a>> {
        Ok(RmsNorm {
            weight: factors.tensor(),
            scale: vector(vectors, scale)?,
            epsilon: self.epsilon,
        })
    }

    fn residual<'a>(&self, factors: &'a Norm, vectors: Option<Vectors<'a>>, gate: usize) -> Result<GatedResidual<'a>> {
        Ok(GatedResidual {
            weight: factors.tensor(),
            gate: vector(vectors, gate)?,
            epsilon: self.epsilon,
        })
    }

    /// The normalisation of the attention's input.
    fn input_norm<'a>(&'a self, vectors: Option<Vectors<'a>>) -> Result<RmsNorm<'a>> {
        self.norm(&self.attention_norm1, vectors, SCALE_MSA)
    }

    /// The residual sum after attention, and the normalisation of what follows it.
    fn attention_residual<'a>(&'a self, vectors: Option<Vectors<'a>>) -> Result<(GatedResidual<'a>, RmsNorm<'a>)> {
        let residual = self.residual(&self.attention_norm2, vectors, GATE_MSA)?;
        Ok((residual, self.norm(&self.ffn_norm1, vectors, SCALE_MLP)?))
    }

    fn feed_forward_residual<'a>(&'a self, vectors: Option<Vectors<'a>>) -> Result<GatedResidual<'a>> {
        self.residual(&self.ffn_norm2, vectors, GATE_MLP)
    }

    /// The normalisation and rotation of queries and keys.
    fn qk_norm_rope(&self) -> QkNormRope<'_> {
        QkNormRope {
            heads: self.attention.heads,
            kv_heads: self.attention.kv_heads,
            head_dim: self.attention.head_dim,
            q_weight: self.q_norm.tensor(),
            k_weight: self.k_norm.tensor(),
            epsilon: self.epsilon,
            rotation: Rotation::Interleaved,
        }
    }

    /// Runs the block on the residual stream `x` and its normalised form up to its last sum.
    fn halves(
        &self,
        x: &Tensor,
        normalised: Activation,
        vectors: Option<Vectors<'_>>,
        sequence: &Sequence<'_>,
        saving: bool,
    ) -> Result<Halves> {
        let (projected, attention) = self.attend(normalised, sequence, saving)?;
        let (residual, norm) = self.attention_residual(vectors)?;
        let coding = self.w13.coding();
        let (middle, normalised) = gated_residual_rms_norm_in(x, &projected, &residual, Some(&norm), coding)?;
        let attention = attention.map(|attention| (attention, projected));
        let normalised = normalised.expect("a normalisation was asked for");
        let (fed, gate_and_up) = self.feed_forward(normalised, saving)?;
        let saved = attention.zip(gate_and_up);
        Ok(Halves {
            middle,
            fed,
            saved: saved.map(|((attention, projected), gate_and_up)| (attention, projected, gate_and_up)),
        })
    }

    fn attend(
        &self,
        normalised: Activation,
        sequence: &Sequence<'_>,
        saving: bool,
    ) -> Result<(Tensor, Option<SavedAttention>)> {
        let mut qkv = saved(saving, || self.qkv.forward(&normalised))?;
        drop(normalised);
        if !saving {
            qk_norm_rope(&mut qkv, &self.qk_norm_rope(), sequence.rope)?;
            let attended = attention_in(&qkv, &self.attention, sequence.key_lengths, self.out.coding())?;
            drop(qkv);
            return Ok((self.out.forward(&attended)?, None));
        }
        let rotated = qk_norm_rope_from(&qkv, &self.qk_norm_rope(), sequence.rope)?;
        let (attended, lse) = saved(saving, || {
            attention_with_lse(&rotated, &self.attention, sequence.key_lengths)
        })?;
        drop(rotated);
        let projected = saved(saving, || self.out.forward(&attended))?;
        Ok((projected, Some(SavedAttention { qkv, attended, lse })))
    }

    fn feed_forward(&self, normalised: Activation, saving: bool) -> Result<(Tensor, Option<Tensor>)> {
        if !saving {
            let hidden = self.w13.forward_swiglu(&normalised, self.w2.coding())?;
            drop(normalised);
            return Ok((self.w2.forward(&hidden)?, None));
        }
        let gate_and_up = saved(saving, || self.w13.forward(&normalised))?;
        drop(normalised);
        let hidden = swiglu(&gate_and_up)?;
        let fed = saved(saving, || self.w2.forward(&hidden))?;
        Ok((fed, Some(gate_and_up)))
    }

    /// Runs the block on the residual stream `x` and its normalised form; returns the new stream, and its form normalised
    /// by `next` where there is one, as the layer that takes it wants it.
    fn forward(
        &self,
        x: &Tensor,
        normalised: Activation,
        vectors: Option<Vectors<'_>>,
        sequence: &Sequence<'_>,
        next: Option<(&RmsNorm<'_>, Option<Coding>)>,
    ) -> Result<(Tensor, Option<Activation>)> {
        let _range = profile::range(c"block");
        let Halves { middle, fed, .. } = self.halves(x, normalised, vectors, sequence, false)?;
        let residual = self.feed_forward_residual(vectors)?;
        let (next, coding) = next.map_or((None, None), |(norm, coding)| (Some(norm), coding));
        gated_residual_rms_norm_in(&middle, &fed, &residual, next, coding)
    }

    /// The stream between the block's halves, and what backward needs.
    fn inside(&self, x: &Tensor, vectors: Option<Vectors<'_>>, sequence: &Sequence<'_>) -> Result<(Tensor, Inside)> {
        let normalised = rms_norm_modulate_in(x, &self.input_norm(vectors)?, self.qkv.coding())?;
        let Halves { middle, fed, saved } = self.halves(x, normalised, vectors, sequence, true)?;
        let (attention, projected, gate_and_up) = saved.expect("it was asked for");
        let inside = Inside {
            attention,
            projected,
            gate_and_up,
            fed,
        };
        Ok((middle, inside))
    }

    /// As [`Block::forward`] for the stream alone, keeping what `keep` says.
    fn forward_saving(
        &self,
        x: Tensor,
        vectors: Option<Vectors<'_>>,
        sequence: &Sequence<'_>,
        keep: Keep,
    ) -> Result<(Tensor, Option<SavedBlock>)> {
        let _range = profile::range(c"block");
        let (middle, inside) = self.inside(&x, vectors, sequence)?;
        let residual = self.feed_forward_residual(vectors)?;
        // The next block's input, which that block keeps.
        let (y, _) = saved(true, || gated_residual_rms_norm(&middle, &inside.fed, &residual, None))?;
        let kept = match keep {
            Keep::Nothing => None,
            Keep::Input => Some(SavedBlock { input: x, inside: None }),
            Keep::Everything => Some(SavedBlock {
                input: x,
                inside: Some(inside),
            }),
        };
        Ok((y, kept))
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

/// Where the blocks of a stack put what they keep: what each is to keep, and what they have kept.
pub struct Saving<'a> {
    /// One per block.
    pub keeps: &'a [Keep],
    /// Filled by the forward pass, one per block.
    pub kept: &'a mut Vec<Option<SavedBlock>>,
}

/// Runs `blocks` one after the other on `x` `[batch, tokens, dim]`. `modulation` is a table of vectors, with the index of the first
/// block's first one; `None` for blocks without modulation. With `saving` each keeps what it is told to, and nothing is fused
/// across the boundary of two blocks.
///
/// # Errors
/// When shapes do not fit or the device has no room.
pub fn run_blocks(
    blocks: &[Block],
    modulation: Option<(&Tensor, usize)>,
    x: Tensor,
    sequence: &Sequence<'_>,
    saving: Option<Saving<'_>>,
) -> Result<Tensor> {
    let Some(Saving { keeps, kept }) = saving else {
        return run_through(blocks, modulation, x, sequence, None);
    };
    let mut x = x;
    for (index, (block, keep)) in blocks.iter().zip(keeps).enumerate() {
        let (y, block) = block.forward_saving(x, vectors_of(modulation, index), sequence, *keep)?;
        x = y;
        kept.push(block);
    }
    Ok(x)
}

/// The vectors of a stack's block `index`.
fn vectors_of(modulation: Option<(&Tensor, usize)>, index: usize) -> Option<Vectors<'_>> {
    modulation.map(|(table, first)| (table, first + index * VECTORS))
}

/// As [`run_blocks`], keeping nothing; `pass` brings weights that stay in host memory to the device.
///
/// # Errors
/// As [`run_blocks`].
pub fn run_through(
    blocks: &[Block],
    modulation: Option<(&Tensor, usize)>,
    x: Tensor,
    sequence: &Sequence<'_>,
    mut pass: Option<&mut Pass<'_>>,
) -> Result<Tensor> {
    let vectors = |index: usize| vectors_of(modulation, index);
    let mut x = x;
    let Some(first) = blocks.first() else { return Ok(x) };
    let mut normalised = Some(rms_norm_modulate_in(
        &x,
        &first.input_norm(vectors(0))?,
        first.qkv.coding(),
    )?);
    for (index, block) in blocks.iter().enumerate() {
        let following = blocks.get(index + 1);
        let norm = following.map(|next| next.input_norm(vectors(index + 1))).transpose()?;
        let next = norm.as_ref().zip(following.map(|next| next.qkv.coding()));
        let input = normalised
            .take()
            .expect("each block but the last leaves a normalised stream");
        pass.as_mut().map_or(Ok(()), |pass| pass.before(index))?;
        (x, normalised) = block.forward(&x, input, vectors(index), sequence, next)?;
        pass.as_mut().map_or(Ok(()), |pass| pass.after(index))?;
    }
    Ok(x)
}
