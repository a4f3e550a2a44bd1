//! `bench-ranks`: every operation between ranks, checked and timed; and what becomes of the others when one is lost.

mod check;
mod fault;
mod faults;
mod measure;
mod overlap;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use l2p_bins::launch::{RANKS_HELP, RankFlags};
use l2p_engine::dist::{Launch, Peer, World, nccl_available};
use l2p_engine::{DType, Device, DeviceChoice};
use serde::Serialize;

pub use fault::Fault;
use measure::Row;
use overlap::Overlap;

use crate::environment::Environment;
use crate::record::write_json;

const HELP: &str = "\
All there is to see on a machine with two GPUs, in one command:
  bench-ranks --ranks 2 --device cuda --json ranks.json &&
    bench-ranks faults --ranks 2 --device cuda --json faults.json
NCCL is looked for in LD_LIBRARY_PATH, in the folders that L2P_CUDA_LIBRARIES names, and in the
Python environments whose python3 is in PATH (site-packages/nvidia/nccl/lib).

Examples:
  bench-ranks --ranks 4 --device cpu --sizes 0,1,1000
  bench-ranks check --ranks 2                      no measurement
  bench-ranks measure overlap --ranks 2 --json -
  bench-ranks faults --ranks 3 --device cpu        ranks are killed, stopped, …: who notices?
  bench-ranks --ranks 2 --fault kill:1 --after 3   one such fault, as it appears to the user
  torchrun --no-python --nproc-per-node 2 bench-ranks check
  mpirun -np 2 bench-ranks check

The columns: elements of the larger tensor of a rank; its type; median over the samples of the time
that the slowest rank took, from the call to the end of the device's work; bytes that each rank
sends to others, by that time. all_reduce is made of reduce_scatter in the type named and all_gather
in f32. The last line puts reduce_scatter beside matrix products: each alone, both together, and the
share of the shorter one that was hidden. With faults: what happened to which rank, the seconds
until another one named it, and its line.

Exit code: 0 when all results equal a plain loop bit for bit, 1 when one does not, a rank is lost,
or on an error. With faults: 0 when every lost rank was named by all others.";

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Compare every operation with a plain loop, bit for bit
    Check,
    /// Time every operation
    Measure,
    /// Time reduce_scatter beside matrix products
    Overlap,
    /// Start ranks anew for each way to lose one, and see what the others do; by itself, with --ranks
    Faults,
}

/// Checks and times what ranks exchange.
#[derive(Parser, Debug)]
#[command(name = "bench-ranks", version, after_help = HELP, after_long_help = format!("{HELP}\n\n{RANKS_HELP}"))]
pub struct Arguments {
    /// What to do [default: check measure overlap]
    #[arg(value_name = "WHAT")]
    parts: Vec<Part>,
    /// How many ranks, and how long they wait.
    #[command(flatten)]
    pub ranks: RankFlags,
    /// Where to run: auto, cpu, or cuda (each rank on the GPU of its place)
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceChoice,
    /// Elements of the larger tensor of each operation, rounded up to a multiple of the ranks
    #[arg(
        long,
        value_name = "N,..",
        value_delimiter = ',',
        default_value = "0,1,7,1000,65536,1000003,4194304,16777216,67108864",
        value_parser = clap::value_parser!(u64).range(0..=1 << 32)
    )]
    sizes: Vec<u64>,
    /// Timed samples of each case
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    repeats: u32,
    /// Write the record as JSON, every sample included; `-` for standard output instead of the tables
    #[arg(long, value_name = "FILE|-")]
    json: Option<PathBuf>,
    /// Exchange tensors until this happens to a rank: kill, stop, hang, fail or panic; with `faults`: this one alone
    #[arg(long, value_name = "WHAT:RANK|none")]
    fault: Option<Fault>,
    /// With --fault: after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0, requires = "fault")]
    after: f64,
}

/// What was found.
#[derive(Debug, Serialize)]
struct Record {
    environment: Environment,
    /// NCCL's version, or `tcp`.
    transport: String,
    ranks: Vec<Peer>,
    /// Sizes and types at which all operations gave the right bits; 0 without `check`.
    checked: usize,
    rows: Vec<Row>,
    overlap: Option<Overlap>,
}

/// Runs the benchmark, in each of the processes that it starts, and returns its exit code. Errors are printed.
pub fn main(arguments: &Arguments) -> ExitCode {
    match arguments.does(Part::Faults) {
        true => l2p_bins::run(|| faults::run(arguments)),
        false => arguments.ranks.run(|launch| run(arguments, launch)),
    }
}

impl Arguments {
    /// Whether tables go to standard output, which the record may have to itself.
    fn shows(&self) -> bool {
        self.json.as_deref() != Some("-".as_ref())
    }

    fn does(&self, part: Part) -> bool {
        match self.parts.is_empty() {
            true => part != Part::Faults,
            false => self.parts.contains(&part),
        }
    }
}

/// Runs the benchmark as one rank, or alone.
fn run(arguments: &Arguments, launch: Option<Launch>) -> anyhow::Result<()> {
    let (device, world) = arguments.ranks.join(launch, arguments.device)?;
    let outcome = work(arguments, &device, &world);
    // Ranks that were asked to stop agree on it, and leave together: the first to leave is not lost to the others.
    l2p_bins::launch::part(&world, outcome)
}

fn work(arguments: &Arguments, device: &Device, world: &World) -> anyhow::Result<()> {
    let asked = format!("{:?}\n{:?}\n{}", arguments.parts, arguments.sizes, arguments.repeats);
    world.agree("arguments", asked.as_bytes())?;
    if let Some(fault) = arguments.fault {
        ensure!(
            arguments.parts.is_empty() && arguments.json.is_none(),
            "--fault stands by itself, or with faults"
        );
        return fault::run(world, device, fault, arguments.after);
    }
    let sizes: Vec<usize> = arguments.sizes.iter().map(|size| *size as usize).collect();
    let mut checked = 0;
    for &size in sizes.iter().filter(|_| arguments.does(Part::Check)) {
        for dtype in [DType::F32, DType::Bf16] {
            check::all(world, device, size, dtype)
                .with_context(|| format!("{size} elements of {dtype} on rank {}", world.rank()))?;
            checked += 1;
        }
    }
    let show = world.is_first() && arguments.shows();
    if show {
        l2p_bins::print(&header(world, device, checked))?;
    }
    let mut rows = Vec::new();
    for &size in sizes.iter().filter(|size| **size > 0 && arguments.does(Part::Measure)) {
        for dtype in [DType::F32, DType::Bf16] {
            for row in measure::all(world, device, size, dtype, arguments.repeats as usize)? {
                if show {
                    l2p_bins::print(&row.line())?;
                }
                rows.push(row);
            }
        }
    }
    let mut overlap = None;
    if arguments.does(Part::Overlap) {
        let found = overlap::measure(world, device, arguments.repeats as usize)?;
        if show {
            l2p_bins::print(&found.lines())?;
        }
        overlap = Some(found);
    }
    if let (true, Some(path)) = (world.is_first(), &arguments.json) {
        let record = Record {
            environment: Environment::of(device),
            transport: transport(world, device),
            ranks: world.peers().to_vec(),
            checked,
            rows,
            overlap,
        };
        write_json(path, &record)?;
    }
    Ok(())
}

fn transport(world: &World, device: &Device) -> String {
    match (device, world.size()) {
        (_, 1) => "copies".into(),
        (Device::Cpu, _) => "tcp".into(),
        (Device::Cuda(_), _) => format!("NCCL {}", nccl_available().unwrap_or_default()),
    }
}

fn header(world: &World, device: &Device, checked: usize) -> String {
    let mut text = format!(
        "{} {} over {}",
        world.size(),
        if world.size() == 1 { "rank" } else { "ranks" },
        transport(world, device)
    );
    if checked > 0 {
        text += &format!(": every operation right at {checked} sizes and types");
    }
    text.push('\n');
    for (rank, peer) in world.peers().iter().enumerate() {
        text += &format!(
            "  rank {rank}: process {} on {}, {}\n",
            peer.pid, peer.host, peer.device
        );
    }
    text
}
