//! Draws pictures for others.

use std::process::ExitCode;

use l2p_bins::serve::main as serve;

fn main() -> ExitCode {
    match l2p_bins::arguments() {
        Ok(arguments) => serve(arguments),
        Err(code) => code,
    }
}
