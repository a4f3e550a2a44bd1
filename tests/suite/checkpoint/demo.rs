//! Copies of the demo's source model, of which a file is changed.

use std::path::{Path, PathBuf};

use l2p_tests::{cli, models_folder};
use libtest_mimic::Failed;
use serde_json::Value;

use super::model::{self, Tensors};

/// A copy of the demo's source model in `folder`, by links where they are known.
pub fn copy(folder: &Path) -> Result<PathBuf, Failed> {
    let demo = models_folder().join("demo/source").canonicalize()?;
    let copy = folder.join("source");
    std::fs::create_dir_all(&copy)?;
    for entry in demo.read_dir()? {
        let entry = entry?.path();
        let name = entry.file_name().ok_or("no name")?;
        if !entry.is_dir() {
            std::fs::copy(&entry, copy.join(name))?;
            continue;
        }
        std::fs::create_dir_all(copy.join(name))?;
        for file in entry.read_dir()? {
            let file = file?.path();
            link(&file, &copy.join(name).join(file.file_name().ok_or("no name")?))?;
        }
    }
    Ok(copy)
}

#[cfg(unix)]
fn link(file: &Path, to: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(file, to)
}

#[cfg(not(unix))]
fn link(file: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::copy(file, to).map(drop)
}

/// Puts other bytes in place of a file, which may be a link.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), Failed> {
    let _ = std::fs::remove_file(path);
    Ok(std::fs::write(path, bytes)?)
}

/// The JSON file at `path` with its entry `key` set to `value`, or left out where that is `None`.
pub fn with_entry(path: &Path, key: &str, value: Option<Value>) -> Result<Vec<u8>, Failed> {
    let mut json: Value = serde_json::from_slice(&std::fs::read(path)?)?;
    let object = json.as_object_mut().ok_or("no object")?;
    match value {
        Some(value) => drop(object.insert(key.into(), value)),
        None => drop(object.remove(key)),
    }
    Ok(json.to_string().into_bytes())
}

/// Changes the tensors of the file at `path`.
pub fn edit(path: &Path, change: impl FnOnce(&mut Tensors)) -> Result<(), Failed> {
    let mut tensors = model::read(path)?;
    change(&mut tensors);
    std::fs::remove_file(path)?;
    model::save(path, &tensors).map(drop)
}

/// Draws with a model in `folder`, as little as it takes, with more arguments; whatever comes of it.
pub fn draw(folder: &Path, model: &str, more: &[&str]) -> Result<cli::Finished, Failed> {
    let arguments = [
        &["--model", model, "--prompt", "fox", "--device", "cpu", "--steps", "1"][..],
        &["--width", "32", "--height", "32", "--out", "o.png"],
        more,
    ]
    .concat();
    let program = cli::program("l2p-sample")?;
    cli::Finished::from(std::process::Command::new(program).current_dir(folder).args(arguments))
}

/// Fails unless drawing fails with `message`, and draws nothing.
pub fn expect_refused(folder: &Path, model: &str, more: &[&str], message: &str) -> Result<(), Failed> {
    let finished = draw(folder, model, more)?;
    if finished.code == 1 && finished.stderr.contains(message) && !folder.join("o.png").exists() {
        return Ok(());
    }
    Err(format!(
        "expected exit code 1 and `{message}`, found exit code {} and\n{}",
        finished.code, finished.stderr
    )
    .into())
}
