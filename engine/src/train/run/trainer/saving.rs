//! When a checkpoint is written, and when not.
//!
//! Nothing that is not finite becomes the newest checkpoint, and nothing is deleted while gradients or weights are not finite:
//! a checkpoint that is due then is made as soon as a step is good again. A good one is copied and written while training goes on; it
//! counts, and old ones are deleted, once it has its name.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::Trainer;
use crate::checkpoint::Float;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::profile;
use crate::train::run::checkpoint::{self, CHECKPOINTS, RunState, SaveOptions, Saved, Share};
use crate::train::run::checksums::Checksums;
use crate::train::run::choices::SaveType;
use crate::train::run::log::Record;
use crate::train::run::manifest;
use crate::train::run::saver::{AddFiles, Finished, Keep, SaveJob, Written};
use crate::train::run::setup::sample_settings;
use crate::train::run::{Event, Observer};

/// A wait for the checkpoint before that is told of.
const LONG_WAIT: Duration = Duration::from_secs(1);

impl Trainer<'_> {
    /// Takes host memory for checkpoints, where one will be due before the last step.
    pub(super) fn prepare_to_save(&mut self) -> Result<()> {
        let every = self.config.save_every;
        let next = self.state.step.checked_div(every).map(|saves| (saves + 1) * every);
        if next.is_some_and(|next| next < self.config.steps) {
            let bytes = self.model.snapshot_bytes() as u64;
            self.saver.prepare(self.device, bytes, Device::Cpu.available_memory()?);
            self.tell_of_memory();
        }
        Ok(())
    }

    /// Saves a checkpoint that is due, if what was trained is good; otherwise it stays due. A disk that does not take it is
    /// reported, and the run goes on: the last checkpoint stays, and the next one may find room.
    pub(super) fn save_when_good(&mut self) -> Result<()> {
        let started = Instant::now();
        let spike = self.state.guard.in_spike().then(|| "the loss is in a spike".to_owned());
        let reason = match spike {
            Some(reason) => Some(reason),
            None => self.trouble()?,
        };
        if let Some(reason) = reason {
            let step = self.state.step;
            if self.owed.is_none() {
                let text =
                    format!("no checkpoint at step {step}: {reason}; the last one stays, the next good step is saved");
                self.record(Record::Notice { step, text });
            }
            self.owed = Some(reason);
            return Ok(());
        }
        self.owed = None;
        self.wait_for_earlier()?;
        let outcome = self.begin_to_save(started);
        self.tolerate(outcome)
    }

    /// Notes what became of a checkpoint that was being written, once it is done on all ranks.
    pub(super) fn note_saved(&mut self) -> Result<()> {
        let done = match self.saver.in_flight() {
            None => return Ok(()),
            Some(_) => self.world().share("written", self.saver.is_done())?,
        };
        match done.into_iter().all(|done| done) {
            true => self.wait_for_save(),
            false => Ok(()),
        }
    }

    /// Waits until nothing is being written any more.
    pub(super) fn wait_for_save(&mut self) -> Result<()> {
        match self.wait()? {
            None => Ok(()),
            Some(finished) => {
                let outcome = self.settle(finished);
                self.tolerate(outcome)
            }
        }
    }

    /// As [`Trainer::wait_for_save`], because the next one is due.
    fn wait_for_earlier(&mut self) -> Result<()> {
        let (earlier, asked) = (self.saver.in_flight(), Instant::now());
        self.wait_for_save()?;
        let waited = asked.elapsed();
        if let Some(earlier) = earlier.filter(|_| waited > LONG_WAIT) {
            let step = self.state.step;
            let text = format!(
                "training waited {:.1} s until the checkpoint of step {earlier} was on the disk: save_every is shorter than that takes",
                waited.as_secs_f64()
            );
            self.record(Record::Notice { step, text });
        }
        Ok(())
    }

    /// A disk that does not take a checkpoint ends no run before its last step.
    fn tolerate(&mut self, outcome: Result<()>) -> Result<()> {
        let alone = self.world().is_solo();
        match outcome {
            // What another rank could not write is known in words.
            Err(error)
                if matches!(error, Error::Io { .. } | Error::File { .. })
                    || !alone && matches!(error, Error::Invalid(_)) =>
            {
                let text = format!("no checkpoint: {error}");
                let step = self.state.step;
                self.record(Record::Notice { step, text });
                Ok(())
            }
            outcome => outcome,
        }
    }

    /// Saves what the run ends with.
    ///
    /// # Errors
    /// When it is not finite, or the disk does not take it.
    pub(super) fn save_at_end(&mut self) -> Result<()> {
        if let Some(text) = self.not_saved()? {
            return Err(Error::invalid(format!(
                "{text}; lower the learning rate, set clip_norm, or look for damaged data; {}",
                self.way_back()
            )));
        }
        self.save()?;
        match self.validation_loss.filter(|loss| !loss.is_finite()) {
            None => Ok(()),
            Some(loss) => Err(Error::invalid(format!(
                "the run ends with a validation loss of {loss}: lower the learning rate, or look for damaged data"
            ))),
        }
    }

    /// Saves what the user's wish to stop leaves, unless it is not finite.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub(super) fn save_at_break(&mut self) -> Result<()> {
        let Some(text) = self.not_saved()? else {
            return self.save();
        };
        let (step, text) = (self.state.step, format!("{text}; {}", self.way_back()));
        self.record(Record::Notice { step, text });
        Ok(())
    }

    /// Why the last step must not be saved.
    fn not_saved(&mut self) -> Result<Option<String>> {
        if self.is_saved() {
            return Ok(None);
        }
        let reason = self.trouble()?;
        Ok(reason.map(|reason| format!("step {} is not saved: {reason}", self.state.step)))
    }

    /// Whether nothing was trained, or the newest checkpoint is of this step.
    fn is_saved(&self) -> bool {
        let step = self.state.step;
        step == 0 || self.saved.as_ref().is_some_and(|(saved, _)| *saved == step)
    }

    /// Why what was trained must not be saved: gradients, weights, or the loss that they give are not finite.
    fn trouble(&mut self) -> Result<Option<String>> {
        self.collect()?;
        if let Some(reason) = self.state.guard.trouble(&self.state.outcomes) {
            return Ok(Some(reason));
        }
        let names = self.world().share("numbers", self.model.first_not_finite()?)?;
        if let Some(name) = names.into_iter().flatten().next() {
            return Ok(Some(format!("`{name}` holds numbers that are not finite")));
        }
        let probe = || self.setup.probe(&self.model, &mut self.feeder);
        let loss = self.ranks.world.decide("loss of a picture", probe)?;
        let bad = loss.filter(|loss| !loss.is_finite());
        Ok(bad.map(|loss| format!("with the weights as they are the loss of a picture is {loss}")))
    }

    /// Saves, unless that is done, and waits until it is; deletes old checkpoints.
    fn save(&mut self) -> Result<()> {
        self.saver.call_off();
        self.begin_to_save(Instant::now())?;
        match self.wait()? {
            None => Ok(()),
            Some(finished) => self.settle(Finished {
                stall_seconds: finished.seconds,
                ..finished
            }),
        }
    }

    /// Begins to save what was due at `started`, unless that is done; nothing else is being written.
    fn begin_to_save(&mut self, started: Instant) -> Result<()> {
        if self.is_saved() {
            return Ok(());
        }
        let _range = profile::range(c"save");
        let options = SaveOptions {
            dtype: match self.config.save_dtype {
                SaveType::Bf16 => Float::Bf16,
                SaveType::F32 => Float::F32,
            },
            average: self.config.ema.is_some(),
        };
        let job = SaveJob {
            run: self.run.to_owned(),
            state: RunState {
                finite: Some(true),
                ..self.state.clone()
            },
            options,
            complete: self.add_manifest()?,
            share: self.begin_share(options)?,
            keep: self.keep(),
            observer: Box::new(()),
        };
        let begun = self.saver.begin(&mut self.model, job, started)?;
        self.tell_of_memory();
        // Where one rank had no memory to copy to, all wait until they have written.
        let written = self.world().share("written", begun.is_some())?;
        let begun = match written.contains(&true) && begun.is_none() {
            true => self.wait()?,
            false => begun,
        };
        begun.map_or(Ok(()), |finished| self.settle(finished))
    }

    /// What makes a model of a checkpoint's folder, from which samples are drawn as the run draws them.
    fn add_manifest(&self) -> Result<AddFiles> {
        let kind = self.model.denoiser().geometry().kind;
        let settings = sample_settings(self.config, &self.setup.pipeline)?;
        let (run, paths) = (self.run.to_owned(), self.setup.paths().clone());
        let trained = self.setup.trained.clone();
        Ok(Box::new(move |folder| {
            manifest::write(folder, &run, &paths, kind, &trained, &settings)
        }))
    }

    fn keep(&self) -> Keep {
        Keep {
            last: self.config.keep_last,
            every: self.config.keep_every,
            calm: self.state.guard.calm(),
        }
    }

    /// Makes a folder in which several ranks write their shares of a checkpoint; `None` for one that is alone.
    fn begin_share(&mut self, options: SaveOptions) -> Result<Option<(PathBuf, Share)>> {
        let world = self.world();
        if world.is_solo() {
            return Ok(None);
        }
        self.place = world.on_first("checkpoint", || checkpoint::begin(self.run))?;
        let place = self.place.as_ref().map(|place| place.path().to_owned());
        let place = world.decide("folder", || Ok(place.unwrap_or_default()))?;
        let averages = match options.average {
            true => self.model.gather_averages()?,
            false => None,
        };
        let share = Share {
            rank: world.rank(),
            ranks: world.size(),
            averages,
        };
        Ok(Some((place, share)))
    }

    /// Makes a checkpoint of what all ranks have written, once each has its share.
    fn join_shares(&mut self, step: u64, own: Result<Checksums>) -> Result<(Saved, Result<()>)> {
        let world = self.world();
        let own = world.together("checkpoint", own)?;
        let mut sums = Checksums::default();
        for share in world.share("checksums", own)? {
            sums.files.extend(share.files);
        }
        let place = self.place.take();
        let Keep { last, every, calm } = self.keep();
        let add = self.add_manifest()?;
        let (saved, pruned) = world.first_decides("checkpoint", || {
            let place = place.ok_or_else(|| Error::invalid("there is no folder for the checkpoint"))?;
            let saved = checkpoint::complete(self.run, place, step, &sums, &*add)?;
            let pruned = checkpoint::prune(self.run, last, every, calm).map_err(|error| error.to_string());
            Ok((saved, pruned.err()))
        })?;
        Ok((saved, pruned.map_or(Ok(()), |error| Err(Error::invalid(error)))))
    }

    /// What becomes of the checkpoint that is being written; shows how far that is.
    fn wait(&mut self) -> Result<Option<Finished>> {
        const MIB: u64 = 1 << 20;
        let observer: &mut dyn Observer = &mut *self.observer;
        self.saver.wait(&mut |done, total| {
            observer.event(&Event::Progress {
                what: "writing the checkpoint (MiB)",
                done: done.div_ceil(MIB) as usize,
                total: total.div_ceil(MIB) as usize,
            });
        })
    }

    /// Notes that a checkpoint is on the disk.
    ///
    /// # Errors
    /// When it is not.
    fn settle(&mut self, finished: Finished) -> Result<()> {
        let step = finished.step;
        let (saved, pruned) = match finished.written {
            Written::Whole { saved, pruned } => (saved?, pruned),
            Written::Share(own) => self.join_shares(step, own)?,
        };
        let name = saved.folder.strip_prefix(self.run).unwrap_or(&saved.folder);
        let folder = name.display().to_string();
        self.saved = Some((step, saved.folder));
        self.record(Record::Checkpoint {
            step,
            folder,
            bytes: saved.bytes,
            seconds: finished.seconds,
            stall_seconds: Some(finished.stall_seconds),
        });
        if let Err(error) = pruned {
            let text = format!("old checkpoints stay: {error}");
            self.record(Record::Notice { step, text });
        }
        Ok(())
    }

    fn tell_of_memory(&mut self) {
        if let Some(text) = self.saver.take_notice() {
            let step = self.state.step;
            self.record(Record::Notice { step, text });
        }
    }

    /// Sets aside the checkpoints that were made after the last interval with a loss like those before, where there is an older
    /// one: their weights may have begun to diverge unseen.
    ///
    /// # Errors
    /// When one that was being written failed for another reason than the disk.
    pub(super) fn refuse_diverged(&mut self) -> Result<()> {
        self.wait_for_save()?;
        if !self.world().is_first() {
            return Ok(());
        }
        let (step, calm) = (self.state.step, self.state.guard.calm());
        let all = checkpoint::list(self.run).unwrap_or_default();
        if !all.iter().any(|(step, _)| *step <= calm) {
            return Ok(());
        }
        for (_, folder) in all.iter().filter(|(step, _)| *step > calm) {
            let text = match checkpoint::refuse(folder) {
                Ok(aside) => format!(
                    "a checkpoint from after the loss began to rise is set aside: {}",
                    aside.display()
                ),
                Err(error) => error.to_string(),
            };
            self.record(Record::Notice { step, text });
        }
        Ok(())
    }

    /// From where the run can go on after a divergence.
    pub(super) fn way_back(&self) -> String {
        let all = checkpoint::list(self.run).unwrap_or_default();
        match all.as_slice() {
            [] => format!("there is no checkpoint in {CHECKPOINTS} yet: the same command begins anew"),
            [.., (step, _)] => {
                format!("the same command with other values goes on from step {step}, the last good checkpoint")
            }
        }
    }
}
