//! What is asked of the CUDA driver before there is a device, and how it is answered.

use cudarc::driver::{CudaContext, CudaEvent, result, sys};

use super::libraries;
use crate::error::{Error, Result};

/// The oldest compute capability that the portable images run on.
pub(super) const OLDEST_CAPABILITY: (i32, i32) = (8, 0);

/// The capability for which there is machine code; any other GPU compiles the portable image when it is loaded.
pub(super) const NATIVE_CAPABILITY: (i32, i32) = (9, 0);

/// Turns a driver result into the engine's, naming the call.
pub(super) fn check<T>(call: &str, outcome: std::result::Result<T, result::DriverError>) -> Result<T> {
    outcome.map_err(|error| Error::Cuda {
        call: call.into(),
        reason: describe(error),
    })
}

/// A driver's error in words.
pub(super) fn describe(error: result::DriverError) -> String {
    let text = error
        .error_string()
        .map(|text| text.to_string_lossy().into_owned())
        .unwrap_or_default();
    let name = error
        .error_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    format!("{name}: {text}")
}

/// Bytes of the card in use as its driver counts them.
pub(super) fn memory_in_use(context: &CudaContext) -> Result<u64> {
    let (free, total) = check("cuMemGetInfo", context.mem_get_info())?;
    Ok((total - free) as u64)
}

/// Why a GPU of this capability cannot be used.
pub(super) fn too_old(name: &str, (major, minor): (i32, i32)) -> String {
    let (needed_major, needed_minor) = OLDEST_CAPABILITY;
    format!(
        "{name} has compute capability {major}.{minor}; the kernels of this build need {needed_major}.{needed_minor} or later \
         (Ampere and newer): run with --device cpu"
    )
}

/// The number of GPUs, or why there is none.
pub(super) fn gpu_count() -> Result<usize> {
    if !libraries::driver_present() {
        return Err(Error::NoGpu(
            "no NVIDIA driver was found (libcuda cannot be loaded): install it, or run with --device cpu".into(),
        ));
    }
    match CudaContext::device_count().or_else(|_| result::init().and_then(|()| result::device::get_count())) {
        Ok(0) | Err(result::DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => Err(Error::NoGpu(
            "the NVIDIA driver shows no GPU: look at CUDA_VISIBLE_DEVICES and nvidia-smi, or run with --device cpu"
                .into(),
        )),
        Ok(count) => Ok(count as usize),
        Err(error) => Err(Error::NoGpu(format!(
            "the NVIDIA driver does not start ({}): check it with nvidia-smi, or run with --device cpu",
            describe(error)
        ))),
    }
}

/// A point in a stream's work.
pub struct Event(pub(super) CudaEvent);

impl Event {
    /// Milliseconds of device time from `self` to `later`; waits for `later`.
    ///
    /// # Errors
    /// When the work between them failed.
    pub fn milliseconds_to(&self, later: &Event) -> Result<f32> {
        check("timing events", self.0.elapsed_ms(&later.0))
    }

    pub(super) fn is_reached(&self) -> Result<bool> {
        check("work on the GPU", self.0.try_is_complete())
    }

    pub(super) fn wait(&self) -> Result<()> {
        check("work on the GPU", self.0.synchronize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_is_too_old_is_named_with_the_way_out() {
        assert_eq!(
            too_old("Tesla V100", (7, 0)),
            "Tesla V100 has compute capability 7.0; the kernels of this build need 8.0 or later (Ampere and newer): run with \
             --device cpu"
        );
    }
}
