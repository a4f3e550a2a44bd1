//! `l2p.json` beside what was trained, so that `l2p-sample --model` takes a checkpoint's folder as it is.

use std::path::{Path, PathBuf};

use super::checkpoint::DELTA;
use crate::checkpoint::{Defaults, MANIFEST, MANIFEST_FORMAT, Manifest, ModelPaths, OneOrMany};
use crate::error::{Error, Result};
use crate::files;
use crate::model::config::ModelKind;
use crate::pipeline::Settings;

/// The manifest of a delta over the model at `paths`, for a file in `folder`.
///
/// # Errors
/// When a path cannot be resolved, or the disk does not take the file.
pub(super) fn write(folder: &Path, paths: &ModelPaths, kind: ModelKind, settings: &Settings) -> Result<()> {
    let absolute = |path: &Path| path.canonicalize().map_err(|error| Error::io(path, error));
    let part = |path: &Option<PathBuf>| path.as_deref().map(absolute).transpose();
    let manifest = Manifest {
        format: MANIFEST_FORMAT,
        kind: Some(kind),
        transformer: OneOrMany::One(DELTA.into()),
        base: Some(absolute(&paths.path)?),
        text_encoder: part(&paths.text_encoder)?,
        tokenizer: part(&paths.tokenizer)?,
        vae: part(&paths.vae)?,
        scheduler: part(&paths.scheduler)?,
        defaults: Defaults {
            width: Some(settings.width),
            height: Some(settings.height),
            steps: Some(settings.steps),
            shift: Some(settings.shift),
            cfg: Some(settings.cfg),
        },
    };
    let json = serde_json::to_vec_pretty(&manifest).map_err(|error| Error::invalid(error.to_string()))?;
    files::replace(&folder.join(MANIFEST), &json)
}
