//! Draws pictures from prompts.

use std::process::ExitCode;

use clap::Parser;
use l2p_bins::sample::{Arguments, sample};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    l2p_bins::run(|| sample(arguments))
}
