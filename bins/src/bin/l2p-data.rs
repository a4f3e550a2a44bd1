//! Makes data sets.

use std::process::ExitCode;

use clap::Parser;
use l2p_bins::data::{Arguments, data};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    l2p_bins::run(|| data(arguments))
}
