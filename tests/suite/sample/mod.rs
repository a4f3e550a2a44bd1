//! `l2p-sample` as a user runs it, mostly with the demo model that comes with the source tree.

mod cuda;
mod draw;
mod edit;
mod faults;
pub mod files;
mod finite;
mod inputs;
mod interrupt;
mod outputs;
mod ranks;
mod sets;
mod warm;

use std::path::{Path, PathBuf};
use std::process::Command;

use l2p_engine::image_io::{RgbImage, read_image};
use l2p_tests::cli::{Finished, program};
use l2p_tests::{Suite, models_folder};
use libtest_mimic::Failed;

pub fn register(suite: &mut Suite) {
    cuda::register(suite);
    draw::register(suite);
    edit::register(suite);
    faults::register(suite);
    finite::register(suite);
    files::register(suite);
    inputs::register(suite);
    interrupt::register(suite);
    outputs::register(suite);
    ranks::register(suite);
    sets::register(suite);
    warm::register(suite);
}

/// The demo source model.
///
/// # Errors
/// When it is not there.
fn demo() -> Result<PathBuf, Failed> {
    let folder = models_folder().join("demo/source");
    match folder.is_dir() {
        true => Ok(folder.canonicalize()?),
        false => Err(format!("{} is not there: name its folder in L2P_MODELS", folder.display()).into()),
    }
}

/// The program, about to run in `folder`.
fn command(folder: &Path, arguments: &[&str]) -> Result<Command, Failed> {
    let mut command = Command::new(program("l2p-sample")?);
    command.current_dir(folder).args(arguments);
    Ok(command)
}

/// Runs the program in `folder`.
fn run(folder: &Path, arguments: &[&str]) -> Result<Finished, Failed> {
    Finished::from(&mut command(folder, arguments)?)
}

/// The arguments to draw with the demo model on the CPU, in few steps.
fn with_demo(arguments: &[&str]) -> Result<Vec<String>, Failed> {
    let demo = demo()?.display().to_string();
    let steps = if arguments.contains(&"--steps") {
        &[][..]
    } else {
        &["--steps", "2"]
    };
    let first = ["--model", &demo, "--device", "cpu"];
    Ok([&first, steps, arguments]
        .concat()
        .into_iter()
        .map(String::from)
        .collect())
}

/// Draws with the demo model on the CPU, in few steps, whatever comes of it.
fn try_draw(folder: &Path, arguments: &[&str]) -> Result<Finished, Failed> {
    let arguments = with_demo(arguments)?;
    run(folder, &arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Draws with the demo model on the CPU, in few steps.
fn draw(folder: &Path, arguments: &[&str]) -> Result<Finished, Failed> {
    try_draw(folder, arguments)?.success()
}

/// The names in a folder and those below it, hidden ones too.
pub fn names(folder: &Path) -> Result<Vec<String>, Failed> {
    let mut names = Vec::new();
    for entry in folder.read_dir()? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() {
            names.extend(
                self::names(&entry.path())?
                    .into_iter()
                    .map(|below| format!("{name}/{below}")),
            );
        }
        names.push(name);
    }
    names.sort();
    Ok(names)
}

fn picture(folder: &Path, name: &str) -> Result<RgbImage, Failed> {
    Ok(read_image(&folder.join(name))?)
}

/// The peak signal-to-noise ratio of two pictures in dB; infinite for equal ones.
fn psnr(a: &RgbImage, b: &RgbImage) -> f64 {
    assert_eq!((a.width(), a.height()), (b.width(), b.height()));
    let squares = a.pixels().iter().zip(b.pixels());
    let squares = squares.map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
    10.0 * (255.0f64.powi(2) * a.pixels().len() as f64 / squares.sum::<f64>()).log10()
}
