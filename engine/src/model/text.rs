//! The text encoder: a Qwen3 decoder, read out before its last layer.
//!
//! With the residual stream `h` `[1, tokens, dim]`, which starts as the tokens' embeddings, every layer does
//!
//! ```text
//! q, k, v = split( W_qkv · rms_norm(h) );  q, k = rope( rms_norm per head (q, k) )
//! h = h + W_o · attention(q, k, v)                                      causal, key/value heads shared by query heads
//! h = h + W_down · ( silu(W_gate · b) · (W_up · b) ),  b = rms_norm(h)
//! ```
//!
//! The features of a prompt are `hidden_states[-2]` of the reference: `h` after all layers but the last, not normalised. The
//! last layer and the final normalisation are therefore neither loaded nor run. Source: "Qwen3 Technical Report" (2025).

use super::config::TextConfig;
use super::limits::DeviceLimits;
use super::params::ParamSource;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::add_rms_norm::{add, add_rms_norm};
use crate::ops::attention::{Attention, attention};
use crate::ops::embedding::embedding;
use crate::ops::linear::linear;
use crate::ops::qk_norm_rope::{QkNormRope, Rotation, qk_norm_rope};
use crate::ops::rms_norm::rms_norm;
use crate::ops::swiglu::swiglu;
use crate::profile;
use crate::tensor::Tensor;

/// The encoder's parameters, on its device.
pub struct TextEncoder {
    config: TextConfig,
    /// `[vocabulary, dim]`
    embeddings: Tensor,
    /// All layers but the last.
    layers: Vec<Layer>,
}

impl TextEncoder {
    /// Reads the parameters, named as in `Qwen3Model` or, with the prefix `model.`, as in the whole language model.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape, the device's kernels cannot take its sizes, or it has no room.
    pub fn load(params: &dyn ParamSource, device: &Device, config: &TextConfig) -> Result<Self> {
        config.expect_runs_on(device)?;
        const EMBEDDINGS: &str = "embed_tokens.weight";
        let Some(layers) = config.layers.checked_sub(1) else {
            return Err(Error::invalid(
                "a text encoder without layers has no features to read out",
            ));
        };
        let prefix = match params.shape(&format!("model.{EMBEDDINGS}")) {
            Some(_) => "model.",
            None => "",
        };
        Ok(TextEncoder {
            config: config.clone(),
            embeddings: params.load(
                device,
                &format!("{prefix}{EMBEDDINGS}"),
                &[config.vocabulary, config.dim],
            )?,
            layers: (0..layers)
                .map(|index| Layer::load(params, device, &format!("{prefix}layers.{index}"), config))
                .collect::<Result<_>>()?,
        })
    }

    /// The features `[1, tokens, dim]` of a prompt's token ids.
    ///
    /// # Errors
    /// When there are no ids, one of them is not in the vocabulary, or the device has no room.
    pub fn encode(&self, ids: &[u32]) -> Result<Tensor> {
        let _range = profile::range(c"text encoder");
        let device = self.embeddings.device();
        let ids = Tensor::from_slice(&device, &self.checked(ids)?, [1, ids.len()])?;
        let rotation = self.rotation(&device, ids.dim(1))?;
        let epsilon = self.config.norm_eps;
        let mut stream = embedding(&self.embeddings, &ids)?;
        let Some(first) = self.layers.first() else {
            return Ok(stream);
        };
        let mut input = rms_norm(&stream, &first.input_norm, epsilon)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let _range = profile::range(c"layer");
            let attended = layer.attend(&input, &self.config, &rotation)?;
            let (sum, normalised) = add_rms_norm(&stream, &attended, &layer.post_attention_norm, epsilon)?;
            let forwarded = linear(&swiglu(&linear(&normalised, &layer.gate_up, None)?)?, &layer.down, None)?;
            match self.layers.get(index + 1) {
                Some(next) => (stream, input) = add_rms_norm(&sum, &forwarded, &next.input_norm, epsilon)?,
                None => stream = add(&sum, &forwarded)?,
            }
        }
        Ok(stream)
    }

    /// The ids as a kernel reads them, all within the vocabulary.
    fn checked(&self, ids: &[u32]) -> Result<Vec<i32>> {
        if ids.is_empty() {
            return Err(Error::invalid("text encoder: a prompt has at least one token"));
        }
        let vocabulary = self.config.vocabulary;
        ids.iter()
            .map(|&id| match i32::try_from(id) {
                Ok(found) if (id as usize) < vocabulary => Ok(found),
                _ => Err(Error::invalid(format!(
                    "text encoder: token {id} is not in a vocabulary of {vocabulary}; tokenizer and text encoder are of \
                     different models"
                ))),
            })
            .collect()
    }

    /// Cosine and sine of every angle, `[1, tokens, head_dim / 2, 2]`: pair `i` of the token at position `p` turns by
    /// `p · θ^(−2i / head_dim)`. Like the reference, frequencies and angles are rounded to f32 on the way, which at position
    /// 500 is more than the last bits of the result.
    fn rotation(&self, device: &Device, tokens: usize) -> Result<Tensor> {
        let pairs = self.config.head_dim / 2;
        let frequency = |pair: usize| {
            let exponent = (2 * pair) as f64 / self.config.head_dim as f64;
            1.0 / self.config.rope_theta.powf(exponent) as f32
        };
        let frequencies: Vec<f32> = (0..pairs).map(frequency).collect();
        let turn = |position: usize, frequency: f32| {
            let angle = f64::from(position as f32 * frequency);
            [angle.cos() as f32, angle.sin() as f32]
        };
        let table: Vec<f32> = (0..tokens)
            .flat_map(|position| frequencies.iter().flat_map(move |&frequency| turn(position, frequency)))
            .collect();
        Tensor::from_slice(device, &table, [1, tokens, pairs, 2])
    }
}

/// One decoder layer. Query, key and value projections are stacked, as are the two inputs of SwiGLU.
struct Layer {
    /// `[dim]`
    input_norm: Tensor,
    /// `[(heads + 2 · kv_heads) · head_dim, dim]`
    qkv: Tensor,
    /// `[head_dim]` each
    q_norm: Tensor,
    k_norm: Tensor,
    /// `[dim, heads · head_dim]`
    out: Tensor,
    /// `[dim]`
    post_attention_norm: Tensor,
    /// `[2 · ffn_hidden, dim]`
    gate_up: Tensor,
    /// `[dim, ffn_hidden]`
    down: Tensor,
}

impl Layer {
    fn load(params: &dyn ParamSource, device: &Device, prefix: &str, config: &TextConfig) -> Result<Self> {
        let TextConfig {
            dim,
            heads,
            kv_heads,
            head_dim,
            ffn_hidden,
            ..
        } = *config;
        let name = |suffix: &str| format!("{prefix}.{suffix}.weight");
        let load = |suffix: &str, shape: &[usize]| params.load(device, &name(suffix), shape);
        let stacked = |suffixes: &[&str], rows: usize| {
            let names: Vec<String> = suffixes.iter().map(|suffix| name(suffix)).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            params.load_stacked(device, &names, &[rows, dim])
        };
        let projections = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
        Ok(Layer {
            input_norm: load("input_layernorm", &[dim])?,
            qkv: stacked(&projections, (heads + 2 * kv_heads) * head_dim)?,
            q_norm: load("self_attn.q_norm", &[head_dim])?,
            k_norm: load("self_attn.k_norm", &[head_dim])?,
            out: load("self_attn.o_proj", &[dim, heads * head_dim])?,
            post_attention_norm: load("post_attention_layernorm", &[dim])?,
            gate_up: stacked(&["mlp.gate_proj", "mlp.up_proj"], 2 * ffn_hidden)?,
            down: load("mlp.down_proj", &[dim, ffn_hidden])?,
        })
    }

    /// The attention sublayer without its residual sum.
    fn attend(&self, input: &Tensor, config: &TextConfig, rotation: &Tensor) -> Result<Tensor> {
        let TextConfig {
            heads,
            kv_heads,
            head_dim,
            ..
        } = *config;
        let mut qkv = linear(input, &self.qkv, None)?;
        let norm_and_turn = QkNormRope {
            heads,
            kv_heads,
            head_dim,
            q_weight: &self.q_norm,
            k_weight: &self.k_norm,
            epsilon: config.norm_eps,
            rotation: Rotation::HalfSplit,
        };
        qk_norm_rope(&mut qkv, &norm_and_turn, rotation)?;
        let heads = Attention {
            heads,
            kv_heads,
            head_dim,
            causal: true,
            scale: 1.0 / (head_dim as f32).sqrt(),
        };
        linear(&attention(&qkv, &heads, None)?, &self.out, None)
    }
}
