//! Devices: the CPU, and NVIDIA GPUs through the CUDA driver.
//!
//! `unsafe` code lives in these places of the workspace and nowhere else; a test compares the list with the sources:
//!
//! * `engine/src/device/`: calls of the driver and of CUDA's libraries, and the memory of both kinds of device
//! * `engine/src/dist/nccl/`: NCCL's functions, and calls of them
//! * `engine/src/ops/`: launches of kernels and products
//! * `engine/src/train/adamw/`: launches of its kernels
//! * `engine/src/nvtx.rs`: the profiler's table of functions
//! * `tests/fuzz/memory.rs`: an allocator that counts

mod args;
mod blas;
mod block;
mod buffer;
mod cpu;
mod cuda;
mod driver;
mod gpu;
mod graph;
mod host_blocks;
mod host_copies;
mod host_memory;
mod images;
mod kernel;
pub(crate) mod libraries;
mod memory;
mod options;
mod pool;
mod probe;
mod recording;
mod streams;
mod tensor_map;
mod trace;
mod upload;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

pub use args::Args;
pub use blas::{Blas, Effort, Matmul, MatmulOperands, Searched, class_rows};
pub use buffer::CudaBuffer;
pub use cpu::{CpuBuffer, set_poison_new_buffers};
pub use cuda::CudaDevice;
pub use driver::Event;
pub use gpu::Gpu;
pub use graph::{Graph, Recording};
pub use host_blocks::{HostBlocks, PLACES};
pub use host_copies::HostCopies;
pub use kernel::{Kernel, LaunchInfo};
pub use memory::{BesidePool, MemoryReport, MemoryTag, TagScope, format_bytes};
pub use options::{DeviceOptions, PoolKind};
pub use probe::{ForeignImages, GpuReport, ProbeReport, probe};
pub(crate) use streams::keep_out_of_recordings;
pub use streams::{SideStream, StreamMark, visible_gpus};
pub use tensor_map::{TensorMap, TensorMapSpec};
pub use trace::{Activity, Tracer, busy_nanoseconds};

use crate::dtype::DType;
use crate::error::{Error, Result};

/// Where tensors live and operations run.
#[derive(Clone)]
pub enum Device {
    /// The host's processors: f32, threaded; the definition of every operation's result.
    Cpu,
    /// One GPU: bf16 storage with f32 accumulation.
    Cuda(Arc<CudaDevice>),
}

impl Device {
    /// Opens the device that `choice` names, with the [`DeviceOptions`] of the process.
    ///
    /// # Errors
    /// [`Error::NoGpu`] when a GPU is asked for by name and cannot be used, with the reason; `auto` takes the CPU where no GPU can
    /// be used. Whatever is asked for, when an environment variable of the engine has a value that means nothing.
    pub fn open(choice: DeviceChoice) -> Result<Self> {
        DeviceOptions::of_process()?;
        match choice {
            DeviceChoice::Cpu => Ok(Device::Cpu),
            DeviceChoice::Cuda(index) => CudaDevice::open(index).map(Device::Cuda),
            DeviceChoice::Auto => match CudaDevice::open(0) {
                Ok(device) => Ok(Device::Cuda(device)),
                Err(reason) => {
                    tracing::debug!("running on the CPU: {reason}");
                    Ok(Device::Cpu)
                }
            },
        }
    }

    /// The element type of weights and activations: f32 on the CPU, bf16 on CUDA.
    pub fn compute_dtype(&self) -> DType {
        match self {
            Device::Cpu => DType::F32,
            Device::Cuda(_) => DType::Bf16,
        }
    }

    /// Waits until all work submitted so far is done.
    ///
    /// # Errors
    /// The first error of that work.
    pub fn synchronize(&self) -> Result<()> {
        match self {
            Device::Cpu => Ok(()),
            Device::Cuda(device) => device.synchronize(),
        }
    }

    /// A point after all work submitted so far, to be asked or waited for later.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn marker(&self) -> Result<Marker> {
        match self {
            Device::Cpu => Ok(Marker(None)),
            Device::Cuda(device) => device.record_marker().map(|event| Marker(Some(event))),
        }
    }

    /// Memory held now and at its peak, by tag, since the last [`Device::reset_memory_peaks`].
    pub fn memory_report(&self) -> MemoryReport {
        match self {
            Device::Cpu => memory::cpu_ledger().report(),
            Device::Cuda(device) => device.memory_report(),
        }
    }

    /// Starts a new accounting phase: peaks become what is held now.
    pub fn reset_memory_peaks(&self) {
        match self {
            Device::Cpu => memory::cpu_ledger().reset_peaks(),
            Device::Cuda(device) => device.reset_memory_peaks(),
        }
    }

    /// Bytes of memory that could still be allocated, as far as the system tells.
    ///
    /// # Errors
    /// When the driver cannot be asked.
    pub fn available_memory(&self) -> Result<u64> {
        match self {
            Device::Cpu => Ok(host_memory::available_memory()),
            Device::Cuda(device) => device.available_memory(),
        }
    }
}

/// A point in a device's work, made by [`Device::marker`]. With it a host that runs ahead of its GPU can keep a bounded
/// distance without ever letting the GPU run dry, which [`Device::synchronize`] does. The CPU works at once: what was
/// submitted there is done.
pub struct Marker(Option<Event>);

impl Marker {
    /// Whether all work before the marker is done; does not wait.
    ///
    /// # Errors
    /// The first error of the work so far.
    pub fn is_reached(&self) -> Result<bool> {
        self.0.as_ref().map_or(Ok(true), Event::is_reached)
    }

    /// Waits until all work before the marker is done; later work goes on meanwhile.
    ///
    /// # Errors
    /// The first error of that work.
    pub fn wait(&self) -> Result<()> {
        self.0.as_ref().map_or(Ok(()), Event::wait)
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Device::Cpu, Device::Cpu) => true,
            (Device::Cuda(a), Device::Cuda(b)) => a.index() == b.index(),
            _ => false,
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(device) => write!(f, "cuda:{}", device.index()),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A user's choice of device: `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The first GPU when driver, libraries and kernels are usable, the CPU otherwise.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU with this index.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(DeviceChoice::Auto),
            "cpu" => Ok(DeviceChoice::Cpu),
            "cuda" => Ok(DeviceChoice::Cuda(0)),
            _ => {
                let index = text.strip_prefix("cuda:").and_then(|index| index.parse().ok());
                index.map(DeviceChoice::Cuda).ok_or_else(|| {
                    Error::invalid(format!(
                        "`{text}` names no device; use auto, cpu, cuda or cuda:N (cuda:0 is the first GPU)"
                    ))
                })
            }
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_has_done_what_was_submitted() {
        let marker = Device::Cpu.marker().unwrap();
        assert!(marker.is_reached().unwrap());
        marker.wait().unwrap();
    }

    #[test]
    fn device_names_are_read() {
        assert_eq!("auto".parse::<DeviceChoice>().unwrap(), DeviceChoice::Auto);
        assert_eq!("cuda".parse::<DeviceChoice>().unwrap(), DeviceChoice::Cuda(0));
        assert_eq!("cuda:3".parse::<DeviceChoice>().unwrap(), DeviceChoice::Cuda(3));
        for bad in ["gpu", "cuda:", "cuda:-1", "CPU", ""] {
            let message = bad.parse::<DeviceChoice>().unwrap_err().to_string();
            assert!(message.contains("use auto, cpu, cuda or cuda:N"), "{message}");
        }
    }
}
