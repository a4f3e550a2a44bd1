//! Features of pictures by a model's own VAE, where no foreign network is wanted: the mean latent, in the model's units, averaged over
//! each cell of a grid laid over the picture; one value per cell and latent channel.
//!
//! Such features see colours and coarse shapes as the VAE does, and no more: distances between them compare models that draw for the same
//! VAE's data, and are no FID of anybody else's.

use std::path::{Path, PathBuf};

use anyhow::bail;
use l2p_engine::checkpoint::{Checkpoint, ModelPaths, open_vae};
use l2p_engine::device::MemoryTag;
use l2p_engine::image_io::{Filter, RgbImage, read_cover};
use l2p_engine::model::config::VaeConfig;
use l2p_engine::model::vae::VaeEncoder;
use l2p_engine::ops::from_rgb8::from_rgb8;
use l2p_engine::{Device, Error, Tensor};
use nalgebra::DMatrix;
use rayon::prelude::*;

use super::folders;

/// Pictures that are decoded, and on a GPU encoded, together.
const CHUNK: usize = 8;

/// The side of pictures where the model does not say.
const SIDE: usize = 512;

/// A VAE's encoder on its device.
pub struct Extractor {
    device: Device,
    encoder: VaeEncoder,
    /// Pixels along a side of the pictures.
    pub side: usize,
    /// Cells along a side of the grid.
    pub grid: usize,
    /// Channels of a latent.
    pub channels: usize,
}

impl Extractor {
    /// That of the model at `paths`.
    ///
    /// # Errors
    /// When there is no VAE, it cannot be loaded, or the side cannot be divided so.
    pub fn open(paths: &ModelPaths, device: Device, side: Option<usize>, grid: usize) -> anyhow::Result<Self> {
        let (config, checkpoint) = open_vae(paths.vae()?)?;
        let side = side.or(paths.defaults.width).unwrap_or(SIDE);
        let multiple = config.downsampling() * grid;
        if !side.is_multiple_of(multiple) {
            bail!(
                "pictures of {side} pixels have no grid of {grid}x{grid} cells in this VAE: give a --side that is a multiple of \
                 {multiple}, such as {}",
                side.next_multiple_of(multiple)
            );
        }
        Ok(Extractor {
            channels: config.latent_channels,
            encoder: load(&checkpoint, &device, &config)?,
            device,
            side,
            grid,
        })
    }

    /// What the features are, in words.
    pub fn describe(&self) -> String {
        format!(
            "mean latents of the model's own VAE at {side}x{side} pixels, averaged over a grid of {grid}x{grid}: {} dimensions",
            self.dimensions(),
            side = self.side,
            grid = self.grid
        )
    }

    /// Values per picture.
    pub fn dimensions(&self) -> usize {
        self.grid * self.grid * self.channels
    }

    /// The features of all pictures below a folder, a column each. `progress(done, all)` is told of them; an error from it ends the work.
    ///
    /// # Errors
    /// When a picture cannot be read, or has no features that are numbers.
    pub fn features(
        &self,
        folder: &Path,
        progress: &mut dyn FnMut(usize, usize) -> anyhow::Result<()>,
    ) -> anyhow::Result<DMatrix<f64>> {
        let paths: Vec<PathBuf> = folders::pictures(folder)?.into_values().collect();
        let mut values = Vec::with_capacity(paths.len() * self.dimensions());
        for (index, chunk) in paths.chunks(CHUNK).enumerate() {
            progress(index * CHUNK, paths.len())?;
            let images: Vec<RgbImage> = chunk
                .par_iter()
                .map(|path| read_cover(path, self.side, self.side, Filter::default()))
                .collect::<l2p_engine::Result<_>>()?;
            let at_once = match self.device {
                Device::Cpu => 1,
                Device::Cuda(_) => CHUNK,
            };
            for (images, paths) in images.chunks(at_once).zip(chunk.chunks(at_once)) {
                self.encode(images, paths, &mut values)?;
            }
        }
        Ok(DMatrix::from_vec(self.dimensions(), paths.len(), values))
    }

    fn encode(&self, images: &[RgbImage], paths: &[PathBuf], values: &mut Vec<f64>) -> anyhow::Result<()> {
        let bytes: Vec<u8> = images.iter().flat_map(|image| image.pixels()).copied().collect();
        let bytes = Tensor::from_slice(&self.device, &bytes, [images.len(), self.side, self.side, 3])?;
        let (latents, [_, rows, columns, channels]) = self.encoder.latent(&from_rgb8(&bytes)?)?;
        for (latent, path) in latents.chunks(rows * columns * channels).zip(paths) {
            let pooled = pool(latent, [rows, columns, channels], self.grid);
            if pooled.iter().any(|value| !value.is_finite()) {
                return Err(Error::file(path, "has a latent that is not finite: the VAE's weights are damaged").into());
            }
            values.extend(pooled);
        }
        Ok(())
    }
}

fn load(checkpoint: &Checkpoint, device: &Device, config: &VaeConfig) -> l2p_engine::Result<VaeEncoder> {
    let _tag = MemoryTag::Weights.scope();
    VaeEncoder::load(checkpoint, device, config).map_err(|error| match error {
        Error::Invalid(reason) => Error::file(checkpoint.path(), reason),
        error => error,
    })
}

/// The means over the cells of a grid, cells row by row, channels innermost.
fn pool(latent: &[f32], [rows, columns, channels]: [usize; 3], grid: usize) -> Vec<f64> {
    let mut sums = vec![0.0; grid * grid * channels];
    for (place, values) in latent.chunks(channels).enumerate() {
        let (row, column) = (place / columns * grid / rows, place % columns * grid / columns);
        let cell = &mut sums[(row * grid + column) * channels..][..channels];
        cell.iter_mut()
            .zip(values)
            .for_each(|(sum, value)| *sum += f64::from(*value));
    }
    let count = (rows * columns / (grid * grid)) as f64;
    sums.iter_mut().for_each(|sum| *sum /= count);
    sums
}

#[cfg(test)]
mod tests {
    use super::pool;

    #[test]
    fn cells_are_averaged_one_by_one() {
        // 2 rows, 4 columns, 2 channels.
        let latent: Vec<f32> = (0..16).map(|index| index as f32).collect();
        assert_eq!(pool(&latent, [2, 4, 2], 1), [7.0, 8.0]);
        assert_eq!(pool(&latent, [2, 4, 2], 2), [1.0, 2.0, 5.0, 6.0, 9.0, 10.0, 13.0, 14.0]);
    }
}
