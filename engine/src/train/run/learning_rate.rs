//! The learning rate of each step.
//!
//! With `w` warm-up steps of `n`, step k = 0 … n − 1 has
//!
//! ```text
//! k < w:     lr · (k + 1) / (w + 1)
//! constant:  lr
//! cosine:    end + (lr − end) · (1 + cos(π · (k − w) / (n − w))) / 2
//! ```

use super::choices::ScheduleKind;
use super::config::TrainConfig;

/// A course of the learning rate; see the module's head comment.
#[derive(Clone, Copy, Debug)]
pub struct LearningRate {
    rate: f64,
    end: f64,
    warmup: u64,
    steps: u64,
    kind: ScheduleKind,
}

impl LearningRate {
    /// The course that a configuration asks for.
    pub fn new(config: &TrainConfig) -> Self {
        LearningRate {
            rate: config.lr,
            end: config.lr_end,
            warmup: config.warmup,
            steps: config.steps,
            kind: config.schedule,
        }
    }

    /// The rate of step `step`, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.rate * (step + 1) as f64 / (self.warmup + 1) as f64;
        }
        match self.kind {
            ScheduleKind::Constant => self.rate,
            ScheduleKind::Cosine => {
                let steps = self.steps.saturating_sub(self.warmup).max(1);
                let done = (step - self.warmup).min(steps) as f64 / steps as f64;
                self.end + (self.rate - self.end) * (1.0 + (std::f64::consts::PI * done).cos()) / 2.0
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_rise_and_fall() {
        let config = TrainConfig {
            lr: 1.0,
            lr_end: 0.2,
            warmup: 4,
            steps: 14,
            ..TrainConfig::default()
        };
        let constant = LearningRate::new(&config);
        assert_eq!([0, 3, 4, 13].map(|step| constant.at(step)), [0.2, 0.8, 1.0, 1.0]);
        let cosine = LearningRate::new(&TrainConfig {
            schedule: ScheduleKind::Cosine,
            ..config
        });
        assert_eq!((cosine.at(3), cosine.at(4)), (0.8, 1.0));
        assert!((cosine.at(9) - 0.6).abs() < 1e-12);
        assert!((cosine.at(14) - 0.2).abs() < 1e-12);
        assert!((4..14).all(|step| cosine.at(step) > cosine.at(step + 1)));
    }
}
