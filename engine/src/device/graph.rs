//! Recorded work: submitted once, replayed with one call.
//!
//! A recording keeps the addresses of everything it touches. What it allocates and frees is served from blocks that belong
//! to the graph for as long as it lives, so that nothing else is ever handed the memory that a replay writes.

use std::sync::Arc;

use cudarc::driver::{CudaGraph, sys};

use super::cuda::{CudaDevice, check};
use crate::error::{Error, Result};

/// Recorded work of one device.
pub struct Graph {
    graph: CudaGraph,
    /// Addresses and sizes of the blocks that replays use.
    blocks: Vec<(u64, u64)>,
    device: Arc<CudaDevice>,
}

// SAFETY: a graph may be launched from any thread, one at a time; `launch` takes it mutably.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `work` submits, without running it. Kernels and library plans must have been used before, since loading
    /// them cannot be recorded; tensors that `work` returns or keeps must not outlive the graph.
    ///
    /// # Errors
    /// Those of `work`, and when it does something that cannot be recorded, such as waiting for the device.
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
        let recording = device.end_recording();
        let all_returned = recording.live == 0;
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
                blocks: recording.taken,
                device: device.clone(),
            }),
            Err(error) => {
                // Blocks of a tensor that is still alive stay out of the pool: better lost than given out twice.
                if all_returned {
                    device.release_blocks(&recording.taken);
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
        check("cuGraphLaunch", self.graph.launch())
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // The stream's order keeps replays that still run ahead of whatever gets the blocks next.
        self.device.release_blocks(&self.blocks);
    }
}
