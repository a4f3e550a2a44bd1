//! The run's log for programs, `log.jsonl`: one JSON object a line, told apart by `kind`. `step` counts the optimizer steps done.
//!
//! A run that is continued drops what was logged after the checkpoint that it continues from, so that every step stands in
//! the file once.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::files;
use crate::limits::Budget;
use crate::profile::PartTime;

/// The log's name in the run's folder.
pub const LOG: &str = "log.jsonl";

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// A run, or a part of one, begins.
    Start(Box<StartRecord>),
    /// An interval of training.
    Train(TrainRecord),
    /// The loss on held-out pictures.
    Validation {
        /// Steps done.
        step: u64,
        /// The mean loss.
        loss: f64,
        /// What it took.
        seconds: f64,
    },
    /// A sheet of samples.
    Samples {
        /// Steps done.
        step: u64,
        /// The picture, relative to the run's folder.
        file: String,
        /// Width and height of each sample in it.
        size: [usize; 2],
        /// Samples in it.
        count: usize,
    },
    /// A checkpoint.
    Checkpoint {
        /// Steps done.
        step: u64,
        /// The folder, relative to the run's.
        folder: String,
        /// Bytes written.
        bytes: u64,
        /// From when it was due until it was on the disk and old ones were deleted.
        seconds: f64,
        /// For how long of that training stood still; not told by earlier versions, in which it stood still throughout.
        #[serde(default)]
        stall_seconds: Option<f64>,
    },
    /// Something that the user may not expect.
    Notice {
        /// Steps done.
        step: u64,
        /// What.
        text: String,
    },
    /// A picture or caption that cannot be used.
    Damaged {
        /// Steps done.
        step: u64,
        /// The picture, or the line of the metadata.
        what: String,
        /// Why.
        reason: String,
    },
    /// Where the time of this part of the run's steps went.
    Profile {
        /// Steps done.
        step: u64,
        /// The parts of a step.
        parts: Vec<PartTime>,
    },
    /// The end of a run, or of a part of one.
    End {
        /// Steps done.
        step: u64,
        /// `done`, `stopped`, or what went wrong.
        outcome: String,
    },
}

/// What a run begins with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StartRecord {
    /// Steps done.
    pub step: u64,
    /// Seconds since 1970.
    pub time: f64,
    /// The device.
    pub device: String,
    /// Every key of the configuration.
    pub config: Value,
    /// Pictures to train on.
    pub pictures: usize,
    /// Pictures held out.
    pub held_out: usize,
    /// Where a picture's noise comes from: `seed` or `fresh`.
    pub noise: String,
    /// Parameters that are trained.
    pub trained_parameters: u64,
    /// All parameters of the transformer.
    pub parameters: u64,
}

/// An interval of training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainRecord {
    /// Steps done.
    pub step: u64,
    /// Pictures seen since the run began.
    pub pictures: u64,
    /// Epochs done.
    pub epoch: u32,
    /// The mean loss of the interval's steps that were not skipped.
    pub loss: Option<f64>,
    /// The gradients' norm, the mean of the same steps.
    pub grad_norm: Option<f64>,
    /// The last step's learning rate.
    pub lr: f64,
    /// Steps skipped since the run began.
    pub skipped: u64,
    /// Wall time of a step.
    pub seconds_per_step: f64,
    /// Pictures trained on in a second.
    pub pictures_per_second: f64,
    /// The share of the GPU's peak by its datasheet that the needed arithmetic reached ([`mfu`](crate::ceilings::mfu)).
    pub mfu: Option<f64>,
    /// The most memory at once since the last interval.
    pub peak_memory_bytes: u64,
    /// The share of the interval that was spent waiting for pictures.
    pub data_wait: f64,
    /// Seconds of training since the run began, time out between its parts not counted.
    pub elapsed_seconds: f64,
    /// Seconds to the last step at this speed.
    pub eta_seconds: f64,
}

impl Record {
    /// Steps done when it was written.
    pub fn step(&self) -> u64 {
        match self {
            Record::Start(start) => start.step,
            Record::Train(train) => train.step,
            Record::Validation { step, .. }
            | Record::Samples { step, .. }
            | Record::Checkpoint { step, .. }
            | Record::Notice { step, .. }
            | Record::Damaged { step, .. }
            | Record::Profile { step, .. }
            | Record::End { step, .. } => *step,
        }
    }
}

/// A log that grows.
pub struct RunLog {
    path: PathBuf,
    file: File,
    /// Bytes of whole lines.
    whole: u64,
    /// Whether an incomplete line may stand at the end.
    torn: bool,
}

impl RunLog {
    /// Opens the log in `folder` for a run that continues after `step`, 0 for a new one; begins one where there is none. Lines that
    /// stay do so byte by byte.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub fn open(folder: &Path, step: u64) -> Result<Self> {
        let path = folder.join(LOG);
        let failed = |error| Error::io(&path, error);
        let old = match step {
            0 => Vec::new(),
            _ if !path.exists() => Vec::new(),
            _ => files::read(&path, Budget::LOG)?,
        };
        let mut text = Vec::new();
        for line in old.split(|&byte| byte == b'\n').filter(|line| belongs(line, step)) {
            text.extend_from_slice(line);
            text.push(b'\n');
        }
        files::replace(&path, &text)?;
        let file = OpenOptions::new().append(true).open(&path).map_err(failed)?;
        Ok(RunLog {
            path,
            file,
            whole: text.len() as u64,
            torn: false,
        })
    }

    /// Adds a line. What a disk that is full takes of it is taken away again, so that the next line stands by itself.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn add(&mut self, record: &Record) -> Result<()> {
        let mut text = line(record);
        if self.torn && self.file.set_len(self.whole).is_err() {
            // At least the next line begins anew.
            text.insert(0, b'\n');
        }
        self.torn = true;
        if let Err(error) = self.file.write_all(&text) {
            self.torn = self.file.set_len(self.whole).is_err();
            return Err(Error::io(&self.path, error));
        }
        self.torn = false;
        self.whole = self
            .file
            .metadata()
            .map_or(self.whole + text.len() as u64, |file| file.len());
        Ok(())
    }
}

/// Whether a line of an earlier part stays in the log of a run that continues after `step`.
fn belongs(line: &[u8], step: u64) -> bool {
    // The end of an earlier part is no end of the run.
    serde_json::from_slice(line)
        .is_ok_and(|record: Record| record.step() <= step && !matches!(record, Record::End { .. }))
}

fn line(record: &Record) -> Vec<u8> {
    let mut line = serde_json::to_vec(record).expect("a record has only names as keys");
    line.push(b'\n');
    line
}

/// The lines of the log in `folder`. One that a crash or a full disk left incomplete is left out.
///
/// # Errors
/// When there is no log, or it is larger than any run's.
pub fn read(folder: &Path) -> Result<Vec<Record>> {
    let bytes = files::read(&folder.join(LOG), Budget::LOG)?;
    let lines = bytes.split(|&byte| byte == b'\n');
    Ok(lines.filter_map(|line| serde_json::from_slice(line).ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn validation(step: u64) -> Record {
        Record::Validation {
            step,
            loss: 0.5,
            seconds: 1.0,
        }
    }

    fn end(step: u64) -> Record {
        Record::End {
            step,
            outcome: "stopped".into(),
        }
    }

    #[test]
    fn continued_logs_hold_every_step_once() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = RunLog::open(folder.path(), 0).unwrap();
        for record in [validation(10), validation(20), end(20), validation(30)] {
            log.add(&record).unwrap();
        }
        log.file.write_all(b"{\"kind\":\"valid").unwrap();
        let mut log = RunLog::open(folder.path(), 20).unwrap();
        log.add(&validation(30)).unwrap();
        assert_eq!(
            read(folder.path()).unwrap(),
            [validation(10), validation(20), validation(30)]
        );
        RunLog::open(folder.path(), 0).unwrap();
        assert!(read(folder.path()).unwrap().is_empty());
    }

    /// Numbers whose shortest decimal is long: what is read back is what was written, and lines that stay are not touched.
    #[test]
    fn lines_that_stay_keep_every_digit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LOG);
        let mut log = RunLog::open(folder.path(), 0).unwrap();
        let mut word = 0x9e37_79b9_7f4a_7c15u64;
        for step in 1..=400 {
            word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(step);
            let loss = f64::from_bits(0x3fe0_0000_0000_0000 | word >> 12);
            log.add(&Record::Validation {
                step,
                loss,
                seconds: loss / 3.0,
            })
            .unwrap();
        }
        let spaced = b"{ \"kind\": \"notice\", \"step\": 3, \"text\": \"by hand\" }\n";
        log.file.write_all(spaced).unwrap();
        let before = std::fs::read(&path).unwrap();
        for _ in 0..3 {
            RunLog::open(folder.path(), 400).unwrap();
            assert!(std::fs::read(&path).unwrap() == before, "lines that stay have changed");
        }
        let text = String::from_utf8(before).unwrap();
        let records = read(folder.path()).unwrap();
        let again: Vec<String> = records[..400]
            .iter()
            .map(|record| String::from_utf8(line(record)).unwrap())
            .collect();
        assert!(text.starts_with(&again.concat()), "numbers change when they are read");
    }

    /// Earlier versions did not say how long training stood still.
    #[test]
    fn checkpoints_of_earlier_logs_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let old = "{\"kind\":\"checkpoint\",\"step\":4,\"folder\":\"checkpoints/step-00000004\",\"bytes\":9,\"seconds\":2.5}\n";
        let new = Record::Checkpoint {
            step: 8,
            folder: "checkpoints/step-00000008".into(),
            bytes: 9,
            seconds: 2.5,
            stall_seconds: Some(0.25),
        };
        let text = [old.as_bytes(), &line(&new)].concat();
        std::fs::write(folder.path().join(LOG), text).unwrap();
        let records = read(folder.path()).unwrap();
        let Record::Checkpoint {
            step, stall_seconds, ..
        } = records[0]
        else {
            panic!("{records:?}");
        };
        assert_eq!((step, stall_seconds), (4, None));
        assert_eq!(records[1], new);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_line_that_a_full_disk_tore_takes_no_other_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LOG);
        let mut log = RunLog::open(folder.path(), 0).unwrap();
        log.add(&validation(1)).unwrap();
        // What a full disk does: it takes a part of the line, and the rest is an error.
        log.file.write_all(b"{\"kind\":\"validation\",\"st").unwrap();
        log.torn = true;
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let disk = std::mem::replace(&mut log.file, full);
        assert!(log.add(&validation(2)).is_err());
        log.file = disk;
        log.add(&validation(3)).unwrap();
        assert_eq!(read(folder.path()).unwrap(), [validation(1), validation(3)]);
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 2);
    }
}
