//! The `config.json` of a transformer as diffusers writes it.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

use super::{DitConfig, read_json};
use crate::error::{Error, Result};

/// The class that a transformer's `config.json` names.
const CLASS: &str = "ZImageTransformer2DModel";

/// The entries that are used; each may be absent.
#[derive(Clone, Debug, Default, Deserialize)]
struct Entries {
    #[serde(rename = "_class_name")]
    class_name: Option<String>,
    all_patch_size: Option<Vec<usize>>,
    all_f_patch_size: Option<Vec<usize>>,
    in_channels: Option<usize>,
    dim: Option<usize>,
    n_layers: Option<usize>,
    n_refiner_layers: Option<usize>,
    n_heads: Option<usize>,
    n_kv_heads: Option<usize>,
    cap_feat_dim: Option<usize>,
    qk_norm: Option<bool>,
    norm_eps: Option<f32>,
    rope_theta: Option<f64>,
    t_scale: Option<f32>,
    axes_dims: Option<[usize; 3]>,
}

/// A transformer's `config.json`: settings, and sizes to be compared with the tensors.
#[derive(Clone, Debug)]
pub struct TransformerConfig {
    path: PathBuf,
    entries: Entries,
}

impl TransformerConfig {
    /// Reads the file.
    ///
    /// # Errors
    /// When it cannot be read, or describes a transformer of another kind.
    pub fn read(path: &Path) -> Result<Self> {
        let entries: Entries = read_json(path)?;
        let refuse = |what: String| Err(Error::file(path, what));
        if let Some(class) = entries.class_name.as_deref().filter(|class| *class != CLASS) {
            return refuse(format!("describes a {class}, expected a {CLASS}"));
        }
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
        if entries.all_f_patch_size.as_deref().is_some_and(|sizes| sizes != [1]) {
            return refuse("says all_f_patch_size other than [1]; video models are not supported".into());
        }
        Ok(TransformerConfig {
            path: path.into(),
            entries,
        })
    }

    /// The same without what a pixel model does not share with the source model that it was made from.
    pub fn trunk_only(mut self) -> Self {
        self.entries.all_patch_size = None;
        self.entries.in_channels = None;
        self
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the settings that tensors do not tell.
    pub(super) fn apply(&self, config: &mut DitConfig) {
        let entries = &self.entries;
        config.norm_eps = entries.norm_eps.unwrap_or(config.norm_eps);
        config.rope_theta = entries.rope_theta.unwrap_or(config.rope_theta);
        config.t_scale = entries.t_scale.unwrap_or(config.t_scale);
        config.axes_dims = entries.axes_dims.unwrap_or(config.axes_dims);
    }

    /// Compares the sizes with those read off the tensors.
    pub(super) fn check(&self, config: &DitConfig) -> Result<()> {
        let entries = &self.entries;
        let sizes = [
            ("in_channels", entries.in_channels, config.in_channels),
            ("dim", entries.dim, config.dim),
            ("n_layers", entries.n_layers, config.layers),
            ("n_refiner_layers", entries.n_refiner_layers, config.refiner_layers),
            ("n_heads", entries.n_heads, config.heads),
            ("cap_feat_dim", entries.cap_feat_dim, config.caption_width),
        ];
        for (key, said, found) in sizes {
            if let Some(said) = said.filter(|said| *said != found) {
                let reason = format!("says {key} = {said}, but the tensors have {found}");
                return Err(Error::file(&self.path, reason));
            }
        }
        match &entries.all_patch_size {
            Some(patches) if !patches.contains(&config.patch) => Err(Error::file(
                &self.path,
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
