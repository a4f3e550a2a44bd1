//! A training run: from a configuration to checkpoints, logs and a report, all in one folder.
//!
//! [`train`] is the whole of it. A run's folder holds
//!
//! | | |
//! | --- | --- |
//! | `log.jsonl` | what happened, for programs ([`log`]) |
//! | `events/` | the same for TensorBoard |
//! | `checkpoints/` | what was trained, and what the run continues from ([`checkpoint`]) |
//! | `checksums.json` | the checksum of `init.safetensors` |
//! | `samples/` | sheets of samples |
//! | `report.html` | curves and sheets, for people |
//! | `init.safetensors` | the model that training began from, where it was made for the run |
//! | `cache/` | caption features and latents, unless the configuration keeps them elsewhere |
//!
//! The folder is locked while a run writes to it; what a killed one left half-written is cleared up by the next.

pub mod checkpoint;
mod checksums;
mod choices;
mod compare;
mod config;
mod evaluate;
mod feeder;
mod forecast;
mod guard;
mod history;
mod journal;
mod keys;
mod learning_rate;
pub mod log;
mod manifest;
mod numbers;
mod package;
mod progress;
mod ranks;
mod report;
mod resume;
mod samples;
mod saver;
mod setup;
mod slices;
mod speed;
mod start;
mod trainer;
mod validation;

use std::path::PathBuf;

pub use checksums::{Checksums, Sum};
pub use choices::{Init, Noise, SaveType, ScheduleKind};
pub use compare::{Comparison, XAxis, compare, sample_rows};
pub use config::{KEYS, TrainConfig, nearest_key};
pub use evaluate::{Evaluation, evaluate};
pub use forecast::{Choice, Forecast, Work};
pub use guard::{Guard, StepOutcome, Verdict};
pub use keys::Key;
pub use learning_rate::LearningRate;
pub use package::{PackageOptions, Packaged, package};
pub use report::write_report;
pub use resume::Resume;
pub use saver::{AddFiles, Finished, Keep, SaveJob, Saver, Written};
pub use trainer::{Summary, train};

use self::log::Record;

/// Told what happens in a run, and asked whether it should go on.
pub trait Observer {
    /// Something happened.
    fn event(&mut self, event: &Event<'_>);

    /// Whether the user asked to stop. The run then saves what its last whole step left, and ends with
    /// [`crate::Error::Interrupted`].
    fn stop_requested(&self) -> bool;
}

/// What happens in a run.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// Work before the first step, or between steps, goes on.
    Progress {
        /// What work.
        what: &'static str,
        /// Parts done.
        done: usize,
        /// Parts in all.
        total: usize,
    },
    /// The first step is about to be taken.
    Begins {
        /// Steps done.
        step: u64,
        /// Steps in all.
        steps: u64,
        /// The checkpoint that the run continues from.
        resumed: Option<PathBuf>,
    },
    /// A batch of a step with several of them was submitted to the device.
    Batch {
        /// Batches of the step that were.
        done: usize,
        /// Batches of the step.
        total: usize,
    },
    /// A step was submitted to the device.
    Step {
        /// Steps submitted.
        step: u64,
    },
    /// A line of the log.
    Record(&'a Record),
    /// Something that stops nothing.
    Notice(&'a str),
}
