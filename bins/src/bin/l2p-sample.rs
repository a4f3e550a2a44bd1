//! Draws pictures from prompts.

use std::process::ExitCode;

use l2p_bins::sample::main as draw;

fn main() -> ExitCode {
    match l2p_bins::arguments() {
        Ok(arguments) => draw(arguments),
        Err(code) => code,
    }
}
