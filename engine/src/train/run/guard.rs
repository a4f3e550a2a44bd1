//! What happens when the loss is not a number, or far above what it was.
//!
//! 1. A step whose gradients are not finite changes nothing: the device skips it. It is counted and reported with the next
//!    line of the log; more than `max_skipped` of them in a row stop the run. The weights are sound then, and are saved.
//! 2. An interval of the log whose mean loss is more than `spike_factor` times the running mean of the intervals before is a
//!    spike. It is reported and does not enter the running mean. `spike_patience` spikes in a row stop the run. The weights
//!    may have diverged then and are not saved: the last checkpoint is from before, or close to it.

use serde::{Deserialize, Serialize};

use super::config::TrainConfig;

/// The weight of the newest interval in the running mean.
const NEWEST: f64 = 0.1;

/// Intervals before the running mean is trusted.
const SETTLED: u32 = 5;

/// What was learned of the run so far; part of a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Guard {
    /// The running mean of the intervals' losses.
    mean: f64,
    /// Intervals in it.
    intervals: u32,
    /// Skipped steps since the last one that was not.
    skipped_in_row: u32,
    /// Skipped steps in all.
    skipped: u64,
    /// Spikes since the last interval that was none.
    spikes_in_row: u32,
}

/// What a look at an interval found.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Nothing.
    Fine,
    /// Something to report.
    Notice(String),
    /// A reason to stop; whether the weights are sound.
    Stop {
        /// The reason.
        reason: String,
        /// Whether the weights are worth saving.
        sound: bool,
    },
}

/// What is known of one step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepOutcome {
    /// The mean loss of its batches.
    #[serde(with = "bits")]
    pub loss: f32,
    /// The norm of its gradients.
    #[serde(with = "bits")]
    pub norm: f32,
    /// Whether the device skipped it.
    pub skipped: bool,
}

/// Numbers that may be no numbers, which JSON cannot write.
mod bits {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(value: &f32, serializer: S) -> Result<S::Ok, S::Error> {
        value.to_bits().serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f32, D::Error> {
        u32::deserialize(deserializer).map(f32::from_bits)
    }
}

impl Guard {
    /// Skipped steps in all.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Looks at the steps of an interval that ends before step `step`.
    pub fn look(&mut self, config: &TrainConfig, step: u64, outcomes: &[StepOutcome]) -> Verdict {
        let mut skipped_now = 0;
        for outcome in outcomes {
            self.skipped_in_row = if outcome.skipped { self.skipped_in_row + 1 } else { 0 };
            skipped_now += u64::from(outcome.skipped);
            if self.skipped_in_row > config.max_skipped {
                self.skipped += skipped_now;
                return Verdict::Stop {
                    reason: format!(
                        "by step {step}, {} steps in a row had gradients that are not finite (max_skipped = {}): \
                         lower the learning rate, set clip_norm, or look for damaged data",
                        self.skipped_in_row, config.max_skipped
                    ),
                    sound: true,
                };
            }
        }
        self.skipped += skipped_now;
        let losses: Vec<f64> = outcomes
            .iter()
            .filter(|o| !o.skipped)
            .map(|o| f64::from(o.loss))
            .collect();
        let mut notices = Vec::new();
        if skipped_now > 0 {
            notices.push(format!(
                "{skipped_now} of {} steps skipped: their gradients are not finite",
                outcomes.len()
            ));
        }
        if !losses.is_empty() {
            let loss = losses.iter().sum::<f64>() / losses.len() as f64;
            if self.intervals >= SETTLED && loss > config.spike_factor * self.mean {
                self.spikes_in_row += 1;
                if self.spikes_in_row >= config.spike_patience.max(1) {
                    return Verdict::Stop {
                        reason: format!(
                            "the loss diverged: {loss:.4} at step {step}, {} intervals in a row above {} times the mean \
                             before, {:.4}; continue from an earlier checkpoint with a lower learning rate",
                            self.spikes_in_row, config.spike_factor, self.mean
                        ),
                        sound: false,
                    };
                }
                notices.push(format!(
                    "a spike: the loss is {loss:.4}, after {:.4} on average",
                    self.mean
                ));
            } else {
                self.spikes_in_row = 0;
                self.intervals = self.intervals.saturating_add(1);
                // A plain mean at first.
                let weight = NEWEST.max(1.0 / f64::from(self.intervals));
                self.mean += (loss - self.mean) * weight;
            }
        }
        match notices.is_empty() {
            true => Verdict::Fine,
            false => Verdict::Notice(notices.join("; ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good(loss: f32) -> StepOutcome {
        StepOutcome {
            loss,
            norm: 1.0,
            skipped: false,
        }
    }

    const BAD: StepOutcome = StepOutcome {
        loss: f32::NAN,
        norm: f32::NAN,
        skipped: true,
    };

    #[test]
    fn skipped_steps_are_reported_and_too_many_stop() {
        let config = TrainConfig {
            max_skipped: 3,
            ..TrainConfig::default()
        };
        let mut guard = Guard::default();
        assert_eq!(guard.look(&config, 2, &[good(1.0), good(1.0)]), Verdict::Fine);
        let verdict = guard.look(&config, 6, &[BAD, good(1.0), BAD, BAD]);
        assert!(matches!(verdict, Verdict::Notice(text) if text.starts_with("3 of 4 steps skipped")));
        // In a row, across intervals: two from before, then two more.
        let verdict = guard.look(&config, 8, &[BAD, BAD]);
        assert!(matches!(verdict, Verdict::Stop { sound: true, reason } if reason.contains("4 steps in a row")));
        assert_eq!(guard.skipped(), 5);
    }

    #[test]
    fn spikes_are_reported_and_a_divergence_stops() {
        let config = TrainConfig::default();
        let mut guard = Guard::default();
        for step in 0..6 {
            assert_eq!(guard.look(&config, step, &[good(0.5)]), Verdict::Fine);
        }
        assert!(matches!(guard.look(&config, 7, &[good(1.6)]), Verdict::Notice(text) if text.contains("a spike")));
        assert_eq!(guard.look(&config, 8, &[good(0.6)]), Verdict::Fine);
        for step in 9..11 {
            assert!(matches!(guard.look(&config, step, &[good(2.0)]), Verdict::Notice(_)));
        }
        let verdict = guard.look(&config, 11, &[good(2.0)]);
        assert!(matches!(verdict, Verdict::Stop { sound: false, reason } if reason.contains("diverged")));
    }

    #[test]
    fn the_first_losses_are_never_spikes() {
        let mut guard = Guard::default();
        for (step, loss) in [0.01, 5.0, 0.01, 5.0, 1.0].into_iter().enumerate() {
            assert_eq!(
                guard.look(&TrainConfig::default(), step as u64, &[good(loss)]),
                Verdict::Fine
            );
        }
    }
}
