//! The diffusion transformer: image and caption tokens in one sequence, latent or pixel.
//!
//! As a [`Denoiser`] it prepares captions (embedder, refiner, rotary tables, key lengths), modulates (the tables of all blocks for a
//! list of times: four vectors per block of the noise refiner, four per main block, the final layer's one), and goes from image to
//! velocity.

mod backward;
pub mod block;
mod config;
mod config_file;
mod family;
mod layout;
mod names;
mod sizes;
mod spec;
mod trained;

use std::sync::Arc;

use self::block::{Block, Saving, Sequence, VECTORS, run_blocks, run_through};
use self::layout::Layout;
use self::layout::RopeTables;
use super::config::ModelKind;
use super::denoiser::{Denoiser, Geometry, Modulations, Prepared};
use super::detailer::{Detailer, DetailerLayout};
use super::spec::Spec;
use super::time_embedder::TimeEmbedder;
use crate::device::{Device, MemoryTag};
use crate::error::{Error, Result};
use crate::layers::{
    Bare, Described, Group, Kind, Linear, Loader, Module, Norm, ParamSource, Pass, Place, PlaceMut, Streamed,
    Transform, module,
};
use crate::ops::Modulation;
use crate::ops::conv::Canvas;
use crate::ops::layer_norm::layer_norm_modulate;
use crate::ops::linear::InputActivation;
use crate::ops::patch_embed::patch_embed;
use crate::ops::rms_norm::rms_norm;
use crate::ops::tokens::{concat_all, concat_tokens, fill_pad_tokens, narrow_tokens, pad_tokens, stack_tokens};
use crate::ops::unpatchify::unpatchify;
use crate::profile;
use crate::tensor::Tensor;

pub use config::{DitConfig, DitSurvey};
pub use family::ZImageFamily;
pub use sizes::ZImage;

/// Image and caption tokens are padded to multiples of this many.
pub const TOKEN_MULTIPLE: usize = 32;

/// What the names of a pixel model's head start with.
pub const HEAD_PREFIX: &str = "local_decoder";

/// The transformer with its input layers and what follows its last block.
pub struct Dit {
    parts: Parts,
    config: DitConfig,
    device: Device,
    /// Main blocks whose weights stay in host memory.
    streamed: Option<Arc<Streamed>>,
}

module! {
    /// The transformer's parameters.
    pub struct Parts<K> {
        /// Patches to tokens: `[dim, patch · patch · channels]`, channel fastest, with bias.
        pub patch: Linear<K>,
        /// `[dim]`
        pub image_pad: Bare<K>,
        /// `[dim]`
        pub caption_pad: Bare<K>,
        /// `[caption_width]`
        pub caption_norm: Norm<K>,
        /// `[dim, caption_width]`, with bias.
        pub caption: Linear<K>,
        /// Sinusoids of the time to the timestep embedding.
        pub time: TimeEmbedder<K>,
        /// Modulated blocks for image tokens alone.
        pub noise_refiner: Vec<Block<K>>,
        /// Blocks without modulation for captions alone.
        pub context_refiner: Vec<Block<K>>,
        /// The main blocks, modulated.
        pub layers: Vec<Block<K>>,
        /// What turns the last block's image tokens into a velocity.
        pub output: Output<K>,
    }
}

module! {
    /// LayerNorm, scaled by the time, and a projection to patches.
    pub struct FinalLayer<K> {
        /// `[patch · patch · channels, dim]`, with bias.
        pub linear: Linear<K>,
        /// `[dim, adaln_width]`, with bias.
        pub modulation: Linear<K>,
    }
}

/// What turns the last block's image tokens into a velocity.
pub enum Output<K: Kind = crate::layers::Loaded> {
    /// A latent model's.
    Latent(Box<FinalLayer<K>>),
    /// A pixel model's.
    Pixel(Box<Detailer<K>>),
}

impl<K: Kind> Module for Output<K> {
    type Kind = K;
    type As<B: Kind> = Output<B>;

    fn transform<B: Kind>(&self, transform: &mut impl Transform<K, B>) -> Result<Output<B>> {
        match self {
            Output::Latent(last) => last.transform(transform).map(Output::Latent),
            Output::Pixel(head) => head.transform(transform).map(Output::Pixel),
        }
    }

    fn visit<'a>(&'a self, visit: &mut dyn FnMut(Place<'a, K>)) {
        match self {
            Output::Latent(last) => last.visit(visit),
            Output::Pixel(head) => head.visit(visit),
        }
    }

    fn visit_mut<'a>(&'a mut self, visit: &mut dyn FnMut(PlaceMut<'a, K>)) {
        match self {
            Output::Latent(last) => last.visit_mut(visit),
            Output::Pixel(head) => head.visit_mut(visit),
        }
    }
}

impl Parts<Described> {
    /// The parameters of a transformer of these sizes; `head` is a pixel model's.
    ///
    /// # Errors
    /// When a pixel model has no head.
    pub fn describe(config: &DitConfig, head: Option<&DetailerLayout>) -> Result<Self> {
        Self::describe_with(config, head, [config.refiner_layers; 2])
    }

    /// The same with so many blocks in the image's and the captions' refiner.
    fn describe_with(config: &DitConfig, head: Option<&DetailerLayout>, refiners: [usize; 2]) -> Result<Self> {
        let (dim, features) = (config.dim, config.patch * config.patch * config.in_channels);
        let linear = |group, name: &str, outputs, inputs| Linear::new(group, name, outputs, inputs).with_bias();
        let stack = |name: &str, blocks: usize, modulated, group: &dyn Fn(usize) -> Group| {
            let block = |index| Block::describe(config, group(index), &format!("{name}.{index}"), modulated);
            (0..blocks).map(block).collect()
        };
        let (embedder, refiner) = (Group::Embedder, |_| Group::Refiner);
        Ok(Parts {
            patch: linear(
                Group::Input,
                &format!("all_x_embedder.{}-1", config.patch),
                dim,
                features,
            ),
            image_pad: Bare::token(embedder, "x_pad_token", dim),
            caption_pad: Bare::token(embedder, "cap_pad_token", dim),
            caption_norm: Bare::norm(embedder, "cap_embedder.0", config.caption_width),
            caption: linear(embedder, "cap_embedder.1", dim, config.caption_width),
            time: TimeEmbedder::describe(
                ["t_embedder.mlp.0", "t_embedder.mlp.2"],
                [config.t_frequencies, config.t_hidden, config.adaln_width],
                config.t_scale / 1000.0,
            ),
            noise_refiner: stack("noise_refiner", refiners[0], true, &refiner),
            context_refiner: stack("context_refiner", refiners[1], false, &refiner),
            layers: stack("layers", config.layers, true, &|index| Group::Block {
                index,
                of: config.layers,
            }),
            output: match (config.kind, head) {
                (ModelKind::Latent, _) => {
                    let prefix = format!("all_final_layer.{}-1", config.patch);
                    Output::Latent(Box::new(FinalLayer {
                        linear: linear(Group::Output, &format!("{prefix}.linear"), features, dim),
                        modulation: linear(
                            Group::Output,
                            &format!("{prefix}.adaLN_modulation.1"),
                            dim,
                            config.adaln_width,
                        ),
                    }))
                }
                (ModelKind::Pixel, Some(head)) => Output::Pixel(Box::new(head.describe(HEAD_PREFIX))),
                (ModelKind::Pixel, None) => return Err(Error::invalid("a pixel model needs a detailer head")),
            },
        })
    }
}

/// A batch of captions, ready for any number of steps at one image size.
struct Ready {
    /// Refined caption tokens `[batch, padded, dim]`.
    captions: Tensor,
    layout: Layout,
}

impl Ready {
    fn prepared(self) -> Prepared {
        let tokens = self.layout.image_tokens + self.layout.caption_tokens;
        Prepared::new(self.layout.batch(), tokens, self)
    }
}

impl Dit {
    /// Reads a model's parameters (canonical names, see `checkpoint`). `loaded` is called after each of them, with how many are done
    /// and how many there are; an error from it ends the loading.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, the device's kernels cannot take its sizes, it has no room, or
    /// `loaded` says so.
    pub fn load(
        spec: &ZImage,
        params: &dyn ParamSource,
        device: &Device,
        loaded: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<Self> {
        spec.ensure_runs_on(device)?;
        let mut parts = Loader::load(&spec.describe()?, params, device, loaded)?;
        if let Output::Pixel(head) = &mut parts.output {
            head.arrange(device)?;
        }
        Ok(Dit {
            parts,
            config: spec.config.clone(),
            device: device.clone(),
            streamed: params.streamed(),
        })
    }

    /// The model's sizes.
    pub fn config(&self) -> &DitConfig {
        &self.config
    }

    /// Embeds and refines captions, with rotary tables that may be known.
    fn ready(&self, captions: &[&Tensor], size: [usize; 2], tables: &mut RopeTables) -> Result<Ready> {
        let _range = profile::range(c"prepare");
        let layout = self.layout(captions, size, tables)?;
        let embedded = self.embed_captions(&self.normalise_captions(captions, &layout)?.1, &layout)?;
        Ok(Ready {
            captions: self.refine_captions(embedded, &layout, None)?,
            layout,
        })
    }

    fn layout(&self, captions: &[&Tensor], size: [usize; 2], tables: &mut RopeTables) -> Result<Layout> {
        for caption in captions {
            caption.ensure_rank("dit", "caption", 3, "[1, tokens, width]")?;
            caption.ensure_shape("dit", "caption", [1, caption.dim(1), self.config.caption_width])?;
        }
        let lengths: Vec<usize> = captions.iter().map(|caption| caption.dim(1)).collect();
        Layout::new(&self.config, &self.device, &lengths, size, tables)
    }

    /// The captions' features side by side, padded with zeros to `[batch, tokens, caption_width]`, and the same normalised.
    fn normalise_captions(&self, captions: &[&Tensor], layout: &Layout) -> Result<(Tensor, Tensor)> {
        let features = stack_tokens(captions, layout.caption_tokens)?;
        let normalised = rms_norm(&features, self.parts.caption_norm.tensor(), self.config.norm_eps)?;
        Ok((features, normalised))
    }

    /// The projection of normalised captions `[batch, tokens, caption_width]`, pads filled in: `[batch, tokens, dim]`.
    fn embed_captions(&self, normalised: &Tensor, layout: &Layout) -> Result<Tensor> {
        let mut embedded = self.parts.caption.forward(normalised)?;
        fill_pad_tokens(&mut embedded, &layout.caption_lengths, self.parts.caption_pad.tensor())?;
        Ok(embedded)
    }

    /// Embedded captions `[batch, tokens, dim]` after their refiner.
    fn refine_captions(&self, embedded: Tensor, layout: &Layout, saving: Option<Saving<'_>>) -> Result<Tensor> {
        let sequence = layout.caption_sequence();
        run_blocks(&self.parts.context_refiner, None, embedded, &sequence, saving)
    }

    /// Brings what kernels keep of the weights in forms of their own up to date, after parameters have changed. The blocks keep
    /// nothing: their kernels read the weights as they are.
    ///
    /// # Errors
    /// When the device refuses.
    fn rearrange(&mut self) -> Result<()> {
        let _tag = MemoryTag::Weights.scope();
        match &mut self.parts.output {
            Output::Latent(_) => Ok(()),
            Output::Pixel(head) => head.rearrange(),
        }
    }

    /// The embeddings `[times, adaln_width]` (f32) of model times `t = 1 − sigma`.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn embed_times(&self, times: &[f32]) -> Result<Tensor> {
        let [.., embeddings] = self.parts.time.layers(&self.device, times)?;
        Ok(embeddings)
    }

    /// The modulation tables for embedded times.
    fn modulate_by(&self, c: &Tensor) -> Result<Modulations> {
        let mut tables = Vec::new();
        for block in self.parts.noise_refiner.iter().chain(&self.parts.layers) {
            tables.extend(block.modulation_table(c)?);
        }
        if let Output::Latent(last) = &self.parts.output {
            tables.push(last.modulation_table(c)?);
        }
        let table = concat_all(&tables.iter().collect::<Vec<_>>())?;
        Ok(Modulations { table })
    }

    /// Begins a run through the main blocks, if some of their weights stay in host memory.
    fn pass(&self) -> Result<Option<Pass<'_>>> {
        self.streamed.as_deref().map(Streamed::pass).transpose()
    }

    /// The image tokens `[batch, tokens, dim]` after the last block.
    fn image_features(
        &self,
        image: &Tensor,
        ready: &Ready,
        table: &Tensor,
        pass: Option<&mut Pass<'_>>,
    ) -> Result<Tensor> {
        let x = self.trunk(image, ready.captions.clone(), &ready.layout, table, None, pass)?;
        narrow_tokens(&x, 0, ready.layout.grid[0] * ready.layout.grid[1])
    }

    /// Image tokens as a feature map `[batch, rows, columns, dim]`.
    fn as_map(&self, features: &Tensor, [rows, columns]: [usize; 2]) -> Result<Tensor> {
        features.reshape([features.dim(0), rows, columns, self.config.dim])
    }

    /// The refined captions `[batch, tokens, dim]`, pads included, of prepared conditions.
    ///
    /// # Errors
    /// When they are another family's.
    pub fn refined_captions<'a>(&self, prepared: &'a Prepared) -> Result<&'a Tensor> {
        Ok(&prepared.inner::<Ready>()?.captions)
    }

    /// The first part of [`Dit::forward`]: the whole sequence `[batch, tokens, dim]` after the last block, image tokens
    /// first, pads included.
    ///
    /// # Errors
    /// As [`Dit::forward`].
    pub fn run_trunk(&self, image: &Tensor, prepared: &Prepared, modulations: &Modulations) -> Result<Tensor> {
        let Ready { captions, layout } = prepared.inner()?;
        let mut pass = self.pass()?;
        let x = self.trunk(image, captions.clone(), layout, &modulations.table, None, pass.as_mut())?;
        pass.map_or(Ok(()), Pass::end)?;
        Ok(x)
    }

    /// The whole sequence after the last block, for refined captions; `saving` for the image's refiner and the main blocks, `pass` for
    /// main blocks in host memory.
    fn trunk(
        &self,
        image: &Tensor,
        captions: Tensor,
        layout: &Layout,
        table: &Tensor,
        saving: Option<[Saving<'_>; 2]>,
        pass: Option<&mut Pass<'_>>,
    ) -> Result<Tensor> {
        let [refiner, layers] = saving.map_or([None, None], |saving| saving.map(Some));
        let saves = layers.is_some();
        let refined = self.refine(image, layout, table, refiner)?;
        let x = {
            let _tag = saves.then(|| MemoryTag::Saved.scope());
            concat_tokens(&refined, &captions)?
        };
        drop((refined, captions));
        let first = VECTORS * self.parts.noise_refiner.len();
        let (blocks, vectors) = (&self.parts.layers, Some((table, first)));
        match layers {
            Some(layers) => run_blocks(blocks, vectors, x, &layout.sequence(), Some(layers)),
            None => run_through(blocks, vectors, x, &layout.sequence(), pass),
        }
    }

    /// The first part of [`Dit::run_trunk`]: the image's tokens, padded, after their refiner.
    ///
    /// # Errors
    /// As [`Dit::forward`].
    pub fn refine_image(&self, image: &Tensor, prepared: &Prepared, modulations: &Modulations) -> Result<Tensor> {
        let Ready { layout, .. } = prepared.inner()?;
        self.refine(image, layout, &modulations.table, None)
    }

    fn refine(&self, image: &Tensor, layout: &Layout, table: &Tensor, saving: Option<Saving<'_>>) -> Result<Tensor> {
        let embedded = self.embed_image(image, layout)?;
        let sequence = layout.image_sequence();
        run_blocks(&self.parts.noise_refiner, Some((table, 0)), embedded, &sequence, saving)
    }

    /// The image's patches as tokens, pads filled in: `[batch, tokens, dim]`.
    fn embed_image(&self, image: &Tensor, layout: &Layout) -> Result<Tensor> {
        let _range = profile::range(c"patch_embed");
        let [height, width] = layout.grid.map(|extent| extent * self.config.patch);
        image.ensure_shape("dit", "image", [layout.batch(), height, width, self.config.in_channels])?;
        let mut embedded = self.parts.patch_embed(image, self.config.patch)?;
        if let Some(lengths) = &layout.image_lengths {
            embedded = pad_tokens(&embedded, layout.image_tokens)?;
            fill_pad_tokens(&mut embedded, lengths, self.parts.image_pad.tensor())?;
        }
        Ok(embedded)
    }
}

impl Denoiser for Dit {
    fn device(&self) -> &Device {
        &self.device
    }

    fn geometry(&self) -> Geometry {
        self.config.geometry()
    }

    fn prepare(&self, captions: &[&Tensor], size: [usize; 2]) -> Result<Prepared> {
        let mut tables = RopeTables::new(&self.config, &self.device, usize::MAX);
        Ok(self.ready(captions, size, &mut tables)?.prepared())
    }

    fn prepare_into(&self, captions: &[&Tensor], prepared: &mut Prepared) -> Result<()> {
        let _range = profile::range(c"prepare");
        let ready: &mut Ready = prepared.inner_mut()?;
        ready.layout.ensure_lengths(captions)?;
        let features = self.normalise_captions(captions, &ready.layout)?.1;
        let embedded = self.embed_captions(&features, &ready.layout)?;
        let refined = self.refine_captions(embedded, &ready.layout, None)?;
        ready.captions.copy_from(&refined)
    }

    fn modulate(&self, times: &[f32], pooled: Option<&Tensor>) -> Result<Modulations> {
        let _range = profile::range(c"modulate");
        if pooled.is_some() {
            return Err(Error::invalid("dit: this family takes no pooled conditions"));
        }
        self.modulate_by(&self.embed_times(times)?)
    }

    fn forward(&self, image: &Tensor, prepared: &Prepared, modulations: &Modulations) -> Result<Tensor> {
        let _range = profile::range(c"dit");
        let ready: &Ready = prepared.inner()?;
        let mut pass = self.pass()?;
        let x = self.image_features(image, ready, &modulations.table, pass.as_mut())?;
        let _range = profile::range(c"output");
        let predicted = match &self.parts.output {
            Output::Latent(last) => last.forward(&x, &modulations.table, [image.dim(1), image.dim(2)], &self.config),
            Output::Pixel(head) => {
                let map = self.as_map(&x, ready.layout.grid)?;
                drop(x);
                head.forward(image, &map)
            }
        }?;
        // Only now, so that the head runs while the next pass's first blocks are copied.
        pass.map_or(Ok(()), Pass::end)?;
        Ok(predicted)
    }

    fn paints(&self) -> bool {
        matches!((&self.parts.output, &self.device), (Output::Pixel(_), Device::Cuda(_)))
    }

    fn paint(&self, image: &Tensor, prepared: &Prepared, modulations: &Modulations, canvas: Canvas<'_>) -> Result<()> {
        let Output::Pixel(head) = &self.parts.output else {
            return Err(Error::invalid("dit: only a pixel model paints onto a canvas"));
        };
        let _range = profile::range(c"dit");
        let ready: &Ready = prepared.inner()?;
        let mut pass = self.pass()?;
        let features = self.image_features(image, ready, &modulations.table, pass.as_mut())?;
        let _range = profile::range(c"output");
        head.paint(image, &self.as_map(&features, ready.layout.grid)?, canvas)?;
        pass.map_or(Ok(()), Pass::end)
    }
}

impl Layout {
    fn image_sequence(&self) -> Sequence<'_> {
        Sequence {
            rope: &self.image_rope,
            key_lengths: None,
        }
    }

    fn caption_sequence(&self) -> Sequence<'_> {
        Sequence {
            rope: &self.caption_rope,
            key_lengths: self.caption_key_lengths.as_ref(),
        }
    }

    /// Image tokens, then caption tokens.
    fn sequence(&self) -> Sequence<'_> {
        Sequence {
            rope: &self.rope,
            key_lengths: self.key_lengths.as_ref(),
        }
    }
}

impl Parts {
    fn patch_embed(&self, image: &Tensor, patch: usize) -> Result<Tensor> {
        let bias = self.patch.bias.as_ref();
        let bias = bias.ok_or_else(|| Error::invalid("the input projection has no bias"))?;
        patch_embed(image, patch, &self.patch.dense_weight()?, bias)
    }
}

impl FinalLayer {
    /// LayerNorm's epsilon.
    const EPSILON: f32 = 1e-6;

    fn modulation_table(&self, c: &Tensor) -> Result<Tensor> {
        let table = self.modulation.forward_vectors(c, InputActivation::Silu)?;
        let dim = table.dim(1);
        table.reshape([c.dim(0), 1, dim])
    }

    /// Its vector in a table of modulation vectors: the last.
    fn scale(table: &Tensor) -> Result<Modulation<'_>> {
        Modulation::new(table, table.dim(1) - 1)
    }

    /// The velocity, which is minus what the published models put out, of image tokens `[batch, tokens, dim]`.
    fn forward(&self, x: &Tensor, table: &Tensor, [height, width]: [usize; 2], config: &DitConfig) -> Result<Tensor> {
        let normalised = layer_norm_modulate(x, Some(Self::scale(table)?), Self::EPSILON)?;
        let patches = self.linear.forward(&normalised)?;
        unpatchify(&patches, height, width, config.patch, config.in_channels, -1.0)
    }
}
