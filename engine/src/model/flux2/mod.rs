//! FLUX.2 \[klein\]: blocks of two streams, then blocks of one, latent or pixel.
//!
//! ```text
//! c = time embedding;  image's, text's and single-stream blocks' shifts, scales and gates = W · silu(c), shared by all blocks of a kind
//! image = patches · W,  text = captions · W
//! double-stream blocks on (image, text), single-stream blocks on [image, text]
//! latent: velocity = unpatchify(W · (LN(image) · (1 + scale) + shift));  pixel: velocity = Detailer Head(picture, image)
//! ```
//!
//! The time is 1 for noise and 0 for the picture, the velocity noise − picture. A latent is packed: 2×2 cells of the VAE are one of the
//! model's, with four times the channels. Positions on the axes (time, row, column, place in the text) are `(0, h, w, 0)` of image tokens
//! and `(0, 0, 0, i)` of the text's. Sources: the published class of these models; Esser et al., "Scaling Rectified Flow Transformers for
//! High-Resolution Image Synthesis" (2024), for double streams; Dehghani et al., "Scaling Vision Transformers to 22 Billion
//! Parameters" (2023), for attention beside the feed-forward network.

mod block;
mod family;
mod names;
mod objective;
mod sizes;
mod spec;
#[cfg(test)]
mod tests;
mod trained;
mod vectors;

use self::block::{DoubleBlock, Sequence, SingleBlock};
use self::vectors::{LAST, SINGLE, TEXT, Vectors};
use super::denoiser::{Denoiser, Geometry, Modulations, Prepared};
use super::detailer::Detailer;
use super::objective::Objective;
use super::spec::Spec;
use super::time_embedder::TimeEmbedder;
use crate::device::{Device, MemoryTag};
use crate::error::{Error, Result};
use crate::layers::{Linear, Loader, ParamSource, module};
use crate::ops::Modulation;
use crate::ops::conv::Canvas;
use crate::ops::layer_norm::layer_norm_shift;
use crate::ops::linear::InputActivation;
use crate::ops::patch_embed::patch_embed;
use crate::ops::tokens::{concat_all, concat_tokens, narrow_tokens, stack_tokens};
use crate::ops::unpatchify::unpatchify;
use crate::profile;
use crate::tensor::Tensor;

pub use family::Flux2Family;
pub use sizes::{Flux2, Flux2Config};

/// The class that a `config.json` names.
const CLASS: &str = "Flux2Transformer2DModel";

/// What the names of a pixel model's head start with.
const HEAD_PREFIX: &str = "local_decoder";

module! {
    /// The parameters.
    pub struct Parts<K> {
        /// `[dim, patch · patch · channels]`, channel fastest.
        pub patch: Linear<K>,
        /// `[dim, caption_width]`
        pub caption: Linear<K>,
        /// Times to conditions of the blocks' width.
        pub time: TimeEmbedder<K>,
        /// `[6 · dim, dim]`: shift, scale and gate of attention, then of the feed-forward network, of the image's streams.
        pub image_modulation: Linear<K>,
        /// The same of the text's.
        pub text_modulation: Linear<K>,
        /// `[3 · dim, dim]`: shift, scale and gate of single-stream blocks.
        pub single_modulation: Linear<K>,
        /// The double-stream blocks, which come first.
        pub double: Vec<DoubleBlock<K>>,
        /// The single-stream blocks.
        pub single: Vec<SingleBlock<K>>,
        /// A latent model's output.
        pub last: Option<FinalLayer<K>>,
        /// A pixel model's.
        pub head: Option<Detailer<K>>,
    }
}

module! {
    /// LayerNorm, moved by the time, and a projection to patches.
    pub struct FinalLayer<K> {
        /// `[2 · dim, dim]`: scale, then shift.
        pub modulation: Linear<K>,
        /// `[patch · patch · channels, dim]`
        pub linear: Linear<K>,
    }
}

/// The model on its device.
pub struct Flux2Dit {
    parts: Parts,
    config: Flux2Config,
    device: Device,
    /// Zeros `[dim]`, for the input projection has no bias.
    no_bias: Tensor,
}

/// What follows from sizes and numbers of tokens.
struct Layout {
    size: [usize; 2],
    grid: [usize; 2],
    lengths: Vec<usize>,
    image_rope: Tensor,
    text_rope: Tensor,
    rope: Tensor,
    keys: Option<Tensor>,
}

impl Layout {
    fn image_tokens(&self) -> usize {
        self.grid[0] * self.grid[1]
    }

    fn text_tokens(&self) -> usize {
        self.text_rope.dim(1)
    }

    fn sequence(&self) -> Sequence<'_> {
        Sequence {
            image_rope: &self.image_rope,
            text_rope: &self.text_rope,
            rope: &self.rope,
            keys: self.keys.as_ref(),
        }
    }
}

/// A batch of captions, ready for any number of steps at one size.
struct Ready {
    /// `[batch, tokens, dim]`
    captions: Tensor,
    layout: Layout,
}

impl Flux2Dit {
    /// Reads the parameters.
    ///
    /// # Errors
    /// As [`Spec::load`].
    pub fn load(
        spec: &Flux2,
        params: &dyn ParamSource,
        device: &Device,
        loaded: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<Self> {
        spec.ensure_runs_on(device)?;
        let mut parts = Loader::load(&spec.describe(), params, device, loaded)?;
        if let Some(head) = &mut parts.head {
            head.arrange(device)?;
        }
        Ok(Flux2Dit {
            parts,
            config: spec.config.clone(),
            no_bias: Tensor::zeros(device, [spec.config.dim], device.compute_dtype())?,
            device: device.clone(),
        })
    }

    /// Brings what kernels keep of the weights in forms of their own up to date.
    fn rearrange(&mut self) -> Result<()> {
        let _tag = MemoryTag::Weights.scope();
        self.parts.head.as_mut().map_or(Ok(()), Detailer::rearrange)
    }

    fn layout(&self, captions: &[&Tensor], size: [usize; 2]) -> Result<Layout> {
        for caption in captions {
            caption.ensure_rank("flux2", "caption", 3, "[1, tokens, width]")?;
            caption.ensure_shape("flux2", "caption", [1, caption.dim(1), self.config.caption_width])?;
        }
        let grid = self.config.grid(size)?;
        let lengths: Vec<usize> = captions.iter().map(|caption| caption.dim(1)).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        if lengths.contains(&0) || longest == 0 {
            return Err(Error::invalid("a caption has no tokens"));
        }
        let tokens = grid[0] * grid[1];
        let image: Vec<[usize; 4]> = (0..tokens)
            .map(|index| [0, index / grid[1], index % grid[1], 0])
            .collect();
        let text: Vec<[usize; 4]> = (0..longest).map(|index| [0, 0, 0, index]).collect();
        let both = [image.clone(), text.clone()].concat();
        let rope = self.config.rope();
        let table = |positions| rope.table(&self.device, &[positions]);
        let keys: Vec<i32> = lengths.iter().map(|length| (tokens + length) as i32).collect();
        let unequal = lengths.iter().any(|length| *length != longest);
        Ok(Layout {
            size,
            grid,
            image_rope: table(image)?,
            text_rope: table(text)?,
            rope: table(both)?,
            keys: unequal
                .then(|| Tensor::from_slice(&self.device, &keys, [keys.len()]))
                .transpose()?,
            lengths,
        })
    }

    /// The captions' features side by side `[batch, tokens, caption_width]`.
    fn features(captions: &[&Tensor], layout: &Layout) -> Result<Tensor> {
        stack_tokens(captions, layout.text_tokens())
    }

    /// The tables of embedded times: the vectors of [`vectors`], in their order.
    fn table(&self, c: &Tensor) -> Result<Tensor> {
        let dim = self.config.dim;
        let vectors = |layer: &Linear| {
            let table = layer.forward_vectors(c, InputActivation::Silu)?;
            table.reshape([c.dim(0), layer.extents()[0] / dim, dim])
        };
        let last = self.parts.last.as_ref().map(|last| &last.modulation);
        let parts = &self.parts;
        let layers = [
            &parts.image_modulation,
            &parts.text_modulation,
            &parts.single_modulation,
        ];
        let tables: Vec<Tensor> = layers.into_iter().chain(last).map(vectors).collect::<Result<_>>()?;
        concat_all(&tables.iter().collect::<Vec<_>>())
    }

    /// The vectors `[times, vectors, dim]` of modulation for model times: those of the image's streams, of the text's, of single-stream
    /// blocks, and of a final layer.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn modulation_vectors(&self, times: &[f32]) -> Result<Tensor> {
        let [.., c] = self.parts.time.layers(&self.device, times)?;
        self.table(&c)
    }

    /// The first part of [`Denoiser::forward`]: the image tokens `[batch, tokens, dim]` after the last block.
    ///
    /// # Errors
    /// As [`Denoiser::forward`].
    pub fn run_trunk(&self, image: &Tensor, prepared: &Prepared, modulations: &Modulations) -> Result<Tensor> {
        self.image_features(image, prepared.inner()?, &modulations.table)
    }

    fn vectors<'a>(&self, table: &'a Tensor, first: usize) -> Vectors<'a> {
        Vectors {
            table,
            first,
            epsilon: self.config.norm_eps,
        }
    }

    /// Of the image's and the text's streams.
    fn double_vectors<'a>(&self, table: &'a Tensor) -> [Vectors<'a>; 2] {
        [0, TEXT].map(|first| self.vectors(table, first))
    }

    /// Of single-stream blocks.
    fn single_vectors<'a>(&self, table: &'a Tensor) -> Vectors<'a> {
        self.vectors(table, SINGLE)
    }

    /// The image's tokens.
    fn embed(&self, image: &Tensor, layout: &Layout) -> Result<Tensor> {
        let _range = profile::range(c"patch_embed");
        let [height, width] = layout.size;
        let shape = [layout.lengths.len(), height, width, self.config.in_channels];
        image.ensure_shape("flux2", "image", shape)?;
        patch_embed(
            image,
            self.config.patch,
            &self.parts.patch.dense_weight()?,
            &self.no_bias,
        )
    }

    /// The image tokens `[batch, tokens, dim]` after the last block.
    fn image_features(&self, image: &Tensor, ready: &Ready, table: &Tensor) -> Result<Tensor> {
        let sequence = ready.layout.sequence();
        let mut streams = [self.embed(image, &ready.layout)?, ready.captions.clone()];
        let vectors = self.double_vectors(table);
        for block in &self.parts.double {
            streams = block.forward([&streams[0], &streams[1]], vectors, &sequence)?;
        }
        let mut x = concat_tokens(&streams[0], &streams[1])?;
        drop(streams);
        for block in &self.parts.single {
            x = block.forward(&x, self.single_vectors(table), &sequence)?;
        }
        narrow_tokens(&x, 0, ready.layout.image_tokens())
    }

    /// Image tokens as a feature map `[batch, rows, columns, dim]`.
    fn as_map(&self, features: &Tensor, [rows, columns]: [usize; 2]) -> Result<Tensor> {
        features.reshape([features.dim(0), rows, columns, self.config.dim])
    }

    /// A latent model's velocity of the last block's image tokens.
    fn latent_output(
        &self,
        last: &FinalLayer,
        x: &Tensor,
        table: &Tensor,
        [height, width]: [usize; 2],
    ) -> Result<Tensor> {
        let patches = last.linear.forward(&last.normalise(x, table, self.config.norm_eps)?)?;
        let Flux2Config { patch, in_channels, .. } = self.config;
        unpatchify(&patches, height, width, patch, in_channels, 1.0)
    }

    fn no_output() -> Error {
        Error::invalid("flux2: the model has neither a final layer nor a head")
    }
}

impl FinalLayer {
    fn scale(table: &Tensor) -> Result<Modulation<'_>> {
        Modulation::new(table, LAST)
    }

    fn normalise(&self, x: &Tensor, table: &Tensor, epsilon: f32) -> Result<Tensor> {
        layer_norm_shift(x, Self::scale(table)?, Modulation::new(table, LAST + 1)?, epsilon)
    }
}

impl Denoiser for Flux2Dit {
    fn device(&self) -> &Device {
        &self.device
    }

    fn geometry(&self) -> Geometry {
        self.config.geometry()
    }

    fn objective(&self) -> &'static dyn Objective {
        &objective::FlowAtLevel
    }

    fn prepare(&self, captions: &[&Tensor], size: [usize; 2]) -> Result<Prepared> {
        let _range = profile::range(c"prepare");
        let layout = self.layout(captions, size)?;
        let ready = Ready {
            captions: self.parts.caption.forward(&Self::features(captions, &layout)?)?,
            layout,
        };
        let tokens = ready.layout.image_tokens() + ready.layout.text_tokens();
        Ok(Prepared::new(captions.len(), tokens, ready))
    }

    fn prepare_into(&self, captions: &[&Tensor], prepared: &mut Prepared) -> Result<()> {
        let _range = profile::range(c"prepare");
        let ready: &mut Ready = prepared.inner_mut()?;
        let found: Vec<usize> = captions.iter().map(|caption| caption.dim(1)).collect();
        if found != ready.layout.lengths {
            return Err(Error::invalid(format!(
                "captions of {found:?} tokens cannot take the place of captions of {:?}",
                ready.layout.lengths
            )));
        }
        let features = Self::features(captions, &ready.layout)?;
        ready.captions.copy_from(&self.parts.caption.forward(&features)?)
    }

    fn modulate(&self, times: &[f32], pooled: Option<&Tensor>) -> Result<Modulations> {
        let _range = profile::range(c"modulate");
        if pooled.is_some() {
            return Err(Error::invalid("flux2: this family takes no pooled conditions"));
        }
        let table = self.modulation_vectors(times)?;
        Ok(Modulations { table })
    }

    fn forward(&self, image: &Tensor, prepared: &Prepared, modulations: &Modulations) -> Result<Tensor> {
        let _range = profile::range(c"dit");
        let ready: &Ready = prepared.inner()?;
        let x = self.image_features(image, ready, &modulations.table)?;
        let _range = profile::range(c"output");
        match (&self.parts.last, &self.parts.head) {
            (Some(last), _) => self.latent_output(last, &x, &modulations.table, ready.layout.size),
            (None, Some(head)) => {
                let map = self.as_map(&x, ready.layout.grid)?;
                drop(x);
                head.forward(image, &map)
            }
            (None, None) => Err(Self::no_output()),
        }
    }

    fn paints(&self) -> bool {
        self.parts.head.is_some() && matches!(self.device, Device::Cuda(_))
    }

    fn paint(&self, image: &Tensor, prepared: &Prepared, modulations: &Modulations, canvas: Canvas<'_>) -> Result<()> {
        let Some(head) = &self.parts.head else {
            return Err(Error::invalid("flux2: only a pixel model paints onto a canvas"));
        };
        let _range = profile::range(c"dit");
        let ready: &Ready = prepared.inner()?;
        let features = self.image_features(image, ready, &modulations.table)?;
        let _range = profile::range(c"output");
        head.paint(image, &self.as_map(&features, ready.layout.grid)?, canvas)
    }
}
