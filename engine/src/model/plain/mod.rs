//! A plain diffusion transformer, compiled for tests alone: a second family that keeps the seam between families and all else honest
//! (`docs/adding-a-model.md`). Unlike Z-Image it has learned positions, no refiners, LayerNorm, no norm of queries and keys, residual
//! sums without gates, and it predicts the noise instead of a velocity.
//!
//! ```text
//! x = [patches · W + positions ; captions · W]
//! x = x + attention(LN(x) · (1 + scale)) · W,   x = x + swiglu(LN(x) · (1 + scale)) · W
//! noise = unpatchify(LN(image tokens of x) · (1 + scale) · W)
//! ```

mod family;
pub(crate) mod linear;
mod objective;
mod sizes;
mod spec;
mod tests;
mod trained;

use super::denoiser::{Denoiser, Geometry, Modulations, Prepared};
use super::objective::Objective;
use super::time_embedder::TimeEmbedder;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::layers::{Bare, Linear, Loader, ParamSource, module};
use crate::ops::Modulation;
use crate::ops::add_rms_norm::add;
use crate::ops::attention::{Attention, attention_with_lse};
use crate::ops::layer_norm::layer_norm_modulate;
use crate::ops::linear::InputActivation;
use crate::ops::patch_embed::patch_embed;
use crate::ops::swiglu::swiglu;
use crate::ops::tokens::{concat_all, concat_tokens, narrow_tokens, stack_tokens};
use crate::ops::unpatchify::unpatchify;
use crate::tensor::Tensor;

pub use family::PlainFamily;
use objective::NoisePrediction;
pub use sizes::{Plain, PlainConfig};

/// The class that a `config.json` names.
const CLASS: &str = "PlainDiT2DModel";

/// LayerNorm's epsilon.
const EPSILON: f32 = 1e-6;

/// Vectors of a block's modulation: the scales of its two normalisations.
const VECTORS: usize = 2;

module! {
    /// The parameters.
    pub struct Parts<K> {
        /// `[dim, patch · patch · channels]`, with bias.
        pub patch: Linear<K>,
        /// `[1, positions, dim]` in checkpoints, a vector in the engine.
        pub positions: Bare<K>,
        /// `[dim, caption_width]`, with bias.
        pub caption: Linear<K>,
        /// Times to conditions.
        pub time: TimeEmbedder<K>,
        /// The blocks.
        pub blocks: Vec<Block<K>>,
        /// `[dim, t_width]`, with bias: the scale of the last normalisation.
        pub last_scale: Linear<K>,
        /// `[patch · patch · channels, dim]`, with bias.
        pub output: Linear<K>,
    }
}

module! {
    /// Attention and SwiGLU.
    pub struct Block<K> {
        /// `[3 · dim, dim]`
        pub qkv: Linear<K>,
        /// `[dim, dim]`
        pub out: Linear<K>,
        /// `[2 · ffn, dim]`
        pub w13: Linear<K>,
        /// `[dim, ffn]`
        pub w2: Linear<K>,
        /// `[2 · dim, t_width]`, with bias.
        pub modulation: Linear<K>,
        ;
        attention: Attention,
    }
}

/// What a block computes on its way.
struct Inside {
    qkv: Tensor,
    attended: Tensor,
    lse: Tensor,
    middle: Tensor,
    gate_and_up: Tensor,
}

/// The model on its device.
pub struct PlainDit {
    parts: Parts,
    config: PlainConfig,
    device: Device,
}

/// A batch of captions, ready for any number of steps.
struct Ready {
    size: [usize; 2],
    lengths: Vec<usize>,
    /// The features, padded.
    features: Tensor,
    /// The same as tokens.
    captions: Tensor,
    /// Valid tokens per item, where captions differ in length.
    key_lengths: Option<Tensor>,
}

impl PlainDit {
    /// Reads the parameters.
    fn load(
        spec: &Plain,
        params: &dyn ParamSource,
        device: &Device,
        loaded: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<Self> {
        Ok(PlainDit {
            parts: Loader::load(&spec.describe(), params, device, loaded)?,
            config: spec.0.clone(),
            device: device.clone(),
        })
    }

    fn ready(&self, captions: &[&Tensor], size: [usize; 2]) -> Result<Ready> {
        let tokens = self.config.tokens(size)?;
        let lengths: Vec<usize> = captions.iter().map(|caption| caption.dim(1)).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        if lengths.contains(&0) || longest == 0 {
            return Err(Error::invalid("a caption has no tokens"));
        }
        let features = stack_tokens(captions, longest)?;
        let keys: Vec<i32> = lengths.iter().map(|length| (tokens + length) as i32).collect();
        let unequal = lengths.iter().any(|length| *length != longest);
        Ok(Ready {
            size,
            captions: self.parts.caption.forward(&features)?,
            features,
            key_lengths: unequal
                .then(|| Tensor::from_slice(&self.device, &keys, [keys.len()]))
                .transpose()?,
            lengths,
        })
    }

    /// The tables of embedded times: two vectors per block, and the last.
    fn table(&self, c: &Tensor) -> Result<Tensor> {
        let vectors = |layer: &Linear, count: usize| {
            let table = layer.forward_vectors(c, InputActivation::Silu)?;
            table.reshape([c.dim(0), count, self.config.dim])
        };
        let blocks = self.parts.blocks.iter();
        let mut tables: Vec<Tensor> = blocks
            .map(|block| vectors(&block.modulation, VECTORS))
            .collect::<Result<_>>()?;
        tables.push(vectors(&self.parts.last_scale, 1)?);
        concat_all(&tables.iter().collect::<Vec<_>>())
    }

    /// Image tokens with their positions, and captions: the first block's input.
    fn embed(&self, image: &Tensor, ready: &Ready) -> Result<Tensor> {
        let (batch, dim) = (ready.lengths.len(), self.config.dim);
        let [height, width] = ready.size;
        image.ensure_shape("plain", "image", [batch, height, width, self.config.channels])?;
        let bias = self.parts.patch.bias.as_ref();
        let bias = bias.ok_or_else(|| Error::invalid("the input projection has no bias"))?;
        let tokens = patch_embed(image, self.config.patch, &self.parts.patch.dense_weight()?, bias)?;
        let positions = self.parts.positions.tensor().reshape([1, self.config.positions, dim])?;
        let positions = concat_all(&vec![&positions; batch])?.into_shape([batch, self.config.positions, dim])?;
        concat_tokens(&add(&tokens, &positions)?, &ready.captions)
    }

    fn last_scale<'a>(&self, table: &'a Tensor) -> Result<Option<Modulation<'a>>> {
        Modulation::new(table, VECTORS * self.parts.blocks.len()).map(Some)
    }

    /// The prediction of the last block's tokens, and the image's among these.
    fn output(&self, x: &Tensor, table: &Tensor, [height, width]: [usize; 2]) -> Result<(Tensor, Tensor)> {
        let features = narrow_tokens(x, 0, self.config.positions)?;
        let normalised = layer_norm_modulate(&features, self.last_scale(table)?, EPSILON)?;
        let patches = self.parts.output.forward(&normalised)?;
        let (patch, channels) = (self.config.patch, self.config.channels);
        Ok((unpatchify(&patches, height, width, patch, channels, 1.0)?, features))
    }
}

impl Block {
    fn normalised(x: &Tensor, table: &Tensor, vector: usize) -> Result<Tensor> {
        layer_norm_modulate(x, Some(Modulation::new(table, vector)?), EPSILON)
    }

    /// The block's result, and what it computed on the way; `first` is its first vector in the table.
    fn forward(&self, x: &Tensor, table: &Tensor, first: usize, keys: Option<&Tensor>) -> Result<(Tensor, Inside)> {
        let qkv = self.qkv.forward(&Self::normalised(x, table, first)?)?;
        let (attended, lse) = attention_with_lse(&qkv, &self.attention, keys)?;
        let middle = add(x, &self.out.forward(&attended)?)?;
        let gate_and_up = self.w13.forward(&Self::normalised(&middle, table, first + 1)?)?;
        let y = add(&middle, &self.w2.forward(&swiglu(&gate_and_up)?)?)?;
        let inside = Inside {
            qkv,
            attended,
            lse,
            middle,
            gate_and_up,
        };
        Ok((y, inside))
    }
}

impl Denoiser for PlainDit {
    fn device(&self) -> &Device {
        &self.device
    }

    fn geometry(&self) -> Geometry {
        self.config.geometry()
    }

    fn objective(&self) -> &'static dyn Objective {
        &NoisePrediction
    }

    fn prepare(&self, captions: &[&Tensor], size: [usize; 2]) -> Result<Prepared> {
        let ready = self.ready(captions, size)?;
        let tokens = self.config.positions + ready.captions.dim(1);
        Ok(Prepared::new(captions.len(), tokens, ready))
    }

    fn prepare_into(&self, captions: &[&Tensor], prepared: &mut Prepared) -> Result<()> {
        let ready: &mut Ready = prepared.inner_mut()?;
        let found: Vec<usize> = captions.iter().map(|caption| caption.dim(1)).collect();
        if found != ready.lengths {
            return Err(Error::invalid(format!(
                "captions of {found:?} tokens cannot take the place of captions of {:?}",
                ready.lengths
            )));
        }
        let new = self.ready(captions, ready.size)?;
        ready.captions.copy_from(&new.captions)
    }

    fn modulate(&self, times: &[f32], pooled: Option<&Tensor>) -> Result<Modulations> {
        if pooled.is_some() {
            return Err(Error::invalid("plain: this family takes no pooled conditions"));
        }
        let [.., c] = self.parts.time.layers(&self.device, times)?;
        Ok(Modulations { table: self.table(&c)? })
    }

    fn forward(&self, image: &Tensor, prepared: &Prepared, modulations: &Modulations) -> Result<Tensor> {
        let ready: &Ready = prepared.inner()?;
        let mut x = self.embed(image, ready)?;
        for (index, block) in self.parts.blocks.iter().enumerate() {
            let keys = ready.key_lengths.as_ref();
            x = block.forward(&x, &modulations.table, index * VECTORS, keys)?.0;
        }
        Ok(self.output(&x, &modulations.table, ready.size)?.0)
    }
}
