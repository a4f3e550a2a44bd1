//! Several models, each in a process of its own: memory that one leaves in the pool must not count as another's.

use std::process::Command;

use anyhow::{Context, bail};
use clap::ValueEnum;

use super::Arguments;
use crate::published::ModelName;
use crate::record::{Record, write_json};

/// Runs this program once per model and puts the records together.
///
/// # Errors
/// When a model cannot be run or its result is wrong; the others are run all the same.
pub(super) fn run(names: &[ModelName], arguments: &Arguments) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("this program cannot be started again")?;
    let folder = tempfile::tempdir()?;
    let mut whole: Option<Record> = None;
    let mut failed = Vec::new();
    for name in names {
        let name = name.to_string();
        let path = folder.path().join(format!("{name}.json"));
        let mut command = Command::new(&program);
        command.args(["--model", &name]).args(passed_on(arguments));
        let wanted = arguments.common.once.is_none();
        if wanted {
            command.arg("--json").arg(&path);
        }
        if arguments.common.json.as_deref() == Some("-".as_ref()) {
            command.stdout(std::io::stderr());
        }
        if !command
            .status()
            .with_context(|| format!("{} does not start", program.display()))?
            .success()
        {
            failed.push(name);
        }
        if !wanted || !path.is_file() {
            continue;
        }
        let record = Record::read(&path)?;
        match &mut whole {
            None => whole = Some(record),
            Some(whole) => whole.rows.extend(record.rows),
        }
    }
    if let (Some(path), Some(record)) = (&arguments.common.json, &whole) {
        write_json(path, record)?;
    }
    match failed[..] {
        [] => Ok(()),
        _ => bail!("failed: {}", failed.join(", ")),
    }
}

/// The arguments but for the model and the record.
fn passed_on(arguments: &Arguments) -> Vec<String> {
    let common = &arguments.common;
    let mut passed = vec![
        format!("--device={}", common.device),
        format!("--repeats={}", common.repeats),
        format!("--seed={}", common.seed),
        format!("--caption={}", arguments.caption),
    ];
    let how = common.peer_compile.to_possible_value();
    passed.extend(how.map(|how| format!("--peer-compile={}", how.get_name())));
    passed.extend(arguments.side.map(|side| format!("--side={side}")));
    passed.extend(common.once.as_ref().map(|name| format!("--once={name}")));
    let flags = [
        (common.peer, "--peer"),
        (arguments.tiny, "--tiny"),
        (arguments.kernels, "--kernels"),
    ];
    passed.extend(flags.iter().filter(|(set, _)| *set).map(|(_, flag)| (*flag).to_owned()));
    passed
}
