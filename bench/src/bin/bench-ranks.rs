//! See `l2p_bench::ranks`.

use std::process::ExitCode;

use clap::Parser;
use l2p_bench::ranks::{Arguments, run};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    arguments.ranks.run(|launch| run(&arguments, launch))
}
