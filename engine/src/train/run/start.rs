//! The model that training begins from.
//!
//! Where the configuration asks for a new pixel model or for random weights, that model is made once and written to
//! `init.safetensors` in the run's folder: the run continues over it, and what was trained is merged over it later.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::choices::Init;
use super::config::TrainConfig;
use crate::checkpoint::{
    Container, HeadLayout, InitOptions, ModelPaths, OutputFile, PathOverrides, SafetensorsFile, Transformer,
    WriteObserver, init, scratch, write_file,
};
use crate::data::hex;
use crate::error::{Error, Result};
use crate::model::config::{DitConfig, ModelKind};

/// The new model's name in the run's folder.
pub const INIT: &str = "init.safetensors";

/// The key under which the new model says what it was made by.
const METADATA: &str = "l2p.init";

/// Where the model that training begins from is; makes it first where the configuration asks for that.
///
/// # Errors
/// When a part is missing or damaged, `init.safetensors` is there and was made otherwise, or the disk does not take it.
pub fn starting_model(config: &TrainConfig, run: &Path, observer: &mut dyn WriteObserver) -> Result<ModelPaths> {
    let paths = source(config)?;
    let transformer = paths.open_transformer()?;
    if !needs_init(config, &transformer)? {
        return Ok(paths);
    }
    let made_by = made_by(config, &transformer)?;
    let path = run.join(INIT);
    match path.exists() {
        true => expect_made_by(&path, &made_by)?,
        false => {
            let mut output = new_model(config, &transformer)?;
            output.set_metadata(METADATA, &made_by);
            write_file(&path, &output, false, observer)?;
        }
    }
    Ok(laid_over(paths, path))
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
    let is = |patch: usize| source.config.kind == ModelKind::Pixel && source.config.patch == patch;
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

/// The sizes of the model that would be made, its head's among them, where it has others than the one that the configuration
/// names.
///
/// # Errors
/// As for [`new_model`].
pub fn made_sizes(config: &TrainConfig, source: &Transformer) -> Result<Option<(DitConfig, HeadLayout)>> {
    match (needs_init(config, source)?, init_options(config)) {
        (true, Some(options)) => {
            let plan = init(source, &options)?;
            Ok(Some((plan.config, plan.head)))
        }
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

fn expect_made_by(path: &Path, made_by: &str) -> Result<()> {
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
