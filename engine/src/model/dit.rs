//! The diffusion transformer: image and caption tokens in one sequence, latent or pixel.
//!
//! A forward pass is split by what its parts depend on, so that nothing is computed twice while sampling:
//!
//! * [`Dit::prepare`]: captions through their embedder and refiner, rotary tables, key lengths. Once per prompt and size.
//! * [`Dit::modulate`]: the modulation tables of all blocks for a list of times. Once per schedule.
//! * [`Dit::forward`]: image to velocity. Once per step.

mod backward;
mod layout;

use super::block::{Block, Sequence, VECTORS, run_blocks};
use super::config::{DitConfig, ModelKind};
use super::detailer::{Detailer, DetailerLayout};
use super::limits::DeviceLimits;
use super::params::ParamSource;
use crate::device::{Device, MemoryTag};
use crate::error::{Error, Result};
use crate::ops::Modulation;
use crate::ops::conv::Canvas;
use crate::ops::layer_norm::layer_norm_modulate;
use crate::ops::linear::{InputActivation, linear, linear_vectors};
use crate::ops::patch_embed::patch_embed;
use crate::ops::rms_norm::rms_norm;
use crate::ops::timestep::timestep_embedding;
use crate::ops::tokens::{concat_all, concat_tokens, fill_pad_tokens, narrow_tokens, pad_tokens, stack_tokens};
use crate::ops::unpatchify::unpatchify;
use crate::profile;
use crate::tensor::Tensor;

pub(crate) use backward::Reach;
pub use backward::parameters;
use layout::Layout;
pub(crate) use layout::RopeTables;

/// Image and caption tokens are padded to multiples of this many.
pub const TOKEN_MULTIPLE: usize = 32;

/// What the names of a pixel model's head start with.
pub const HEAD_PREFIX: &str = "local_decoder";

/// The transformer with its input layers and what follows its last block.
pub struct Dit {
    config: DitConfig,
    device: Device,
    /// `[dim, patch · patch · channels]`, channel fastest.
    patch_weight: Tensor,
    patch_bias: Tensor,
    /// `[dim]` each
    image_pad: Tensor,
    caption_pad: Tensor,
    caption_norm: Tensor,
    /// `[dim, caption_width]`
    caption_weight: Tensor,
    caption_bias: Tensor,
    time: TimeEmbedder,
    noise_refiner: Vec<Block>,
    context_refiner: Vec<Block>,
    layers: Vec<Block>,
    output: Output,
}

/// What turns the last block's image tokens into a velocity.
enum Output {
    Latent(Box<FinalLayer>),
    Pixel(Box<Detailer>),
}

/// Sinusoid and a two-layer perceptron.
struct TimeEmbedder {
    weights: [Tensor; 2],
    biases: [Tensor; 2],
    frequencies: usize,
    /// What times are multiplied by before they are embedded, in thousands; 1 but for unusual configurations.
    scale: f32,
}

/// LayerNorm, scaled by the time, and a projection to patches.
struct FinalLayer {
    weight: Tensor,
    bias: Tensor,
    modulation_weight: Tensor,
    modulation_bias: Tensor,
}

/// A batch of captions, ready for any number of steps at one image size.
pub struct Prepared {
    /// Caption tokens `[batch, padded, dim]`.
    captions: Tensor,
    layout: Layout,
}

impl Prepared {
    /// The refined captions `[batch, tokens, dim]`, pads included.
    pub fn captions(&self) -> &Tensor {
        &self.captions
    }

    /// The number of items in the batch.
    pub fn batch(&self) -> usize {
        self.layout.batch()
    }

    /// Tokens of the main sequence, pads included.
    pub fn tokens(&self) -> usize {
        self.layout.image_tokens + self.layout.caption_tokens
    }
}

/// The modulation vectors of every block for a list of times, in one table: four per block of the noise refiner, four per
/// main block, and the final layer's one.
pub struct Modulations {
    /// f32 `[times, vectors, dim]`
    table: Tensor,
}

impl Modulations {
    /// The vectors of `count` times from `start` on; a view, nothing is copied.
    ///
    /// # Errors
    /// When there are fewer times.
    pub fn narrow(&self, start: usize, count: usize) -> Result<Self> {
        Ok(Modulations {
            table: self.table.narrow(start, count)?,
        })
    }

    /// Overwrites the vectors with those of `source`, keeping their address.
    ///
    /// # Errors
    /// When the numbers of times differ, or the table is shared.
    pub fn copy_from(&mut self, source: &Modulations) -> Result<()> {
        self.table.copy_from(&source.table)
    }

    /// A copy with a table of its own.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn duplicate(&self) -> Result<Self> {
        let mut table = Tensor::empty(&self.table.device(), self.table.shape(), self.table.dtype())?;
        table.copy_from(&self.table)?;
        Ok(Modulations { table })
    }
}

impl Dit {
    /// Refuses a device whose kernels cannot take the model's sizes; reads no values.
    ///
    /// # Errors
    /// Naming the size at fault and the way out, or a parameter of the head that is missing.
    pub fn expect_runs_on(params: &dyn ParamSource, device: &Device, config: &DitConfig) -> Result<()> {
        config.expect_runs_on(device)?;
        match config.kind {
            ModelKind::Latent => Ok(()),
            ModelKind::Pixel => DetailerLayout::read(params, HEAD_PREFIX)?.expect_runs_on(device),
        }
    }

    /// Reads a model's parameters (canonical names, see `checkpoint`). `loaded` is called after each block, with how many are done
    /// and how many there are; an error from it ends the loading.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape, the device's kernels cannot take its sizes, it has no room, or
    /// `loaded` says so.
    pub fn load(
        params: &dyn ParamSource,
        device: &Device,
        config: &DitConfig,
        loaded: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<Self> {
        Self::expect_runs_on(params, device, config)?;
        let _tag = MemoryTag::Weights.scope();
        let dim = config.dim;
        let vector = |name: &str, size: usize| params.load(device, name, &[size]);
        let matrix = |name: &str, rows: usize, columns: usize| params.load(device, name, &[rows, columns]);
        let total = 2 * config.refiner_layers + config.layers;
        let mut done = 0;
        let mut blocks = |stack: &str, count: usize, modulated: bool| -> Result<Vec<Block>> {
            (0..count)
                .map(|index| {
                    let block = Block::load(params, device, &format!("{stack}.{index}"), config, modulated)?;
                    done += 1;
                    loaded(done, total)?;
                    Ok(block)
                })
                .collect()
        };
        let embedder = format!("all_x_embedder.{}-1", config.patch);
        let patch_inputs = config.patch * config.patch * config.in_channels;
        // The pad tokens are stored as [1, dim].
        let pad = |name: &str| matrix(name, 1, dim)?.reshape([dim]);
        Ok(Dit {
            patch_weight: matrix(&format!("{embedder}.weight"), dim, patch_inputs)?,
            patch_bias: vector(&format!("{embedder}.bias"), dim)?,
            image_pad: pad("x_pad_token")?,
            caption_pad: pad("cap_pad_token")?,
            caption_norm: vector("cap_embedder.0.weight", config.caption_width)?,
            caption_weight: matrix("cap_embedder.1.weight", dim, config.caption_width)?,
            caption_bias: vector("cap_embedder.1.bias", dim)?,
            time: TimeEmbedder::load(params, device, config)?,
            noise_refiner: blocks("noise_refiner", config.refiner_layers, true)?,
            context_refiner: blocks("context_refiner", config.refiner_layers, false)?,
            layers: blocks("layers", config.layers, true)?,
            output: Output::load(params, device, config)?,
            config: config.clone(),
            device: device.clone(),
        })
    }

    /// The model's sizes.
    pub fn config(&self) -> &DitConfig {
        &self.config
    }

    /// The device it lives on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Embeds and refines captions for images of `height × width` pixels (latent model: latent cells). `captions` holds one
    /// `[1, tokens, caption_width]` tensor of features per item, real tokens only.
    ///
    /// # Errors
    /// When the size is not a multiple of the patch, a caption is empty or has another width, or the device has no room.
    pub fn prepare(&self, captions: &[&Tensor], size: [usize; 2]) -> Result<Prepared> {
        let mut tables = RopeTables::new(&self.config, &self.device, usize::MAX);
        self.prepare_with(captions, size, &mut tables)
    }

    /// As [`Dit::prepare`], with rotary tables that may be known.
    pub(crate) fn prepare_with(
        &self,
        captions: &[&Tensor],
        size: [usize; 2],
        tables: &mut RopeTables,
    ) -> Result<Prepared> {
        let _range = profile::range(c"prepare");
        let layout = self.layout(captions, size, tables)?;
        let embedded = self.embed_captions(&self.normalise_captions(captions, &layout)?.1, &layout)?;
        Ok(Prepared {
            captions: run_blocks(&self.context_refiner, None, embedded, &layout.caption_sequence())?,
            layout,
        })
    }

    fn layout(&self, captions: &[&Tensor], size: [usize; 2], tables: &mut RopeTables) -> Result<Layout> {
        for caption in captions {
            caption.expect_rank("dit", "caption", 3, "[1, tokens, width]")?;
            caption.expect_shape("dit", "caption", [1, caption.dim(1), self.config.caption_width])?;
        }
        let lengths: Vec<usize> = captions.iter().map(|caption| caption.dim(1)).collect();
        Layout::new(&self.config, &self.device, &lengths, size, tables)
    }

    /// The captions' features side by side, padded with zeros to `[batch, tokens, caption_width]`, and the same normalised.
    fn normalise_captions(&self, captions: &[&Tensor], layout: &Layout) -> Result<(Tensor, Tensor)> {
        let features = stack_tokens(captions, layout.caption_tokens)?;
        let normalised = rms_norm(&features, &self.caption_norm, self.config.norm_eps)?;
        Ok((features, normalised))
    }

    /// The projection of normalised captions `[batch, tokens, caption_width]`, pads filled in: `[batch, tokens, dim]`.
    fn embed_captions(&self, normalised: &Tensor, layout: &Layout) -> Result<Tensor> {
        let mut embedded = linear(normalised, &self.caption_weight, Some(&self.caption_bias))?;
        fill_pad_tokens(&mut embedded, &layout.caption_lengths, &self.caption_pad)?;
        Ok(embedded)
    }

    /// Brings what kernels keep of the weights in forms of their own up to date, after parameters have changed. The blocks keep
    /// nothing: their kernels read the weights as they are.
    ///
    /// # Errors
    /// When the device refuses.
    pub(crate) fn rearrange(&mut self) -> Result<()> {
        let _tag = MemoryTag::Weights.scope();
        self.output.rearrange()
    }

    /// The embeddings `[times, adaln_width]` (f32) of model times `t = 1 − sigma`.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn embed_times(&self, times: &[f32]) -> Result<Tensor> {
        self.time.embed(&self.device, times)
    }

    /// The modulation tables for model times `t = 1 − sigma`, one entry per time.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn modulate(&self, times: &[f32]) -> Result<Modulations> {
        let _range = profile::range(c"modulate");
        self.modulate_by(&self.embed_times(times)?)
    }

    /// The modulation tables for embedded times.
    fn modulate_by(&self, c: &Tensor) -> Result<Modulations> {
        let mut tables = Vec::new();
        for block in self.noise_refiner.iter().chain(&self.layers) {
            tables.extend(block.modulation_table(c)?);
        }
        if let Output::Latent(last) = &self.output {
            tables.push(last.modulation_table(c)?);
        }
        let table = concat_all(&tables.iter().collect::<Vec<_>>())?;
        Ok(Modulations { table })
    }

    /// The velocity (noise − image) of `image` `[batch, height, width, channels]` in the compute type, as f32 of the same
    /// shape. `modulations` holds one time for all items, or one per item.
    ///
    /// # Errors
    /// When shapes do not fit what was prepared, or the device has no room.
    pub fn forward(&self, image: &Tensor, prepared: &Prepared, modulations: &Modulations) -> Result<Tensor> {
        let _range = profile::range(c"dit");
        let x = self.image_features(image, prepared, modulations)?;
        self.output
            .forward(x, image, prepared.layout.grid, modulations, &self.config)
    }

    /// Whether [`Dit::paint`] can do without a velocity of the picture's size, which makes it the better way to take a step.
    pub fn paints(&self) -> bool {
        matches!((&self.output, &self.device), (Output::Pixel(_), Device::Cuda(_)))
    }

    /// The velocity of [`Dit::forward`], as the result that goes onto `canvas`. The canvas may be the picture that `image` was
    /// converted from.
    ///
    /// # Errors
    /// As [`Dit::forward`], and for a latent model.
    pub fn paint(
        &self,
        image: &Tensor,
        prepared: &Prepared,
        modulations: &Modulations,
        canvas: Canvas<'_>,
    ) -> Result<()> {
        let Output::Pixel(head) = &self.output else {
            return Err(Error::invalid("dit: only a pixel model paints onto a canvas"));
        };
        let _range = profile::range(c"dit");
        let features = self.image_features(image, prepared, modulations)?;
        let _range = profile::range(c"output");
        head.paint(image, &self.as_map(&features, prepared)?, canvas)
    }

    /// The image tokens `[batch, tokens, dim]` after the last block.
    fn image_features(&self, image: &Tensor, prepared: &Prepared, modulations: &Modulations) -> Result<Tensor> {
        let x = self.run_trunk(image, prepared, modulations)?;
        narrow_tokens(&x, 0, prepared.layout.grid[0] * prepared.layout.grid[1])
    }

    /// Image tokens as a feature map `[batch, rows, columns, dim]`.
    fn as_map(&self, features: &Tensor, prepared: &Prepared) -> Result<Tensor> {
        let [rows, columns] = prepared.layout.grid;
        features.reshape([features.dim(0), rows, columns, self.config.dim])
    }

    /// The first part of [`Dit::forward`]: the whole sequence `[batch, tokens, dim]` after the last block, image tokens
    /// first, pads included.
    ///
    /// # Errors
    /// As [`Dit::forward`].
    pub fn run_trunk(&self, image: &Tensor, prepared: &Prepared, modulations: &Modulations) -> Result<Tensor> {
        let refined = self.refine_image(image, prepared, modulations)?;
        let x = concat_tokens(&refined, &prepared.captions)?;
        drop(refined);
        let sequence = prepared.layout.sequence();
        let main_blocks = VECTORS * self.noise_refiner.len();
        run_blocks(&self.layers, Some((&modulations.table, main_blocks)), x, &sequence)
    }

    /// The first part of [`Dit::run_trunk`]: the image's tokens, padded, after their refiner.
    ///
    /// # Errors
    /// As [`Dit::forward`].
    pub fn refine_image(&self, image: &Tensor, prepared: &Prepared, modulations: &Modulations) -> Result<Tensor> {
        let embedded = self.embed_image(image, &prepared.layout)?;
        let modulation = Some((&modulations.table, 0));
        run_blocks(
            &self.noise_refiner,
            modulation,
            embedded,
            &prepared.layout.image_sequence(),
        )
    }

    /// The image's patches as tokens, pads filled in: `[batch, tokens, dim]`.
    fn embed_image(&self, image: &Tensor, layout: &Layout) -> Result<Tensor> {
        let _range = profile::range(c"patch_embed");
        let [height, width] = layout.grid.map(|extent| extent * self.config.patch);
        image.expect_shape("dit", "image", [layout.batch(), height, width, self.config.in_channels])?;
        let mut embedded = patch_embed(image, self.config.patch, &self.patch_weight, &self.patch_bias)?;
        if let Some(lengths) = &layout.image_lengths {
            embedded = pad_tokens(&embedded, layout.image_tokens)?;
            fill_pad_tokens(&mut embedded, lengths, &self.image_pad)?;
        }
        Ok(embedded)
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

impl TimeEmbedder {
    fn load(params: &dyn ParamSource, device: &Device, config: &DitConfig) -> Result<Self> {
        let [frequencies, hidden, out] = [config.t_frequencies, config.t_hidden, config.adaln_width];
        let matrix = |name: &str, rows, columns| params.load(device, name, &[rows, columns]);
        Ok(TimeEmbedder {
            weights: [
                matrix("t_embedder.mlp.0.weight", hidden, frequencies)?,
                matrix("t_embedder.mlp.2.weight", out, hidden)?,
            ],
            biases: [
                params.load(device, "t_embedder.mlp.0.bias", &[hidden])?,
                params.load(device, "t_embedder.mlp.2.bias", &[out])?,
            ],
            frequencies,
            scale: config.t_scale / 1000.0,
        })
    }

    /// Embeddings `[times, adaln_width]` in f32.
    fn embed(&self, device: &Device, times: &[f32]) -> Result<Tensor> {
        let [.., embeddings] = self.layers(device, times)?;
        Ok(embeddings)
    }

    /// The sinusoids of the times, what the first layer makes of them, and the embeddings; f32.
    fn layers(&self, device: &Device, times: &[f32]) -> Result<[Tensor; 3]> {
        const MAX_PERIOD: f32 = 10_000.0;
        let scaled: Vec<f32> = times.iter().map(|time| time * self.scale).collect();
        let sinusoids = timestep_embedding(&scaled, self.frequencies, MAX_PERIOD);
        let sinusoids = Tensor::from_slice(device, &sinusoids, [times.len(), self.frequencies])?;
        let hidden = linear_vectors(
            &sinusoids,
            InputActivation::None,
            &self.weights[0],
            Some(&self.biases[0]),
        )?;
        let embeddings = linear_vectors(&hidden, InputActivation::Silu, &self.weights[1], Some(&self.biases[1]))?;
        Ok([sinusoids, hidden, embeddings])
    }
}

impl FinalLayer {
    /// LayerNorm's epsilon.
    const EPSILON: f32 = 1e-6;

    fn load(params: &dyn ParamSource, device: &Device, config: &DitConfig) -> Result<Self> {
        let prefix = format!("all_final_layer.{}-1", config.patch);
        let (dim, outputs) = (config.dim, config.patch * config.patch * config.in_channels);
        let load = |suffix: &str, shape: &[usize]| params.load(device, &format!("{prefix}.{suffix}"), shape);
        Ok(FinalLayer {
            weight: load("linear.weight", &[outputs, dim])?,
            bias: load("linear.bias", &[outputs])?,
            modulation_weight: load("adaLN_modulation.1.weight", &[dim, config.adaln_width])?,
            modulation_bias: load("adaLN_modulation.1.bias", &[dim])?,
        })
    }

    fn modulation_table(&self, c: &Tensor) -> Result<Tensor> {
        let table = linear_vectors(
            c,
            InputActivation::Silu,
            &self.modulation_weight,
            Some(&self.modulation_bias),
        )?;
        let dim = table.dim(1);
        table.reshape([c.dim(0), 1, dim])
    }
}

impl Output {
    fn load(params: &dyn ParamSource, device: &Device, config: &DitConfig) -> Result<Self> {
        Ok(match config.kind {
            ModelKind::Latent => Output::Latent(Box::new(FinalLayer::load(params, device, config)?)),
            ModelKind::Pixel => Output::Pixel(Box::new(Detailer::load(params, device, HEAD_PREFIX)?)),
        })
    }

    /// Brings what kernels keep of the weights in forms of their own up to date; see [`Detailer::rearrange`].
    fn rearrange(&mut self) -> Result<()> {
        match self {
            Output::Latent(_) => Ok(()),
            Output::Pixel(head) => head.rearrange(),
        }
    }

    /// The velocity, which is minus what the published models put out.
    fn forward(
        &self,
        x: Tensor,
        image: &Tensor,
        grid: [usize; 2],
        modulations: &Modulations,
        config: &DitConfig,
    ) -> Result<Tensor> {
        let _range = profile::range(c"output");
        match self {
            Output::Latent(last) => {
                let table = &modulations.table;
                let scale = Modulation::new(table, table.dim(1) - 1)?;
                let normalised = layer_norm_modulate(&x, Some(scale), FinalLayer::EPSILON)?;
                drop(x);
                let patches = linear(&normalised, &last.weight, Some(&last.bias))?;
                unpatchify(
                    &patches,
                    grid[0] * config.patch,
                    grid[1] * config.patch,
                    config.patch,
                    config.in_channels,
                    -1.0,
                )
            }
            Output::Pixel(head) => {
                let features = x.reshape([x.dim(0), grid[0], grid[1], config.dim])?;
                drop(x);
                head.forward(image, &features)
            }
        }
    }
}
