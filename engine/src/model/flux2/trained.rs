//! The model with places for gradients.
//!
//! A block is reached by the backward pass when it, or something before it, is trained; what is not reached keeps nothing. The vectors of
//! modulation are shared by all blocks of a kind, so that each block adds what its own use of them means for their layers and for the
//! embedded times, where these are trained.

use super::block::{SUBLAYERS, SavedDouble, SavedSingle};
use super::vectors::VectorGradients;
use super::{FinalLayer, Flux2, Flux2Dit, Layout, Parts};
use crate::device::{Device, MemoryTag};
use crate::dtype::DType;
use crate::error::Result;
use crate::layers::{
    Choose, Gradients, Linear, MakeSlots, Module, NamedParameter, ParamSource, Slot, Trained, any_trained, slots,
    slots_mut, tensors, tensors_mut, trained,
};
use crate::model::denoiser::{Denoiser, Finished, LossGradient, Noisy, Trainable, TrainingChoice};
use crate::model::detailer::SavedDetailer;
use crate::model::work::Keep;
use crate::ops::VectorGradient;
use crate::ops::gated_add::item_sums;
use crate::ops::layer_norm::layer_norm_modulate_backward;
use crate::ops::linear::InputActivation;
use crate::ops::patch_embed::patch_embed_backward;
use crate::ops::tokens::{concat_tokens, narrow_tokens, pad_tokens};
use crate::ops::unpatchify::patchify;
use crate::tensor::Tensor;

/// Which parts the backward pass reaches.
#[derive(Clone, Debug)]
pub(super) struct Reach {
    /// The timestep embedder is trained, so that every vector of modulation counts.
    time: bool,
    /// Vectors of double-stream blocks (image, text) and of single-stream blocks need gradients.
    modulations: [bool; 3],
    /// The last layer's do.
    last: bool,
    pub double: Vec<Keep>,
    pub single: Vec<Keep>,
    /// Something before the blocks is trained that is no modulation.
    embedders: bool,
    /// The last block's output needs a gradient.
    pub features: bool,
}

impl Reach {
    /// For the parameters that are trained; `recomputed` says of a block whether it is to keep its input alone, given whether it is
    /// trained.
    pub fn new(trained: &Parts<Trained>, recomputed: &dyn Fn(bool) -> bool) -> Self {
        let time = any_trained(&trained.time);
        let modulations = [
            &trained.image_modulation,
            &trained.text_modulation,
            &trained.single_modulation,
        ]
        .map(|layer| time || any_trained(layer));
        let embedders = any_trained(&trained.patch) || any_trained(&trained.caption);
        let mut reached = embedders || modulations[0] || modulations[1];
        let mut keep = |own: bool| {
            reached |= own;
            match (reached, recomputed(own)) {
                (false, _) => Keep::Nothing,
                (true, true) => Keep::Input,
                (true, false) => Keep::Everything,
            }
        };
        let double = trained.double.iter().map(|block| keep(any_trained(block))).collect();
        keep(modulations[2]);
        let single = trained.single.iter().map(|block| keep(any_trained(block))).collect();
        Reach {
            time,
            modulations,
            last: time || trained.last.as_ref().is_some_and(|last| any_trained(&last.modulation)),
            double,
            single,
            embedders,
            features: keep(false) != Keep::Nothing,
        }
    }
}

/// A model that is trained.
pub(super) struct TrainedFlux2 {
    dit: Flux2Dit,
    gradients: Parts<Gradients>,
    reach: Reach,
    keep_sums: bool,
}

/// What a block has kept: its input, and the rest unless it is made again; nothing where no gradient passes.
type Kept<I, S> = Option<(I, Option<S>)>;

/// What the forward pass keeps.
struct Saved {
    layout: Layout,
    image: Tensor,
    features: Tensor,
    table: Tensor,
    /// Sinusoids, hidden layer and embeddings of the times.
    times: [Tensor; 3],
    double: Vec<Kept<[Tensor; 2], SavedDouble>>,
    single: Vec<Kept<Tensor, SavedSingle>>,
    /// The image tokens after the last block, or what the head keeps.
    output: SavedOutput,
}

enum SavedOutput {
    Latent(Tensor),
    Pixel(Box<SavedDetailer>),
}

/// What `keep` leaves of a block.
fn kept<I, S>(keep: Keep, input: I, saved: S) -> Kept<I, S> {
    match keep {
        Keep::Nothing => None,
        Keep::Input => Some((input, None)),
        Keep::Everything => Some((input, Some(saved))),
    }
}

/// Adds what the gradients of modulation vectors mean for the layer that made them and for the embedded times.
fn modulation_backward(
    layer: &Linear,
    vectors: VectorGradients,
    c: &Tensor,
    gradients: &mut Linear<Gradients>,
    dc: Option<&mut Tensor>,
) -> Result<()> {
    match vectors.rows()? {
        Some(dy) => layer.backward_vectors(&dy, c, InputActivation::Silu, gradients, dc),
        None => Ok(()),
    }
}

impl TrainedFlux2 {
    /// Reads a model, and makes room for gradients.
    pub fn load(
        spec: &Flux2,
        params: &dyn ParamSource,
        device: &Device,
        choice: &TrainingChoice<'_>,
        loaded: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<Self> {
        let chosen = spec
            .describe()
            .transform(&mut Choose(|meta: &NamedParameter| (choice.trains)(meta)))?;
        let dit = Flux2Dit::load(spec, params, device, loaded)?;
        let _tag = MemoryTag::Gradients.scope();
        Ok(TrainedFlux2 {
            gradients: dit.parts.transform(&mut MakeSlots(trained(&chosen).into_iter()))?,
            reach: Reach::new(&chosen, choice.recomputes),
            keep_sums: choice.keep_sums,
            dit,
        })
    }

    /// The velocity, and what backward needs.
    fn forward_saving(&self, Noisy { image, captions, times }: Noisy<'_>) -> Result<(Tensor, Saved)> {
        let (dit, reach) = (&self.dit, &self.reach);
        let layout = dit.layout(captions, [image.dim(1), image.dim(2)])?;
        let features = Flux2Dit::features(captions, &layout)?;
        let times = dit.parts.time.layers(&dit.device, times)?;
        let table = dit.table(&times[2])?;
        let sequence = layout.sequence();
        let mut streams = {
            let _tag = MemoryTag::Saved.scope();
            [dit.embed(image, &layout)?, dit.parts.caption.forward(&features)?]
        };
        let (mut double, mut single) = (Vec::new(), Vec::new());
        for (block, keep) in dit.parts.double.iter().zip(&reach.double) {
            let vectors = dit.double_vectors(&table);
            let (after, saved) = block.forward_saving([&streams[0], &streams[1]], vectors, &sequence)?;
            double.push(kept(*keep, std::mem::replace(&mut streams, after), saved));
        }
        let mut x = {
            let _tag = MemoryTag::Saved.scope();
            concat_tokens(&streams[0], &streams[1])?
        };
        drop(streams);
        for (block, keep) in dit.parts.single.iter().zip(&reach.single) {
            let (after, saved) = block.forward_saving(&x, dit.single_vectors(&table), &sequence)?;
            single.push(kept(*keep, std::mem::replace(&mut x, after), saved));
        }
        let x = narrow_tokens(&x, 0, layout.image_tokens())?;
        let (velocity, output) = match (&dit.parts.last, &dit.parts.head) {
            (Some(last), _) => {
                let velocity = dit.latent_output(last, &x, &table, layout.size)?;
                (velocity, SavedOutput::Latent(x))
            }
            (None, Some(head)) => {
                let map = dit.as_map(&x, layout.grid)?;
                let (velocity, saved) = head.forward_saving(image, map, self.keep_sums)?;
                (velocity, SavedOutput::Pixel(Box::new(saved)))
            }
            (None, None) => return Err(Flux2Dit::no_output()),
        };
        let saved = Saved {
            layout,
            image: image.clone(),
            features,
            table,
            times,
            double,
            single,
            output,
        };
        Ok((velocity, saved))
    }

    /// Adds every trained parameter's gradient for that of the velocity.
    fn backward(&mut self, dv: &Tensor, saved: Saved) -> Result<()> {
        let [sinusoids, hidden, c] = &saved.times;
        let zeros = || Tensor::zeros(&self.dit.device, c.shape(), DType::F32);
        let mut dc = self.reach.time.then(zeros).transpose()?;
        if let Some(dx) = self.output_backward(dv, saved.output, [&saved.table, c], dc.as_mut())? {
            let all = saved.layout.image_tokens() + saved.layout.text_tokens();
            let dx = pad_tokens(&dx, all)?;
            let common = (&saved.layout, &saved.table, c);
            if let Some(dx) = self.single_backward(dx, saved.single, common, dc.as_mut())?
                && let Some([d_image, d_text]) = self.double_backward(dx, saved.double, common, dc.as_mut())?
                && self.reach.embedders
            {
                self.gradients.caption.add(&d_text, &saved.features)?;
                let places = self.gradients.patch.places();
                patch_embed_backward(&d_image, &saved.image, self.dit.config.patch, places)?;
            }
        }
        match dc {
            Some(dc) => self
                .dit
                .parts
                .time
                .backward(&dc, [sinusoids, hidden], &mut self.gradients.time),
            None => Ok(()),
        }
    }

    /// The gradient of the last block's image tokens `[batch, tokens, dim]`, where it is wanted.
    fn output_backward(
        &mut self,
        dv: &Tensor,
        kept: SavedOutput,
        [table, c]: [&Tensor; 2],
        dc: Option<&mut Tensor>,
    ) -> Result<Option<Tensor>> {
        let TrainedFlux2 {
            dit, gradients, reach, ..
        } = self;
        let config = &dit.config;
        match (kept, &dit.parts.last, &dit.parts.head) {
            (SavedOutput::Latent(x), Some(last), _) => {
                let own = gradients.last.as_mut().expect("places are those of the parts");
                let d_patches = patchify(dv, config.patch, x.dim(1), 1.0)?;
                if own.linear.wants_weight() {
                    own.linear
                        .add(&d_patches, &last.normalise(&x, table, config.norm_eps)?)?;
                }
                let d_normalised = last.linear.backward_input(&d_patches)?;
                let scale = Some(FinalLayer::scale(table)?);
                if !reach.last {
                    let dx = layer_norm_modulate_backward(&d_normalised, &x, scale, config.norm_eps, None)?;
                    return Ok(reach.features.then_some(dx));
                }
                let mut vectors = Tensor::zeros(&dit.device, [x.dim(0), 2, config.dim], DType::F32)?;
                let table = &mut vectors;
                let shift = VectorGradient { table, index: 1 };
                item_sums(&d_normalised, shift)?;
                let table = &mut vectors;
                let place = VectorGradient { table, index: 0 };
                let dx = layer_norm_modulate_backward(&d_normalised, &x, scale, config.norm_eps, Some(place))?;
                let dy = vectors.into_shape([x.dim(0), 2 * config.dim])?;
                last.modulation
                    .backward_vectors(&dy, c, InputActivation::Silu, &mut own.modulation, dc)?;
                Ok(reach.features.then_some(dx))
            }
            (SavedOutput::Pixel(kept), _, Some(head)) => {
                let own = gradients.head.as_mut().expect("places are those of the parts");
                let d_map = head.backward(dv, *kept, own, reach.features)?;
                let as_tokens = |d_map: Tensor| {
                    let shape = [d_map.dim(0), d_map.dim(1) * d_map.dim(2), config.dim];
                    d_map.into_shape(shape)
                };
                d_map.map(as_tokens).transpose()
            }
            _ => Err(Flux2Dit::no_output()),
        }
    }

    /// The gradient of what enters the single-stream blocks, where it is wanted.
    fn single_backward(
        &mut self,
        mut dx: Tensor,
        kept: Vec<Kept<Tensor, SavedSingle>>,
        (layout, table, c): (&Layout, &Tensor, &Tensor),
        mut dc: Option<&mut Tensor>,
    ) -> Result<Option<Tensor>> {
        let TrainedFlux2 {
            dit, gradients, reach, ..
        } = self;
        let (sequence, vectors) = (layout.sequence(), dit.single_vectors(table));
        let blocks = dit.parts.single.iter().zip(&mut gradients.single).zip(kept);
        for ((block, own), kept) in blocks.rev() {
            let Some((x, saved)) = kept else { return Ok(None) };
            let saved = match saved {
                Some(saved) => saved,
                None => block.forward_saving(&x, vectors, &sequence)?.1,
            };
            let mut places = VectorGradients::new(reach.modulations[2], SUBLAYERS[1], &x)?;
            dx = block.backward(&dx, &x, saved, (vectors, &sequence), (own, &mut places))?;
            let layer = &dit.parts.single_modulation;
            modulation_backward(layer, places, c, &mut gradients.single_modulation, dc.as_deref_mut())?;
        }
        Ok(Some(dx))
    }

    /// The gradients of the embedded image and text, where they are wanted.
    fn double_backward(
        &mut self,
        dx: Tensor,
        kept: Vec<Kept<[Tensor; 2], SavedDouble>>,
        (layout, table, c): (&Layout, &Tensor, &Tensor),
        mut dc: Option<&mut Tensor>,
    ) -> Result<Option<[Tensor; 2]>> {
        let TrainedFlux2 {
            dit, gradients, reach, ..
        } = self;
        let (sequence, vectors) = (layout.sequence(), dit.double_vectors(table));
        let mut streams = super::block::split(&dx, layout.image_tokens())?;
        drop(dx);
        let blocks = dit.parts.double.iter().zip(&mut gradients.double).zip(kept);
        for ((block, own), kept) in blocks.rev() {
            let Some((input, saved)) = kept else { return Ok(None) };
            let input = [&input[0], &input[1]];
            let saved = match saved {
                Some(saved) => saved,
                None => block.forward_saving(input, vectors, &sequence)?.1,
            };
            let mut image_places = VectorGradients::new(reach.modulations[0], SUBLAYERS[0], input[0])?;
            let mut text_places = VectorGradients::new(reach.modulations[1], SUBLAYERS[0], input[1])?;
            streams = block.backward(
                [&streams[0], &streams[1]],
                input,
                saved,
                (vectors, &sequence),
                (own, [&mut image_places, &mut text_places]),
            )?;
            let parts = &dit.parts;
            let own = &mut gradients.image_modulation;
            modulation_backward(&parts.image_modulation, image_places, c, own, dc.as_deref_mut())?;
            let own = &mut gradients.text_modulation;
            modulation_backward(&parts.text_modulation, text_places, c, own, dc.as_deref_mut())?;
        }
        Ok(Some(streams))
    }
}

impl Trainable for TrainedFlux2 {
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
        self.dit.rearrange()
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
        let (velocity, saved) = self.forward_saving(noisy)?;
        let gradient = loss(&velocity)?;
        drop(velocity);
        self.backward(&gradient, saved)
    }
}
