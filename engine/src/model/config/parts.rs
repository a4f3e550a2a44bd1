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

/// The VAE's sizes and scales, from its `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VaeConfig {
    /// Channels of the latent.
    pub latent_channels: usize,
    /// Channels of the image.
    pub out_channels: usize,
    /// Widths of the encoder's blocks, from the image inwards; the decoder's are the same, reversed.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks in an encoder block; a decoder block has one more.
    pub layers_per_block: usize,
    /// Groups of each normalisation.
    pub norm_num_groups: usize,
    /// A latent of the transformer, divided by this, …
    pub scaling_factor: f32,
    /// … plus this, is what the decoder takes.
    #[serde(default, deserialize_with = "null_is_zero")]
    pub shift_factor: f32,
    /// Whether a 1×1 convolution stands before the decoder.
    #[serde(default = "yes")]
    pub use_post_quant_conv: bool,
    /// Whether the middle block has attention.
    #[serde(default = "yes")]
    pub mid_block_add_attention: bool,
}

fn yes() -> bool {
    true
}

fn null_is_zero<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<f32, D::Error> {
    Ok(Option::<f32>::deserialize(deserializer)?.unwrap_or(0.0))
}

impl VaeConfig {
    /// Reads `config.json` in the VAE's folder.
    ///
    /// # Errors
    /// When it cannot be read, lacks a size, or makes no sense.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let config: VaeConfig = read_json(&path)?;
        let groups = config.norm_num_groups;
        if config.block_out_channels.is_empty() {
            return Err(Error::file(&path, "says block_out_channels = []"));
        }
        if groups == 0
            || config
                .block_out_channels
                .iter()
                .any(|width| !width.is_multiple_of(groups))
        {
            let reason = format!(
                "block_out_channels {:?} do not divide into {groups} groups",
                config.block_out_channels
            );
            return Err(Error::file(&path, reason));
        }
        if config.scaling_factor.is_nan() || config.scaling_factor <= 0.0 {
            return Err(Error::file(
                &path,
                format!("says scaling_factor = {}", config.scaling_factor),
            ));
        }
        Ok(config)
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
