//! A latent autoencoder (`AutoencoderKL`). This file holds its decoder, from latents to images; [`VaeEncoder`] goes the other way.
//!
//! A 3×3 convolution, a middle of two residual blocks with self-attention between them, then per resolution, deepest first,
//! residual blocks and, but for the last, nearest 2× upsampling with a 3×3 convolution; group normalisation, SiLU and a 3×3
//! convolution at the end. A residual block is `shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))`, its shortcut a 1×1
//! convolution where the channels change. Parameters have the names of the diffusers library.

mod attention;
mod encoder;

use self::attention::MidAttention;
pub(super) use self::attention::WIDEST as WIDEST_ATTENTION;
pub use self::encoder::VaeEncoder;
use super::config::VaeConfig;
use super::limits::DeviceLimits;
use super::params::ParamSource;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::conv::{Activation, Conv, Input, conv2d, conv2d_f32, upsample_conv3x3};
use crate::ops::group_norm::{GroupNorm, group_norm, group_norm_in_place};
use crate::ops::latent::denormalize_latent;
use crate::profile;
use crate::tensor::Tensor;

/// ε of all group normalisations.
const EPSILON: f32 = 1e-6;

/// The decoder's parameters.
pub struct VaeDecoder {
    config: VaeConfig,
    input: Conv,
    mid: [ResidualBlock; 2],
    attention: Option<MidAttention>,
    /// Deepest first.
    blocks: Vec<UpBlock>,
    norm: GroupNorm,
    output: Conv,
}

/// The residual blocks of one resolution, and what leads to the next.
struct UpBlock {
    residual: Vec<ResidualBlock>,
    upsample: Option<Conv>,
}

impl VaeDecoder {
    /// Reads the decoder whose parameters are named `decoder.…`.
    ///
    /// # Errors
    /// When the configuration is not supported, a parameter is missing or has another shape, the device's kernels cannot take
    /// its sizes, or it has no room.
    pub fn load(params: &dyn ParamSource, device: &Device, config: &VaeConfig) -> Result<Self> {
        config.check().map_err(Error::invalid)?;
        config.expect_runs_on(device)?;
        let loader = Loader { params, device, config };
        let deepest = config.block_out_channels[config.block_out_channels.len() - 1];
        let mut width = deepest;
        let mut blocks = Vec::with_capacity(config.block_out_channels.len());
        for (index, &outputs) in config.block_out_channels.iter().rev().enumerate() {
            let name = format!("decoder.up_blocks.{index}");
            let mut residual = Vec::with_capacity(config.layers_per_block + 1);
            for layer in 0..=config.layers_per_block {
                residual.push(loader.residual_block(&format!("{name}.resnets.{layer}"), width, outputs)?);
                width = outputs;
            }
            let last = index + 1 == config.block_out_channels.len();
            let upsample = match last {
                true => None,
                false => Some(loader.upsampling_conv(&format!("{name}.upsamplers.0.conv"), width)?),
            };
            blocks.push(UpBlock { residual, upsample });
        }
        let mid = |index| loader.residual_block(&format!("decoder.mid_block.resnets.{index}"), deepest, deepest);
        let attention = match config.mid_block_add_attention {
            true => Some(MidAttention::load(&loader, "decoder.mid_block.attentions.0", deepest)?),
            false => None,
        };
        Ok(VaeDecoder {
            config: config.clone(),
            input: loader.conv("decoder.conv_in", 3, config.latent_channels, deepest)?,
            mid: [mid(0)?, mid(1)?],
            attention,
            blocks,
            norm: loader.norm("decoder.conv_norm_out", width)?,
            output: loader.conv("decoder.conv_out", 3, width, config.out_channels)?,
        })
    }

    /// The autoencoder's sizes.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// The image `[batch, height, width, channels]` in f32 of the normalised latent `[batch, rows, columns, latent channels]`
    /// in f32, with [`VaeConfig::downsampling`] times its rows and columns.
    ///
    /// # Errors
    /// When shapes do not fit or the device has no room.
    pub fn decode(&self, latent: &Tensor) -> Result<Tensor> {
        let _range = profile::range(c"vae decode");
        let config = &self.config;
        latent.expect_rank("vae", "latent", 4, "[batch, rows, columns, channels]")?;
        let mut x = denormalize_latent(latent, config.scaling_factor, config.shift_factor)?;
        x = conv2d(&x, None, &self.input, Activation::None, None)?;
        x = self.mid[0].forward(x)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(x)?;
        }
        x = self.mid[1].forward(x)?;
        for block in &self.blocks {
            for residual in &block.residual {
                x = residual.forward(x)?;
            }
            if let Some(conv) = &block.upsample {
                x = upsample_conv3x3(&x, conv)?;
            }
        }
        group_norm_in_place(&mut x, &self.norm, Activation::Silu)?;
        conv2d_f32(&x, &self.output, 1.0)
    }
}

/// Two convolutions around which the input is carried.
struct ResidualBlock {
    norms: [GroupNorm; 2],
    convs: [Conv; 2],
    shortcut: Option<Conv>,
}

impl ResidualBlock {
    /// Takes its input, so that each image is freed as soon as the next no longer needs it.
    fn forward(&self, mut x: Tensor) -> Result<Tensor> {
        let (mut hidden, carried) = match &self.shortcut {
            // Carried in another form, so that the input itself can be normalised in place.
            Some(shortcut) => {
                let carried = conv2d(&x, None, shortcut, Activation::None, None)?;
                group_norm_in_place(&mut x, &self.norms[0], Activation::Silu)?;
                (x, carried)
            }
            None => (group_norm(&x, &self.norms[0], Activation::Silu)?, x),
        };
        hidden = conv2d(&hidden, None, &self.convs[0], Activation::None, None)?;
        group_norm_in_place(&mut hidden, &self.norms[1], Activation::Silu)?;
        conv2d(&hidden, None, &self.convs[1], Activation::None, Some(&carried))
    }
}

/// Reads layers of known shapes by name.
struct Loader<'a> {
    params: &'a dyn ParamSource,
    device: &'a Device,
    config: &'a VaeConfig,
}

impl Loader<'_> {
    fn vector(&self, name: &str, size: usize) -> Result<Tensor> {
        self.params.load(self.device, name, &[size])
    }

    fn conv(&self, name: &str, kernel: usize, inputs: usize, outputs: usize) -> Result<Conv> {
        self.plain_conv(name, kernel, inputs, outputs)?.arranged(Input::Same)
    }

    fn upsampling_conv(&self, name: &str, channels: usize) -> Result<Conv> {
        self.plain_conv(name, 3, channels, channels)?.arranged(Input::Upsampled)
    }

    fn plain_conv(&self, name: &str, kernel: usize, inputs: usize, outputs: usize) -> Result<Conv> {
        let [weight, bias] = self.conv_params(name, kernel, inputs, outputs)?;
        Conv::new(weight, bias, kernel, &[inputs])
    }

    /// Weight and bias of a convolution.
    fn conv_params(&self, name: &str, kernel: usize, inputs: usize, outputs: usize) -> Result<[Tensor; 2]> {
        let weight = format!("{name}.weight");
        let expected = [outputs, inputs, kernel, kernel];
        match self.params.shape(&weight) {
            Some(found) if found[..] == expected => {}
            Some(found) => {
                return Err(Error::invalid(format!(
                    "autoencoder: `{weight}` has shape {found:?}, the configuration calls for {expected:?}"
                )));
            }
            None => return Err(Error::invalid(format!("autoencoder: there is no parameter `{weight}`"))),
        }
        let bias = self.vector(&format!("{name}.bias"), outputs)?;
        Ok([self.params.load_conv(self.device, &weight)?, bias])
    }

    fn norm(&self, name: &str, channels: usize) -> Result<GroupNorm> {
        Ok(GroupNorm {
            weight: self.vector(&format!("{name}.weight"), channels)?,
            bias: self.vector(&format!("{name}.bias"), channels)?,
            groups: self.config.norm_num_groups,
            epsilon: EPSILON,
        })
    }

    fn residual_block(&self, name: &str, inputs: usize, outputs: usize) -> Result<ResidualBlock> {
        let norm = |index: usize, channels| self.norm(&format!("{name}.norm{index}"), channels);
        let conv = |index: usize, inputs| self.conv(&format!("{name}.conv{index}"), 3, inputs, outputs);
        let shortcut = match inputs == outputs {
            true => None,
            false => Some(self.conv(&format!("{name}.conv_shortcut"), 1, inputs, outputs)?),
        };
        Ok(ResidualBlock {
            norms: [norm(1, inputs)?, norm(2, outputs)?],
            convs: [conv(1, inputs)?, conv(2, outputs)?],
            shortcut,
        })
    }
}
