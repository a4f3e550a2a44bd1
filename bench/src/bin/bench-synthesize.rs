//! See `l2p_bench::synthesize`.

use std::process::ExitCode;

use clap::Parser;
use l2p_bench::synthesize::{Arguments, run};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    l2p_bins::run(|| run(&arguments))
}
