//! A transformer with what training adds to it.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::ParamSource;
use crate::model::config::DitConfig;
use crate::model::dit::Dit;
use crate::tensor::Tensor;
use crate::train::TrainOptions;

/// One micro-batch.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Pictures in [−1, 1], or normalised latents: f32 `[batch, height, width, channels]` on the model's device.
    pub images: &'a Tensor,
    /// Standard normal noise, f32, of the same shape.
    pub noise: &'a Tensor,
    /// The noise level of each item, 0 (image) to 1 (noise).
    pub sigmas: &'a [f32],
    /// The caption features of each item, `[1, tokens, width]` in the device's compute type, real tokens only.
    pub captions: &'a [&'a Tensor],
}

/// What [`TrainableDit::step`] did, still on the device.
#[derive(Clone, Debug)]
pub struct StepNorm {
    /// f32 `[2]`: the norm of all gradients before clipping, and 1 where the step was skipped because it is not finite.
    pub values: Tensor,
}

impl StepNorm {
    /// The norm, and whether the step was skipped. Waits for the device.
    ///
    /// # Errors
    /// When the work so far failed.
    pub fn read(&self) -> Result<(f32, bool)> {
        let values = self.values.to_vec::<f32>()?;
        Ok((values[0], values[1] != 0.0))
    }
}

/// What is kept of a trained tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatePart {
    /// The weight that the model computes with.
    Weight,
    /// The f32 weight that the optimizer changes; on the CPU the weight itself.
    Master,
    /// The running mean of the gradient.
    FirstMoment,
    /// The running mean of the gradient's square.
    SecondMoment,
    /// The running average of the weight.
    Ema,
}

/// A trained tensor as it stands in checkpoints: stacked projections are taken apart.
pub struct TrainedTensor<'a> {
    /// The canonical name.
    pub name: String,
    /// The shape in checkpoints.
    pub shape: Vec<usize>,
    owner: &'a TrainableDit,
}

impl TrainedTensor<'_> {
    /// The values on the host, in the checkpoint's order of axes; `None` for an average that is not kept. Waits for the
    /// device.
    ///
    /// # Errors
    /// When the work so far failed.
    pub fn read(&self, part: StatePart) -> Result<Option<Vec<f32>>> {
        let _ = (part, self.owner);
        Err(Error::invalid("unfinished"))
    }
}

/// One tensor of the optimizer's state: `master.…`, `first_moment.…`, `second_moment.…`, `ema.…` of a canonical name.
pub struct StateTensor<'a> {
    /// The name in the state.
    pub name: String,
    /// The shape.
    pub shape: Vec<usize>,
    owner: &'a TrainableDit,
}

impl StateTensor<'_> {
    /// The values on the host. Waits for the device.
    ///
    /// # Errors
    /// When the work so far failed.
    pub fn read(&self) -> Result<Vec<f32>> {
        let _ = self.owner;
        Err(Error::invalid("unfinished"))
    }
}

/// A transformer, the gradients of its trained tensors, and the optimizer's state.
pub struct TrainableDit {
    dit: Dit,
}

impl TrainableDit {
    /// Reads a model's parameters as [`Dit::load`] does, and makes room for gradients and state.
    ///
    /// # Errors
    /// As for [`Dit::load`]; when the policy trains nothing, or only a part of projections that are stacked.
    pub fn load(
        params: &dyn ParamSource,
        device: &Device,
        config: &DitConfig,
        options: &TrainOptions,
        loaded: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<Self> {
        let _ = options;
        Ok(TrainableDit {
            dit: Dit::load(params, device, config, loaded)?,
        })
    }

    /// Adds the gradients of `weight` · loss of a micro-batch; `weight` is 1 / micro-batches of a step. Returns the loss
    /// itself, f32 `[1]` on the device.
    ///
    /// # Errors
    /// When shapes do not fit or the device has no room.
    pub fn accumulate(&mut self, batch: &Batch<'_>, weight: f32) -> Result<Tensor> {
        let _ = (batch, weight);
        Err(Error::invalid("unfinished"))
    }

    /// The loss of a batch, f32 `[1]` on the device, without gradients.
    ///
    /// # Errors
    /// As for [`TrainableDit::accumulate`].
    pub fn evaluate(&self, batch: &Batch<'_>) -> Result<Tensor> {
        let _ = batch;
        Err(Error::invalid("unfinished"))
    }

    /// Changes the trained weights by the gradients gathered since the last step, and sets the gradients to zero.
    ///
    /// # Errors
    /// When the device refuses the work.
    pub fn step(&mut self, learning_rate: f32) -> Result<StepNorm> {
        let _ = learning_rate;
        Err(Error::invalid("unfinished"))
    }

    /// The model, for sampling.
    pub fn dit(&self) -> &Dit {
        &self.dit
    }

    /// The trained tensors under their canonical names, sorted.
    pub fn trained(&self) -> Vec<TrainedTensor<'_>> {
        Vec::new()
    }

    /// All that [`TrainableDit::restore_state`] needs but the number of steps.
    pub fn state_tensors(&self) -> Vec<StateTensor<'_>> {
        Vec::new()
    }

    /// Puts back what [`TrainableDit::state_tensors`] gave: `read(name, shape)` gives the values of each, and `steps` is the
    /// number of steps they were made by. Weights follow from their masters. Continues bit for bit.
    ///
    /// # Errors
    /// Those of `read`, and when it gives another number of values.
    pub fn restore_state(
        &mut self,
        steps: u64,
        read: &mut dyn FnMut(&str, &[usize]) -> Result<Vec<f32>>,
    ) -> Result<()> {
        let _ = (steps, read);
        Err(Error::invalid("unfinished"))
    }

    /// Calls of [`TrainableDit::step`] so far, skipped steps included.
    pub fn steps(&self) -> u64 {
        0
    }
}
