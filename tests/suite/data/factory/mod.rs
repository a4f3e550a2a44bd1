//! The data factory: `l2p-data all` and its stages.

mod endpoint;
mod hostile;
mod interrupted;
mod own;
mod page;
mod server;
mod stages;
mod taxonomy;

use std::path::Path;
use std::process::Command;

use l2p_tests::Suite;
use l2p_tests::cli::{Finished, program};
use libtest_mimic::Failed;
use serde_json::Value;

pub fn register(suite: &mut Suite) {
    endpoint::register(suite);
    hostile::register(suite);
    interrupted::register(suite);
    own::register(suite);
    page::register(suite);
    stages::register(suite);
    taxonomy::register(suite);
}

/// `l2p-data` with these arguments, about to start in `folder`, without a key in the environment.
fn command(folder: &Path, arguments: &[&str]) -> Result<Command, Failed> {
    let mut command = Command::new(program("l2p-data")?);
    command.current_dir(folder).env_remove("L2P_LLM_KEY");
    command.args(arguments);
    Ok(command)
}

/// Runs `l2p-data` with these arguments in `folder`.
fn data(folder: &Path, arguments: &[&str]) -> Result<Finished, Failed> {
    Finished::from(&mut command(folder, arguments)?)
}

/// The lines of a file, each a JSON object.
fn lines(path: &Path) -> Result<Vec<Value>, Failed> {
    let text = std::fs::read_to_string(path)?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// The texts of a folder's prompts.
fn texts(folder: &Path) -> Result<Vec<String>, Failed> {
    let lines = lines(&folder.join("prompts.jsonl"))?;
    Ok(lines
        .iter()
        .filter_map(|line| line["prompt"].as_str().map(String::from))
        .collect())
}

/// The texts that were refused while prompts were written, with their reasons.
fn refused(folder: &Path) -> Result<Vec<(String, String)>, Failed> {
    let turns = lines(&folder.join("turns.jsonl"))?;
    let rejects = turns
        .iter()
        .flat_map(|turn| turn["rejects"].as_array().cloned().unwrap_or_default());
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(rejects
        .map(|reject| (text(&reject["reason"]), text(&reject["text"])))
        .collect())
}
