//! How fast a run goes.

use std::time::{Duration, Instant};

use crate::device::Device;

/// Operations in a second of dense bf16 products with f32 sums that the vendor's data sheets state, by a part of the GPU's
/// name; the first that fits holds.
const SPECIFIED: [(&str, f64); 9] = [
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
];

/// The most operations in a second that a device's products can reach, by its data sheet; unknown for the CPU and others.
pub(super) fn peak_rate(device: &Device) -> Option<f64> {
    match device {
        Device::Cpu => None,
        Device::Cuda(device) => {
            let specified = SPECIFIED.iter().find(|(part, _)| device.name().contains(part));
            specified.map(|(_, rate)| *rate)
        }
    }
}

/// A stretch of training between two lines of the log. Time for validation, samples and checkpoints does not count.
#[derive(Debug)]
pub(super) struct Interval {
    started: Instant,
    /// Time in it that was no training.
    paused: Duration,
    /// Operations of its steps.
    pub operations: f64,
    /// Pictures of its steps.
    pub pictures: u64,
    /// Steps.
    pub steps: u64,
}

impl Interval {
    /// One that begins now.
    pub fn begin() -> Self {
        Interval {
            started: Instant::now(),
            paused: Duration::ZERO,
            operations: 0.0,
            pictures: 0,
            steps: 0,
        }
    }

    /// Leaves out time that was no training.
    pub fn exclude(&mut self, time: Duration) {
        self.paused += time;
    }

    /// Seconds of training so far, at least a nanosecond.
    pub fn seconds(&self) -> f64 {
        self.started
            .elapsed()
            .saturating_sub(self.paused)
            .as_secs_f64()
            .max(1e-9)
    }
}
