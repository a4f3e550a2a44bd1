//! What to draw with, and which values make no sense.

use serde::Serialize;

use crate::error::{Error, Result};
use crate::flow::schedule::Schedule;
use crate::flow::solver::Solver;
use crate::limits::Side;

/// What to draw with.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Settings {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// Denoising steps.
    pub steps: usize,
    /// How far sigmas are shifted towards noise.
    pub shift: f32,
    /// Guidance; 1 is none, and takes one pass per step instead of two.
    pub cfg: f32,
    /// The solver.
    pub solver: Solver,
}

/// What somebody asks for; the model says the rest.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Asked {
    /// Pixels.
    pub width: Option<usize>,
    /// Pixels.
    pub height: Option<usize>,
    /// Denoising steps.
    pub steps: Option<usize>,
    /// See [`Settings::shift`].
    pub shift: Option<f32>,
    /// See [`Settings::cfg`].
    pub cfg: Option<f32>,
    /// See [`Settings::solver`].
    pub solver: Option<Solver>,
}

/// How many pictures are drawn at once where nobody says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batching {
    /// As many pictures as have this many image tokens together, but at least one: more do not make a GPU faster.
    pub tokens: usize,
    /// No more than these.
    pub most: usize,
}

impl Batching {
    /// For somebody who waits: the fewest that fill a GPU.
    pub const PROMPT: Batching = Batching { tokens: 4096, most: 64 };
    /// For many pictures that nobody waits for.
    pub const BULK: Batching = Batching {
        tokens: 16384,
        most: 256,
    };

    /// The largest batch of pictures of so many image tokens each.
    pub fn largest(self, image_tokens: usize) -> usize {
        (self.tokens / image_tokens.max(1)).clamp(1, self.most.max(1))
    }
}

impl Settings {
    /// Refuses what cannot be drawn with any model or device.
    ///
    /// # Errors
    /// Naming the value and what it should be.
    pub fn check(&self) -> Result<()> {
        for (name, side) in [("width", self.width), ("height", self.height)] {
            if Side::new(side as u64).is_none() {
                return Err(Error::invalid(format!(
                    "a {name} of {side} cannot be drawn: use {} to {} pixels",
                    Side::LEAST,
                    Side::MOST
                )));
            }
        }
        if !(self.cfg.is_finite() && self.cfg >= 0.0) {
            return Err(Error::invalid(format!(
                "a guidance scale (cfg) of {} makes no sense: use 1 for none, about 2 to 6 to follow the prompt closer",
                self.cfg
            )));
        }
        Schedule::new(self.steps, f64::from(self.shift)).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_fill_a_gpu() {
        assert_eq!(
            [64, 4096, 5000, 0].map(|tokens| Batching::PROMPT.largest(tokens)),
            [64, 1, 1, 64]
        );
        assert_eq!([64, 4096].map(|tokens| Batching::BULK.largest(tokens)), [256, 4]);
    }

    #[test]
    fn senseless_settings_are_refused() {
        let good = Settings {
            width: 128,
            height: 64,
            steps: 4,
            shift: 3.0,
            cfg: 0.0,
            solver: Solver::Euler,
        };
        good.check().unwrap();
        for (bad, word) in [
            (Settings { width: 0, ..good }, "width of 0"),
            (
                Settings {
                    height: usize::MAX,
                    ..good
                },
                "height of 18446744073709551615",
            ),
            (Settings { steps: 0, ..good }, "at least one step"),
            (
                Settings {
                    steps: usize::MAX,
                    ..good
                },
                "18446744073709551615 steps",
            ),
            (Settings { shift: -1.0, ..good }, "a shift of -1"),
            (Settings { cfg: f32::NAN, ..good }, "(cfg) of NaN"),
            (Settings { cfg: -0.5, ..good }, "(cfg) of -0.5"),
        ] {
            let message = bad.check().unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    }
}
