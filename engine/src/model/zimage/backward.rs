//! The transformer in training: forward with what backward needs, and backward.
//!
//! Who has a place for its gradient decides everything else: a part is reached by the backward pass when it, or something before
//! it, is trained; what is not reached keeps nothing.

use super::block::{Condition, SavedBlock, Saving, Sinks, VECTORS, backward_blocks};
use super::layout::Layout;
use super::{Block, Dit, FinalLayer, Output, Parts, RopeTables};
use crate::device::MemoryTag;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layers::{Gradients, Module, Slot, Trained, any_trained, slots, slots_mut};
use crate::model::denoiser::{Finished, Modulations};
use crate::model::detailer::SavedDetailer;
use crate::model::work::Keep;
use crate::ops::VectorGradient;
use crate::ops::layer_norm::{layer_norm_modulate, layer_norm_modulate_backward};
use crate::ops::linear::InputActivation;
use crate::ops::patch_embed::patch_embed_backward;
use crate::ops::rms_norm::{NormGradients, RmsNorm, rms_norm_modulate_backward};
use crate::ops::sum_rows::add_pad_row_sum;
use crate::ops::tokens::{fill_pad_tokens, narrow_tokens, pad_tokens};
use crate::ops::unpatchify::patchify;
use crate::profile;
use crate::tensor::Tensor;

/// Which parts the backward pass reaches.
#[derive(Clone, Debug)]
pub(super) struct GradPlan {
    /// The timestep embedder is trained, so that every block's modulation counts.
    condition: bool,
    /// For each stack, what its blocks keep.
    pub noise_refiner: Vec<Keep>,
    pub context_refiner: Vec<Keep>,
    pub layers: Vec<Keep>,
    /// Tokens of images or captions need a gradient where they enter the main blocks.
    images: bool,
    captions: bool,
    /// The caption embedder is trained.
    pub caption_embedder: bool,
    /// The last block's output needs a gradient.
    pub features: bool,
    /// The output part is trained.
    pub output: bool,
}

impl GradPlan {
    /// For the parameters that are trained; `recomputed` says of a block whether it is to keep its input alone, given whether it is
    /// trained.
    pub fn new(trained: &Parts<Trained>, recomputed: &dyn Fn(bool) -> bool) -> Self {
        let stack = |blocks: &[Block<Trained>], below: bool| -> (Vec<Keep>, bool) {
            let mut reached = below;
            let keeps = blocks.iter().map(|block| {
                let trained = any_trained(block);
                reached |= trained;
                match (reached, recomputed(trained)) {
                    (false, _) => Keep::Nothing,
                    (true, true) => Keep::Input,
                    (true, false) => Keep::Everything,
                }
            });
            (keeps.collect(), reached)
        };
        let condition = any_trained(&trained.time);
        let caption_embedder = trained.caption_pad.0 || trained.caption_norm.0 || any_trained(&trained.caption);
        let image_embedder = any_trained(&trained.patch) || trained.image_pad.0;
        let (noise_refiner, images) = stack(&trained.noise_refiner, image_embedder || condition);
        let (context_refiner, captions) = stack(&trained.context_refiner, caption_embedder);
        // A stack without blocks has no modulation.
        let images = if noise_refiner.is_empty() {
            image_embedder
        } else {
            images
        };
        let below = images || captions;
        let (layers, features) = stack(&trained.layers, below || condition);
        GradPlan {
            condition,
            features: if layers.is_empty() { below } else { features },
            output: any_trained(&trained.output),
            noise_refiner,
            context_refiner,
            layers,
            images,
            captions,
            caption_embedder,
        }
    }
}

/// The number of the first parameter of every part whose gradients are finished together.
pub(super) struct Order {
    output: usize,
    layers: Vec<usize>,
    context_refiner: Vec<usize>,
    /// Pad tokens, norm and projection of captions.
    caption: [usize; 3],
    noise_refiner: Vec<usize>,
    /// Pad tokens and projection of images.
    image: [usize; 2],
    time: usize,
    /// The numbers of all parameters, in the order in which they are finished.
    pub all: Vec<usize>,
}

impl Order {
    /// For the parts of a model.
    pub fn new(parts: &Parts<Gradients>) -> Self {
        let places = slots(parts);
        let mut finished = Vec::with_capacity(places.len());
        let output = number(&parts.output, &places, &mut finished);
        let mut stack = |blocks: &[Block<Gradients>]| {
            let last_first = blocks.iter().rev().map(|block| number(block, &places, &mut finished));
            let mut numbers: Vec<usize> = last_first.collect();
            numbers.reverse();
            numbers
        };
        let layers = stack(&parts.layers);
        let context_refiner = stack(&parts.context_refiner);
        let caption = [
            number(&parts.caption_pad, &places, &mut finished),
            number(&parts.caption_norm, &places, &mut finished),
            number(&parts.caption, &places, &mut finished),
        ];
        let last_first = parts.noise_refiner.iter().rev();
        let mut noise_refiner: Vec<usize> = last_first.map(|block| number(block, &places, &mut finished)).collect();
        noise_refiner.reverse();
        Order {
            output,
            layers,
            context_refiner,
            caption,
            noise_refiner,
            image: [
                number(&parts.image_pad, &places, &mut finished),
                number(&parts.patch, &places, &mut finished),
            ],
            time: number(&parts.time, &places, &mut finished),
            all: finished,
        }
    }
}

/// The number of a part's first parameter among the model's; those of all its parameters are added to `finished`.
fn number<M: Module<Kind = Gradients>>(part: &M, places: &[&Slot], finished: &mut Vec<usize>) -> usize {
    let own = slots(part);
    let first = own
        .first()
        .and_then(|first| places.iter().position(|place| std::ptr::eq(*place, *first)));
    let first = first.unwrap_or(0);
    finished.extend(first..first + own.len());
    first
}

/// What a forward pass has kept for the backward pass.
pub(super) struct SavedDit {
    layout: Layout,
    image: Tensor,
    /// The captions' features, padded, and the same normalised.
    captions: Option<(Tensor, Tensor)>,
    /// Sinusoids, hidden layer and embeddings of the times.
    times: [Tensor; 3],
    table: Tensor,
    noise_refiner: Vec<Option<SavedBlock>>,
    context_refiner: Vec<Option<SavedBlock>>,
    layers: Vec<Option<SavedBlock>>,
    output: SavedOutput,
}

enum SavedOutput {
    /// The image tokens after the last block.
    Latent(Tensor),
    Pixel(Box<SavedDetailer>),
}

impl Dit {
    /// The velocity of `image` (in the compute type) for captions and model times `t = 1 − sigma`, one of each per item, as by
    /// [`Dit::prepare`], [`Dit::modulate`] and [`Dit::forward`]; and what backward needs. With `keep_sums` a pixel model's head keeps what its
    /// activations read.
    pub(super) fn forward_saving(
        &self,
        image: &Tensor,
        captions: &[&Tensor],
        times: &[f32],
        reach: &GradPlan,
        keep_sums: bool,
        tables: &mut RopeTables,
    ) -> Result<(Tensor, SavedDit)> {
        let _range = profile::range(c"forward");
        image.ensure_rank("dit", "image", 4, "[batch, height, width, channels]")?;
        let batch = image.dim(0);
        if captions.len() != batch || times.len() != batch {
            return Err(Error::invalid(format!(
                "dit: {} captions and {} times for {batch} images",
                captions.len(),
                times.len()
            )));
        }
        let layout = self.layout(captions, [image.dim(1), image.dim(2)], tables)?;
        let times = self.parts.time.layers(&self.device, times)?;
        let Modulations { table } = self.modulate_by(&times[2])?;

        let (features, normalised) = {
            let _tag = MemoryTag::Saved.scope();
            self.normalise_captions(captions, &layout)?
        };
        let embedded = self.embed_captions(&normalised, &layout)?;
        let kept_captions = reach.caption_embedder.then_some((features, normalised));
        let (mut context_refiner, mut noise_refiner, mut layers) = (Vec::new(), Vec::new(), Vec::new());
        let saving = |keeps, kept| Saving { keeps, kept };
        let refined = self.refine_captions(
            embedded,
            &layout,
            Some(saving(&reach.context_refiner[..], &mut context_refiner)),
        )?;
        let stacks = [
            saving(&reach.noise_refiner[..], &mut noise_refiner),
            saving(&reach.layers[..], &mut layers),
        ];
        let x = self.trunk(image, refined, &layout, &table, Some(stacks), None)?;

        let (velocity, output) = self.output_saving(x, image, &layout, &table, keep_sums)?;
        let kept = SavedDit {
            layout,
            image: image.clone(),
            captions: kept_captions,
            times,
            table,
            noise_refiner,
            context_refiner,
            layers,
            output,
        };
        Ok((velocity, kept))
    }

    /// The velocity of the last block's tokens, and what the output part needs for its backward pass.
    fn output_saving(
        &self,
        x: Tensor,
        image: &Tensor,
        layout: &Layout,
        table: &Tensor,
        keep_sums: bool,
    ) -> Result<(Tensor, SavedOutput)> {
        let _range = profile::range(c"output");
        let [rows, columns] = layout.grid;
        let features = narrow_tokens(&x, 0, rows * columns)?;
        drop(x);
        match &self.parts.output {
            Output::Latent(last) => {
                let velocity = last.forward(&features, table, [image.dim(1), image.dim(2)], &self.config)?;
                Ok((velocity, SavedOutput::Latent(features)))
            }
            Output::Pixel(head) => {
                let map = self.as_map(&features, layout.grid)?;
                drop(features);
                let (velocity, kept) = head.forward_saving(image, map, keep_sums)?;
                Ok((velocity, SavedOutput::Pixel(Box::new(kept))))
            }
        }
    }

    /// Adds the gradients of all parameters that have a place in `gradients`, for the gradient `dv` of the velocity in the compute
    /// type. `finished` is told of parts in their order.
    pub(super) fn backward(
        &self,
        dv: &Tensor,
        kept: SavedDit,
        gradients: &mut Parts<Gradients>,
        (reach, order): (&GradPlan, &Order),
        finished: &mut Finished<'_>,
    ) -> Result<()> {
        let _range = profile::range(c"backward");
        let SavedDit {
            layout,
            image,
            captions,
            times,
            table,
            noise_refiner,
            context_refiner,
            layers,
            output,
        } = kept;
        let [sinusoids, hidden, c] = times;
        let mut dc = match reach.condition {
            true => Some(Tensor::zeros(&self.device, c.shape(), DType::F32)?),
            false => None,
        };
        let condition = |first: usize| Condition {
            table: &table,
            first,
            c: &c,
        };
        let features = match reach.output || reach.features {
            true => {
                let own = &mut gradients.output;
                self.output_backward(dv, output, condition(0), own, dc.as_mut(), reach.features)?
            }
            false => None,
        };
        finished(order.output, slots_mut(&mut gradients.output))?;
        let Some(features) = features else { return Ok(()) };
        let tokens = [layout.batch(), layout.grid[0] * layout.grid[1], self.config.dim];
        let features = features.into_shape(tokens)?;
        let dx = pad_tokens(&features, layout.image_tokens + layout.caption_tokens)?;
        drop(features);
        let main = Some(condition(VECTORS * self.parts.noise_refiner.len()));
        let sequence = layout.sequence();
        let blocks = &self.parts.layers;
        let mut block = |index: usize, slots: Vec<&mut Slot>| finished(order.layers[index], slots);
        let sinks = Sinks {
            gradients: &mut gradients.layers,
            dc: dc.as_mut(),
            finished: &mut block,
        };
        let dx = backward_blocks(blocks, main, dx, &sequence, layers, sinks)?;
        if let Some(dx) = dx {
            if reach.captions {
                let dx = narrow_tokens(&dx, layout.image_tokens, layout.caption_tokens)?;
                let kept = (context_refiner, captions);
                self.captions_backward(dx, kept, &layout, gradients, order, finished)?;
            }
            if reach.images {
                let dx = narrow_tokens(&dx, 0, layout.image_tokens)?;
                let first = condition(0);
                let kept = (noise_refiner, image, first);
                self.images_backward(dx, kept, &layout, dc.as_mut(), gradients, (order, finished))?;
            }
        }
        if let Some(dc) = dc {
            let own = &mut gradients.time;
            self.parts.time.backward(&dc, [&sinusoids, &hidden], own)?;
            finished(order.time, slots_mut(own))?;
        }
        Ok(())
    }

    /// Sends the gradient of the refined captions back to their embedder.
    fn captions_backward(
        &self,
        dx: Tensor,
        (kept, captions): (Vec<Option<SavedBlock>>, Option<(Tensor, Tensor)>),
        layout: &Layout,
        gradients: &mut Parts<Gradients>,
        order: &Order,
        finished: &mut Finished<'_>,
    ) -> Result<()> {
        let mut block = |index: usize, slots: Vec<&mut Slot>| finished(order.context_refiner[index], slots);
        let sinks = Sinks {
            gradients: &mut gradients.context_refiner,
            dc: None,
            finished: &mut block,
        };
        let sequence = layout.caption_sequence();
        let dx = backward_blocks(&self.parts.context_refiner, None, dx, &sequence, kept, sinks)?;
        if let (Some(dx), Some(captions)) = (dx, captions) {
            self.caption_backward(dx, captions, layout, gradients)?;
            let [pad, norm, projection] = order.caption;
            finished(pad, slots_mut(&mut gradients.caption_pad))?;
            finished(norm, slots_mut(&mut gradients.caption_norm))?;
            finished(projection, slots_mut(&mut gradients.caption))?;
        }
        Ok(())
    }

    /// Sends the gradient of the refined image tokens back to their embedder.
    fn images_backward(
        &self,
        dx: Tensor,
        (kept, image, first): (Vec<Option<SavedBlock>>, Tensor, Condition<'_>),
        layout: &Layout,
        dc: Option<&mut Tensor>,
        gradients: &mut Parts<Gradients>,
        (order, finished): (&Order, &mut Finished<'_>),
    ) -> Result<()> {
        let mut block = |index: usize, slots: Vec<&mut Slot>| finished(order.noise_refiner[index], slots);
        let sinks = Sinks {
            gradients: &mut gradients.noise_refiner,
            dc,
            finished: &mut block,
        };
        let sequence = layout.image_sequence();
        let dx = backward_blocks(&self.parts.noise_refiner, Some(first), dx, &sequence, kept, sinks)?;
        if let Some(dx) = dx {
            self.image_backward(&dx, &image, layout, gradients)?;
            let [pad, projection] = order.image;
            finished(pad, slots_mut(&mut gradients.image_pad))?;
            finished(projection, slots_mut(&mut gradients.patch))?;
        }
        Ok(())
    }

    /// The gradient of the last block's image tokens, if `wanted`, as tokens or as a map.
    fn output_backward(
        &self,
        dv: &Tensor,
        kept: SavedOutput,
        condition: Condition<'_>,
        gradients: &mut Output<Gradients>,
        dc: Option<&mut Tensor>,
        wanted: bool,
    ) -> Result<Option<Tensor>> {
        match (&self.parts.output, kept, gradients) {
            (Output::Pixel(head), SavedOutput::Pixel(kept), Output::Pixel(gradients)) => {
                head.backward(dv, *kept, gradients, wanted)
            }
            (Output::Latent(last), SavedOutput::Latent(x), Output::Latent(gradients)) => {
                let d_patches = patchify(dv, self.config.patch, x.dim(1), -1.0)?;
                let dx = last.backward(&d_patches, &x, condition, gradients, dc)?;
                Ok(wanted.then_some(dx))
            }
            _ => unreachable!("an output part keeps what is its own"),
        }
    }

    fn image_backward(
        &self,
        dx: &Tensor,
        image: &Tensor,
        layout: &Layout,
        gradients: &mut Parts<Gradients>,
    ) -> Result<()> {
        if let (Some(lengths), Some(pad)) = (&layout.image_lengths, &mut gradients.image_pad.0) {
            add_pad_row_sum(dx, lengths, pad)?;
        }
        let dx = narrow_tokens(dx, 0, layout.grid[0] * layout.grid[1])?;
        patch_embed_backward(&dx, image, self.config.patch, gradients.patch.places())
    }

    fn caption_backward(
        &self,
        dx: Tensor,
        (features, normalised): (Tensor, Tensor),
        layout: &Layout,
        gradients: &mut Parts<Gradients>,
    ) -> Result<()> {
        if let Some(pad) = &mut gradients.caption_pad.0 {
            add_pad_row_sum(&dx, &layout.caption_lengths, pad)?;
        }
        // What stands in the pads' places does not come from the projection.
        let nothing = Tensor::zeros(&self.device, [self.config.dim], dx.dtype())?;
        let mut dx = dx.into_unshared()?;
        fill_pad_tokens(&mut dx, &layout.caption_lengths, &nothing)?;
        gradients.caption.add(&dx, &normalised)?;
        if let Some(norm) = &mut gradients.caption_norm.0 {
            let d_normalised = self.parts.caption.backward_input(&dx)?;
            let spec = RmsNorm {
                weight: self.parts.caption_norm.tensor(),
                scale: None,
                epsilon: self.config.norm_eps,
            };
            let places = NormGradients {
                weight: Some(norm),
                vector: None,
            };
            rms_norm_modulate_backward(&d_normalised, &features, &spec, None, places)?;
        }
        Ok(())
    }
}

impl FinalLayer {
    /// The gradient of its input `x` `[batch, tokens, dim]` for that of its patches.
    fn backward(
        &self,
        d_patches: &Tensor,
        x: &Tensor,
        Condition { table, c, .. }: Condition<'_>,
        gradients: &mut FinalLayer<Gradients>,
        dc: Option<&mut Tensor>,
    ) -> Result<Tensor> {
        let (batch, dim) = (x.dim(0), x.dim(2));
        let scale = Some(Self::scale(table)?);
        let normalised = layer_norm_modulate(x, scale, Self::EPSILON)?;
        gradients.linear.add(d_patches, &normalised)?;
        drop(normalised);
        let d_normalised = self.linear.backward_input(d_patches)?;
        let mut d_scale = Tensor::empty(&x.device(), [batch, 1, dim], DType::F32)?;
        let vector = VectorGradient {
            table: &mut d_scale,
            index: 0,
        };
        let dx = layer_norm_modulate_backward(&d_normalised, x, scale, Self::EPSILON, Some(vector))?;
        let d_scale = d_scale.into_shape([batch, dim])?;
        self.modulation
            .backward_vectors(&d_scale, c, InputActivation::Silu, &mut gradients.modulation, dc)?;
        Ok(dx)
    }
}
