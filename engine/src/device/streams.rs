//! A second stream beside a device's own, for work that runs while the device computes, and the points that order the two.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream, result, sys};

use super::cuda::CudaDevice;
use super::driver::{check, gpu_count};
use super::gpu::Gpu;
use crate::error::Result;

/// GPUs that the driver shows to this process.
///
/// # Errors
/// [`Error::NoGpu`](crate::Error::NoGpu) with the reason when there are none.
pub fn visible_gpus() -> Result<usize> {
    gpu_count()
}

/// A stream of a device that runs beside its own one, before it where both wait for the same multiprocessors.
pub struct SideStream {
    device: Arc<CudaDevice>,
    stream: Arc<CudaStream>,
}

impl SideStream {
    /// A stream without work.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn new(device: &Arc<CudaDevice>) -> Result<Self> {
        device.bind()?;
        let (_, most_urgent) = check("cuCtxGetStreamPriorityRange", result::stream::get_priority_range())?;
        let stream = device.context().new_stream_with_priority(most_urgent);
        Ok(SideStream {
            device: device.clone(),
            stream: check("cuStreamCreateWithPriority", stream)?,
        })
    }

    /// What is submitted to this stream from now on begins after all that was submitted to the device's own stream so far.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn begin_after_device(&self) -> Result<()> {
        check("cuStreamWaitEvent", self.stream.join(self.device.stream()))
    }

    /// The point after all that was submitted to this stream so far.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn mark(&self) -> Result<StreamMark> {
        self.device.bind()?;
        Ok(StreamMark {
            event: check("cuEventRecord", self.stream.record_event(None))?,
            device: self.device.clone(),
        })
    }

    /// As [`SideStream::mark`], for a point that a thread will wait for, asleep.
    ///
    /// # Errors
    /// When the driver refuses.
    pub(super) fn mark_to_wait_for(&self) -> Result<StreamMark> {
        self.device.bind()?;
        let flags = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC;
        Ok(StreamMark {
            event: check("cuEventRecord", self.stream.record_event(Some(flags)))?,
            device: self.device.clone(),
        })
    }

    /// Waits for all that was submitted to this stream.
    ///
    /// # Errors
    /// The first error of that work.
    pub(super) fn synchronize(&self) -> Result<()> {
        check("work on the GPU", self.stream.synchronize())
    }

    /// The device.
    pub fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    /// The driver's handle, for libraries.
    pub(crate) fn handle(&self) -> sys::CUstream {
        self.stream.cu_stream()
    }
}

/// A point in a [`SideStream`]'s work.
pub struct StreamMark {
    event: CudaEvent,
    device: Arc<CudaDevice>,
}

impl StreamMark {
    /// What is submitted to the device's own stream from now on begins after this point; the host does not wait.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn hold_device(&self) -> Result<()> {
        check("cuStreamWaitEvent", self.device.stream().wait(&self.event))
    }

    /// Waits until all work before the point is done.
    ///
    /// # Errors
    /// The first error of that work.
    pub fn wait(&self) -> Result<()> {
        check("work on the GPU", self.event.synchronize())
    }

    /// Whether all work before the point is done; does not wait.
    ///
    /// # Errors
    /// The first error of that work.
    pub fn is_reached(&self) -> Result<bool> {
        self.device.bind()?;
        check("work on the GPU", self.event.try_is_complete())
    }
}

impl Gpu {
    /// What tells this GPU from all others, as `nvidia-smi -L` writes it.
    pub(crate) fn uuid(&self) -> Result<String> {
        let uuid = check("cuDeviceGetUuid", self.context().uuid())?;
        let hex: String = uuid.bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect();
        let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
        Ok(format!("GPU-{}", parts.join("-")))
    }

    /// Runs `work`, which sets up a library, and counts what the driver has given it meanwhile.
    pub(crate) fn charged_to_library<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.charged(|beside| &mut beside.library, work)
    }
}

/// Lets this thread ask the driver about events while another one records a graph.
pub(crate) fn keep_out_of_recordings() -> Result<()> {
    let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: a plain in-and-out parameter.
    check("cuThreadExchangeStreamCaptureMode", unsafe {
        sys::cuThreadExchangeStreamCaptureMode(&mut mode).result()
    })
}
