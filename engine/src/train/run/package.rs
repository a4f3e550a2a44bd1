//! What was trained as a model of its own: a folder with the trained tensors and an `l2p.json` that names the model they lie over.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::checkpoint::{Checkpoint, DELTA, EMA};
use super::checksums::Checksums;
use super::choices::Init;
use super::config::TrainConfig;
use super::manifest;
use super::start::{init_options, needs_init, source};
use crate::checkpoint::{
    MANIFEST, MANIFEST_FORMAT, Manifest, ModelPaths, OneOrMany, PathOverrides, SafetensorsFile, init,
};
use crate::error::{Error, Result};
use crate::files::{FolderLock, relative, remove_leftovers, sync_folder};
use crate::model::config::ModelKind;

/// What [`package`] made.
#[derive(Clone, Debug, Serialize)]
pub struct Packaged {
    /// The folder.
    pub folder: PathBuf,
    /// The model that the tensors lie over.
    pub base: PathBuf,
    /// Tensors in it.
    pub tensors: usize,
    /// Bytes of the tensors' file.
    pub bytes: u64,
}

/// Which of a checkpoint's tensors are packaged, over what.
#[derive(Clone, Debug, Default)]
pub struct PackageOptions {
    /// The averaged weights instead of the last ones.
    pub average: bool,
    /// The model that the tensors lie over, where it is no longer where the run found it.
    pub base: Option<PathBuf>,
    /// Replace what is there.
    pub force: bool,
}

/// Makes a model of the checkpoint in `folder` in the folder `out`. It lies over the model that the run was told to begin from
/// where it holds all that the run added to that one, and else over the run's `init.safetensors`.
///
/// # Errors
/// When a file is missing or damaged, `out` holds a model already, or the disk does not take it.
pub fn package(folder: &Path, out: &Path, options: &PackageOptions) -> Result<Packaged> {
    let checkpoint = Checkpoint::open(folder)?;
    let file = match options.average {
        true => EMA,
        false => DELTA,
    };
    let tensors = SafetensorsFile::open(&folder.join(file)).map_err(|error| match (error, options.average) {
        (Error::Io { path, .. }, true) => Error::file(path, "is not there: the run kept no average (key `ema`)"),
        (error, _) => error,
    })?;
    let over = Manifest::read(&folder.join(MANIFEST))?;
    let base = match &options.base {
        Some(base) => base.clone(),
        None => base_of(&checkpoint, &over, &tensors)?,
    };
    if Checksums::read(folder)?
        .unwrap_or_default()
        .is_sound(tensors.path(), &mut |_, _| Ok(()))?
        == Some(false)
    {
        return Err(Error::file(
            tensors.path(),
            "is damaged on the disk: it is not what was written (checksum)",
        ));
    }
    fs::create_dir_all(out).map_err(|error| Error::io(out, error))?;
    let _lock = FolderLock::acquire(out, "l2p-train package")?;
    remove_leftovers(out, Some(DELTA));
    let target = out.join(DELTA);
    let taken = [&target, &out.join(MANIFEST)]
        .into_iter()
        .find(|path| path.exists())
        .cloned();
    if let Some(taken) = taken.filter(|_| !options.force) {
        return Err(Error::file(
            taken,
            "is already there: choose another folder, or replace it with --force",
        ));
    }
    let bytes = copy(tensors.path(), &target)?;
    let seen = |path: &Path| {
        let canonical = |path: &Path| path.canonicalize().map_err(|error| Error::io(path, error));
        Ok(relative(&canonical(path)?, &canonical(out)?))
    };
    let known = ModelPaths::resolve(&base, &PathOverrides::default())?;
    // What the base does not bring along stays where the run found it.
    let part = |of_base: &Option<PathBuf>, of_run: &Option<PathBuf>| match (of_base, of_run) {
        (None, Some(path)) => seen(path).map(Some),
        _ => Ok(None),
    };
    let manifest = Manifest {
        format: MANIFEST_FORMAT,
        kind: Some(over.kind.unwrap_or(ModelKind::Pixel)),
        transformer: OneOrMany::One(DELTA.into()),
        base: Some(seen(&base)?),
        text_encoder: part(&known.text_encoder, &over.text_encoder)?,
        tokenizer: part(&known.tokenizer, &over.tokenizer)?,
        vae: part(&known.vae, &over.vae)?,
        scheduler: part(&known.scheduler, &over.scheduler)?,
        objective: over.objective,
        defaults: over.defaults,
    };
    manifest::put(out, &manifest)?;
    // Whole, and of sizes that fit each other.
    ModelPaths::resolve(out, &PathOverrides::default())?.open_transformer()?;
    Ok(Packaged {
        folder: out.into(),
        base,
        tensors: tensors.tensors().len(),
        bytes,
    })
}

/// The model that the tensors can lie over.
fn base_of(checkpoint: &Checkpoint, over: &Manifest, tensors: &SafetensorsFile) -> Result<PathBuf> {
    let begun = over.base.clone();
    let begun = begun.ok_or_else(|| Error::file(checkpoint.folder(), "names no model that its tensors lie over"))?;
    let config: TrainConfig = serde_json::from_value(checkpoint.state.config.clone()).map_err(|error| {
        Error::file(
            checkpoint.folder(),
            format!("holds a configuration that cannot be read: {error}"),
        )
    })?;
    let paths = source(&config).map_err(|error| {
        Error::invalid(format!(
            "the model that the run began from is not where it was ({error}): name it with --base"
        ))
    })?;
    let transformer = paths.open_transformer()?;
    if !needs_init(&config, &transformer)? {
        return Ok(begun);
    }
    let added = match (config.init, init_options(&config)) {
        (Init::Source, Some(options)) => init(&transformer, &options)?.random,
        // All of it.
        _ => SafetensorsFile::open(&begun)?.tensors().keys().cloned().collect(),
    };
    match added.iter().all(|name| tensors.tensors().contains_key(name)) {
        true => Ok(paths.path),
        false => Ok(begun),
    }
}

/// Copies a file: beside its target, onto the disk, and renamed into place.
fn copy(from: &Path, to: &Path) -> Result<u64> {
    let folder = crate::files::folder_of(to);
    let failed = |error: std::io::Error| Error::io(to, error);
    let beside = folder.join(format!(".{DELTA}.tmp"));
    let copied = fs::copy(from, &beside).and_then(|bytes| {
        fs::File::open(&beside)?.sync_all()?;
        fs::rename(&beside, to)?;
        Ok(bytes)
    });
    if copied.is_err() {
        // Nobody will rename it any more.
        let _ = fs::remove_file(&beside);
    }
    sync_folder(&folder);
    copied.map_err(failed)
}
