//! How fast a run goes.

use std::time::{Duration, Instant};

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
