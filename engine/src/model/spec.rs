//! What a model is before anything of it is loaded.

use std::fmt;

use super::denoiser::{Denoiser, Geometry, Trainable, TrainingChoice};
use super::detailer::DetailerLayout;
use super::work::Work;
use crate::device::Device;
use crate::error::Result;
use crate::layers::{Meta, ParamSource};

/// Told how many parameters are read, and how many there are; an error ends the loading.
pub type Loading<'a> = dyn FnMut(usize, usize) -> Result<()> + 'a;

/// The sizes and settings of a model of one family. Files are checked against it, plans are made from it, and models are loaded by it;
/// it needs no device.
pub trait Spec: fmt::Debug + Send + Sync {
    /// What the model takes and gives.
    fn geometry(&self) -> Geometry;

    /// Width of the caption features that it takes.
    fn caption_width(&self) -> usize;

    /// Main blocks, of all kinds together.
    fn main_blocks(&self) -> usize;

    /// A pixel model's head.
    fn head(&self) -> Option<&DetailerLayout>;

    /// Every parameter, in the model's order.
    fn metas(&self) -> Vec<Meta>;

    /// Refuses a device whose kernels cannot take the model's sizes.
    ///
    /// # Errors
    /// Naming the size at fault and the way out.
    fn expect_runs_on(&self, device: &Device) -> Result<()>;

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
