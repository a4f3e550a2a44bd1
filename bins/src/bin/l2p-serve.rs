//! Draws pictures for others.

use std::process::ExitCode;

use clap::Parser;
use l2p_bins::serve::{Arguments, main as serve};

fn main() -> ExitCode {
    serve(Arguments::parse())
}
