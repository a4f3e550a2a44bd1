//! The diffusion transformer's sizes, read off its tensors.

use std::collections::BTreeSet;

use serde::Serialize;

use super::HEAD_PREFIX;
use crate::error::{Error, Result};
use crate::layers::ParamSource;
use crate::limits::Width;
use crate::model::config::ModelKind;
use crate::model::denoiser::Geometry;
use crate::model::limits::{DeviceLimits, heads, vectors};

/// No model has as many blocks of one kind, or as large a patch; bounds the search for tensors by name.
const LARGEST_INDEX: usize = 512;

/// Channels of an image.
const IMAGE_CHANNELS: usize = 3;

/// Which model the tensors are of; a delta, or a damaged file, leaves some of it open.
#[derive(Clone, Debug, Default)]
pub struct DitSurvey {
    /// Latent or pixel.
    pub kind: Option<ModelKind>,
    /// Width of the input projection's tokens.
    pub width: Option<usize>,
    /// Side of a patch, in pixels of the image or latent.
    pub patch: Option<usize>,
    /// Channels of the image or latent.
    pub in_channels: Option<usize>,
    /// Main blocks of which there are tensors.
    pub layers: BTreeSet<usize>,
    /// Image refiner blocks.
    pub noise_refiners: BTreeSet<usize>,
    /// Caption refiner blocks.
    pub context_refiners: BTreeSet<usize>,
}

impl DitSurvey {
    /// Looks at every tensor that tells something.
    pub fn of(params: &dyn ParamSource) -> Self {
        let mut survey = DitSurvey {
            layers: blocks(params, "layers"),
            noise_refiners: blocks(params, "noise_refiner"),
            context_refiners: blocks(params, "context_refiner"),
            ..DitSurvey::default()
        };
        survey.read_ends(params);
        survey
    }

    /// An extent of a tensor of any block.
    fn of_blocks(&self, params: &dyn ParamSource, name: &str, index: usize) -> Option<usize> {
        let groups = [
            ("layers", &self.layers),
            ("noise_refiner", &self.noise_refiners),
            ("context_refiner", &self.context_refiners),
        ];
        let mut blocks = groups
            .into_iter()
            .flat_map(|(group, indices)| indices.iter().map(move |i| format!("{group}.{i}")));
        blocks.find_map(|block| extent(params, &format!("{block}.{name}"), index))
    }

    /// Kind, patch and channels from the input projection and what the output side holds.
    fn read_ends(&mut self, params: &dyn ParamSource) {
        let embedders: Vec<(usize, usize, usize)> = (1..=LARGEST_INDEX)
            .filter_map(|patch| match params.shape(&embedder(patch))?[..] {
                [dim, features] if dim > 0 && features > 0 => Some((patch, dim, features)),
                _ => None,
            })
            .collect();
        let has_head = ["out_conv", "bottleneck.0", "enc1.0"]
            .iter()
            .any(|name| params.shape(&format!("{HEAD_PREFIX}.{name}.weight")).is_some());
        let with_final_layer = (1..=LARGEST_INDEX).find(|patch| {
            params
                .shape(&format!("all_final_layer.{patch}-1.linear.weight"))
                .is_some()
        });
        let of_image = embedders
            .iter()
            .find(|(patch, _, features)| patch * patch * IMAGE_CHANNELS == *features);

        let chosen = match (has_head, with_final_layer) {
            (true, _) => of_image.or(embedders.first()),
            (false, Some(patch)) => embedders.iter().find(|(of, _, _)| *of == patch).or(embedders.first()),
            (false, None) => of_image.or(embedders.first()),
        };
        self.kind = match (has_head, with_final_layer, chosen) {
            (true, _, _) => Some(ModelKind::Pixel),
            (false, Some(_), _) => Some(ModelKind::Latent),
            (false, None, Some(_)) if of_image.is_some() => Some(ModelKind::Pixel),
            (false, None, Some(_)) => Some(ModelKind::Latent),
            (false, None, None) => None,
        };
        if let Some(&(patch, dim, features)) = chosen {
            self.patch = Some(patch);
            self.width = Some(dim);
            self.in_channels = Some(features / (patch * patch)).filter(|channels| *channels > 0);
        }
    }
}

/// The blocks of a group of which there is a tensor that every block has.
fn blocks(params: &dyn ParamSource, group: &str) -> BTreeSet<usize> {
    const EVERY_BLOCK_HAS: [&str; 4] = [
        "attention_norm1.weight",
        "attention.to_q.weight",
        "feed_forward.w1.weight",
        "attention.norm_q.weight",
    ];
    let is_there = |index: &usize| {
        EVERY_BLOCK_HAS
            .iter()
            .any(|name| params.shape(&format!("{group}.{index}.{name}")).is_some())
    };
    (0..LARGEST_INDEX).filter(is_there).collect()
}

/// An extent of a tensor; one without elements tells nothing.
fn extent(params: &dyn ParamSource, name: &str, index: usize) -> Option<usize> {
    params
        .shape(name)
        .filter(|shape| !shape.contains(&0))?
        .get(index)
        .copied()
}

fn embedder(patch: usize) -> String {
    format!("all_x_embedder.{patch}-1.weight")
}

/// The sizes and settings of a diffusion transformer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DitConfig {
    /// Latent or pixel.
    pub kind: ModelKind,
    /// Width of the residual stream.
    pub dim: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Main blocks.
    pub layers: usize,
    /// Blocks of each of the two refiners.
    pub refiner_layers: usize,
    /// Width inside the feed-forward networks.
    pub ffn_hidden: usize,
    /// Width of caption features.
    pub caption_width: usize,
    /// Side of a patch, in pixels of the image or latent.
    pub patch: usize,
    /// Channels of the image or latent.
    pub in_channels: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Widths within a head that each of the three position axes rotates.
    pub axes_dims: [usize; 3],
    /// Added to the mean square in RMSNorm.
    pub norm_eps: f32,
    /// The timestep is multiplied by this before its sinusoids are taken.
    pub t_scale: f32,
    /// Width of the timestep's sinusoids.
    pub t_frequencies: usize,
    /// Width between the timestep's two layers.
    pub t_hidden: usize,
    /// Width of the timestep embedding, which modulates the blocks.
    pub adaln_width: usize,
}

impl DitConfig {
    /// What the model takes and gives.
    pub(super) fn geometry(&self) -> Geometry {
        Geometry {
            kind: self.kind,
            patch: self.patch,
            channels: self.in_channels,
        }
    }

    /// The sizes that the tensors tell, with the published model's settings; for a size that none tells, what `unknown` gives for its
    /// name and its tensor.
    pub(super) fn surveyed(
        params: &dyn ParamSource,
        survey: &DitSurvey,
        unknown: &dyn Fn(&str, &str) -> Result<usize>,
    ) -> Result<Self> {
        let told = |size: Option<usize>, what, tensor| size.map_or_else(|| unknown(what, tensor), Ok);
        let of_blocks = |name: &str, index| survey.of_blocks(params, name, index);
        let of = |name: &str, index| extent(params, name, index);
        let (projection, times) = ("all_x_embedder.{P}-1.weight", "t_embedder.mlp.0.weight");
        let patch = told(survey.patch, "patch size", projection)?;
        let dim = of_blocks("attention_norm1.weight", 0).or(survey.width);
        let dim = told(dim, "width", "layers.0.attention_norm1.weight")?;
        let head_dim = of_blocks("attention.norm_q.weight", 0);
        let head_dim = told(head_dim, "head width", "layers.0.attention.norm_q.weight")?;
        let ffn_hidden = of_blocks("feed_forward.w1.weight", 0);
        let adaln_width = of("t_embedder.mlp.2.weight", 0).or(of_blocks("adaLN_modulation.0.weight", 1));
        Ok(DitConfig {
            kind: survey.kind.unwrap_or(ModelKind::Latent),
            dim,
            heads: dim / head_dim.max(1),
            head_dim,
            layers: survey.layers.last().map_or(0, |last| last + 1),
            refiner_layers: survey.noise_refiners.last().map_or(0, |last| last + 1),
            ffn_hidden: told(ffn_hidden, "feed-forward width", "layers.0.feed_forward.w1.weight")?,
            caption_width: told(of("cap_embedder.0.weight", 0), "caption width", "cap_embedder.0.weight")?,
            patch,
            in_channels: told(survey.in_channels, "number of channels", projection)?,
            rope_theta: 256.0,
            axes_dims: [32, 48, 48],
            norm_eps: 1e-5,
            t_scale: 1000.0,
            t_frequencies: told(of(times, 1), "timestep width", times)?,
            t_hidden: told(of(times, 0), "timestep width", times)?,
            adaln_width: told(adaln_width, "modulation width", "t_embedder.mlp.2.weight")?,
        })
    }

    /// Whether the sizes go together, and with the tensors that there are.
    ///
    /// # Errors
    /// Naming what does not.
    pub(super) fn check(&self, survey: &DitSurvey) -> Result<()> {
        self.check_bounds().map_err(Error::invalid)?;
        let DitConfig { dim, head_dim, .. } = self;
        if self.layers == 0 {
            return Err(Error::invalid(
                "there is no main block: tensor `layers.0.attention.to_q.weight` is missing",
            ));
        }
        if survey.noise_refiners != survey.context_refiners {
            return Err(Error::invalid(format!(
                "there are image refiner blocks {:?} but caption refiner blocks {:?}; a block is missing",
                survey.noise_refiners, survey.context_refiners
            )));
        }
        if self.heads == 0 || self.heads * head_dim != *dim {
            return Err(Error::invalid(format!(
                "a width of {dim} does not divide into heads of {head_dim}"
            )));
        }
        if self.axes_dims.iter().sum::<usize>() != *head_dim || self.axes_dims.iter().any(|axis| axis % 2 == 1) {
            return Err(Error::invalid(format!(
                "position axes of {:?} do not make up heads of {head_dim}; put a config.json with `axes_dims` beside the tensors",
                self.axes_dims
            )));
        }
        let features = self.patch * self.patch * self.in_channels;
        if self.kind == ModelKind::Pixel && self.in_channels != IMAGE_CHANNELS {
            return Err(Error::invalid(format!(
                "tensor `{}` takes {features} features, expected {} for an image's patches",
                embedder(self.patch),
                self.patch * self.patch * IMAGE_CHANNELS
            )));
        }
        Ok(())
    }

    /// Refuses sizes beyond all models, with which shapes and estimates could not be computed.
    fn check_bounds(&self) -> std::result::Result<(), String> {
        let widths = [
            ("width", self.dim),
            ("head width", self.head_dim),
            ("feed-forward width", self.ffn_hidden),
            ("caption width", self.caption_width),
            ("number of channels", self.in_channels),
            ("timestep frequencies", self.t_frequencies),
            ("timestep width", self.t_hidden),
            ("modulation width", self.adaln_width),
        ];
        for (what, width) in widths {
            Width::checked(width as u64).map_err(|reason| format!("its tensors have a {what} of {width}: {reason}"))?;
        }
        Ok(())
    }
}

impl DeviceLimits for DitConfig {
    const PART: &'static str = "transformer";

    fn cuda_obstacle(&self) -> Option<String> {
        vectors(&[
            ("width", self.dim),
            ("feed-forward width", self.ffn_hidden),
            ("caption width", self.caption_width),
            ("modulation width", self.adaln_width),
            ("timestep frequencies", self.t_frequencies),
            ("timestep width", self.t_hidden),
            ("patch side times channels", self.patch * self.in_channels),
        ])
        .or_else(|| heads(self.head_dim))
    }
}
