//! What a benchmark found: rows, printed as they come and written as JSON.

use std::fmt::Write;
use std::io::Write as _;
use std::path::Path;

use anyhow::Context;
use l2p_engine::ceilings::Ceilings;
use l2p_engine::device::format_bytes;
use l2p_engine::profile::Work;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::environment::Environment;
use crate::timing::{median, spread};

/// The times of one piece of work.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// The median of the samples.
    pub milliseconds: f64,
    /// The distance of the quartiles over the median.
    pub spread: f64,
    /// Every sample.
    pub samples_ms: Vec<f64>,
}

impl Timing {
    /// Of these samples.
    pub fn of(samples_ms: Vec<f64>) -> Self {
        Timing {
            milliseconds: median(&samples_ms),
            spread: spread(&samples_ms),
            samples_ms,
        }
    }
}

/// The same work in PyTorch.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PeerTime {
    /// Which way: a backend, or how it was compiled.
    pub name: String,
    /// Its times; none when it failed.
    #[serde(flatten)]
    pub timing: Timing,
    /// Our time over its time.
    pub ratio: Option<f64>,
    /// The most memory that its tensors took during a run.
    pub peak_bytes: Option<u64>,
    /// The same above what was there before: weights and inputs.
    pub activation_bytes: Option<u64>,
    /// What the driver counts for its process, context and cache included.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub driver_bytes: Option<u64>,
    /// Why it could not be run.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub failure: Option<String>,
}

/// One case of a benchmark.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Its name, for `--once` and for tables.
    pub name: String,
    /// Sizes and choices.
    pub inputs: Value,
    /// Our times.
    #[serde(flatten)]
    pub timing: Timing,
    /// What is done.
    pub work: Work,
    /// Products, in 10¹² floating point operations per second.
    pub tflops: f64,
    /// Memory traffic in 10¹² bytes per second.
    pub terabytes_per_second: f64,
    /// The share of the measured ceiling.
    pub share: f64,
    /// The most device memory held at once.
    pub peak_bytes: u64,
    /// The same above what was there before: weights and inputs.
    pub activation_bytes: u64,
    /// ‖found − reference‖ / ‖reference‖
    pub error: f64,
    /// The largest error that passes.
    pub tolerance: f64,
    /// Whether the result is right.
    pub pass: bool,
    /// The same work in PyTorch.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub peers: Vec<PeerTime>,
    /// What else was found.
    #[serde(flatten)]
    pub details: Map<String, Value>,
}

impl Row {
    /// A row without peers.
    pub fn new(name: &str, inputs: Value, timing: Timing, work: Work, ceilings: &Ceilings) -> Self {
        let seconds = timing.milliseconds.max(f64::MIN_POSITIVE) / 1e3;
        Row {
            name: name.into(),
            inputs,
            work,
            tflops: work.flops as f64 / seconds / 1e12,
            terabytes_per_second: work.bytes as f64 / seconds / 1e12,
            share: ceilings.share(work, timing.milliseconds),
            timing,
            peak_bytes: 0,
            activation_bytes: 0,
            error: f64::NAN,
            tolerance: 0.0,
            pass: false,
            peers: Vec::new(),
            details: Map::new(),
        }
    }

    /// The row with what its check found. An error that is no number does not pass, and counts as infinite.
    pub fn checked(self, error: f64, tolerance: f64) -> Self {
        Row {
            // JSON has no infinity: the largest number stands for it.
            error: if error.is_finite() { error } else { f64::MAX },
            tolerance,
            pass: error <= tolerance,
            ..self
        }
    }

    /// The heads of the columns of [`Row::line`].
    pub fn header() -> String {
        format!(
            "{:<34}{:>12}{:>8}{:>10}{:>8}{:>9}{:>10}{:>11}{:>11}",
            "", "median", "spread", "TFLOP/s", "TB/s", "ceiling", "error", "above", "peak"
        )
    }

    /// The row as a line of a table, its peers as further lines.
    pub fn line(&self) -> String {
        let mut text = format!(
            "{:<34}{:>12}{:>8}{:>10}{:>8}{:>9}{:>10}{:>11}{:>11}",
            self.name,
            milliseconds(self.timing.milliseconds),
            percent(self.timing.spread),
            rate(self.tflops),
            rate(self.terabytes_per_second),
            percent(self.share),
            format!("{:.1e}", self.error),
            format_bytes(self.activation_bytes),
            format_bytes(self.peak_bytes),
        );
        if !self.pass {
            let _ = write!(text, "  WRONG: above {:.1e}", self.tolerance);
        }
        for peer in &self.peers {
            let name = format!("  PyTorch, {}", peer.name);
            let _ = match &peer.failure {
                Some(reason) => write!(text, "\n{name:<34}{:>12}  {reason}", "-"),
                None => write!(
                    text,
                    "\n{name:<34}{:>12}{:>8}{:>46}{:>11}  our time is {:.3} of it",
                    milliseconds(peer.timing.milliseconds),
                    percent(peer.timing.spread),
                    peer.activation_bytes.map_or(String::new(), format_bytes),
                    peer.peak_bytes.map_or(String::new(), format_bytes),
                    peer.ratio.unwrap_or(f64::NAN)
                ),
            };
        }
        text
    }

    /// The fastest peer.
    pub fn best_peer(&self) -> Option<&PeerTime> {
        let ran = self.peers.iter().filter(|peer| peer.failure.is_none());
        ran.min_by(|a, b| a.timing.milliseconds.total_cmp(&b.timing.milliseconds))
    }
}

/// A whole run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Which benchmark.
    pub bench: String,
    /// Where and when.
    #[serde(flatten)]
    pub environment: Environment,
    /// The version of PyTorch, where there were peers.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub torch: Option<String>,
    /// The device's ceilings, measured in this run.
    pub ceilings: Ceilings,
    /// What was found.
    pub rows: Vec<Row>,
}

impl Record {
    /// Reads a record.
    ///
    /// # Errors
    /// When the file cannot be read or holds something else.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is not a record of a benchmark", path.display()))
    }

    /// The row of that name.
    pub fn row(&self, name: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.name == name)
    }
}

/// Writes `value` as JSON to a file, whole or not at all; `-` is standard output.
///
/// # Errors
/// When it cannot be written; the message names the file.
pub fn write_json(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    if path == Path::new("-") {
        return l2p_bins::print(&text);
    }
    write_text(path, &text)
}

/// Writes a text file, whole or not at all; makes its folder.
///
/// # Errors
/// When it cannot be written; the message names the file.
pub fn write_text(path: &Path, text: &str) -> anyhow::Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let cannot = || format!("cannot write {}", path.display());
    std::fs::create_dir_all(folder).with_context(cannot)?;
    let mut file = tempfile::Builder::new()
        .permissions(readable())
        .tempfile_in(folder)
        .with_context(cannot)?;
    file.write_all(text.as_bytes()).with_context(cannot)?;
    file.persist(path).with_context(cannot)?;
    Ok(())
}

/// The permissions of an ordinary file; temporary files are for their owner alone.
#[cfg(unix)]
fn readable() -> std::fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o644)
}

#[cfg(not(unix))]
fn readable() -> std::fs::Permissions {
    std::fs::metadata(".")
        .map(|found| found.permissions())
        .expect("the current folder has permissions")
}

/// A time for people: three digits.
pub fn milliseconds(value: f64) -> String {
    match value {
        value if value < 0.9995 => format!("{:.1} µs", value * 1e3),
        value if value < 99.95 => format!("{value:.2} ms"),
        value if value < 9995.0 => format!("{value:.0} ms"),
        value => format!("{:.1} s", value / 1e3),
    }
}

/// A share for people.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// A rate for people, empty where nothing is done.
fn rate(value: f64) -> String {
    match value {
        0.0 => String::new(),
        value if value < 0.0995 => format!("{value:.4}"),
        value if value < 9.995 => format!("{value:.2}"),
        value if value < 99.95 => format!("{value:.1}"),
        value => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn ceilings() -> Ceilings {
        Ceilings {
            bytes_per_second: 4e12,
            flops_per_second: 800e12,
            copy_bytes: 1,
            product_size: 1,
        }
    }

    fn row() -> Row {
        let work = Work {
            flops: 400_000_000_000,
            bytes: 1_000_000,
        };
        Row::new(
            "product",
            json!({"m": 1}),
            Timing::of(vec![1.0, 1.1, 0.9]),
            work,
            &ceilings(),
        )
    }

    #[test]
    fn rates_and_shares_follow_from_work_and_median() {
        let row = row();
        assert!((row.tflops - 400.0).abs() < 1e-9 && (row.share - 0.5).abs() < 1e-9);
        assert!((row.timing.spread - 0.1).abs() < 1e-9, "{}", row.timing.spread);
    }

    #[test]
    fn only_a_small_error_passes() {
        assert!(row().checked(1e-3, 1e-2).pass);
        for error in [2e-2, f64::NAN, f64::INFINITY] {
            let row = row().checked(error, 1e-2);
            assert!(!row.pass && row.error.is_finite() && row.line().contains("WRONG"));
        }
    }

    #[test]
    fn rows_survive_json() {
        let mut row = row().checked(1e-3, 1e-2);
        row.details.insert("idle".into(), json!(0.01));
        row.peers.push(PeerTime {
            name: "cudnn".into(),
            timing: Timing::of(vec![2.0]),
            ratio: Some(0.5),
            peak_bytes: None,
            activation_bytes: Some(3),
            driver_bytes: None,
            failure: None,
        });
        let read: Row = serde_json::from_str(&serde_json::to_string(&row).unwrap()).unwrap();
        assert_eq!(read.details["idle"], json!(0.01));
        assert_eq!(read.best_peer().unwrap().timing.milliseconds, 2.0);
        assert!(read.line().contains("our time is 0.500 of it"), "{}", read.line());
    }

    #[test]
    fn times_read_well() {
        assert_eq!(milliseconds(0.0123), "12.3 µs");
        assert_eq!(milliseconds(12.345), "12.35 ms");
        assert_eq!(milliseconds(5604.0), "5604 ms");
    }
}
