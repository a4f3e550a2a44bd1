//! Trains models.

use std::process::ExitCode;

use l2p_bins::train::{Arguments, main as train};

fn main() -> ExitCode {
    train(Arguments::of_process())
}
