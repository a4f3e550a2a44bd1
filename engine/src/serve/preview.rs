//! What a walk is about to show, small and now and then, for whoever waits.
//!
//! Two states of a walk one step apart tell the picture that the model predicted in that step: with `x = a · picture + b · noise` at both
//! levels and one picture and noise for both, which is what a step of first order assumes, the picture is
//! `(b₁ · x₀ − b₀ · x₁) / (a₀ · b₁ − a₁ · b₀)`. Nothing is computed on the device for it; what it costs is a copy to the host. Of a latent
//! model its first three channels are shown, stretched to the range of bytes: shapes and places, not colours.

use std::time::{Duration, Instant};

use super::ticket::{Asker, Event};
use crate::error::Result;
use crate::flow::sampler::{Listener, Seen, StepReport};
use crate::image_io::RgbImage;

/// The longer side of a preview at most, in pixels.
const SIDE: usize = 512;

/// Previews come no faster than this.
const INTERVAL: Duration = Duration::from_millis(250);

/// So much longer than a preview takes passes until the next one: a twentieth of the time goes to them at most.
const SHARE: u32 = 20;

/// A latent whose values are all smaller is shown flat.
const FLATTEST: f32 = 1e-6;

/// A state of the walk, thinned out.
struct Sample {
    /// Steps done.
    done: usize,
    /// How much of picture and noise there is in it.
    mix: [f32; 2],
    /// Rows of places of three channels, picture after picture.
    values: Vec<f32>,
}

/// Tells a request's asker of steps, and shows previews where they are wanted.
pub(super) struct Progress<'a, T> {
    asker: &'a Asker<T>,
    previews: bool,
    latent: bool,
    /// Steps done of batches before this one, and steps of all.
    before: usize,
    total: usize,
    /// Pictures before this batch.
    first: usize,
    last: Option<Sample>,
    next: Instant,
}

impl<'a, T> Progress<'a, T> {
    /// Of a batch that begins with picture `first` after `before` of `total` steps.
    pub(super) fn new(
        asker: &'a Asker<T>,
        previews: bool,
        latent: bool,
        first: usize,
        [before, total]: [usize; 2],
    ) -> Self {
        Progress {
            asker,
            previews,
            latent,
            before,
            total,
            first,
            last: None,
            next: Instant::now(),
        }
    }
}

impl<T> Listener for Progress<'_, T> {
    fn step(&mut self, report: StepReport) -> Result<()> {
        self.asker.tell(Event::Step {
            done: self.before + report.done,
            total: self.total,
        });
        self.asker.go_on()
    }

    fn looks(&self, done: usize, steps: usize) -> bool {
        // The second of two neighbours always; a first one where there is time, and one more step to come.
        let second = self.last.as_ref().is_some_and(|last| last.done + 1 == done);
        self.previews && (second || (done + 1 < steps && Instant::now() >= self.next))
    }

    fn look(&mut self, seen: &Seen<'_>) -> Result<()> {
        let start = Instant::now();
        let [batch, height, width, channels] = seen.shape;
        let stride = height.max(width).div_ceil(SIDE).max(1);
        let (rows, columns) = (height.div_ceil(stride), width.div_ceil(stride));
        let all = (seen.values)()?;
        let mut values = Vec::with_capacity(batch * rows * columns * 3);
        for picture in all.chunks_exact(height * width * channels) {
            for row in picture.chunks_exact(width * channels).step_by(stride) {
                for place in row.chunks_exact(channels).step_by(stride) {
                    values.extend((0..3).map(|channel| place[channel.min(channels - 1)]));
                }
            }
        }
        let sample = Sample {
            done: seen.done,
            mix: seen.mix,
            values,
        };
        if let Some(last) = self.last.take().filter(|last| last.done + 1 == sample.done) {
            let shown = predicted(&last, &sample);
            for (index, shown) in shown.chunks_exact(rows * columns * 3).enumerate() {
                self.asker.tell(Event::Preview {
                    index: self.first + index,
                    image: RgbImage::new(columns, rows, bytes(shown, self.latent))?,
                });
            }
        } else {
            self.last = Some(sample);
        }
        let taken = start.elapsed();
        self.next = Instant::now() + INTERVAL.max(taken * SHARE);
        Ok(())
    }
}

/// The picture that two states one step apart are on the way to; the later state where they are none.
fn predicted(from: &Sample, to: &Sample) -> Vec<f32> {
    let ([a, b], [next_a, next_b]) = (from.mix, to.mix);
    let determinant = a * next_b - next_a * b;
    let pairs = from.values.iter().zip(&to.values);
    match determinant.abs() > f32::EPSILON {
        true => pairs.map(|(x, next)| (next_b * x - b * next) / determinant).collect(),
        false => to.values.clone(),
    }
}

/// Bytes of values from −1 to 1, or of a latent's, stretched over three standard deviations each way.
fn bytes(values: &[f32], latent: bool) -> Vec<u8> {
    let scale = match latent {
        false => 127.5,
        true => {
            let mean_square = values.iter().map(|value| value * value).sum::<f32>() / values.len().max(1) as f32;
            127.5 / (3.0 * mean_square.sqrt()).max(FLATTEST)
        }
    };
    values
        .iter()
        .map(|value| (value * scale + 127.5).round().clamp(0.0, 255.0) as u8)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_states_tell_the_picture() {
        let (picture, noise) = ([0.5f32, -0.25, 0.0], [1.5f32, -2.0, 0.75]);
        let sample = |done: usize, mix: [f32; 2]| Sample {
            done,
            mix,
            values: picture
                .iter()
                .zip(&noise)
                .map(|(p, n)| mix[0] * p + mix[1] * n)
                .collect(),
        };
        for (from, to) in [
            ([0.25, 0.75], [0.5, 0.5]),
            ([0.6, 0.8], [0.8, 0.6]),
            ([0.5, 0.5], [1.0, 0.0]),
        ] {
            let found = predicted(&sample(1, from), &sample(2, to));
            for (found, expected) in found.iter().zip(&picture) {
                assert!((found - expected).abs() < 1e-5, "{found} {expected}");
            }
        }
        // Two states at one level tell nothing.
        let same = sample(1, [0.5, 0.5]);
        assert_eq!(predicted(&same, &same), same.values);
        assert_eq!(bytes(&[-1.0, 0.0, 1.0, 9.0, f32::NAN], false)[..4], [0, 128, 255, 255]);
        assert_eq!(bytes(&[0.0; 3], true), [128; 3]);
    }
}
