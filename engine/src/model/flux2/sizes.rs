//! Sizes, from which the parameters follow.

use serde::Serialize;

use super::block::BlockSizes;
use super::vectors::{STREAM, SUBLAYER};
use super::{FinalLayer, HEAD_PREFIX, Parts};
use crate::error::{Error, Result};
use crate::layers::{Described, Group, Linear};
use crate::limits::{Layers, Patch, Width};
use crate::model::config::ModelKind;
use crate::model::denoiser::Geometry;
use crate::model::detailer::DetailerLayout;
use crate::model::limits::{DeviceLimits, heads, vectors};
use crate::model::rope::RopeAxes;
use crate::model::time_embedder::TimeEmbedder;

/// The sizes and settings of a transformer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Flux2Config {
    /// Latent or pixel.
    pub kind: ModelKind,
    /// Width of the streams.
    pub dim: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Double-stream blocks.
    pub double_blocks: usize,
    /// Single-stream blocks.
    pub single_blocks: usize,
    /// Width inside the feed-forward networks.
    pub ffn_hidden: usize,
    /// Width of caption features.
    pub caption_width: usize,
    /// Side of a patch; 1 for a latent model, whose latents come packed 2×2 from the VAE.
    pub patch: usize,
    /// Channels of the image or the packed latent.
    pub in_channels: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Widths within a head that each of the four position axes rotates.
    pub axes_dims: [usize; 4],
    /// Added to variances in LayerNorm and to mean squares in RMSNorm.
    pub norm_eps: f32,
    /// Width of the timestep's sinusoids.
    pub t_frequencies: usize,
}

impl Flux2Config {
    /// What the model takes and gives.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            kind: self.kind,
            patch: self.patch,
            channels: self.in_channels,
        }
    }

    /// Main blocks of both kinds.
    pub fn blocks(&self) -> usize {
        self.double_blocks + self.single_blocks
    }

    /// Elements of a patch.
    pub fn patch_features(&self) -> usize {
        self.patch * self.patch * self.in_channels
    }

    /// Rows and columns of patches of a picture.
    ///
    /// # Errors
    /// When it cannot be cut into patches.
    pub fn grid(&self, [height, width]: [usize; 2]) -> Result<[usize; 2]> {
        let patch = self.patch;
        match height > 0 && width > 0 && height.is_multiple_of(patch) && width.is_multiple_of(patch) {
            true => Ok([height / patch, width / patch]),
            false => Err(Error::invalid(format!(
                "an image of {width}x{height} cannot be cut into patches of {patch}"
            ))),
        }
    }

    /// The rotary embedding of positions on the axes (time, row, column, place in the text).
    pub(super) fn rope(&self) -> RopeAxes<4> {
        RopeAxes {
            theta: self.rope_theta,
            dims: self.axes_dims,
            rounded: false,
        }
    }

    /// Whether the sizes go together.
    ///
    /// # Errors
    /// Naming what does not.
    pub(super) fn check(&self) -> Result<()> {
        let widths = [
            ("width", self.dim),
            ("head width", self.head_dim),
            ("feed-forward width", self.ffn_hidden),
            ("caption width", self.caption_width),
            ("number of channels", self.in_channels),
            ("timestep frequencies", self.t_frequencies),
        ];
        for (what, width) in widths {
            Width::checked(width as u64)
                .map_err(|reason| Error::invalid(format!("its tensors have a {what} of {width}: {reason}")))?;
        }
        Patch::checked(self.patch as u64)
            .map_err(|reason| Error::invalid(format!("its input has patches of {}: {reason}", self.patch)))?;
        for (what, blocks) in [("double", self.double_blocks), ("single", self.single_blocks)] {
            Layers::checked(blocks as u64)
                .map_err(|reason| Error::invalid(format!("it has {blocks} {what}-stream blocks: {reason}")))?;
        }
        if self.double_blocks == 0 || self.single_blocks == 0 {
            return Err(Error::invalid(format!(
                "it has {} double-stream and {} single-stream blocks, expected some of both",
                self.double_blocks, self.single_blocks
            )));
        }
        if self.heads == 0 || self.heads * self.head_dim != self.dim {
            return Err(Error::invalid(format!(
                "a width of {} does not divide into heads of {}",
                self.dim, self.head_dim
            )));
        }
        let axes = self.axes_dims;
        let sum: usize = axes.iter().sum();
        if sum != self.head_dim || axes.iter().any(|axis| axis % 2 == 1) {
            return Err(Error::invalid(format!(
                "position axes of {axes:?} do not make up heads of {}; put a config.json with `axes_dims_rope` beside the tensors",
                self.head_dim
            )));
        }
        Ok(())
    }
}

impl DeviceLimits for Flux2Config {
    const PART: &'static str = "transformer";

    fn cuda_obstacle(&self) -> Option<String> {
        vectors(&[
            ("width", self.dim),
            ("feed-forward width", self.ffn_hidden),
            ("caption width", self.caption_width),
            ("timestep frequencies", self.t_frequencies),
            ("patch side times channels", self.patch * self.in_channels),
        ])
        .or_else(|| heads(self.head_dim))
    }
}

/// A transformer of the family, latent or pixel.
#[derive(Clone, Debug, PartialEq)]
pub struct Flux2 {
    /// Its sizes and settings.
    pub config: Flux2Config,
    /// A pixel model's head.
    pub head: Option<DetailerLayout>,
}

impl Flux2 {
    /// Its parameters.
    pub fn describe(&self) -> Parts<Described> {
        let config = &self.config;
        let (dim, of, features) = (config.dim, config.blocks(), config.patch_features());
        let linear = |group, name: &str, outputs, inputs| Linear::new(group, name, outputs, inputs);
        let modulation = |name: &str, vectors: usize| {
            linear(Group::Embedder, &format!("{name}.linear"), vectors * dim, dim).precise()
        };
        let sizes = BlockSizes {
            dim,
            ffn: config.ffn_hidden,
            heads: config.heads,
            head_dim: config.head_dim,
            epsilon: config.norm_eps,
        };
        let block = |index| Group::Block { index, of };
        let embedder = "time_guidance_embed.timestep_embedder";
        let head = self.head.as_ref().filter(|_| config.kind == ModelKind::Pixel);
        let last = || FinalLayer {
            modulation: linear(Group::Output, "norm_out.linear", 2 * dim, dim).precise(),
            linear: linear(Group::Output, "proj_out", features, dim),
        };
        Parts {
            patch: linear(Group::Input, "x_embedder", dim, features),
            caption: linear(Group::Embedder, "context_embedder", dim, config.caption_width),
            time: TimeEmbedder::describe(
                [&format!("{embedder}.linear_1"), &format!("{embedder}.linear_2")],
                [config.t_frequencies, dim, dim],
                1.0,
            )
            .without_bias(),
            image_modulation: modulation("double_stream_modulation_img", STREAM),
            text_modulation: modulation("double_stream_modulation_txt", STREAM),
            single_modulation: modulation("single_stream_modulation", SUBLAYER),
            double: (0..config.double_blocks)
                .map(|index| sizes.double(block(index), index))
                .collect(),
            single: (0..config.single_blocks)
                .map(|index| sizes.single(block(config.double_blocks + index), index))
                .collect(),
            last: (config.kind == ModelKind::Latent).then(last),
            head: head.map(|head| head.describe(HEAD_PREFIX)),
        }
    }
}
