//! A forecast as a table for people.

use std::fmt::Write;

use l2p_engine::device::format_bytes;
use l2p_engine::train::run::{Choice, Forecast};

/// The forecast; `available` is what the device has to spare, where it was asked.
pub fn text(forecast: &Forecast, available: Option<u64>) -> String {
    let work = &forecast.work;
    let mut text = format!(
        "policy {}: {} of {} parameters are trained, {} frozen\n",
        forecast.policy,
        count(forecast.trained_parameters),
        count(forecast.trained_parameters + forecast.frozen_parameters),
        count(forecast.frozen_parameters),
    );
    // Writing to a string succeeds.
    let _ = writeln!(
        text,
        "{}{} x {} pictures of {} pixels, captions of {} tokens, in {}\n",
        match work.division.ranks {
            1 => String::new(),
            ranks => format!("each of {ranks} ranks (dividing: {}): ", work.division.sharding),
        },
        forecast.accumulate,
        work.batch,
        work.size,
        work.caption_tokens,
        if work.cuda { "bf16 on a GPU" } else { "f32 on the CPU" },
    );
    memory(&mut text, forecast, available);
    if let Some(choice) = forecast
        .choices
        .iter()
        .find(|choice| choice.recompute == forecast.recompute)
    {
        arithmetic(&mut text, choice);
    }
    text
}

fn memory(text: &mut String, forecast: &Forecast, available: Option<u64>) {
    let columns = [
        "weights",
        "gradients",
        "optimizer",
        "exchange",
        "saved",
        "activations",
        "peak",
        "operations",
    ];
    let _ = write!(text, "{:<14}", "recompute");
    for column in columns {
        let _ = write!(text, "{column:>13}");
    }
    for choice in &forecast.choices {
        let chosen = if choice.recompute == forecast.recompute {
            " *"
        } else {
            ""
        };
        let _ = write!(text, "\n{:<14}", format!("{}{chosen}", choice.recompute));
        let memory = &choice.memory;
        for bytes in [
            memory.weights,
            memory.gradients,
            memory.optimizer,
            memory.exchange,
            memory.saved,
            memory.activations,
            memory.peak,
        ] {
            let _ = write!(text, "{:>13}", format_bytes(bytes));
        }
        let _ = write!(text, "{:>13}", operations(choice.operations));
    }
    text.push_str("\n* as configured; operations are those of an optimizer step\n");
    if let Some(available) = available {
        let _ = writeln!(text, "the device has {} to spare", format_bytes(available));
    }
}

fn arithmetic(text: &mut String, choice: &Choice) {
    let columns = ["forward", "dX", "dW", "again", "in all", "share"];
    let _ = write!(text, "\n{:<24}", "part");
    for column in columns {
        let _ = write!(text, "{column:>13}");
    }
    for part in &choice.arithmetic {
        let _ = write!(text, "\n{:<24}", part.part);
        for number in [part.forward, part.inputs, part.weights, part.again, part.total()] {
            let _ = write!(text, "{:>13}", operations(number));
        }
        let share = part.total() / choice.operations.max(f64::MIN_POSITIVE) * 100.0;
        let _ = write!(text, "{:>13}", format!("{share:.1} %"));
    }
    text.push('\n');
}

/// A number of parameters.
fn count(parameters: u64) -> String {
    match parameters {
        1_000_000_000.. => format!("{:.2} G", parameters as f64 / 1e9),
        _ => format!("{:.2} M", parameters as f64 / 1e6),
    }
}

/// A number of floating-point operations.
fn operations(number: f64) -> String {
    match number {
        0.0 => "-".into(),
        1e12.. => format!("{:.2} TFLOP", number / 1e12),
        1e9.. => format!("{:.2} GFLOP", number / 1e9),
        _ => format!("{:.2} MFLOP", number / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([count(2_540_000_000), count(11_090_000)], ["2.54 G", "11.09 M"]);
        assert_eq!(
            [0.0, 2.5e7, 1.44e14].map(operations),
            ["-", "25.00 MFLOP", "144.00 TFLOP"]
        );
    }
}
