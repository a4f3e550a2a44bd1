//! Sheets of samples: fixed prompts and seeds, drawn by the model as it is.

use crate::checkpoint::Checkpoint;
use crate::data::Features;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::flow::noise_source::NoiseSource;
use crate::flow::sampler::{Conditioning, sample};
use crate::flow::schedule::Schedule;
use crate::image_io::RgbImage;
use crate::model::Denoiser;
use crate::model::config::VaeConfig;
use crate::model::objective::Trained;
use crate::model::vae::VaeDecoder;
use crate::ops::to_rgb8::to_rgb8;
use crate::pipeline::Settings;
use crate::tensor::Tensor;

/// Samples are drawn together as long as they have at most this many image tokens: fewer do not fill a GPU.
const TOKENS_AT_ONCE: usize = 4096;

/// White between samples.
const GAP: usize = 4;

/// What is drawn on every sheet.
pub struct Sheet {
    /// Size, steps, shift, guidance and solver.
    pub settings: Settings,
    /// What the model is trained for.
    pub trained: Trained,
    /// The generator of the noise.
    pub rng: NoiseSource,
    /// Seed of the first sample; each further one takes the next.
    pub seed: u64,
    /// The features of the prompts.
    pub captions: Vec<Features>,
    /// Those of an empty prompt, for guidance.
    pub negative: Option<Features>,
    /// The VAE of a latent model, loaded for each sheet and freed after it.
    pub vae: Option<(VaeConfig, Checkpoint)>,
}

impl Sheet {
    /// Draws the sheet: samples in rows from left to right. `go_on` is asked after each step; an error from it ends the work.
    ///
    /// # Errors
    /// When the device has no room, a sample holds NaN or an infinity, or `go_on` says so.
    pub fn draw(&self, model: &dyn Denoiser, go_on: &mut dyn FnMut() -> Result<()>) -> Result<RgbImage> {
        let device = model.device();
        let Settings { width, height, .. } = self.settings;
        let vae = match &self.vae {
            Some((config, checkpoint)) => Some(VaeDecoder::load(checkpoint, device, config)?),
            None => None,
        };
        let cell = self.vae.as_ref().map_or(1, |(config, _)| config.downsampling());
        let canvas = [height / cell, width / cell, model.geometry().channels];
        let tokens = model.geometry().image_tokens([canvas[0], canvas[1]]);
        let at_once = match device {
            Device::Cpu => 1,
            Device::Cuda(_) => (TOKENS_AT_ONCE / tokens.max(1)).max(1),
        };
        let mut samples = Vec::with_capacity(self.captions.len());
        for (index, captions) in self.captions.chunks(at_once).enumerate() {
            let first = self.seed.wrapping_add((index * at_once) as u64);
            let seeds: Vec<u64> = (0..captions.len() as u64)
                .map(|offset| first.wrapping_add(offset))
                .collect();
            let noise = self.rng.noise(device, &seeds, canvas)?;
            let drawn = self.denoise(model, captions, noise, go_on)?;
            for item in 0..captions.len() {
                let drawn = drawn.narrow(item, 1)?;
                let image = match &vae {
                    Some(vae) => vae.decode(&drawn)?,
                    None => drawn,
                };
                samples.extend(to_rgb8(&image)?.into_pictures(samples.len(), self.captions.len())?);
            }
        }
        tiled(&samples, width, height)
    }

    fn denoise(
        &self,
        model: &dyn Denoiser,
        captions: &[Features],
        noise: Tensor,
        go_on: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Tensor> {
        let size = [noise.dim(1), noise.dim(2)];
        let prepare = |captions: Vec<&Features>| {
            let tensors = captions.into_iter().map(|caption| caption.to_tensor(model.device()));
            let tensors: Vec<Tensor> = tensors.collect::<Result<_>>()?;
            model.prepare(&tensors.iter().collect::<Vec<_>>(), size)
        };
        let negative = match &self.negative {
            Some(negative) => Some((prepare(vec![negative; captions.len()])?, self.settings.cfg)),
            None => None,
        };
        let conditioning = Conditioning {
            prompt: prepare(captions.iter().collect())?,
            negative,
        };
        let Settings {
            steps, shift, solver, ..
        } = self.settings;
        let schedule = Schedule::of(&self.trained, solver, steps, f64::from(shift))?;
        sample(model, &conditioning, &schedule, noise, &mut |_| go_on())
    }
}

/// Pictures of one size in rows, about as many rows as columns, on white.
fn tiled(pictures: &[Vec<u8>], width: usize, height: usize) -> Result<RgbImage> {
    let columns = columns(pictures.len());
    let rows: Vec<&[Vec<u8>]> = pictures.chunks(columns).collect();
    table(&rows, columns, width, height)
}

/// Columns of a sheet of so many samples.
fn columns(count: usize) -> usize {
    (count as f64).sqrt().ceil().max(1.0) as usize
}

/// Rows of pictures of one size, on white.
///
/// # Errors
/// When there are none.
pub(super) fn table(rows: &[&[Vec<u8>]], columns: usize, width: usize, height: usize) -> Result<RgbImage> {
    let extent = |count: usize, side: usize| count.max(1) * (side + GAP) - GAP;
    let (sheet_width, sheet_height) = (extent(columns, width), extent(rows.len(), height));
    let mut sheet = vec![u8::MAX; sheet_width * sheet_height * 3];
    for (row, pictures) in rows.iter().enumerate() {
        for (column, picture) in pictures.iter().enumerate() {
            let (left, top) = (column * (width + GAP), row * (height + GAP));
            for (line, pixels) in picture.chunks(width * 3).enumerate() {
                let start = ((top + line) * sheet_width + left) * 3;
                sheet[start..start + pixels.len()].copy_from_slice(pixels);
            }
        }
    }
    RgbImage::new(sheet_width, sheet_height, sheet)
}

/// Sample `index` of a sheet of `count` samples of one size.
///
/// # Errors
/// When the sheet is smaller than that.
pub(super) fn tile(sheet: &RgbImage, index: usize, count: usize, [width, height]: [usize; 2]) -> Result<Vec<u8>> {
    let columns = columns(count);
    let (left, top) = (index % columns * (width + GAP), index / columns * (height + GAP));
    if left + width > sheet.width() || top + height > sheet.height() {
        return Err(Error::invalid(format!(
            "a sheet of {}x{} pixels does not hold {count} samples of {width}x{height}",
            sheet.width(),
            sheet.height()
        )));
    }
    let lines = (top..top + height).map(|line| (line * sheet.width() + left) * 3);
    Ok(lines
        .flat_map(|start| sheet.pixels()[start..start + width * 3].iter().copied())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_stand_side_by_side() {
        let pictures: Vec<Vec<u8>> = (0..3).map(|value| vec![value; 2 * 3]).collect();
        let sheet = tiled(&pictures, 2, 1).unwrap();
        assert_eq!((sheet.width(), sheet.height()), (2 * 2 + GAP, 2 + GAP));
        let red = |x: usize, y: usize| sheet.pixels()[(y * sheet.width() + x) * 3];
        assert_eq!([red(0, 0), red(2, 0), red(2 + GAP, 0), red(1, 1 + GAP)], [0, 255, 1, 2]);
        for (index, picture) in pictures.iter().enumerate() {
            assert_eq!(&tile(&sheet, index, 3, [2, 1]).unwrap(), picture);
        }
        assert!(tile(&sheet, 0, 3, [9, 9]).is_err());
    }
}
