//! Trains models.

use std::process::ExitCode;

use clap::Parser;
use l2p_bins::train::{Arguments, train};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    l2p_bins::run(|| train(arguments))
}
