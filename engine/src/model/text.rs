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
//! The features of a prompt are by default `hidden_states[-2]` of the reference: `h` after all layers but the last, not normalised; or,
//! as a [`Readout`] says, `h` after several layers, side by side. What follows the last of these is neither loaded nor run. Source: "Qwen3 Technical Report" (2025).

use super::config::TextConfig;
use super::limits::DeviceLimits;
use crate::device::Device;
use crate::error::{Error, Result};
use std::sync::Arc;

use crate::layers::{Bare, Described, Group, Linear, Loader, Norm, ParamSource, Pass, Streamed, module};
use crate::ops::add_rms_norm::{add, add_rms_norm};
use crate::ops::attention::{Attention, attention};
use crate::ops::embedding::embedding;
use crate::ops::qk_norm_rope::{QkNormRope, Rotation, qk_norm_rope};
use crate::ops::rms_norm::rms_norm;
use crate::ops::swiglu::swiglu;
use crate::ops::tokens::concat_all;
use crate::profile;
use crate::tensor::Tensor;

/// What a transformer takes of a prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Readout {
    /// After how many layers the residual stream is read, ascending; several are laid side by side. Empty for all layers but the last.
    pub states: Vec<usize>,
    /// Whether the chat template is rendered with thinking turned off.
    pub thoughtless: bool,
    /// Prompts are filled up with pads to so many tokens, whose features count like others; no token attends to a pad.
    pub padded: Option<usize>,
}

impl Readout {
    /// How many streams are laid side by side.
    pub fn count(&self) -> usize {
        self.states.len().max(1)
    }

    /// The layers to be run of so many.
    ///
    /// # Errors
    /// When there are not enough: the last layer's stream is not read.
    pub fn layers(&self, layers: usize) -> Result<usize> {
        let most = layers.checked_sub(1);
        let most = most.ok_or_else(|| Error::invalid("a text encoder without layers has no features to read out"))?;
        match self.states.last() {
            None => Ok(most),
            Some(last) if *last <= most => Ok(*last),
            Some(last) => Err(Error::invalid(format!(
                "a text encoder of {layers} layers has no features after layer {last} that this transformer could take"
            ))),
        }
    }
}

module! {
    /// The encoder.
    pub struct TextEncoder<K> {
        /// `[vocabulary, dim]`
        embeddings: Bare<K>,
        /// Up to the last that is read.
        layers: Vec<Layer<K>>,
        ;
        config: TextConfig,
        states: Vec<usize>,
        ; made
        streamed: Option<Arc<Streamed>>,
    }
}

module! {
    /// One decoder layer. Query, key and value projections are stacked (packed qkv), as are the two inputs of SwiGLU.
    pub(super) struct Layer<K> {
        /// `[dim]`
        pub(super) input_norm: Norm<K>,
        /// `[(heads + 2 · kv_heads) · head_dim, dim]`
        pub(super) qkv: Linear<K>,
        /// `[head_dim]` each
        pub(super) q_norm: Norm<K>,
        pub(super) k_norm: Norm<K>,
        /// `[dim, heads · head_dim]`
        pub(super) out: Linear<K>,
        /// `[dim]`
        pub(super) post_attention_norm: Norm<K>,
        /// `[2 · ffn_hidden, dim]`
        pub(super) gate_up: Linear<K>,
        /// `[dim, ffn_hidden]`
        pub(super) down: Linear<K>,
    }
}

/// The table of embeddings in `Qwen3Model`.
pub(super) const EMBEDDINGS: &str = "embed_tokens.weight";

impl TextEncoder<Described> {
    /// The parameters of an encoder of these sizes, named as in `Qwen3Model` after `prefix`.
    ///
    /// # Errors
    /// When there are no layers.
    pub fn describe(config: &TextConfig, prefix: &str) -> Result<Self> {
        Self::describe_read(config, prefix, &Readout::default())
    }

    /// The same of as many layers as are read.
    ///
    /// # Errors
    /// When there are fewer.
    pub fn describe_read(config: &TextConfig, prefix: &str, readout: &Readout) -> Result<Self> {
        let layers = readout.layers(config.layers)?;
        Ok(TextEncoder {
            embeddings: Bare::new(
                Group::Other,
                format!("{prefix}{EMBEDDINGS}"),
                &[config.vocabulary, config.dim],
            ),
            layers: (0..layers)
                .map(|index| Layer::describe(config, &format!("{prefix}layers.{index}"), index))
                .collect(),
            config: config.clone(),
            states: readout.states.clone(),
            streamed: None,
        })
    }
}

impl Layer<Described> {
    /// The parameters of layer `index`, named after `prefix`.
    pub(super) fn describe(config: &TextConfig, prefix: &str, index: usize) -> Self {
        let group = Group::Layer { index };
        let TextConfig {
            dim,
            heads,
            kv_heads,
            head_dim,
            ffn_hidden,
            ..
        } = *config;
        let name = |suffix: &str| format!("{prefix}.{suffix}");
        let norm = |suffix: &str, size: usize| Bare::norm(group, &name(suffix), size);
        let stacked = |layers: &[(&str, usize)]| {
            let layers: Vec<(String, usize)> = layers.iter().map(|(suffix, rows)| (name(suffix), *rows)).collect();
            let layers: Vec<(&str, usize)> = layers.iter().map(|(name, rows)| (name.as_str(), *rows)).collect();
            Linear::of_rows(group, &layers, dim)
        };
        let gate_up = stacked(&[("mlp.gate_proj", ffn_hidden), ("mlp.up_proj", ffn_hidden)]);
        let (gate_up, down) = gate_up.feeds(1, Linear::new(group, &name("mlp.down_proj"), dim, ffn_hidden));
        Layer {
            input_norm: norm("input_layernorm", dim),
            qkv: stacked(&[
                ("self_attn.q_proj", heads * head_dim),
                ("self_attn.k_proj", kv_heads * head_dim),
                ("self_attn.v_proj", kv_heads * head_dim),
            ]),
            q_norm: norm("self_attn.q_norm", head_dim),
            k_norm: norm("self_attn.k_norm", head_dim),
            out: Linear::new(group, &name("self_attn.o_proj"), dim, heads * head_dim),
            post_attention_norm: norm("post_attention_layernorm", dim),
            gate_up,
            down,
        }
    }
}

impl TextEncoder {
    /// Reads the parameters, named as in `Qwen3Model` or, with the prefix `model.`, as in the whole language model.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape, the device's kernels cannot take its sizes, or it has no room.
    pub fn load(params: &dyn ParamSource, device: &Device, config: &TextConfig) -> Result<Self> {
        Self::load_read(params, device, config, &Readout::default())
    }

    /// The same for what is to be read.
    ///
    /// # Errors
    /// As [`TextEncoder::load`], and when there are not enough layers.
    pub fn load_read(
        params: &dyn ParamSource,
        device: &Device,
        config: &TextConfig,
        readout: &Readout,
    ) -> Result<Self> {
        config.ensure_runs_on(device)?;
        let prefix = match params.shape(&format!("model.{EMBEDDINGS}")) {
            Some(_) => "model.",
            None => "",
        };
        let described = TextEncoder::describe_read(config, prefix, readout)?;
        let mut encoder = Loader::load(&described, params, device, &mut |_, _| Ok(()))?;
        encoder.streamed = params.streamed();
        Ok(encoder)
    }

    /// The features `[1, tokens, dim]` of a prompt's token ids.
    ///
    /// # Errors
    /// When there are no ids, one of them is not in the vocabulary, or the device has no room.
    pub fn encode(&self, ids: &[u32]) -> Result<Tensor> {
        self.encode_padded(ids, ids.len())
    }

    /// The same where ids from `real` on are pads, to which no token attends; their features are given too.
    ///
    /// # Errors
    /// As [`TextEncoder::encode`].
    pub fn encode_padded(&self, ids: &[u32], real: usize) -> Result<Tensor> {
        let _range = profile::range(c"text encoder");
        let device = self.embeddings.tensor().device();
        let keys = (real < ids.len()).then(|| Tensor::from_slice(&device, &[real as i32], [1]));
        let keys = keys.transpose()?;
        let ids = Tensor::from_slice(&device, &checked(ids, self.config.vocabulary)?, [1, ids.len()])?;
        let rotation = rotation(&self.config, &device, ids.dim(1))?;
        let epsilon = self.config.norm_eps;
        let mut stream = embedding(self.embeddings.tensor(), &ids)?;
        let Some(first) = self.layers.first() else {
            return Ok(stream);
        };
        let mut input = rms_norm(&stream, first.input_norm.tensor(), epsilon)?;
        let mut read = Vec::with_capacity(self.states.len());
        let mut pass = self.streamed.as_deref().map(Streamed::pass).transpose()?;
        for (index, layer) in self.layers.iter().enumerate() {
            let _range = profile::range(c"layer");
            pass.as_mut().map_or(Ok(()), |pass| pass.before(index))?;
            let attended = layer.attend(&input, &self.config, &rotation, keys.as_ref())?;
            let (sum, normalised) = add_rms_norm(&stream, &attended, layer.post_attention_norm.tensor(), epsilon)?;
            let forwarded = layer.down.forward(&swiglu(&layer.gate_up.forward(&normalised)?)?)?;
            match self.layers.get(index + 1) {
                Some(next) => (stream, input) = add_rms_norm(&sum, &forwarded, next.input_norm.tensor(), epsilon)?,
                None => stream = add(&sum, &forwarded)?,
            }
            if self.states.contains(&(index + 1)) {
                read.push(stream.clone());
            }
            pass.as_mut().map_or(Ok(()), |pass| pass.after(index))?;
        }
        pass.map_or(Ok(()), Pass::end)?;
        match &read[..] {
            [] => Ok(stream),
            read => side_by_side(read),
        }
    }
}

/// Streams `[1, tokens, dim]` as `[1, tokens, all of them]`.
fn side_by_side(streams: &[Tensor]) -> Result<Tensor> {
    let [tokens, dim] = [streams[0].dim(1), streams[0].dim(2)];
    let rows = streams.iter().map(|stream| stream.reshape([tokens, 1, dim]));
    let rows: Vec<Tensor> = rows.collect::<Result<_>>()?;
    concat_all(&rows.iter().collect::<Vec<_>>())?.into_shape([1, tokens, streams.len() * dim])
}

/// The ids as a kernel reads them, all within the vocabulary.
pub(super) fn checked(ids: &[u32], vocabulary: usize) -> Result<Vec<i32>> {
    if ids.is_empty() {
        return Err(Error::invalid("text encoder: a prompt has at least one token"));
    }
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
pub(super) fn rotation(config: &TextConfig, device: &Device, tokens: usize) -> Result<Tensor> {
    let pairs = config.head_dim / 2;
    let frequency = |pair: usize| {
        let exponent = (2 * pair) as f64 / config.head_dim as f64;
        1.0 / config.rope_theta.powf(exponent) as f32
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

impl Layer {
    /// The attention sublayer without its residual sum.
    fn attend(&self, input: &Tensor, config: &TextConfig, rotation: &Tensor, keys: Option<&Tensor>) -> Result<Tensor> {
        self.attended_among(&self.turned(input, config, rotation)?, config, keys)
    }

    /// Packed queries, keys and values of the normalised stream, queries and keys normalised and turned.
    pub(super) fn turned(&self, input: &Tensor, config: &TextConfig, rotation: &Tensor) -> Result<Tensor> {
        let mut qkv = self.qkv.forward(input)?;
        qk_norm_rope(&mut qkv, &self.norm_and_turn(config), rotation)?;
        Ok(qkv)
    }

    /// How queries and keys are normalised and turned.
    pub(super) fn norm_and_turn<'a>(&'a self, config: &TextConfig) -> QkNormRope<'a> {
        QkNormRope {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            q_weight: self.q_norm.tensor(),
            k_weight: self.k_norm.tensor(),
            epsilon: config.norm_eps,
            rotation: Rotation::HalfSplit,
        }
    }

    /// The attention sublayer of these, without its residual sum.
    pub(super) fn attended(&self, qkv: &Tensor, config: &TextConfig) -> Result<Tensor> {
        self.attended_among(qkv, config, None)
    }

    fn attended_among(&self, qkv: &Tensor, config: &TextConfig, keys: Option<&Tensor>) -> Result<Tensor> {
        let heads = Attention {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            causal: true,
            scale: 1.0 / (config.head_dim as f32).sqrt(),
        };
        self.out.forward(&attention(qkv, &heads, keys)?)
    }
}
