//! See `l2p_bench::train`.

use std::process::ExitCode;

use clap::Parser;
use l2p_bench::train::{Arguments, main as bench};

fn main() -> ExitCode {
    bench(&Arguments::parse())
}
