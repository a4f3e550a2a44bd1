//! Pictures that begin with another picture instead of noise alone.
//!
//! Of a schedule's steps, the share `strength` is taken, the last ones; the first of them begins at
//! `(1 − sigma) · start + sigma · noise`, start being the image (latent model: its latent). With strength 1 that is noise alone. Source:
//! Meng et al., "SDEdit" (2022); steps are counted as in diffusers' image-to-image pipelines.

use super::blame::of_file;
use super::{Pipeline, Settings};
use crate::device::MemoryTag;
use crate::error::{Error, Result};
use crate::flow::schedule::Schedule;
use crate::image_io::RgbImage;
use crate::model::vae::VaeEncoder;
use crate::ops::from_rgb8::from_rgb8;
use crate::tensor::{HostTensor, Tensor};

/// A picture to begin with.
#[derive(Clone, Debug, PartialEq)]
pub struct StartImage {
    /// The picture, of the size to draw.
    pub image: RgbImage,
    /// How much of it may change: above 0, which leaves it as it is, to 1, which leaves nothing of it.
    pub strength: f32,
}

impl StartImage {
    /// Refuses a picture of another size than is drawn, and a strength that makes no sense.
    ///
    /// # Errors
    /// Naming what is wrong.
    pub fn check(&self, settings: &Settings) -> Result<()> {
        if !(self.strength > 0.0 && self.strength <= 1.0) {
            return Err(Error::invalid(format!(
                "a strength of {} makes no sense: use more than 0, which keeps the start image, to 1, which keeps nothing of it",
                self.strength
            )));
        }
        if [self.image.width(), self.image.height()] != [settings.width, settings.height] {
            return Err(Error::invalid(format!(
                "the start image has {}x{} pixels, but {}x{} are to be drawn: bring it to that size first",
                self.image.width(),
                self.image.height(),
                settings.width,
                settings.height
            )));
        }
        Ok(())
    }

    /// The steps to take; at least one.
    pub(super) fn schedule(&self, whole: Schedule) -> Result<Schedule> {
        let steps = whole.steps();
        let taken = (steps as f64 * f64::from(self.strength)).min(steps as f64);
        let first = (steps as f64 - taken).floor() as usize;
        whole.tail(first.min(steps - 1))
    }
}

impl Pipeline {
    /// What a walk begins with: noise `[batch, height, width, channels]` with as much of the start image as this sigma leaves.
    pub(super) fn begin_from(
        &mut self,
        start: &StartImage,
        noise: Tensor,
        settings: &Settings,
        sigma: f32,
    ) -> Result<Tensor> {
        start.check(settings)?;
        self.phase("start", |pipeline| {
            let image = pipeline.start_values(&start.image)?;
            let mut values = noise.to_vec::<f32>()?;
            if image.is_empty() || !values.len().is_multiple_of(image.len()) {
                return Err(Error::invalid("the start image and the noise have other shapes"));
            }
            for item in values.chunks_mut(image.len()) {
                for (value, image) in item.iter_mut().zip(&image) {
                    *value = (1.0 - sigma) * image + sigma * *value;
                }
            }
            Tensor::from_slice(pipeline.device(), &values, noise.shape())
        })
    }

    /// The picture as the transformer sees it, `[height, width, channels]`: itself, or its latent.
    fn start_values(&mut self, image: &RgbImage) -> Result<Vec<f32>> {
        let device = self.device().clone();
        let bytes = Tensor::from_slice(&device, image.pixels(), [1, image.height(), image.width(), 3])?;
        let pixels = from_rgb8(&bytes)?;
        let Some((config, checkpoint)) = self.files.vae_files() else {
            return Ok(HostTensor::from_tensor(&pixels)?.to_f32());
        };
        if self.encoder.is_none() {
            let _tag = MemoryTag::Weights.scope();
            let encoder = VaeEncoder::load(checkpoint, &device, config);
            self.encoder = Some(encoder.map_err(|error| of_file(checkpoint, error))?);
        }
        let encoder = self.encoder.as_ref().expect("loaded above");
        let (values, _) = encoder.latent(&pixels)?;
        match values.iter().all(|value| value.is_finite()) {
            true => Ok(values),
            false => Err(Error::not_finite(
                "the latent of the start image, so that the VAE's weights are damaged",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(strength: f32) -> StartImage {
        StartImage {
            image: RgbImage::new(2, 1, vec![0; 6]).unwrap(),
            strength,
        }
    }

    #[test]
    fn the_last_steps_are_taken() {
        let whole = Schedule::new(8, 3.0).unwrap();
        for (strength, steps) in [(1.0, 8), (0.5, 4), (0.6, 5), (0.01, 1), (0.125, 1)] {
            let schedule = start(strength).schedule(whole.clone()).unwrap();
            assert_eq!(schedule.steps(), steps, "{strength}");
            assert_eq!(schedule.sigma(0), whole.sigma(8 - steps));
            assert_eq!(schedule.sigma(steps), 0.0);
        }
    }

    #[test]
    fn strengths_and_sizes_that_make_no_sense_are_refused() {
        let settings = Settings {
            width: 2,
            height: 1,
            steps: 8,
            shift: 3.0,
            cfg: 1.0,
        };
        start(1.0).check(&settings).unwrap();
        for strength in [0.0, -1.0, 1.5, f32::NAN] {
            let message = start(strength).check(&settings).unwrap_err().to_string();
            assert!(message.contains("a strength of"), "{message}");
        }
        let message = start(1.0)
            .check(&Settings { width: 4, ..settings })
            .unwrap_err()
            .to_string();
        assert!(message.contains("2x1 pixels, but 4x1"), "{message}");
    }
}
