//! The text encoder's sizes.

use std::path::Path;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::{Described, config_of, read_json};
use crate::error::{Error, Result};
use crate::limits::{Heads, Layers, NormEpsilon, RopeTheta, Vocabulary, Width};
use crate::printable::shown_name;

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

/// The model type in the `config.json`.
const MODEL_TYPE: &str = "qwen3";

/// The kind of layer that is computed.
const FULL_ATTENTION: &str = "full_attention";

/// The entries of a Qwen3 `config.json` that are used.
#[derive(Deserialize)]
struct Qwen3Entries {
    vocab_size: Vocabulary,
    hidden_size: Width,
    num_hidden_layers: Layers,
    num_attention_heads: Heads,
    num_key_value_heads: Option<Heads>,
    head_dim: Option<Width>,
    intermediate_size: Width,
    rms_norm_eps: Option<NormEpsilon>,
    rope_theta: Option<RopeTheta>,
    rope_parameters: Option<RopeParameters>,
    rope_scaling: Option<IgnoredAny>,
    #[serde(default)]
    attention_bias: bool,
    hidden_act: Option<String>,
    #[serde(default)]
    use_sliding_window: bool,
    layer_types: Option<Vec<String>>,
}

/// Where newer files keep the rotary settings.
#[derive(Deserialize)]
struct RopeParameters {
    rope_theta: Option<RopeTheta>,
    rope_type: Option<String>,
}

impl TextConfig {
    /// Those of Qwen3-4B, the text encoder of Z-Image.
    pub fn published() -> Self {
        TextConfig {
            vocabulary: 151_936,
            dim: 2560,
            layers: 36,
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            ffn_hidden: 9728,
            norm_eps: 1e-6,
            rope_theta: 1e6,
        }
    }

    /// Reads `config.json` in the text encoder's folder or beside its file; the published sizes are assumed of a file that stands
    /// without.
    ///
    /// # Errors
    /// When it cannot be read, lacks a size, has one that makes no sense, or describes another kind of model.
    pub fn read(path: &Path) -> Result<Self> {
        Ok(Self::find(path)?.unwrap_or_else(Self::published))
    }

    /// As [`TextConfig::read`], `None` for a file that stands without.
    ///
    /// # Errors
    /// As [`TextConfig::read`].
    pub fn find(part: &Path) -> Result<Option<Self>> {
        let path = config_of(part);
        let Some(described) = Described::of(part)? else {
            return Ok(None);
        };
        match described.model_type.as_deref() {
            Some(MODEL_TYPE) => {}
            _ if !part.is_dir() => return Ok(None),
            Some(other) => {
                let other = shown_name(other);
                return Err(Error::file(
                    path,
                    format!("describes a `{other}` model, expected `{MODEL_TYPE}`"),
                ));
            }
            None => {
                return Err(Error::file(
                    path,
                    format!("does not say \"model_type\": \"{MODEL_TYPE}\""),
                ));
            }
        }
        described.ensure_plain(&path)?;
        let entries: Qwen3Entries = read_json(&path)?;
        entries.check().map_err(|reason| Error::file(&path, reason))?;
        Ok(Some(entries.config()))
    }
}

impl Qwen3Entries {
    /// What is not supported or makes no sense, in words.
    fn check(&self) -> std::result::Result<(), String> {
        let rope_type = self.rope_parameters.as_ref().and_then(|rope| rope.rope_type.as_deref());
        if self.rope_scaling.is_some() || rope_type.is_some_and(|kind| kind != "default") {
            return Err("scales its rotary frequencies, which is not supported".into());
        }
        if self.attention_bias {
            return Err("says attention_bias = true, which is not supported".into());
        }
        if self.use_sliding_window {
            return Err("says use_sliding_window = true, which is not supported".into());
        }
        if let Some(other) = self
            .hidden_act
            .as_deref()
            .filter(|act| !["silu", "swish"].contains(act))
        {
            let other = shown_name(other);
            return Err(format!("says hidden_act = \"{other}\", only \"silu\" is supported"));
        }
        let layers = self.layer_types.iter().flatten();
        if let Some(other) = layers.into_iter().find(|kind| *kind != FULL_ATTENTION) {
            let other = shown_name(other);
            return Err(format!(
                "says layer_types with \"{other}\", only \"{FULL_ATTENTION}\" is supported"
            ));
        }
        if let Some(listed) = self.layer_types.as_ref().map(Vec::len)
            && listed != self.num_hidden_layers.get()
        {
            let layers = self.num_hidden_layers;
            return Err(format!(
                "says num_hidden_layers = {layers}, but lists {listed} layer_types"
            ));
        }
        let config = self.config();
        let (heads, kv_heads) = (config.heads, config.kv_heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(format!(
                "says {heads} query heads and {kv_heads} key heads, which does not divide"
            ));
        }
        match config.head_dim == 0 || !config.head_dim.is_multiple_of(2) {
            true => Err(format!(
                "says heads of a width of {}, expected an even one",
                config.head_dim
            )),
            false => Ok(()),
        }
    }

    fn config(&self) -> TextConfig {
        let heads = self.num_attention_heads.get();
        let in_parameters = self.rope_parameters.as_ref().and_then(|rope| rope.rope_theta);
        let default = TextConfig::published();
        TextConfig {
            vocabulary: self.vocab_size.get(),
            dim: self.hidden_size.get(),
            layers: self.num_hidden_layers.get(),
            heads,
            kv_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads).get(),
            head_dim: self.head_dim.map_or(self.hidden_size.get() / heads, Width::get),
            ffn_hidden: self.intermediate_size.get(),
            norm_eps: self.rms_norm_eps.map_or(default.norm_eps, NormEpsilon::single),
            rope_theta: self
                .rope_theta
                .or(in_parameters)
                .map_or(default.rope_theta, RopeTheta::get),
        }
    }
}
