//! Euler sampling with classifier-free guidance.
//!
//! The host submits a step while the GPU computes the one before, then waits for that one to be done; it never runs further
//! ahead. So the GPU does not idle between steps, progress tells what is done and not what is queued, and stopping takes no
//! longer than the step that is running.
//!
//! On CUDA the first step runs call by call, which loads every kernel; the second is recorded and replayed for all others,
//! with the step's own modulation vectors and Δσ copied to fixed addresses. `L2P_GRAPH=0` turns recording off.

use std::collections::VecDeque;
use std::sync::Arc;

use super::schedule::Schedule;
use crate::device::{CudaDevice, Device, Graph, Marker};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::{Denoiser, Modulations, Prepared};
use crate::ops::cast::cast;
use crate::ops::conv::Canvas;
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
    model: &dyn Denoiser,
    conditioning: &Conditioning,
    schedule: &Schedule,
    noise: Tensor,
    progress: &mut dyn FnMut(StepReport) -> Result<()>,
) -> Result<Tensor> {
    let _range = profile::range(c"denoise");
    let mut walk = Walk::new(model, conditioning, schedule, noise)?;
    let mut queue = Queue::new(schedule.steps());
    for _ in 0..schedule.steps() {
        walk.advance()?;
        queue.push(model.device().marker()?);
        queue.drain(QUEUED_STEPS, progress)?;
    }
    queue.drain(0, progress)?;
    Ok(walk.finish())
}

/// A walk down a schedule, step by step; [`sample`] for those who have to look at each step.
pub struct Walk<'a> {
    model: &'a dyn Denoiser,
    conditioning: &'a Conditioning,
    /// The model's time and the change of sigma of each step; the latter f32 `[steps]`.
    times: Vec<f32>,
    deltas: Tensor,
    /// Of this step and some that follow.
    tables: Modulations,
    state: State,
    recording: Recording,
    /// The next step.
    step: usize,
}

impl<'a> Walk<'a> {
    /// A walk from `noise` on; see [`sample`].
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(
        model: &'a dyn Denoiser,
        conditioning: &'a Conditioning,
        schedule: &Schedule,
        noise: Tensor,
    ) -> Result<Self> {
        let times = schedule.times();
        let deltas: Vec<f32> = (0..schedule.steps()).map(|step| schedule.delta(step)).collect();
        let tables = model.modulate(&times[..times.len().min(STEPS_PER_TABLE)], None)?;
        Ok(Walk {
            deltas: Tensor::from_slice(model.device(), &deltas, [deltas.len()])?,
            state: State {
                modulations: tables.narrow(0, 1)?.duplicate()?,
                delta: Tensor::empty(model.device(), [1], DType::F32)?,
                x: noise,
            },
            recording: Recording::new(model.device(), schedule.steps()),
            model,
            conditioning,
            times,
            tables,
            step: 0,
        })
    }

    /// Runs every step call by call, so that its operations can be told apart.
    pub fn unrecorded(self) -> Self {
        Walk {
            recording: Recording::Off,
            ..self
        }
    }

    /// Submits the next step.
    ///
    /// # Errors
    /// When shapes do not fit, the device has no room, or the last step has been submitted.
    pub fn advance(&mut self) -> Result<()> {
        let _range = profile::range(c"step");
        let step = self.step;
        if step >= self.times.len() {
            return Err(Error::invalid(format!("all {step} steps are done")));
        }
        if step > 0 && step.is_multiple_of(STEPS_PER_TABLE) {
            let end = self.times.len().min(step + STEPS_PER_TABLE);
            self.tables = self.model.modulate(&self.times[step..end], None)?;
        }
        let state = &mut self.state;
        state
            .modulations
            .copy_from(&self.tables.narrow(step % STEPS_PER_TABLE, 1)?)?;
        state.delta.copy_from(&self.deltas.narrow(step, 1)?)?;
        self.recording.run(step, || state.step(self.model, self.conditioning))?;
        self.step += 1;
        Ok(())
    }

    /// The picture (latent model: latent) after the steps submitted so far.
    pub fn finish(self) -> Tensor {
        self.state.x
    }
}

/// What a step reads and writes; all at addresses that stay the same from step to step.
struct State {
    /// The picture on its way, f32.
    x: Tensor,
    /// The step's modulation vectors.
    modulations: Modulations,
    /// The step's change of sigma, `[1]`.
    delta: Tensor,
}

impl State {
    /// Moves the picture by one step.
    fn step(&mut self, model: &dyn Denoiser, conditioning: &Conditioning) -> Result<()> {
        let image = cast(&self.x, model.device().compute_dtype())?;
        if model.paints() {
            return self.paint(model, conditioning, &image);
        }
        let velocity = model.forward(&image, &conditioning.prompt, &self.modulations)?;
        let away = match &conditioning.negative {
            Some((negative, cfg)) => Some((model.forward(&image, negative, &self.modulations)?, *cfg)),
            None => None,
        };
        drop(image);
        let guidance = away.as_ref().map(|(negative, cfg)| Guidance { negative, cfg: *cfg });
        guided_euler_step(&mut self.x, &velocity, guidance, &self.delta)
    }

    /// The same where each pass adds its share to the picture itself: with guidance, `cfg` times the one velocity and
    /// `1 − cfg` times the other.
    fn paint(&mut self, model: &dyn Denoiser, conditioning: &Conditioning, image: &Tensor) -> Result<()> {
        let negative = conditioning.negative.as_ref();
        let strength = negative.map_or(1.0, |(_, cfg)| *cfg);
        let passes = [(&conditioning.prompt, strength)];
        for (prepared, scale) in passes
            .into_iter()
            .chain(negative.map(|(prepared, cfg)| (prepared, 1.0 - cfg)))
        {
            let canvas = Canvas {
                picture: &mut self.x,
                scale,
                delta: Some(&self.delta),
            };
            model.paint(image, prepared, &self.modulations, canvas)?;
        }
        Ok(())
    }
}

/// A step's work, recorded when it is met for the second time.
enum Recording {
    /// Every step runs call by call.
    Off,
    /// Nothing is recorded yet.
    Pending(Arc<CudaDevice>),
    /// Steps are replayed.
    Ready(Graph),
}

impl Recording {
    fn new(device: &Device, steps: usize) -> Self {
        let wanted = !std::env::var("L2P_GRAPH").is_ok_and(|value| value == "0");
        match device {
            // Two steps would not pay for a recording.
            Device::Cuda(device) if wanted && steps > 2 => Recording::Pending(device.clone()),
            _ => Recording::Off,
        }
    }

    fn run(&mut self, step: usize, work: impl FnOnce() -> Result<()>) -> Result<()> {
        match self {
            Recording::Ready(graph) => graph.launch(),
            Recording::Pending(device) if step > 0 => {
                let mut graph = Graph::record(device, work)?;
                graph.launch()?;
                *self = Recording::Ready(graph);
                Ok(())
            }
            _ => work(),
        }
    }
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
