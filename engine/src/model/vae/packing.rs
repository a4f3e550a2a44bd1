//! Latents that are packed 2×2 and normalised by statistics of every channel, as FLUX.2's autoencoder has them.
//!
//! A cell of the transformer is four of the autoencoder's: channel `4c + 2i + j` is channel c of row i, column j. It is normalised as
//! `(x − mean) / sqrt(variance + ε)`. What the decoder takes of it is one product with a matrix that has one number a row.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::layers::{Bare, Described, Group, module};
use crate::model::config::VaeConfig;
use crate::ops::cast::cast;
use crate::ops::linear::linear;
use crate::ops::unpatchify::unpatchify;
use crate::tensor::Tensor;

/// Cells of the autoencoder along a side of a packed one.
const SIDE: usize = 2;

module! {
    /// Means and variances of a packed latent's channels.
    pub(super) struct Statistics<K> {
        /// `[4 · latent channels]`
        mean: Bare<K>,
        /// Likewise.
        variance: Bare<K>,
        ;
        epsilon: f32,
        ; made
        /// The matrix `[4 · latent channels, same]` that unpacks, and what it adds.
        unpacking: Option<[Tensor; 2]>,
    }
}

impl Statistics<Described> {
    /// Those of an autoencoder that packs.
    pub fn describe(config: &VaeConfig) -> Option<Self> {
        let of = |name: &str| Bare::new(Group::Other, format!("bn.running_{name}"), &[config.cell_channels()]);
        config.batch_norm_eps.map(|epsilon| Statistics {
            mean: of("mean"),
            variance: of("var"),
            epsilon,
            unpacking: None,
        })
    }
}

impl Statistics {
    /// Mean and deviation of every channel.
    fn values(&self) -> Result<[Vec<f32>; 2]> {
        let variances = self.variance.tensor().to_vec_f32()?;
        if let Some(variance) = variances
            .iter()
            .find(|variance| !(variance.is_finite() && **variance >= 0.0))
        {
            return Err(Error::invalid(format!(
                "the VAE's tensor `bn.running_var` holds {variance}, which is no variance; the file is damaged"
            )));
        }
        let deviations = variances.into_iter().map(|variance| (variance + self.epsilon).sqrt());
        Ok([self.mean.tensor().to_vec_f32()?, deviations.collect()])
    }

    /// Makes what [`Statistics::unpack`] multiplies by, after loading.
    pub fn arrange(&mut self, device: &Device) -> Result<()> {
        let [means, deviations] = self.values()?;
        let all = means.len();
        let channels = all / (SIDE * SIDE);
        let (mut matrix, mut added) = (vec![0.0; all * all], vec![0.0; all]);
        for packed in 0..all {
            let unpacked = packed % (SIDE * SIDE) * channels + packed / (SIDE * SIDE);
            matrix[unpacked * all + packed] = deviations[packed];
            added[unpacked] = means[packed];
        }
        let matrix = Tensor::from_f32(device, &matrix, [all, all])?;
        self.unpacking = Some([matrix, Tensor::from_f32(device, &added, [all])?]);
        Ok(())
    }

    /// What the decoder takes, in the compute type, of a normalised latent `[batch, rows, columns, 4 · channels]` in f32: twice the rows
    /// and columns of `channels`.
    pub fn unpack(&self, latent: &Tensor) -> Result<Tensor> {
        let Some([matrix, added]) = &self.unpacking else {
            return Err(Error::invalid("vae: the statistics of latents are not arranged"));
        };
        let [batch, rows, columns, all] = [0, 1, 2, 3].map(|axis| latent.dim(axis));
        let compute = latent.device().compute_dtype();
        let cells = cast(latent, compute)?.reshape([batch, rows * columns, all])?;
        let unpacked = linear(&cells, matrix, Some(added))?;
        let channels = matrix.dim(0) / (SIDE * SIDE);
        cast(
            &unpatchify(&unpacked, SIDE * rows, SIDE * columns, SIDE, channels, 1.0)?,
            compute,
        )
    }

    /// The normalised latent, packed, of means `[rows, columns, channels]` row by row of one item after the other.
    pub fn pack(&self, means: &[f32], [rows, columns, channels]: [usize; 3]) -> Result<Vec<f32>> {
        let [shifts, deviations] = self.values()?;
        let item = rows * columns * channels;
        let mut packed = Vec::with_capacity(means.len());
        for means in means.chunks(item.max(1)) {
            for cell in 0..rows / SIDE * (columns / SIDE) {
                let (row, column) = (cell / (columns / SIDE) * SIDE, cell % (columns / SIDE) * SIDE);
                packed.extend((0..channels * SIDE * SIDE).map(|index| {
                    let (row, column) = (row + index % (SIDE * SIDE) / SIDE, column + index % SIDE);
                    let mean = means[(row * columns + column) * channels + index / (SIDE * SIDE)];
                    (mean - shifts[index]) / deviations[index]
                }));
            }
        }
        Ok(packed)
    }
}
