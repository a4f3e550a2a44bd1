//! Trains models.

use std::process::ExitCode;

use l2p_bins::train::{Arguments, train};

fn main() -> ExitCode {
    let arguments = Arguments::of_process();
    l2p_bins::run(|| train(arguments))
}
