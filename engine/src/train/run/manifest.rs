//! `l2p.json` beside what was trained, so that `l2p-sample --model` takes a checkpoint's folder as it is.

use std::path::{Path, PathBuf};

use super::checkpoint::DELTA;
use crate::checkpoint::{Defaults, MANIFEST, MANIFEST_FORMAT, Manifest, ModelPaths, OneOrMany};
use crate::error::{Error, Result};
use crate::files;
use crate::flow::solver::Solver;
use crate::model::config::ModelKind;
use crate::model::objective::Trained;
use crate::pipeline::Settings;

/// Writes the manifest of a delta over the model at `paths` into `folder`, a checkpoint of the run in `run`. What is in the
/// run's own folder is named relative to the checkpoint, so that the run can be moved.
///
/// # Errors
/// When a path cannot be resolved, or the disk does not take the file.
pub(super) fn write(
    folder: &Path,
    run: &Path,
    paths: &ModelPaths,
    kind: ModelKind,
    trained: &Trained,
    settings: &Settings,
) -> Result<()> {
    let canonical = |path: &Path| path.canonicalize().map_err(|error| Error::io(path, error));
    let run = canonical(run)?;
    let named = |path: &Path| {
        let path = canonical(path)?;
        Ok(match path.strip_prefix(&run) {
            Ok(inside) => Path::new("../..").join(inside),
            Err(_) => path,
        })
    };
    let part = |path: &Option<PathBuf>| path.as_deref().map(named).transpose();
    let manifest = Manifest {
        format: MANIFEST_FORMAT,
        kind: Some(kind),
        transformer: OneOrMany::One(DELTA.into()),
        base: Some(named(&paths.path)?),
        text_encoder: part(&paths.text_encoder)?,
        tokenizer: part(&paths.tokenizer)?,
        vae: part(&paths.vae)?,
        scheduler: part(&paths.scheduler)?,
        // Where it is flow matching from the start, nothing needs to be said.
        objective: (*trained != Trained::FLOW || paths.trained()? != Trained::FLOW).then(|| trained.clone()),
        defaults: defaults(settings, trained),
    };
    put(folder, &manifest)
}

/// Settings as a manifest has them.
fn defaults(settings: &Settings, trained: &Trained) -> Defaults {
    Defaults {
        width: Some(settings.width),
        height: Some(settings.height),
        steps: Some(settings.steps),
        shift: Some(settings.shift),
        cfg: Some(settings.cfg),
        solver: Some(settings.solver).filter(|solver| *solver != Solver::default_of(trained)),
    }
}

/// Writes a manifest into a folder.
///
/// # Errors
/// When the disk does not take it.
pub(super) fn put(folder: &Path, manifest: &Manifest) -> Result<()> {
    let json = serde_json::to_vec_pretty(manifest).map_err(|error| Error::invalid(error.to_string()))?;
    files::replace(&folder.join(MANIFEST), &json)
}
