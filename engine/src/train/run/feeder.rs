//! From pictures on the host to a batch on the device: bytes to numbers, noise, noise levels, captions.
//!
//! Pictures go through pinned memory, so that the copy waits for nothing that the device still works on. The features of
//! captions stay on the device as far as [`CAPTION_BYTES`] go.

use std::collections::HashMap;
use std::sync::Arc;

use crate::data::{Caption, Content, DataSet, Draws, Item, Purpose, StoreKey};
use crate::device::{Device, MemoryTag};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::flow::schedule::training_sigma;
use crate::model::objective::Discrete;
use crate::ops::from_rgb8::from_rgb8;
use crate::ops::noise::{NoiseOrigin, normal_noise_items};
use crate::tensor::Tensor;
use crate::train::Batch;

use super::config::TrainConfig;

/// Streams of a seed that are not the picture's own, which is 0.
const FRESH_STREAM: u64 = 1;
const VALIDATION_STREAM: u64 = 2;

/// Bytes of caption features that stay on the device.
pub const CAPTION_BYTES: usize = 256 << 20;

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
    /// The discrete schedule whose levels are drawn, of all objectives but flow matching.
    discrete: Option<Arc<Discrete>>,
    captions: HashMap<StoreKey, Tensor>,
    /// Bytes that `captions` may still take.
    room: usize,
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

    /// Height and width of the images (or latents), and tokens of the longest caption.
    pub fn extent(&self) -> ([usize; 2], usize) {
        let tokens = self.captions.iter().map(|caption| caption.dim(1)).max();
        ([self.images.dim(1), self.images.dim(2)], tokens.unwrap_or(0))
    }
}

impl<'a> Feeder<'a> {
    /// A feeder of a run on `device`.
    pub fn new(config: &'a TrainConfig, device: &'a Device, seeded: bool, discrete: Option<Arc<Discrete>>) -> Self {
        Feeder {
            config,
            device,
            seeded,
            discrete,
            captions: HashMap::new(),
            room: CAPTION_BYTES,
        }
    }

    /// A batch to train on, of pictures of `set`; the run's pictures from `first` on. Noise levels and fresh noise depend on
    /// these numbers and the run's seed alone.
    ///
    /// # Errors
    /// When the items are not of one size, or the device has no room.
    pub fn training(&mut self, set: &DataSet, items: &[Item], first: u64) -> Result<DeviceBatch> {
        let levels = Draws::new(self.config.seed, Purpose::Sigma);
        let fresh = Draws::new(self.config.seed, Purpose::FreshNoise);
        let numbers = || (first..).take(items.len());
        let sigmas = numbers().map(|number| self.sigma(levels.below(number, self.levels())));
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
        let (sigmas, origins) = (sigmas.collect(), origins.collect::<Vec<_>>());
        self.batch(items, sigmas, &origins)
    }

    /// A batch to compute the validation loss of: pictures `first` … of `total`. Their noise levels are spread evenly over the
    /// table, and they and the noise are always the same.
    ///
    /// # Errors
    /// As for [`Feeder::training`].
    pub fn validation(&mut self, items: &[Item], first: usize, total: usize) -> Result<DeviceBatch> {
        let seeds = Draws::new(self.config.seed, Purpose::HeldOut);
        let numbers = || first..first + items.len();
        let level = |number: usize| (2 * number + 1) * self.levels() / (2 * total.max(1));
        let sigmas = numbers().map(|number| self.sigma(level(number)));
        let origins = numbers().map(|number| NoiseOrigin {
            seed: seeds.word(number as u64),
            stream: VALIDATION_STREAM,
        });
        let (sigmas, origins) = (sigmas.collect(), origins.collect::<Vec<_>>());
        self.batch(items, sigmas, &origins)
    }

    /// Noise levels that are drawn from.
    fn levels(&self) -> usize {
        match &self.discrete {
            Some(discrete) => discrete.schedule().num_train_timesteps,
            None => self.config.sigmas,
        }
    }

    /// The noise level of this number, from the noisiest on.
    fn sigma(&self, level: usize) -> f32 {
        match &self.discrete {
            Some(discrete) => discrete.level((self.levels() - 1 - level) as i64),
            None => training_sigma(level, self.config.sigmas, self.config.shift),
        }
    }

    fn batch(&mut self, items: &[Item], sigmas: Vec<f32>, origins: &[NoiseOrigin]) -> Result<DeviceBatch> {
        let images = self.images(items)?;
        let made: Option<Vec<&[u8]>> = items.iter().map(|item| Some(item.noise.as_ref()?.bytes())).collect();
        let noise = match made {
            Some(parts) => self.joined(&parts, DType::F32, &images.shape())?,
            None => normal_noise_items(self.device, origins, &images.shape()[1..])?,
        };
        let captions = items.iter().map(|item| self.caption(&item.caption));
        Ok(DeviceBatch {
            images,
            noise,
            sigmas,
            captions: captions.collect::<Result<_>>()?,
        })
    }

    fn caption(&mut self, caption: &Caption) -> Result<Tensor> {
        if let Some(known) = self.captions.get(&caption.key) {
            return Ok(known.clone());
        }
        let features = {
            let _tag = MemoryTag::Workspace.scope();
            caption.features.to_tensor(self.device)?
        };
        if let Some(left) = self.room.checked_sub(features.bytes()) {
            self.room = left;
            self.captions.insert(caption.key.clone(), features.clone());
        }
        Ok(features)
    }

    fn images(&self, items: &[Item]) -> Result<Tensor> {
        let Some(first) = items.first() else {
            return Err(Error::invalid("a batch of no pictures"));
        };
        let parts = items.iter().map(|item| match &*item.content {
            Content::Rgb { bytes, .. } => bytes.as_slice(),
            Content::Latent(latent) => latent.bytes(),
        });
        let parts: Vec<&[u8]> = parts.collect();
        match &*first.content {
            Content::Rgb { size, .. } => {
                let shape = [items.len(), size.height, size.width, 3];
                from_rgb8(&self.joined(&parts, DType::U8, &shape)?)
            }
            Content::Latent(latent) => {
                let shape = [&[items.len()], &latent.shape()[1..]].concat();
                self.joined(&parts, DType::F32, &shape)
            }
        }
    }

    /// The bytes of several items, one after the other, as a tensor.
    fn joined(&self, parts: &[&[u8]], dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let each = parts.first().map_or(0, |part| part.len());
        let bytes = shape.iter().product::<usize>() * dtype.size();
        if parts.iter().any(|part| part.len() != each) || each * parts.len() != bytes {
            return Err(Error::invalid(format!(
                "the pictures of a batch are not all of the size that its shape {shape:?} says"
            )));
        }
        Tensor::from_fill(self.device, shape, dtype, &mut |first, target| {
            let mut filled = 0;
            while filled < target.len() {
                let (part, offset) = ((first + filled) / each, (first + filled) % each);
                let count = (each - offset).min(target.len() - filled);
                target[filled..filled + count].copy_from_slice(&parts[part][offset..offset + count]);
                filled += count;
            }
            Ok(())
        })
    }
}
