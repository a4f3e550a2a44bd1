//! The sigmas of sampling and training.
//!
//! `s(u) = shift · u / (1 + (shift − 1) · u)` moves steps towards noise (sigma 1). Sampling walks u = 1 − i/N, i = 0..N−1, then
//! 0; training draws from the table of all `s(u)`. Source: Esser et al., "Scaling Rectified Flow Transformers" (2024).

use crate::error::{Error, Result};
use crate::limits::Steps;

/// `s(u)` of the module's head comment.
pub fn shifted_sigma(u: f64, shift: f64) -> f64 {
    shift * u / (1.0 + (shift - 1.0) * u)
}

/// The noise level at `index` of the table of `entries` levels that training draws from: s(1 − index / entries).
pub fn training_sigma(index: usize, entries: usize, shift: f64) -> f32 {
    shifted_sigma(1.0 - index as f64 / entries as f64, shift) as f32
}

/// A sampling schedule: `steps + 1` sigmas from 1 down to 0.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    sigmas: Vec<f32>,
}

impl Schedule {
    /// The schedule of `steps` steps.
    ///
    /// # Errors
    /// With no steps or absurdly many, or a shift that is not a positive number.
    pub fn new(steps: usize, shift: f64) -> Result<Self> {
        if steps == 0 {
            return Err(Error::invalid("sampling needs at least one step"));
        }
        if steps as u64 > Steps::MOST {
            return Err(Error::invalid(format!(
                "{steps} steps are more than make sense: use at most {}",
                Steps::MOST
            )));
        }
        if !(shift.is_finite() && shift > 0.0) {
            return Err(Error::invalid(format!(
                "a shift of {shift} makes no schedule: use a positive number (3 at 1024², 4 at 4096²)"
            )));
        }
        let sigma = |step: usize| shifted_sigma(1.0 - step as f64 / steps as f64, shift) as f32;
        Ok(Schedule {
            sigmas: (0..steps).map(sigma).chain([0.0]).collect(),
        })
    }

    /// The steps from `first` on.
    ///
    /// # Errors
    /// When there are none.
    pub fn tail(mut self, first: usize) -> Result<Self> {
        if first >= self.steps() {
            return Err(Error::invalid(format!(
                "of {} steps none is left after {first}",
                self.steps()
            )));
        }
        self.sigmas.drain(..first);
        Ok(self)
    }

    /// The number of steps.
    pub fn steps(&self) -> usize {
        self.sigmas.len() - 1
    }

    /// The sigma at the start of `step`; of one step more, the last one's end.
    pub fn sigma(&self, step: usize) -> f32 {
        self.sigmas[step]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schedule_falls_from_one_to_zero() {
        let schedule = Schedule::new(4, 3.0).unwrap();
        assert_eq!((schedule.sigma(0), schedule.sigma(4)), (1.0, 0.0));
        assert!((schedule.sigma(2) - 0.75).abs() < 1e-6);
        assert!((0..4).all(|step| schedule.sigma(step + 1) < schedule.sigma(step)));
    }

    #[test]
    fn a_tail_ends_as_the_whole_does() {
        let whole = Schedule::new(4, 3.0).unwrap();
        let tail = whole.clone().tail(3).unwrap();
        assert_eq!((tail.steps(), tail.sigma(0), tail.sigma(1)), (1, whole.sigma(3), 0.0));
        assert_eq!(whole.clone().tail(0).unwrap(), whole);
        assert!(whole.clone().tail(4).is_err() && whole.tail(usize::MAX).is_err());
    }

    #[test]
    fn senseless_schedules_are_refused() {
        assert!(Schedule::new(0, 3.0).is_err());
        for shift in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(Schedule::new(4, shift).unwrap_err().to_string().contains("positive"));
        }
    }
}
