//! Noise prediction with a variance-preserving schedule; its step is DDIM's.
//!
//! Source: Ho et al., "Denoising Diffusion Probabilistic Models" (2020); Song et al., "Denoising Diffusion Implicit Models" (2021).

use crate::model::objective::Objective;

/// How much of the variance is noise at level 1; less than all, so that a step from there can tell the picture.
const MOST_NOISE: f32 = 0.99;

/// The model predicts the noise of `√(1 − b²) · picture + b · noise`, with `b² = 0.99 · level`.
#[derive(Debug)]
pub struct NoisePrediction;

impl Objective for NoisePrediction {
    fn mix(&self, level: f32) -> [f32; 2] {
        let variance = MOST_NOISE * level;
        [(1.0 - variance).sqrt(), variance.sqrt()]
    }

    fn target(&self, _level: f32) -> [f32; 2] {
        [0.0, 1.0]
    }

    fn time(&self, level: f32) -> f32 {
        level
    }
}
