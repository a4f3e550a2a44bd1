//! Pictures that begin with another picture instead of noise alone.
//!
//! Of a schedule's steps, the share `strength` is taken, the last ones; the first of them begins at
//! `a · start + b · noise`, start being the image (latent model: its latent), with the shares of picture and noise at its level: 1 − sigma
//! and sigma with flow matching. With strength 1 that is noise alone, or as good as that on a discrete schedule. Source:
//! Meng et al., "SDEdit" (2022); steps are counted as in diffusers' image-to-image pipelines.
//!
//! With a mask some of the picture is kept: after each step those places are brought back to the picture with as much noise as that step
//! leaves, see [`Held`], and in what is given out they are the start image's bytes. So what is drawn fits what is kept, and what is kept
//! is kept to the bit, of a latent model too, whose autoencoder would change it.

use super::blame::of_file;
use super::{Pipeline, Settings};
use crate::device::MemoryTag;
use crate::error::{Error, Result};
use crate::flow::held::{Beginning, Held};
use crate::flow::schedule::Schedule;
use crate::image_io::{Mask, RgbImage};
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
    /// What of it is kept whatever the strength, if anything.
    pub kept: Option<Kept>,
}

/// What is kept of a picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Which places may change; of the picture's size.
    pub mask: Mask,
    /// Width and height of the part, from the left and top, that is given out: what lies beyond was added to fit the model.
    pub shown: [usize; 2],
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
        let Some(Kept { mask, shown }) = &self.kept else {
            return Ok(());
        };
        let [width, height] = *shown;
        if [mask.width(), mask.height()] != [settings.width, settings.height] {
            return Err(Error::invalid(format!(
                "the mask has {}x{} places, the picture {}x{} pixels: they must have one size",
                mask.width(),
                mask.height(),
                settings.width,
                settings.height
            )));
        }
        if width == 0 || height == 0 || width > settings.width || height > settings.height {
            return Err(Error::invalid(format!(
                "{width}x{height} pixels cannot be shown of {}x{}",
                settings.width, settings.height
            )));
        }
        Ok(())
    }

    /// What was drawn, with what is kept of the start image put back, cut to what is shown. Of a latent model, whose autoencoder mixes
    /// nothing, places that may change in part are mixed here.
    ///
    /// # Errors
    /// When the sizes differ.
    pub fn restore(&self, drawn: RgbImage, latent: bool) -> Result<RgbImage> {
        let Some(Kept { mask, shown }) = &self.kept else {
            return Ok(drawn);
        };
        let [width, height] = [drawn.width(), drawn.height()];
        if [self.image.width(), self.image.height()] != [width, height]
            || [mask.width(), mask.height()] != [width, height]
        {
            return Err(Error::invalid("the start image and what was drawn have other sizes"));
        }
        let mut pixels = drawn.into_pixels();
        let kept = self.image.pixels().as_chunks::<3>().0;
        let places = pixels.as_chunks_mut::<3>().0.iter_mut().zip(kept).zip(mask.weights());
        for ((drawn, kept), &weight) in places {
            match weight {
                0 => *drawn = *kept,
                1..=254 if latent => {
                    for (drawn, kept) in drawn.iter_mut().zip(kept) {
                        *drawn = mixed(*drawn, *kept, weight);
                    }
                }
                _ => {}
            }
        }
        if *shown == [width, height] {
            return RgbImage::new(width, height, pixels);
        }
        let rows = pixels.chunks_exact(3 * width).take(shown[1]);
        let shown_pixels = rows.flat_map(|row| &row[..3 * shown[0]]).copied().collect();
        RgbImage::new(shown[0], shown[1], shown_pixels)
    }

    /// Bytes that a walk takes on the device beside those of one without, for pictures of this height, width and channels.
    pub(super) fn held_bytes(&self, [height, width, channels]: [usize; 3], batch: usize) -> u64 {
        let places = height as u64 * width as u64;
        // The picture and the noise in f32, and the mask.
        let held = places * (4 * channels as u64 * (1 + batch as u64) + 1);
        if self.kept.is_some() { held } else { 0 }
    }

    /// How many of the steps are taken.
    ///
    /// # Errors
    /// When the settings make no schedule.
    pub fn steps(&self, settings: &Settings) -> Result<usize> {
        let whole = Schedule::new(settings.steps, f64::from(settings.shift))?;
        Ok(self.schedule(whole)?.steps())
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
    /// What a walk begins with: noise `[batch, height, width, channels]` with as much of the start image as these shares of
    /// picture and noise say, and what is held of it.
    pub(super) fn begin_from(
        &mut self,
        start: &StartImage,
        noise: Tensor,
        settings: &Settings,
        [kept, added]: [f32; 2],
    ) -> Result<Beginning> {
        start.check(settings)?;
        self.phase("start", |pipeline| {
            let image = pipeline.start_values(&start.image)?;
            let mut values = noise.to_vec::<f32>()?;
            if image.is_empty() || !values.len().is_multiple_of(image.len()) {
                return Err(Error::invalid("the start image and the noise have other shapes"));
            }
            for item in values.chunks_mut(image.len()) {
                for (value, image) in item.iter_mut().zip(&image) {
                    *value = kept * image + added * *value;
                }
            }
            let device = pipeline.device();
            let begun = Tensor::from_slice(device, &values, noise.shape())?;
            let [height, width, channels] = pipeline.canvas(settings);
            let held = start.kept.as_ref().map(|kept| {
                let mask = kept.mask.of_cells(pipeline.files.cell());
                Ok::<_, Error>(Held {
                    known: Tensor::from_slice(device, &image, [1, height, width, channels])?,
                    mask: Tensor::from_slice(device, mask.weights(), [1, height, width, 1])?,
                    noise,
                })
            });
            Ok(Beginning {
                noise: begun,
                held: held.transpose()?,
            })
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

/// A byte of two, weighted by `weight` of 255, rounded to the nearest.
fn mixed(drawn: u8, kept: u8, weight: u8) -> u8 {
    let weight = u32::from(weight);
    ((u32::from(drawn) * weight + u32::from(kept) * (255 - weight) + 127) / 255) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(strength: f32) -> StartImage {
        StartImage {
            image: RgbImage::new(2, 1, vec![0; 6]).unwrap(),
            strength,
            kept: None,
        }
    }

    #[test]
    fn what_is_kept_is_put_back() {
        let bytes =
            |pixels: [u8; 4]| RgbImage::new(4, 1, pixels.into_iter().flat_map(|byte| [byte; 3]).collect()).unwrap();
        let start = StartImage {
            image: bytes([10, 20, 30, 40]),
            strength: 1.0,
            kept: Some(Kept {
                mask: Mask::new(4, 1, vec![0, 255, 51, 0]).unwrap(),
                shown: [3, 1],
            }),
        };
        for (latent, mixture) in [(false, 130), (true, 50)] {
            let restored = start.restore(bytes([110, 120, 130, 140]), latent).unwrap();
            let expected = [10, 120, mixture].into_iter().flat_map(|byte| [byte; 3]).collect();
            assert_eq!(restored, RgbImage::new(3, 1, expected).unwrap());
        }
        let settings = Settings {
            width: 4,
            height: 1,
            steps: 8,
            shift: 3.0,
            cfg: 1.0,
            solver: crate::flow::solver::Solver::Euler,
        };
        start.check(&settings).unwrap();
        let mut wrong = start.clone();
        wrong.kept.as_mut().unwrap().shown = [5, 1];
        assert!(
            wrong
                .check(&settings)
                .unwrap_err()
                .to_string()
                .contains("5x1 pixels cannot be shown")
        );
        let mut wrong = start;
        wrong.kept.as_mut().unwrap().mask = Mask::new(1, 4, vec![0; 4]).unwrap();
        assert!(
            wrong
                .check(&settings)
                .unwrap_err()
                .to_string()
                .contains("the mask has 1x4 places")
        );
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
            solver: crate::flow::solver::Solver::Euler,
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
