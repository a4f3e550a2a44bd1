//! Euler sampling with classifier-free guidance.

use super::schedule::Schedule;
use crate::error::{Error, Result};
use crate::model::dit::{Dit, Prepared};
use crate::ops::cast::cast;
use crate::ops::guidance::{Guidance, guided_euler_step};
use crate::profile;
use crate::tensor::Tensor;

/// Modulation tables are made for at most this many steps at once, which bounds their memory.
const STEPS_PER_TABLE: usize = 16;

/// What the pictures follow.
pub struct Conditioning {
    /// The captions to follow.
    pub prompt: Prepared,
    /// With guidance, the captions to move away from and the strength: two passes per step instead of one,
    /// `v = v_negative + cfg · (v_prompt − v_negative)`.
    pub negative: Option<(Prepared, f32)>,
}

/// Told after each step.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// Steps done.
    pub done: usize,
    /// Steps in all.
    pub steps: usize,
}

/// Walks `noise` `[batch, height, width, channels]` (f32, at sigma 1) down `schedule` and returns the image (latent model: latent).
/// `progress` is called after each step is submitted; an error from it ends the walk.
///
/// # Errors
/// When shapes do not fit, the device has no room, or `progress` says so.
pub fn sample(
    dit: &Dit,
    conditioning: &Conditioning,
    schedule: &Schedule,
    noise: Tensor,
    progress: &mut dyn FnMut(StepReport) -> Result<()>,
) -> Result<Tensor> {
    let _range = profile::range(c"denoise");
    let times = schedule.times();
    let mut x = noise;
    let mut tables = None;
    for step in 0..schedule.steps() {
        let _range = profile::range(c"step");
        if step % STEPS_PER_TABLE == 0 {
            tables = Some(dit.modulate(&times[step..times.len().min(step + STEPS_PER_TABLE)])?);
        }
        let tables = tables
            .as_ref()
            .ok_or_else(|| Error::invalid("a step without modulation"))?;
        let modulations = tables.narrow(step % STEPS_PER_TABLE, 1)?;
        let image = cast(&x, dit.device().compute_dtype())?;
        let velocity = dit.forward(&image, &conditioning.prompt, &modulations)?;
        let away = match &conditioning.negative {
            Some((negative, cfg)) => Some((dit.forward(&image, negative, &modulations)?, *cfg)),
            None => None,
        };
        drop(image);
        let guidance = away.as_ref().map(|(negative, cfg)| Guidance { negative, cfg: *cfg });
        guided_euler_step(&mut x, &velocity, guidance, schedule.delta(step))?;
        progress(StepReport {
            done: step + 1,
            steps: schedule.steps(),
        })?;
    }
    Ok(x)
}
