//! Makes data sets.

use std::process::ExitCode;

use clap::Parser;
use l2p_bins::data::{Arguments, main as make};

fn main() -> ExitCode {
    make(&Arguments::parse())
}
