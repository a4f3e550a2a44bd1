//! Where a run writes what happens: its log, its event file, and the observer.

use std::path::Path;

use super::log::{Record, RunLog};
use super::{Event, Observer};
use crate::error::Result;
use crate::image_io::RgbImage;
use crate::report::{EventFile, Shown};

/// The folder of event files in the run's folder.
const EVENTS: &str = "events";

/// The log and the event file of a run.
pub(super) struct Journal {
    log: RunLog,
    events: EventFile,
    /// Whether it was said that they cannot be written.
    failed: bool,
}

impl Journal {
    /// Opens both in the folder `run` for a run that continues after `step`, 0 for a new one.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn open(run: &Path, step: u64) -> Result<Self> {
        let first_step = if step == 0 { 0 } else { step + 1 };
        Ok(Journal {
            log: RunLog::open(run, step)?,
            events: EventFile::create(&run.join(EVENTS), first_step)?,
            failed: false,
        })
    }

    /// Writes a line to the log and the event file, and tells the observer.
    pub fn record(&mut self, record: &Record, observer: &mut dyn Observer) {
        let mut outcome = self.log.add(record);
        let scalars = scalars(record);
        if !scalars.is_empty() {
            outcome = outcome.and(self.events.add(record.step(), &scalars));
        }
        self.note(outcome, observer);
        observer.event(&Event::Record(record));
    }

    /// Puts a picture into the event file.
    pub fn picture(&mut self, step: u64, tag: &str, image: &RgbImage, png: &[u8], observer: &mut dyn Observer) {
        let shown = Shown::Picture {
            png,
            width: image.width(),
            height: image.height(),
        };
        let outcome = self.events.add(step, &[(tag, shown)]);
        self.note(outcome, observer);
    }

    /// Says once that nothing can be written; training goes on without.
    fn note(&mut self, outcome: Result<()>, observer: &mut dyn Observer) {
        if let Err(error) = outcome
            && !std::mem::replace(&mut self.failed, true)
        {
            observer.event(&Event::Notice(&format!("the log is incomplete: {error}")));
        }
    }
}

/// What an event file shows of a record.
fn scalars(record: &Record) -> Vec<(&'static str, Shown<'static>)> {
    match record {
        Record::Train(train) => {
            let optional = [
                ("train/loss", train.loss),
                ("train/grad_norm", train.grad_norm),
                ("speed/mfu", train.mfu),
            ];
            let always = [
                ("train/lr", train.lr),
                ("train/skipped", train.skipped as f64),
                ("speed/pictures_per_second", train.pictures_per_second),
                ("speed/data_wait", train.data_wait),
                ("memory/peak_bytes", train.peak_memory_bytes as f64),
            ];
            let optional = optional.into_iter().filter_map(|(tag, value)| Some((tag, value?)));
            optional
                .chain(always)
                .map(|(tag, value)| (tag, Shown::Scalar(value)))
                .collect()
        }
        Record::Validation { loss, .. } => vec![("validation/loss", Shown::Scalar(*loss))],
        _ => Vec::new(),
    }
}
