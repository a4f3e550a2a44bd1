//! What a model was trained to predict, and what follows from it for training and sampling.
//!
//! With levels from 0 (picture) to 1 (noise), a noisy picture is `x = a · picture + b · noise` and the model predicts
//! `p = c · picture + d · noise`, all four numbers functions of the level. From `x` and `p` picture and noise follow, and from these
//! the noisy picture at any other level: the first-order step `x ← keep · x + add · p`, which is DDIM's, and Euler's for flow matching.
//!
//! Source: Song et al., "Denoising Diffusion Implicit Models" (2021); Lipman et al., "Flow Matching for Generative Modeling" (2023).

mod discrete;
mod trained;

use std::fmt;

pub use discrete::Discrete;
pub use trained::{BetaSchedule, NoiseSchedule, Prediction, Spacing, Trained};

/// See the module's head comment.
pub trait Objective: fmt::Debug + Send + Sync {
    /// `[a, b]`: how much of picture and noise there is at a level.
    fn mix(&self, level: f32) -> [f32; 2];

    /// `[c, d]`: what of picture and noise the model predicts.
    fn target(&self, level: f32) -> [f32; 2];

    /// The time that the model is told.
    fn time(&self, level: f32) -> f32;

    /// [`Objective::mix`] and [`Objective::target`] at a level, as exactly as they are known.
    fn exact(&self, level: f32) -> [[f64; 2]; 2] {
        [self.mix(level), self.target(level)].map(|pair| pair.map(f64::from))
    }

    /// How much of the noisy picture and of the prediction make the picture: `picture = [0] · x + [1] · p`.
    fn picture(&self, level: f32) -> [f64; 2] {
        let [[a, b], [c, d]] = self.exact(level);
        let determinant = a * d - b * c;
        [d / determinant, -b / determinant]
    }

    /// `[keep, add]` of the step between two levels; [`Objective::mix`] and [`Objective::target`] must not be proportional at `from`.
    fn step(&self, from: f32, to: f32) -> [f32; 2] {
        let ([[a, b], [c, d]], [[next_a, next_b], _]) = (self.exact(from), self.exact(to));
        let determinant = a * d - b * c;
        let keep = (next_a * d - next_b * c) / determinant;
        let add = (next_b * a - next_a * b) / determinant;
        [keep as f32, add as f32]
    }
}

/// Flow matching: a straight way from picture to noise, of which the model predicts the velocity noise − picture.
#[derive(Debug)]
pub struct FlowMatching;

impl Objective for FlowMatching {
    fn mix(&self, level: f32) -> [f32; 2] {
        [1.0 - level, level]
    }

    fn target(&self, _level: f32) -> [f32; 2] {
        [-1.0, 1.0]
    }

    fn time(&self, level: f32) -> f32 {
        1.0 - level
    }

    // The general formula, without its roundings.
    fn step(&self, from: f32, to: f32) -> [f32; 2] {
        [1.0, to - from]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Flow matching with the general step.
    #[derive(Debug)]
    struct General;

    impl Objective for General {
        fn mix(&self, level: f32) -> [f32; 2] {
            FlowMatching.mix(level)
        }

        fn target(&self, level: f32) -> [f32; 2] {
            FlowMatching.target(level)
        }

        fn time(&self, level: f32) -> f32 {
            FlowMatching.time(level)
        }
    }

    #[test]
    fn the_general_step_is_eulers_for_flow_matching() {
        for (from, to) in [(1.0, 0.9), (0.75, 0.5), (0.125, 0.0), (0.3, 0.29)] {
            let (general, euler) = (General.step(from, to), FlowMatching.step(from, to));
            assert_eq!((general[0], euler[0]), (1.0, 1.0));
            assert!((general[1] - euler[1]).abs() < 1e-7, "{general:?}, {euler:?}");
        }
    }

    /// A perfect prediction of v takes a picture from level to level: predictions may depend on the level.
    #[test]
    fn steps_keep_picture_and_noise() {
        #[derive(Debug)]
        struct VPrediction;
        impl Objective for VPrediction {
            fn mix(&self, level: f32) -> [f32; 2] {
                let angle = std::f32::consts::FRAC_PI_2 * level;
                [angle.cos(), angle.sin()]
            }

            fn target(&self, level: f32) -> [f32; 2] {
                let [a, b] = self.mix(level);
                [-b, a]
            }

            fn time(&self, level: f32) -> f32 {
                level
            }
        }
        let (picture, noise) = (0.7, -1.3);
        let of = |shares: [f32; 2]| shares[0] * picture + shares[1] * noise;
        for (from, to) in [(1.0, 0.8), (0.5, 0.1), (0.2, 0.0)] {
            let [keep, add] = VPrediction.step(from, to);
            let stepped = keep * of(VPrediction.mix(from)) + add * of(VPrediction.target(from));
            assert!((stepped - of(VPrediction.mix(to))).abs() < 1e-6);
        }
    }
}
