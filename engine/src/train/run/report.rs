//! The report of a run: one HTML file with curves and sheets of samples that needs nothing beside it.

use std::path::{Path, PathBuf};

use super::history::{History, SheetRecord, sheet_path};
use crate::device::format_bytes;
use crate::error::{Error, Result};
use crate::files;
use crate::limits::Budget;
use crate::profile::PartTime;
use crate::report::{Chart, Scale, Series, html};

/// The report's name in the run's folder.
const REPORT: &str = "report.html";

/// Sheets that are shown; of more, these many spread evenly, the last one among them.
const MOST_SHEETS: usize = 12;

/// Writes the report of the run in `run` from its log, and returns its path.
///
/// # Errors
/// When there is no log, or the disk does not take the report.
pub fn write_report(run: &Path) -> Result<PathBuf> {
    let history = History::read(run)?;
    let path = run.join(REPORT);
    files::replace(&path, page(run, &history).as_bytes())?;
    Ok(path)
}

fn page(run: &Path, history: &History) -> String {
    let name = run.canonicalize().unwrap_or_else(|_| run.into());
    let name = name.file_name().unwrap_or_default().to_string_lossy();
    let mut body = summary(history);
    for chart in charts(history) {
        body += &html::figure(&chart);
    }
    body += &profile(&history.profile);
    body += &sheets(run, history);
    if !history.notices.is_empty() {
        let notices = history
            .notices
            .iter()
            .map(|(step, text)| format!("step {step}: {text}"));
        body += &html::part("Notices", &html::list(notices));
    }
    if let Some(start) = history.start() {
        let config = serde_json::to_string_pretty(&start.config).unwrap_or_default();
        body += &html::details("Configuration", &config);
    }
    html::page(&name, &body)
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
    rows.extend(checkpoints(history).map(|text| ("checkpoints", text)));
    rows.push(("parts", history.starts.len().to_string()));
    if let Some((_, outcome)) = &history.end {
        rows.push(("ended", outcome.clone()));
    }
    html::table(rows.into_iter().map(|(name, value)| [name.to_owned(), value]))
}

/// What checkpoints took; `None` where none was made.
fn checkpoints(history: &History) -> Option<String> {
    let (all, count) = (&history.checkpoints, history.checkpoints.len());
    let largest = all.iter().map(|saved| saved.bytes).max()?;
    let seconds: f64 = all.iter().map(|saved| saved.seconds).sum();
    let stall: f64 = all.iter().map(|saved| saved.stall_seconds).sum();
    let trained = history.intervals.last().map_or(0.0, |last| last.elapsed_seconds);
    Some(format!(
        "{count} of up to {}; each on the disk after {}, training stood still for {} ({:.2} % of the time)",
        format_bytes(largest),
        duration(seconds / count as f64),
        duration(stall / count as f64),
        stall / (trained + stall).max(f64::MIN_POSITIVE) * 100.0
    ))
}

fn charts(history: &History) -> Vec<String> {
    let chart = |title: &str, y: &str, series: Vec<Series>, scale: Scale| {
        let series: Vec<Series> = series.into_iter().filter(|series| !series.points.is_empty()).collect();
        (!series.is_empty()).then(|| {
            Chart {
                title,
                x: "step",
                y,
                series: &series,
                scale,
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
            Scale::Logarithmic,
        ),
        chart(
            "Norm of the gradients",
            "norm",
            vec![history.curve("before clipping", |interval| interval.grad_norm)],
            Scale::Logarithmic,
        ),
        chart(
            "Learning rate",
            "rate",
            vec![history.curve("learning rate", |interval| Some(interval.lr))],
            Scale::Linear,
        ),
        chart(
            "Speed",
            "pictures per second",
            vec![history.curve("pictures/s", |interval| Some(interval.pictures_per_second))],
            Scale::Linear,
        ),
        chart(
            "Shares of time and of the GPU's peak by its datasheet",
            "share",
            vec![
                history.curve("waiting for data", |interval| Some(interval.data_wait)),
                history.curve("MFU", |interval| interval.mfu),
            ],
            Scale::Linear,
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
        [
            format!("{}{}", "\u{2003}".repeat(names.len() - 1), names.last().unwrap_or(&"")),
            part.calls.to_string(),
            duration(part.seconds),
            format!("{:.1} %", part.seconds / whole.seconds.max(f64::MIN_POSITIVE) * 100.0),
        ]
    });
    html::part("Where the time went", &html::table(rows))
}

fn sheets(run: &Path, history: &History) -> String {
    let count = history.samples.len();
    let shown = count.min(MOST_SHEETS);
    let mut sheets = String::new();
    for index in 0..shown {
        // The last of each of `shown` equal parts.
        let SheetRecord { step, file, .. } = &history.samples[(index + 1) * count / shown - 1];
        // A sheet that was deleted is left out.
        if let Ok(png) = sheet(run, file) {
            sheets += &html::sheet(&png, &format!("step {step}"));
        }
    }
    if sheets.is_empty() {
        return sheets;
    }
    let prompts = history.start().map(|start| start.config["sample_prompts"].clone());
    let prompts: Vec<String> = prompts
        .and_then(|prompts| serde_json::from_value(prompts).ok())
        .unwrap_or_default();
    let prompts = html::escaped(&prompts.join(" · "));
    html::part("Samples", &format!("<p>{prompts}</p>\n{sheets}"))
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

fn millions(count: u64) -> f64 {
    count as f64 / 1e6
}

/// Seconds as people say them: `2 h 05 min`.
fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, _) => format!("{seconds:.1} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds:02} s"),
        (hours, minutes, _) => format!("{hours} h {minutes:02} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        assert_eq!(
            [5.25, 65.0, 7500.0].map(duration),
            ["5.2 s", "1 min 05 s", "2 h 05 min"]
        );
    }
}
