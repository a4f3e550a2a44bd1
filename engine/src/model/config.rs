//! What describes the models: sizes read off the tensors, and the settings that only a `config.json` holds.
//!
//! A file's own words win over defaults; where a `config.json` contradicts the tensors beside it, that is an error.

mod dit;
mod parts;
mod transformer;

pub use dit::{DitConfig, DitSurvey, ModelKind, block_tensors};
pub use parts::{SchedulerConfig, TextConfig, VaeConfig};
pub use transformer::TransformerConfig;

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// Reads a JSON file.
fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(|error| Error::io(path, error))?;
    serde_json::from_slice(&text).map_err(|error| Error::file(path, format!("is not what was expected: {error}")))
}
