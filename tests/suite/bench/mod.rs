//! The benchmarks as a user runs them, on small models and the CPU: what they record, what they refuse, and that README says what
//! the records say.

mod records;
mod report;
mod targets;

use std::path::Path;
use std::process::Command;

use l2p_tests::Suite;
use l2p_tests::cli::{Finished, program};
use libtest_mimic::Failed;
use serde_json::Value;

pub fn register(suite: &mut Suite) {
    records::register(suite);
    report::register(suite);
    targets::register(suite);
}

/// Runs a benchmark in `folder`.
fn run(folder: &Path, name: &str, arguments: &[&str]) -> Result<Finished, Failed> {
    Finished::from(Command::new(program(name)?).current_dir(folder).args(arguments))
}

/// A file as JSON.
fn read(path: &Path) -> Result<Value, Failed> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(serde_json::from_str(&text)?)
}

/// The number at a place, NaN where there is none.
fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}
