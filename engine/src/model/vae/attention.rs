//! The self-attention in the middle of the autoencoder: one head over all pixels, with normalisation and residual.

use super::norm;
use crate::device::{Device, MemoryTag};
use crate::error::{Error, Result};
use crate::layers::{Described, Group, GroupNorm, Linear, Weight, module};
use crate::model::config::VaeConfig;
use crate::ops::attention::{Attention, attention};
use crate::ops::conv::{Activation, Conv, conv2d};
use crate::ops::group_norm::group_norm;
use crate::tensor::Tensor;

/// Widths of a head that the CUDA kernels know; others are filled up with zeros.
const KERNEL_HEAD_DIMS: [usize; 3] = [64, 128, WIDEST];

/// The most channels that the CUDA kernels can attend over.
pub(super) const WIDEST: usize = 512;

module! {
    /// `x + out(attention(q, k, v of norm(x)))`.
    pub(super) struct MidAttention<K> {
        norm: GroupNorm<K>,
        /// `[3 · head_dim, channels]`: query, key, value, with bias.
        qkv: Linear<K>,
        /// `[channels, head_dim]`, with bias.
        out: Linear<K>,
        ;
        attention: Attention,
    }
}

impl MidAttention<Described> {
    /// The layer whose parameters are named `{name}.…`.
    pub fn describe(config: &VaeConfig, name: &str, channels: usize) -> Self {
        let layers = ["to_q", "to_k", "to_v"].map(|layer| format!("{name}.{layer}"));
        MidAttention {
            norm: norm(config, &format!("{name}.group_norm"), channels),
            qkv: Linear::stacked(Group::Other, &layers.each_ref().map(String::as_str), channels, channels).with_bias(),
            out: Linear::new(Group::Other, &format!("{name}.to_out.0"), channels, channels).with_bias(),
            attention: Attention {
                heads: 1,
                kv_heads: 1,
                head_dim: channels,
                causal: false,
                // Zeros that fill up a head change no score, so the scale stays that of the channels.
                scale: 1.0 / (channels as f32).sqrt(),
            },
        }
    }
}

impl MidAttention {
    /// Fills the head up with zeros to a width that the device's kernels know.
    pub fn fill_up(&mut self, device: &Device) -> Result<()> {
        let channels = self.attention.head_dim;
        match device {
            Device::Cpu => Ok(()),
            Device::Cuda(_) => self.fill_up_to(kernel_head_dim(channels)?),
        }
    }

    fn fill_up_to(&mut self, head_dim: usize) -> Result<()> {
        let channels = self.attention.head_dim;
        if head_dim == channels {
            return Ok(());
        }
        let _tag = MemoryTag::Weights.scope();
        let (qkv, out) = (self.qkv.weight.values()?, self.out.weight.values()?);
        // Rows of zeros after those of each projection; columns of zeros.
        let rows = |tensor: &Tensor, width: usize| -> Result<Tensor> {
            let filled: Vec<f32> = tensor
                .to_vec_f32()?
                .chunks(channels * width)
                .flat_map(|part| {
                    let zeros = std::iter::repeat_n(0.0, (head_dim - channels) * width);
                    part.iter().copied().chain(zeros)
                })
                .collect();
            let shape = [3 * head_dim, width];
            Tensor::from_f32(&tensor.device(), &filled, &shape[..if width == 1 { 1 } else { 2 }])
        };
        let columns: Vec<f32> = out
            .to_vec_f32()?
            .chunks(channels)
            .flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(0.0, head_dim - channels)))
            .collect();
        let columns = Tensor::from_f32(&out.device(), &columns, [channels, head_dim])?;
        let bias = self.qkv.bias.as_ref().map(|bias| rows(bias, 1)).transpose()?;
        let qkv = rows(&qkv, channels)?;
        self.qkv = Linear {
            weight: Weight::Dense(qkv),
            bias,
        };
        self.out.weight = Weight::Dense(columns);
        self.attention.head_dim = head_dim;
        Ok(())
    }

    /// Takes its input, which is freed on return.
    pub fn forward(&self, x: Tensor) -> Result<Tensor> {
        let (batch, height, width, channels) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
        let normalised = group_norm(&x, &self.norm.op(), Activation::None)?;
        let tokens = normalised.reshape([batch, height * width, channels])?;
        drop(normalised);
        let qkv = self.qkv.forward(&tokens)?;
        drop(tokens);
        let attended = attention(&qkv, &self.attention, None)?;
        drop(qkv);
        let attended = attended.reshape([batch, height, width, self.attention.head_dim])?;
        // The projection as a 1×1 convolution, which adds the residual.
        let bias = self.out.bias.clone();
        let bias = bias.ok_or_else(|| Error::invalid("the autoencoder's attention has no bias"))?;
        let out = Conv::new(self.out.dense_weight()?, bias, 1, &[self.attention.head_dim])?;
        conv2d(&attended, None, &out, Activation::None, Some(&x))
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::layers::{Loader, MemoryParams};

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
        let run = |head_dim: usize| {
            let described = MidAttention::describe(&config, "mid", channels);
            let mut layer = Loader::load(&described, &params, &Device::Cpu, &mut |_, _| Ok(())).unwrap();
            layer.fill_up_to(head_dim).unwrap();
            assert_eq!(layer.qkv.extents(), [3 * head_dim, channels]);
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
