//! See `l2p_bench::ranks`.

use std::process::ExitCode;

use clap::Parser;
use l2p_bench::ranks::{Arguments, main as work};

fn main() -> ExitCode {
    work(&Arguments::parse())
}
