//! Recorded work: submitted once, replayed with one call.
//!
//! A replay reads and writes the addresses that were given out while its work was recorded. A graph therefore holds every
//! block that such an address lies in: dropping a tensor that recorded work uses returns its memory only when the graph is gone
//! too. What the work itself allocates and frees is served from blocks that belong to the graph. So nothing else is ever handed
//! memory that a replay touches, whatever becomes of the tensors.

use std::any::Any;
use std::sync::Arc;

use cudarc::driver::{CudaGraph, sys};

use super::Device;
use super::cuda::CudaDevice;
use super::driver::check;
use super::recording::Recorded;
use crate::error::{Error, Result};

/// Recorded work of one device.
pub struct Graph {
    graph: CudaGraph,
    /// Blocks that were there before the recording and that replays use.
    _kept: Vec<Arc<dyn Any + Send + Sync>>,
    /// Addresses and sizes of the recording's own blocks.
    blocks: Vec<(u64, u64)>,
    device: Arc<CudaDevice>,
}

// SAFETY: a graph may be launched from any thread, one at a time; `launch` takes it mutably.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `work` submits, without running it. Kernels and library plans must have been used before, since loading
    /// them cannot be recorded. The memory of the tensors that it uses is held as long as the graph; a tensor that is to be read or
    /// written between replays must itself be kept. Other threads cannot submit work meanwhile.
    ///
    /// # Errors
    /// Those of `work`; when a tensor that it made outlives it; and when it does something that cannot be recorded, such as waiting
    /// for the device or copying from or to the host.
    pub fn record(device: &Arc<CudaDevice>, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        device.bind()?;
        let stream = device.stream();
        device.begin_recording()?;
        // Relaxed: the pool may have to take memory from the driver meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        let outcome = check("cuStreamBeginCapture", stream.begin_capture(mode)).and_then(|()| {
            let worked = work();
            // The capture must end whatever happened in it.
            let end = || {
                check(
                    "cuStreamEndCapture",
                    stream.end_capture(sys::CUgraphInstantiate_flags(0)),
                )
            };
            let ended = device.charged(|beside| &mut beside.graphs, end);
            worked.and(ended)
        });
        let recorded = device.end_recording();
        let Some(Recorded { blocks, kept, .. }) = recorded else {
            return Err(Error::invalid("the recording was ended by something else"));
        };
        let all_returned = blocks.live == 0;
        let outcome = outcome.and_then(|graph| match (graph, all_returned) {
            (Some(graph), true) => Ok(graph),
            (Some(_), false) => Err(Error::invalid(
                "a tensor that was made while recording outlives the recording",
            )),
            (None, _) => Err(Error::invalid("recording gave no graph")),
        });
        match outcome {
            Ok(graph) => Ok(Graph {
                graph,
                _kept: kept.into_values().collect(),
                blocks: blocks.taken,
                device: device.clone(),
            }),
            Err(error) => {
                // Blocks of a tensor that is still alive stay out of the pool: better lost than given out twice.
                if all_returned {
                    device.release_blocks(&blocks.taken);
                }
                Err(error)
            }
        }
    }

    /// Submits the recorded work.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn launch(&mut self) -> Result<()> {
        check("cuGraphLaunch", self.device.submit(|| self.graph.launch())?)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // The stream's order keeps replays that still run ahead of whatever gets the blocks next.
        self.device.release_blocks(&self.blocks);
    }
}

/// Work that is submitted again and again, recorded when it is met for the second time: the first time loads every kernel.
pub enum Recording {
    /// It runs call by call each time.
    Off,
    /// Nothing is recorded yet.
    Pending(Arc<CudaDevice>),
    /// It is replayed.
    Ready(Graph),
}

impl Recording {
    /// Work that is to be recorded where the device and its options allow that.
    pub fn new(device: &Device) -> Self {
        match device {
            Device::Cuda(device) if device.options().graphs => Recording::Pending(device.clone()),
            _ => Recording::Off,
        }
    }

    /// Submits the work, which has run before if `ran` is set.
    ///
    /// # Errors
    /// Those of `work`, and as for [`Graph::record`].
    pub fn run(&mut self, ran: bool, work: impl FnOnce() -> Result<()>) -> Result<()> {
        match self {
            Recording::Ready(graph) => graph.launch(),
            Recording::Pending(device) if ran => {
                let mut graph = Graph::record(device, work)?;
                graph.launch()?;
                *self = Recording::Ready(graph);
                Ok(())
            }
            _ => work(),
        }
    }
}
