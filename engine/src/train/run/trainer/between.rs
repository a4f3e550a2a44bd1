//! What happens between steps: lines of the log, validation, samples, checkpoints.

use std::time::Instant;

use super::Trainer;
use crate::ceilings::mfu;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::image_io::{WriteOptions, write_image};
use crate::profile;
use crate::train::run::guard::{StepOutcome, Verdict};
use crate::train::run::history::SAMPLES;
use crate::train::run::log::{Record, TrainRecord};
use crate::train::run::progress::Progress;
use crate::train::run::ranks::{share_damages, share_outcomes};
use crate::train::run::samples::Sheet;
use crate::train::run::speed::Interval;

impl Trainer<'_> {
    /// Waits for the submitted steps and notes what came of them.
    pub(super) fn collect(&mut self) -> Result<()> {
        let mut own = Vec::with_capacity(self.submitted.len());
        for step in std::mem::take(&mut self.submitted) {
            let losses = step.losses.iter().map(|loss| Ok(loss.to_vec::<f32>()?[0]));
            let (norm, skipped) = step.norm.read()?;
            own.push((losses.collect::<Result<_>>()?, norm, skipped));
        }
        self.state.outcomes.extend(share_outcomes(self.world(), own)?);
        Ok(())
    }

    /// A line of the log, and the guard's look at it.
    pub(super) fn report_interval(&mut self) -> Result<()> {
        self.collect()?;
        let seconds = self.interval.seconds();
        let interval = std::mem::replace(&mut self.interval, Interval::begin());
        let outcomes = std::mem::take(&mut self.state.outcomes);
        let step = self.state.step;
        self.state.elapsed_seconds += seconds;
        if let Some(profile) = &mut self.profile {
            profile.settle()?;
        }
        let verdict = self.state.guard.look(self.config, step, &outcomes);
        let good = || outcomes.iter().filter(|outcome| !outcome.skipped);
        let mean = |value: fn(&StepOutcome) -> f32| match good().count() {
            0 => None,
            count => Some(good().map(|outcome| f64::from(value(outcome))).sum::<f64>() / count as f64),
        };
        let steps = interval.steps.max(1) as f64;
        let record = TrainRecord {
            step,
            pictures: self.state.pictures,
            epoch: self.state.position.epoch,
            loss: mean(|outcome| outcome.loss),
            grad_norm: mean(|outcome| outcome.norm),
            lr: self.rate.at(step - 1),
            skipped: self.state.guard.skipped(),
            seconds_per_step: seconds / steps,
            pictures_per_second: interval.pictures as f64 / seconds,
            mfu: match self.device {
                Device::Cpu => None,
                Device::Cuda(gpu) => mfu(gpu.name(), interval.operations, seconds),
            },
            peak_memory_bytes: self.device.memory_report().total.peak,
            data_wait: self.loader.take_waited().as_secs_f64() / seconds,
            elapsed_seconds: self.state.elapsed_seconds,
            eta_seconds: self.seconds_left(seconds / steps),
        };
        self.device.reset_memory_peaks();
        self.loss = record.loss;
        self.report_damages()?;
        self.record(Record::Train(record));
        match verdict {
            Verdict::Fine => Ok(()),
            Verdict::Notice(text) => {
                self.record(Record::Notice { step, text });
                Ok(())
            }
            Verdict::Stop { reason, exploded } => {
                if exploded {
                    self.refuse_diverged()?;
                }
                self.wait_for_save()?;
                let way_back = self.world().on_first("divergence", || Ok(self.way_back()))?;
                Err(Error::invalid(format!("{reason}; {}", way_back.unwrap_or_default())))
            }
        }
    }

    /// Seconds to the last step where each takes so many, or to the end of the time that there is.
    pub(super) fn seconds_left(&self, seconds_per_step: f64) -> f64 {
        let steps = (self.config.steps - self.state.step) as f64 * seconds_per_step;
        let time = self
            .config
            .max_minutes
            .map(|minutes| minutes * 60.0 - self.state.elapsed_seconds);
        steps.min(time.unwrap_or(f64::INFINITY)).max(0.0)
    }

    pub(super) fn report_damages(&mut self) -> Result<()> {
        let mut fresh = share_damages(self.world(), self.setup.set.damages())?;
        if let Some(validation) = &self.setup.validation {
            fresh.extend(share_damages(self.world(), validation.damages())?);
        }
        for damage in fresh {
            self.record(Record::Damaged {
                step: self.state.step,
                what: damage.what,
                reason: damage.reason,
            });
        }
        Ok(())
    }

    /// Does what is due at this step and not done yet. Interrupted, it stays due, and the checkpoint says so.
    pub(super) fn do_due(&mut self) -> Result<()> {
        if self.state.due.validation {
            self.validate()?;
            self.state.due.validation = false;
        }
        if self.state.due.samples {
            self.draw_samples()?;
            self.state.due.samples = false;
        }
        Ok(())
    }

    fn validate(&mut self) -> Result<()> {
        let Some(validation) = &self.setup.validation else {
            return Ok(());
        };
        if self.config.validate_every == 0 {
            return Ok(());
        }
        let _range = profile::range(c"validation");
        let started = Instant::now();
        let world = self.world();
        let mut progress = Progress {
            observer: &mut *self.observer,
        };
        let loss = validation.loss(&self.model, &mut self.feeder, world, &mut || progress.go_on())?;
        self.validation_loss = Some(loss);
        let (step, seconds) = (self.state.step, started.elapsed().as_secs_f64());
        self.record(match loss.is_finite() {
            true => Record::Validation { step, loss, seconds },
            false => Record::Notice {
                step,
                text: format!("the validation loss is {loss}"),
            },
        });
        Ok(())
    }

    fn draw_samples(&mut self) -> Result<()> {
        let Some(sheet) = self.setup.sheet.as_ref().filter(|_| self.config.sample_every > 0) else {
            return Ok(());
        };
        let _range = profile::range(c"samples");
        let world = self.world();
        world.on_first("samples", || self.draw_sheet(sheet)).map(drop)
    }

    fn draw_sheet(&mut self, sheet: &Sheet) -> Result<()> {
        let mut progress = Progress {
            observer: &mut *self.observer,
        };
        let image = match sheet.draw(self.model.denoiser(), &mut || progress.go_on()) {
            // Steps have a guard of their own against weights that diverge: a sheet alone ends no run.
            Err(error @ Error::NotFinite { .. }) => {
                let (step, text) = (self.state.step, format!("no sheet of samples: {error}"));
                self.record(Record::Notice { step, text });
                return Ok(());
            }
            drawn => drawn?,
        };
        let folder = self.run.join(SAMPLES);
        std::fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, error))?;
        let step = self.state.step;
        let file = format!("{SAMPLES}/step-{step:08}.png");
        let path = self.run.join(&file);
        // What cannot be written now stops nothing; the next sheet may find room.
        if let Err(error) = write_image(&path, &image, &WriteOptions::default()) {
            let text = format!("no sheet of samples: {error}");
            self.record(Record::Notice { step, text });
            return Ok(());
        }
        let png = std::fs::read(&path).map_err(|error| Error::io(&path, error))?;
        if let Some(journal) = &mut self.journal {
            journal.picture(step, "samples", &image, &png, self.observer);
        }
        self.record(Record::Samples {
            step,
            file,
            size: [sheet.settings.width, sheet.settings.height],
            count: sheet.captions.len(),
        });
        Ok(())
    }

    /// Does work whose time is not training's.
    pub(super) fn paused(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        // The steps submitted so far are training's.
        self.device.synchronize()?;
        let started = Instant::now();
        let outcome = work(self);
        self.interval.exclude(started.elapsed());
        outcome
    }

    pub(super) fn record(&mut self, record: Record) {
        if let Some(journal) = &mut self.journal {
            journal.record(&record, self.observer);
        }
    }

    /// Where the time of the steps went.
    pub(super) fn record_profile(&mut self) -> Result<()> {
        if let Some(profile) = &mut self.profile {
            profile.settle()?;
            let (step, parts) = (self.state.step, profile.parts());
            self.record(Record::Profile { step, parts });
        }
        Ok(())
    }
}
