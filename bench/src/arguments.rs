//! The arguments that all benchmarks take.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use l2p_engine::DeviceChoice;

/// What all benchmarks take.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Where to run: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: DeviceChoice,
    /// Timed samples of each case
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub repeats: u32,
    /// The seed of inputs and weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Write the record as JSON, every sample included; `-` for standard output instead of the table
    #[arg(long, value_name = "FILE|-")]
    pub json: Option<PathBuf>,
    /// Run the same work in PyTorch, in alternation with ours ($L2P_PYTHON, or python3)
    #[arg(long)]
    pub peer: bool,
    /// What PyTorch's compiler may do for the peer
    #[arg(long, value_name = "HOW", value_enum, default_value_t = PeerCompile::Default)]
    pub peer_compile: PeerCompile,
    /// Run the case of this name once, between the marks that Nsight waits for, and measure nothing
    #[arg(long, value_name = "NAME", conflicts_with_all = ["peer", "json"])]
    pub once: Option<String>,
}

/// How the peer is compiled.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerCompile {
    /// Not at all
    None,
    /// torch.compile, one minute or so
    Default,
    /// torch.compile with mode="max-autotune-no-cudagraphs", several minutes
    MaxAutotune,
}

impl PeerCompile {
    /// The name of torch.compile's mode, `None` for no compilation.
    pub fn mode(self) -> Option<&'static str> {
        match self {
            PeerCompile::None => None,
            PeerCompile::Default => Some("default"),
            PeerCompile::MaxAutotune => Some("max-autotune-no-cudagraphs"),
        }
    }
}

/// What the help of every benchmark ends with.
pub const COLUMNS: &str = "\
The columns: median of the samples; spread, the distance of their quartiles over the median; TFLOP/s of the products (two
operations for each multiplication with its addition) and TB/s of inputs read once and results written once; the share of
the ceiling, which is the longer of the time in which a large copy moves these bytes and a large matrix product does these
operations, both measured in the same run; the error against the reference named above; device memory above what was there
before (weights and inputs), and in all.

On a GPU a sample is device time between two events around as many calls as take 2 ms, replayed as a graph, each with the next
of several sets of inputs, so that nothing is found in the cache; on the CPU it is wall time.

Exit code: 0 when all results are right, 1 when one is not or on an error.";
