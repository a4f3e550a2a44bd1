//! What the programs share: how they end, how they report progress, and how they stop when asked to.

#![deny(clippy::print_stderr, clippy::print_stdout)]

pub mod data;
pub mod launch;
mod manual;
mod output;
pub mod parts;
pub mod precision;
pub mod profile;
mod progress;
mod prompts;
pub mod report;
pub mod sample;
mod score;
pub mod serve;
mod signals;
mod size;
pub mod train;

use std::process::ExitCode;

pub use manual::{arguments, arguments_by};
pub use output::{print, say};
pub use progress::WriteProgress;
pub use signals::stop_requested;
pub use size::ByteSize;

/// The version with the commit, where the build was told it (`L2P_COMMIT`), and the kernels that are in the program.
pub fn long_version() -> String {
    let commit = option_env!("L2P_COMMIT").filter(|commit| !commit.is_empty());
    let commit = commit.map(|commit| format!("commit {commit}, ")).unwrap_or_default();
    let kernels = match l2p_kernels::IMAGES.len() {
        0 => "no CUDA kernels".to_owned(),
        count => format!("{count} CUDA images, each for sm_90a and compute_80"),
    };
    format!("{} ({commit}{kernels})", env!("CARGO_PKG_VERSION"))
}

/// The exit code after Ctrl-C, as shells count it.
const INTERRUPTED: u8 = 130;

/// Runs a program's work, unless an environment variable has a value that means nothing. An error is printed as one line, `error: …`, and makes the exit code 1 (130 after Ctrl-C).
pub fn run(work: impl FnOnce() -> anyhow::Result<()>) -> ExitCode {
    signals::listen();
    let options = l2p_engine::device::DeviceOptions::of_process();
    match options.map_err(anyhow::Error::from).and_then(|_| work()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(format_args!("error: {}", one_line(&error)));
            match error.downcast_ref() {
                Some(l2p_engine::Error::Interrupted) => ExitCode::from(INTERRUPTED),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// The error as one of the engine's, for what ranks tell each other.
fn as_engine(error: anyhow::Error) -> l2p_engine::Error {
    // One that has been put into words has more to say than its cause.
    let alone = error.chain().count() == 1;
    match error.downcast_ref() {
        Some(l2p_engine::Error::Interrupted) => l2p_engine::Error::Interrupted,
        _ if alone => error
            .downcast()
            .unwrap_or_else(|error| l2p_engine::Error::invalid(one_line(&error))),
        _ => l2p_engine::Error::invalid(one_line(&error)),
    }
}

/// The error and its causes; a cause that an error already names at its end is not said twice.
fn one_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text.lines().map(str::trim).collect::<Vec<_>>().join(" ")
}
