//! The model with places for gradients.

use super::{Block, EPSILON, Inside, Parts, Plain, PlainDit, Ready, VECTORS};
use crate::device::Device;
use crate::dtype::DType;
use crate::error::Result;
use crate::layers::{
    Choose, Gradients, Linear, MakeSlots, Module, NamedParameter, ParamSource, Slot, slots, slots_mut, tensors,
    tensors_mut, trained,
};
use crate::model::denoiser::{Denoiser, Finished, LossGradient, Noisy, Trainable, TrainingChoice};
use crate::ops::add_rms_norm::add;
use crate::ops::attention::attention_backward;
use crate::ops::layer_norm::{layer_norm_modulate, layer_norm_modulate_backward};
use crate::ops::linear::InputActivation;
use crate::ops::patch_embed::patch_embed_backward;
use crate::ops::sum_rows::add_row_sum;
use crate::ops::swiglu::swiglu_backward;
use crate::ops::tokens::{narrow_tokens, pad_tokens};
use crate::ops::unpatchify::patchify;
use crate::ops::{Modulation, VectorGradient};
use crate::tensor::Tensor;

/// A model that is trained. Every block is reached by the backward pass; whether it is run again there is the choice's.
pub(super) struct TrainedPlain {
    dit: PlainDit,
    gradients: Parts<Gradients>,
    recomputes: bool,
}

impl TrainedPlain {
    /// Reads a model, and makes room for gradients.
    pub fn load(
        spec: &Plain,
        params: &dyn ParamSource,
        device: &Device,
        choice: &TrainingChoice<'_>,
        loaded: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<Self> {
        let chosen = spec
            .describe()
            .transform(&mut Choose(|meta: &NamedParameter| (choice.trains)(meta)))?;
        let dit = PlainDit::load(spec, params, device, loaded)?;
        Ok(TrainedPlain {
            gradients: dit.parts.transform(&mut MakeSlots(trained(&chosen).into_iter()))?,
            recomputes: (choice.recomputes)(true),
            dit,
        })
    }

    fn backward(
        &mut self,
        dv: &Tensor,
        [image, c]: [&Tensor; 2],
        table: &Tensor,
        ready: &Ready,
        kept: Kept,
    ) -> Result<Tensor> {
        let TrainedPlain { dit, gradients, .. } = self;
        let (config, parts, batch) = (&dit.config, &dit.parts, image.dim(0));
        let mut dc = Tensor::zeros(&dit.device, c.shape(), DType::F32)?;
        let vectors = |count: usize| Tensor::zeros(&dit.device, [batch, count, config.dim], DType::F32);
        let Kept { features, blocks } = kept;

        let d_patches = patchify(dv, config.patch, config.positions, 1.0)?;
        let scale = dit.last_scale(table)?;
        gradients
            .output
            .add(&d_patches, &layer_norm_modulate(&features, scale, EPSILON)?)?;
        let mut d_scale = vectors(1)?;
        let place = VectorGradient {
            table: &mut d_scale,
            index: 0,
        };
        let dx = parts.output.backward_input(&d_patches)?;
        let dx = layer_norm_modulate_backward(&dx, &features, dit.last_scale(table)?, EPSILON, Some(place))?;
        modulation_backward(&parts.last_scale, &d_scale, c, &mut gradients.last_scale, &mut dc)?;
        let mut dx = pad_tokens(&dx, config.positions + ready.captions.dim(1))?;

        let keys = ready.key_lengths.as_ref();
        for (index, ((block, own), (x, inside))) in parts
            .blocks
            .iter()
            .zip(&mut gradients.blocks)
            .zip(blocks)
            .enumerate()
            .rev()
        {
            let first = index * VECTORS;
            let inside = match inside {
                Some(inside) => inside,
                None => block.forward(&x, table, first, keys)?.1,
            };
            let mut d_scales = vectors(VECTORS)?;
            dx = block.backward([&dx, &x], inside, (table, first), keys, own, &mut d_scales)?;
            modulation_backward(&block.modulation, &d_scales, c, &mut own.modulation, &mut dc)?;
        }

        let d_captions = narrow_tokens(&dx, config.positions, ready.captions.dim(1))?;
        gradients.caption.add(&d_captions, &ready.features)?;
        let d_image = narrow_tokens(&dx, 0, config.positions)?;
        if let Some(positions) = &mut gradients.positions.0 {
            add_row_sum(&d_image.reshape([batch, config.positions * config.dim])?, positions)?;
        }
        patch_embed_backward(&d_image, image, config.patch, gradients.patch.places())?;
        Ok(dc)
    }
}

/// What the forward pass keeps.
struct Kept {
    /// The image tokens after the last block.
    features: Tensor,
    /// Of each block its input, and what it computed unless that is made again.
    blocks: Vec<(Tensor, Option<Inside>)>,
}

/// Adds what the gradients `[batch, vectors, dim]` of modulation vectors mean for their layer, and for the embedded times.
fn modulation_backward(
    layer: &Linear,
    vectors: &Tensor,
    c: &Tensor,
    gradients: &mut Linear<Gradients>,
    dc: &mut Tensor,
) -> Result<()> {
    let dy = vectors.reshape([c.dim(0), layer.extents()[0]])?;
    layer.backward_vectors(&dy, c, InputActivation::Silu, gradients, Some(dc))
}

impl Block {
    /// The gradient of the input `x` for that of the result; those of the scales overwrite `d_scales` `[batch, 2, dim]`.
    fn backward(
        &self,
        [dy, x]: [&Tensor; 2],
        inside: Inside,
        (table, first): (&Tensor, usize),
        keys: Option<&Tensor>,
        gradients: &mut Block<Gradients>,
        d_scales: &mut Tensor,
    ) -> Result<Tensor> {
        let Inside {
            qkv,
            attended,
            lse,
            middle,
            gate_and_up,
        } = inside;
        let (d_gate_and_up, hidden) = swiglu_backward(&self.w2.backward_input(dy)?, gate_and_up, true)?;
        gradients.w2.add(dy, &hidden.expect("it was asked for"))?;
        gradients
            .w13
            .add(&d_gate_and_up, &Self::normalised(&middle, table, first + 1)?)?;
        let d_normalised = self.w13.backward_input(&d_gate_and_up)?;
        let mut through_norm = |dy: &Tensor, x: &Tensor, index: usize| {
            let place = VectorGradient { table: d_scales, index };
            layer_norm_modulate_backward(
                dy,
                x,
                Some(Modulation::new(table, first + index)?),
                EPSILON,
                Some(place),
            )
        };
        let d_middle = add(dy, &through_norm(&d_normalised, &middle, 1)?)?;
        gradients.out.add(&d_middle, &attended)?;
        let d_attended = self.out.backward_input(&d_middle)?;
        let d_qkv = attention_backward(&d_attended, &qkv, &attended, &lse, &self.attention, keys)?;
        gradients.qkv.add(&d_qkv, &Self::normalised(x, table, first)?)?;
        add(&d_middle, &through_norm(&self.qkv.backward_input(&d_qkv)?, x, 0)?)
    }
}

impl Trainable for TrainedPlain {
    fn denoiser(&self) -> &dyn Denoiser {
        &self.dit
    }

    fn weights(&self) -> Vec<&Tensor> {
        tensors(&self.dit.parts)
    }

    fn slots(&self) -> Vec<&Slot> {
        slots(&self.gradients)
    }

    fn weights_and_slots_mut(&mut self) -> (Vec<&mut Tensor>, Vec<&mut Slot>) {
        (tensors_mut(&mut self.dit.parts), slots_mut(&mut self.gradients))
    }

    fn rearrange(&mut self) -> Result<()> {
        Ok(())
    }

    fn predict(&self, noisy: Noisy<'_>) -> Result<Tensor> {
        let size = [noisy.image.dim(1), noisy.image.dim(2)];
        let prepared = self.dit.prepare(noisy.captions, size)?;
        let modulations = self.dit.modulate(noisy.times, None)?;
        self.dit.forward(noisy.image, &prepared, &modulations)
    }

    fn accumulate(
        &mut self,
        noisy: Noisy<'_>,
        loss: &mut LossGradient<'_>,
        _finished: &mut Finished<'_>,
    ) -> Result<()> {
        let Noisy { image, captions, times } = noisy;
        let ready = self.dit.ready(captions, [image.dim(1), image.dim(2)])?;
        let [sinusoids, hidden, c] = self.dit.parts.time.layers(&self.dit.device, times)?;
        let table = self.dit.table(&c)?;
        let mut x = self.dit.embed(image, &ready)?;
        let mut blocks = Vec::new();
        for (index, block) in self.dit.parts.blocks.iter().enumerate() {
            let (y, inside) = block.forward(&x, &table, index * VECTORS, ready.key_lengths.as_ref())?;
            blocks.push((x, (!self.recomputes).then_some(inside)));
            x = y;
        }
        let (prediction, features) = self.dit.output(&x, &table, ready.size)?;
        let dv = loss(&prediction)?;
        let dc = self.backward(&dv, [image, &c], &table, &ready, Kept { features, blocks })?;
        let time = &mut self.gradients.time;
        self.dit.parts.time.backward(&dc, [&sinusoids, &hidden], time)
    }
}
