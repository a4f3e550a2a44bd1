//! The transformer in training: forward with what backward needs, and backward.
//!
//! Who has a place for its gradient decides everything else: a part is reached by the backward pass when it, or something before
//! it, is trained; what is not reached keeps nothing.

use super::layout::Layout;
use super::{Dit, FinalLayer, HEAD_PREFIX, Modulations, Output, RopeTables};
use crate::device::MemoryTag;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::block::{self, Condition, Keep, SavedBlock, VECTORS, backward_blocks, forward_blocks};
use crate::model::config::{DitConfig, ModelKind};
use crate::model::detailer::{DetailerLayout, SavedDetailer};
use crate::model::parameters::{Listed, Parameter, Slot, list_tensors};
use crate::ops::layer_norm::{layer_norm_modulate, layer_norm_modulate_backward};
use crate::ops::linear::{
    InputActivation, LinearGradients, linear, linear_backward_input, linear_backward_weight, linear_vectors_backward,
};
use crate::ops::patch_embed::patch_embed_backward;
use crate::ops::rms_norm::{NormGradients, RmsNorm, rms_norm_modulate_backward};
use crate::ops::sum_rows::add_pad_row_sum;
use crate::ops::tokens::{concat_tokens, fill_pad_tokens, narrow_tokens, pad_tokens};
use crate::ops::unpatchify::{patchify, unpatchify};
use crate::ops::{Modulation, VectorGradient};
use crate::profile;
use crate::tensor::Tensor;

/// The input layers' parameters, in order: patch projection, pad tokens, caption embedder, timestep embedder.
const INPUTS: usize = 11;
const PATCH: std::ops::Range<usize> = 0..2;
const IMAGE_PAD: usize = 2;
const CAPTION_PAD: usize = 3;
const CAPTION: std::ops::Range<usize> = 4..7;
const TIME: std::ops::Range<usize> = 7..11;

/// The parameters of a transformer of these sizes, in the order in which gradients are kept; `head` is a pixel model's.
///
/// # Errors
/// When a pixel model has no head.
pub fn parameters(config: &DitConfig, head: Option<&DetailerLayout>) -> Result<Vec<Parameter>> {
    let (dim, features) = (config.dim, config.patch * config.patch * config.in_channels);
    let embedder = format!("all_x_embedder.{}-1", config.patch);
    let mut all = vec![
        Parameter::one(format!("{embedder}.weight"), &[dim, features]),
        Parameter::one(format!("{embedder}.bias"), &[dim]),
        Parameter::one("x_pad_token", &[1, dim]),
        Parameter::one("cap_pad_token", &[1, dim]),
        Parameter::one("cap_embedder.0.weight", &[config.caption_width]),
        Parameter::one("cap_embedder.1.weight", &[dim, config.caption_width]),
        Parameter::one("cap_embedder.1.bias", &[dim]),
        Parameter::one("t_embedder.mlp.0.weight", &[config.t_hidden, config.t_frequencies]),
        Parameter::one("t_embedder.mlp.0.bias", &[config.t_hidden]),
        Parameter::one("t_embedder.mlp.2.weight", &[config.adaln_width, config.t_hidden]),
        Parameter::one("t_embedder.mlp.2.bias", &[config.adaln_width]),
    ];
    let stacks = [
        ("noise_refiner", config.refiner_layers, true),
        ("context_refiner", config.refiner_layers, false),
        ("layers", config.layers, true),
    ];
    for (stack, blocks, modulated) in stacks {
        all.extend((0..blocks).flat_map(|index| block::parameters(&format!("{stack}.{index}"), config, modulated)));
    }
    match (config.kind, head) {
        (ModelKind::Latent, _) => {
            let prefix = format!("all_final_layer.{}-1", config.patch);
            let one = |suffix: &str, shape: &[usize]| Parameter::one(format!("{prefix}.{suffix}"), shape);
            all.extend([
                one("linear.weight", &[features, dim]),
                one("linear.bias", &[features]),
                one("adaLN_modulation.1.weight", &[dim, config.adaln_width]),
                one("adaLN_modulation.1.bias", &[dim]),
            ]);
        }
        (ModelKind::Pixel, Some(head)) => all.extend(head.parameters(HEAD_PREFIX)),
        (ModelKind::Pixel, None) => return Err(Error::invalid("a pixel model needs a detailer head")),
    }
    Ok(all)
}

list_tensors!(Dit, |dit, all| {
    let Dit {
        patch_weight,
        patch_bias,
        image_pad,
        caption_pad,
        caption_norm,
        caption_weight,
        caption_bias,
        time,
        noise_refiner,
        context_refiner,
        layers,
        output,
        ..
    } = dit;
    all.extend([
        patch_weight,
        patch_bias,
        image_pad,
        caption_pad,
        caption_norm,
        caption_weight,
        caption_bias,
    ]);
    let super::TimeEmbedder { weights, biases, .. } = time;
    let ([weight, second_weight], [bias, second_bias]) = (weights, biases);
    all.extend([weight, bias, second_weight, second_bias]);
    for block in noise_refiner {
        all.extend(block.listed());
    }
    for block in context_refiner {
        all.extend(block.listed());
    }
    for block in layers {
        all.extend(block.listed());
    }
    match output {
        Output::Latent(last) => all.extend(last.listed()),
        Output::Pixel(head) => all.extend(head.listed()),
    }
});

list_tensors!(FinalLayer, |layer, all| {
    let FinalLayer {
        weight,
        bias,
        modulation_weight,
        modulation_bias,
    } = layer;
    all.extend([weight, bias, modulation_weight, modulation_bias]);
});

/// Where in a list of parameters each part has its own.
struct Places {
    noise_refiner: std::ops::Range<usize>,
    context_refiner: std::ops::Range<usize>,
    layers: std::ops::Range<usize>,
}

impl Places {
    fn of(dit: &Dit) -> Self {
        let (modulated, plain) = (block::parameter_count(true), block::parameter_count(false));
        let noise_end = INPUTS + modulated * dit.noise_refiner.len();
        let context_end = noise_end + plain * dit.context_refiner.len();
        Places {
            noise_refiner: INPUTS..noise_end,
            context_refiner: noise_end..context_end,
            layers: context_end..context_end + modulated * dit.layers.len(),
        }
    }
}

/// Which parts the backward pass reaches.
pub(crate) struct Reach {
    /// The timestep embedder is trained, so that every block's modulation counts.
    condition: bool,
    /// For each stack, what its blocks keep.
    noise_refiner: Vec<Keep>,
    context_refiner: Vec<Keep>,
    layers: Vec<Keep>,
    /// Tokens of images or captions need a gradient where they enter the main blocks.
    images: bool,
    captions: bool,
    /// The caption embedder is trained.
    caption_embedder: bool,
    /// The last block's output needs a gradient.
    features: bool,
    /// The output part is trained.
    output: bool,
}

impl Reach {
    /// For the parameters that `trained` says are, in order; `recomputed` says of a block whether it is to keep its input alone,
    /// given whether it is trained.
    pub fn new(dit: &Dit, trained: &[bool], recomputed: &dyn Fn(bool) -> bool) -> Self {
        let places = Places::of(dit);
        let any = |range: std::ops::Range<usize>| trained[range].contains(&true);
        let stack = |range: std::ops::Range<usize>, modulated: bool, below: bool| -> Vec<Keep> {
            let blocks = trained[range].chunks(block::parameter_count(modulated));
            let mut reached = below;
            let keeps = blocks.map(|block| {
                let trained = block.contains(&true);
                reached |= trained;
                match (reached, recomputed(trained)) {
                    (false, _) => Keep::Nothing,
                    (true, true) => Keep::Input,
                    (true, false) => Keep::Everything,
                }
            });
            keeps.collect()
        };
        let reaches = |keeps: &[Keep], below: bool| below || keeps.iter().any(|keep| *keep != Keep::Nothing);
        let condition = any(TIME);
        let caption_embedder = any(CAPTION_PAD..CAPTION.end);
        let image_embedder = any(PATCH) || trained[IMAGE_PAD];
        let noise_refiner = stack(places.noise_refiner, true, image_embedder || condition);
        let context_refiner = stack(places.context_refiner, false, caption_embedder);
        let images = reaches(&noise_refiner, image_embedder);
        let captions = reaches(&context_refiner, caption_embedder);
        let layers = stack(places.layers.clone(), true, images || captions || condition);
        Reach {
            condition,
            features: reaches(&layers, images || captions),
            output: trained[places.layers.end..].contains(&true),
            noise_refiner,
            context_refiner,
            layers,
            images,
            captions,
            caption_embedder,
        }
    }
}

/// What a forward pass has kept for the backward pass.
pub(crate) struct SavedDit {
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
    /// Every parameter's values on the host under its canonical name, in the checkpoint's order of axes: for saving small models
    /// and for comparing them. Waits for the device.
    ///
    /// # Errors
    /// When the work so far failed.
    pub fn parameter_values(&self) -> Result<Vec<(String, Vec<f32>)>> {
        let head = match &self.output {
            Output::Pixel(head) => Some(head.layout()),
            Output::Latent(_) => None,
        };
        let mut all = Vec::new();
        for (parameter, tensor) in parameters(&self.config, head)?.iter().zip(self.listed()) {
            let values = tensor.to_vec_f32()?;
            for (index, part) in parameter.parts.iter().enumerate() {
                let own = values[parameter.range(index)].to_vec();
                all.push((part.name.clone(), parameter.to_published(index, own)));
            }
        }
        Ok(all)
    }

    /// The velocity of `image` (in the compute type) for captions and model times `t = 1 − sigma`, one of each per item, as by
    /// [`Dit::prepare`], [`Dit::modulate`] and [`Dit::forward`]; and what backward needs. With `keep_sums` a pixel model's head keeps what its
    /// activations read.
    pub(crate) fn forward_keeping(
        &self,
        image: &Tensor,
        captions: &[&Tensor],
        times: &[f32],
        reach: &Reach,
        keep_sums: bool,
        tables: &mut RopeTables,
    ) -> Result<(Tensor, SavedDit)> {
        let _range = profile::range(c"forward");
        image.expect_rank("dit", "image", 4, "[batch, height, width, channels]")?;
        let batch = image.dim(0);
        if captions.len() != batch || times.len() != batch {
            return Err(Error::invalid(format!(
                "dit: {} captions and {} times for {batch} images",
                captions.len(),
                times.len()
            )));
        }
        let layout = self.layout(captions, [image.dim(1), image.dim(2)], tables)?;
        let times = self.time.layers(&self.device, times)?;
        let Modulations { table } = self.modulate_by(&times[2])?;

        let (features, normalised) = {
            let _tag = MemoryTag::Saved.scope();
            self.normalise_captions(captions, &layout)?
        };
        let embedded = self.embed_captions(&normalised, &layout)?;
        let kept_captions = reach.caption_embedder.then_some((features, normalised));
        let sequence = layout.caption_sequence();
        let (refined_captions, context_refiner) =
            forward_blocks(&self.context_refiner, None, embedded, &sequence, &reach.context_refiner)?;

        let condition = |first: usize| Condition {
            table: &table,
            first,
            c: &times[2],
        };
        let embedded = self.embed_image(image, &layout)?;
        let sequence = layout.image_sequence();
        let (refined, noise_refiner) = forward_blocks(
            &self.noise_refiner,
            Some(condition(0)),
            embedded,
            &sequence,
            &reach.noise_refiner,
        )?;
        let x = {
            let _tag = MemoryTag::Saved.scope();
            concat_tokens(&refined, &refined_captions)?
        };
        drop((refined, refined_captions));
        let main = condition(VECTORS * self.noise_refiner.len());
        let (x, layers) = forward_blocks(&self.layers, Some(main), x, &layout.sequence(), &reach.layers)?;

        let _range = profile::range(c"output");
        let [rows, columns] = layout.grid;
        let x = narrow_tokens(&x, 0, rows * columns)?;
        let (velocity, output) = match &self.output {
            Output::Latent(last) => {
                let normalised = layer_norm_modulate(&x, Some(last_vector(&table)?), FinalLayer::EPSILON)?;
                let patches = linear(&normalised, &last.weight, Some(&last.bias))?;
                let (patch, channels) = (self.config.patch, self.config.in_channels);
                let velocity = unpatchify(&patches, image.dim(1), image.dim(2), patch, channels, -1.0)?;
                (velocity, SavedOutput::Latent(x))
            }
            Output::Pixel(head) => {
                let features = x.reshape([batch, rows, columns, self.config.dim])?;
                drop(x);
                let (velocity, kept) = head.forward_keeping(image, features, keep_sums)?;
                (velocity, SavedOutput::Pixel(Box::new(kept)))
            }
        };
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

    /// Adds the gradients of all parameters that have a place in `slots`, for the gradient `dv` of the velocity in the compute
    /// type.
    pub(crate) fn backward(&self, dv: &Tensor, kept: SavedDit, slots: &mut [Slot], reach: &Reach) -> Result<()> {
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
        let places = Places::of(self);
        let [sinusoids, hidden, c] = times;
        let mut dc = match reach.condition {
            true => Some(Tensor::zeros(&self.device, c.shape(), DType::F32)?),
            false => None,
        };
        let output_slots = &mut slots[places.layers.end..];
        let features = match reach.output || reach.features {
            true => self.output_backward(
                dv,
                output,
                [&table, &c],
                &layout,
                output_slots,
                dc.as_mut(),
                reach.features,
            )?,
            false => None,
        };
        let Some(features) = features else { return Ok(()) };
        let dx = pad_tokens(&features, layout.image_tokens + layout.caption_tokens)?;
        drop(features);
        let condition = |first: usize| {
            let (table, c) = (&table, &c);
            Some(Condition { table, first, c })
        };
        let main = condition(VECTORS * self.noise_refiner.len());
        let own = &mut slots[places.layers];
        let dx = backward_blocks(&self.layers, main, dx, &layout.sequence(), layers, own, dc.as_mut())?;
        if let Some(dx) = dx {
            if reach.captions {
                let dx = narrow_tokens(&dx, layout.image_tokens, layout.caption_tokens)?;
                let (own, sequence) = (&mut slots[places.context_refiner], layout.caption_sequence());
                let dx = backward_blocks(&self.context_refiner, None, dx, &sequence, context_refiner, own, None)?;
                if let (Some(dx), Some(captions)) = (dx, captions) {
                    self.caption_backward(dx, captions, &layout, slots)?;
                }
            }
            if reach.images {
                let dx = narrow_tokens(&dx, 0, layout.image_tokens)?;
                let (own, sequence) = (&mut slots[places.noise_refiner], layout.image_sequence());
                let dx = backward_blocks(
                    &self.noise_refiner,
                    condition(0),
                    dx,
                    &sequence,
                    noise_refiner,
                    own,
                    dc.as_mut(),
                )?;
                if let Some(dx) = dx {
                    self.image_backward(&dx, &image, &layout, slots)?;
                }
            }
        }
        match dc {
            Some(dc) => self.time_backward(&dc, [&sinusoids, &hidden], slots),
            None => Ok(()),
        }
    }

    /// The gradient of the last block's image tokens, if `wanted`.
    #[allow(clippy::too_many_arguments)]
    fn output_backward(
        &self,
        dv: &Tensor,
        kept: SavedOutput,
        [table, c]: [&Tensor; 2],
        layout: &Layout,
        slots: &mut [Slot],
        dc: Option<&mut Tensor>,
        wanted: bool,
    ) -> Result<Option<Tensor>> {
        let [rows, columns] = layout.grid;
        match (&self.output, kept) {
            (Output::Pixel(head), SavedOutput::Pixel(kept)) => {
                let features = head.backward(dv, *kept, slots, wanted)?;
                let shape = [layout.batch(), rows * columns, self.config.dim];
                features.map(|features| features.into_shape(shape)).transpose()
            }
            (Output::Latent(last), SavedOutput::Latent(x)) => {
                let [weight, bias, modulation_weight, modulation_bias] = slots else {
                    unreachable!("a final layer has four parameters");
                };
                let scale = last_vector(table)?;
                let d_patches = patchify(dv, self.config.patch, rows * columns, -1.0)?;
                let normalised = layer_norm_modulate(&x, Some(scale), FinalLayer::EPSILON)?;
                let gradients = LinearGradients {
                    weight: weight.as_mut(),
                    bias: bias.as_mut(),
                };
                linear_backward_weight(&d_patches, &normalised, gradients)?;
                drop(normalised);
                let d_normalised = linear_backward_input(&d_patches, &last.weight)?;
                let mut d_scale = Tensor::empty(&self.device, [layout.batch(), 1, self.config.dim], DType::F32)?;
                let vector = VectorGradient {
                    table: &mut d_scale,
                    index: 0,
                };
                let dx =
                    layer_norm_modulate_backward(&d_normalised, &x, Some(scale), FinalLayer::EPSILON, Some(vector))?;
                let gradients = LinearGradients {
                    weight: modulation_weight.as_mut(),
                    bias: modulation_bias.as_mut(),
                };
                let d_scale = d_scale.into_shape([layout.batch(), self.config.dim])?;
                linear_vectors_backward(
                    &d_scale,
                    c,
                    InputActivation::Silu,
                    &last.modulation_weight,
                    gradients,
                    dc,
                )?;
                Ok(wanted.then_some(dx))
            }
            _ => unreachable!("an output part keeps what is its own"),
        }
    }

    fn image_backward(&self, dx: &Tensor, image: &Tensor, layout: &Layout, slots: &mut [Slot]) -> Result<()> {
        if let (Some(lengths), Some(pad)) = (&layout.image_lengths, &mut slots[IMAGE_PAD]) {
            add_pad_row_sum(dx, lengths, pad)?;
        }
        let dx = narrow_tokens(dx, 0, layout.grid[0] * layout.grid[1])?;
        let [weight, bias] = &mut slots[PATCH] else {
            unreachable!("the patch projection has two parameters");
        };
        let gradients = LinearGradients {
            weight: weight.as_mut(),
            bias: bias.as_mut(),
        };
        patch_embed_backward(&dx, image, self.config.patch, gradients)
    }

    fn caption_backward(
        &self,
        dx: Tensor,
        (features, normalised): (Tensor, Tensor),
        layout: &Layout,
        slots: &mut [Slot],
    ) -> Result<()> {
        if let Some(pad) = &mut slots[CAPTION_PAD] {
            add_pad_row_sum(&dx, &layout.caption_lengths, pad)?;
        }
        let [norm, weight, bias] = &mut slots[CAPTION] else {
            unreachable!("the caption embedder has three parameters");
        };
        // What stands in the pads' places does not come from the projection.
        let nothing = Tensor::zeros(&self.device, [self.config.dim], dx.dtype())?;
        let mut dx = dx.into_unshared()?;
        fill_pad_tokens(&mut dx, &layout.caption_lengths, &nothing)?;
        let gradients = LinearGradients {
            weight: weight.as_mut(),
            bias: bias.as_mut(),
        };
        linear_backward_weight(&dx, &normalised, gradients)?;
        if let Some(norm) = norm {
            let d_normalised = linear_backward_input(&dx, &self.caption_weight)?;
            let spec = RmsNorm {
                weight: &self.caption_norm,
                scale: None,
                epsilon: self.config.norm_eps,
            };
            let gradients = NormGradients {
                weight: Some(norm),
                vector: None,
            };
            rms_norm_modulate_backward(&d_normalised, &features, &spec, None, gradients)?;
        }
        Ok(())
    }

    fn time_backward(&self, dc: &Tensor, [sinusoids, hidden]: [&Tensor; 2], slots: &mut [Slot]) -> Result<()> {
        let [weight, bias, second_weight, second_bias] = &mut slots[TIME] else {
            unreachable!("the timestep embedder has four parameters");
        };
        let mut d_hidden = Tensor::zeros(&self.device, hidden.shape(), DType::F32)?;
        let gradients = LinearGradients {
            weight: second_weight.as_mut(),
            bias: second_bias.as_mut(),
        };
        let (silu, none) = (InputActivation::Silu, InputActivation::None);
        linear_vectors_backward(dc, hidden, silu, &self.time.weights[1], gradients, Some(&mut d_hidden))?;
        let gradients = LinearGradients {
            weight: weight.as_mut(),
            bias: bias.as_mut(),
        };
        linear_vectors_backward(&d_hidden, sinusoids, none, &self.time.weights[0], gradients, None)
    }
}

/// The final layer's vector in a table of modulation vectors.
fn last_vector(table: &Tensor) -> Result<Modulation<'_>> {
    Modulation::new(table, table.dim(1) - 1)
}
