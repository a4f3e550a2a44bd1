//! The flow-matching loss of a model on a data set, as a run's validation computes it.

use std::path::Path;

use serde::Serialize;

use super::Observer;
use super::choices::Init;
use super::config::TrainConfig;
use super::feeder::Feeder;
use super::progress::Progress;
use super::setup::Setup;
use crate::device::Device;
use crate::dist::World;
use crate::error::{Error, Result};
use crate::train::{Policy, Ranks, Recompute, TrainOptions, TrainableModel};

/// What [`evaluate`] found.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// The mean loss.
    pub loss: f64,
    /// Pictures it is the mean of.
    pub pictures: usize,
}

/// The loss of the model that `config` names on all pictures of its `data`: the same pictures, noise and noise levels every
/// time, so that models can be compared. `cache` holds the features of the captions.
///
/// # Errors
/// When something is missing, damaged or does not fit, the loss is not finite, or the observer asks to stop.
pub fn evaluate(
    config: &TrainConfig,
    cache: &Path,
    device: &Device,
    observer: &mut dyn Observer,
) -> Result<Evaluation> {
    config.ensure_named(true)?;
    let config = TrainConfig {
        validation: Some(config.data.clone()),
        held_out: 0,
        patch: None,
        init: Init::Source,
        head_widths: None,
        head_bottleneck: None,
        sample_every: 0,
        sample_prompts: Vec::new(),
        // The least that a trainable model can carry beside its weights.
        policy: Policy::HeadOnly,
        recompute: Recompute::All,
        ema: None,
        ..config.clone()
    };
    let mut progress = Progress { observer };
    let setup = Setup::new(&config, cache, device, &Ranks::solo(), &mut progress)?;
    let transformer = setup.transformer();
    let options: TrainOptions = config.train_options();
    let mut model = TrainableModel::load(
        &*transformer.spec,
        &transformer.checkpoint,
        device,
        &options,
        &mut |done, total| progress.report("loading the model", done, total),
    )?;
    model.train_for(setup.discrete.clone());
    let validation = setup.validation.as_ref();
    let validation = validation.ok_or_else(|| Error::invalid("there is no picture to evaluate on"))?;
    // A run tells of these in its log; here the mean would quietly be one of fewer pictures.
    for damage in validation.damages().take_fresh() {
        progress.notice(&format!("damaged, skipped: {damage}"));
    }
    let mut feeder = Feeder::new(&config, device, false, setup.discrete.clone());
    let loss = validation.loss(&model, &mut feeder, &World::solo(), &mut || progress.go_on())?;
    if !loss.is_finite() {
        return Err(Error::not_finite(format!(
            "the loss of {} is {loss}",
            transformer.checkpoint.path().display()
        )));
    }
    Ok(Evaluation {
        loss,
        pictures: validation.pictures(),
    })
}
