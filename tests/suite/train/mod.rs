//! Training: gradients of blocks, heads and whole models, the optimizer, and what a trainable transformer promises.

mod adamw;
mod models;
mod modules;
mod plan;
mod promises;
mod ranks;
mod snapshot;

use l2p_engine::layers::MemoryParams;
use l2p_engine::model::Precision;
use l2p_engine::model::zimage::DitConfig;
use l2p_engine::model::zimage::ZImage;
use l2p_engine::train::{AdamWOptions, Batch, Policy, Recompute, TrainOptions, TrainableModel};
use l2p_engine::{Device, Result, Tensor};
use l2p_tests::{Suite, random_bf16};

pub fn register(suite: &mut Suite) {
    adamw::register(suite);
    modules::register(suite);
    models::register(suite);
    plan::register(suite);
    promises::register(suite);
    ranks::register(suite);
    snapshot::register(suite);
}

fn options(policy: &str, recompute: Recompute) -> TrainOptions {
    TrainOptions {
        policy: policy.parse().expect("a freeze policy"),
        recompute,
        adamw: AdamWOptions::default(),
        clip_norm: None,
        ema_decay: None,
        trunk: Precision::default(),
    }
}

fn load(params: &MemoryParams, device: &Device, config: &DitConfig, options: &TrainOptions) -> Result<TrainableModel> {
    TrainableModel::load(&ZImage::read(params, config)?, params, device, options, &mut |_, _| {
        Ok(())
    })
}

/// Whether a policy trains the tensor `name` of a model with `layers` main blocks, told by the published names.
fn trains(policy: &Policy, name: &str, layers: usize) -> bool {
    let starts = |starts: &[&str]| starts.iter().any(|start| name.starts_with(start));
    let input = starts(&["all_x_embedder."]);
    let output = starts(&["local_decoder.", "all_final_layer."]);
    let main_block = name
        .strip_prefix("layers.")
        .and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    let at_an_end = |ends: usize| main_block.is_some_and(|index| index < ends || index + ends >= layers);
    match policy {
        Policy::Paper { ends } => input || output || at_an_end(*ends),
        Policy::Released { ends } => main_block.is_none() || at_an_end(*ends),
        Policy::Full => true,
        Policy::HeadOnly => output,
        Policy::Patterns(patterns) => patterns.iter().any(|pattern| match pattern.split_once('*') {
            Some((start, _)) => name.starts_with(start),
            None => name == pattern,
        }),
    }
}

/// The names that a policy trains of a model, sorted.
fn trained_names(params: &MemoryParams, policy: &Policy, layers: usize) -> Vec<String> {
    let mut names: Vec<String> = params
        .0
        .keys()
        .filter(|name| trains(policy, name, layers))
        .cloned()
        .collect();
    names.sort();
    names
}

/// Pictures, noise, levels and captions in numbers that bf16 holds.
struct Inputs {
    images: Tensor,
    noise: Tensor,
    sigmas: Vec<f32>,
    captions: Vec<Tensor>,
}

impl Inputs {
    fn new(device: &Device, name: &str, config: &DitConfig, size: [usize; 2], lengths: &[usize]) -> Result<Self> {
        let shape = [lengths.len(), size[0], size[1], config.in_channels];
        let image = |kind: &str| {
            let values = random_bf16(&format!("{kind}.{name}"), shape.iter().product());
            Tensor::from_slice(device, &values, shape)
        };
        let captions = lengths.iter().enumerate().map(|(index, &tokens)| {
            let values = random_bf16(&format!("cap.{index}.{name}"), tokens * config.caption_width);
            Tensor::from_f32(device, &values, [1, tokens, config.caption_width])
        });
        Ok(Inputs {
            images: image("images")?,
            noise: image("noise")?,
            sigmas: (0..lengths.len()).map(|item| 0.875 - 0.25 * item as f32).collect(),
            captions: captions.collect::<Result<_>>()?,
        })
    }

    /// Runs `with` on the batch.
    fn batch<T>(&self, with: impl FnOnce(&Batch<'_>) -> T) -> T {
        let captions: Vec<&Tensor> = self.captions.iter().collect();
        with(&Batch {
            images: &self.images,
            noise: &self.noise,
            sigmas: &self.sigmas,
            captions: &captions,
        })
    }
}
