//! The self-attention in the middle of the autoencoder: one head over all pixels, with normalisation and residual.

use super::Loader;
use crate::device::{Device, MemoryTag};
use crate::error::{Error, Result};
use crate::ops::attention::{Attention, attention};
use crate::ops::conv::{Activation, Conv, conv2d};
use crate::ops::group_norm::{GroupNorm, group_norm};
use crate::ops::linear::linear;
use crate::tensor::Tensor;

/// Widths of a head that the CUDA kernels know; others are filled up with zeros.
const KERNEL_HEAD_DIMS: [usize; 3] = [64, 128, WIDEST];

/// The most channels that the CUDA kernels can attend over.
pub(in crate::model) const WIDEST: usize = 512;

/// `x + out(attention(q, k, v of norm(x)))`.
pub(super) struct MidAttention {
    norm: GroupNorm,
    /// `[3 · head_dim, channels]`: query, key, value.
    qkv_weight: Tensor,
    /// `[3 · head_dim]`
    qkv_bias: Tensor,
    /// `[channels, head_dim]`, as a 1×1 convolution that adds the residual.
    out: Conv,
    attention: Attention,
}

impl MidAttention {
    /// Reads the layer whose parameters are named `{name}.…`, its head as wide as the device's kernels want it.
    pub fn load(loader: &Loader<'_>, name: &str, channels: usize) -> Result<Self> {
        let head_dim = match loader.device {
            Device::Cpu => channels,
            Device::Cuda(_) => kernel_head_dim(channels)?,
        };
        Self::load_filled_up(loader, name, channels, head_dim)
    }

    /// As [`MidAttention::load`], with a head filled up with zeros to `head_dim`.
    fn load_filled_up(loader: &Loader<'_>, name: &str, channels: usize, head_dim: usize) -> Result<Self> {
        let layers = ["to_q", "to_k", "to_v"];
        let weights = layers.map(|layer| format!("{name}.{layer}.weight"));
        let biases = layers.map(|layer| format!("{name}.{layer}.bias"));
        let out_weight = format!("{name}.to_out.0.weight");
        let (qkv_weight, qkv_bias, out_weight) = if head_dim == channels {
            let (params, device) = (loader.params, loader.device);
            (
                params.load_stacked(device, &as_strs(&weights), &[3 * channels, channels])?,
                params.load_stacked(device, &as_strs(&biases), &[3 * channels])?,
                params.load(device, &out_weight, &[channels, channels])?,
            )
        } else {
            let padding = Padding {
                loader,
                channels,
                head_dim,
            };
            (
                padding.rows(&weights, &[channels, channels])?,
                padding.rows(&biases, &[channels])?,
                padding.columns(&out_weight)?,
            )
        };
        let out_bias = loader.vector(&format!("{name}.to_out.0.bias"), channels)?;
        Ok(MidAttention {
            norm: loader.norm(&format!("{name}.group_norm"), channels)?,
            qkv_weight,
            qkv_bias,
            out: Conv::new(out_weight, out_bias, 1, &[head_dim])?,
            attention: Attention {
                heads: 1,
                kv_heads: 1,
                head_dim,
                causal: false,
                // Zeros that fill up a head change no score, so the scale stays that of the channels.
                scale: 1.0 / (channels as f32).sqrt(),
            },
        })
    }

    /// Takes its input, which is freed on return.
    pub fn forward(&self, x: Tensor) -> Result<Tensor> {
        let (batch, height, width, channels) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
        let normalised = group_norm(&x, &self.norm, Activation::None)?;
        let tokens = normalised.reshape([batch, height * width, channels])?;
        drop(normalised);
        let qkv = linear(&tokens, &self.qkv_weight, Some(&self.qkv_bias))?;
        drop(tokens);
        let attended = attention(&qkv, &self.attention, None)?;
        drop(qkv);
        let attended = attended.reshape([batch, height, width, self.attention.head_dim])?;
        conv2d(&attended, None, &self.out, Activation::None, Some(&x))
    }
}

fn as_strs(names: &[String; 3]) -> [&str; 3] {
    names.each_ref().map(String::as_str)
}

/// The narrowest head of the CUDA kernels that holds `channels`.
fn kernel_head_dim(channels: usize) -> Result<usize> {
    let fitting = KERNEL_HEAD_DIMS.into_iter().find(|&head_dim| head_dim >= channels);
    fitting.ok_or_else(|| {
        Error::invalid(format!(
            "autoencoder: attention over {channels} channels is wider than the CUDA kernels' {WIDEST}"
        ))
    })
}

/// Reads projections of `channels` filled up with zeros to `head_dim`.
struct Padding<'a> {
    loader: &'a Loader<'a>,
    channels: usize,
    head_dim: usize,
}

impl Padding<'_> {
    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.loader.params.load(&Device::Cpu, name, shape)?.to_vec::<f32>()
    }

    /// Several projections of the given shape, each with rows of zeros after its own, stacked.
    fn rows(&self, names: &[String], shape: &[usize]) -> Result<Tensor> {
        let row: usize = shape[1..].iter().product();
        let mut stacked = Vec::with_capacity(names.len() * self.head_dim * row);
        for name in names {
            stacked.extend(self.values(name, shape)?);
            stacked.resize(stacked.len() + (self.head_dim - self.channels) * row, 0.0);
        }
        let mut stacked_shape = shape.to_vec();
        stacked_shape[0] = names.len() * self.head_dim;
        self.tensor(&stacked, &stacked_shape)
    }

    /// A projection back to the channels, with columns of zeros.
    fn columns(&self, name: &str) -> Result<Tensor> {
        let mut padded = vec![0.0; self.channels * self.head_dim];
        let values = self.values(name, &[self.channels, self.channels])?;
        for (to, from) in padded.chunks_mut(self.head_dim).zip(values.chunks(self.channels)) {
            to[..self.channels].copy_from_slice(from);
        }
        self.tensor(&padded, &[self.channels, self.head_dim])
    }

    fn tensor(&self, values: &[f32], shape: &[usize]) -> Result<Tensor> {
        let _tag = MemoryTag::Weights.scope();
        Tensor::from_f32(self.loader.device, values, shape)
    }
}

#[cfg(test)]
mod tests {
    use super::super::VaeConfig;
    use super::*;
    use crate::dtype::DType;
    use crate::model::params::MemoryParams;

    #[test]
    fn zeros_that_fill_up_a_head_change_nothing() {
        let channels = 8;
        let mut params = MemoryParams::default();
        let values =
            |count: usize, seed: usize| (0..count).map(|i| ((i * 7 + seed) % 13) as f32 / 13.0 - 0.4).collect();
        for (seed, layer) in ["to_q", "to_k", "to_v", "to_out.0"].into_iter().enumerate() {
            let matrix = values(channels * channels, seed);
            params.insert(format!("mid.{layer}.weight"), &[channels, channels], matrix);
            params.insert(format!("mid.{layer}.bias"), &[channels], values(channels, seed + 5));
        }
        params.insert("mid.group_norm.weight", &[channels], vec![1.0; channels]);
        params.insert("mid.group_norm.bias", &[channels], vec![0.0; channels]);
        let config = VaeConfig {
            norm_num_groups: 2,
            ..VaeConfig::default()
        };
        let loader = Loader {
            params: &params,
            device: &Device::Cpu,
            config: &config,
        };
        let run = |head_dim: usize| {
            let layer = MidAttention::load_filled_up(&loader, "mid", channels, head_dim).unwrap();
            assert_eq!(layer.qkv_weight.shape().to_vec(), [3 * head_dim, channels]);
            let x = Tensor::from_f32(&Device::Cpu, &values(2 * 3 * 5 * channels, 3), [2, 3, 5, channels]).unwrap();
            let y = layer.forward(x).unwrap();
            assert_eq!(y.dtype(), DType::F32);
            y.to_vec::<f32>().unwrap()
        };
        let (plain, filled_up) = (run(channels), run(16));
        assert!(plain.iter().zip(&filled_up).all(|(a, b)| (a - b).abs() < 1e-5));
        assert_eq!(kernel_head_dim(96).unwrap(), 128);
        assert_eq!(kernel_head_dim(64).unwrap(), 64);
        assert_eq!(kernel_head_dim(512).unwrap(), 512);
        assert!(kernel_head_dim(640).is_err());
    }
}
