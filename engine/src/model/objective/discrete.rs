//! Predictions on a discrete schedule of noise.
//!
//! Of the picture's variance `ᾱ(t) = Π (1 − beta)` is left at timestep t, so that the shares of picture and noise are √ᾱ and √(1 − ᾱ). Of
//! T timesteps, t is the level (t + 1) / T; level 0 is the picture itself. A network is told t / T as its family tells the noise level of
//! flow matching (see [`Discrete::of_family`]).
//!
//! A shift s divides the ratio of picture to noise, `SNR = ᾱ / (1 − ᾱ)`, by s² at every step, as flow matching's shift does at every share
//! of the steps. The network is told the same t: the shifted schedule is the one that it is trained on. Source: Hoogeboom et al., "simple
//! diffusion" (2023); Ho et al., "Denoising Diffusion Probabilistic Models" (2020); the rescaling: Lin et al., "Common Diffusion Noise
//! Schedules and Sample Steps are Flawed" (2024).

use super::Objective;
use super::trained::{BetaSchedule, NoiseSchedule, Prediction, Trained};
use crate::error::{Error, Result};

/// What is left of the picture at the end of a schedule that leaves nothing, for solvers that need its logarithm.
const LEAST_LEFT: f32 = 1.0 / 16_777_216.0;

/// The largest beta of a cosine.
const LARGEST_BETA: f64 = 0.999;

/// See the module's head comment.
#[derive(Clone, Debug, PartialEq)]
pub struct Discrete {
    prediction: Prediction,
    schedule: NoiseSchedule,
    shift: f64,
    /// ᾱ of each timestep.
    left: Vec<f32>,
}

impl Discrete {
    /// The objective of a model that was trained for it; `None` for flow matching.
    ///
    /// # Errors
    /// When the shift is not a positive number.
    pub fn of(trained: &Trained, shift: f64) -> Result<Option<Self>> {
        if !(shift.is_finite() && shift > 0.0) {
            return Err(Error::invalid(format!(
                "a shift of {shift} makes no schedule: use a positive number, 1 for the model's own schedule"
            )));
        }
        Ok(trained.schedule().map(|schedule| Discrete {
            prediction: trained.prediction(),
            left: left(schedule),
            schedule: schedule.clone(),
            shift,
        }))
    }

    /// The same where something is left of the picture at every step.
    pub fn bounded(mut self) -> Self {
        if let Some(last) = self.left.last_mut().filter(|_| self.schedule.rescale_betas_zero_snr) {
            *last = LEAST_LEFT;
        }
        self
    }

    /// What the model predicts.
    pub fn prediction(&self) -> Prediction {
        self.prediction
    }

    /// The schedule without its shift.
    pub fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }

    /// The level of a timestep; that of −1 is 0, the picture.
    pub fn level(&self, timestep: i64) -> f32 {
        ((timestep + 1) as f64 / self.left.len() as f64) as f32
    }

    /// The objective for a network of a family that tells a noise level of flow matching as `own` does: the family's time of t / T.
    pub fn of_family<'a>(&'a self, own: &'a dyn Objective) -> impl Objective + 'a {
        OfFamily { discrete: self, own }
    }

    /// Shares of picture and noise.
    fn shares(&self, level: f32) -> [f64; 2] {
        let steps = self.left.len();
        let index = (f64::from(level) * steps as f64).round().clamp(0.0, steps as f64) as usize;
        let Some(before) = index.checked_sub(1) else {
            return [1.0, 0.0];
        };
        let left = f64::from(self.left[before]);
        let noise = (1.0 - left) * self.shift * self.shift;
        let all = left + noise;
        [(left / all).sqrt(), (noise / all).sqrt()]
    }

    fn told(&self, level: f32) -> f32 {
        (level - 1.0 / self.left.len() as f32).max(0.0)
    }
}

impl Objective for Discrete {
    fn mix(&self, level: f32) -> [f32; 2] {
        self.shares(level).map(|share| share as f32)
    }

    fn target(&self, level: f32) -> [f32; 2] {
        self.exact(level)[1].map(|share| share as f32)
    }

    /// t / T.
    fn time(&self, level: f32) -> f32 {
        self.told(level)
    }

    fn exact(&self, level: f32) -> [[f64; 2]; 2] {
        let [a, b] = self.shares(level);
        let target = match self.prediction {
            Prediction::Flow => [-1.0, 1.0],
            Prediction::Epsilon => [0.0, 1.0],
            Prediction::V => [-b, a],
            Prediction::Sample => [1.0, 0.0],
        };
        [[a, b], target]
    }
}

/// A discrete objective, with the time as a family tells it.
#[derive(Debug)]
struct OfFamily<'a> {
    discrete: &'a Discrete,
    own: &'a dyn Objective,
}

impl Objective for OfFamily<'_> {
    fn mix(&self, level: f32) -> [f32; 2] {
        self.discrete.mix(level)
    }

    fn target(&self, level: f32) -> [f32; 2] {
        self.discrete.target(level)
    }

    fn time(&self, level: f32) -> f32 {
        self.own.time(self.discrete.told(level))
    }

    fn exact(&self, level: f32) -> [[f64; 2]; 2] {
        self.discrete.exact(level)
    }
}

/// ᾱ of each timestep, in the precision and order of diffusers' tables: f32, products in f64.
fn left(schedule: &NoiseSchedule) -> Vec<f32> {
    let betas = betas(schedule);
    let products = |alphas: &[f32]| {
        let mut product = 1.0_f64;
        alphas
            .iter()
            .map(|alpha| {
                product *= f64::from(*alpha);
                product as f32
            })
            .collect::<Vec<f32>>()
    };
    let plain = products(&betas.iter().map(|beta| 1.0 - beta).collect::<Vec<f32>>());
    if !schedule.rescale_betas_zero_snr {
        return plain;
    }
    let roots: Vec<f32> = plain.iter().map(|left| left.sqrt()).collect();
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    // A schedule of one step has nothing between its ends.
    let scale = match roots.len() {
        1 => 1.0,
        _ => first / (first - last),
    };
    let squares: Vec<f32> = roots.iter().map(|root| ((root - last) * scale).powi(2)).collect();
    let alphas = (0..squares.len()).map(|step| match step.checked_sub(1) {
        None => squares[0],
        Some(before) => squares[step] / squares[before],
    });
    // Through betas once more, with their rounding.
    products(&alphas.map(|alpha| 1.0 - (1.0 - alpha)).collect::<Vec<f32>>())
}

fn betas(schedule: &NoiseSchedule) -> Vec<f32> {
    let steps = schedule.num_train_timesteps;
    let (start, end) = (schedule.beta_start, schedule.beta_end);
    match schedule.beta_schedule {
        BetaSchedule::Linear => evenly(start, end, steps).collect(),
        BetaSchedule::ScaledLinear => evenly(start.sqrt(), end.sqrt(), steps)
            .map(|root| root * root)
            .collect(),
        BetaSchedule::Cosine => {
            let left = |share: f64| ((share + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
            let beta = |step: usize| {
                let [before, after] = [step, step + 1].map(|step| left(step as f64 / steps as f64));
                (1.0 - after / before).min(LARGEST_BETA) as f32
            };
            (0..steps).map(beta).collect()
        }
    }
}

/// `count` numbers from `start` to `end`, each from the end that is nearer.
fn evenly(start: f64, end: f64, count: usize) -> impl Iterator<Item = f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / count.saturating_sub(1).max(1) as f32;
    (0..count).map(move |index| match index < count.div_ceil(2) {
        true => start + step * index as f32,
        false => end - step * (count - 1 - index) as f32,
    })
}

#[cfg(test)]
mod tests {
    use super::super::FlowMatching;
    use super::*;

    fn discrete(prediction: Prediction, schedule: NoiseSchedule, shift: f64) -> Discrete {
        let trained = Trained::new(prediction, Some(schedule)).unwrap();
        Discrete::of(&trained, shift).unwrap().unwrap()
    }

    fn snr([a, b]: [f64; 2]) -> f64 {
        (a / b).powi(2)
    }

    /// The same `shift` divides the ratio of picture to noise by its square, with flow matching as on a discrete schedule.
    #[test]
    fn a_shift_divides_the_ratio_of_picture_to_noise_by_its_square() {
        for shift in [1.0, 2.0, 3.0, 4.5] {
            for share in [0.1, 0.5, 0.9] {
                let flow = |shift: f64| {
                    let sigma = shift * share / (1.0 + (shift - 1.0) * share);
                    snr([1.0 - sigma, sigma])
                };
                let step = |shift: f64| {
                    let objective = discrete(Prediction::V, NoiseSchedule::default(), shift);
                    snr(objective.shares(objective.level((share * 1000.0) as i64)))
                };
                for ratio in [flow(1.0) / flow(shift), step(1.0) / step(shift)] {
                    assert!((ratio / (shift * shift) - 1.0).abs() < 1e-9, "{shift} {share}: {ratio}");
                }
            }
        }
    }

    #[test]
    fn families_are_told_the_share_of_timesteps() {
        let objective = discrete(Prediction::Epsilon, NoiseSchedule::default(), 1.0);
        let own = objective.of_family(&FlowMatching);
        for timestep in [0, 1, 500, 999] {
            let expected = 1.0 - timestep as f32 / 1000.0;
            assert!((own.time(objective.level(timestep)) - expected).abs() < 1e-6);
        }
        assert_eq!(own.time(0.0), 1.0);
    }

    /// From every prediction the picture follows, and a step of a perfect one lands on the noisy picture of its end.
    #[test]
    fn perfect_predictions_walk_along_the_schedule() {
        let (picture, noise) = (0.3_f64, -1.7_f64);
        let of = |[a, b]: [f64; 2]| a * picture + b * noise;
        let zero = NoiseSchedule {
            rescale_betas_zero_snr: true,
            ..NoiseSchedule::default()
        };
        for (prediction, schedule) in [
            (Prediction::Epsilon, NoiseSchedule::default()),
            (Prediction::V, zero.clone()),
            (Prediction::Sample, zero),
        ] {
            let objective = discrete(prediction, schedule, 1.5);
            for (from, to) in [(999, 500), (500, 3), (3, -1)] {
                let (from, to) = (objective.level(from), objective.level(to));
                let [mix, target] = objective.exact(from);
                let [of_x, of_prediction] = objective.picture(from);
                assert!((of_x * of(mix) + of_prediction * of(target) - picture).abs() < 1e-6);
                let [keep, add] = objective.step(from, to).map(f64::from);
                let stepped = keep * of(mix) + add * of(target);
                assert!(
                    (stepped - of(objective.exact(to)[0])).abs() < 1e-5,
                    "{prediction} {from} {to}"
                );
            }
        }
    }

    #[test]
    fn nothing_is_left_at_the_end_of_a_rescaled_schedule() {
        let schedule = NoiseSchedule {
            rescale_betas_zero_snr: true,
            ..NoiseSchedule::default()
        };
        let objective = discrete(Prediction::V, schedule, 1.0);
        assert_eq!(objective.mix(1.0), [0.0, 1.0]);
        let [a, b] = objective.bounded().mix(1.0);
        assert!(a > 0.0 && b < 1.0 + 1e-6);
        let once = NoiseSchedule {
            num_train_timesteps: 1,
            rescale_betas_zero_snr: true,
            ..NoiseSchedule::default()
        };
        assert!(left(&once).iter().all(|left| left.is_finite()));
    }
}
