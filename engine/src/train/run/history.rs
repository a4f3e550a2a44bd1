//! What a run's log says, sorted: what its report shows, and what runs are compared by.

use std::path::{Component, Path, PathBuf};

use super::log::{Record, StartRecord, TrainRecord, read};
use crate::error::{Error, Result};
use crate::printable::shown_name;
use crate::profile::PartTime;
use crate::report::Series;

/// The folder of sheets in the run's folder.
pub(super) const SAMPLES: &str = "samples";

/// A sheet of samples.
pub(super) struct SheetRecord {
    pub step: u64,
    /// The picture, relative to the run's folder.
    pub file: String,
    /// Width and height of each sample.
    pub size: [usize; 2],
    /// Samples in it.
    pub count: usize,
}

/// A checkpoint that was made.
pub(super) struct SavedRecord {
    /// Bytes written.
    pub bytes: u64,
    /// Until it was on the disk.
    pub seconds: f64,
    /// For how long training stood still.
    pub stall_seconds: f64,
}

/// What a log says, sorted.
#[derive(Default)]
pub(super) struct History {
    pub starts: Vec<StartRecord>,
    pub intervals: Vec<TrainRecord>,
    /// Step and loss.
    pub validation: Vec<(u64, f64)>,
    pub samples: Vec<SheetRecord>,
    /// What was saved.
    pub checkpoints: Vec<SavedRecord>,
    /// Step and text.
    pub notices: Vec<(u64, String)>,
    /// Where the time of the last part's steps went, if that was asked for.
    pub profile: Vec<PartTime>,
    /// How the run ended, if it did.
    pub end: Option<(u64, String)>,
}

impl History {
    /// Reads the log of the run in `run`.
    ///
    /// # Errors
    /// When there is none.
    pub fn read(run: &Path) -> Result<Self> {
        let mut history = History::default();
        for record in read(run)? {
            match record {
                Record::Start(start) => history.starts.push(*start),
                Record::Train(interval) => history.intervals.push(interval),
                Record::Validation { step, loss, .. } => history.validation.push((step, loss)),
                Record::Samples {
                    step,
                    file,
                    size,
                    count,
                } => history.samples.push(SheetRecord {
                    step,
                    file,
                    size,
                    count,
                }),
                Record::Profile { parts, .. } => history.profile = parts,
                Record::Notice { step, text } => history.notices.push((step, text)),
                Record::Damaged { step, what, reason } => history.notices.push((step, format!("{what}: {reason}"))),
                Record::End { step, outcome } => history.end = Some((step, outcome)),
                Record::Checkpoint {
                    bytes,
                    seconds,
                    stall_seconds,
                    ..
                } => history.checkpoints.push(SavedRecord {
                    bytes,
                    seconds,
                    stall_seconds: stall_seconds.unwrap_or(seconds),
                }),
            }
        }
        Ok(history)
    }

    /// The last part of the run.
    pub fn start(&self) -> Option<&StartRecord> {
        self.starts.last()
    }

    /// A curve of the intervals by step.
    pub fn curve(&self, name: &str, value: impl Fn(&TrainRecord) -> Option<f64>) -> Series {
        let points = self
            .intervals
            .iter()
            .filter_map(|interval| Some((interval.step as f64, value(interval)?)));
        Series {
            name: name.into(),
            points: points.collect(),
            dashed: false,
        }
    }
}

/// The path of a sheet that a log names: a picture of the run's own, wherever a log that others wrote points to.
///
/// # Errors
/// When it names anything else.
pub(super) fn sheet_path(run: &Path, file: &str) -> Result<PathBuf> {
    let mut parts = Path::new(file).components();
    match (parts.next(), parts.next(), parts.next()) {
        (Some(Component::Normal(folder)), Some(Component::Normal(_)), None) if folder == SAMPLES => Ok(run.join(file)),
        _ => Err(Error::file(
            run,
            format!(
                "its log names `{}`, which is no sheet in its {SAMPLES}",
                shown_name(file)
            ),
        )),
    }
}
