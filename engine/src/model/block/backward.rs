//! A block in training: forward with what backward needs, and backward.
//!
//! Blocks keep what would cost a matrix product or attention to make again; norms, rotated heads and the feed-forward network's
//! hidden tokens are made again. At the boundary of two blocks nothing is fused, so that a block which keeps its input alone
//! gets the same bits when it is run again. In units of tokens · dim elements a block keeps about 12: its input, q, k and v, the
//! attention's result and its projection, gate and up (2 · ffn_dim / dim), and the feed-forward network's result.

use super::{AdaLn, Block, GATE_MLP, GATE_MSA, SCALE_MLP, SCALE_MSA, Sequence, VECTORS, Vectors, vector};
use crate::device::MemoryTag;
use crate::dtype::DType;
use crate::error::Result;
use crate::model::config::DitConfig;
use crate::model::parameters::{Parameter, Slot, list_tensors};
use crate::ops::VectorGradient;
use crate::ops::attention::{attention_backward, attention_with_lse};
use crate::ops::linear::{
    InputActivation, LinearGradients, linear, linear_backward_input, linear_backward_weight, linear_vectors_backward,
};
use crate::ops::qk_norm_rope::{QkNormGradients, qk_norm_rope_backward, qk_norm_rope_from};
use crate::ops::rms_norm::{
    GatedResidual, NormGradients, ResidualNormGradients, RmsNorm, gated_residual_backward, gated_residual_rms_norm,
    gated_residual_rms_norm_backward, rms_norm_modulate, rms_norm_modulate_backward,
};
use crate::ops::swiglu::{swiglu, swiglu_backward};
use crate::profile;
use crate::tensor::Tensor;

/// Parameters of a block without modulation, and of one with.
const PLAIN: usize = 10;
const MODULATED: usize = 12;

/// What a block keeps of its forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: no gradient passes through it.
    Nothing,
    /// Its input, from which the rest is made again.
    Input,
    /// Everything that is worth it.
    Everything,
}

/// What a block has kept.
pub struct SavedBlock {
    input: Tensor,
    inside: Option<Inside>,
}

/// The tensors between a block's operations.
struct Inside {
    /// Before normalisation and rotation.
    qkv: Tensor,
    attended: Tensor,
    log_sums: Tensor,
    projected: Tensor,
    gate_and_up: Tensor,
    fed: Tensor,
}

/// What modulates a stack of blocks: the table of all vectors, the index of the stack's first one, and the timestep embeddings
/// `[batch, adaln_width]` that the table was made from.
#[derive(Clone, Copy)]
pub struct Condition<'a> {
    /// f32 `[batch, vectors, dim]`
    pub table: &'a Tensor,
    /// Index of the first block's first vector.
    pub first: usize,
    /// f32 `[batch, adaln_width]`
    pub c: &'a Tensor,
}

impl<'a> Condition<'a> {
    fn vectors(&self, block: usize) -> Vectors<'a> {
        (self.table, self.first + block * VECTORS)
    }
}

/// Runs `make` with its allocations counted as saved.
fn saved<T>(make: impl FnOnce() -> Result<T>) -> Result<T> {
    let _tag = MemoryTag::Saved.scope();
    make()
}

/// The parameters of the block whose tensors are named `{prefix}.…`, in the order of its tensors.
pub fn parameters(prefix: &str, config: &DitConfig, modulated: bool) -> Vec<Parameter> {
    let (dim, ffn_dim) = (config.dim, config.ffn_hidden);
    let one = |suffix: &str, shape: &[usize]| Parameter::one(format!("{prefix}.{suffix}"), shape);
    let projections = [
        "attention.to_q.weight",
        "attention.to_k.weight",
        "attention.to_v.weight",
    ];
    let halves = ["feed_forward.w1.weight", "feed_forward.w3.weight"];
    let mut all = vec![
        Parameter::stacked(prefix, &projections, &[dim, dim]),
        one("attention.to_out.0.weight", &[dim, dim]),
        one("attention.norm_q.weight", &[config.head_dim]),
        one("attention.norm_k.weight", &[config.head_dim]),
        one("attention_norm1.weight", &[dim]),
        one("attention_norm2.weight", &[dim]),
        one("ffn_norm1.weight", &[dim]),
        one("ffn_norm2.weight", &[dim]),
        Parameter::stacked(prefix, &halves, &[ffn_dim, dim]),
        one("feed_forward.w2.weight", &[dim, ffn_dim]),
    ];
    if modulated {
        all.push(one("adaLN_modulation.0.weight", &[VECTORS * dim, config.adaln_width]));
        all.push(one("adaLN_modulation.0.bias", &[VECTORS * dim]));
    }
    all
}

/// The parameters of a block.
pub(in crate::model) fn parameter_count(modulated: bool) -> usize {
    if modulated { MODULATED } else { PLAIN }
}

list_tensors!(Block, |block, all| {
    let Block {
        qkv,
        out,
        q_norm,
        k_norm,
        attention_norm1,
        attention_norm2,
        ffn_norm1,
        ffn_norm2,
        w13,
        w2,
        modulation,
        ..
    } = block;
    all.extend([
        qkv,
        out,
        q_norm,
        k_norm,
        attention_norm1,
        attention_norm2,
        ffn_norm1,
        ffn_norm2,
        w13,
        w2,
    ]);
    if let Some(AdaLn { weight, bias }) = modulation {
        all.extend([weight, bias]);
    }
});

impl Block {
    fn attention_residual<'a>(&'a self, vectors: Option<Vectors<'a>>) -> Result<(GatedResidual<'a>, RmsNorm<'a>)> {
        let residual = GatedResidual {
            weight: &self.attention_norm2,
            gate: vector(vectors, GATE_MSA)?,
            epsilon: self.epsilon,
        };
        let next = RmsNorm {
            weight: &self.ffn_norm1,
            scale: vector(vectors, SCALE_MLP)?,
            epsilon: self.epsilon,
        };
        Ok((residual, next))
    }

    fn feed_forward_residual<'a>(&'a self, vectors: Option<Vectors<'a>>) -> Result<GatedResidual<'a>> {
        Ok(GatedResidual {
            weight: &self.ffn_norm2,
            gate: vector(vectors, GATE_MLP)?,
            epsilon: self.epsilon,
        })
    }

    /// The stream between the block's halves, and what backward needs.
    fn inside(&self, x: &Tensor, vectors: Option<Vectors<'_>>, sequence: &Sequence<'_>) -> Result<(Tensor, Inside)> {
        let normalised = rms_norm_modulate(x, &self.input_norm(vectors)?)?;
        let qkv = saved(|| linear(&normalised, &self.qkv, None))?;
        drop(normalised);
        let rotated = qk_norm_rope_from(&qkv, &self.qk_norm_rope(), sequence.rope)?;
        let (attended, log_sums) = saved(|| attention_with_lse(&rotated, &self.attention, sequence.key_lengths))?;
        drop(rotated);
        let projected = saved(|| linear(&attended, &self.out, None))?;
        let (residual, next) = self.attention_residual(vectors)?;
        let (middle, normalised) = gated_residual_rms_norm(x, &projected, &residual, Some(&next))?;
        let normalised = normalised.expect("a normalisation was asked for");
        let gate_and_up = saved(|| linear(&normalised, &self.w13, None))?;
        drop(normalised);
        let hidden = swiglu(&gate_and_up)?;
        let fed = saved(|| linear(&hidden, &self.w2, None))?;
        let inside = Inside {
            qkv,
            attended,
            log_sums,
            projected,
            gate_and_up,
            fed,
        };
        Ok((middle, inside))
    }

    fn forward_keeping(
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
        let (y, _) = saved(|| gated_residual_rms_norm(&middle, &inside.fed, &residual, None))?;
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

    /// The gradient of the block's input for that of its output. Parameters' gradients are added to `slots`, in the order of
    /// its tensors; those of the modulation vectors overwrite `vector_gradients`, f32 `[batch, 4, dim]`.
    fn backward(
        &self,
        dy: &Tensor,
        kept: SavedBlock,
        vectors: Option<Vectors<'_>>,
        sequence: &Sequence<'_>,
        slots: &mut [Slot],
        mut vector_gradients: Option<&mut Tensor>,
    ) -> Result<Tensor> {
        let _range = profile::range(c"block backward");
        let SavedBlock { input: x, inside } = kept;
        let inside = match inside {
            Some(inside) => inside,
            None => self.inside(&x, vectors, sequence)?.1,
        };
        let Inside {
            qkv,
            attended,
            log_sums,
            projected,
            gate_and_up,
            fed,
        } = inside;
        let [
            d_qkv_weight,
            d_out,
            d_q_norm,
            d_k_norm,
            d_norm1,
            d_norm2,
            d_ffn_norm1,
            d_ffn_norm2,
            d_w13,
            d_w2,
            ..,
        ] = slots
        else {
            unreachable!("a block's parameters are at least {PLAIN}");
        };
        let gradients = NormGradients {
            weight: d_ffn_norm2.as_mut(),
            vector: vector_gradient(&mut vector_gradients, GATE_MLP),
        };
        let d_fed = gated_residual_backward(dy, &fed, &self.feed_forward_residual(vectors)?, gradients)?;
        drop(fed);
        let d_hidden = linear_backward_input(&d_fed, &self.w2)?;
        let (d_gate_and_up, hidden) = swiglu_backward(&d_hidden, gate_and_up, d_w2.is_some())?;
        drop(d_hidden);
        if let Some(hidden) = hidden {
            add_weight(&d_fed, &hidden, d_w2)?;
        }
        drop(d_fed);
        let d_normalised = linear_backward_input(&d_gate_and_up, &self.w13)?;
        let (residual, next) = self.attention_residual(vectors)?;
        if d_w13.is_some() {
            let (_, normalised) = gated_residual_rms_norm(&x, &projected, &residual, Some(&next))?;
            let normalised = normalised.expect("a normalisation was asked for");
            add_weight(&d_gate_and_up, &normalised, d_w13)?;
        }
        drop(d_gate_and_up);

        let gradients = ResidualNormGradients {
            weight: d_norm2.as_mut(),
            next_weight: d_ffn_norm1.as_mut(),
            vectors: vector_gradients
                .as_deref_mut()
                .map(|table| (table, [GATE_MSA, SCALE_MLP])),
        };
        let (d_stream, d_projected) =
            gated_residual_rms_norm_backward(dy, &d_normalised, [&x, &projected], &residual, &next, gradients)?;
        drop((d_normalised, projected));
        let d_attended = linear_backward_input(&d_projected, &self.out)?;
        add_weight(&d_projected, &attended, d_out)?;
        drop(d_projected);

        let spec = self.qk_norm_rope();
        let rotated = qk_norm_rope_from(&qkv, &spec, sequence.rope)?;
        let (heads, lengths) = (&self.attention, sequence.key_lengths);
        let mut d_qkv = attention_backward(&d_attended, &rotated, &attended, &log_sums, heads, lengths)?;
        drop((d_attended, rotated, attended, log_sums));
        let gradients = QkNormGradients {
            q: d_q_norm.as_mut(),
            k: d_k_norm.as_mut(),
        };
        qk_norm_rope_backward(&mut d_qkv, &qkv, &spec, sequence.rope, gradients)?;
        drop(qkv);
        let d_normalised = linear_backward_input(&d_qkv, &self.qkv)?;
        let norm = self.input_norm(vectors)?;
        if d_qkv_weight.is_some() {
            add_weight(&d_qkv, &rms_norm_modulate(&x, &norm)?, d_qkv_weight)?;
        }
        drop(d_qkv);
        let gradients = NormGradients {
            weight: d_norm1.as_mut(),
            vector: vector_gradient(&mut vector_gradients, SCALE_MSA),
        };
        rms_norm_modulate_backward(&d_normalised, &x, &norm, Some(&d_stream), gradients)
    }

    /// Adds what the gradients `[batch, 4, dim]` of the modulation vectors mean for their layer, and for the timestep embeddings.
    fn modulation_backward(
        &self,
        vector_gradients: &Tensor,
        c: &Tensor,
        slots: &mut [Slot],
        dc: Option<&mut Tensor>,
    ) -> Result<()> {
        let (Some(layer), [.., weight, bias]) = (&self.modulation, slots) else {
            return Ok(());
        };
        let dy = vector_gradients.reshape([c.dim(0), layer.weight.dim(0)])?;
        let gradients = LinearGradients {
            weight: weight.as_mut(),
            bias: bias.as_mut(),
        };
        linear_vectors_backward(&dy, c, InputActivation::None, &layer.weight, gradients, dc)
    }
}

fn vector_gradient<'a>(table: &'a mut Option<&mut Tensor>, index: usize) -> Option<VectorGradient<'a>> {
    table.as_deref_mut().map(|table| VectorGradient { table, index })
}

/// Adds `dyᵀ · x` to a weight's gradient, if there is one.
fn add_weight(dy: &Tensor, x: &Tensor, slot: &mut Slot) -> Result<()> {
    let gradients = LinearGradients {
        weight: slot.as_mut(),
        bias: None,
    };
    linear_backward_weight(dy, x, gradients)
}

/// Runs `blocks` one after the other on `x`, as [`super::run_blocks`] does; each keeps what `keeps` says.
///
/// # Errors
/// When shapes do not fit or the device has no room.
pub fn forward_blocks(
    blocks: &[Block],
    condition: Option<Condition<'_>>,
    x: Tensor,
    sequence: &Sequence<'_>,
    keeps: &[Keep],
) -> Result<(Tensor, Vec<Option<SavedBlock>>)> {
    let mut x = x;
    let mut kept = Vec::with_capacity(blocks.len());
    for (index, (block, keep)) in blocks.iter().zip(keeps).enumerate() {
        let vectors = condition.map(|condition| condition.vectors(index));
        let (y, block) = block.forward_keeping(x, vectors, sequence, *keep)?;
        x = y;
        kept.push(block);
    }
    Ok((x, kept))
}

/// Sends the gradient `dx` of the last block's output back through `blocks`, down to the first that has kept something. `slots` are
/// those of all blocks. The gradient of the timestep embeddings is added to `dc`. Returns the gradient of the first block's
/// input, if it was reached.
///
/// # Errors
/// When shapes do not fit or the device has no room.
pub fn backward_blocks(
    blocks: &[Block],
    condition: Option<Condition<'_>>,
    dx: Tensor,
    sequence: &Sequence<'_>,
    kept: Vec<Option<SavedBlock>>,
    slots: &mut [Slot],
    mut dc: Option<&mut Tensor>,
) -> Result<Option<Tensor>> {
    let mut dx = dx;
    let mut slots = slots.rchunks_exact_mut(parameter_count(condition.is_some()));
    for (index, (block, kept)) in blocks.iter().zip(kept).enumerate().rev() {
        let (Some(kept), Some(slots)) = (kept, slots.next()) else {
            return Ok(None);
        };
        let Some(condition) = condition else {
            dx = block.backward(&dx, kept, None, sequence, slots, None)?;
            continue;
        };
        let needed = dc.is_some() || slots[PLAIN..].iter().any(Option::is_some);
        let shape = [dx.dim(0), VECTORS, dx.dim(2)];
        let mut gradients = needed
            .then(|| Tensor::empty(&dx.device(), shape, DType::F32))
            .transpose()?;
        let vectors = Some(condition.vectors(index));
        dx = block.backward(&dx, kept, vectors, sequence, slots, gradients.as_mut())?;
        if let Some(gradients) = gradients {
            block.modulation_backward(&gradients, condition.c, slots, dc.as_deref_mut())?;
        }
    }
    Ok(Some(dx))
}
