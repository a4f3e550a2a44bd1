//! The family through everything that knows no family: files, checks, plans, sampling, training.

use std::path::Path;

use serde_json::json;

use super::{NoisePrediction, Plain, PlainConfig};
use crate::checkpoint::{
    Checkpoint, EstimateInput, ExportOptions, Layout, MemoryEstimate, ModelPaths, PathOverrides, Transformer, Values,
    export, inspect, scratch, write_file, write_values,
};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::flow::noise_source::NoiseSource;
use crate::flow::sampler::{Conditioning, sample};
use crate::flow::schedule::Schedule;
use crate::layers::MemoryParams;
use crate::model::objective::Objective;
use crate::model::{Precision, Spec};
use crate::pipeline::{Captions, Pipeline, Settings};
use crate::tensor::Tensor;
use crate::train::{
    AdamWOptions, Batch, Division, PlanInput, Recompute, StatePart, TrainOptions, TrainableModel, TrainingPlan,
};

/// What a file is to hold.
type Tensors = Vec<(String, Values)>;

/// Height and width of its pictures.
const SIZE: [usize; 2] = [4, 8];

fn spec() -> Plain {
    Plain(PlainConfig {
        dim: 16,
        heads: 2,
        blocks: 2,
        ffn: 24,
        caption_width: 8,
        positions: 8,
        patch: 2,
        channels: 3,
        times: [8, 12, 10],
    })
}

/// Numbers in ±1 that depend on the seed alone.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    };
    (0..count).map(next).collect()
}

/// Weights that no number of inputs makes large.
fn params() -> MemoryParams {
    let tensors = spec().tensors().into_iter().enumerate();
    let filled = tensors.map(|(index, (name, shape))| {
        let inputs = shape.get(1).copied().unwrap_or(4).max(1) as f32;
        let values = numbers(index as u64, shape.iter().product());
        (
            name,
            (
                shape,
                values.into_iter().map(|value| 1.5 * value / inputs.sqrt()).collect(),
            ),
        )
    });
    MemoryParams(filled.collect())
}

fn tensor(seed: u64, shape: &[usize]) -> Tensor {
    Tensor::from_slice(&Device::Cpu, &numbers(seed, shape.iter().product()), shape).unwrap()
}

fn captions(lengths: &[usize]) -> Vec<Tensor> {
    let caption = |(index, length): (usize, &usize)| tensor(100 + index as u64, &[1, *length, 8]);
    lengths.iter().enumerate().map(caption).collect()
}

/// Writes the tensors under names that begin with `prefix`, those that `change` leaves.
fn write(path: &Path, prefix: &str, change: &dyn Fn(&mut Tensors)) {
    let tensors = params()
        .0
        .into_iter()
        .map(|(name, (shape, values))| (name, Values { shape, values }));
    let mut tensors: Vec<_> = tensors.collect();
    change(&mut tensors);
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let tensors: Vec<_> = tensors
        .into_iter()
        .map(|(name, values)| (format!("{prefix}{name}"), values))
        .collect();
    write_values(path, &tensors).unwrap();
}

/// A folder with the transformer and what its `config.json` says.
fn folder() -> (tempfile::TempDir, ModelPaths) {
    let folder = tempfile::tempdir().unwrap();
    let transformer = folder.path().join("transformer");
    std::fs::create_dir(&transformer).unwrap();
    write(
        &transformer.join("diffusion_pytorch_model.safetensors"),
        "model.diffusion_model.",
        &|_| {},
    );
    std::fs::write(transformer.join("config.json"), spec().config_json().to_string()).unwrap();
    std::fs::write(folder.path().join("model_index.json"), "{}").unwrap();
    let paths = ModelPaths::resolve(folder.path(), &PathOverrides::default()).unwrap();
    (folder, paths)
}

fn open(path: &Path) -> Result<Transformer> {
    Transformer::new(Checkpoint::open_transformer(path)?, None)
}

#[test]
fn files_are_found_to_be_its_own() {
    let (folder, paths) = folder();
    let transformer = paths.open_transformer().unwrap();
    assert_eq!(transformer.spec.sizes(), json!(spec().0));
    let report = inspect(&paths).unwrap();
    assert!(report.complete, "{report:?}");
    assert_eq!((report.patch, report.transformer), (Some(2), Some(json!(spec().0))));
    // Under another layout or prefix it is the same model.
    let options = ExportOptions {
        layout: Layout::Packed,
        prefix: "pipe.dit".parse().unwrap(),
        ..ExportOptions::default()
    };
    let exported = folder.path().join("exported.safetensors");
    write_file(
        &exported,
        &export(&transformer.checkpoint, &options).unwrap(),
        false,
        &mut (),
    )
    .unwrap();
    assert_eq!(
        Checkpoint::open_transformer(&exported).unwrap().shapes(),
        transformer.checkpoint.shapes()
    );
    // So is one with random weights.
    let made = folder.path().join("scratch.safetensors");
    write_file(&made, &scratch(&transformer, None, 7).unwrap(), false, &mut ()).unwrap();
    assert_eq!(open(&made).unwrap().spec.tensors(), spec().tensors());
    // A configuration of the other family contradicts the tensors.
    let config = folder.path().join("transformer/config.json");
    std::fs::write(&config, r#"{"_class_name": "ZImageTransformer2DModel"}"#).unwrap();
    let message = paths.open_transformer().unwrap_err().to_string();
    assert!(
        message.ends_with("describes a ZImageTransformer2DModel, expected a PlainDiT2DModel"),
        "{message}"
    );
}

#[test]
fn wrong_tensors_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let message = |change: &dyn Fn(&mut Tensors)| {
        let path = folder.path().join("changed.safetensors");
        write(&path, "", change);
        open(&path).unwrap_err().to_string()
    };
    let without = |name: &'static str| move |tensors: &mut Tensors| tensors.retain(|tensor| tensor.0 != name);
    for (found, expected) in [
        (
            message(&without("blocks.1.mlp.fc1.weight")),
            "lacks 1 tensor of the model: `blocks.1.mlp.fc1.weight`",
        ),
        (
            message(&without("head.proj.bias")),
            "lacks 1 tensor of the model: `head.proj.bias`",
        ),
        (
            message(&|tensors| {
                tensors.retain(|tensor| !tensor.0.starts_with("blocks.0."));
            }),
            "it lacks `blocks.0`; give the model that it was trained over with --base",
        ),
        (
            message(&|tensors| {
                let wrong = tensors
                    .iter_mut()
                    .find(|tensor| tensor.0 == "blocks.1.adaln.bias")
                    .unwrap();
                wrong.1 = Values {
                    shape: vec![31],
                    values: vec![0.0; 31],
                };
            }),
            "tensor `blocks.1.adaln.bias` has shape [31], expected [32] as in the rest of the model",
        ),
        (
            message(&|tensors| {
                let values = Values {
                    shape: vec![1],
                    values: vec![0.0],
                };
                tensors.push(("blocks.1.attn.gate".into(), values));
            }),
            "holds 1 tensor that a pixel model has no place for: `blocks.1.attn.gate`",
        ),
    ] {
        assert!(found.contains(expected), "{found}\n{expected}");
    }
}

/// The sampler's steps are those of DDIM, computed in f64 from the definition: the picture that the predicted noise leaves, noised
/// to the next level.
#[test]
fn sampling_is_ddim() {
    let model = spec().load(&params(), &Device::Cpu, &mut |_, _| Ok(())).unwrap();
    let captions = captions(&[3, 5]);
    let prepare = |captions: &[&Tensor]| model.prepare(captions, SIZE).unwrap();
    let (both, swapped) = (
        prepare(&[&captions[0], &captions[1]]),
        prepare(&[&captions[1], &captions[0]]),
    );
    let noise = tensor(7, &[2, SIZE[0], SIZE[1], 3]);
    let (schedule, cfg) = (Schedule::new(5, 2.0).unwrap(), 1.75);
    let mut x: Vec<f64> = noise.to_vec::<f32>().unwrap().into_iter().map(f64::from).collect();
    for step in 0..schedule.steps() {
        let at = |level: f32| {
            let variance = 0.99_f32 as f64 * f64::from(level);
            ((1.0 - variance).sqrt(), variance.sqrt())
        };
        let ((a, b), (next_a, next_b)) = (at(schedule.sigma(step)), at(schedule.sigma(step + 1)));
        let image: Vec<f32> = x.iter().map(|value| *value as f32).collect();
        let image = Tensor::from_slice(&Device::Cpu, &image, noise.shape()).unwrap();
        let modulations = model.modulate(&[schedule.sigma(step)], None).unwrap();
        let [prompt, away] = [&both, &swapped].map(|ready| {
            let predicted = model.forward(&image, ready, &modulations).unwrap();
            predicted.to_vec::<f32>().unwrap()
        });
        for (value, (prompt, away)) in x.iter_mut().zip(prompt.into_iter().zip(away)) {
            let noise = f64::from(away) + cfg * f64::from(prompt - away);
            let picture = (*value - b * noise) / a;
            *value = next_a * picture + next_b * noise;
        }
    }
    let conditioning = Conditioning {
        prompt: both,
        negative: Some((swapped, cfg as f32)),
    };
    let drawn = sample(&*model, &conditioning, &schedule, noise, &mut |_| Ok(())).unwrap();
    for (found, expected) in drawn.to_vec::<f32>().unwrap().into_iter().zip(x) {
        assert!(
            (f64::from(found) - expected).abs() < 1e-4 * expected.abs().max(1.0),
            "{found}, {expected}"
        );
    }
}

fn options(policy: &str, recompute: Recompute) -> TrainOptions {
    TrainOptions {
        policy: policy.parse().unwrap(),
        recompute,
        adamw: AdamWOptions::default(),
        clip_norm: None,
        ema_decay: None,
        trunk: Precision::default(),
    }
}

fn trainable(params: &MemoryParams, options: &TrainOptions) -> TrainableModel {
    TrainableModel::load(&spec(), params, &Device::Cpu, options, &mut |_, _| Ok(())).unwrap()
}

/// Runs `with` on a batch of two pictures whose captions differ in length.
fn with_batch<T>(with: impl FnOnce(&Batch<'_>) -> T) -> T {
    let shape = [2, SIZE[0], SIZE[1], 3];
    let (images, noise, captions) = (tensor(1, &shape), tensor(2, &shape), captions(&[3, 5]));
    with(&Batch {
        images: &images,
        noise: &noise,
        sigmas: &[0.75, 0.25],
        captions: &captions.iter().collect::<Vec<_>>(),
    })
}

/// The loss is the mean squared error of the noise, and every parameter's gradient is the slope of it.
#[test]
fn gradients_are_slopes() {
    let mut model = trainable(&params(), &options("full", Recompute::None));
    let loss = |params: &MemoryParams| {
        let model = trainable(params, &options("full", Recompute::None));
        let loss = with_batch(|batch| model.evaluate(batch)).unwrap();
        f64::from(loss.to_vec::<f32>().unwrap()[0])
    };
    let found = with_batch(|batch| model.accumulate(batch, 1.0))
        .unwrap()
        .to_vec::<f32>()
        .unwrap()[0];
    assert_eq!(f64::from(found), loss(&params()));
    let plain = with_batch(|batch| {
        let mixed = |values: [f32; 2], shares: [f32; 2]| shares[0] * values[0] + shares[1] * values[1];
        let half = SIZE[0] * SIZE[1] * 3;
        let pairs = batch
            .images
            .to_vec::<f32>()
            .unwrap()
            .into_iter()
            .zip(batch.noise.to_vec::<f32>().unwrap());
        let noisy: Vec<f32> = pairs
            .enumerate()
            .map(|(index, (image, noise))| mixed([image, noise], NoisePrediction.mix(batch.sigmas[index / half])))
            .collect();
        let noisy = Tensor::from_slice(&Device::Cpu, &noisy, batch.images.shape()).unwrap();
        let prepared = model.denoiser().prepare(batch.captions, SIZE).unwrap();
        let modulations = model.denoiser().modulate(batch.sigmas, None).unwrap();
        let predicted = model
            .denoiser()
            .forward(&noisy, &prepared, &modulations)
            .unwrap()
            .to_vec::<f32>()
            .unwrap();
        let errors = predicted.into_iter().zip(batch.noise.to_vec::<f32>().unwrap());
        errors
            .map(|(found, noise)| f64::from(found - noise).powi(2))
            .sum::<f64>()
            / (2 * half) as f64
    });
    assert!((plain - f64::from(found)).abs() < 1e-6, "{plain}, {found}");

    let mut compared = 0;
    for (index, trained) in model.trained().into_iter().enumerate() {
        let slopes = trained.read(StatePart::Gradient).unwrap().unwrap();
        // Of length 1, part of it along the gradient, so that there is something to tell.
        let unit = |values: &[f32]| {
            let length = values.iter().map(|value| value * value).sum::<f32>().sqrt().max(1e-9);
            values.iter().map(|value| value / length).collect::<Vec<f32>>()
        };
        let (along, across) = (unit(&slopes), unit(&numbers(500 + index as u64, slopes.len())));
        let direction: Vec<f32> = along.iter().zip(across).map(|(a, b)| 0.7 * (a + b)).collect();
        let expected: f64 = slopes.iter().zip(&direction).map(|(a, b)| f64::from(a * b)).sum();
        let moved = |by: f32| {
            let mut params = params();
            let values = &mut params.0.get_mut(&trained.name).unwrap().1;
            values
                .iter_mut()
                .zip(&direction)
                .for_each(|(value, to)| *value += by * to);
            loss(&params)
        };
        let step = 1e-2;
        let slope = (moved(step) - moved(-step)) / f64::from(2.0 * step);
        let error = (slope - expected).abs();
        assert!(
            error < 2e-2 * expected.abs() + 1e-4,
            "{}: {slope}, expected {expected}",
            trained.name
        );
        compared += usize::from(expected.abs() > 1e-3);
    }
    assert!(compared > 20, "only {compared} gradients are large enough to tell");
    // Running blocks again changes no bit.
    let mut again = trainable(&params(), &options("full", Recompute::All));
    with_batch(|batch| again.accumulate(batch, 1.0)).unwrap();
    for (kept, again) in model.trained().into_iter().zip(again.trained()) {
        assert_eq!(
            kept.read(StatePart::Gradient).unwrap(),
            again.read(StatePart::Gradient).unwrap()
        );
    }
}

#[test]
fn steps_train_what_the_policy_says() {
    let mut model = trainable(&params(), &options("paper:1", Recompute::None));
    let mut losses = Vec::new();
    for _ in 0..30 {
        let loss = with_batch(|batch| model.accumulate(batch, 1.0)).unwrap();
        losses.push(loss.to_vec::<f32>().unwrap()[0]);
        model.step(3e-3).unwrap().read().unwrap();
    }
    assert!(losses[29] < 0.9 * losses[0], "{losses:?}");
    let before = params();
    for (name, values) in model.parameter_values().unwrap() {
        let frozen = ["pos_embed", "caption_embed.", "time_embed."]
            .iter()
            .any(|part| name.starts_with(part));
        assert_eq!(before.0[&name].1 == values, frozen, "{name}");
    }
}

#[test]
fn plans_and_estimates_count_it() {
    let options = options("full", Recompute::None);
    let plan = |size| {
        TrainingPlan::new(&PlanInput {
            spec: &spec(),
            options: &options,
            size,
            caption_tokens: 5,
            batch: 2,
            cuda: false,
            division: Division::default(),
        })
    };
    let elements: usize = params().0.values().map(|(_, values)| values.len()).sum();
    let found = plan(SIZE).unwrap();
    assert_eq!(
        (found.trained_parameters, found.frozen_parameters),
        (elements as u64, 0)
    );
    // A forward pass of the blocks: two operations per weight and token, and two products of attention.
    let products = 2.0 * 2.0 * 13.0 * (2 * 16 * (3 * 16 + 16 + 3 * 24)) as f64;
    let part = |name: &str| found.arithmetic.iter().find(|part| part.part == name).unwrap().forward;
    assert_eq!(part("blocks"), products);
    assert_eq!(part("blocks' attention"), 2.0 * 2.0 * 4.0 * 13.0 * 13.0 * 16.0);
    let message = plan([8, 8]).unwrap_err().to_string();
    assert_eq!(message, "an image of 8x8 does not have 8 patches of 2");
    let estimate = MemoryEstimate::of(&EstimateInput {
        spec: &spec(),
        vae: None,
        text_parameters: 0,
        trunk: &Precision::default(),
        width: SIZE[1],
        height: SIZE[0],
    });
    assert_eq!(estimate.sampling.weights, 2 * elements as u64);
    assert!(estimate.sampling.peak < u64::MAX && estimate.training.peak > 16 * elements as u64);
}

#[test]
fn a_pipeline_draws_with_it() {
    let (_folder, paths) = folder();
    let mut pipeline = Pipeline::open(paths, Device::Cpu, false).unwrap();
    assert_eq!(pipeline.size_multiple(), 2);
    let settings = Settings {
        width: SIZE[1],
        height: SIZE[0],
        steps: 4,
        shift: 1.0,
        cfg: 1.0,
        solver: crate::flow::solver::Solver::Euler,
    };
    pipeline.load(&mut |_, _| Ok(())).unwrap();
    let captions = Captions {
        prompts: captions(&[4, 4]),
        negatives: Vec::new(),
    };
    let noise = pipeline.noise(NoiseSource::Philox, &[1, 2], &settings).unwrap();
    let drawn = pipeline.denoise(&captions, noise, &settings, &mut |_| Ok(())).unwrap();
    let pictures = pipeline.pictures(&drawn).unwrap();
    assert_eq!(pictures.iter().map(Vec::len).collect::<Vec<_>>(), [4 * 8 * 3; 2]);
    assert_ne!(pictures[0], pictures[1]);
    let wrong = Settings { width: 16, ..settings };
    let noise = pipeline.noise(NoiseSource::Philox, &[1, 2], &wrong).unwrap();
    let refused = pipeline.denoise(&captions, noise, &wrong, &mut |_| Ok(()));
    assert!(matches!(refused, Err(Error::Invalid(reason)) if reason.contains("does not have 8 patches")));
}
