//! The encoder of a latent autoencoder (`AutoencoderKL`): from images to latents.
//!
//! A 3×3 convolution, then per resolution, finest first, residual blocks and, but for the last, a 3×3 convolution of stride 2;
//! a middle like the decoder's; group normalisation, SiLU and a 3×3 convolution to the mean and the log variance of a
//! distribution, of which the mean is used: latent = (mean − shift_factor) · scaling_factor.

use super::attention::MidAttention;
use super::{Loader, ResidualBlock};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::DeviceLimits;
use crate::model::config::VaeConfig;
use crate::model::params::ParamSource;
use crate::ops::conv::{Activation, Conv, conv2d, conv2d_f32};
use crate::ops::downsample_conv::downsample_conv3x3;
use crate::ops::group_norm::{GroupNorm, group_norm};
use crate::profile;
use crate::tensor::Tensor;

/// The encoder's parameters.
pub struct VaeEncoder {
    config: VaeConfig,
    input: Conv,
    /// Finest first.
    blocks: Vec<DownBlock>,
    mid: [ResidualBlock; 2],
    attention: Option<MidAttention>,
    norm: GroupNorm,
    output: Conv,
}

/// The residual blocks of one resolution, and what leads to the next.
struct DownBlock {
    residual: Vec<ResidualBlock>,
    downsample: Option<Downsample>,
}

/// Weight and bias of a convolution of stride 2.
struct Downsample {
    weight: Tensor,
    bias: Tensor,
}

impl VaeEncoder {
    /// Reads the encoder whose parameters are named `encoder.…`.
    ///
    /// # Errors
    /// When the configuration is not supported, a parameter is missing or has another shape, the device's kernels cannot take
    /// its sizes, or it has no room.
    pub fn load(params: &dyn ParamSource, device: &Device, config: &VaeConfig) -> Result<Self> {
        config.check().map_err(Error::invalid)?;
        config.expect_runs_on(device)?;
        if params.shape("quant_conv.weight").is_some() {
            return Err(Error::invalid(
                "the VAE has a convolution after its encoder (quant_conv), which is not supported",
            ));
        }
        let loader = Loader { params, device, config };
        let widths = &config.block_out_channels;
        let mut width = widths[0];
        let input = loader.conv("encoder.conv_in", 3, config.out_channels, width)?;
        let mut blocks = Vec::with_capacity(widths.len());
        for (index, &outputs) in widths.iter().enumerate() {
            let name = format!("encoder.down_blocks.{index}");
            let mut residual = Vec::with_capacity(config.layers_per_block);
            for layer in 0..config.layers_per_block {
                residual.push(loader.residual_block(&format!("{name}.resnets.{layer}"), width, outputs)?);
                width = outputs;
            }
            let downsample = match index + 1 == widths.len() {
                true => None,
                false => {
                    let [weight, bias] = loader.conv_params(&format!("{name}.downsamplers.0.conv"), 3, width, width)?;
                    Some(Downsample { weight, bias })
                }
            };
            blocks.push(DownBlock { residual, downsample });
        }
        let mid = |index| loader.residual_block(&format!("encoder.mid_block.resnets.{index}"), width, width);
        let attention = match config.mid_block_add_attention {
            true => Some(MidAttention::load(&loader, "encoder.mid_block.attentions.0", width)?),
            false => None,
        };
        Ok(VaeEncoder {
            config: config.clone(),
            input,
            blocks,
            mid: [mid(0)?, mid(1)?],
            attention,
            norm: loader.norm("encoder.conv_norm_out", width)?,
            output: loader.conv("encoder.conv_out", 3, width, 2 * config.latent_channels)?,
        })
    }

    /// Mean and log variance `[batch, rows, columns, 2 · latent channels]` in f32, the mean first, of the image
    /// `[batch, height, width, channels]` in f32; its sides are [`VaeConfig::downsampling`] times the rows and columns.
    ///
    /// # Errors
    /// When shapes do not fit or the device has no room.
    pub fn encode(&self, image: &Tensor) -> Result<Tensor> {
        let _range = profile::range(c"vae encode");
        image.expect_rank("vae", "image", 4, "[batch, height, width, channels]")?;
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
            if let Some(Downsample { weight, bias }) = &block.downsample {
                x = downsample_conv3x3(&x, weight, bias)?;
            }
        }
        x = self.mid[0].forward(x)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(x)?;
        }
        x = self.mid[1].forward(x)?;
        x = group_norm(&x, &self.norm, Activation::Silu)?;
        conv2d_f32(&x, &self.output, 1.0)
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
        let latent = means.map(|mean| (mean - shift_factor) * scaling_factor).collect();
        Ok((
            latent,
            [moments.dim(0), moments.dim(1), moments.dim(2), latent_channels],
        ))
    }
}
