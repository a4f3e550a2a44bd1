//! What a training run will hold and compute, by its sizes alone.
//!
//! Memory, with e bytes per element of the compute type (2 on CUDA, 4 on the CPU), P parameters, T of them trained, n tokens of a
//! stream over the whole batch:
//!
//! | tag | bytes |
//! | --- | --- |
//! | weights | e · P |
//! | gradients | e · T |
//! | optimizer | 8 · T for the moments, 4 · T for a master copy on CUDA, 4 · T for an average |
//! | saved | of each block that a gradient passes: e · n · (7 · dim + 2 · ffn) + 4 · n · heads, or e · n · dim if it is run again; of the head: every stage's skip, maxima, upsampled and decoded maps, and the sums before its activations unless all is run again |
//! | activations | the larger of what one block and what the head's outermost stage need at once |
//!
//! Arithmetic counts a multiplication with its addition as two. A matrix product of the forward pass returns once in the gradient
//! of its input, where a gradient passes, and once in that of its weight, where it is trained; attention has two products forward
//! and five backward.

use serde::Serialize;

use super::TrainOptions;
use super::trainable::choose;
use crate::error::{Error, Result};
use crate::layers::{Meta, Trained, metas, trained};
use crate::model::config::{DitConfig, ModelKind};
use crate::model::detailer::DetailerLayout;
use crate::model::zimage::block::{Block, Keep};
use crate::model::zimage::{Parts, Reach, TOKEN_MULTIPLE};

/// What a plan is made for.
#[derive(Clone, Copy, Debug)]
pub struct PlanInput<'a> {
    /// The transformer's sizes.
    pub config: &'a DitConfig,
    /// A pixel model's head.
    pub head: Option<&'a DetailerLayout>,
    /// What is trained, and how.
    pub options: &'a TrainOptions,
    /// Height and width of the images (latent model: latent cells).
    pub size: [usize; 2],
    /// Tokens of a caption.
    pub caption_tokens: usize,
    /// Items of a micro-batch.
    pub batch: usize,
    /// Whether it is to run on CUDA.
    pub cuda: bool,
}

/// Bytes by tag; see the module's head comment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PlannedMemory {
    /// The whole model.
    pub weights: u64,
    /// A gradient per trained parameter.
    pub gradients: u64,
    /// Moments, master copy, average.
    pub optimizer: u64,
    /// Kept by the forward pass.
    pub saved: u64,
    /// What lives within an operation or two.
    pub activations: u64,
    /// All of these at once.
    pub peak: u64,
}

/// Floating-point operations of one part of a micro-batch.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Arithmetic {
    /// The part.
    pub part: &'static str,
    /// Of the forward pass.
    pub forward: f64,
    /// Of the gradients of inputs.
    pub inputs: f64,
    /// Of the gradients of weights.
    pub weights: f64,
    /// Of what is computed a second time.
    pub again: f64,
}

impl Arithmetic {
    fn new(part: &'static str) -> Self {
        Arithmetic {
            part,
            ..Arithmetic::default()
        }
    }

    /// All operations.
    pub fn total(&self) -> f64 {
        self.forward + self.inputs + self.weights + self.again
    }

    /// Counts a product by a weight: forward, and backward where a gradient passes and where the weight is trained.
    fn product(&mut self, operations: f64, [passes, trained]: [bool; 2]) {
        self.forward += operations;
        self.inputs += if passes { operations } else { 0.0 };
        self.weights += if trained { operations } else { 0.0 };
    }
}

/// What a run will hold and compute.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TrainingPlan {
    /// Parameters that change.
    pub trained_parameters: u64,
    /// Parameters that do not.
    pub frozen_parameters: u64,
    /// Names of the trained tensors, in the model's order.
    pub trained: Vec<String>,
    /// Bytes by tag.
    pub memory: PlannedMemory,
    /// Operations of one micro-batch by part.
    pub arithmetic: Vec<Arithmetic>,
}

impl TrainingPlan {
    /// The plan of a run.
    ///
    /// # Errors
    /// When the policy does not suit the model, or the size is no multiple of the patch.
    pub fn new(input: &PlanInput<'_>) -> Result<Self> {
        let PlanInput {
            config, head, options, ..
        } = *input;
        let [height, width] = input.size;
        if config.patch == 0 || !height.is_multiple_of(config.patch) || !width.is_multiple_of(config.patch) {
            return Err(Error::invalid(format!(
                "an image of {width}x{height} cannot be cut into patches of {}",
                config.patch
            )));
        }
        let described = Parts::describe(config, head)?;
        let choice = choose(&described, &options.policy)?;
        let chosen = trained(&choice);
        let all = metas(&described);
        let elements = |metas: &mut dyn Iterator<Item = &&Meta>| metas.map(|meta| meta.elements() as u64).sum::<u64>();
        let changing: Vec<&Meta> = all
            .iter()
            .zip(&chosen)
            .filter_map(|(meta, chosen)| chosen.then_some(*meta))
            .collect();
        let (all, trained_parameters) = (elements(&mut all.iter()), elements(&mut changing.iter()));
        let counter = Counter {
            input,
            reach: Reach::new(&choice, &|trained| options.recompute.applies_to(trained)),
            choice,
        };
        Ok(TrainingPlan {
            trained_parameters,
            frozen_parameters: all - trained_parameters,
            trained: changing
                .iter()
                .flat_map(|meta| meta.parts.iter().map(|part| part.name.clone()))
                .collect(),
            memory: counter.memory(all, trained_parameters),
            arithmetic: counter.arithmetic(),
        })
    }

    /// Operations of one micro-batch.
    pub fn operations(&self) -> f64 {
        self.arithmetic.iter().map(Arithmetic::total).sum()
    }
}

/// A block of the model in the eyes of the plan.
struct PlannedBlock<'a> {
    /// Tokens of an item.
    tokens: usize,
    keep: Keep,
    trained: &'a Block<Trained>,
}

impl<'a> PlannedBlock<'a> {
    fn stack(blocks: &'a [Block<Trained>], keeps: &[Keep], tokens: usize) -> Vec<Self> {
        let blocks = blocks.iter().zip(keeps);
        blocks
            .map(|(trained, keep)| PlannedBlock {
                tokens,
                keep: *keep,
                trained,
            })
            .collect()
    }

    /// A gradient passes through it.
    fn reached(&self) -> bool {
        self.keep != Keep::Nothing
    }

    /// It is run a second time.
    fn again(&self) -> bool {
        self.keep == Keep::Input
    }
}

struct Counter<'a> {
    input: &'a PlanInput<'a>,
    choice: Parts<Trained>,
    reach: Reach,
}

impl Counter<'_> {
    /// The refiners' blocks, and the main blocks.
    fn blocks(&self) -> [Vec<PlannedBlock<'_>>; 2] {
        let (image, captions) = (self.image_tokens()[1], self.caption_tokens());
        let (choice, reach) = (&self.choice, &self.reach);
        let stack = PlannedBlock::stack;
        let mut refiners = stack(&choice.noise_refiner, &reach.noise_refiner, image);
        refiners.extend(stack(&choice.context_refiner, &reach.context_refiner, captions));
        [refiners, stack(&choice.layers, &reach.layers, image + captions)]
    }

    fn caption_tokens(&self) -> usize {
        self.input.caption_tokens.max(1).next_multiple_of(TOKEN_MULTIPLE)
    }

    /// Image tokens of an item, without and with pads.
    fn image_tokens(&self) -> [usize; 2] {
        let [height, width] = self.input.size.map(|extent| extent / self.input.config.patch);
        [height * width, (height * width).next_multiple_of(TOKEN_MULTIPLE)]
    }

    fn memory(&self, all: u64, trained: u64) -> PlannedMemory {
        let input = self.input;
        let element = if input.cuda { 2 } else { 4 };
        let copies = 2 + u64::from(input.cuda) + u64::from(input.options.ema_decay.is_some());
        let (weights, gradients, optimizer) = (element * all, element * trained, 4 * copies * trained);
        let (dim, ffn) = (input.config.dim as u64, input.config.ffn_hidden as u64);
        let inside = element * (6 * dim + 2 * ffn) + 4 * input.config.heads as u64;
        let (mut saved, mut block_needs) = (0, 0);
        for block in self.blocks().iter().flatten() {
            let tokens = (input.batch * block.tokens) as u64;
            if block.reached() {
                saved += tokens * (element * dim + if block.again() { 0 } else { inside });
            }
            // Two gradients of the stream beside the feed-forward network's, or the rotated heads, their gradient and the result's.
            let backward = element * (2 * dim + (2 * ffn).max(7 * dim));
            let again = if block.again() { inside } else { 0 };
            let forward = element * (2 * dim + (3 * ffn).max(6 * dim));
            block_needs = block_needs.max(tokens * if block.reached() { backward + again } else { forward });
        }
        let [height, width] = input.size;
        let pixels = (input.batch * height * width) as u64;
        let (head_saved, head_needs) = self.head_memory(element, pixels);
        saved += head_saved;
        let images = pixels * input.config.in_channels as u64 * (element + 4 + element);
        let activations = block_needs.max(head_needs) + images;
        PlannedMemory {
            weights,
            gradients,
            optimizer,
            saved,
            activations,
            peak: weights + gradients + optimizer + saved + activations,
        }
    }

    /// What the head keeps, and what its widest stage needs besides.
    fn head_memory(&self, element: u64, pixels: u64) -> (u64, u64) {
        let Some(head) = self.input.head else { return (0, 0) };
        let sums = u64::from(self.input.options.recompute != super::Recompute::All);
        let (mut saved, mut needs) = (0, 0);
        for (index, stage) in head.stages.iter().enumerate() {
            let here = element * (pixels >> (2 * index));
            let [skip, upsampled, outputs] = [stage.skip, stage.upsampled, stage.outputs].map(|width| width as u64);
            saved += here * (skip + skip / 4 + upsampled + outputs + sums * (skip + outputs));
            needs = needs.max(here * (2 * outputs + upsampled + 2 * skip));
        }
        (saved, needs)
    }

    fn arithmetic(&self) -> Vec<Arithmetic> {
        let input = self.input;
        let (config, batch) = (input.config, input.batch as f64);
        let (dim, ffn) = (config.dim as f64, config.ffn_hidden as f64);
        let mut embedders = Arithmetic::new("embedders");
        let [tokens, _] = self.image_tokens().map(|tokens| batch * tokens as f64);
        let features = (config.patch * config.patch * config.in_channels) as f64;
        embedders.product(2.0 * tokens * features * dim, [false, self.choice.patch.weight]);
        let caption = 2.0 * batch * self.caption_tokens() as f64 * config.caption_width as f64 * dim;
        let flags = [self.reach.caption_embedder, self.choice.caption.weight];
        embedders.product(caption, flags);
        let parts = [
            "refiners",
            "refiners' attention",
            "main blocks",
            "main blocks' attention",
        ];
        let [mut refiners, mut refiners_attention, mut main, mut main_attention] = parts.map(Arithmetic::new);
        let [refiner_blocks, main_blocks] = self.blocks();
        for (blocks, products, attention) in [
            (refiner_blocks, &mut refiners, &mut refiners_attention),
            (main_blocks, &mut main, &mut main_attention),
        ] {
            for block in blocks {
                let own = block.tokens as f64;
                let Block { qkv, out, w13, w2, .. } = block.trained;
                let sizes = [3.0 * dim * dim, dim * dim, 2.0 * dim * ffn, dim * ffn];
                for (size, layer) in sizes.into_iter().zip([qkv, out, w13, w2]) {
                    let operations = 2.0 * batch * own * size;
                    products.product(operations, [block.reached(), layer.weight]);
                    products.again += if block.again() { operations } else { 0.0 };
                }
                let operations = 4.0 * batch * own * own * dim;
                attention.forward += operations;
                attention.inputs += if block.reached() { 2.5 * operations } else { 0.0 };
                attention.again += if block.again() { operations } else { 0.0 };
            }
        }
        vec![
            embedders,
            refiners,
            refiners_attention,
            main,
            main_attention,
            self.output(tokens, features),
        ]
    }

    fn output(&self, tokens: f64, features: f64) -> Arithmetic {
        let (config, trained) = (self.input.config, self.reach.output);
        let flags = [self.reach.features || trained, trained];
        let mut output = Arithmetic::new(match config.kind {
            ModelKind::Latent => "final layer",
            ModelKind::Pixel => "detailer head",
        });
        let Some(head) = self.input.head else {
            output.product(2.0 * tokens * config.dim as f64 * features, flags);
            return output;
        };
        let [height, width] = self.input.size;
        let pixels = (self.input.batch * height * width) as f64;
        let again = self.input.options.recompute == super::Recompute::All && (flags[0] || flags[1]);
        for (index, stage) in head.stages.iter().enumerate() {
            let here = 2.0 * pixels / 4f64.powi(index as i32);
            let encoder = here * 9.0 * (stage.inputs * stage.skip) as f64;
            let up = here * 9.0 * (stage.below * stage.upsampled) as f64;
            let decoder = here * 9.0 * ((stage.upsampled + stage.skip) * stage.outputs) as f64;
            // The image needs no gradient.
            output.product(encoder, [trained && index > 0, trained]);
            output.product(up, flags);
            output.product(decoder, flags);
            output.again += if again { encoder + decoder } else { 0.0 };
        }
        let bottom = pixels / (head.reduction() * head.reduction()) as f64;
        let joined = head.stages.last().map_or(0, |stage| stage.skip) + head.context;
        let bottleneck = 2.0 * bottom * (joined * head.bottleneck) as f64;
        output.product(bottleneck, flags);
        output.again += if again { bottleneck } else { 0.0 };
        let last = head.stages.first().map_or(head.bottleneck, |stage| stage.outputs);
        output.product(2.0 * pixels * (3 * last) as f64, flags);
        output
    }
}
