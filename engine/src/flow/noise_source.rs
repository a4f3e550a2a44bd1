//! Where a picture's noise comes from: its own seed, through one of two generators.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use super::TorchNormal;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::noise::{NoiseOrigin, normal_noise, normal_noise_items};
use crate::tensor::Tensor;

/// A generator of unit normal noise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NoiseSource {
    /// Philox 4×32-10, the same bits on CPU and CUDA.
    #[default]
    Philox,
    /// PyTorch's CPU generator, `torch.manual_seed(seed); torch.randn(1, channels, height, width)`.
    Torch,
}

impl NoiseSource {
    /// Noise `[seeds, height, width, channels]` in f32; an item depends on its own seed alone.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn noise(self, device: &Device, seeds: &[u64], [height, width, channels]: [usize; 3]) -> Result<Tensor> {
        let item = height * width * channels;
        let shape = [seeds.len(), height, width, channels];
        match (self, seeds) {
            (NoiseSource::Philox, [seed]) => normal_noise(device, shape, *seed, 0),
            (NoiseSource::Philox, _) => {
                let origins: Vec<_> = seeds.iter().map(|&seed| NoiseOrigin { seed, stream: 0 }).collect();
                normal_noise_items(device, &origins, &shape[1..])
            }
            (NoiseSource::Torch, _) => {
                let mut values = vec![0.0; seeds.len() * item];
                for (target, &seed) in values.chunks_mut(item).zip(seeds) {
                    let planes = TorchNormal::new(seed).sample(item);
                    for (index, value) in planes.into_iter().enumerate() {
                        let (channel, cell) = (index / (height * width), index % (height * width));
                        target[cell * channels + channel] = value;
                    }
                }
                Tensor::from_slice(device, &values, shape)
            }
        }
    }
}

impl FromStr for NoiseSource {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "philox" => Ok(NoiseSource::Philox),
            "torch" => Ok(NoiseSource::Torch),
            _ => Err(Error::invalid(format!(
                "`{text}` names no generator; use philox or torch"
            ))),
        }
    }
}

impl fmt::Display for NoiseSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NoiseSource::Philox => "philox",
            NoiseSource::Torch => "torch",
        })
    }
}
