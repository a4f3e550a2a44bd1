//! `bench-ranks`: every operation between ranks, checked and timed; and what becomes of the others when one is lost.

mod check;
mod fault;
mod measure;
mod overlap;

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
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
Examples:
  bench-ranks --ranks 2                              two GPUs: check everything, measure it, and show it as a table
  bench-ranks --ranks 4 --device cpu --sizes 0,1,1000
  bench-ranks --ranks 2 --only-check                 no measurement
  bench-ranks --ranks 2 --fault kill:1 --after 3     rank 1 kills itself after 3 s; the others must end with one line
  torchrun --no-python --nproc-per-node 2 bench-ranks --only-check
  mpirun -np 2 bench-ranks --only-check

The columns: elements of the larger tensor of a rank; its type; median over the samples of the time that the slowest rank took,
from the call to the end of the device's work; bytes that each rank sends to others, by that time. all_reduce is made of
reduce_scatter in the type named and all_gather in f32. The last table puts reduce_scatter beside matrix products: each alone,
both together, and the share of the shorter one that was hidden.

Exit code: 0 when all results equal a plain loop bit for bit, 1 when one does not, a rank is lost, or on an error.";

/// Checks and times what ranks exchange.
#[derive(Parser, Debug)]
#[command(name = "bench-ranks", version, after_help = HELP, after_long_help = format!("{HELP}\n\n{RANKS_HELP}"))]
pub struct Arguments {
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
    /// Check, and measure nothing
    #[arg(long)]
    only_check: bool,
    /// Write the record as JSON, every sample included; `-` for standard output instead of the tables
    #[arg(long, value_name = "FILE|-")]
    json: Option<PathBuf>,
    /// Exchange tensors until this happens to a rank: kill, stop, hang, fail or panic
    #[arg(long, value_name = "WHAT:RANK|none", conflicts_with_all = ["json", "only_check"])]
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
    /// Sizes and types at which all operations gave the right bits.
    checked: usize,
    rows: Vec<Row>,
    overlap: Option<Overlap>,
}

/// Runs the benchmark as one rank, or alone.
///
/// # Errors
/// When ranks do not meet, a result is wrong, or a rank is lost.
pub fn run(arguments: &Arguments, launch: Option<Launch>) -> anyhow::Result<()> {
    let (device, world) = match launch {
        Some(launch) => {
            let device = launch.open_device(arguments.device)?;
            let world = World::join(launch, &device, &arguments.ranks.options())?;
            (device, world)
        }
        None => (Device::open(arguments.device)?, World::solo()),
    };
    match work(arguments, &device, &world) {
        Ok(()) => Ok(world.leave()?),
        Err(error) => {
            world.give_up(&format!("{error:#}"));
            Err(error)
        }
    }
}

fn work(arguments: &Arguments, device: &Device, world: &World) -> anyhow::Result<()> {
    world.agree(
        "sizes",
        format!("{:?}\n{}", arguments.sizes, arguments.repeats).as_bytes(),
    )?;
    if let Some(fault) = arguments.fault {
        return fault::run(world, device, fault, arguments.after);
    }
    let sizes: Vec<usize> = arguments.sizes.iter().map(|size| *size as usize).collect();
    let mut checked = 0;
    for &size in &sizes {
        for dtype in [DType::F32, DType::Bf16] {
            check::all(world, device, size, dtype)
                .with_context(|| format!("{size} elements of {dtype} on rank {}", world.rank()))?;
            checked += 1;
        }
    }
    let show = world.is_first() && arguments.json.as_deref() != Some("-".as_ref());
    if show {
        l2p_bins::print(&header(world, device, checked))?;
    }
    if arguments.only_check {
        return Ok(());
    }
    let mut rows = Vec::new();
    for &size in sizes.iter().filter(|size| **size > 0) {
        for dtype in [DType::F32, DType::Bf16] {
            for row in measure::all(world, device, size, dtype, arguments.repeats as usize)? {
                if show {
                    l2p_bins::print(&row.line())?;
                }
                rows.push(row);
            }
        }
    }
    let overlap = overlap::measure(world, device, arguments.repeats as usize)?;
    if show {
        l2p_bins::print(&overlap.lines())?;
    }
    if let (true, Some(path)) = (world.is_first(), &arguments.json) {
        let record = Record {
            environment: Environment::of(device),
            transport: transport(world, device),
            ranks: world.peers().to_vec(),
            checked,
            rows,
            overlap: Some(overlap),
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
        "{} {} over {}: every operation right at {checked} sizes and types\n",
        world.size(),
        if world.size() == 1 { "rank" } else { "ranks" },
        transport(world, device)
    );
    for (rank, peer) in world.peers().iter().enumerate() {
        text += &format!(
            "  rank {rank}: process {} on {}, {}\n",
            peer.pid, peer.host, peer.device
        );
    }
    text
}
