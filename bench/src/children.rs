//! Several models, each in a process of its own: memory that one leaves in the pool must not count as another's.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use clap::ValueEnum;

use crate::arguments::Common;
use crate::record::{Record, write_json};

/// A program of the same build as this one.
///
/// # Errors
/// When it is not there.
pub fn beside(name: &str) -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?.with_file_name(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    if !program.is_file() {
        bail!("{} is not there: build l2p-bins with its programs", program.display());
    }
    Ok(program)
}

/// Runs this program once per name, with the arguments that `arguments` gives for it, and puts the records together.
///
/// # Errors
/// When a model cannot be run or its result is wrong; the others are run all the same.
pub fn run(names: &[String], common: &Common, arguments: impl Fn(&str) -> Vec<String>) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("this program cannot be started again")?;
    let folder = tempfile::tempdir()?;
    let to_stdout = common.json.as_deref() == Some(Path::new("-"));
    let mut whole: Option<Record> = None;
    let mut failed = Vec::new();
    for name in names {
        let path = folder.path().join(format!("{name}.json"));
        let mut command = Command::new(&program);
        command.args(arguments(name)).args(passed_on(common));
        let wanted = common.once.is_none();
        if wanted {
            command.arg("--json").arg(&path);
        }
        if to_stdout {
            command.stdout(std::io::stderr());
        }
        if !command
            .status()
            .with_context(|| format!("{} does not start", program.display()))?
            .success()
        {
            failed.push(name.as_str());
        }
        if !wanted || !path.is_file() {
            continue;
        }
        let record = Record::read(&path)?;
        let whole = match &mut whole {
            None => whole.insert(record),
            Some(whole) => {
                whole.rows.extend(record.rows);
                whole
            }
        };
        // After each one, so that a run that is cut short keeps what it has measured; standard output gets one record, at the end.
        if let Some(path) = common.json.as_ref().filter(|_| !to_stdout) {
            write_json(path, whole)?;
        }
    }
    if let (Some(path), Some(record), true) = (&common.json, &whole, to_stdout) {
        write_json(path, record)?;
    }
    match failed[..] {
        [] => Ok(()),
        _ => bail!("failed: {}", failed.join(", ")),
    }
}

/// What all benchmarks take, but for the record.
fn passed_on(common: &Common) -> Vec<String> {
    let mut passed = vec![
        format!("--device={}", common.device),
        format!("--repeats={}", common.repeats),
        format!("--seed={}", common.seed),
    ];
    let how = common.peer_compile.to_possible_value();
    passed.extend(how.map(|how| format!("--peer-compile={}", how.get_name())));
    passed.extend(common.once.as_ref().map(|name| format!("--once={name}")));
    passed.extend(common.peer.then(|| "--peer".to_owned()));
    passed
}
