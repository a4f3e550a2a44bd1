//! Euler sampling with classifier-free guidance.
//!
//! The host submits a step while the GPU computes the one before, and never more than that: a step that was submitted waits
//! for the one before it to be done. So the GPU never idles between steps, progress tells what is done and not what is queued,
//! and stopping takes no longer than the step that is running.

use std::collections::VecDeque;

use super::schedule::Schedule;
use crate::device::Marker;
use crate::error::{Error, Result};
use crate::model::dit::{Dit, Prepared};
use crate::ops::cast::cast;
use crate::ops::guidance::{Guidance, guided_euler_step};
use crate::profile;
use crate::tensor::Tensor;

/// Modulation tables are made for at most this many steps at once, which bounds their memory.
const STEPS_PER_TABLE: usize = 16;

/// Steps that may be submitted and not done when the host goes on to submit the next one.
const QUEUED_STEPS: usize = 1;

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
/// `progress` is called when a step is done, in order; an error from it ends the walk.
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
    let mut queue = Queue::new(schedule.steps());
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
        queue.push(dit.device().marker()?);
        queue.drain(QUEUED_STEPS, progress)?;
    }
    queue.drain(0, progress)?;
    Ok(x)
}

/// The steps that were submitted and not yet reported.
struct Queue {
    markers: VecDeque<Marker>,
    report: StepReport,
}

impl Queue {
    fn new(steps: usize) -> Self {
        Queue {
            markers: VecDeque::with_capacity(QUEUED_STEPS + 1),
            report: StepReport { done: 0, steps },
        }
    }

    fn push(&mut self, marker: Marker) {
        self.markers.push_back(marker);
    }

    /// Reports the steps that are done, and waits for all but the last `queued` ones.
    fn drain(&mut self, queued: usize, progress: &mut dyn FnMut(StepReport) -> Result<()>) -> Result<()> {
        while let Some(marker) = self.markers.front() {
            if self.markers.len() > queued {
                marker.wait()?;
            } else if !marker.is_reached()? {
                break;
            }
            self.markers.pop_front();
            self.report.done += 1;
            progress(self.report)?;
        }
        Ok(())
    }
}
