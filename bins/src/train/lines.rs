//! What happens, in lines for people.

use std::fmt::Write;

use l2p_engine::device::format_bytes;
use l2p_engine::profile::PartTime;
use l2p_engine::train::run::log::{Record, StartRecord, TrainRecord};
use l2p_engine::train::run::{Comparison, Packaged};

/// A record as a line; `steps` are those of the whole run.
pub fn of(record: &Record, steps: u64) -> Option<String> {
    Some(match record {
        Record::Start(start) => begin(start),
        Record::Train(train) => interval(train, steps),
        Record::Validation { step, loss, seconds } => {
            format!("step {step}  validation loss {loss:.5}  ({})", duration(*seconds))
        }
        Record::Samples { step, file, .. } => format!("step {step}  samples {file}"),
        Record::Checkpoint {
            step,
            folder,
            bytes,
            seconds,
            stall_seconds,
        } => {
            let stall = stall_seconds.map_or(String::new(), |stall| {
                format!(", training stood still for {}", duration(stall))
            });
            format!(
                "step {step}  saved {folder}  {} in {}{stall}",
                format_bytes(*bytes),
                duration(*seconds)
            )
        }
        Record::Notice { step, text } => format!("step {step}  note: {text}"),
        Record::Damaged { what, reason, .. } => format!("damaged, skipped: {what}: {reason}"),
        Record::Profile { parts, .. } => profile(parts),
        Record::End { .. } => return None,
    })
}

fn begin(start: &StartRecord) -> String {
    let parameters = |count: u64| match count {
        1_000_000_000.. => format!("{:.2} G", count as f64 / 1e9),
        _ => format!("{:.2} M", count as f64 / 1e6),
    };
    let held_out = match start.held_out {
        0 => String::new(),
        count => format!(", {count} held out"),
    };
    format!(
        "{} of {} parameters trained ({}) on {}: {} pictures{held_out}, noise by {}",
        parameters(start.trained_parameters),
        parameters(start.parameters),
        start.config["policy"].as_str().unwrap_or_default(),
        start.device,
        start.pictures,
        start.noise
    )
}

fn interval(train: &TrainRecord, steps: u64) -> String {
    let width = steps.to_string().len();
    let number = |value: Option<f64>, digits: usize| value.map_or("-".into(), |value| format!("{value:.digits$}"));
    let mut line = format!(
        "step {:>width$}/{steps}  loss {}  norm {}  lr {:.2e}  {:.2} pictures/s",
        train.step,
        number(train.loss, 5),
        number(train.grad_norm, 3),
        train.lr,
        train.pictures_per_second
    );
    // Writing to a string succeeds.
    if let Some(mfu) = train.mfu {
        let _ = write!(line, "  MFU {:.1} %", mfu * 100.0);
    }
    let _ = write!(
        line,
        "  {}  data wait {:.1} %  {} left",
        format_bytes(train.peak_memory_bytes),
        train.data_wait * 100.0,
        duration(train.eta_seconds)
    );
    line
}

/// Where the time went, a part a line; shares are of the outermost part.
fn profile(parts: &[PartTime]) -> String {
    let whole = parts.first().map_or(1.0, |part| part.seconds.max(f64::MIN_POSITIVE));
    let mut text = format!(
        "{:<32}  {:>8}  {:>12}  {:>12}  {:>7}",
        "part", "calls", "each", "in all", "share"
    );
    for part in parts {
        let depth = part.path.matches('/').count();
        let name = part.path.rsplit('/').next().unwrap_or_default();
        let _ = write!(
            text,
            "\n{:<32}  {:>8}  {:>9.3} ms  {:>10.3} s  {:>5.1} %",
            format!("{}{name}", "  ".repeat(depth)),
            part.calls,
            part.seconds / part.calls.max(1) as f64 * 1e3,
            part.seconds,
            part.seconds / whole * 100.0
        );
    }
    text
}

/// What was packaged.
pub fn packaged(packaged: &Packaged) -> String {
    format!(
        "wrote {}: {} tensors, {}, over {}\n",
        packaged.folder.display(),
        packaged.tensors,
        format_bytes(packaged.bytes),
        packaged.base.display()
    )
}

/// Seconds as people say them.
fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, _) => format!("{seconds:.1} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds:02} s"),
        (hours, minutes, _) => format!("{hours} h {minutes:02} min"),
    }
}

/// Runs beside each other, one a line.
pub fn table(comparison: &Comparison) -> String {
    let longest = comparison
        .runs
        .iter()
        .map(|run| run.name.chars().count())
        .max()
        .unwrap_or(0)
        .max(3);
    let mut text = format!(
        "{:<longest$}  {:>10}  {:>10}  {:>8}  {:>10}  {:>12}  {:>9}\n",
        "run", "last", "lowest", "steps", "pictures", "time", "trained"
    );
    for run in &comparison.runs {
        let number = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.5}"));
        let _ = writeln!(
            text,
            "{:<longest$}  {:>10}  {:>10}  {:>8}  {:>10}  {:>12}  {:>7.2} M",
            run.name,
            number(run.last_validation),
            number(run.best_validation),
            run.steps,
            run.pictures,
            duration(run.seconds),
            run.trained_parameters as f64 / 1e6
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_one_line() {
        let train = TrainRecord {
            step: 20,
            pictures: 160,
            epoch: 1,
            loss: Some(0.25),
            grad_norm: Some(1.5),
            lr: 5e-5,
            skipped: 0,
            seconds_per_step: 0.5,
            pictures_per_second: 16.0,
            mfu: Some(0.412),
            peak_memory_bytes: 12_300_000_000,
            data_wait: 0.004,
            elapsed_seconds: 10.0,
            eta_seconds: 65.0,
        };
        assert_eq!(
            interval(&train, 1000),
            "step   20/1000  loss 0.25000  norm 1.500  lr 5.00e-5  16.00 pictures/s  MFU 41.2 %  12.3 GB  data wait 0.4 %  \
             1 min 05 s left"
        );
        let skipped = TrainRecord {
            loss: None,
            mfu: None,
            ..train
        };
        assert!(interval(&skipped, 20).starts_with("step 20/20  loss -  norm"));
    }
}
