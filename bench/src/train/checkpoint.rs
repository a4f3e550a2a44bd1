//! What a checkpoint takes: how long training stands still for it, and how long it is on its way to the disk.

use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use l2p_engine::checkpoint::Float;
use l2p_engine::train::run::checkpoint::{RunState, SaveOptions, save};
use l2p_engine::train::run::{Keep, SaveJob, Saver};
use l2p_engine::{Device, Result};
use serde::{Deserialize, Serialize};

use super::Trained;

/// Checkpoints that are written beside training.
const SAVED: u64 = 3;

/// Steps whose mean time is compared with that of steps beside which a checkpoint is written.
const STEPS_ALONE: usize = 10;

/// What checkpoints took.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct CheckpointTimes {
    /// Bytes of one's files.
    pub bytes: u64,
    /// Seconds until one is on the disk that is written from the model itself, while training stands still.
    pub plain_seconds: f64,
    /// The same, written beside training: the longest of several.
    pub seconds: f64,
    /// For how long training stood still for it: the longest of several.
    pub stall_seconds: f64,
    /// Until the host memory was there; steps were taken meanwhile.
    pub memory_seconds: f64,
    /// The longest step meanwhile.
    pub memory_step_ms: f64,
    /// A step's mean time, with nothing beside it.
    pub step_ms: f64,
    /// The same, while a checkpoint was written.
    pub beside_step_ms: f64,
}

impl CheckpointTimes {
    /// The share of the time of a run with a checkpoint every `steps` steps in which it stands still.
    pub fn share(&self, steps: u64) -> f64 {
        let training = steps as f64 * self.step_ms / 1e3;
        self.stall_seconds / (training + self.stall_seconds).max(f64::MIN_POSITIVE)
    }

    /// Writes checkpoints into folders of their own in `folder`, each of which is deleted before the next.
    ///
    /// # Errors
    /// When the disk does not take them, or the host has too little memory.
    pub(super) fn measure(device: &Device, trained: &mut Trained, folder: &Path) -> anyhow::Result<Self> {
        let run = || tempfile::tempdir_in(folder).with_context(|| format!("cannot write to {}", folder.display()));
        let mut saver = Saver::new();
        let (taken, bytes) = (Instant::now(), trained.model.snapshot_bytes() as u64);
        saver.prepare(device, bytes, Device::Cpu.available_memory()?);
        let mut memory_step_ms: f64 = 0.0;
        while saver.is_coming() {
            memory_step_ms = memory_step_ms.max(steps_ms(device, trained, 1)?);
        }
        let memory_seconds = taken.elapsed().as_secs_f64();
        let step_ms = steps_ms(device, trained, STEPS_ALONE)?;
        let mut times = CheckpointTimes {
            bytes: 0,
            plain_seconds: 0.0,
            seconds: 0.0,
            stall_seconds: 0.0,
            memory_seconds,
            memory_step_ms,
            step_ms,
            beside_step_ms: 0.0,
        };
        for _ in 0..SAVED {
            let run = run()?;
            device.synchronize()?;
            let started = Instant::now();
            // As a run does before it saves.
            let not_finite = trained.model.first_not_finite()?;
            anyhow::ensure!(not_finite.is_none(), "{not_finite:?} is not finite");
            let due = job(run.path(), trained.model.steps());
            let done = saver.begin(&mut trained.model, due, started)?;
            if let Some(reason) = saver.take_notice() {
                anyhow::bail!("{reason}");
            }
            anyhow::ensure!(done.is_none(), "it was not written beside training");
            // The first step waits for the copies, which counts as standing still.
            trained.step()?;
            device.synchronize()?;
            let mut beside = Vec::new();
            let finished = loop {
                match saver.poll()? {
                    Some(finished) => break finished,
                    None => beside.push(steps_ms(device, trained, 1)?),
                }
            };
            times.seconds = times.seconds.max(finished.seconds);
            times.stall_seconds = times.stall_seconds.max(finished.stall_seconds);
            times.bytes = finished.into_saved()?.bytes;
            times.beside_step_ms = times.beside_step_ms.max(mean(&beside));
        }
        drop(saver);
        let (run, started) = (run()?, Instant::now());
        let SaveJob { state, options, .. } = job(run.path(), trained.model.steps());
        save(run.path(), &trained.model, &state, options, &|_| Ok(()), &mut ())?;
        times.plain_seconds = started.elapsed().as_secs_f64();
        Ok(times)
    }
}

/// The mean milliseconds of some steps, each waited for.
fn steps_ms(device: &Device, trained: &mut Trained, count: usize) -> Result<f64> {
    let started = Instant::now();
    for _ in 0..count {
        trained.step()?;
        device.synchronize()?;
    }
    Ok(started.elapsed().as_secs_f64() * 1e3 / count as f64)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn job(run: &Path, step: u64) -> SaveJob {
    SaveJob {
        run: run.into(),
        state: RunState {
            step,
            ..RunState::new(String::new(), String::new(), serde_json::Value::Null)
        },
        options: SaveOptions {
            dtype: Float::Bf16,
            average: false,
        },
        complete: Box::new(|_| Ok(())),
        share: None,
        keep: Keep {
            last: 1,
            every: 0,
            calm: step,
        },
        observer: Box::new(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_of_all_the_time() {
        let times = CheckpointTimes {
            bytes: 1,
            plain_seconds: 50.0,
            seconds: 45.0,
            stall_seconds: 1.0,
            memory_seconds: 10.0,
            memory_step_ms: 300.0,
            step_ms: 198.0,
            beside_step_ms: 200.0,
        };
        assert!((times.share(500) - 0.01).abs() < 1e-12);
    }
}
