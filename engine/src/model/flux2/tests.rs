//! The family through what knows no family: files of both layouts, pixel models made from latent ones, plans, training.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{Flux2, Flux2Config};
use crate::checkpoint::{
    Checkpoint, EstimateInput, ExportOptions, InitOptions, MemoryEstimate, ModelPaths, PathOverrides, Transformer,
    Values, export, init, inspect, write_file, write_values,
};
use crate::device::Device;
use crate::error::Result;
use crate::layers::{MemoryParams, ParamSource};
use crate::model::config::ModelKind;
use crate::model::family::TransformerConfig;
use crate::model::{Precision, Spec};
use crate::tensor::Tensor;
use crate::train::{
    AdamWOptions, Batch, Division, PlanInput, Recompute, StatePart, TrainOptions, TrainableModel, TrainingPlan,
};

/// What a file is to hold.
type Tensors = Vec<(String, Values)>;

fn spec() -> Flux2 {
    let config = Flux2Config {
        kind: ModelKind::Latent,
        dim: 16,
        heads: 2,
        head_dim: 8,
        double_blocks: 2,
        single_blocks: 2,
        ffn_hidden: 24,
        caption_width: 12,
        patch: 1,
        in_channels: 8,
        rope_theta: 2000.0,
        axes_dims: [2; 4],
        norm_eps: 1e-6,
        t_frequencies: 8,
    };
    Flux2 { config, head: None }
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

fn params() -> MemoryParams {
    let tensors = spec().tensors().into_iter().enumerate();
    let filled = tensors.map(|(index, (name, shape))| {
        let inputs = shape.get(1).copied().unwrap_or(1).max(1) as f32;
        let values = numbers(index as u64, shape.iter().product());
        let scale = 1.5 / inputs.sqrt();
        (name, (shape, values.into_iter().map(|value| scale * value).collect()))
    });
    MemoryParams(filled.collect())
}

fn tensor(seed: u64, shape: &[usize]) -> Tensor {
    Tensor::from_slice(&Device::Cpu, &numbers(seed, shape.iter().product()), shape).unwrap()
}

/// The model's tensors as the original programs name and stack them.
fn single_file() -> Tensors {
    let params = params();
    let values = |name: &str| {
        let (shape, values) = params.0[name].clone();
        Values { shape, values }
    };
    let stacked = |names: &[String]| {
        let parts: Vec<Values> = names.iter().map(|name| values(name)).collect();
        Values {
            shape: vec![parts.iter().map(|part| part.shape[0]).sum(), parts[0].shape[1]],
            values: parts.into_iter().flat_map(|part| part.values).collect(),
        }
    };
    let mut tensors: Tensors = [
        ("img_in", "x_embedder"),
        ("txt_in", "context_embedder"),
        ("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1"),
        ("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
        (
            "double_stream_modulation_img.lin",
            "double_stream_modulation_img.linear",
        ),
        (
            "double_stream_modulation_txt.lin",
            "double_stream_modulation_txt.linear",
        ),
        ("single_stream_modulation.lin", "single_stream_modulation.linear"),
        ("final_layer.linear", "proj_out"),
    ]
    .map(|(found, canonical)| (format!("{found}.weight"), values(&format!("{canonical}.weight"))))
    .into();
    let Values {
        shape,
        values: mut halves,
    } = values("norm_out.linear.weight");
    let middle = halves.len() / 2;
    halves.rotate_left(middle);
    tensors.push((
        "final_layer.adaLN_modulation.1.weight".into(),
        Values { shape, values: halves },
    ));
    for block in 0..2 {
        for (stream, attention, norms, feed_forward) in [
            ("img", ["to_q", "to_k", "to_v", "to_out.0"], ["norm_q", "norm_k"], "ff"),
            (
                "txt",
                ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"],
                ["norm_added_q", "norm_added_k"],
                "ff_context",
            ),
        ] {
            let of = |member: &str| format!("transformer_blocks.{block}.{member}.weight");
            let [q, k, v, out] = attention.map(|part| of(&format!("attn.{part}")));
            let name = |member: &str| format!("double_blocks.{block}.{stream}_{member}");
            tensors.push((name("attn.qkv.weight"), stacked(&[q, k, v])));
            tensors.push((name("attn.proj.weight"), values(&out)));
            for (norm, found) in norms.into_iter().zip(["query_norm", "key_norm"]) {
                let canonical = of(&format!("attn.{norm}"));
                tensors.push((name(&format!("attn.norm.{found}.scale")), values(&canonical)));
            }
            for (found, part) in [("mlp.0", "linear_in"), ("mlp.2", "linear_out")] {
                let canonical = of(&format!("{feed_forward}.{part}"));
                tensors.push((name(&format!("{found}.weight")), values(&canonical)));
            }
        }
        for (found, part) in [
            ("linear1.weight", "to_qkv_mlp_proj"),
            ("linear2.weight", "to_out"),
            ("norm.query_norm.scale", "norm_q"),
            ("norm.key_norm.scale", "norm_k"),
        ] {
            let canonical = format!("single_transformer_blocks.{block}.attn.{part}.weight");
            tensors.push((format!("single_blocks.{block}.{found}"), values(&canonical)));
        }
    }
    tensors
}

fn write(path: &Path, prefix: &str, mut tensors: Tensors) {
    tensors.iter_mut().for_each(|tensor| tensor.0.insert_str(0, prefix));
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    write_values(path, &tensors).unwrap();
}

fn plain() -> Tensors {
    let tensors = params().0.into_iter();
    tensors
        .map(|(name, (shape, values))| (name, Values { shape, values }))
        .collect()
}

/// A folder with the transformer and what its `config.json` says.
fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let transformer = folder.path().join("transformer");
    std::fs::create_dir(&transformer).unwrap();
    write(&transformer.join("diffusion_pytorch_model.safetensors"), "", plain());
    std::fs::write(transformer.join("config.json"), spec().config_json().to_string()).unwrap();
    std::fs::write(folder.path().join("model_index.json"), "{}").unwrap();
    (folder, transformer)
}

fn open(folder: &Path) -> Result<Transformer> {
    ModelPaths::resolve(folder, &PathOverrides::default())?.open_transformer()
}

#[test]
fn folders_and_single_files_hold_the_same_model() {
    let (folder, _) = folder();
    let paths = ModelPaths::resolve(folder.path(), &PathOverrides::default()).unwrap();
    let transformer = paths.open_transformer().unwrap();
    assert_eq!(transformer.spec.sizes(), json!(spec().config));
    let report = inspect(&paths).unwrap();
    assert!(report.complete, "{report:?}");
    let path = folder.path().join("single.safetensors");
    write(&path, "model.diffusion_model.", single_file());
    let single = Checkpoint::open_transformer(&path).unwrap();
    assert_eq!(single.shapes(), transformer.checkpoint.shapes());
    for (name, tensor) in single.tensors() {
        assert_eq!(
            tensor.bytes().unwrap(),
            transformer.checkpoint.tensor(name).unwrap().bytes().unwrap(),
            "{name}"
        );
    }
    // Copied as it is, and read piece by piece.
    let exported = folder.path().join("exported.safetensors");
    let options = ExportOptions::default();
    write_file(&exported, &export(&single, &options).unwrap(), false, &mut ()).unwrap();
    let exported = Checkpoint::open_transformer(&exported).unwrap();
    for (name, tensor) in exported.tensors() {
        assert_eq!(
            tensor.bytes().unwrap(),
            transformer.checkpoint.tensor(name).unwrap().bytes().unwrap(),
            "{name}"
        );
    }
}

#[test]
fn wrong_tensors_and_settings_are_named() {
    let (folder, transformer) = folder();
    let message = |change: &dyn Fn(&mut Tensors)| {
        let path = folder.path().join("changed.safetensors");
        let mut tensors = plain();
        change(&mut tensors);
        write(&path, "", tensors);
        let opened = Checkpoint::open_transformer(&path).and_then(|checkpoint| {
            let file = TransformerConfig::read(&transformer.join("config.json"))?;
            Transformer::new(checkpoint, Some(&file))
        });
        opened.unwrap_err().to_string()
    };
    let without = |name: &'static str| move |tensors: &mut Tensors| tensors.retain(|tensor| tensor.0 != name);
    for (found, expected) in [
        (
            message(&without("transformer_blocks.1.attn.add_k_proj.weight")),
            "`transformer_blocks.1.attn.add_k_proj.weight`",
        ),
        (
            message(&without("single_stream_modulation.linear.weight")),
            "it lacks `single_stream_modulation`",
        ),
        (
            message(&|tensors| {
                tensors.push((
                    "single_transformer_blocks.0.attn.gate.weight".into(),
                    Values {
                        shape: vec![1],
                        values: vec![0.0],
                    },
                ));
            }),
            "`single_transformer_blocks.0.attn.gate.weight`",
        ),
    ] {
        assert!(found.contains(expected), "{found}\n{expected}");
    }
    for (key, value, expected) in [
        ("num_layers", json!(3), "says num_layers = 3, but the tensors have 2"),
        ("guidance_embeds", json!(true), "says guidance_embeds = true"),
        ("patch_size", json!(2), "says patch_size = 2, expected 1"),
        (
            "axes_dims_rope",
            json!([4, 2, 2, 2]),
            "position axes of [4, 2, 2, 2] do not make up heads of 8",
        ),
        ("rope_theta", json!(-1.0), "rope_theta"),
    ] {
        let mut config = spec().config_json();
        config[key] = value;
        std::fs::write(transformer.join("config.json"), config.to_string()).unwrap();
        let found = open(folder.path()).unwrap_err().to_string();
        assert!(found.contains(expected), "{found}\n{expected}");
    }
    let path = folder.path().join("odd.safetensors");
    let mut tensors = single_file();
    let last = tensors
        .iter_mut()
        .find(|tensor| tensor.0.starts_with("final_layer.ada"))
        .unwrap();
    last.1 = Values {
        shape: vec![3, 2],
        values: vec![0.0; 6],
    };
    write(&path, "", tensors);
    let found = Checkpoint::open_transformer(&path).unwrap_err().to_string();
    assert!(
        found.contains("`final_layer.adaLN_modulation.1.weight` has shape [3, 2]"),
        "{found}"
    );
}

#[test]
fn pixel_models_are_made_from_latent_ones() {
    let (folder, _) = folder();
    let source = open(folder.path()).unwrap();
    for (patch, widths) in [(16, vec![4, 4, 8, 8]), (64, vec![4, 4, 4, 4, 8, 8])] {
        let options = InitOptions {
            patch,
            seed: 3,
            head_widths: Some(widths),
            head_bottleneck: Some(8),
        };
        let plan = init(&source, &options).unwrap();
        assert!(
            plan.random
                .iter()
                .all(|name| name == "x_embedder.weight" || name.starts_with("local_decoder."))
        );
        let path = folder.path().join(format!("pixel-{patch}.safetensors"));
        write_file(&path, &plan.output, false, &mut ()).unwrap();
        let pixel = Transformer::new(Checkpoint::open_transformer(&path).unwrap(), None);
        // Without a config.json, the axes of the published heads are expected.
        assert!(pixel.unwrap_err().to_string().contains("axes_dims_rope"));
        let file = TransformerConfig::read(&folder.path().join("transformer/config.json"))
            .unwrap()
            .trunk_only();
        let pixel = Transformer::new(Checkpoint::open_transformer(&path).unwrap(), Some(&file)).unwrap();
        assert_eq!(pixel.spec.sizes(), plan.spec.sizes());
        assert_eq!(
            (pixel.spec.geometry().patch, pixel.spec.geometry().kind),
            (patch, ModelKind::Pixel)
        );
        let name = "single_transformer_blocks.1.attn.to_out.weight";
        assert_eq!(
            pixel.checkpoint.tensor(name).unwrap().bytes().unwrap(),
            source.checkpoint.tensor(name).unwrap().bytes().unwrap()
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

fn trainable(params: &dyn ParamSource, recompute: Recompute) -> TrainableModel {
    TrainableModel::load(
        &spec(),
        params,
        &Device::Cpu,
        &options("full", recompute),
        &mut |_, _| Ok(()),
    )
    .unwrap()
}

/// Runs `with` on a batch of two latents whose captions differ in length.
fn with_batch<T>(with: impl FnOnce(&Batch<'_>) -> T) -> T {
    let (images, noise) = (tensor(1, &[2, 2, 3, 8]), tensor(2, &[2, 2, 3, 8]));
    let captions = [tensor(3, &[1, 3, 12]), tensor(4, &[1, 5, 12])];
    with(&Batch {
        images: &images,
        noise: &noise,
        sigmas: &[0.75, 0.25],
        captions: &captions.iter().collect::<Vec<_>>(),
    })
}

/// Every parameter's gradient is the slope of the loss, also where captions differ in length.
#[test]
fn gradients_are_slopes() {
    let mut model = trainable(&params(), Recompute::None);
    let loss = |params: &MemoryParams| {
        let loss = with_batch(|batch| trainable(params, Recompute::None).evaluate(batch)).unwrap();
        f64::from(loss.to_vec::<f32>().unwrap()[0])
    };
    with_batch(|batch| model.accumulate(batch, 1.0)).unwrap();
    let mut compared = 0;
    for (index, trained) in model.trained().into_iter().enumerate() {
        let slopes = trained.read(StatePart::Gradient).unwrap().unwrap();
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
        assert!(
            (slope - expected).abs() < 2e-2 * expected.abs() + 2e-4,
            "{}: {slope}, expected {expected}",
            trained.name
        );
        compared += usize::from(expected.abs() > 1e-3);
    }
    assert!(compared > 25, "only {compared} gradients are large enough to tell");
    // Running blocks again changes no bit.
    let mut again = trainable(&params(), Recompute::All);
    with_batch(|batch| again.accumulate(batch, 1.0)).unwrap();
    for (kept, again) in model.trained().into_iter().zip(again.trained()) {
        assert_eq!(
            kept.read(StatePart::Gradient).unwrap(),
            again.read(StatePart::Gradient).unwrap(),
            "{}",
            kept.name
        );
    }
}

/// A batch gives each item what it gets alone, and conditions may change places.
#[test]
fn items_do_not_touch() {
    let model = spec().load(&params(), &Device::Cpu, &mut |_, _| Ok(())).unwrap();
    let captions = [tensor(3, &[1, 3, 12]), tensor(4, &[1, 5, 12])];
    let x = tensor(7, &[2, 2, 3, 8]);
    let run = |items: std::ops::Range<usize>| {
        let captions: Vec<&Tensor> = captions[items.clone()].iter().collect();
        let prepared = model.prepare(&captions, [2, 3]).unwrap();
        let modulations = model.modulate(&[0.5, 0.25][items.clone()], None).unwrap();
        let x = x.narrow(items.start, items.len()).unwrap();
        model
            .forward(&x, &prepared, &modulations)
            .unwrap()
            .to_vec::<f32>()
            .unwrap()
    };
    let together = run(0..2);
    for (found, expected) in together.iter().zip([run(0..1), run(1..2)].concat()) {
        assert!((found - expected).abs() < 1e-5, "{found}, {expected}");
    }
    let (other, [first, _]) = (tensor(9, &[1, 3, 12]), &captions);
    let mut prepared = model.prepare(&[first], [2, 3]).unwrap();
    model.prepare_into(&[&other], &mut prepared).unwrap();
    let modulations = model.modulate(&[0.5], None).unwrap();
    let x = x.narrow(0, 1).unwrap();
    let found = model.forward(&x, &prepared, &modulations).unwrap();
    let expected = model.prepare(&[&other], [2, 3]).unwrap();
    let expected = model.forward(&x, &expected, &modulations).unwrap();
    assert_eq!(found.to_vec::<f32>().unwrap(), expected.to_vec::<f32>().unwrap());
    assert!(model.prepare_into(&[&captions[1]], &mut prepared).is_err());
}

#[test]
fn plans_and_estimates_count_it() {
    let options = options("full", Recompute::None);
    let plan = TrainingPlan::new(&PlanInput {
        spec: &spec(),
        options: &options,
        size: [2, 3],
        caption_tokens: 5,
        batch: 2,
        cuda: false,
        division: Division::default(),
    });
    let found = plan.unwrap();
    let elements: usize = params().0.values().map(|(_, values)| values.len()).sum();
    assert_eq!(
        (found.trained_parameters, found.frozen_parameters),
        (elements as u64, 0)
    );
    let part = |name: &str| found.arithmetic.iter().find(|part| part.part == name).unwrap().forward;
    // Two operations per weight and token, of one stream's weights.
    let (items, tokens) = (2.0, 11.0);
    assert_eq!(
        part("double-stream blocks"),
        2.0 * items * tokens * (2 * 16 * (4 * 16 + 3 * 24)) as f64
    );
    assert_eq!(
        part("single-stream blocks"),
        2.0 * items * tokens * (2 * 16 * (3 * 16 + 2 * 24 + 16 + 24)) as f64
    );
    let estimate = MemoryEstimate::of(&EstimateInput {
        spec: &spec(),
        vae: None,
        text_parameters: 0,
        trunk: &Precision::default(),
        width: 3,
        height: 2,
    });
    assert_eq!(estimate.sampling.weights, 2 * elements as u64);
}
