//! A latent autoencoder (`AutoencoderKL`). This file holds its decoder, from latents to images; [`VaeEncoder`] goes the other way.
//!
//! A 3×3 convolution, a middle of two residual blocks with self-attention between them, then per resolution, deepest first,
//! residual blocks and, but for the last, nearest 2× upsampling with a 3×3 convolution; group normalisation, SiLU and a 3×3
//! convolution at the end. A residual block is `shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))`, its shortcut a 1×1
//! convolution where the channels change. Parameters have the names of the diffusers library.

mod attention;
mod encoder;
mod packing;

use self::attention::MidAttention;
pub use self::encoder::VaeEncoder;
use self::packing::Statistics;
use super::config::VaeConfig;
use super::limits::{DeviceLimits, vectors};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::layers::{ConvLayer, Described, Group, GroupNorm, Loader, ParamSource, module};
use crate::ops::conv::{Activation, Input, conv2d, conv2d_f32, upsample_conv3x3};
use crate::ops::group_norm::{group_norm, group_norm_in_place};
use crate::ops::latent::denormalize_latent;
use crate::profile;
use crate::tensor::Tensor;

/// The most channels that the group normalisation's kernels take.
const MAX_NORM_CHANNELS: usize = 2048;

/// ε of all group normalisations.
const EPSILON: f32 = 1e-6;

module! {
    /// The decoder.
    pub struct VaeDecoder<K> {
        /// Of packed latents.
        statistics: Option<Statistics<K>>,
        /// 1×1 before the rest.
        before: Option<ConvLayer<K>>,
        input: ConvLayer<K>,
        mid: Middle<K>,
        /// Deepest first.
        blocks: Vec<UpBlock<K>>,
        norm: GroupNorm<K>,
        output: ConvLayer<K>,
        ;
        config: VaeConfig,
    }
}

module! {
    /// The residual blocks of one resolution, and what leads to the next.
    struct UpBlock<K> {
        residual: Vec<ResidualBlock<K>>,
        upsample: Option<ConvLayer<K>>,
    }
}

module! {
    /// The middle of encoder and decoder.
    struct Middle<K> {
        first: ResidualBlock<K>,
        attention: Option<MidAttention<K>>,
        second: ResidualBlock<K>,
    }
}

module! {
    /// Two convolutions around which the input is carried.
    struct ResidualBlock<K> {
        norm1: GroupNorm<K>,
        conv1: ConvLayer<K>,
        norm2: GroupNorm<K>,
        conv2: ConvLayer<K>,
        shortcut: Option<ConvLayer<K>>,
    }
}

impl DeviceLimits for VaeConfig {
    const PART: &'static str = "VAE";

    fn cuda_obstacle(&self) -> Option<String> {
        let mut widths = vec![("latent channels", self.latent_channels)];
        widths.extend(self.block_out_channels.iter().map(|&width| ("block width", width)));
        let (widest, deepest) = (self.block_out_channels.iter().max(), self.block_out_channels.last());
        let beyond = |width: Option<&usize>, most: usize, what: &str| {
            width
                .filter(|width| **width > most)
                .map(|width| format!("a block width of {width} is more than {what} takes, {most}"))
        };
        vectors(&widths)
            .or_else(|| beyond(widest, MAX_NORM_CHANNELS, "the group normalisation"))
            .or_else(|| {
                let deepest = deepest.filter(|_| self.mid_block_add_attention);
                beyond(deepest, attention::WIDEST, "the attention")
            })
    }
}

fn conv(name: &str, kernel: usize, inputs: usize, outputs: usize, arranged: Option<Input>) -> ConvLayer<Described> {
    ConvLayer::new(Group::Other, name, kernel, &[inputs], outputs, arranged)
}

fn norm(config: &VaeConfig, name: &str, channels: usize) -> GroupNorm<Described> {
    GroupNorm::new(Group::Other, name, channels, config.norm_num_groups, EPSILON)
}

impl ResidualBlock<Described> {
    fn describe(config: &VaeConfig, name: &str, inputs: usize, outputs: usize) -> Self {
        let same = Some(Input::Same);
        let shortcut = || conv(&format!("{name}.conv_shortcut"), 1, inputs, outputs, same);
        ResidualBlock {
            norm1: norm(config, &format!("{name}.norm1"), inputs),
            conv1: conv(&format!("{name}.conv1"), 3, inputs, outputs, same),
            norm2: norm(config, &format!("{name}.norm2"), outputs),
            conv2: conv(&format!("{name}.conv2"), 3, outputs, outputs, same),
            shortcut: (inputs != outputs).then(shortcut),
        }
    }

    /// The residual blocks of a resolution: all but the first keep its channels.
    fn describe_all(config: &VaeConfig, name: &str, count: usize, inputs: usize, outputs: usize) -> Vec<Self> {
        let block = |index: usize| {
            let inputs = if index == 0 { inputs } else { outputs };
            Self::describe(config, &format!("{name}.resnets.{index}"), inputs, outputs)
        };
        (0..count).map(block).collect()
    }
}

impl Middle<Described> {
    fn describe(config: &VaeConfig, name: &str, channels: usize) -> Self {
        let residual =
            |index: usize| ResidualBlock::describe(config, &format!("{name}.resnets.{index}"), channels, channels);
        let attention = || MidAttention::describe(config, &format!("{name}.attentions.0"), channels);
        Middle {
            first: residual(0),
            attention: config.mid_block_add_attention.then(attention),
            second: residual(1),
        }
    }
}

impl Middle {
    /// Takes its input, so that each image is freed as soon as the next no longer needs it.
    fn forward(&self, x: Tensor) -> Result<Tensor> {
        let mut x = self.first.forward(x)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(x)?;
        }
        self.second.forward(x)
    }

    /// Makes the attention's head as wide as the device's kernels want it, after loading.
    fn fill_up(&mut self, device: &Device) -> Result<()> {
        match &mut self.attention {
            Some(attention) => attention.fill_up(device),
            None => Ok(()),
        }
    }
}

impl VaeDecoder<Described> {
    /// The decoder whose parameters are named `decoder.…`.
    pub fn describe(config: &VaeConfig) -> Self {
        let widths = &config.block_out_channels;
        let deepest = widths.last().copied().unwrap_or(1);
        let mut width = deepest;
        let mut blocks = Vec::with_capacity(widths.len());
        for (index, &outputs) in widths.iter().rev().enumerate() {
            let name = format!("decoder.up_blocks.{index}");
            let upsample = || {
                let name = format!("{name}.upsamplers.0.conv");
                conv(&name, 3, outputs, outputs, Some(Input::Upsampled))
            };
            blocks.push(UpBlock {
                residual: ResidualBlock::describe_all(config, &name, config.layers_per_block + 1, width, outputs),
                upsample: (index + 1 < widths.len()).then(upsample),
            });
            width = outputs;
        }
        let same = Some(Input::Same);
        let before = || {
            let channels = config.latent_channels;
            conv("post_quant_conv", 1, channels, channels, same)
        };
        VaeDecoder {
            statistics: Statistics::describe(config),
            before: config.use_post_quant_conv.then(before),
            input: conv("decoder.conv_in", 3, config.latent_channels, deepest, same),
            mid: Middle::describe(config, "decoder.mid_block", deepest),
            blocks,
            norm: norm(config, "decoder.conv_norm_out", width),
            output: conv("decoder.conv_out", 3, width, config.out_channels, same),
            config: config.clone(),
        }
    }
}

impl VaeDecoder {
    /// Reads the decoder whose parameters are named `decoder.…`.
    ///
    /// # Errors
    /// When the configuration is not supported, a parameter is missing or has another shape, the device's kernels cannot take
    /// its sizes, or it has no room.
    pub fn load(params: &dyn ParamSource, device: &Device, config: &VaeConfig) -> Result<Self> {
        config.check().map_err(Error::invalid)?;
        config.ensure_runs_on(device)?;
        let mut vae = Loader::load(&VaeDecoder::describe(config), params, device, &mut |_, _| Ok(()))?;
        vae.mid.fill_up(device)?;
        vae.statistics.as_mut().map_or(Ok(()), |own| own.arrange(device))?;
        Ok(vae)
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
        latent.ensure_rank("vae", "latent", 4, "[batch, rows, columns, channels]")?;
        let mut x = match &self.statistics {
            Some(statistics) => statistics.unpack(latent)?,
            None => denormalize_latent(latent, config.scaling_factor, config.shift_factor)?,
        };
        if let Some(before) = &self.before {
            x = conv2d(&x, None, before, Activation::None, None)?;
        }
        x = conv2d(&x, None, &self.input, Activation::None, None)?;
        x = self.mid.forward(x)?;
        for block in &self.blocks {
            for residual in &block.residual {
                x = residual.forward(x)?;
            }
            if let Some(conv) = &block.upsample {
                x = upsample_conv3x3(&x, conv)?;
            }
        }
        group_norm_in_place(&mut x, &self.norm.op(), Activation::Silu)?;
        conv2d_f32(&x, &self.output, 1.0)
    }
}

impl ResidualBlock {
    /// Takes its input, so that each image is freed as soon as the next no longer needs it.
    fn forward(&self, mut x: Tensor) -> Result<Tensor> {
        let (mut hidden, carried) = match &self.shortcut {
            // Carried in another form, so that the input itself can be normalised in place.
            Some(shortcut) => {
                let carried = conv2d(&x, None, shortcut, Activation::None, None)?;
                group_norm_in_place(&mut x, &self.norm1.op(), Activation::Silu)?;
                (x, carried)
            }
            None => (group_norm(&x, &self.norm1.op(), Activation::Silu)?, x),
        };
        hidden = conv2d(&hidden, None, &self.conv1, Activation::None, None)?;
        group_norm_in_place(&mut hidden, &self.norm2.op(), Activation::Silu)?;
        conv2d(&hidden, None, &self.conv2, Activation::None, Some(&carried))
    }
}
