//! Draws pictures from prompts.

use std::process::ExitCode;

use clap::Parser;
use l2p_bins::sample::{Arguments, main as draw};

fn main() -> ExitCode {
    draw(Arguments::parse())
}
