//! See `l2p_bench::targets`.

use std::process::ExitCode;

use clap::Parser;
use l2p_bench::targets::{Arguments, run};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    l2p_bins::run(|| run(&arguments))
}
