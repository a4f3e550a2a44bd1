//! From pictures on the host to a batch on the device: bytes to numbers, noise, noise levels, captions.

use crate::data::{Content, DataSet, Draws, Item, Purpose};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::flow::schedule::training_sigma;
use crate::ops::from_rgb8::from_rgb8;
use crate::ops::noise::{NoiseOrigin, normal_noise_items};
use crate::tensor::Tensor;
use crate::train::Batch;

use super::config::TrainConfig;

/// Streams of a seed that are not the picture's own, which is 0.
const FRESH_STREAM: u64 = 1;
const VALIDATION_STREAM: u64 = 2;

/// A batch, on the device.
pub struct DeviceBatch {
    images: Tensor,
    noise: Tensor,
    sigmas: Vec<f32>,
    captions: Vec<Tensor>,
}

/// Makes batches.
pub struct Feeder<'a> {
    config: &'a TrainConfig,
    device: &'a Device,
    /// Whether a picture's noise is that of its own seed.
    seeded: bool,
}

impl DeviceBatch {
    /// Calls `work` with the batch as the model takes it.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn with<T>(&self, work: impl FnOnce(&Batch<'_>) -> Result<T>) -> Result<T> {
        let captions: Vec<&Tensor> = self.captions.iter().collect();
        work(&Batch {
            images: &self.images,
            noise: &self.noise,
            sigmas: &self.sigmas,
            captions: &captions,
        })
    }
}

impl<'a> Feeder<'a> {
    /// A feeder of a run on `device`.
    pub fn new(config: &'a TrainConfig, device: &'a Device, seeded: bool) -> Self {
        Feeder { config, device, seeded }
    }

    /// A batch to train on, of pictures of `set`; the run's pictures from `first` on. Noise levels and fresh noise depend on
    /// these numbers and the run's seed alone.
    ///
    /// # Errors
    /// When the items are not of one size, or the device has no room.
    pub fn training(&self, set: &DataSet, items: &[Item], first: u64) -> Result<DeviceBatch> {
        let levels = Draws::new(self.config.seed, Purpose::Sigma);
        let fresh = Draws::new(self.config.seed, Purpose::FreshNoise);
        let numbers = || (first..).take(items.len());
        let sigmas = numbers().map(|number| self.sigma(levels.below(number, self.config.sigmas)));
        let origins =
            numbers().zip(items).map(
                |(number, item)| match set.records()[item.picture].seed.filter(|_| self.seeded) {
                    Some(seed) => NoiseOrigin { seed, stream: 0 },
                    None => NoiseOrigin {
                        seed: fresh.word(number),
                        stream: FRESH_STREAM,
                    },
                },
            );
        self.batch(items, sigmas.collect(), &origins.collect::<Vec<_>>())
    }

    /// A batch to compute the validation loss of: pictures `first` … of `total`. Their noise levels are spread evenly over the
    /// table, and they and the noise are always the same.
    ///
    /// # Errors
    /// As for [`Feeder::training`].
    pub fn validation(&self, items: &[Item], first: usize, total: usize) -> Result<DeviceBatch> {
        let seeds = Draws::new(self.config.seed, Purpose::HeldOut);
        let numbers = || first..first + items.len();
        let level = |number: usize| (2 * number + 1) * self.config.sigmas / (2 * total.max(1));
        let sigmas = numbers().map(|number| self.sigma(level(number)));
        let origins = numbers().map(|number| NoiseOrigin {
            seed: seeds.word(number as u64),
            stream: VALIDATION_STREAM,
        });
        self.batch(items, sigmas.collect(), &origins.collect::<Vec<_>>())
    }

    fn sigma(&self, level: usize) -> f32 {
        training_sigma(level, self.config.sigmas, self.config.shift)
    }

    fn batch(&self, items: &[Item], sigmas: Vec<f32>, origins: &[NoiseOrigin]) -> Result<DeviceBatch> {
        let images = self.images(items)?;
        let made: Option<Vec<&[u8]>> = items.iter().map(|item| Some(item.noise.as_ref()?.bytes())).collect();
        let noise = match made {
            Some(parts) => self.joined(&parts, &images.shape())?,
            None => normal_noise_items(self.device, origins, &images.shape()[1..])?,
        };
        let captions = items.iter().map(|item| item.caption.to_tensor(self.device));
        Ok(DeviceBatch {
            images,
            noise,
            sigmas,
            captions: captions.collect::<Result<_>>()?,
        })
    }

    fn images(&self, items: &[Item]) -> Result<Tensor> {
        let Some(Item { content, .. }) = items.first() else {
            return Err(Error::invalid("a batch of no pictures"));
        };
        let parts = items.iter().map(|item| match &item.content {
            Content::Rgb { bytes, .. } => bytes.as_slice(),
            Content::Latent(latent) => latent.bytes(),
        });
        let parts: Vec<&[u8]> = parts.collect();
        match content {
            Content::Rgb { size, .. } => {
                let shape = [items.len(), size.height, size.width, 3];
                from_rgb8(&Tensor::from_slice(self.device, &parts.concat(), shape)?)
            }
            Content::Latent(latent) => self.joined(&parts, &[&[items.len()], &latent.shape()[1..]].concat()),
        }
    }

    /// The bytes of several f32 items, one after the other, as a tensor.
    fn joined(&self, parts: &[&[u8]], shape: &[usize]) -> Result<Tensor> {
        let values: Vec<f32> = parts
            .iter()
            .flat_map(|part| part.chunks_exact(4).map(read_f32))
            .collect();
        Tensor::from_slice(self.device, &values, shape)
    }
}

fn read_f32(bytes: &[u8]) -> f32 {
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}
