//! Flow matching whose model is told the level itself.

use crate::model::objective::{FlowMatching, Objective};

/// [`FlowMatching`] but for the time, which is 1 for noise and 0 for the picture.
#[derive(Debug)]
pub(super) struct FlowAtLevel;

impl Objective for FlowAtLevel {
    fn mix(&self, level: f32) -> [f32; 2] {
        FlowMatching.mix(level)
    }

    fn target(&self, level: f32) -> [f32; 2] {
        FlowMatching.target(level)
    }

    fn time(&self, level: f32) -> f32 {
        level
    }

    fn step(&self, from: f32, to: f32) -> [f32; 2] {
        FlowMatching.step(from, to)
    }
}
