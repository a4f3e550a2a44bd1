//! The parts beside the transformer: text encoder, VAE, scheduler.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::read_json;
use crate::error::{Error, Result};

/// The text encoder's sizes, from the `config.json` of a Qwen3 model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TextConfig {
    /// Entries of the embedding table.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub dim: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, each shared by `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width inside the feed-forward network.
    pub ffn_hidden: usize,
    /// Added to the mean square in RMSNorm.
    pub norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
}

/// The entries of a Qwen3 `config.json` that are used.
#[derive(Deserialize)]
struct Qwen3Entries {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: usize,
    #[serde(default = "default_norm_eps")]
    rms_norm_eps: f32,
    rope_theta: Option<f64>,
    rope_parameters: Option<RopeParameters>,
    rope_scaling: Option<serde_json::Value>,
    #[serde(default)]
    attention_bias: bool,
}

/// Where newer files keep the rotary settings.
#[derive(Deserialize)]
struct RopeParameters {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
}

fn default_norm_eps() -> f32 {
    1e-6
}

impl TextConfig {
    /// Reads `config.json` in the text encoder's folder.
    ///
    /// # Errors
    /// When it cannot be read, lacks a size, or describes another kind of model.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let entries: Qwen3Entries = read_json(&path)?;
        let refuse = |what: String| Err(Error::file(&path, what));
        if entries.model_type != "qwen3" {
            return refuse(format!("describes a `{}` model, expected `qwen3`", entries.model_type));
        }
        let rope_type = entries
            .rope_parameters
            .as_ref()
            .and_then(|rope| rope.rope_type.as_deref());
        if entries.rope_scaling.is_some() || rope_type.is_some_and(|kind| kind != "default") {
            return refuse("scales its rotary frequencies, which is not supported".into());
        }
        if entries.attention_bias {
            return refuse("says attention_bias = true, which is not supported".into());
        }
        let heads = entries.num_attention_heads;
        let kv_heads = entries.num_key_value_heads.unwrap_or(heads);
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return refuse(format!(
                "says {heads} query heads and {kv_heads} key heads, which does not divide"
            ));
        }
        let in_parameters = entries.rope_parameters.and_then(|rope| rope.rope_theta);
        Ok(TextConfig {
            vocabulary: entries.vocab_size,
            dim: entries.hidden_size,
            layers: entries.num_hidden_layers,
            heads,
            kv_heads,
            head_dim: entries.head_dim.unwrap_or(entries.hidden_size / heads),
            ffn_hidden: entries.intermediate_size,
            norm_eps: entries.rms_norm_eps,
            rope_theta: entries.rope_theta.or(in_parameters).unwrap_or(1e6),
        })
    }
}

/// The VAE's sizes and scales, from its `config.json`; missing entries have the defaults of diffusers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VaeConfig {
    /// Channels of the latent.
    pub latent_channels: usize,
    /// Channels of the image.
    pub out_channels: usize,
    /// Widths of the encoder's blocks, from the image inwards; the decoder's are the same, reversed.
    pub block_out_channels: Vec<usize>,
    /// Kinds of the decoder's blocks, one per width.
    pub up_block_types: Option<Vec<String>>,
    /// Residual blocks in an encoder block; a decoder block has one more.
    pub layers_per_block: usize,
    /// Groups of each normalisation.
    pub norm_num_groups: usize,
    /// The activation's name.
    pub act_fn: String,
    /// A latent of the transformer, divided by this, …
    pub scaling_factor: f32,
    /// … plus this, is what the decoder takes.
    #[serde(deserialize_with = "null_is_zero")]
    pub shift_factor: f32,
    /// Whether a 1×1 convolution stands before the decoder.
    pub use_post_quant_conv: bool,
    /// Whether the middle block has attention.
    pub mid_block_add_attention: bool,
}

impl Default for VaeConfig {
    fn default() -> Self {
        VaeConfig {
            latent_channels: 4,
            out_channels: 3,
            block_out_channels: vec![64],
            up_block_types: None,
            layers_per_block: 1,
            norm_num_groups: 32,
            act_fn: "silu".into(),
            scaling_factor: 0.18215,
            shift_factor: 0.0,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

fn null_is_zero<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<f32, D::Error> {
    Ok(Option::<f32>::deserialize(deserializer)?.unwrap_or(0.0))
}

impl VaeConfig {
    /// Reads `config.json` in the VAE's folder.
    ///
    /// # Errors
    /// When it cannot be read, or describes an autoencoder that cannot be decoded for.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let config: VaeConfig = read_json(&path)?;
        config.check().map_err(|reason| Error::file(&path, reason))?;
        Ok(config)
    }

    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// As [`VaeConfig::read`].
    pub fn from_json(text: &str) -> Result<Self> {
        let config: VaeConfig =
            serde_json::from_str(text).map_err(|error| Error::invalid(format!("VAE configuration: {error}")))?;
        config
            .check()
            .map_err(|reason| Error::invalid(format!("VAE configuration: {reason}")))?;
        Ok(config)
    }

    /// What is not supported or makes no sense, in words.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        const UP_BLOCK: &str = "UpDecoderBlock2D";
        let refuse = |entry: &str, found: &dyn std::fmt::Debug, expected: &str| {
            Err(format!("says {entry} = {found:?}, only {expected} is supported"))
        };
        if self.use_post_quant_conv {
            return refuse("use_post_quant_conv", &true, "false");
        }
        if !["silu", "swish"].contains(&self.act_fn.as_str()) {
            return refuse("act_fn", &self.act_fn, "\"silu\"");
        }
        if let Some(kinds) = &self.up_block_types
            && (kinds.iter().any(|kind| kind != UP_BLOCK) || kinds.len() != self.block_out_channels.len())
        {
            return refuse("up_block_types", kinds, "one \"UpDecoderBlock2D\" per width");
        }
        let widths = &self.block_out_channels;
        let grouped = |width: &usize| *width > 0 && width.is_multiple_of(self.norm_num_groups.max(1));
        if self.norm_num_groups == 0 || widths.is_empty() || !widths.iter().all(grouped) {
            let expected = format!("multiples of norm_num_groups = {}", self.norm_num_groups);
            return refuse("block_out_channels", widths, &expected);
        }
        if self.latent_channels == 0 || self.out_channels == 0 {
            return refuse("latent_channels", &self.latent_channels, "a positive number");
        }
        match self.scaling_factor.is_finite() && self.scaling_factor > 0.0 {
            true => Ok(()),
            false => refuse("scaling_factor", &self.scaling_factor, "a positive number"),
        }
    }

    /// Image pixels along a side of one latent pixel.
    pub fn downsampling(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }
}

/// The schedule's settings, from `scheduler_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SchedulerConfig {
    /// How far sigmas are shifted towards noise.
    #[serde(default = "one")]
    pub shift: f32,
}

fn one() -> f32 {
    1.0
}

impl SchedulerConfig {
    /// Reads `scheduler_config.json` in the scheduler's folder.
    ///
    /// # Errors
    /// When it cannot be read, or the shift is not positive.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("scheduler_config.json");
        let config: SchedulerConfig = read_json(&path)?;
        if config.shift.is_finite() && config.shift > 0.0 {
            return Ok(config);
        }
        Err(Error::file(
            &path,
            format!("says shift = {}, which is not positive", config.shift),
        ))
    }
}
