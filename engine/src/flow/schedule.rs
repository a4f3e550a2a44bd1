//! The levels of sampling and training.
//!
//! Of flow matching they are sigmas: `s(u) = shift · u / (1 + (shift − 1) · u)` moves steps towards noise (sigma 1). Sampling walks
//! u = 1 − i/N, i = 0..N−1, then 0; training draws from the table of all `s(u)`. Source: Esser et al., "Scaling Rectified Flow Transformers" (2024).

use std::sync::Arc;

use super::solver::{Solver, discrete_steps, second_order};
use crate::error::{Error, Result};
use crate::limits::Steps;
use crate::model::objective::{Discrete, Objective, Trained};

/// The timesteps of flow matching, by which its first level for `dpm++2m` is below 1.
const FLOW_TIMESTEPS: f64 = 1000.0;

/// `s(u)` of the module's head comment.
pub fn shifted_sigma(u: f64, shift: f64) -> f64 {
    shift * u / (1.0 + (shift - 1.0) * u)
}

/// The noise level at `index` of the table of `entries` levels that training draws from: s(1 − index / entries).
pub fn training_sigma(index: usize, entries: usize, shift: f64) -> f32 {
    shifted_sigma(1.0 - index as f64 / entries as f64, shift) as f32
}

/// Sigmas at the starts of the steps of flow matching for `dpm++2m`: from just below 1, where λ is finite.
fn flow_starts(steps: usize, shift: f64) -> Vec<f32> {
    let most = 1.0 - 1.0 / FLOW_TIMESTEPS;
    let share = |step: usize| (steps - step) as f64 / steps as f64 * most;
    (0..steps)
        .map(|step| shifted_sigma(share(step), shift) as f32)
        .collect()
}

/// A sampling schedule: which levels are visited, from 1 (noise) down to 0 (the picture), by which solver, for which objective.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Start and end of each step; a step may begin elsewhere than the one before has ended.
    steps: Vec<[f32; 2]>,
    solver: Solver,
    /// The objective of a discrete schedule; else the model's own.
    discrete: Option<Arc<Discrete>>,
}

impl Schedule {
    /// The schedule of `steps` first-order steps of flow matching: `steps + 1` sigmas.
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
        Ok(Schedule::along(
            &(0..steps).map(sigma).collect::<Vec<_>>(),
            Solver::Euler,
        ))
    }

    /// The schedule of `steps` steps of a solver, for a model that was trained for this.
    ///
    /// # Errors
    /// As [`Schedule::new`], and when solver and model do not fit each other or the model's schedule has too few timesteps.
    pub fn of(trained: &Trained, solver: Solver, steps: usize, shift: f64) -> Result<Self> {
        solver.ensure_for(trained)?;
        let euler = Schedule::new(steps, shift)?;
        let Some(discrete) = Discrete::of(trained, shift)? else {
            return Ok(match solver.looks_back() {
                true => Schedule::along(&flow_starts(steps, shift), solver),
                false => euler,
            });
        };
        let discrete = match solver.looks_back() {
            true => discrete.bounded(),
            false => discrete,
        };
        Ok(Schedule {
            steps: discrete_steps(&discrete, solver, steps)?,
            solver,
            discrete: Some(Arc::new(discrete)),
        })
    }

    /// Steps from each of these levels to the next, and from the last to 0.
    fn along(levels: &[f32], solver: Solver) -> Self {
        let ends = levels[1..].iter().copied().chain([0.0]);
        Schedule {
            steps: levels.iter().zip(ends).map(|(&from, to)| [from, to]).collect(),
            solver,
            discrete: None,
        }
    }

    /// Calls `work` with what a model predicts on this schedule; `own` is what models of its family do for flow matching.
    pub fn with_objective<T>(&self, own: &dyn Objective, work: impl FnOnce(&dyn Objective) -> T) -> T {
        match &self.discrete {
            Some(discrete) => work(&discrete.of_family(own)),
            None => work(own),
        }
    }

    /// The solver.
    pub fn solver(&self) -> Solver {
        self.solver
    }

    /// The factors of each step, [`Schedule::factor_rows`] pairs: see `walk`. `own` is as for [`Schedule::with_objective`].
    pub(super) fn factors(&self, own: &dyn Objective) -> Vec<f32> {
        self.with_objective(own, |objective| match self.solver.looks_back() {
            false => self.first_order(objective),
            true => self.second_order(objective),
        })
    }

    /// Pairs of factors of a step.
    pub(super) fn factor_rows(&self) -> usize {
        match self.solver.looks_back() {
            false => 2,
            true => 5,
        }
    }

    fn first_order(&self, objective: &dyn Objective) -> Vec<f32> {
        let factors = self.steps.iter().flat_map(|&[from, to]| {
            let [keep, add] = objective.step(from, to);
            [keep, add, 1.0, add]
        });
        factors.collect()
    }

    fn second_order(&self, objective: &dyn Objective) -> Vec<f32> {
        let factors = self.steps.iter().enumerate().flat_map(|(step, &levels)| {
            let [of_x, of_prediction] = objective.picture(levels[0]);
            let before = step.checked_sub(1).map(|before| self.steps[before][0]);
            let [keep, now, back] = second_order(objective, before, levels);
            [of_x, of_prediction, 1.0, of_prediction, keep, now, 1.0, back, 0.0, 1.0].map(|factor| factor as f32)
        });
        factors.collect()
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
        self.steps.drain(..first);
        Ok(self)
    }

    /// The number of steps.
    pub fn steps(&self) -> usize {
        self.steps.len()
    }

    /// The level at the start of `step`; of one step more, the last one's end.
    pub fn sigma(&self, step: usize) -> f32 {
        match self.steps.get(step) {
            Some([start, _]) => *start,
            None => self.steps[step - 1][1],
        }
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
