//! What the GPU runs during replayed steps, kernel by kernel.

use l2p_engine::device::{Activity, Tracer, busy_nanoseconds};
use l2p_engine::{Device, Result};
use serde::Serialize;

use super::{Setup, WARM_STEPS};
use crate::record::{milliseconds, percent};

/// Steps that are traced.
const STEPS: usize = 4;

/// Kernels told of; the rest takes next to nothing.
const KERNELS: usize = 24;

/// What was seen.
pub(super) struct Trace {
    /// The share of the time from the first kernel's start to the last one's end in which none runs.
    pub idle: f64,
    /// By kernel, the longest first.
    pub kernels: Vec<KernelTime>,
}

/// All calls of one kernel.
#[derive(Debug, Serialize)]
pub(super) struct KernelTime {
    name: String,
    calls_per_step: f64,
    milliseconds_per_step: f64,
    /// Of the step.
    share: f64,
}

impl KernelTime {
    /// As a line of a table.
    pub fn line(&self) -> String {
        format!(
            "  {:>10}{:>8}{:>7.1}x  {}",
            milliseconds(self.milliseconds_per_step),
            percent(self.share),
            self.calls_per_step,
            self.name
        )
    }
}

/// Traces replayed steps; `None` on the CPU.
///
/// # Errors
/// When CUPTI is not there or does not start.
pub(super) fn of_steps(setup: &Setup) -> Result<Option<Trace>> {
    let Device::Cuda(device) = setup.dit.device() else {
        return Ok(None);
    };
    let mut tracer = Tracer::start(device)?;
    let mut walk = setup.walk(WARM_STEPS + STEPS)?;
    for _ in 0..WARM_STEPS {
        walk.advance()?;
    }
    tracer.take()?;
    for _ in 0..STEPS {
        walk.advance()?;
    }
    Ok(summary(&tracer.take()?, STEPS))
}

/// `None` of nothing.
fn summary(activities: &[Activity], steps: usize) -> Option<Trace> {
    let start = activities.first()?.start;
    let end = activities.iter().map(|activity| activity.end).max()?;
    let span = end.saturating_sub(start).max(1) as f64;
    let mut kernels: Vec<KernelTime> = Vec::new();
    for activity in activities {
        let kernel = match kernels.iter_mut().find(|kernel| kernel.name == activity.name) {
            Some(kernel) => kernel,
            None => {
                kernels.push(KernelTime {
                    name: activity.name.clone(),
                    calls_per_step: 0.0,
                    milliseconds_per_step: 0.0,
                    share: 0.0,
                });
                kernels.last_mut()?
            }
        };
        let nanoseconds = activity.end.saturating_sub(activity.start) as f64;
        kernel.calls_per_step += 1.0 / steps as f64;
        kernel.milliseconds_per_step += nanoseconds / 1e6 / steps as f64;
        kernel.share += nanoseconds / span;
    }
    kernels.sort_by(|a, b| b.milliseconds_per_step.total_cmp(&a.milliseconds_per_step));
    kernels.truncate(KERNELS);
    Some(Trace {
        idle: 1.0 - busy_nanoseconds(activities) as f64 / span,
        kernels,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_idle_and_kernels_are_summed() {
        let activity = |name: &str, start, end| Activity {
            name: name.into(),
            start,
            end,
        };
        let found = [
            activity("a", 0, 4_000_000),
            activity("b", 5_000_000, 6_000_000),
            activity("a", 6_000_000, 10_000_000),
        ];
        let trace = summary(&found, 2).unwrap();
        assert!((trace.idle - 0.1).abs() < 1e-9, "{}", trace.idle);
        assert_eq!(
            (trace.kernels[0].name.as_str(), trace.kernels[0].calls_per_step),
            ("a", 1.0)
        );
        assert!((trace.kernels[0].milliseconds_per_step - 4.0).abs() < 1e-9);
        assert!((trace.kernels[0].share - 0.8).abs() < 1e-9);
        assert!(summary(&[], 2).is_none());
    }
}
