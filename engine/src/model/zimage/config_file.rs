//! The `config.json` of a transformer as diffusers writes it.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::config::{DitConfig, DitSurvey};
use crate::error::{Error, Result};
use crate::layers::ParamSource;
use crate::limits::{Heads, Layers, NormEpsilon, Patch, Real, RopeTheta, TimeScale, Width, WidthOrNone};
use crate::model::config::read_json;
use crate::model::family::TransformerConfig;

/// The class that a transformer's `config.json` names.
pub(super) const CLASS: &str = "ZImageTransformer2DModel";

/// The entries that are used; each may be absent.
#[derive(Deserialize)]
struct Entries {
    all_patch_size: Option<Vec<Patch>>,
    all_f_patch_size: Option<Vec<Patch>>,
    in_channels: Option<Width>,
    dim: Option<Width>,
    n_layers: Option<Layers>,
    n_refiner_layers: Option<Layers>,
    n_heads: Option<Heads>,
    n_kv_heads: Option<Heads>,
    cap_feat_dim: Option<Width>,
    qk_norm: Option<bool>,
    norm_eps: Option<NormEpsilon>,
    rope_theta: Option<RopeTheta>,
    t_scale: Option<TimeScale>,
    axes_dims: Option<[WidthOrNone; 3]>,
}

/// The family's view of a `config.json`.
pub(super) struct ConfigFile<'a> {
    path: &'a Path,
    entries: Entries,
}

impl<'a> ConfigFile<'a> {
    /// Reads the file.
    ///
    /// # Errors
    /// When it cannot be read, or asks for what the engine does not do.
    pub(super) fn read(path: &'a Path) -> Result<Self> {
        let entries: Entries = read_json(path)?;
        let refuse = |what: String| Err(Error::file(path, what));
        if entries.qk_norm == Some(false) {
            return refuse("says qk_norm = false; models without normalised queries and keys are not supported".into());
        }
        if let (Some(heads), Some(kv_heads)) = (entries.n_heads, entries.n_kv_heads)
            && heads != kv_heads
        {
            return refuse(format!(
                "says n_heads = {heads} and n_kv_heads = {kv_heads}; they must be equal"
            ));
        }
        if entries
            .all_f_patch_size
            .as_deref()
            .is_some_and(|sizes| sizes.iter().map(|size| size.get()).ne([1]))
        {
            return refuse("says all_f_patch_size other than [1]; video models are not supported".into());
        }
        Ok(ConfigFile { path, entries })
    }

    /// The file without what it may not tell.
    fn of(file: &'a TransformerConfig) -> Result<Self> {
        let mut own = Self::read(file.path())?;
        if file.is_trunk_only() {
            own.entries.all_patch_size = None;
            own.entries.in_channels = None;
        }
        Ok(own)
    }

    /// Takes the settings that tensors do not tell.
    fn apply(&self, config: &mut DitConfig) {
        let entries = &self.entries;
        config.norm_eps = entries.norm_eps.map_or(config.norm_eps, Real::single);
        config.rope_theta = entries.rope_theta.map_or(config.rope_theta, Real::get);
        config.t_scale = entries.t_scale.map_or(config.t_scale, Real::single);
        let axes = entries.axes_dims.map(|axes| axes.map(WidthOrNone::get));
        config.axes_dims = axes.unwrap_or(config.axes_dims);
    }

    /// Compares the sizes with those read off the tensors.
    fn check(&self, config: &DitConfig) -> Result<()> {
        let entries = &self.entries;
        let sizes = [
            ("in_channels", entries.in_channels.map(Width::get), config.in_channels),
            ("dim", entries.dim.map(Width::get), config.dim),
            ("n_layers", entries.n_layers.map(Layers::get), config.layers),
            (
                "n_refiner_layers",
                entries.n_refiner_layers.map(Layers::get),
                config.refiner_layers,
            ),
            ("n_heads", entries.n_heads.map(Heads::get), config.heads),
            (
                "cap_feat_dim",
                entries.cap_feat_dim.map(Width::get),
                config.caption_width,
            ),
        ];
        for (key, said, found) in sizes {
            if let Some(said) = said.filter(|said| *said != found) {
                let reason = format!("says {key} = {said}, but the tensors have {found}");
                return Err(Error::file(self.path, reason));
            }
        }
        let patches = entries.all_patch_size.as_ref();
        let patches: Option<Vec<usize>> = patches.map(|patches| patches.iter().map(|patch| patch.get()).collect());
        match patches {
            Some(patches) if !patches.contains(&config.patch) => Err(Error::file(
                self.path,
                format!(
                    "says all_patch_size = {patches:?}, but the tensors have {}",
                    config.patch
                ),
            )),
            _ => Ok(()),
        }
    }
}

impl DitConfig {
    /// Reads the sizes off the tensors and the settings from `file`, the transformer's `config.json` if there is one, and
    /// compares both.
    ///
    /// # Errors
    /// When a tensor that tells a size is missing, sizes contradict each other, or the file contradicts them.
    pub fn read(params: &dyn ParamSource, file: Option<&TransformerConfig>) -> Result<Self> {
        let survey = DitSurvey::of(params);
        let mut config = DitConfig::surveyed(params, &survey, &|what, tensor| {
            Err(Error::invalid(format!(
                "the {what} is unknown: tensor `{tensor}` is missing"
            )))
        })?;
        if let Some(file) = file.map(ConfigFile::of).transpose()? {
            file.apply(&mut config);
            file.check(&config)?;
        }
        config.check(&survey)?;
        Ok(config)
    }

    /// The `config.json` with which diffusers reads the transformer.
    pub fn to_transformer_json(&self) -> Value {
        json!({
            "_class_name": CLASS,
            "all_f_patch_size": [1],
            "all_patch_size": [self.patch],
            "axes_dims": self.axes_dims,
            "axes_lens": AXES_LENS,
            "cap_feat_dim": self.caption_width,
            "dim": self.dim,
            "in_channels": self.in_channels,
            "n_heads": self.heads,
            "n_kv_heads": self.heads,
            "n_layers": self.layers,
            "n_refiner_layers": self.refiner_layers,
            "norm_eps": readable(self.norm_eps),
            "qk_norm": true,
            "rope_theta": self.rope_theta,
            "siglip_feat_dim": null,
            "t_scale": readable(self.t_scale),
        })
    }
}

/// Positions along each axis for which diffusers makes tables; the published value.
const AXES_LENS: [usize; 3] = [1536, 512, 512];

/// The f64 that prints as the f32 does.
fn readable(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}
