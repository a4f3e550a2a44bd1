//! The encoder of a latent autoencoder (`AutoencoderKL`): from images to latents.
//!
//! A 3×3 convolution, then per resolution, finest first, residual blocks and, but for the last, a 3×3 convolution of stride 2;
//! a middle like the decoder's; group normalisation, SiLU and a 3×3 convolution to the mean and the log variance of a
//! distribution, of which the mean is used: latent = (mean − shift_factor) · scaling_factor.

use super::{Middle, ResidualBlock, Statistics, conv, norm};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::layers::{ConvLayer, Described, GroupNorm, Loader, ParamSource, module};
use crate::model::DeviceLimits;
use crate::model::config::VaeConfig;
use crate::ops::conv::{Activation, Input, conv2d, conv2d_f32};
use crate::ops::downsample_conv::downsample_conv3x3;
use crate::ops::group_norm::group_norm;
use crate::profile;
use crate::tensor::Tensor;

module! {
    /// The encoder.
    pub struct VaeEncoder<K> {
        input: ConvLayer<K>,
        /// Finest first.
        blocks: Vec<DownBlock<K>>,
        mid: Middle<K>,
        norm: GroupNorm<K>,
        output: ConvLayer<K>,
        /// 1×1 after the rest.
        after: Option<ConvLayer<K>>,
        /// Of packed latents.
        statistics: Option<Statistics<K>>,
        ;
        config: VaeConfig,
    }
}

module! {
    /// The residual blocks of one resolution, and the convolution of stride 2 that leads to the next.
    struct DownBlock<K> {
        residual: Vec<ResidualBlock<K>>,
        downsample: Option<ConvLayer<K>>,
    }
}

impl VaeEncoder<Described> {
    /// The encoder whose parameters are named `encoder.…`.
    pub fn describe(config: &VaeConfig) -> Self {
        let widths = &config.block_out_channels;
        let first = widths.first().copied().unwrap_or(1);
        let mut width = first;
        let mut blocks = Vec::with_capacity(widths.len());
        for (index, &outputs) in widths.iter().enumerate() {
            let name = format!("encoder.down_blocks.{index}");
            let downsample = || conv(&format!("{name}.downsamplers.0.conv"), 3, outputs, outputs, None);
            blocks.push(DownBlock {
                residual: ResidualBlock::describe_all(config, &name, config.layers_per_block, width, outputs),
                downsample: (index + 1 < widths.len()).then(downsample),
            });
            width = outputs;
        }
        let (same, moments) = (Some(Input::Same), 2 * config.latent_channels);
        let after = config.use_quant_conv && config.batch_norm_eps.is_some();
        VaeEncoder {
            input: conv("encoder.conv_in", 3, config.out_channels, first, same),
            blocks,
            mid: Middle::describe(config, "encoder.mid_block", width),
            norm: norm(config, "encoder.conv_norm_out", width),
            output: conv("encoder.conv_out", 3, width, moments, same),
            after: after.then(|| conv("quant_conv", 1, moments, moments, same)),
            statistics: Statistics::describe(config),
            config: config.clone(),
        }
    }
}

impl VaeEncoder {
    /// Reads the encoder whose parameters are named `encoder.…`.
    ///
    /// # Errors
    /// When the configuration is not supported, a parameter is missing or has another shape, the device's kernels cannot take
    /// its sizes, or it has no room.
    pub fn load(params: &dyn ParamSource, device: &Device, config: &VaeConfig) -> Result<Self> {
        config.check().map_err(Error::invalid)?;
        config.ensure_runs_on(device)?;
        if params.shape("quant_conv.weight").is_some() && config.batch_norm_eps.is_none() {
            return Err(Error::invalid(
                "the VAE has a convolution after its encoder (quant_conv), which is not supported",
            ));
        }
        let mut vae = Loader::load(&VaeEncoder::describe(config), params, device, &mut |_, _| Ok(()))?;
        vae.mid.fill_up(device)?;
        Ok(vae)
    }

    /// Mean and log variance `[batch, rows, columns, 2 · latent channels]` in f32, the mean first, of the image
    /// `[batch, height, width, channels]` in f32; its sides are [`VaeConfig::downsampling`] times the rows and columns.
    ///
    /// # Errors
    /// When shapes do not fit or the device has no room.
    pub fn encode(&self, image: &Tensor) -> Result<Tensor> {
        let _range = profile::range(c"vae encode");
        image.ensure_rank("vae", "image", 4, "[batch, height, width, channels]")?;
        let factor = self.config.downsampling();
        if [image.dim(1), image.dim(2)]
            .iter()
            .any(|side| side % factor != 0 || *side == 0)
        {
            return Err(Error::invalid(format!(
                "vae: an image of {}x{} has no latent: its sides must be multiples of {factor}",
                image.dim(2),
                image.dim(1)
            )));
        }
        let mut x = conv2d(image, None, &self.input, Activation::None, None)?;
        for block in &self.blocks {
            for residual in &block.residual {
                x = residual.forward(x)?;
            }
            if let Some(conv) = &block.downsample {
                x = downsample_conv3x3(&x, conv.weight(), conv.bias())?;
            }
        }
        x = self.mid.forward(x)?;
        x = group_norm(&x, &self.norm.op(), Activation::Silu)?;
        match &self.after {
            Some(after) => conv2d_f32(&conv2d(&x, None, &self.output, Activation::None, None)?, after, 1.0),
            None => conv2d_f32(&x, &self.output, 1.0),
        }
    }

    /// The normalised latent `[batch, rows, columns, latent channels]` of an image, row-major on the host.
    ///
    /// # Errors
    /// As for [`VaeEncoder::encode`].
    pub fn latent(&self, image: &Tensor) -> Result<(Vec<f32>, [usize; 4])> {
        let moments = self.encode(image)?;
        let VaeConfig {
            latent_channels,
            scaling_factor,
            shift_factor,
            ..
        } = self.config;
        let values = moments.to_vec::<f32>()?;
        let means = values
            .chunks(2 * latent_channels)
            .flat_map(|cell| &cell[..latent_channels]);
        if let Some(statistics) = &self.statistics {
            let [batch, rows, columns] = [0, 1, 2].map(|axis| moments.dim(axis));
            let means: Vec<f32> = means.copied().collect();
            let latent = statistics.pack(&means, [rows, columns, latent_channels])?;
            let packing = self.config.packing();
            let shape = [batch, rows / packing, columns / packing, self.config.cell_channels()];
            return Ok((latent, shape));
        }
        let latent = means.map(|mean| (mean - shift_factor) * scaling_factor).collect();
        Ok((
            latent,
            [moments.dim(0), moments.dim(1), moments.dim(2), latent_channels],
        ))
    }
}
