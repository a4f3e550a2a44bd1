//! The report of a run: one HTML file with curves and sheets of samples that needs nothing beside it.

use std::fmt::Write;
use std::path::{Component, Path, PathBuf};

use super::chart::{Chart, Series, escaped};
use super::log::{Record, StartRecord, TrainRecord, read};
use crate::device::format_bytes;
use crate::error::{Error, Result};
use crate::files;
use crate::limits::Budget;
use crate::printable::shown_name;
use crate::profile::PartTime;

/// The report's name in the run's folder.
const REPORT: &str = "report.html";

/// The folder of sheets in the run's folder.
pub(super) const SAMPLES: &str = "samples";

/// Sheets that are shown; of more, these many spread evenly, the last one among them.
const MOST_SHEETS: usize = 12;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:780px;margin:2em auto;padding:0 1em;color:#222}\
    table{border-collapse:collapse;margin:1em 0}td{padding:2px 12px 2px 0;vertical-align:top}\
    td:first-child{color:#666}svg,img{max-width:100%;height:auto}figure{margin:1em 0}figcaption{color:#666}\
    details{margin:1em 0}.sheet img{image-rendering:auto;width:100%}";

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

/// What a log says, sorted.
#[derive(Default)]
pub(super) struct History {
    pub starts: Vec<StartRecord>,
    pub intervals: Vec<TrainRecord>,
    /// Step and loss.
    pub validation: Vec<(u64, f64)>,
    pub samples: Vec<SheetRecord>,
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
                Record::Checkpoint { .. } => {}
            }
        }
        Ok(history)
    }

    /// The last part of the run.
    pub fn start(&self) -> Option<&StartRecord> {
        self.starts.last()
    }

    /// A curve of the intervals by step.
    fn curve(&self, name: &str, value: impl Fn(&TrainRecord) -> Option<f64>) -> Series {
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

/// Writes the report of the run in `run` from its log, and returns its path.
///
/// # Errors
/// When there is no log, or the disk does not take the report.
pub fn write_report(run: &Path) -> Result<PathBuf> {
    let history = History::read(run)?;
    let path = run.join(REPORT);
    files::replace(&path, html(run, &history).as_bytes())?;
    Ok(path)
}

fn html(run: &Path, history: &History) -> String {
    let name = run.canonicalize().unwrap_or_else(|_| run.into());
    let name = escaped(&name.file_name().unwrap_or_default().to_string_lossy());
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{name}</title><style>{STYLE}</style></head>\n\
         <body><h1>{name}</h1>\n{}",
        summary(history)
    );
    for chart in charts(history) {
        let _ = writeln!(html, "<figure>{chart}</figure>");
    }
    html.push_str(&profile(&history.profile));
    html.push_str(&sheets(run, history));
    html.push_str(&notices(history));
    if let Some(start) = history.start() {
        let config = serde_json::to_string_pretty(&start.config).unwrap_or_default();
        let _ = writeln!(
            html,
            "<details><summary>Configuration</summary><pre>{}</pre></details>",
            escaped(&config)
        );
    }
    html.push_str("</body></html>\n");
    html
}

fn summary(history: &History) -> String {
    let mut rows: Vec<(&str, String)> = Vec::new();
    if let Some(start) = history.start() {
        rows.push(("device", start.device.clone()));
        rows.push(("policy", start.config["policy"].as_str().unwrap_or_default().into()));
        rows.push((
            "parameters",
            format!(
                "{:.2} M trained of {:.2} M",
                millions(start.trained_parameters),
                millions(start.parameters)
            ),
        ));
        rows.push((
            "data",
            format!(
                "{} pictures, {} held out, noise by {}",
                start.pictures, start.held_out, start.noise
            ),
        ));
    }
    if let Some(last) = history.intervals.last() {
        rows.push((
            "steps",
            format!("{} ({} pictures, {} skipped)", last.step, last.pictures, last.skipped),
        ));
        rows.push((
            "training loss",
            last.loss.map_or("-".into(), |loss| format!("{loss:.4}")),
        ));
        rows.push(("training time", duration(last.elapsed_seconds)));
        rows.push(("speed", format!("{:.2} pictures/s", last.pictures_per_second)));
        let peak = history
            .intervals
            .iter()
            .map(|interval| interval.peak_memory_bytes)
            .max();
        rows.push(("peak memory", format_bytes(peak.unwrap_or(0))));
    }
    if let Some((step, loss)) = history.validation.last() {
        rows.push(("validation loss", format!("{loss:.4} at step {step}")));
    }
    rows.push(("parts", history.starts.len().to_string()));
    if let Some((_, outcome)) = &history.end {
        rows.push(("ended", outcome.clone()));
    }
    let rows = rows
        .into_iter()
        .map(|(name, value)| format!("<tr><td>{name}</td><td>{}</td></tr>", escaped(&value)));
    format!("<table>{}</table>\n", rows.collect::<String>())
}

fn charts(history: &History) -> Vec<String> {
    let chart = |title: &str, y: &str, series: Vec<Series>, logarithmic: bool| {
        let series: Vec<Series> = series.into_iter().filter(|series| !series.points.is_empty()).collect();
        (!series.is_empty()).then(|| {
            Chart {
                title,
                x: "step",
                y,
                series: &series,
                logarithmic,
            }
            .svg()
        })
    };
    let validation = Series {
        name: "validation".into(),
        points: history
            .validation
            .iter()
            .map(|(step, loss)| (*step as f64, *loss))
            .collect(),
        dashed: true,
    };
    let charts = [
        chart(
            "Flow-matching loss",
            "mean squared error",
            vec![history.curve("training", |interval| interval.loss), validation],
            true,
        ),
        chart(
            "Norm of the gradients",
            "norm",
            vec![history.curve("before clipping", |interval| interval.grad_norm)],
            true,
        ),
        chart(
            "Learning rate",
            "rate",
            vec![history.curve("learning rate", |interval| Some(interval.lr))],
            false,
        ),
        chart(
            "Speed",
            "pictures per second",
            vec![history.curve("pictures/s", |interval| Some(interval.pictures_per_second))],
            false,
        ),
        chart(
            "Shares of time and of the GPU's peak rate",
            "share",
            vec![
                history.curve("waiting for data", |interval| Some(interval.data_wait)),
                history.curve("peak rate reached (MFU)", |interval| interval.mfu),
            ],
            false,
        ),
    ];
    charts.into_iter().flatten().collect()
}

fn profile(parts: &[PartTime]) -> String {
    // Parts of the outermost range are what the shares are of.
    let Some(whole) = parts.first() else {
        return String::new();
    };
    let rows = parts.iter().map(|part| {
        let names: Vec<&str> = part.path.split('/').collect();
        format!(
            "<tr><td>{}{}</td><td>{}</td><td>{}</td><td>{:.1} %</td></tr>",
            "&emsp;".repeat(names.len() - 1),
            escaped(names.last().unwrap_or(&"")),
            part.calls,
            duration(part.seconds),
            part.seconds / whole.seconds.max(f64::MIN_POSITIVE) * 100.0
        )
    });
    format!(
        "<h2>Where the time went</h2><table>{}</table>\n",
        rows.collect::<String>()
    )
}

fn sheets(run: &Path, history: &History) -> String {
    let count = history.samples.len();
    let shown = count.min(MOST_SHEETS);
    let mut html = String::new();
    for index in 0..shown {
        // The last of each of `shown` equal parts.
        let SheetRecord { step, file, .. } = &history.samples[(index + 1) * count / shown - 1];
        // A sheet that was deleted is left out.
        if let Ok(png) = sheet(run, file) {
            let _ = writeln!(
                html,
                "<figure class=\"sheet\"><img alt=\"samples\" src=\"data:image/png;base64,{}\">\
                 <figcaption>step {step}</figcaption></figure>",
                base64(&png)
            );
        }
    }
    match html.is_empty() {
        true => html,
        false => {
            let prompts = history.start().map(|start| start.config["sample_prompts"].clone());
            let prompts: Vec<String> = prompts
                .and_then(|prompts| serde_json::from_value(prompts).ok())
                .unwrap_or_default();
            format!("<h2>Samples</h2><p>{}</p>\n{html}", escaped(&prompts.join(" · ")))
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

/// The bytes of a sheet.
fn sheet(run: &Path, file: &str) -> Result<Vec<u8>> {
    let path = sheet_path(run, file)?;
    let bytes = files::read(&path, Budget::PICTURE)?;
    match bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        true => Ok(bytes),
        false => Err(Error::file(path, "is no PNG")),
    }
}

fn notices(history: &History) -> String {
    if history.notices.is_empty() {
        return String::new();
    }
    let items = history
        .notices
        .iter()
        .map(|(step, text)| format!("<li>step {step}: {}</li>", escaped(text)));
    format!("<h2>Notices</h2><ul>{}</ul>\n", items.collect::<String>())
}

fn millions(count: u64) -> f64 {
    count as f64 / 1e6
}

/// Seconds as people say them: `2 h 05 min`.
pub(super) fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, _) => format!("{seconds:.1} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds:02} s"),
        (hours, minutes, _) => format!("{hours} h {minutes:02} min"),
    }
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let word = group
            .iter()
            .chain([0, 0].iter())
            .take(3)
            .fold(0u32, |word, &byte| word << 8 | u32::from(byte));
        for digit in 0..4 {
            text.push(match digit <= group.len() {
                true => char::from(ALPHABET[(word >> (18 - 6 * digit) & 63) as usize]),
                false => '=',
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_standard() {
        let pairs = ["", "f", "fo", "foo", "foob", "fooba", "foobar"].map(|text| base64(text.as_bytes()));
        assert_eq!(pairs, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"]);
        assert_eq!(base64(&[0xff, 0xfe]), "//4=");
    }

    #[test]
    fn durations_read_well() {
        assert_eq!(
            [5.25, 65.0, 7500.0].map(duration),
            ["5.2 s", "1 min 05 s", "2 h 05 min"]
        );
    }
}
