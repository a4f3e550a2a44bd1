//! Trains models.

use std::process::ExitCode;

use l2p_bins::train::{Arguments, main as train};

fn main() -> ExitCode {
    match l2p_bins::arguments_by(Arguments::of_process) {
        Ok(arguments) => train(arguments),
        Err(code) => code,
    }
}
