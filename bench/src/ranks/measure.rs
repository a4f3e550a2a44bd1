//! How long operations take, and how fast that is.

use std::time::Instant;

use l2p_engine::dist::World;
use l2p_engine::{DType, Device, Result, Tensor};
use serde::Serialize;

use super::check::tensor;
use crate::record::Timing;

/// Untimed runs of each case: connections are made in the first.
const WARM_UP: usize = 2;

/// One operation at one size.
#[derive(Debug, Serialize)]
pub struct Row {
    operation: &'static str,
    dtype: String,
    /// Of the larger tensor of a rank.
    elements: usize,
    /// That each rank sends to others.
    bytes_sent: f64,
    #[serde(flatten)]
    timing: Timing,
    gigabytes_per_second: f64,
}

impl Row {
    /// The row of a table.
    pub fn line(&self) -> String {
        format!(
            "{:<15} {:>5} {:>10} elements {:>10.3} ms {:>8.2} GB/s\n",
            self.operation, self.dtype, self.elements, self.timing.milliseconds, self.gigabytes_per_second
        )
    }
}

/// Times all operations with about `size` elements of `dtype`.
pub fn all(world: &World, device: &Device, size: usize, dtype: DType, repeats: usize) -> Result<Vec<Row>> {
    let (rank, ranks) = (world.rank(), world.size());
    let slice = size.div_ceil(ranks);
    let elements = ranks * slice;
    let communicator = world.communicator();
    let parts = tensor(device, dtype, rank, 0, elements)?.into_shape([ranks, slice])?;
    let part = parts.narrow(rank, 1)?.into_shape([slice])?;
    // Owned by an operation while it runs, and kept for the next.
    let mut target = Some(Tensor::empty(device, [ranks, slice], dtype)?);
    let mut whole = Some(Tensor::zeros(device, [elements], dtype)?);
    let kept = || l2p_engine::Error::invalid("the operation before failed");
    let (others, bytes) = ((ranks - 1) as f64, (slice * dtype.size()) as f64);
    let sums = (slice * DType::F32.size()) as f64;
    let mut rows = Vec::new();
    let mut time = |operation, bytes_sent: f64, work: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        let timing = Timing::of(samples(world, device, repeats, work)?);
        rows.push(Row {
            operation,
            dtype: dtype.to_string(),
            elements,
            bytes_sent,
            gigabytes_per_second: bytes_sent / (timing.milliseconds * 1e6),
            timing,
        });
        Ok(())
    };
    time("all_to_all", others * bytes, &mut || {
        let receive = target.take().ok_or_else(kept)?;
        target = Some(communicator.all_to_all(&parts, receive)?.wait()?);
        Ok(())
    })?;
    time("all_gather", others * bytes, &mut || {
        let receive = target.take().ok_or_else(kept)?;
        target = Some(communicator.all_gather(&part, receive)?.wait()?);
        Ok(())
    })?;
    // From the root's point of view; how NCCL passes it on is its own business.
    let once = if ranks > 1 { ranks as f64 * bytes } else { 0.0 };
    time("broadcast", once, &mut || {
        let tensor = whole.take().ok_or_else(kept)?;
        whole = Some(communicator.broadcast(tensor, 0)?.wait()?);
        Ok(())
    })?;
    time("reduce_scatter", others * bytes, &mut || {
        communicator.reduce_scatter(&parts)?.wait(1.0).map(|_| ())
    })?;
    let flat = parts.reshape([elements])?;
    time("all_reduce", others * (bytes + sums), &mut || {
        communicator.all_reduce(&flat, 1.0).map(|_| ())
    })?;
    Ok(rows)
}

/// Milliseconds of `repeats` runs of `work`, each as long as the slowest rank took; known on rank 0, this rank's own elsewhere.
pub fn samples(
    world: &World,
    device: &Device,
    repeats: usize,
    work: &mut dyn FnMut() -> Result<()>,
) -> Result<Vec<f64>> {
    let mut own = Vec::with_capacity(repeats);
    for sample in 0..WARM_UP + repeats {
        device.synchronize()?;
        world.barrier("sample")?;
        let start = Instant::now();
        work()?;
        device.synchronize()?;
        if sample >= WARM_UP {
            own.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    let slowest =
        |all: Vec<Vec<f64>>| (0..repeats).map(move |sample| all.iter().map(|own| own[sample]).fold(0.0, f64::max));
    Ok(match world.gather("samples", own.clone())? {
        Some(all) => slowest(all).collect(),
        None => own,
    })
}
