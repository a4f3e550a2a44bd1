//! Ways from noise to the picture: which levels are visited, and what a step makes of the prediction.
//!
//! * `euler` and `ddim` are the first-order step of [`Objective::step`]: of flow matching Euler's, of others DDIM's (without added noise).
//! * `dpm++2m` extrapolates the picture from this prediction and the one before, in steps of λ = ln(a / b), where a and b are the shares of
//!   picture and noise: with h = λ' − λ, r = (λ − λ_before) / h, and the pictures m and m_before that the two predictions tell,
//!   `x' = (b' / b) · x + a' (1 − e^−h) · (m + (m − m_before) / 2r)`. The first step and the last, whose h is infinite, are of first order.
//!
//! Levels are those of diffusers' DDIMScheduler and DPMSolverMultistepScheduler (`final_sigmas_type` zero; with flow matching
//! `use_flow_sigmas`), so that a DDIM step ends T / steps timesteps below its start, wherever the next one begins.
//!
//! Source: Song et al., "Denoising Diffusion Implicit Models" (2021); Lu et al., "DPM-Solver++" (2022).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::objective::{Discrete, Objective, Prediction, Spacing, Trained};

/// A way from noise to the picture; see the module's head comment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Solver {
    /// First order, for flow matching.
    #[serde(rename = "euler")]
    Euler,
    /// First order, for models of a discrete schedule.
    #[serde(rename = "ddim")]
    Ddim,
    /// Second order with the prediction before, for all models.
    #[serde(rename = "dpm++2m")]
    Dpm2M,
}

impl Solver {
    /// All of them.
    pub const ALL: [Solver; 3] = [Solver::Euler, Solver::Ddim, Solver::Dpm2M];

    /// The one that is used where nobody says.
    pub fn default_of(trained: &Trained) -> Self {
        match trained.prediction() {
            Prediction::Flow => Solver::Euler,
            _ => Solver::Ddim,
        }
    }

    /// Refuses a model that it does not walk for.
    ///
    /// # Errors
    /// Naming both, and the solvers for the model.
    pub fn ensure_for(self, trained: &Trained) -> Result<()> {
        let prediction = trained.prediction();
        match (self, prediction) {
            (Solver::Euler, Prediction::Flow) | (Solver::Dpm2M, _) => Ok(()),
            (Solver::Ddim, Prediction::Flow) => Err(Error::invalid(
                "the solver ddim is for models of a discrete schedule, and this one was trained for flow matching: use euler or dpm++2m",
            )),
            (Solver::Ddim, _) => Ok(()),
            (Solver::Euler, _) => Err(Error::invalid(format!(
                "the solver euler walks the straight ways of flow matching, and this model predicts {prediction} on a discrete \
                 schedule: use ddim or dpm++2m"
            ))),
        }
    }

    /// Whether a step needs what the one before has found.
    pub fn looks_back(self) -> bool {
        self == Solver::Dpm2M
    }

    /// What a picture's settings say of it: nothing of `euler`, which was there before others were.
    pub fn noted(self) -> Option<String> {
        (self != Solver::Euler).then(|| self.to_string())
    }

    /// The same behind a number of steps: ` of ddim`, or nothing.
    pub fn in_words(self) -> String {
        self.noted().map(|name| format!(" of {name}")).unwrap_or_default()
    }

    fn name(self) -> &'static str {
        match self {
            Solver::Euler => "euler",
            Solver::Ddim => "ddim",
            Solver::Dpm2M => "dpm++2m",
        }
    }
}

impl fmt::Display for Solver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Solver {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Solver::ALL
            .into_iter()
            .find(|solver| solver.name() == text)
            .ok_or_else(|| {
                let names = Solver::ALL.map(Solver::name).join(" or ");
                Error::invalid(format!("`{text}` is no solver; use {names}"))
            })
    }
}

/// Start and end of each step of a discrete schedule.
///
/// # Errors
/// When the schedule has too few timesteps.
pub(super) fn discrete_steps(discrete: &Discrete, solver: Solver, steps: usize) -> Result<Vec<[f32; 2]>> {
    let schedule = discrete.schedule();
    let trained = schedule.num_train_timesteps;
    // The second-order grid has a point more, which is its end.
    let points = steps + usize::from(solver.looks_back() && schedule.timestep_spacing != Spacing::Trailing);
    if points > trained {
        return Err(Error::invalid(format!(
            "{steps} steps are more than {solver} can take on a schedule of {trained} timesteps"
        )));
    }
    let starts = starts(schedule.timestep_spacing, trained, points, schedule.steps_offset);
    let starts = &starts[..steps];
    if starts[0] >= trained as i64 {
        return Err(Error::invalid(format!(
            "with steps_offset = {} the first of {steps} steps would begin at timestep {}, but the model's last is {}: take another number \
             of steps",
            schedule.steps_offset,
            starts[0],
            trained - 1
        )));
    }
    let levels = starts.iter().enumerate().map(|(step, &start)| {
        let end = match solver.looks_back() {
            true => starts.get(step + 1).copied().unwrap_or(-1),
            false => match start - (trained / steps) as i64 {
                end if end >= 0 => end,
                _ if schedule.set_alpha_to_one => -1,
                _ => 0,
            },
        };
        [discrete.level(start), discrete.level(end)]
    });
    Ok(levels.collect())
}

/// Timesteps from the last taken to the first.
fn starts(spacing: Spacing, trained: usize, points: usize, offset: usize) -> Vec<i64> {
    let rounded = |value: f64| value.round_ties_even() as i64;
    let timestep = |point: usize| match spacing {
        Spacing::Leading => ((points - 1 - point) * (trained / points) + offset) as i64,
        Spacing::Trailing => rounded(trained as f64 - point as f64 * (trained as f64 / points as f64)) - 1,
        Spacing::Linspace => match points {
            1 => 0,
            _ => rounded((points - 1 - point) as f64 * ((trained - 1) as f64 / (points - 1) as f64)),
        },
    };
    (0..points).map(timestep).collect()
}

/// What a step of `dpm++2m` makes of the noisy picture, the picture that the prediction tells, and the one before: `[x, now, before]`.
/// `before` is where the step before began, and `[from, to]` are this one's levels.
pub(super) fn second_order(objective: &dyn Objective, before: Option<f32>, [from, to]: [f32; 2]) -> [f64; 3] {
    let shares = |level: f32| objective.exact(level)[0];
    let ([a, b], [next_a, next_b]) = (shares(from), shares(to));
    let lambda = |[a, b]: [f64; 2]| a.ln() - b.ln();
    // a' (1 − e^−h), which is a' where the step ends at the picture.
    let now = next_a - next_b * a / b;
    let back = match before.map(shares) {
        Some(before) if next_b > 0.0 => {
            let (step, step_before) = (
                lambda([next_a, next_b]) - lambda([a, b]),
                lambda([a, b]) - lambda(before),
            );
            0.5 * step / step_before
        }
        _ => 0.0,
    };
    [next_b / b, now * (1.0 + back), -now * back]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::objective::{FlowMatching, NoiseSchedule};

    #[test]
    fn wrong_pairings_are_named() {
        let epsilon = Trained::new(Prediction::Epsilon, None).unwrap();
        let message = Solver::Euler.ensure_for(&epsilon).unwrap_err().to_string();
        assert!(
            message.contains("predicts epsilon") && message.contains("use ddim"),
            "{message}"
        );
        let message = Solver::Ddim.ensure_for(&Trained::FLOW).unwrap_err().to_string();
        assert!(message.contains("flow matching: use euler"), "{message}");
        for trained in [epsilon, Trained::FLOW] {
            Solver::Dpm2M.ensure_for(&trained).unwrap();
            Solver::default_of(&trained).ensure_for(&trained).unwrap();
        }
        assert!("heun".parse::<Solver>().unwrap_err().to_string().contains("dpm++2m"));
        for solver in Solver::ALL {
            assert_eq!(solver.to_string().parse::<Solver>().unwrap(), solver);
        }
    }

    /// Where two predictions tell the same picture, the way is the first-order one.
    #[test]
    fn the_same_picture_twice_is_a_first_order_step() {
        for [before, from, to] in [[0.9_f32, 0.6, 0.3], [0.5, 0.25, 0.0]] {
            let [keep, now, back] = second_order(&FlowMatching, Some(before), [from, to]);
            let [of_x, of_prediction] = FlowMatching.picture(from);
            let expected = FlowMatching.step(from, to).map(f64::from);
            assert!((keep + (now + back) * of_x - expected[0]).abs() < 1e-6);
            assert!(((now + back) * of_prediction - expected[1]).abs() < 1e-6);
        }
    }

    #[test]
    fn schedules_without_room_are_refused() {
        let of = |schedule: NoiseSchedule| {
            let trained = Trained::new(Prediction::Epsilon, Some(schedule)).unwrap();
            Discrete::of(&trained, 1.0).unwrap().unwrap()
        };
        let short = of(NoiseSchedule {
            num_train_timesteps: 4,
            ..NoiseSchedule::default()
        });
        assert!(discrete_steps(&short, Solver::Ddim, 4).is_ok());
        assert!(
            discrete_steps(&short, Solver::Ddim, 5)
                .unwrap_err()
                .to_string()
                .contains("5 steps are more")
        );
        let late = of(NoiseSchedule {
            timestep_spacing: Spacing::Leading,
            steps_offset: 500,
            ..NoiseSchedule::default()
        });
        let message = discrete_steps(&late, Solver::Ddim, 3).unwrap_err().to_string();
        assert!(message.contains("steps_offset = 500"), "{message}");
    }
}
