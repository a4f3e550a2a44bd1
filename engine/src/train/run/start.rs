//! The model that training begins from.
//!
//! Where the configuration asks for a new pixel model or for random weights, that model is made once and written to
//! `init.safetensors` in the run's folder: the run continues over it, and what was trained is merged over it later.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;

use super::checksums::{Checksums, sum_of};
use super::choices::Init;
use super::config::TrainConfig;
use super::progress::Progress;
use crate::checkpoint::{
    Container, InitOptions, ModelPaths, OutputFile, PathOverrides, SafetensorsFile, Transformer, WriteObserver, init,
    scratch,
};
use crate::data::hex;
use crate::error::{Error, Result};
use crate::model::Spec;
use crate::model::config::ModelKind;

/// The new model's name in the run's folder.
pub const INIT: &str = "init.safetensors";

/// The key under which the new model says what it was made by.
const METADATA: &str = "l2p.init";

/// Where the model that training begins from is; makes it first where the configuration asks for that. One that was made before is
/// checked, and made again where the disk has changed it.
///
/// # Errors
/// When a part is missing or damaged, `init.safetensors` is there and was made otherwise, or the disk does not take it.
pub(super) fn starting_model(config: &TrainConfig, run: &Path, progress: &mut Progress<'_>) -> Result<ModelPaths> {
    let paths = source(config)?;
    let transformer = paths.open_transformer()?;
    if !needs_init(config, &transformer)? {
        return Ok(paths);
    }
    let made_by = made_by(config, &transformer)?;
    let path = run.join(INIT);
    let mut sums = Checksums::read(run)?.unwrap_or_default();
    let sound = match path.exists() {
        true => {
            ensure_made_by(&path, &made_by)?;
            check(&path, &mut sums, progress)?
        }
        false => false,
    };
    if !sound {
        let before = sums.files.get(INIT).copied();
        let mut output = new_model(config, &transformer)?;
        output.set_metadata(METADATA, &made_by);
        sums.write_file(&path, &output, true, &mut Writing::new(progress))?;
        sums.write(run)?;
        if before.is_some_and(|before| sums.files.get(INIT) != Some(&before)) {
            progress.notice(&format!(
                "{} is not byte by byte what an earlier version made: checkpoints of that one may not belong to it",
                path.display()
            ));
        }
    }
    Ok(laid_over(paths, path))
}

/// Whether the model that was made before is as it was written; notes its sum where that is not known yet.
fn check(path: &Path, sums: &mut Checksums, progress: &mut Progress<'_>) -> Result<bool> {
    const MIB: u64 = 1 << 20;
    let mut checked = |done: u64, total: u64| {
        let (done, total) = (done.div_ceil(MIB), total.div_ceil(MIB));
        progress.report("checking the initial model (MiB)", done as usize, total as usize)
    };
    match sums.is_sound(path, &mut checked)? {
        Some(true) => Ok(true),
        Some(false) => {
            progress.notice(&format!(
                "{} is damaged on the disk: it is not what was written (checksum); it is made again",
                path.display()
            ));
            Ok(false)
        }
        None => {
            let sum = sum_of(path, &mut checked)?;
            sums.files.insert(INIT.into(), sum);
            sums.write(crate::files::folder_of(path).as_path())?;
            Ok(true)
        }
    }
}

/// Watches the writing of the initial model.
struct Writing<'a, 'b> {
    progress: &'a mut Progress<'b>,
    done: u64,
    total: u64,
}

impl<'a, 'b> Writing<'a, 'b> {
    fn new(progress: &'a mut Progress<'b>) -> Self {
        Writing {
            progress,
            done: 0,
            total: 0,
        }
    }
}

impl WriteObserver for Writing<'_, '_> {
    fn begin(&mut self, bytes: u64) {
        self.total = bytes;
    }

    fn advance(&mut self, bytes: u64) -> Result<()> {
        self.done += bytes;
        self.progress
            .report("making the initial model", self.done as usize, self.total as usize)
    }
}

/// The model that the configuration names.
///
/// # Errors
/// When a part is missing.
pub fn source(config: &TrainConfig) -> Result<ModelPaths> {
    let overrides = PathOverrides {
        base: config.base.clone(),
        text_encoder: config.text_encoder.clone(),
        tokenizer: config.tokenizer.clone(),
        vae: config.vae.clone(),
    };
    ModelPaths::resolve(&config.model, &overrides)
}

/// Whether training begins from a model that has to be made.
///
/// # Errors
/// When the configuration asks for a head where none is made.
pub fn needs_init(config: &TrainConfig, source: &Transformer) -> Result<bool> {
    let geometry = source.spec.geometry();
    let is = |patch: usize| geometry.kind == ModelKind::Pixel && geometry.patch == patch;
    let another_patch = config.patch.is_some_and(|patch| !is(patch));
    let names_head = config.head_widths.is_some() || config.head_bottleneck.is_some();
    if names_head && !another_patch && !(config.init == Init::Scratch && config.patch.is_some()) {
        return Err(Error::invalid(
            "head_widths and head_bottleneck are for a new head: give `patch` too, one that `model` does not have",
        ));
    }
    Ok(another_patch || config.init == Init::Scratch)
}

/// The tensors of a model that is made.
///
/// # Errors
/// When no head is known for the patch size, or the widths do not fit it.
pub fn new_model<'a>(config: &TrainConfig, source: &'a Transformer) -> Result<OutputFile<'a>> {
    match (config.init, init_options(config)) {
        (Init::Source, Some(options)) => Ok(init(source, &options)?.output),
        (Init::Source, None) => Err(Error::invalid("no patch is given for a new pixel model")),
        (Init::Scratch, options) => scratch(source, options.as_ref(), config.init_seed),
    }
}

/// What the model is that would be made, where it is another than the one that the configuration names.
///
/// # Errors
/// As for [`new_model`].
pub fn made_spec(config: &TrainConfig, source: &Transformer) -> Result<Option<Arc<dyn Spec>>> {
    match (needs_init(config, source)?, init_options(config)) {
        (true, Some(options)) => Ok(Some(init(source, &options)?.spec)),
        _ => Ok(None),
    }
}

/// The pixel model to make.
pub fn init_options(config: &TrainConfig) -> Option<InitOptions> {
    config.patch.map(|patch| InitOptions {
        patch,
        seed: config.init_seed,
        head_widths: config.head_widths.clone(),
        head_bottleneck: config.head_bottleneck,
    })
}

/// What decides the tensors of a model that is made.
fn made_by(config: &TrainConfig, source: &Transformer) -> Result<String> {
    let by = json!({
        "source": hex(&source.checkpoint.identity()?),
        "init": config.init.to_string(),
        "patch": config.patch,
        "seed": config.init_seed,
        "head_widths": config.head_widths,
        "head_bottleneck": config.head_bottleneck,
    });
    Ok(by.to_string())
}

fn ensure_made_by(path: &Path, made_by: &str) -> Result<()> {
    let file = SafetensorsFile::open(path)?;
    match file.metadata().get(METADATA).map(String::as_str) == Some(made_by) {
        true => Ok(()),
        false => Err(Error::file(
            path,
            "was made from another model or with other settings (init, patch, init_seed, head_widths, head_bottleneck): \
             use these again, or another --out",
        )),
    }
}

/// The parts of `source` with another transformer, which takes its settings from there.
fn laid_over(source: ModelPaths, transformer: PathBuf) -> ModelPaths {
    ModelPaths {
        path: transformer.clone(),
        container: Container::File,
        transformer: vec![transformer],
        config: None,
        kind: None,
        base: Some(Box::new(source.clone())),
        ..source
    }
}
