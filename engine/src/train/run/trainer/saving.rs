//! When a checkpoint is written, and when not.
//!
//! Nothing that is not finite becomes the newest checkpoint, and nothing is deleted while gradients or weights are not finite:
//! a checkpoint that is due then is made as soon as a step is good again.

use std::path::Path;
use std::time::Instant;

use super::Trainer;
use crate::checkpoint::Float;
use crate::error::{Error, Result};
use crate::profile;
use crate::train::run::checkpoint::{self, CHECKPOINTS, RunState, SaveOptions, Saved};
use crate::train::run::choices::SaveType;
use crate::train::run::log::Record;
use crate::train::run::manifest;
use crate::train::run::ranks::on_first;
use crate::train::run::setup::sample_settings;

impl Trainer<'_> {
    /// Saves a checkpoint that is due, if what was trained is good; otherwise it stays due. A disk that does not take it is
    /// reported, and the run goes on: the last checkpoint stays, and the next one may find room.
    pub(super) fn save_when_good(&mut self) -> Result<()> {
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
        match self.save() {
            // What one rank could not write the others have in words.
            Err(error)
                if matches!(error, Error::Io { .. } | Error::File { .. })
                    || matches!(error, Error::Invalid(_)) && !self.world().is_solo() =>
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

    /// Saves, unless that is done, and deletes old checkpoints.
    fn save(&mut self) -> Result<()> {
        if self.is_saved() {
            return Ok(());
        }
        let _range = profile::range(c"save");
        let (step, started) = (self.state.step, Instant::now());
        let options = SaveOptions {
            dtype: match self.config.save_dtype {
                SaveType::Bf16 => Float::Bf16,
                SaveType::F32 => Float::F32,
            },
            average: self.config.ema.is_some(),
        };
        let kind = self.model.denoiser().geometry().kind;
        let settings = sample_settings(self.config, &self.setup.pipeline)?;
        let world = self.world();
        let complete = |folder: &Path| manifest::write(folder, self.run, self.setup.paths(), kind, &settings);
        let state = RunState {
            finite: Some(true),
            ..self.state.clone()
        };
        let Saved { folder, bytes } = checkpoint::save(self.run, &self.model, &state, options, world, &complete)?;
        self.saved = Some((step, folder.clone()));
        let calm = self.state.guard.calm();
        on_first(world, "old checkpoints", || {
            checkpoint::prune(self.run, self.config.keep_last, self.config.keep_every, calm)
        })?;
        let name = folder.strip_prefix(self.run).unwrap_or(&folder);
        self.record(Record::Checkpoint {
            step,
            folder: name.display().to_string(),
            bytes,
            seconds: started.elapsed().as_secs_f64(),
        });
        Ok(())
    }

    /// Sets aside the checkpoints that were made after the last interval with a loss like those before, where there is an older
    /// one: their weights may have begun to diverge unseen.
    pub(super) fn refuse_diverged(&mut self) {
        let (step, calm) = (self.state.step, self.state.guard.calm());
        let all = checkpoint::list(self.run).unwrap_or_default();
        if !all.iter().any(|(step, _)| *step <= calm) {
            return;
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
