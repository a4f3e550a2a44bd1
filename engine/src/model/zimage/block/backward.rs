//! A block's backward pass. Norms, rotated heads and the feed-forward network's hidden tokens are made again from what the forward
//! pass has kept.

use super::{
    Block, GATE_MLP, GATE_MSA, Inside, SCALE_MLP, SCALE_MSA, SavedAttention, SavedBlock, Sequence, VECTORS, Vectors,
};
use crate::dtype::DType;
use crate::error::Result;
use crate::layers::{Gradients, slots_mut};
use crate::model::denoiser::Finished;
use crate::ops::VectorGradient;
use crate::ops::attention::attention_backward;
use crate::ops::linear::InputActivation;
use crate::ops::qk_norm_rope::{QkNormGradients, qk_norm_rope_backward, qk_norm_rope_from};
use crate::ops::rms_norm::{
    NormGradients, ResidualNormGradients, gated_residual_backward, gated_residual_rms_norm,
    gated_residual_rms_norm_backward, rms_norm_modulate, rms_norm_modulate_backward,
};
use crate::ops::swiglu::swiglu_backward;
use crate::profile;
use crate::tensor::Tensor;

impl Block {
    /// The gradient of the block's input for that of its output. Parameters' gradients are added to `gradients`; those of the
    /// modulation vectors overwrite `vector_gradients`, f32 `[batch, 4, dim]`.
    fn backward(
        &self,
        dy: &Tensor,
        kept: SavedBlock,
        vectors: Option<Vectors<'_>>,
        sequence: &Sequence<'_>,
        gradients: &mut Block<Gradients>,
        mut vector_gradients: Option<&mut Tensor>,
    ) -> Result<Tensor> {
        let _range = profile::range(c"block backward");
        let SavedBlock { input: x, inside } = kept;
        let inside = match inside {
            Some(inside) => inside,
            None => self.inside(&x, vectors, sequence)?.1,
        };
        let Inside {
            attention,
            projected,
            gate_and_up,
            fed,
        } = inside;
        let places = NormGradients {
            weight: gradients.ffn_norm2.0.as_mut(),
            vector: vector_gradient(&mut vector_gradients, GATE_MLP),
        };
        let d_fed = gated_residual_backward(dy, &fed, &self.feed_forward_residual(vectors)?, places)?;
        drop(fed);
        let d_hidden = self.w2.backward_input(&d_fed)?;
        let (d_gate_and_up, hidden) = swiglu_backward(&d_hidden, gate_and_up, gradients.w2.wants_any())?;
        drop(d_hidden);
        if let Some(hidden) = hidden {
            gradients.w2.add(&d_fed, &hidden)?;
        }
        drop(d_fed);
        let d_normalised = self.w13.backward_input(&d_gate_and_up)?;
        let (residual, next) = self.attention_residual(vectors)?;
        if gradients.w13.wants_any() {
            let (_, normalised) = gated_residual_rms_norm(&x, &projected, &residual, Some(&next))?;
            let normalised = normalised.expect("a normalisation was asked for");
            gradients.w13.add(&d_gate_and_up, &normalised)?;
        }
        drop(d_gate_and_up);

        let places = ResidualNormGradients {
            weight: gradients.attention_norm2.0.as_mut(),
            next_weight: gradients.ffn_norm1.0.as_mut(),
            vectors: vector_gradients
                .as_deref_mut()
                .map(|table| (table, [GATE_MSA, SCALE_MLP])),
        };
        let (d_stream, d_projected) =
            gated_residual_rms_norm_backward(dy, &d_normalised, [&x, &projected], &residual, &next, places)?;
        drop((d_normalised, projected));
        let d_attended = self.out.backward_input(&d_projected)?;
        if gradients.out.wants_any() {
            gradients.out.add(&d_projected, &attention.attended)?;
        }
        drop(d_projected);

        let d_qkv = self.qkv_backward(d_attended, attention, sequence, gradients)?;
        let d_normalised = self.qkv.backward_input(&d_qkv)?;
        let norm = self.input_norm(vectors)?;
        if gradients.qkv.wants_any() {
            gradients.qkv.add(&d_qkv, &rms_norm_modulate(&x, &norm)?)?;
        }
        drop(d_qkv);
        let places = NormGradients {
            weight: gradients.attention_norm1.0.as_mut(),
            vector: vector_gradient(&mut vector_gradients, SCALE_MSA),
        };
        rms_norm_modulate_backward(&d_normalised, &x, &norm, Some(&d_stream), places)
    }

    /// The gradient of packed q, k and v, before their norms and rotation, for that of the attended values.
    fn qkv_backward(
        &self,
        d_attended: Tensor,
        attention: SavedAttention,
        sequence: &Sequence<'_>,
        gradients: &mut Block<Gradients>,
    ) -> Result<Tensor> {
        let SavedAttention { qkv, attended, lse } = attention;
        let spec = self.qk_norm_rope();
        let rotated = qk_norm_rope_from(&qkv, &spec, sequence.rope)?;
        let (heads, lengths) = (&self.attention, sequence.key_lengths);
        let mut d_qkv = attention_backward(&d_attended, &rotated, &attended, &lse, heads, lengths)?;
        drop((d_attended, rotated, attended, lse));
        let places = QkNormGradients {
            q: gradients.q_norm.0.as_mut(),
            k: gradients.k_norm.0.as_mut(),
        };
        qk_norm_rope_backward(&mut d_qkv, &qkv, &spec, sequence.rope, places)?;
        Ok(d_qkv)
    }

    /// Adds what the gradients `[batch, 4, dim]` of the modulation vectors mean for their layer, and for the timestep embeddings.
    fn modulation_backward(
        &self,
        vector_gradients: &Tensor,
        c: &Tensor,
        gradients: &mut Block<Gradients>,
        dc: Option<&mut Tensor>,
    ) -> Result<()> {
        let (Some(layer), Some(gradients)) = (&self.modulation, &mut gradients.modulation) else {
            return Ok(());
        };
        let dy = vector_gradients.reshape([c.dim(0), layer.extents()[0]])?;
        layer.backward_vectors(&dy, c, InputActivation::None, gradients, dc)
    }
}

fn vector_gradient<'a>(table: &'a mut Option<&mut Tensor>, index: usize) -> Option<VectorGradient<'a>> {
    table.as_deref_mut().map(|table| VectorGradient { table, index })
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

/// Where the backward pass of a stack of blocks leaves what it finds.
pub struct Sinks<'a, 'b> {
    /// Places for gradients, one per block.
    pub gradients: &'a mut [Block<Gradients>],
    /// The gradient of the timestep embeddings, added to.
    pub dc: Option<&'a mut Tensor>,
    /// Told the number of each block whose gradients are finished.
    pub finished: &'a mut Finished<'b>,
}

/// Sends the gradient `dx` of the last block's output back through `blocks`, down to the first that has kept something.
/// Returns the gradient of the first block's input, if it was reached.
///
/// # Errors
/// When shapes do not fit or the device has no room.
pub fn backward_blocks(
    blocks: &[Block],
    condition: Option<Condition<'_>>,
    dx: Tensor,
    sequence: &Sequence<'_>,
    kept: Vec<Option<SavedBlock>>,
    sinks: Sinks<'_, '_>,
) -> Result<Option<Tensor>> {
    let Sinks {
        gradients,
        mut dc,
        finished,
    } = sinks;
    let mut dx = dx;
    for (index, ((block, kept), gradients)) in blocks.iter().zip(kept).zip(gradients).enumerate().rev() {
        let Some(kept) = kept else { return Ok(None) };
        let Some(condition) = condition else {
            dx = block.backward(&dx, kept, None, sequence, gradients, None)?;
            finished(index, slots_mut(gradients))?;
            continue;
        };
        let needed = dc.is_some() || gradients.modulation.as_ref().is_some_and(|layer| layer.wants_any());
        let shape = [dx.dim(0), VECTORS, dx.dim(2)];
        let mut vectors = needed
            .then(|| Tensor::empty(&dx.device(), shape, DType::F32))
            .transpose()?;
        let table = Some((condition.table, condition.first + index * VECTORS));
        dx = block.backward(&dx, kept, table, sequence, gradients, vectors.as_mut())?;
        if let Some(vectors) = vectors {
            block.modulation_backward(&vectors, condition.c, gradients, dc.as_deref_mut())?;
        }
        finished(index, slots_mut(gradients))?;
    }
    Ok(Some(dx))
}
