//! What is to be known of the family before a model of it is described.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{CLASS, Flux2, Flux2Config, HEAD_PREFIX, names};
use crate::error::{Error, Result};
use crate::layers::{NamedParameter, ParamSource};
use crate::limits::{Heads, Layers, NormEpsilon, Patch, Real, RopeTheta, Width, WidthOrNone};
use crate::model::config::{ModelKind, read_json};
use crate::model::detailer::DetailerLayout;
use crate::model::family::{Ends, Family, Meaning, TransformerConfig};
use crate::model::spec::Spec;

/// What the names of a pixel model's head begin with.
const HEAD: &str = "local_decoder.";

/// What the names of a latent model's output side begin with.
const OUTPUT: [&str; 2] = ["norm_out.", "proj_out."];

/// The input projection.
const INPUT: &str = "x_embedder.weight";

/// No model has as many blocks of one kind.
const LARGEST_INDEX: usize = 512;

/// Channels of an image.
const IMAGE_CHANNELS: usize = 3;

/// The entries of a `config.json` that are used; each may be absent.
#[derive(Default, Deserialize)]
struct Entries {
    patch_size: Option<Patch>,
    in_channels: Option<Width>,
    out_channels: Option<Width>,
    num_layers: Option<Layers>,
    num_single_layers: Option<Layers>,
    attention_head_dim: Option<Width>,
    num_attention_heads: Option<Heads>,
    joint_attention_dim: Option<Width>,
    timestep_guidance_channels: Option<Width>,
    axes_dims_rope: Option<[WidthOrNone; 4]>,
    rope_theta: Option<RopeTheta>,
    eps: Option<NormEpsilon>,
    guidance_embeds: Option<bool>,
}

impl Entries {
    /// Reads the file.
    fn read(path: &Path) -> Result<Self> {
        let entries: Entries = read_json(path)?;
        if entries.guidance_embeds == Some(true) {
            let reason = "says guidance_embeds = true; models distilled for a strength of guidance are not supported, the base models are";
            return Err(Error::file(path, reason));
        }
        if let Some(patch) = entries.patch_size.filter(|patch| patch.get() != 1) {
            let reason = format!("says patch_size = {patch}, expected 1: the latents come packed");
            return Err(Error::file(path, reason));
        }
        Ok(entries)
    }

    /// Compares what it says with the sizes read off the tensors.
    fn check(&self, config: &Flux2Config, path: &Path) -> Result<()> {
        let width = |width: Option<Width>| width.map(Width::get);
        for (key, said, found) in [
            ("in_channels", width(self.in_channels), config.in_channels),
            ("out_channels", width(self.out_channels), config.in_channels),
            ("num_layers", self.num_layers.map(Layers::get), config.double_blocks),
            (
                "num_single_layers",
                self.num_single_layers.map(Layers::get),
                config.single_blocks,
            ),
            ("attention_head_dim", width(self.attention_head_dim), config.head_dim),
            (
                "num_attention_heads",
                self.num_attention_heads.map(Heads::get),
                config.heads,
            ),
            (
                "joint_attention_dim",
                width(self.joint_attention_dim),
                config.caption_width,
            ),
            (
                "timestep_guidance_channels",
                width(self.timestep_guidance_channels),
                config.t_frequencies,
            ),
        ] {
            if let Some(said) = said.filter(|said| *said != found) {
                let reason = format!("says {key} = {said}, but the tensors have {found}");
                return Err(Error::file(path, reason));
            }
        }
        Ok(())
    }
}

impl Flux2Config {
    /// The `config.json` with which diffusers reads a latent model.
    pub(super) fn to_json(&self) -> Value {
        let epsilon: f64 = self.norm_eps.to_string().parse().unwrap_or(f64::from(self.norm_eps));
        json!({
            "_class_name": CLASS,
            "attention_head_dim": self.head_dim,
            "axes_dims_rope": self.axes_dims,
            "eps": epsilon,
            "guidance_embeds": false,
            "in_channels": self.in_channels,
            "joint_attention_dim": self.caption_width,
            "mlp_ratio": self.ffn_hidden as f64 / self.dim as f64,
            "num_attention_heads": self.heads,
            "num_layers": self.double_blocks,
            "num_single_layers": self.single_blocks,
            "out_channels": null,
            "patch_size": 1,
            "rope_theta": self.rope_theta,
            "timestep_guidance_channels": self.t_frequencies,
        })
    }
}

/// An extent of a tensor; one without elements tells nothing.
fn extent(params: &dyn ParamSource, name: &str, index: usize) -> Option<usize> {
    let shape = params.shape(name).filter(|shape| !shape.contains(&0))?;
    shape.get(index).copied()
}

/// The blocks `{stack}.N` of which there is any of these tensors.
fn blocks(params: &dyn ParamSource, stack: &str, members: &[&str]) -> BTreeSet<usize> {
    let is_there = |index: &usize| {
        let mut names = members.iter().map(|member| format!("{stack}.{index}.{member}.weight"));
        names.any(|name| params.shape(&name).is_some())
    };
    (0..LARGEST_INDEX).filter(is_there).collect()
}

/// What the tensors tell.
struct Survey {
    kind: Option<ModelKind>,
    patch: Option<usize>,
    double: BTreeSet<usize>,
    single: BTreeSet<usize>,
}

impl Survey {
    fn of(params: &dyn ParamSource) -> Self {
        let double = [
            "attn.to_q",
            "attn.to_add_out",
            "attn.norm_q",
            "ff.linear_in",
            "ff_context.linear_in",
        ];
        let has = |name: &str| params.shape(name).is_some();
        let mut heads = ["out_conv", "bottleneck.0", "enc1.0"].iter();
        let has_head = heads.any(|name| has(&format!("{HEAD_PREFIX}.{name}.weight")));
        let features = extent(params, INPUT, 1);
        let side = features.map(|features| (features / IMAGE_CHANNELS).isqrt());
        let of_image = side.filter(|side| Some(side * side * IMAGE_CHANNELS) == features);
        let kind = match (has_head, has("proj_out.weight"), features) {
            (true, ..) => Some(ModelKind::Pixel),
            (false, true, _) => Some(ModelKind::Latent),
            (false, false, Some(_)) if of_image.is_some() => Some(ModelKind::Pixel),
            (false, false, features) => features.map(|_| ModelKind::Latent),
        };
        Survey {
            kind,
            patch: match kind {
                Some(ModelKind::Pixel) => of_image,
                _ => features.map(|_| 1),
            },
            double: blocks(params, "transformer_blocks", &double),
            single: blocks(
                params,
                "single_transformer_blocks",
                &["attn.to_qkv_mlp_proj", "attn.to_out", "attn.norm_q"],
            ),
        }
    }

    /// The sizes; `unknown` stands for those that no tensor tells.
    fn config(&self, params: &dyn ParamSource, unknown: &dyn Fn(&str) -> Result<usize>) -> Result<Flux2Config> {
        let in_blocks = |stack: &str, indices: &BTreeSet<usize>, member: &str, index: usize| {
            let mut names = indices.iter().map(|block| format!("{stack}.{block}.{member}.weight"));
            names.find_map(|name| extent(params, &name, index))
        };
        let double = |member: &str, index| in_blocks("transformer_blocks", &self.double, member, index);
        let single = |member: &str, index| in_blocks("single_transformer_blocks", &self.single, member, index);
        let told = |size: Option<usize>, tensor: &str| size.map_or_else(|| unknown(tensor), Ok);
        let dim = extent(params, INPUT, 0)
            .or(double("attn.to_q", 0))
            .or(single("attn.to_out", 0));
        let dim = told(dim, INPUT)?;
        let head_dim = double("attn.norm_q", 0).or(single("attn.norm_q", 0));
        let head_dim = told(head_dim, "transformer_blocks.0.attn.norm_q.weight")?;
        let ffn = double("ff.linear_out", 1).or(single("attn.to_out", 1).and_then(|all| all.checked_sub(dim)));
        let features = told(extent(params, INPUT, 1), INPUT)?;
        let kind = self.kind.unwrap_or(ModelKind::Latent);
        let patch = match (kind, self.patch) {
            (_, Some(patch)) => patch,
            (ModelKind::Latent, None) => 1,
            (ModelKind::Pixel, None) => {
                return Err(Error::invalid(format!(
                    "tensor `{INPUT}` takes {features} features, which are no square patches of an image"
                )));
            }
        };
        let times = "time_guidance_embed.timestep_embedder.linear_1.weight";
        Ok(Flux2Config {
            kind,
            dim,
            heads: dim / head_dim.max(1),
            head_dim,
            double_blocks: self.double.last().map_or(0, |last| last + 1),
            single_blocks: self.single.last().map_or(0, |last| last + 1),
            ffn_hidden: told(ffn, "transformer_blocks.0.ff.linear_out.weight")?,
            caption_width: told(extent(params, "context_embedder.weight", 1), "context_embedder.weight")?,
            patch,
            in_channels: (features / (patch * patch).max(1)).max(1),
            rope_theta: 2000.0,
            axes_dims: [32; 4],
            norm_eps: 1e-6,
            t_frequencies: told(extent(params, times, 1), times)?,
        })
    }
}

/// FLUX.2 \[klein\], and the pixel models made from it.
#[derive(Debug)]
pub struct Flux2Family;

impl Family for Flux2Family {
    fn name(&self) -> &'static str {
        "FLUX.2"
    }

    fn class(&self) -> &'static str {
        CLASS
    }

    fn owns(&self, name: &str) -> bool {
        names::meaning(name) != Meaning::Foreign
    }

    fn is_telling(&self, name: &str) -> bool {
        names::is_telling(name)
    }

    fn meaning(&self, name: &str, _patch: Option<usize>) -> Meaning {
        names::meaning(name)
    }

    fn ends(&self) -> [&'static [&'static str]; 2] {
        [&["x_embedder."], &[HEAD, OUTPUT[0], OUTPUT[1]]]
    }

    fn survey(&self, params: &dyn ParamSource) -> Ends {
        let survey = Survey::of(params);
        let width = extent(params, INPUT, 0).unwrap_or(0);
        let head = DetailerLayout::seen(params, HEAD_PREFIX, width);
        Ends {
            kind: survey.kind,
            patch: survey.patch,
            head: head.filter(|head| head.check().is_ok()),
        }
    }

    fn outline(&self, params: &dyn ParamSource) -> Vec<NamedParameter> {
        let survey = Survey::of(params);
        let blocks = |found: &BTreeSet<usize>| found.last().map_or(1, |last| last + 1);
        let config = Survey {
            kind: None,
            patch: Some(1),
            ..Survey::of(params)
        }
        .config(params, &|_| Ok(1));
        let described = config.map(|config| Flux2 {
            config: Flux2Config {
                double_blocks: blocks(&survey.double),
                single_blocks: blocks(&survey.single),
                ..config
            },
            head: None,
        });
        described.map_or_else(|_| Vec::new(), |model| model.metas())
    }

    fn left_behind(&self, own: &dyn ParamSource, base: &dyn ParamSource) -> Box<dyn Fn(&str) -> bool> {
        let (mine, bases) = (Survey::of(own), Survey::of(base));
        let kind = match (mine.kind, bases.kind) {
            (Some(ModelKind::Pixel), _) | (None, Some(ModelKind::Pixel)) => ModelKind::Pixel,
            _ => ModelKind::Latent,
        };
        let has_head = DetailerLayout::seen(own, HEAD_PREFIX, 0).is_some();
        let brings_head = has_head && mine.patch.is_some_and(|mine| bases.patch != Some(mine));
        Box::new(move |name| match kind {
            ModelKind::Pixel => {
                OUTPUT.iter().any(|part| name.starts_with(part)) || brings_head && name.starts_with(HEAD)
            }
            ModelKind::Latent => name.starts_with(HEAD),
        })
    }

    fn ensure_config(&self, path: &Path) -> Result<()> {
        Entries::read(path).map(|_| ())
    }

    fn read(&self, params: &dyn ParamSource, file: Option<&TransformerConfig>) -> Result<Arc<dyn Spec>> {
        let survey = Survey::of(params);
        let mut config = survey.config(params, &|tensor| {
            Err(Error::invalid(format!(
                "its sizes are unknown: tensor `{tensor}` is missing"
            )))
        })?;
        if let Some(file) = file {
            let mut entries = Entries::read(file.path())?;
            if file.is_trunk_only() {
                (entries.in_channels, entries.out_channels) = (None, None);
            }
            config.norm_eps = entries.eps.map_or(config.norm_eps, Real::single);
            config.rope_theta = entries.rope_theta.map_or(config.rope_theta, Real::get);
            let axes = entries.axes_dims_rope.map(|axes| axes.map(WidthOrNone::get));
            config.axes_dims = axes.unwrap_or(config.axes_dims);
            entries.check(&config, file.path())?;
        }
        config.check()?;
        let head = match config.kind {
            ModelKind::Latent => None,
            ModelKind::Pixel => {
                let head = DetailerLayout::seen(params, HEAD_PREFIX, config.dim).ok_or_else(|| {
                    Error::invalid(format!(
                        "lacks the head's stages or its bottleneck: tensor `{HEAD_PREFIX}.bottleneck.0.weight` or \
                         `{HEAD_PREFIX}.enc1.0.weight` is missing"
                    ))
                })?;
                head.check()?;
                Some(head)
            }
        };
        Ok(Arc::new(Flux2 { config, head }))
    }
}

/// Whether a tensor belongs to the input or output side of another kind of model than this.
pub(super) fn of_the_other_kind(kind: ModelKind, name: &str) -> bool {
    match kind {
        ModelKind::Pixel => OUTPUT.iter().any(|part| name.starts_with(part)),
        ModelKind::Latent => name.starts_with(HEAD),
    }
}
