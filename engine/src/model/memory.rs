//! The memory that a pass through a model takes, by its sizes alone: the one place where bytes of activations are counted, for what
//! is said before sampling and before training. With e bytes per element of the compute type, for B items of n tokens, p pixels
//! (latent model: latent cells) of c channels, a head whose stage k, from the image inwards, has skips of wₖ, upsampled maps of uₖ and
//! results of oₖ channels:
//!
//! | part | bytes |
//! | --- | --- |
//! | a step's blocks | the most that one holds at once, e · B · n times what its family says ([`super::work::BlockElements`]) |
//! | a step's head | e · B · (p · (Σ wₖ/4ᵏ + 2·o₀) + n · dim): every skip, at full size the map before and after a convolution, and the tokens |
//! | a step's pictures | 3 · 4 · B · p · c: picture, prediction and guidance's second prediction in f32 |
//! | saved for backward | of each block that a gradient passes its input, and what is inside unless it is run again; of the head e · B · Σ p/4ᵏ · (wₖ + wₖ/4 + uₖ + oₖ), and wₖ + oₖ more with the sums before activations |
//! | beside it | the larger of what one block and what the head's widest stage need at once, e · B · p/4ᵏ · (2·oₖ + uₖ + 2·wₖ), and B · p · c · (2·e + 4) for pictures |
//!
//! All is counted in f64, in which nothing overflows; [`bytes`] makes whole numbers of it.

use super::detailer::DetailerLayout;
use super::spec::Spec;
use super::work::Work;

/// A pass of some items through a model.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// The model.
    pub spec: &'a dyn Spec,
    /// What an item holds and computes.
    pub work: &'a Work,
    /// Height and width of an item (latent model: latent cells).
    pub size: [usize; 2],
    /// Items.
    pub batch: usize,
    /// Bytes per element of the compute type.
    pub element: usize,
}

/// Bytes of a training step beside weights, gradients and the optimizer's state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainingPass {
    /// Kept by the forward pass.
    pub saved: f64,
    /// What lives within an operation or two.
    pub activations: f64,
}

/// As a number of 64 bits, or the most of these.
pub fn bytes(exact: f64) -> u64 {
    exact as u64
}

impl Pass<'_> {
    /// Elements of one channel over all items.
    fn pixels(&self) -> f64 {
        self.batch as f64 * self.size[0] as f64 * self.size[1] as f64
    }

    fn image(&self) -> f64 {
        self.pixels() * self.spec.geometry().channels as f64
    }

    /// Bytes of a sampling step beside the weights.
    pub fn sampling(&self) -> f64 {
        let (element, batch) = (self.element as f64, self.batch as f64);
        let blocks = self.work.stacks.iter().flat_map(|stack| &stack.blocks);
        let step = blocks.map(|block| element * batch * block.tokens * block.elements.forward as f64);
        let last = self.work.stacks.iter().rev().find_map(|stack| stack.blocks.last());
        let tokens = last.map_or(0.0, |block| batch * block.tokens * block.elements.input as f64);
        let head = self.spec.head().map_or(0.0, |head| {
            let skips = maps(head, |stage| stage.skip as f64);
            let full = head.stages.first().map_or(0.0, |stage| stage.outputs as f64);
            element * (self.pixels() * (skips + 2.0 * full) + tokens)
        });
        step.fold(head, f64::max) + 3.0 * 4.0 * self.image()
    }

    /// Bytes of a training step; with `keep_sums` the head keeps what its activations read.
    pub fn training(&self, keep_sums: bool) -> TrainingPass {
        let (element, batch) = (self.element as f64, self.batch as f64);
        let (mut saved, mut most) = (0.0, 0.0_f64);
        for block in self.work.stacks.iter().flat_map(|stack| &stack.blocks) {
            let (tokens, elements) = (batch * block.tokens, block.elements);
            let inside = element * elements.inside as f64 + 4.0 * elements.inside_f32 as f64;
            let again = if block.keep.again() { inside } else { 0.0 };
            if block.keep.reached() {
                saved += tokens * (element * elements.input as f64 + inside - again);
                most = most.max(tokens * (element * elements.backward as f64 + again));
            } else {
                most = most.max(tokens * element * elements.forward as f64);
            }
        }
        if let Some(head) = self.spec.head() {
            let sums = f64::from(u8::from(keep_sums));
            saved += element
                * self.pixels()
                * maps(head, |stage| {
                    let [skip, upsampled, outputs] =
                        [stage.skip, stage.upsampled, stage.outputs].map(|width| width as f64);
                    skip * 1.25 + upsampled + outputs + sums * (skip + outputs)
                });
            for (index, stage) in head.stages.iter().enumerate() {
                let here = element * self.pixels() / 4_f64.powi(index as i32);
                most = most.max(here * (2 * stage.outputs + stage.upsampled + 2 * stage.skip) as f64);
            }
        }
        TrainingPass {
            saved,
            activations: most + self.image() * (2.0 * element + 4.0),
        }
    }
}

/// Elements of the maps of all stages per pixel of the image.
fn maps(head: &DetailerLayout, channels: impl Fn(&super::detailer::StageLayout) -> f64) -> f64 {
    let stages = head.stages.iter().enumerate();
    stages
        .map(|(index, stage)| channels(stage) / 4_f64.powi(index as i32))
        .sum()
}
