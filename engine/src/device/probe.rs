//! What this machine offers, and why a GPU that is there cannot be used.

use std::fmt;
use std::path::PathBuf;

use cudarc::driver::{CudaContext, sys};
use serde::Serialize;

use super::driver::{OLDEST_CAPABILITY, gpu_count, too_old};
use super::memory::format_bytes;
use super::options::DeviceOptions;
use super::{host_memory, images, libraries};
use crate::error::Result;
use crate::printable::printable;

/// Everything that `--device auto` looks at.
#[derive(Debug, Serialize)]
pub struct ProbeReport {
    /// Threads that the CPU backend uses.
    pub cpu_threads: usize,
    /// Bytes of host memory that are free or can be freed.
    pub cpu_available_bytes: u64,
    /// The newest CUDA release that the driver supports, such as `13.0`; `None` without a driver.
    pub driver: Option<String>,
    /// Whether cuBLASLt can be loaded.
    pub cublas_lt: bool,
    /// The embedded kernel images.
    pub kernel_images: Vec<&'static str>,
    /// Those in whose place a folder that `L2P_KERNEL_IMAGES` names holds others.
    pub foreign_images: Option<ForeignImages>,
    /// The GPUs that the driver shows.
    pub gpus: Vec<GpuReport>,
    /// Why no GPU can be used at all, where that is so.
    pub obstacle: Option<String>,
}

/// Kernel images that come before those of the build.
#[derive(Debug, Serialize)]
pub struct ForeignImages {
    /// The folder that `L2P_KERNEL_IMAGES` names.
    pub folder: PathBuf,
    /// The build's images in whose place it holds one.
    pub images: Vec<&'static str>,
}

/// One GPU.
#[derive(Debug, Serialize)]
pub struct GpuReport {
    /// For `--device cuda:N`.
    pub index: usize,
    /// The vendor's name.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub multiprocessors: i32,
    /// Bytes on the card.
    pub total_bytes: u64,
    /// Bytes no process uses.
    pub free_bytes: u64,
    /// Which kernels run there: `sm_90a` machine code, or `compute_80` PTX compiled by the driver.
    pub kernels: &'static str,
    /// Why this one cannot be used, where that is so.
    pub obstacle: Option<String>,
}

impl ProbeReport {
    /// The device that `auto` takes.
    pub fn automatic(&self) -> String {
        match self.gpus.first() {
            Some(gpu) if self.obstacle.is_none() && gpu.obstacle.is_none() => "cuda:0".into(),
            _ => "cpu".into(),
        }
    }
}

/// Looks at the machine without allocating anything on a GPU (a context is opened on each for its free memory).
///
/// # Errors
/// When an environment variable of the engine has a value that means nothing.
pub fn probe() -> Result<ProbeReport> {
    let options = DeviceOptions::of_process()?;
    let cublas_lt = libraries::cublas_lt_present(options);
    let kernel_images: Vec<&'static str> = l2p_kernels::IMAGES.iter().map(|image| image.name).collect();
    let (gpus, missing) = match gpu_count() {
        Ok(count) => ((0..count).map(|index| probe_gpu(index, options)).collect(), None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    let obstacle = missing.or_else(|| match (kernel_images.is_empty(), cublas_lt) {
        (true, _) => Some(l2p_kernels::HOW_TO_BUILD.into()),
        (_, false) => Some(format!(
            "cuBLASLt was not found: {}",
            libraries::cublas_lt_places(options)
        )),
        _ => None,
    });
    Ok(ProbeReport {
        cpu_threads: rayon::current_num_threads(),
        cpu_available_bytes: host_memory::available_memory(),
        driver: libraries::driver_release().map(libraries::format_release),
        cublas_lt,
        kernel_images,
        foreign_images: options.kernel_images.as_ref().map(|folder| ForeignImages {
            images: images::foreign_names(folder),
            folder: folder.clone(),
        }),
        gpus,
        obstacle,
    })
}

fn probe_gpu(index: usize, options: &DeviceOptions) -> GpuReport {
    let mut report = GpuReport {
        index,
        name: "unknown".into(),
        capability: (0, 0),
        multiprocessors: 0,
        total_bytes: 0,
        free_bytes: 0,
        kernels: "none",
        obstacle: None,
    };
    if let Err(error) = fill(&mut report, options) {
        report.obstacle = Some(format!("the driver cannot open it: {error}"));
    } else if report.capability < OLDEST_CAPABILITY {
        report.obstacle = Some(too_old(&report.name, report.capability));
    }
    report
}

fn fill(report: &mut GpuReport, options: &DeviceOptions) -> std::result::Result<(), cudarc::driver::DriverError> {
    let context = CudaContext::new(report.index)?;
    report.name = context.name()?;
    report.capability = context.compute_capability()?;
    report.multiprocessors = context.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let (free, total) = context.mem_get_info()?;
    (report.free_bytes, report.total_bytes) = (free as u64, total as u64);
    report.kernels = images::description(report.capability, options.portable);
    Ok(())
}

impl fmt::Display for ProbeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_none = |present: bool| if present { "found" } else { "not found" };
        writeln!(
            f,
            "cpu        {} threads, {} available",
            self.cpu_threads,
            format_bytes(self.cpu_available_bytes)
        )?;
        match &self.driver {
            Some(version) => writeln!(f, "driver     found, supports CUDA {version}")?,
            None => writeln!(f, "driver     not found")?,
        }
        writeln!(f, "cuBLASLt   {}", or_none(self.cublas_lt))?;
        writeln!(f, "kernels    {} images in this build", self.kernel_images.len())?;
        if let Some(ForeignImages { folder, images }) = &self.foreign_images {
            let names = if images.is_empty() {
                "none".into()
            } else {
                images.join(", ")
            };
            let folder = folder.to_string_lossy();
            let folder = printable(&folder);
            writeln!(f, "           from L2P_KERNEL_IMAGES={folder} instead: {names}")?;
        }
        for gpu in &self.gpus {
            writeln!(
                f,
                "cuda:{}     {}, compute capability {}.{}, {} multiprocessors, {} of {} free, kernels: {}",
                gpu.index,
                gpu.name,
                gpu.capability.0,
                gpu.capability.1,
                gpu.multiprocessors,
                format_bytes(gpu.free_bytes),
                format_bytes(gpu.total_bytes),
                gpu.kernels
            )?;
            if let Some(obstacle) = &gpu.obstacle {
                writeln!(f, "           cannot be used: {obstacle}")?;
            }
        }
        if let Some(obstacle) = &self.obstacle {
            writeln!(f, "no GPU     {obstacle}")?;
        }
        write!(f, "--device auto takes {}", self.automatic())
    }
}
