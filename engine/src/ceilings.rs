//! What a device can do at best: measured, a large copy and a large matrix product; and by its datasheet.
//!
//! The measured rates are the two roofs that a kernel's time is compared with: no work is done faster than its bytes are copied, nor
//! faster than its products are in one large matrix product. The datasheet's peak, which no product reaches, is what model FLOPs
//! utilization ([`mfu`]) is counted in.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::device::{Device, MemoryTag};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::cast::cast;
use crate::ops::linear::linear;
use crate::ops::noise::normal_noise;
use crate::profile::Work;
use crate::tensor::Tensor;

/// Rates of a device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// Bytes read and written per second by a copy within the device.
    pub bytes_per_second: f64,
    /// Floating point operations per second of a square product in the compute type.
    pub flops_per_second: f64,
    /// Bytes copied at once.
    pub copy_bytes: usize,
    /// Rows and columns of the product.
    pub product_size: usize,
}

/// 10¹² operations in a second of dense bf16 products with f32 sums that the vendor's datasheets state, by the name that the driver
/// gives the GPU. Names stand whole: a GPU of nearly the same name may be another.
const DATASHEETS: [(&str, f64); 13] = [
    ("NVIDIA H100 80GB HBM3", 989.4),
    ("NVIDIA H100 NVL", 835.5),
    ("NVIDIA H100 PCIe", 756.5),
    ("NVIDIA H200", 989.4),
    ("NVIDIA H200 NVL", 835.5),
    ("NVIDIA B200", 2250.0),
    ("NVIDIA A100-SXM4-40GB", 312.0),
    ("NVIDIA A100-SXM4-80GB", 312.0),
    ("NVIDIA A100-PCIE-40GB", 312.0),
    ("NVIDIA A100 80GB PCIe", 312.0),
    ("NVIDIA L40S", 362.0),
    ("NVIDIA GeForce RTX 4090", 165.2),
    ("NVIDIA GeForce RTX 3090", 71.0),
];

/// Model FLOPs utilization: the share of a GPU's peak by its datasheet (dense bf16) that work of `needed_flops` operations reaches
/// which takes `seconds`. What is computed a second time to save memory is not needed and does not count. `None` for a GPU whose
/// datasheet is not known, by the driver's name, and for the CPU.
pub fn mfu(gpu: &str, needed_flops: f64, seconds: f64) -> Option<f64> {
    let peak = DATASHEETS.iter().find(|(name, _)| *name == gpu)?.1 * 1e12;
    Some(needed_flops / seconds.max(f64::MIN_POSITIVE) / peak)
}

/// Repetitions, of which the fastest counts.
const REPEATS: usize = 10;

impl Ceilings {
    /// Measures them: on CUDA with 512 MiB and 8192³, on the CPU with 32 MiB and 1024³.
    ///
    /// # Errors
    /// When the device has no room (1 GiB on CUDA).
    pub fn measure(device: &Device) -> Result<Self> {
        match device {
            Device::Cpu => Self::measure_with(device, 32 << 20, 1024),
            Device::Cuda(_) => Self::measure_with(device, 512 << 20, 8192),
        }
    }

    /// Measures them at other sizes.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn measure_with(device: &Device, copy_bytes: usize, product_size: usize) -> Result<Self> {
        let _tag = MemoryTag::Workspace.scope();
        let copy = {
            let source = Tensor::zeros(device, [copy_bytes / 4], DType::F32)?;
            let mut target = Tensor::zeros(device, [copy_bytes / 4], DType::F32)?;
            fastest(device, || target.copy_from(&source))?
        };
        let product = {
            let shape = [1, product_size, product_size];
            let random = |stream| cast(&normal_noise(device, shape, 0, stream)?, device.compute_dtype());
            let (x, weight) = (random(1)?, random(2)?.reshape([product_size, product_size])?);
            fastest(device, || linear(&x, &weight, None).map(drop))?
        };
        Ok(Ceilings {
            bytes_per_second: 2.0 * copy_bytes as f64 / copy,
            flops_per_second: 2.0 * (product_size as f64).powi(3) / product,
            copy_bytes,
            product_size,
        })
    }

    /// The least milliseconds in which the device does `work`: the longer of its bytes' and its products' time.
    pub fn floor_ms(&self, work: Work) -> f64 {
        1e3 * (work.bytes as f64 / self.bytes_per_second).max(work.flops as f64 / self.flops_per_second)
    }

    /// Whether the products take longer than the bytes.
    pub fn bound_by_products(&self, work: Work) -> bool {
        work.flops as f64 * self.bytes_per_second > work.bytes as f64 * self.flops_per_second
    }

    /// The share of the ceiling that work reaches which takes `milliseconds`; 0 for work of no size.
    pub fn share(&self, work: Work, milliseconds: f64) -> f64 {
        self.floor_ms(work) / milliseconds.max(f64::MIN_POSITIVE)
    }
}

/// Seconds of the fastest of several runs.
fn fastest(device: &Device, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    for _ in 0..3 {
        work()?;
    }
    device.synchronize()?;
    let mut best = f64::INFINITY;
    for _ in 0..REPEATS {
        let seconds = match device {
            Device::Cpu => {
                let start = Instant::now();
                work()?;
                start.elapsed().as_secs_f64()
            }
            Device::Cuda(cuda) => {
                let start = cuda.record_event()?;
                work()?;
                let end = cuda.record_event()?;
                f64::from(start.milliseconds_to(&end)?) / 1e3
            }
        };
        best = best.min(seconds);
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearer_roof_is_the_floor_of_time() {
        let ceilings = Ceilings {
            bytes_per_second: 1e12,
            flops_per_second: 1e14,
            copy_bytes: 0,
            product_size: 0,
        };
        let moving = Work {
            flops: 1_000_000,
            bytes: 1_000_000,
        };
        let multiplying = Work {
            flops: 1_000_000_000,
            bytes: 1_000_000,
        };
        assert!((ceilings.floor_ms(moving) - 1e-3).abs() < 1e-12 && !ceilings.bound_by_products(moving));
        assert!((ceilings.floor_ms(multiplying) - 1e-2).abs() < 1e-12 && ceilings.bound_by_products(multiplying));
        assert!((ceilings.share(moving, 2e-3) - 0.5).abs() < 1e-9);
        assert_eq!(ceilings.share(Work::default(), 1.0), 0.0);
    }

    #[test]
    fn mfu_is_needed_arithmetic_over_the_datasheets_peak() {
        // 500 TFLOP/s of 989.4.
        for gpu in ["NVIDIA H100 80GB HBM3", "NVIDIA H200"] {
            let found = mfu(gpu, 150e12, 0.3).unwrap();
            assert!((found - 0.505_356_782).abs() < 1e-8, "{gpu}: {found}");
        }
        assert!((mfu("NVIDIA A100-SXM4-80GB", 78e12, 0.5).unwrap() - 0.5).abs() < 1e-12);
        for unknown in ["cpu", "NVIDIA H300", "NVIDIA GeForce RTX 4090 Laptop GPU", "H200", ""] {
            assert_eq!(mfu(unknown, 1e12, 1.0), None, "{unknown}");
        }
    }

    #[test]
    fn a_cpu_has_ceilings() {
        let found = Ceilings::measure_with(&Device::Cpu, 1 << 20, 64).unwrap();
        assert!(found.bytes_per_second > 0.0 && found.flops_per_second.is_finite());
    }
}
