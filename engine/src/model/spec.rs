//! What a model is before anything of it is loaded.

use std::fmt;
use std::sync::Arc;

use serde_json::Value;

use super::denoiser::{Denoiser, Geometry, Trainable, TrainingChoice};
use super::detailer::DetailerLayout;
use super::text::Readout;
use super::work::Work;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::layers::{NamedParameter, ParamSource};

/// Told how many parameters are read, and how many there are; an error ends the loading.
pub type Loading<'a> = dyn FnMut(usize, usize) -> Result<()> + 'a;

/// The sizes and settings of a model of one family. Files are checked against it, plans are made from it, and models are loaded by it;
/// it needs no device.
pub trait Spec: fmt::Debug + Send + Sync {
    /// What the model takes and gives.
    fn geometry(&self) -> Geometry;

    /// Width of the caption features that it takes.
    fn caption_width(&self) -> usize;

    /// What it takes of a prompt from its text encoder.
    fn readout(&self) -> Readout {
        Readout::default()
    }

    /// How far sigmas are shifted for a picture of so many image tokens and so many steps, where its published schedule says so; `None`
    /// where one shift serves all.
    fn shift(&self, _image_tokens: usize, _steps: usize) -> Option<f32> {
        None
    }

    /// Tokens of images and of captions are padded to multiples of this many.
    fn token_multiple(&self) -> usize {
        1
    }

    /// Main blocks, of all kinds together.
    fn main_blocks(&self) -> usize;

    /// A pixel model's head.
    fn head(&self) -> Option<&DetailerLayout>;

    /// Every parameter, in the model's order.
    fn metas(&self) -> Vec<NamedParameter>;

    /// Name and shape of every tensor of its checkpoints, in the model's order.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let parts = self.metas().into_iter().flat_map(|meta| meta.parts);
        parts.map(|part| (part.name, part.shape)).collect()
    }

    /// Whether a tensor, of which it has none, is that of another patch size's or kind's input or output side: what a model made from
    /// it, or that it was made from, may have left in the same file.
    fn leaves_aside(&self, _name: &str) -> bool {
        false
    }

    /// Its sizes and settings, for reports that programs read.
    fn sizes(&self) -> Value;

    /// Its sizes in a line, for people.
    fn summary(&self) -> String;

    /// The `config.json` with which other programs read it.
    fn config_json(&self) -> Value;

    /// The pixel model of a patch that can be made from it: the same blocks with another input and a Detailer Head, whose stages'
    /// widths and bottleneck may be given.
    ///
    /// # Errors
    /// When the family has no such models, no head is known for the patch, or the widths do not fit it.
    fn pixel_model(
        &self,
        _patch: usize,
        _widths: Option<&[usize]>,
        _bottleneck: Option<usize>,
    ) -> Result<Arc<dyn Spec>> {
        Err(Error::invalid("no pixel model can be made from a model of this family"))
    }

    /// Sides of a picture are multiples of this many pixels, where a cell of the model's input stands for `cell` of them.
    fn size_multiple(&self, cell: usize) -> usize {
        let patch = self.geometry().patch * cell;
        match self.head() {
            Some(head) => least_common_multiple(patch, head.reduction()),
            None => patch,
        }
    }

    /// Whether its blocks can stay in host memory while it runs.
    fn streams(&self) -> bool {
        false
    }

    /// Refuses a device whose kernels cannot take the model's sizes.
    ///
    /// # Errors
    /// Naming the size at fault and the way out.
    fn ensure_runs_on(&self, device: &Device) -> Result<()>;

    /// Reads the model for sampling.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, the device's kernels cannot take its sizes, it has no room, or `loaded` says so.
    fn load(&self, params: &dyn ParamSource, device: &Device, loaded: &mut Loading<'_>) -> Result<Box<dyn Denoiser>>;

    /// Reads the model with places for the gradients of what `choice` trains.
    ///
    /// # Errors
    /// As [`Spec::load`], and those of the choice.
    fn load_trainable(
        &self,
        params: &dyn ParamSource,
        device: &Device,
        choice: &TrainingChoice<'_>,
        loaded: &mut Loading<'_>,
    ) -> Result<Box<dyn Trainable>>;

    /// What one item of this height and width (latent model: in latent cells) with a caption of so many tokens holds and computes.
    ///
    /// # Errors
    /// Those of the choice, and when the size is no multiple of the patch.
    fn work(&self, choice: &TrainingChoice<'_>, size: [usize; 2], caption_tokens: usize) -> Result<Work>;
}

fn least_common_multiple(a: usize, b: usize) -> usize {
    let greatest_common_divisor = {
        let (mut a, mut b) = (a, b);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    a / greatest_common_divisor.max(1) * b
}

#[cfg(test)]
mod tests {
    use super::least_common_multiple;

    #[test]
    fn sizes_fit_patches_and_poolings() {
        assert_eq!(least_common_multiple(160, 64), 320);
        assert_eq!(least_common_multiple(16, 16), 16);
    }
}
