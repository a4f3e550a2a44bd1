//! The transformer with places for gradients.

use std::sync::Mutex;

use super::backward::{GradPlan, Order};
use super::layout::RopeTables;
use super::{Dit, Parts, ZImage};
use crate::device::{Device, MemoryTag};
use crate::error::Result;
use crate::layers::{
    Choose, Gradients, MakeSlots, Module, NamedParameter, ParamSource, Slot, slots, slots_mut, tensors, tensors_mut,
    trained,
};
use crate::lock::lock;
use crate::model::denoiser::{Denoiser, Finished, LossGradient, Noisy, Trainable, TrainingChoice};
use crate::tensor::Tensor;

/// Bytes of rotary tables that are kept for sequences met again.
const ROPE_TABLE_BYTES: usize = 256 << 20;

/// A transformer that is trained.
pub(super) struct TrainedDit {
    dit: Dit,
    gradients: Parts<Gradients>,
    reach: GradPlan,
    order: Order,
    keep_sums: bool,
    tables: Mutex<RopeTables>,
}

impl TrainedDit {
    /// Reads a model as [`Dit::load`] does, and makes room for gradients.
    ///
    /// # Errors
    /// As for [`Dit::load`], and those of the choice.
    pub fn load(
        spec: &ZImage,
        params: &dyn ParamSource,
        device: &Device,
        choice: &TrainingChoice<'_>,
        loaded: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<Self> {
        let chosen = spec
            .describe()?
            .transform(&mut Choose(|meta: &NamedParameter| (choice.trains)(meta)))?;
        let dit = Dit::load(spec, params, device, loaded)?;
        let _tag = MemoryTag::Gradients.scope();
        let gradients = dit.parts.transform(&mut MakeSlots(trained(&chosen).into_iter()))?;
        Ok(TrainedDit {
            order: Order::new(&gradients),
            gradients,
            reach: GradPlan::new(&chosen, choice.recomputes),
            keep_sums: choice.keep_sums,
            tables: Mutex::new(RopeTables::new(&spec.config, device, ROPE_TABLE_BYTES)),
            dit,
        })
    }
}

impl Trainable for TrainedDit {
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
        let ready = {
            let mut tables = lock(&self.tables);
            self.dit.ready(noisy.captions, size, &mut tables)?
        };
        let modulations = self.dit.modulate(noisy.times, None)?;
        self.dit.forward(noisy.image, &ready.prepared(), &modulations)
    }

    fn accumulate(&mut self, noisy: Noisy<'_>, loss: &mut LossGradient<'_>, finished: &mut Finished<'_>) -> Result<()> {
        let tables = self.tables.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        let Noisy { image, captions, times } = noisy;
        let (velocity, saved) = self
            .dit
            .forward_saving(image, captions, times, &self.reach, self.keep_sums, tables)?;
        let gradient = loss(&velocity)?;
        drop(velocity);
        let reach = (&self.reach, &self.order);
        self.dit
            .backward(&gradient, saved, &mut self.gradients, reach, finished)
    }

    fn finish_order(&self) -> Vec<usize> {
        self.order.all.clone()
    }
}
