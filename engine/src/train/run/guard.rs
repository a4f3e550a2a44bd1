//! What happens when the loss is not a number, or far above what it was.
//!
//! 1. A step whose gradients are not finite changes nothing: the device skips it. It is counted and reported with the next
//!    line of the log; more than `max_skipped` of them in a row stop the run.
//! 2. An interval of the log whose mean loss is more than `spike_factor` times the running mean of the intervals before is a
//!    spike. It is reported and does not enter the running mean. `spike_patience` spikes in a row stop the run.
//!
//! From the first such step or interval until the next good one no checkpoint is due: what is on the disk is from before. The last
//! interval that was good ends at [`Guard::calm`].

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
    /// The step at which the last interval ended that was no spike and whose last step was not skipped.
    #[serde(default)]
    calm: u64,
}

/// What a look at an interval found.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Nothing.
    Fine,
    /// Something to report.
    Notice(String),
    /// A reason to stop.
    Stop {
        /// The reason.
        reason: String,
        /// Whether the loss exploded, so that checkpoints since the last calm interval may be of weights that had diverged.
        exploded: bool,
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

    /// The step at which the last good interval ended.
    pub fn calm(&self) -> u64 {
        self.calm
    }

    /// The guard of a run that goes on after a break: what was counted in a row is not held against it.
    pub fn rested(self) -> Self {
        Guard {
            skipped_in_row: 0,
            spikes_in_row: 0,
            ..self
        }
    }

    /// Why what was trained so far may be no good; `outcomes` are those of the steps since the last interval.
    pub fn trouble(&self, outcomes: &[StepOutcome]) -> Option<String> {
        let since = outcomes.iter().rev().take_while(|outcome| outcome.skipped).count();
        let before = if since == outcomes.len() {
            self.skipped_in_row
        } else {
            0
        };
        match since as u64 + u64::from(before) {
            0 => (),
            1 => return Some("the gradients of the last step are not finite".into()),
            count => return Some(format!("the gradients of the last {count} steps are not finite")),
        }
        let last = outcomes.last().filter(|outcome| !outcome.loss.is_finite());
        last.map(|_| "the loss of the last step is not a number".into())
    }

    /// Whether the last interval was a spike.
    pub fn in_spike(&self) -> bool {
        self.spikes_in_row > 0
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
                    exploded: false,
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
            if !loss.is_finite() || self.intervals >= SETTLED && loss > config.spike_factor * self.mean {
                self.spikes_in_row += 1;
                if self.spikes_in_row >= config.spike_patience.max(1) {
                    return Verdict::Stop {
                        reason: format!(
                            "the loss diverged: {loss:.4} at step {step}, {} intervals in a row above {} times the mean \
                             before, {:.4}: lower the learning rate, give it a warmup, or set clip_norm",
                            self.spikes_in_row, config.spike_factor, self.mean
                        ),
                        exploded: true,
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
                if self.skipped_in_row == 0 {
                    self.calm = step;
                }
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
        assert!(matches!(verdict, Verdict::Stop { exploded: false, reason } if reason.contains("4 steps in a row")));
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
        assert!(matches!(verdict, Verdict::Stop { exploded: true, reason } if reason.contains("diverged")));
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

    #[test]
    fn trouble_begins_with_the_first_bad_step_and_ends_with_the_next_good_one() {
        let config = TrainConfig {
            max_skipped: 30,
            ..TrainConfig::default()
        };
        let mut guard = Guard::default();
        assert_eq!(guard.trouble(&[]), None);
        assert_eq!(guard.trouble(&[BAD, good(1.0)]), None);
        let text = |count| Some(format!("the gradients of the last {count} steps are not finite"));
        assert_eq!(guard.trouble(&[good(1.0), BAD, BAD]), text(2));
        guard.look(&config, 2, &[good(1.0), good(1.0)]);
        assert_eq!(guard.calm(), 2);
        guard.look(&config, 5, &[good(1.0), BAD, BAD]);
        assert_eq!(guard.calm(), 2);
        // Across intervals, until the counter starts anew.
        assert_eq!(guard.trouble(&[BAD]), text(3));
        assert_eq!(guard.trouble(&[BAD, good(1.0)]), None);
        assert_eq!(guard.rested().trouble(&[]), None);
        assert!(guard.trouble(&[good(f32::INFINITY)]).unwrap().contains("not a number"));
        guard.look(&config, 8, &[BAD, good(1.0)]);
        assert_eq!((guard.calm(), guard.in_spike()), (8, false));
    }
}
