//! Steps down a schedule: what they read and write, and how they are recorded.
//!
//! On CUDA the first step runs call by call, which loads every kernel; the second is recorded and replayed for all others,
//! with the step's own modulation vectors and factors copied to fixed addresses. The device's options may turn recording off.

use super::aside::Aside;
use super::held::Held;
use super::schedule::Schedule;
use crate::device::Recording;
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

/// What the pictures follow.
pub struct Conditioning {
    /// The captions to follow.
    pub prompt: Prepared,
    /// With guidance, the captions to move away from and the strength: two passes per step instead of one,
    /// `v = v_negative + cfg · (v_prompt − v_negative)`.
    pub negative: Option<(Prepared, f32)>,
}

/// A walk down a schedule, step by step; [`super::sampler::sample`] for those who have to look at each step.
pub struct Walk<'a> {
    model: &'a dyn Denoiser,
    conditioning: &'a Conditioning,
    /// The model's time at the start of each step.
    times: Vec<f32>,
    /// The factors of each step, f32 `[steps, rows, 2]`; see [`State`].
    factors: Tensor,
    /// Of this step and some that follow.
    tables: Modulations,
    step: Step,
    /// What is held, and how much of picture and noise there is after each step.
    held: Option<(Held, Vec<[f32; 2]>)>,
    /// Steps submitted.
    done: usize,
}

/// A step's work on pictures of one shape: what it reads and writes, at addresses that stay, and the recording of it.
pub(super) struct Step {
    state: State,
    recording: Recording,
    /// Whether it ran before, so that everything it needs is loaded.
    ran: bool,
    /// Where somebody has looked: a place for copies of the picture.
    aside: Option<Aside>,
}

impl<'a> Walk<'a> {
    /// A walk from `noise` on; see [`super::sampler::sample`].
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(
        model: &'a dyn Denoiser,
        conditioning: &'a Conditioning,
        schedule: &Schedule,
        noise: Tensor,
    ) -> Result<Self> {
        // Two steps would not pay for a recording.
        let recording = match schedule.steps() > 2 {
            true => Recording::new(model.device()),
            false => Recording::Off,
        };
        Walk::from(model, conditioning, schedule, |tables| {
            Step::new(tables, schedule, noise, recording)
        })
    }

    /// A walk whose steps are taken by what `step` gives, which is told of modulations: a new step, or that of another walk of the
    /// same shape whose conditions are these.
    ///
    /// # Errors
    /// Those of `step`, and when the device has no room.
    pub(super) fn from(
        model: &'a dyn Denoiser,
        conditioning: &'a Conditioning,
        schedule: &Schedule,
        step: impl FnOnce(&Modulations) -> Result<Step>,
    ) -> Result<Self> {
        let (own, steps) = (model.objective(), schedule.steps());
        let times: Vec<f32> = schedule.with_objective(own, |objective| {
            (0..steps).map(|step| objective.time(schedule.sigma(step))).collect()
        });
        let factors = schedule.factors(own);
        let tables = model.modulate(&times[..times.len().min(STEPS_PER_TABLE)], None)?;
        Ok(Walk {
            factors: Tensor::from_slice(model.device(), &factors, [steps, schedule.factor_rows(), 2])?,
            step: step(&tables)?,
            model,
            conditioning,
            times,
            tables,
            held: None,
            done: 0,
        })
    }

    /// Holds what is known of the pictures, if anything is, after each of the schedule's steps.
    pub fn holding(mut self, held: Option<Held>, schedule: &Schedule) -> Self {
        let own = self.model.objective();
        let mix = |step| schedule.with_objective(own, |objective| objective.mix(schedule.sigma(step + 1)));
        self.held = held.map(|held| (held, (0..schedule.steps()).map(mix).collect()));
        self
    }

    /// Runs every step call by call, so that its operations can be told apart.
    pub fn unrecorded(mut self) -> Self {
        self.step.recording = Recording::Off;
        self
    }

    /// Submits the next step.
    ///
    /// # Errors
    /// When shapes do not fit, the device has no room, or the last step has been submitted.
    pub fn advance(&mut self) -> Result<()> {
        let _range = profile::range(c"step");
        let done = self.done;
        if done >= self.times.len() {
            return Err(Error::invalid(format!("all {done} steps are done")));
        }
        if done > 0 && done.is_multiple_of(STEPS_PER_TABLE) {
            let end = self.times.len().min(done + STEPS_PER_TABLE);
            self.tables = self.model.modulate(&self.times[done..end], None)?;
        }
        let Step {
            state, recording, ran, ..
        } = &mut self.step;
        state
            .modulations
            .copy_from(&self.tables.narrow(done % STEPS_PER_TABLE, 1)?)?;
        state.factors.copy_from(&self.factors.narrow(done, 1)?)?;
        recording.run(*ran, || state.step(self.model, self.conditioning))?;
        *ran = true;
        // Beside the recording, which is the same for all pictures of a shape.
        if let Some((held, mixes)) = &self.held {
            held.hold(&mut state.x, mixes[done])?;
        }
        self.done += 1;
        Ok(())
    }

    /// Batch, height, width and channels of the pictures.
    pub fn shape(&self) -> [usize; 4] {
        std::array::from_fn(|axis| self.step.state.x.dim(axis))
    }

    /// The values after the steps submitted so far, for which it waits.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn values(&self) -> Result<Vec<f32>> {
        self.step.state.x.to_vec()
    }

    /// Copies the values after the steps submitted so far, for [`Walk::aside`]; false where they are too many.
    ///
    /// # Errors
    /// When device or host have no room.
    pub(super) fn set_aside(&mut self) -> Result<bool> {
        let Step { state, aside, .. } = &mut self.step;
        if aside.is_none() {
            *aside = Aside::of(&state.x)?;
        }
        match aside {
            Some(aside) => aside.set(&state.x).map(|()| true),
            None => Ok(false),
        }
    }

    /// The values that were copied last. Waits for the steps before that copy alone.
    ///
    /// # Errors
    /// When the device has failed, or nothing was copied.
    pub(super) fn aside(&self) -> Result<Vec<f32>> {
        let aside = self.step.aside.as_ref();
        aside
            .ok_or_else(|| Error::invalid("no picture was set aside"))?
            .values()
    }

    /// The picture (latent model: latent) after the steps submitted so far.
    pub fn finish(self) -> Tensor {
        self.step.state.x
    }

    /// The step itself, for other walks; the picture lies in it.
    pub(super) fn into_step(self) -> Step {
        self.step
    }
}

impl Step {
    /// A step that has not run, of pictures of the shape of `noise`.
    pub(super) fn new(tables: &Modulations, schedule: &Schedule, noise: Tensor, recording: Recording) -> Result<Self> {
        let device = noise.device();
        let pictures = match schedule.solver().looks_back() {
            true => Some(Pictures::new(&noise)?),
            false => None,
        };
        Ok(Step {
            state: State {
                modulations: tables.narrow(0, 1)?.duplicate()?,
                factors: Tensor::empty(&device, [1, schedule.factor_rows(), 2], DType::F32)?,
                pictures,
                x: noise,
            },
            recording,
            ran: false,
            aside: None,
        })
    }

    /// Puts other noise in the picture's place.
    ///
    /// # Errors
    /// When its shape is another one.
    pub(super) fn begin(&mut self, noise: &Tensor) -> Result<()> {
        if let Some(pictures) = &mut self.state.pictures {
            pictures.now.set_zero()?;
            pictures.before.set_zero()?;
        }
        self.state.x.copy_from(noise)
    }

    /// A copy of the picture.
    ///
    /// # Errors
    /// When the device has no room.
    pub(super) fn picture(&self) -> Result<Tensor> {
        self.state.x.clone().into_unshared()
    }
}

/// What a step reads and writes; all at addresses that stay the same from step to step.
struct State {
    /// The picture on its way, f32.
    x: Tensor,
    /// The step's modulation vectors.
    modulations: Modulations,
    /// `[1, rows, 2]`: what the step keeps of the picture and how much of the prediction it adds; and the same for a second pass, which
    /// keeps all that the first has left. Where a solver looks back, these two make of the noisy picture the picture that the prediction
    /// tells, and three more follow: what the step keeps of the noisy picture and adds of that one; 1 and what it adds of the one before;
    /// 0 and 1, which copy.
    factors: Tensor,
    /// Where a solver looks back.
    pictures: Option<Pictures>,
}

/// What predictions tell of the picture, f32 of its shape. Finite from the start, since factors of 0 leave nothing of finite numbers alone.
struct Pictures {
    /// By this step's prediction.
    now: Tensor,
    /// By the one before.
    before: Tensor,
}

impl Pictures {
    fn new(noise: &Tensor) -> Result<Self> {
        let zeros = || Tensor::zeros(&noise.device(), noise.shape(), DType::F32);
        Ok(Pictures {
            now: zeros()?,
            before: zeros()?,
        })
    }
}

/// The rows of factors that copy one tensor to another, and that make the next noisy picture.
const COPY: usize = 4;
const NEXT: [usize; 2] = [2, 3];

impl State {
    /// Moves the picture by one step.
    fn step(&mut self, model: &dyn Denoiser, conditioning: &Conditioning) -> Result<()> {
        let Some(mut pictures) = self.pictures.take() else {
            return self.predict(model, conditioning, None);
        };
        let stepped = self.look_back(model, conditioning, &mut pictures);
        self.pictures = Some(pictures);
        stepped
    }

    /// The step of a solver that looks back, by the first-order operation alone.
    fn look_back(&mut self, model: &dyn Denoiser, conditioning: &Conditioning, pictures: &mut Pictures) -> Result<()> {
        let Pictures { now, before } = pictures;
        let copy = self.pass(COPY)?;
        guided_euler_step(now, &self.x, None, &copy)?;
        self.predict(model, conditioning, Some(now))?;
        for (row, picture) in NEXT.into_iter().zip([&*now, &*before]) {
            let factors = self.pass(row)?;
            guided_euler_step(&mut self.x, picture, None, &factors)?;
        }
        guided_euler_step(before, now, None, &copy)
    }

    /// Predicts of the noisy picture, and adds the prediction by the first factors to it or to a copy.
    fn predict(&mut self, model: &dyn Denoiser, conditioning: &Conditioning, copy: Option<&mut Tensor>) -> Result<()> {
        let image = cast(&self.x, model.device().compute_dtype())?;
        if model.paints() {
            // In f32 a cast gives the picture itself, which is about to be written.
            let image = image.into_unshared()?;
            return self.paint(model, conditioning, &image, copy);
        }
        let velocity = model.forward(&image, &conditioning.prompt, &self.modulations)?;
        let away = match &conditioning.negative {
            Some((negative, cfg)) => Some((model.forward(&image, negative, &self.modulations)?, *cfg)),
            None => None,
        };
        drop(image);
        let guidance = away.as_ref().map(|(negative, cfg)| Guidance { negative, cfg: *cfg });
        let factors = self.pass(0)?;
        guided_euler_step(copy.unwrap_or(&mut self.x), &velocity, guidance, &factors)
    }

    /// The factors of a pass, `[2]`; a view.
    fn pass(&self, index: usize) -> Result<Tensor> {
        let rows = self.factors.dim(1);
        self.factors.reshape([rows, 2])?.narrow(index, 1)?.into_shape([2])
    }

    /// The same where each pass adds its share to the picture itself: with guidance, `cfg` times the one velocity and
    /// `1 − cfg` times the other.
    fn paint(
        &mut self,
        model: &dyn Denoiser,
        conditioning: &Conditioning,
        image: &Tensor,
        mut copy: Option<&mut Tensor>,
    ) -> Result<()> {
        let negative = conditioning.negative.as_ref();
        let strength = negative.map_or(1.0, |(_, cfg)| *cfg);
        let passes = [(&conditioning.prompt, strength)];
        let passes = passes
            .into_iter()
            .chain(negative.map(|(prepared, cfg)| (prepared, 1.0 - cfg)));
        for (index, (prepared, scale)) in passes.enumerate() {
            let factors = self.pass(index)?;
            let canvas = Canvas {
                picture: match &mut copy {
                    Some(copy) => copy,
                    None => &mut self.x,
                },
                scale,
                factors: Some(&factors),
            };
            model.paint(image, prepared, &self.modulations, canvas)?;
        }
        Ok(())
    }
}
