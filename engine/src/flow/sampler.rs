//! Sampling with classifier-free guidance.
//!
//! The host submits a step while the GPU computes the one before, then waits for that one to be done; it never runs further
//! ahead. So the GPU does not idle between steps, progress tells what is done and not what is queued, and stopping takes no
//! longer than the step that is running.
//!
//! [`sample`] draws once; a [`Sampler`] keeps the steps of what it drew, so that another picture of the same shape needs no
//! recording, no search and no memory of its own.

use std::collections::VecDeque;

use super::held::Beginning;
use super::schedule::Schedule;
use super::solver::Solver;
use super::walk::Step;
pub use super::walk::{Conditioning, Walk};
use crate::device::{Marker, Recording};
use crate::error::Result;
use crate::model::Denoiser;
use crate::profile;
use crate::tensor::Tensor;

/// Steps that may be submitted and not done when the host goes on to submit the next one.
const QUEUED_STEPS: usize = 1;

/// Told after each step.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// Steps done.
    pub done: usize,
    /// Steps in all.
    pub steps: usize,
}

/// A state of a walk, for whoever looks at it.
pub struct Seen<'a> {
    /// Steps that were submitted.
    pub done: usize,
    /// How much of picture and noise there is after them.
    pub mix: [f32; 2],
    /// Batch, height, width and channels.
    pub shape: [usize; 4],
    /// The values, row-major; reading them waits for the device.
    pub values: &'a dyn Fn() -> Result<Vec<f32>>,
}

/// Told how a walk goes on. A closure that takes reports is one that looks at nothing.
pub trait Listener {
    /// A step is done.
    ///
    /// # Errors
    /// Whatever is to end the walk.
    fn step(&mut self, report: StepReport) -> Result<()>;

    /// Whether it wants to look at the state after `done` of `steps`.
    fn looks(&self, _done: usize, _steps: usize) -> bool {
        false
    }

    /// Looks at a state that it wants to look at.
    ///
    /// # Errors
    /// As [`Listener::step`].
    fn look(&mut self, _seen: &Seen<'_>) -> Result<()> {
        Ok(())
    }
}

impl<F: FnMut(StepReport) -> Result<()>> Listener for F {
    fn step(&mut self, report: StepReport) -> Result<()> {
        self(report)
    }
}

/// Walks from `beginning`, noise `[batch, height, width, channels]` (f32, at the schedule's first sigma), down `schedule` and returns the
/// image (latent model: latent). `progress` is called when a step is done, in order; an error from it ends the walk.
///
/// # Errors
/// When shapes do not fit, the device has no room, or `progress` says so.
pub fn sample(
    model: &dyn Denoiser,
    conditioning: &Conditioning,
    schedule: &Schedule,
    beginning: impl Into<Beginning>,
    progress: &mut dyn Listener,
) -> Result<Tensor> {
    let _range = profile::range(c"denoise");
    let Beginning { noise, held } = beginning.into();
    let mut walk = Walk::new(model, conditioning, schedule, noise)?.holding(held, schedule);
    go(&mut walk, model, schedule, progress)?;
    Ok(walk.finish())
}

/// Takes all steps of a walk. What somebody looks at is copied, and looked at while the step after it runs.
fn go(walk: &mut Walk<'_>, model: &dyn Denoiser, schedule: &Schedule, progress: &mut dyn Listener) -> Result<()> {
    let mix = |done| schedule.with_objective(model.objective(), |objective| objective.mix(schedule.sigma(done)));
    let mut queue = Queue::new(schedule.steps());
    let mut set_aside = None;
    for done in 1..=schedule.steps() {
        walk.advance()?;
        queue.push(model.device().marker()?);
        queue.drain(QUEUED_STEPS, progress)?;
        look_aside(walk, set_aside.take(), &mix, progress)?;
        if !progress.looks(done, schedule.steps()) {
            continue;
        }
        if walk.set_aside()? {
            set_aside = Some(done);
            continue;
        }
        progress.look(&Seen {
            done,
            mix: mix(done),
            shape: walk.shape(),
            values: &|| walk.values(),
        })?;
    }
    look_aside(walk, set_aside, &mix, progress)?;
    queue.drain(0, progress)
}

/// Shows the state that was set aside after step `done`, if one was.
fn look_aside(
    walk: &Walk<'_>,
    done: Option<usize>,
    mix: &dyn Fn(usize) -> [f32; 2],
    progress: &mut dyn Listener,
) -> Result<()> {
    let Some(done) = done else { return Ok(()) };
    progress.look(&Seen {
        done,
        mix: mix(done),
        shape: walk.shape(),
        values: &|| walk.aside(),
    })
}

/// What pictures are to follow, as it comes from a text encoder.
#[derive(Clone, Copy)]
pub struct Guides<'a> {
    /// Caption features, one per picture.
    pub prompts: &'a [Tensor],
    /// What to move away from, one per picture; empty without guidance.
    pub negatives: &'a [Tensor],
    /// The strength of guidance; see [`Conditioning::negative`].
    pub cfg: f32,
}

impl Guides<'_> {
    /// Ready for pictures of this height and width (latent model: latent cells).
    ///
    /// # Errors
    /// As [`Denoiser::prepare`].
    pub fn prepare(&self, model: &dyn Denoiser, size: [usize; 2]) -> Result<Conditioning> {
        let prepare = |captions: &[Tensor]| model.prepare(&captions.iter().collect::<Vec<_>>(), size);
        Ok(Conditioning {
            prompt: prepare(self.prompts)?,
            negative: match self.negatives.is_empty() {
                true => None,
                false => Some((prepare(self.negatives)?, self.cfg)),
            },
        })
    }

    /// Puts these in the place of others of the same shape.
    fn replace(&self, model: &dyn Denoiser, conditioning: &mut Conditioning) -> Result<()> {
        model.prepare_into(&self.prompts.iter().collect::<Vec<_>>(), &mut conditioning.prompt)?;
        match &mut conditioning.negative {
            Some((negative, _)) => model.prepare_into(&self.negatives.iter().collect::<Vec<_>>(), negative),
            None => Ok(()),
        }
    }

    fn shape(&self, noise: &Tensor, solver: Solver) -> Shape {
        let tokens = |captions: &[Tensor]| captions.iter().map(|caption| caption.dim(1)).collect();
        Shape {
            noise: noise.shape().to_vec(),
            prompts: tokens(self.prompts),
            negatives: tokens(self.negatives),
            cfg: self.cfg.to_bits(),
            looks_back: solver.looks_back(),
        }
    }
}

/// What a recorded step depends on beside values.
#[derive(PartialEq, Eq)]
struct Shape {
    noise: Vec<usize>,
    prompts: Vec<usize>,
    negatives: Vec<usize>,
    cfg: u32,
    looks_back: bool,
}

/// The steps of one shape, kept.
struct Kept {
    shape: Shape,
    conditioning: Conditioning,
    step: Step,
}

/// Draws with one model, again and again. Belongs to that model: steps hold the addresses of its weights.
#[derive(Default)]
pub struct Sampler {
    /// The most recently used last.
    kept: Vec<Kept>,
    most: usize,
}

impl Sampler {
    /// One that keeps the steps of so many shapes; each holds the memory that a step takes. 0 keeps none.
    pub fn keeping(most: usize) -> Self {
        Sampler { kept: Vec::new(), most }
    }

    /// The most shapes that it keeps the steps of.
    pub fn most(&self) -> usize {
        self.most
    }

    /// Shapes whose steps it keeps now.
    pub fn kept(&self) -> usize {
        self.kept.len()
    }

    /// Whether it keeps the step of pictures that follow `guides` from noise of this shape with this solver.
    pub fn keeps(&self, guides: &Guides<'_>, noise: &Tensor, solver: Solver) -> bool {
        let shape = guides.shape(noise, solver);
        self.kept.iter().any(|kept| kept.shape == shape)
    }

    /// Lets go of the step that was not used for longest and of the memory that it holds; false where there is none.
    pub fn forget_oldest(&mut self) -> bool {
        let any = !self.kept.is_empty();
        self.kept.drain(..usize::from(any));
        any
    }

    /// As [`sample`], for captions that need not be prepared yet.
    ///
    /// # Errors
    /// As [`sample`]; after an error the steps of this shape are gone.
    pub fn draw(
        &mut self,
        model: &dyn Denoiser,
        guides: Guides<'_>,
        schedule: &Schedule,
        beginning: impl Into<Beginning>,
        progress: &mut dyn Listener,
    ) -> Result<Tensor> {
        let beginning = beginning.into();
        let size = [beginning.noise.dim(1), beginning.noise.dim(2)];
        if self.most == 0 {
            return sample(model, &guides.prepare(model, size)?, schedule, beginning, progress);
        }
        let Beginning { noise, held } = beginning;
        let _range = profile::range(c"denoise");
        let shape = guides.shape(&noise, schedule.solver());
        let (conditioning, known) = match self.kept.iter().position(|kept| kept.shape == shape) {
            Some(place) => {
                let Kept {
                    mut conditioning, step, ..
                } = self.kept.remove(place);
                guides.replace(model, &mut conditioning)?;
                (conditioning, Some(step))
            }
            None => {
                // Room for the new one first.
                self.kept.drain(..(self.kept.len() + 1).saturating_sub(self.most));
                (guides.prepare(model, size)?, None)
            }
        };
        let mut walk = Walk::from(model, &conditioning, schedule, |tables| match known {
            Some(mut step) => {
                step.begin(&noise)?;
                Ok(step)
            }
            None => Step::new(tables, schedule, noise, Recording::new(model.device())),
        })?
        .holding(held, schedule);
        go(&mut walk, model, schedule, progress)?;
        let step = walk.into_step();
        let drawn = step.picture()?;
        self.kept.push(Kept {
            shape,
            conditioning,
            step,
        });
        Ok(drawn)
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
    fn drain(&mut self, queued: usize, progress: &mut dyn Listener) -> Result<()> {
        while let Some(marker) = self.markers.front() {
            if self.markers.len() > queued {
                marker.wait()?;
            } else if !marker.is_reached()? {
                break;
            }
            self.markers.pop_front();
            self.report.done += 1;
            progress.step(self.report)?;
        }
        Ok(())
    }
}
