//! Timing work on a device.

use std::time::Instant;

use l2p_engine::{Device, Result};

/// Runs `work` until it is warm, then `repeats` times, and returns the milliseconds of each timed run: device time between
/// events on CUDA, wall time on the CPU.
///
/// # Errors
/// Those of `work`.
pub fn samples(
    device: &Device,
    warm_up: usize,
    repeats: usize,
    mut work: impl FnMut() -> Result<()>,
) -> Result<Vec<f64>> {
    for _ in 0..warm_up {
        work()?;
    }
    device.synchronize()?;
    (0..repeats)
        .map(|_| match device {
            Device::Cpu => {
                let start = Instant::now();
                work()?;
                Ok(start.elapsed().as_secs_f64() * 1e3)
            }
            Device::Cuda(cuda) => {
                let start = cuda.record_event()?;
                work()?;
                let end = cuda.record_event()?;
                Ok(f64::from(start.milliseconds_to(&end)?))
            }
        })
        .collect()
}

/// The median; 0 of nothing.
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        count if count % 2 == 1 => sorted[count / 2],
        count => (sorted[count / 2 - 1] + sorted[count / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }
}
