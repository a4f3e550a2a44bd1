//! What the programs share: how they end, how they report progress, and how they stop when asked to.

#![deny(clippy::print_stderr, clippy::print_stdout)]

pub mod data;
mod output;
pub mod profile;
mod progress;
mod prompts;
pub mod report;
pub mod sample;
mod size;
pub mod train;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

pub use output::{print, say};
pub use progress::WriteProgress;
pub use size::ByteSize;

/// The exit code after Ctrl-C, as shells count it.
const INTERRUPTED: u8 = 130;

static STOP: AtomicBool = AtomicBool::new(false);

/// Runs a program's work. An error is printed as one line, `error: …`, and makes the exit code 1 (130 after Ctrl-C).
pub fn run(work: impl FnOnce() -> anyhow::Result<()>) -> ExitCode {
    // Where the handler cannot be installed, Ctrl-C ends the program at once.
    let _ = ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED.into());
        }
    });
    match work() {
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

/// Whether the user has asked to stop. Long work asks now and then and then ends with [`l2p_engine::Error::Interrupted`];
/// a second Ctrl-C ends the program at once.
pub fn stop_requested() -> bool {
    STOP.load(Ordering::Relaxed)
}
