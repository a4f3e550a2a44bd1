//! Makes data sets.

use std::process::ExitCode;

use l2p_bins::data::main as make;

fn main() -> ExitCode {
    match l2p_bins::arguments() {
        Ok(arguments) => make(&arguments),
        Err(code) => code,
    }
}
