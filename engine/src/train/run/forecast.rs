//! What a run will hold and compute, said before anything is allocated, and the refusal of what will not fit.

use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use super::config::TrainConfig;
use super::feeder::CAPTION_BYTES;
use super::start::{made_spec, source};
use crate::checkpoint::Transformer;
use crate::data::{PictureSize, Sizing};
use crate::device::{Device, format_bytes};
use crate::error::{Error, Result};
use crate::model::Spec;
use crate::model::config::{ModelKind, VaeConfig};
use crate::train::{Arithmetic, Division, PlanInput, PlannedMemory, Recompute, TrainOptions, TrainingPlan};

/// The sizes of a model that is to be trained.
#[derive(Clone, Debug)]
pub(super) struct ModelSizes {
    spec: Arc<dyn Spec>,
    /// Pixels along a side of what one cell of the model's input stands for: 1, or a VAE's downsampling.
    cell: usize,
}

impl ModelSizes {
    /// Those of a model on disk; `vae` is the folder of a latent model's.
    ///
    /// # Errors
    /// When a part is missing or damaged.
    pub fn of(transformer: &Transformer, vae: Option<&Path>) -> Result<Self> {
        let spec = transformer.spec.clone();
        let cell = match (spec.geometry().kind, vae) {
            (ModelKind::Pixel, _) => 1,
            (ModelKind::Latent, Some(vae)) => VaeConfig::read(vae)?.downsampling(),
            (ModelKind::Latent, None) => {
                return Err(Error::invalid("a latent model needs a VAE: name its folder, vae"));
            }
        };
        Ok(ModelSizes { spec, cell })
    }

    /// The plan of training at a size in pixels.
    ///
    /// # Errors
    /// When the policy or the size does not suit the model.
    pub fn plan(&self, options: &TrainOptions, work: &Work) -> Result<TrainingPlan> {
        TrainingPlan::new(&PlanInput {
            spec: &*self.spec,
            options,
            size: [work.size.height / self.cell, work.size.width / self.cell],
            caption_tokens: work.caption_tokens,
            batch: work.batch,
            cuda: work.cuda,
            division: work.division,
        })
    }

    /// Pixels along a side of what one cell of the model's input stands for.
    pub fn cell(&self) -> usize {
        self.cell
    }
}

/// What a micro-batch consists of.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Work {
    /// The size of its pictures.
    #[serde(serialize_with = "super::choices::shown")]
    pub size: PictureSize,
    /// Tokens of its longest caption.
    pub caption_tokens: usize,
    /// Pictures in it.
    pub batch: usize,
    /// Whether it runs on CUDA, in bf16, or else on the CPU, in f32.
    pub cuda: bool,
    /// The ranks of the run.
    pub division: Division,
}

/// What a choice about recomputing costs.
#[derive(Clone, Debug, Serialize)]
pub struct Choice {
    /// The choice.
    pub recompute: Recompute,
    /// Bytes by tag.
    pub memory: PlannedMemory,
    /// Operations of an optimizer step by part.
    pub arithmetic: Vec<Arithmetic>,
    /// All operations of an optimizer step.
    pub operations: f64,
}

/// What a run will hold and compute.
#[derive(Clone, Debug, Serialize)]
pub struct Forecast {
    /// The freeze policy.
    pub policy: String,
    /// The choice that the configuration makes.
    pub recompute: Recompute,
    /// A micro-batch.
    pub work: Work,
    /// Micro-batches in an optimizer step.
    pub accumulate: usize,
    /// Parameters that change.
    pub trained_parameters: u64,
    /// Parameters that do not.
    pub frozen_parameters: u64,
    /// Every choice about recomputing, from the fastest to the smallest.
    pub choices: Vec<Choice>,
    /// Names of the trained tensors.
    pub trained: Vec<String>,
}

impl Forecast {
    /// The forecast of a run by `config` on `ranks` ranks with captions of so many tokens, on CUDA or on the CPU. Reads headers of model files
    /// only; a model that the run would make first need not be there.
    ///
    /// # Errors
    /// When the model is missing or damaged, or the configuration does not suit it.
    pub fn new(config: &TrainConfig, ranks: usize, caption_tokens: usize, cuda: bool) -> Result<Self> {
        config.ensure_named(false)?;
        let paths = source(config)?;
        let transformer = paths.open_transformer()?;
        let sizes = match made_spec(config, &transformer)? {
            Some(spec) => ModelSizes { spec, cell: 1 },
            None => ModelSizes::of(&transformer, paths.vae.as_deref())?,
        };
        let geometry = sizes.spec.geometry();
        let side = geometry.published_side();
        let multiple = geometry.patch * sizes.cell;
        let own = paths.defaults;
        let sizing = config.sizing(PictureSize {
            width: own.width.unwrap_or(side).next_multiple_of(multiple),
            height: own.height.unwrap_or(side).next_multiple_of(multiple),
        });
        sizing.check(multiple)?;
        let work = Work {
            size: largest(&sizing, multiple),
            caption_tokens,
            batch: config.batch,
            cuda,
            division: Division {
                ranks,
                sharding: config.shard,
            },
        };
        let options = config.train_options();
        let plan = |recompute| {
            let options = TrainOptions {
                recompute,
                ..options.clone()
            };
            Ok((recompute, sizes.plan(&options, &work)?))
        };
        let plans: Vec<(Recompute, TrainingPlan)> = Recompute::ALL.into_iter().map(plan).collect::<Result<_>>()?;
        let first = &plans[0].1;
        Ok(Forecast {
            policy: config.policy.to_string(),
            recompute: config.recompute,
            work,
            accumulate: config.accumulate,
            trained_parameters: first.trained_parameters,
            frozen_parameters: first.frozen_parameters,
            trained: first.trained.clone(),
            choices: plans
                .into_iter()
                .map(|(recompute, plan)| Choice::new(recompute, plan, config.accumulate))
                .collect(),
        })
    }
}

impl Choice {
    fn new(recompute: Recompute, mut plan: TrainingPlan, accumulate: usize) -> Self {
        for part in &mut plan.arithmetic {
            for operations in [&mut part.forward, &mut part.inputs, &mut part.weights, &mut part.again] {
                *operations *= accumulate as f64;
            }
        }
        Choice {
            recompute,
            memory: plan.memory,
            operations: plan.operations(),
            arithmetic: plan.arithmetic,
        }
    }
}

/// The largest picture that a choice of sizes leads to; of those of one area the square one.
fn largest(sizing: &Sizing, multiple: usize) -> PictureSize {
    match sizing {
        Sizing::Fixed(size) => *size,
        Sizing::Buckets(sizes) => {
            let size = sizes.iter().max_by_key(|size| size.pixels()).copied();
            size.unwrap_or(PictureSize {
                width: multiple,
                height: multiple,
            })
        }
        Sizing::MaxPixels(pixels) => {
            let side = (pixels.isqrt() / multiple).max(1) * multiple;
            PictureSize {
                width: side,
                height: side,
            }
        }
    }
}

/// Refuses training that the device has no memory for, and says what would fit.
///
/// # Errors
/// Naming what is needed, what there is, and ways out.
pub(super) fn ensure_room(sizes: &ModelSizes, config: &TrainConfig, work: &Work, device: &Device) -> Result<()> {
    let available = device.available_memory()?;
    let needs = |recompute: Recompute, batch: usize| {
        let options = TrainOptions {
            recompute,
            ..config.train_options()
        };
        sizes.plan(&options, &Work { batch, ..*work }).map(|plan| plan.memory)
    };
    let with_captions = |memory: &PlannedMemory| memory.peak.saturating_add(CAPTION_BYTES as u64);
    let memory = needs(config.recompute, work.batch)?;
    if with_captions(&memory) <= available {
        return Ok(());
    }
    let mut ways = Vec::new();
    for recompute in Recompute::ALL.into_iter().filter(|&choice| choice != config.recompute) {
        let other = needs(recompute, work.batch)?;
        if with_captions(&other) <= available {
            let peak = format_bytes(with_captions(&other));
            ways.push(format!("recompute = \"{recompute}\" takes {peak}"));
        }
    }
    // Memory grows with the batch.
    let (mut fits, mut fails) = (0, work.batch);
    while fails - fits > 1 {
        let batch = fits + (fails - fits) / 2;
        match with_captions(&needs(config.recompute, batch)?) <= available {
            true => fits = batch,
            false => fails = batch,
        }
    }
    if fits > 0 {
        ways.push(format!("batch = {fits} fits"));
    }
    if ways.is_empty() {
        ways.push("train fewer tensors (policy) or smaller pictures".into());
    }
    Err(Error::invalid(format!(
        "training takes about {} of memory (weights {}, gradients {}, optimizer {}, {}kept for the backward pass {}, others {}), \
         but {device} has {} to spare: {}",
        format_bytes(with_captions(&memory)),
        format_bytes(memory.weights),
        format_bytes(memory.gradients),
        format_bytes(memory.optimizer),
        match memory.exchange {
            0 => String::new(),
            bytes => format!("between ranks {}, ", format_bytes(bytes)),
        },
        format_bytes(memory.saved),
        format_bytes(memory.activations.saturating_add(CAPTION_BYTES as u64)),
        format_bytes(available),
        ways.join("; ")
    )))
}
