//! What describes the models: sizes read off the tensors, and the settings that only a `config.json` holds.
//!
//! A file's own words win over defaults; where a `config.json` contradicts the tensors beside it, that is an error. Numbers are
//! bounded where they are read, see [`limits`](crate::limits).

mod scheduler;
mod text;
mod vae;

pub use scheduler::SchedulerConfig;
pub use text::TextConfig;
pub use vae::VaeConfig;

use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files;
use crate::limits::Budget;

/// What a transformer's input and output are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelKind {
    /// Latents of a VAE; the output comes from a linear layer.
    Latent,
    /// Images; the output comes from a Detailer Head.
    Pixel,
}

impl fmt::Display for ModelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ModelKind::Latent => "latent",
            ModelKind::Pixel => "pixel",
        })
    }
}

/// What is said of weights that a `config.json` calls quantised.
const QUANTISED: &str = "says quantization_config: its weights are quantised, which this program does not read; use the model's \
                         BF16, F16 or F32 files";

/// Reads a JSON file.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    files::read_json(path, Budget::CONFIG)
}

/// The `config.json` of a part: in its folder, or beside its file.
fn config_of(part: &Path) -> PathBuf {
    let folder = if part.is_dir() {
        part
    } else {
        part.parent().unwrap_or(part)
    };
    folder.join("config.json")
}

/// What a `config.json` says that it describes.
#[derive(Deserialize)]
pub(super) struct Described {
    /// diffusers' classes.
    #[serde(rename = "_class_name")]
    pub(super) class_name: Option<String>,
    /// transformers' models.
    model_type: Option<String>,
    quantization_config: Option<IgnoredAny>,
    /// What only a VAE has.
    latent_channels: Option<IgnoredAny>,
}

impl Described {
    /// Reads what the part's `config.json` describes; `None` where a file has none beside it. Beside a file may stand another
    /// part's, a folder's is its own.
    fn of(part: &Path) -> Result<Option<Self>> {
        let config = config_of(part);
        if !part.is_dir() && !config.is_file() {
            return Ok(None);
        }
        read_json(&config).map(Some)
    }

    /// Refuses what is quantised.
    pub(super) fn ensure_plain(&self, config: &Path) -> Result<()> {
        match self.quantization_config {
            Some(_) => Err(Error::file(config, QUANTISED)),
            None => Ok(()),
        }
    }
}
