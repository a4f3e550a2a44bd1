//! What a training run will hold and compute, by its sizes alone.
//!
//! Memory, with e bytes per element of the compute type (2 on CUDA, 4 on the CPU), P parameters, T of them trained:
//!
//! | tag | bytes |
//! | --- | --- |
//! | weights | e · P; of blocks that are not trained 1 for a weight in eight bits |
//! | gradients | e · T |
//! | optimizer | 8 · T for the moments, 4 · T for a master copy on CUDA, 4 · T for an average; of N ranks that divide it each holds one N-th |
//! | exchange | with N ranks: 4 · T / N for sums of gradients (and 4 · T where nothing is divided), and what is on its way |
//! | saved, activations | see [`crate::model::memory`] |
//!
//! Arithmetic counts a multiplication with its addition as two. A matrix product of the forward pass returns once in the gradient
//! of its input, where a gradient passes, and once in that of its weight, where it is trained; attention has two products forward
//! and five backward.

use serde::Serialize;

use super::trainable::choose;
use super::{Division, Recompute, TrainOptions};
use crate::error::Result;
use crate::layers::NamedParameter;
use crate::model::Spec;
use crate::model::detailer::DetailerLayout;
use crate::model::memory::{Pass, bytes};
use crate::model::work::{OutputWork, ProductWork, Work};

/// What a plan is made for.
#[derive(Clone, Copy, Debug)]
pub struct PlanInput<'a> {
    /// The model.
    pub spec: &'a dyn Spec,
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
    /// The ranks that share the work; sizes are those of one of them.
    pub division: Division,
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
    /// What several ranks send each other.
    pub exchange: u64,
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

    /// Counts a product over so many rows: forward, backward where a gradient passes and where the weight is trained, and once more
    /// where it is run again.
    fn product(&mut self, rows: f64, product: ProductWork, again: bool) {
        let operations = 2.0 * rows * product.size;
        self.forward += operations;
        self.inputs += if product.passes { operations } else { 0.0 };
        self.weights += if product.trained { operations } else { 0.0 };
        self.again += if again { operations } else { 0.0 };
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
        let PlanInput { spec, options, .. } = *input;
        let metas = spec.metas();
        let changing = choose(&metas, &options.policy)?.into_iter().map(|index| &metas[index]);
        let elements =
            |metas: &mut dyn Iterator<Item = &NamedParameter>| metas.map(|meta| meta.elements() as u64).sum::<u64>();
        let (all, trained_parameters) = (elements(&mut metas.iter()), elements(&mut changing.clone()));
        let work = options.with_choice(|choice| spec.work(choice, input.size, input.caption_tokens))?;
        let largest = changing.clone().map(|meta| meta.elements() as u64).max().unwrap_or(0);
        let weights = options.trunk_of(&metas)?.bytes(&metas, if input.cuda { 2 } else { 4 });
        let counter = Counter { input, work };
        Ok(TrainingPlan {
            trained_parameters,
            frozen_parameters: all - trained_parameters,
            trained: changing
                .flat_map(|meta| meta.parts.iter().map(|part| part.name.clone()))
                .collect(),
            memory: counter.memory(weights, trained_parameters, largest),
            arithmetic: counter.arithmetic(),
        })
    }

    /// Operations of one micro-batch.
    pub fn operations(&self) -> f64 {
        self.arithmetic.iter().map(Arithmetic::total).sum()
    }
}

struct Counter<'a> {
    input: &'a PlanInput<'a>,
    work: Work,
}

impl Counter<'_> {
    fn memory(&self, weights: f64, trained: u64, largest: u64) -> PlannedMemory {
        let input = self.input;
        let element = if input.cuda { 2 } else { 4 };
        let pass = Pass {
            spec: input.spec,
            work: &self.work,
            size: input.size,
            batch: input.batch,
            element,
        };
        let pass = pass.training(input.options.recompute != Recompute::All);
        let element = element as u64;
        let copies = 2 + u64::from(input.cuda) + u64::from(input.options.ema_decay.is_some());
        let (weights, gradients) = (bytes(weights), element * trained);
        let optimizer = 4 * copies * input.division.kept(trained);
        let exchange = input.division.exchange_bytes(trained, element, largest);
        let (saved, activations) = (bytes(pass.saved), bytes(pass.activations));
        PlannedMemory {
            weights,
            gradients,
            optimizer,
            exchange,
            saved,
            activations,
            peak: weights + gradients + optimizer + exchange + saved + activations,
        }
    }

    fn arithmetic(&self) -> Vec<Arithmetic> {
        let batch = self.input.batch as f64;
        let mut embedders = Arithmetic::new("embedders");
        for work in &self.work.embedders {
            embedders.product(batch * work.rows, work.product, false);
        }
        let mut all = vec![embedders];
        for stack in &self.work.stacks {
            let [mut products, mut attention] = stack.names.map(Arithmetic::new);
            for block in &stack.blocks {
                let own = block.tokens;
                for product in &block.products {
                    products.product(batch * own, *product, block.keep.again());
                }
                let operations = 4.0 * batch * own * own * block.attention_width as f64;
                attention.forward += operations;
                attention.inputs += if block.keep.reached() { 2.5 * operations } else { 0.0 };
                attention.again += if block.keep.again() { operations } else { 0.0 };
            }
            all.extend([products, attention]);
        }
        all.push(self.output());
        all
    }

    fn output(&self) -> Arithmetic {
        match (&self.work.output, self.input.spec.head()) {
            (OutputWork::Head { passes, trained }, Some(head)) => self.head(head, *passes || *trained, *trained),
            (OutputWork::FinalLayer(work), _) => {
                let mut output = Arithmetic::new("final layer");
                output.product(self.input.batch as f64 * work.rows, work.product, false);
                output
            }
            (OutputWork::Head { .. }, None) => Arithmetic::new("detailer head"),
        }
    }

    fn head(&self, head: &DetailerLayout, passes: bool, trained: bool) -> Arithmetic {
        let mut output = Arithmetic::new("detailer head");
        let [height, width] = self.input.size;
        let pixels = (self.input.batch * height * width) as f64;
        let again = self.input.options.recompute == Recompute::All && passes;
        let product = |size: usize, passes| ProductWork {
            size: size as f64,
            passes,
            trained,
        };
        for (index, stage) in head.stages.iter().enumerate() {
            let here = pixels / 4f64.powi(index as i32);
            // The image needs no gradient.
            let encoder = product(9 * stage.inputs * stage.skip, trained && index > 0);
            output.product(here, encoder, again);
            output.product(here, product(9 * stage.below * stage.upsampled, passes), false);
            let joined = stage.upsampled + stage.skip;
            output.product(here, product(9 * joined * stage.outputs, passes), again);
        }
        let bottom = pixels / (head.reduction() * head.reduction()) as f64;
        let joined = head.stages.last().map_or(0, |stage| stage.skip) + head.context;
        output.product(bottom, product(joined * head.bottleneck, passes), again);
        let last = head.stages.first().map_or(head.bottleneck, |stage| stage.outputs);
        output.product(pixels, product(3 * last, passes), false);
        output
    }
}
