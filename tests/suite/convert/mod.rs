//! `l2p-convert` as a user runs it.

mod faults;
mod finite;
mod inspect;
mod write;

use std::path::Path;

use l2p_tests::{Suite, cli};
use libtest_mimic::Failed;
use serde_json::Value;

pub fn register(suite: &mut Suite) {
    faults::register(suite);
    finite::register(suite);
    inspect::register(suite);
    write::register(suite);
}

/// Runs the program in `folder` with words as arguments.
fn run(folder: &Path, arguments: &str) -> Result<cli::Finished, Failed> {
    let program = cli::program("l2p-convert")?;
    cli::Finished::from(
        std::process::Command::new(program)
            .current_dir(folder)
            .args(arguments.split_whitespace()),
    )
}

/// Runs the program with `--json` and reads what it prints.
fn json(folder: &Path, arguments: &str) -> Result<Value, Failed> {
    let finished = run(folder, &format!("{arguments} --json"))?.success()?;
    Ok(serde_json::from_str(&finished.stdout)?)
}

/// The names in a folder, hidden ones too.
fn names(folder: &Path) -> Result<Vec<String>, Failed> {
    let mut names = Vec::new();
    for entry in folder.read_dir()? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
