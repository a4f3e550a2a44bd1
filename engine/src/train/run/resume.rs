//! From where a run goes on.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::checkpoint::{self, CHECKPOINTS, Checkpoint, Due, RunState};
use super::choices::ScheduleKind;
use super::config::TrainConfig;
use super::learning_rate::LearningRate;
use super::log::{self, Record};
use super::progress::Progress;
use super::slices::STATE;
use crate::data::Position;
use crate::dist::World;
use crate::error::{Error, Result};
use crate::train::TrainableModel;

/// From where a run goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// From its newest good checkpoint, if it has one.
    #[default]
    Auto,
    /// From nowhere; the run's folder must hold no checkpoint.
    Fresh,
    /// From this checkpoint's folder, or from the newest good checkpoint of the run in this folder.
    From(PathBuf),
}

/// Checkpoints that a run could go on from.
#[derive(Default)]
pub(super) struct Candidates {
    /// Newest first.
    checkpoints: Vec<Checkpoint>,
    /// What was refused, and why; newest first.
    refused: Vec<(PathBuf, String)>,
    /// The folder of the run that goes on, whose refused checkpoints are set aside.
    run: PathBuf,
    /// Whether it is one of these or none: the user named it.
    named: bool,
}

/// The loss of a model on something that is always the same; `None` where there is nothing to compute it of.
pub(super) type Probe<'a> = dyn FnMut(&TrainableModel) -> Result<Option<f32>> + 'a;

/// The checkpoints that the run may go on from.
///
/// # Errors
/// When the one that was named cannot be used, or the run's folder holds another continuation.
pub(super) fn find_candidates(run: &Path, resume: &Resume) -> Result<Candidates> {
    let none = Candidates {
        run: run.into(),
        ..Candidates::default()
    };
    match resume {
        Resume::From(folder) if folder.join(CHECKPOINTS).is_dir() => {
            let found = none.with_all_of(folder)?;
            match found.checkpoints.first() {
                None => Err(Error::file(folder, "is the folder of a run that has no checkpoint yet")),
                Some(newest) => {
                    if folder.canonicalize().ok() != run.canonicalize().ok() {
                        ensure_newest(run, newest)?;
                    }
                    Ok(found)
                }
            }
        }
        Resume::From(folder) => {
            let checkpoint = Checkpoint::open(folder).map_err(|error| unlike_a_checkpoint(folder, error))?;
            ensure_newest(run, &checkpoint)?;
            Ok(Candidates {
                checkpoints: vec![checkpoint],
                named: true,
                ..none
            })
        }
        Resume::Auto => none.with_all_of(run),
        Resume::Fresh => match checkpoint::list(run)?.last() {
            None => Ok(none),
            Some((_, folder)) => Err(Error::file(
                folder,
                "is a checkpoint of an earlier run: continue it (--resume auto), or choose another --out",
            )),
        },
    }
}

/// What is wrong with a folder that was named as a checkpoint.
fn unlike_a_checkpoint(folder: &Path, error: Error) -> Error {
    match folder.is_dir() && !folder.join(STATE).exists() {
        true => Error::file(
            folder,
            format!(
                "is neither a checkpoint (it has no {}) nor the folder of a run (it has no {CHECKPOINTS})",
                STATE
            ),
        ),
        false => error,
    }
}

/// Refuses to continue from a checkpoint where the run's folder holds newer ones: they belong to another continuation, and
/// the next `auto` would take them for this one's.
fn ensure_newest(run: &Path, checkpoint: &Checkpoint) -> Result<()> {
    let newest = checkpoint::list(run)?.pop();
    match newest.filter(|(step, _)| *step > checkpoint.state.step) {
        None => Ok(()),
        Some((_, newer)) => Err(Error::file(
            newer,
            format!(
                "is newer than {}: delete it, or choose another --out for this continuation",
                checkpoint.folder().display()
            ),
        )),
    }
}

impl Candidates {
    /// With all checkpoints of the run in `folder`.
    fn with_all_of(mut self, folder: &Path) -> Result<Self> {
        for (_, folder) in checkpoint::list(folder)?.into_iter().rev() {
            match Checkpoint::open(&folder) {
                Ok(checkpoint) => self.checkpoints.push(checkpoint),
                Err(error) => self.refused.push((folder, error.to_string())),
            }
        }
        self.ensure_some()?;
        Ok(self)
    }

    /// A run that has checkpoints never begins anew because none of them can be used.
    fn ensure_some(&self) -> Result<()> {
        match self.refused.first() {
            Some((_, reason)) if self.checkpoints.is_empty() => Err(Error::invalid(format!(
                "none of the {} checkpoints can be used: {reason}; choose another --out to begin anew",
                self.refused.len()
            ))),
            _ => Ok(()),
        }
    }

    /// Puts the newest good checkpoint into `model` and returns it; `None` where there was none to begin with. One is good when its
    /// files are those that were written, its numbers are finite, and so is the loss that they give (`probe`).
    ///
    /// # Errors
    /// When there were some and none is good, when they belong to another configuration, or the observer asks to stop.
    pub fn restore(
        mut self,
        model: &mut TrainableModel,
        probe: &mut Probe<'_>,
        world: &World,
        progress: &mut Progress<'_>,
    ) -> Result<Option<Checkpoint>> {
        let names: Vec<String> = self
            .checkpoints
            .iter()
            .map(|one| one.folder().display().to_string())
            .collect();
        world.agree("checkpoints", names.join("\n").as_bytes())?;
        for checkpoint in std::mem::take(&mut self.checkpoints) {
            let reason = match damage(&checkpoint, model, probe, world, progress)? {
                None => {
                    world.on_first("refused checkpoints", || {
                        self.set_aside(&checkpoint, progress);
                        Ok(())
                    })?;
                    return Ok(Some(checkpoint));
                }
                Some(reason) if self.named => return Err(Error::invalid(reason)),
                Some(reason) => reason,
            };
            self.refused.push((checkpoint.folder().into(), reason));
        }
        self.ensure_some()?;
        Ok(None)
    }

    /// Says what was refused, and moves it out of the way of the run that goes on from an older checkpoint.
    fn set_aside(&self, chosen: &Checkpoint, progress: &mut Progress<'_>) {
        for (folder, reason) in &self.refused {
            progress.notice(&format!("a checkpoint cannot be used: {reason}"));
            let newer = checkpoint::step_of(folder) > Some(chosen.state.step);
            if newer && folder.parent() == Some(&self.run.join(CHECKPOINTS)) {
                match checkpoint::refuse(folder) {
                    Ok(aside) => progress.notice(&format!("it is set aside as {}", aside.display())),
                    Err(error) => progress.notice(&error.to_string()),
                }
            }
        }
    }
}

/// Why the run cannot go on from a checkpoint, which is put into `model`; `None` when it can.
fn damage(
    checkpoint: &Checkpoint,
    model: &mut TrainableModel,
    probe: &mut Probe<'_>,
    world: &World,
    progress: &mut Progress<'_>,
) -> Result<Option<String>> {
    let reason = world.first_decides("checksums", || unsound(checkpoint, progress))?;
    if reason.is_some() {
        return Ok(reason);
    }
    let folder = checkpoint.folder().display();
    let restored = world.together("state", checkpoint.restore(model))?;
    let names = world.share("numbers", restored)?;
    if let Some(name) = names.into_iter().flatten().next() {
        return Ok(Some(format!("{folder}: `{name}` holds numbers that are not finite")));
    }
    let loss = world.decide("loss of a picture", || probe(model))?;
    let loss = loss.filter(|loss| !loss.is_finite());
    Ok(loss.map(|loss| format!("{folder}: with its weights the loss of a picture is {loss}")))
}

/// Why the files of a checkpoint cannot be those that were written.
fn unsound(checkpoint: &Checkpoint, progress: &mut Progress<'_>) -> Result<Option<String>> {
    const MIB: u64 = 1 << 20;
    let mut checked = |done: u64, total: u64| {
        progress.report(
            "checking the checkpoint (MiB)",
            done.div_ceil(MIB) as usize,
            total.div_ceil(MIB) as usize,
        )
    };
    match checkpoint.verify(&mut checked) {
        Ok(damaged) => {
            for path in damaged {
                progress.notice(&format!(
                    "{} is missing or damaged on the disk (checksum): the run goes on, for the state holds the same and more, but \
                     nothing should be made of this file",
                    path.display()
                ));
            }
            Ok(None)
        }
        Err(Error::Interrupted) => Err(Error::Interrupted),
        Err(error) => Ok(Some(error.to_string())),
    }
}

/// The state of a checkpoint, made to fit the configuration; `fresh` is that of a run that begins.
///
/// # Errors
/// When it belongs to a run that began from another model.
pub(super) fn continued(
    resumed: &Checkpoint,
    config: &TrainConfig,
    fresh: RunState,
    progress: &mut Progress<'_>,
) -> Result<RunState> {
    let state = resumed.state.clone();
    if state.model != fresh.model {
        return Err(Error::file(
            resumed.folder(),
            "belongs to a run that began from another model: name that one again, or choose another --out",
        ));
    }
    if state.objective != fresh.objective {
        return Err(Error::file(
            resumed.folder(),
            format!(
                "was trained for {}, and the run is to go on for {}: give the keys objective, betas and zero_snr as before, or choose another \
                 --out and begin from this checkpoint as a model",
                state.objective, fresh.objective
            ),
        ));
    }
    for text in changes(config, &state, &fresh.config) {
        progress.notice(&text);
    }
    let position = match state.data == fresh.data {
        true => state.position,
        false => {
            progress.notice("the data, their sizes, the batch or the seed changed: the run goes on with a new epoch");
            Position {
                epoch: state.position.epoch + 1,
                batch: 0,
            }
        }
    };
    Ok(RunState {
        position,
        data: fresh.data,
        config: fresh.config,
        guard: state.guard.rested(),
        ..state
    })
}

/// What was due at `step` and was not made up for by an earlier continuation, as far as the log of the run in `run` tells.
pub(super) fn still_due(run: &Path, step: u64, due: Due) -> Due {
    if due == Due::default() {
        return due;
    }
    let records = log::read(run).unwrap_or_default();
    let done = |is_it: fn(&Record) -> bool| records.iter().any(|record| record.step() == step && is_it(record));
    Due {
        validation: due.validation && !done(|record| matches!(record, Record::Validation { .. })),
        samples: due.samples && !done(|record| matches!(record, Record::Samples { .. })),
    }
}

/// Keys that change how the run goes on in a way that is easily overlooked.
const TOLD: [&str; 9] = [
    "lr",
    "lr_end",
    "warmup",
    "schedule",
    "steps",
    "accumulate",
    "clip_norm",
    "ema",
    "weight_decay",
];

/// What the user may not expect of other values than the checkpoint's run had.
fn changes(config: &TrainConfig, state: &RunState, new: &Value) -> Vec<String> {
    let mut told = Vec::new();
    if state.step > config.steps {
        told.push(format!(
            "{} steps are done already and steps = {} asks for fewer: there is nothing left to do",
            state.step, config.steps
        ));
    }
    let values = TOLD.iter().map(|key| (key, &state.config[*key], &new[*key]));
    let changed = values.filter(|(_, old, new)| old != new);
    let changed: Vec<String> = changed
        .map(|(key, old, new)| format!("{key} {} → {}", shown(old), shown(new)))
        .collect();
    if !changed.is_empty() {
        told.push(format!("other values than before the break: {}", changed.join(", ")));
    }
    let old: Option<TrainConfig> = serde_json::from_value(state.config.clone()).ok();
    let cosine = |config: &TrainConfig| config.schedule == ScheduleKind::Cosine;
    if let Some(old) = old.filter(|old| cosine(old) && cosine(config) && state.step < config.steps) {
        let [before, now] = [&old, config].map(|config| LearningRate::new(config).at(state.step));
        if old.steps != config.steps && before != now {
            told.push(format!(
                "the cosine now ends at step {} instead of {}: the learning rate goes on at {now:.3e}, where it would have been \
                 {before:.3e}",
                config.steps, old.steps
            ));
        }
    }
    told
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "none".into(),
        Value::String(text) => text.clone(),
        value => value.to_string(),
    }
}
