//! The process that runs cases. It may die of one; whoever started it goes on with another.
//!
//! It is told ranges of cases and answers with a line for each: the case's number, then what [`Report`] holds as JSON.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::base::Base;
use crate::case::{Campaign, Case};
use crate::memory::{Counting, MOST};
use crate::readers::Ended;

/// After a case that took so long something may still go on that was given up; a new process takes the next one.
const SLOW: Duration = Duration::from_millis(2500);

/// Longer messages are taken for a file's content.
const LONGEST_MESSAGE: usize = 4096;

/// How a case ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The reader.
    pub reader: String,
    /// `accepted`, `drawn` or `refused`; otherwise what must not be.
    pub end: String,
    /// What was said of it.
    pub message: String,
    /// Bytes allocated at once, above those before.
    pub peak: usize,
    /// Seconds.
    pub seconds: f64,
}

impl Report {
    /// Whether the case ended as one may.
    pub fn is_fine(&self) -> bool {
        matches!(self.end.as_str(), "accepted" | "drawn" | "refused")
    }
}

/// Runs the ranges of cases that come through the socket.
///
/// # Errors
/// When the socket or the disk fails; the end of the socket is the end of the work.
pub fn serve(socket: &Path, base: &Path, scratch: &Path, campaign: Campaign) -> anyhow::Result<()> {
    note_panics();
    let base = Base::load(base)?;
    let stream = UnixStream::connect(socket)?;
    let mut out = stream.try_clone()?;
    for line in BufReader::new(stream).lines() {
        let line = line?;
        let Some((first, end)) = line.split_once(' ') else {
            continue;
        };
        for index in first.parse::<u64>()?..end.parse()? {
            let report = run(&base, campaign, index, &scratch.join("case"))?;
            writeln!(out, "{index} {}", serde_json::to_string(&report)?)?;
            if report.seconds > SLOW.as_secs_f64() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Makes and runs one case in `folder`, which is removed.
///
/// # Errors
/// When the disk does not take the case.
fn run(base: &Base, campaign: Campaign, index: u64, folder: &Path) -> anyhow::Result<Report> {
    let _ = std::fs::remove_dir_all(folder);
    std::fs::create_dir_all(folder)?;
    let report = run_made(Case::make(base, campaign, index, folder)?);
    std::fs::remove_dir_all(folder)?;
    Ok(report)
}

/// Runs a case that was made.
pub fn run_made(mut case: Case) -> Report {
    let reader = case.reader;
    let begun = Instant::now();
    let before = Counting::begin();
    let outcome = catch_unwind(AssertUnwindSafe(|| (reader.read)(&mut case)));
    let (peak, seconds) = (Counting::peak() - before, begun.elapsed().as_secs_f64());
    let panic = PANIC.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
    let (end, message) = match (panic, outcome) {
        (Some(message), _) => ("panic", message),
        (None, Err(_)) => ("panic", "no message".into()),
        (None, Ok(_)) if peak > MOST => ("memory", format!("{peak} bytes at once")),
        (None, Ok(Ended::Accepted)) => ("accepted", String::new()),
        (None, Ok(Ended::Drawn)) => ("drawn", String::new()),
        (None, Ok(Ended::Refused(message))) if message.len() > LONGEST_MESSAGE => ("a message without end", message),
        (None, Ok(Ended::Refused(message))) => ("refused", message),
        (None, Ok(Ended::Wrong(what, message))) => (what, message),
    };
    Report {
        reader: reader.name.into(),
        end: end.into(),
        message: message.chars().take(400).collect(),
        peak,
        seconds,
    }
}

/// The first panic of the case, on whichever thread.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

/// Keeps what panics say. Those that the engine expects of a library do not come here.
pub fn note_panics() {
    std::panic::set_hook(Box::new(|information| {
        let mut first = PANIC.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let message = information.to_string().replace('\n', " ");
        let trace = std::backtrace::Backtrace::force_capture().to_string();
        let ours = trace
            .lines()
            .map(str::trim)
            .filter(|line| line.contains("/src/") && line.starts_with("at ./"));
        let places: Vec<&str> = ours.take(4).collect();
        first.get_or_insert(format!("{message} {}", places.join(" ")));
    }));
}
