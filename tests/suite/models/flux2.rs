//! FLUX.2's transformer, latent and pixel: forward passes and gradients.

use l2p_engine::checkpoint::{ModelPaths, PathOverrides, Values, write_values};
use l2p_engine::flow::schedule::Schedule;
use l2p_engine::layers::MemoryParams;
use l2p_engine::model::config::{ModelKind, VaeConfig};
use l2p_engine::model::detailer::DetailerLayout;
use l2p_engine::model::family::{Family, TransformerConfig};
use l2p_engine::model::flux2::{Flux2, Flux2Config, Flux2Dit, Flux2Family};
use l2p_engine::model::rope::RopeAxes;
use l2p_engine::model::text::{Readout, TextEncoder};
use l2p_engine::model::vae::{VaeDecoder, VaeEncoder};
use l2p_engine::model::{Denoiser, Precision, Spec};
use l2p_engine::pipeline::{Asked, Captions, Pipeline};
use l2p_engine::train::{AdamWOptions, Batch, Recompute, StatePart, TrainOptions, TrainableModel};
use l2p_engine::{Device, Result, Tensor};
use l2p_tests::fixtures::{Case, Group, generated_weight};
use l2p_tests::{Outcome, Suite, Tolerance, expect_close, random_bf16};

use super::dit::caption;
use super::{channels_first, input_image, params, rounded};

pub fn register(suite: &mut Suite) {
    suite.cpu("models::flux2::positions_equal_diffusers", positions_equal_diffusers);
    suite.cpu("models::flux2::latent_equals_diffusers", latent_equals_diffusers);
    suite.cpu("models::flux2::pixel_equals_torch", pixel_equals_torch);
    suite.cpu("models::flux2::gradients_equal_torch", gradients_equal_torch);
    suite.cpu("models::flux2::vae_equals_diffusers", vae_equals_diffusers);
    suite.cpu("models::flux2::text_equals_transformers", text_equals_transformers);
    suite.cpu(
        "models::flux2::pictures_equal_the_pipelines",
        pictures_equal_the_pipelines,
    );
    suite.cuda("models::flux2::vae_on_cuda_equals_cpu", vae_on_cuda_equals_cpu);
    suite.cuda("models::flux2::on_cuda_equals_cpu", on_cuda_equals_cpu);
    suite.cuda("models::flux2::cuda_gradients_equal_cpu", cuda_gradients_equal_cpu);
}

const GROUP: &str = "flux2";

fn positions_equal_diffusers() -> Outcome {
    let group = Group::load(GROUP);
    let case = group.case("rope");
    let (ids, _) = case.input("ids");
    let positions = ids.chunks(4).map(|id| std::array::from_fn(|axis| id[axis] as usize));
    let axes = RopeAxes {
        theta: 2000.0,
        dims: [32; 4],
        rounded: false,
    };
    let table = axes.table(&Device::Cpu, &[positions.collect()])?;
    case.check("table", &table.to_vec_f32()?)
}

/// What the case's model is, as a program reads it.
fn spec(case: &Case<'_>, params: &MemoryParams) -> Result<Flux2> {
    let dir = tempfile::tempdir().expect("a temporary folder can be made");
    let path = dir.path().join("config.json");
    let mut config = case.config(&["config"]).clone();
    config["_class_name"] = "Flux2Transformer2DModel".into();
    std::fs::write(&path, config.to_string()).expect("it can be written to");
    let spec = Flux2Family.read(params, Some(&TransformerConfig::read(&path)?))?;
    let sizes: Flux2Config = {
        let found = spec.sizes();
        let size = |key: &str| found[key].as_u64().expect("it is a size") as usize;
        Flux2Config {
            kind: spec.geometry().kind,
            ..sizes(size("dim"), size("patch"), size("in_channels"))
        }
    };
    assert_eq!(serde_json::json!(sizes), spec.sizes());
    Ok(Flux2 {
        config: sizes,
        head: spec.head().cloned(),
    })
}

/// The fixtures' sizes.
fn sizes(dim: usize, patch: usize, in_channels: usize) -> Flux2Config {
    Flux2Config {
        kind: if in_channels == 3 {
            ModelKind::Pixel
        } else {
            ModelKind::Latent
        },
        dim,
        heads: dim / 128,
        head_dim: 128,
        double_blocks: 2,
        single_blocks: 2,
        ffn_hidden: 3 * dim,
        caption_width: 96,
        patch,
        in_channels,
        rope_theta: 2000.0,
        axes_dims: [32; 4],
        norm_eps: 1e-6,
        t_frequencies: 32,
    }
}

fn captions(case: &Case<'_>) -> Result<Vec<Tensor>> {
    let names = (0..).map(|index| format!("cap.{index}"));
    names
        .take_while(|name| case.has_input(name))
        .map(|name| caption(case, &name))
        .collect()
}

fn load(spec: &Flux2, params: &MemoryParams, device: &Device) -> Result<Flux2Dit> {
    Flux2Dit::load(spec, params, device, &mut |_, _| Ok(()))
}

fn latent_equals_diffusers() -> Outcome {
    let group = Group::load(GROUP);
    for case in group.cases("latent.") {
        let params = params(&case);
        let dit = load(&spec(&case, &params)?, &params, &Device::Cpu)?;
        let (x, times) = (input_image(&case, "x")?, case.input("t").0);
        let captions = captions(&case)?;
        let prepared = dit.prepare(&captions.iter().collect::<Vec<_>>(), [x.dim(1), x.dim(2)])?;
        let table = dit.modulation_vectors(&times)?;
        let (vectors, dim) = (table.dim(1), table.dim(2));
        let table = table.to_vec_f32()?;
        let of_each = |range: std::ops::Range<usize>| -> Vec<f32> {
            let items = table.chunks(vectors * dim);
            items
                .flat_map(|item| item[range.start * dim..range.end * dim].to_vec())
                .collect()
        };
        for name in case.expected() {
            let found = match name {
                "mod_image" => of_each(0..6),
                "mod_text" => of_each(6..12),
                "mod_single" => of_each(12..15),
                _ => channels_first(&dit.forward(&x, &prepared, &dit.modulate(&times, None)?)?)?,
            };
            case.check(name, &found)?;
        }
    }
    Ok(())
}

fn pixel_equals_torch() -> Outcome {
    let group = Group::load(GROUP);
    for case in group.cases("pixel.") {
        let params = params(&case);
        let spec = spec(&case, &params)?;
        let dit = load(&spec, &params, &Device::Cpu)?;
        let x = input_image(&case, "x")?;
        let captions = captions(&case)?;
        let prepared = dit.prepare(&captions.iter().collect::<Vec<_>>(), [x.dim(1), x.dim(2)])?;
        let modulations = dit.modulate(&case.input("t").0, None)?;
        let tokens = dit.run_trunk(&x, &prepared, &modulations)?;
        let patch = spec.config.patch;
        let map = tokens.reshape([tokens.dim(0), x.dim(1) / patch, x.dim(2) / patch, tokens.dim(2)])?;
        case.check("c", &channels_first(&map)?)?;
        case.check("v", &channels_first(&dit.forward(&x, &prepared, &modulations)?)?)?;
    }
    Ok(())
}

/// The configuration of a case's autoencoder.
fn vae_json(case: &Case<'_>, key: &str) -> serde_json::Value {
    let mut config = case.config(&[key]).clone();
    config["_class_name"] = "AutoencoderKLFlux2".into();
    config
}

/// The parameters of a case's autoencoder, whose names begin with `prefix`; the case draws variances minus one.
fn vae_params(case: &Case<'_>, prefix: &str) -> MemoryParams {
    let own = params(case).0.into_iter();
    let own = own.filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?.to_owned(), tensor)));
    let mut params = MemoryParams(own.collect());
    let variances = params.0.get_mut("bn.running_var").expect("there are statistics");
    variances.1.iter_mut().for_each(|variance| *variance += 1.0);
    params
}

fn vae_equals_diffusers() -> Outcome {
    let group = Group::load(GROUP);
    let case = group.case("vae.decode");
    let config = VaeConfig::from_json(&vae_json(&case, "config").to_string())?;
    assert_eq!((config.downsampling(), config.cell_channels()), (8, 32));
    let decoder = VaeDecoder::load(&vae_params(&case, ""), &Device::Cpu, &config)?;
    let image = decoder.decode(&input_image(&case, "latent")?)?;
    case.check("image", &channels_first(&image)?)?;

    let case = group.case("vae.encode");
    let encoder = VaeEncoder::load(&vae_params(&case, ""), &Device::Cpu, &config)?;
    let image = input_image(&case, "image")?;
    let (latent, shape) = encoder.latent(&image)?;
    case.check(
        "latent",
        &channels_first(&Tensor::from_slice(&Device::Cpu, &latent, shape)?)?,
    )?;
    let moments = encoder.encode(&image)?;
    let channels = config.latent_channels;
    let means: Vec<f32> = moments
        .to_vec_f32()?
        .chunks(2 * channels)
        .flat_map(|cell| cell[..channels].to_vec())
        .collect();
    let shape = [moments.dim(0), moments.dim(1), moments.dim(2), channels];
    case.check(
        "mean",
        &channels_first(&Tensor::from_slice(&Device::Cpu, &means, shape)?)?,
    )?;

    for (key, value, expected) in [
        (
            "patch_size",
            serde_json::json!([1, 2]),
            "says patch_size = [1, 2], only [2, 2] is supported",
        ),
        ("batch_norm_eps", serde_json::json!(0.0), "batch_norm_eps"),
        (
            "decoder_block_out_channels",
            serde_json::json!([32, 64, 64]),
            "says decoder_block_out_channels = [32, 64, 64]",
        ),
    ] {
        let mut changed = vae_json(&case, "config");
        changed[key] = value;
        let message = VaeConfig::from_json(&changed.to_string()).unwrap_err().to_string();
        assert!(message.contains(expected) || key == "batch_norm_eps", "{message}");
    }
    Ok(())
}

/// Some forty layers, each rounded to bf16.
const BF16_VAE_TOLERANCE: f64 = 3e-2;

fn vae_on_cuda_equals_cpu(device: &Device) -> Outcome {
    let group = Group::load(GROUP);
    let case = group.case("vae.decode");
    let config = VaeConfig::from_json(&vae_json(&case, "config").to_string())?;
    let mut params = vae_params(&case, "");
    params.0.values_mut().for_each(|(_, values)| *values = rounded(values));
    let latent = input_image(&case, "latent")?;
    let run = |device: &Device| -> Result<Tensor> {
        let decoder = VaeDecoder::load(&params, device, &config)?;
        decoder.decode(&Tensor::from_slice(device, latent.as_slice::<f32>()?, latent.shape())?)
    };
    let (expected, found) = (run(&Device::Cpu)?, run(device)?);
    expect_close(
        "image",
        &found.to_vec_f32()?,
        &expected.to_vec_f32()?,
        expected.shape(),
        BF16_VAE_TOLERANCE,
    )
}

fn text_equals_transformers() -> Outcome {
    let group = Group::load(GROUP);
    let case = group.case("text");
    let mut config = case.config(&["config"]).clone();
    config["model_type"] = "qwen3".into();
    let config = super::text::read(&config)?;
    let readout = Readout {
        states: case.sizes(&["states"]),
        thoughtless: true,
        padded: Some(case.size(&["padded"])),
    };
    let encoder = TextEncoder::load_read(&params(&case), &Device::Cpu, &config, &readout)?;
    let ids: Vec<u32> = case.input("input_ids").0.into_iter().map(|id| id as u32).collect();
    let features = encoder.encode_padded(&ids, case.size(&["real"]))?;
    assert_eq!(features.shape().to_vec(), [1, 40, 3 * 128]);
    case.check("features", &features.to_vec_f32()?)?;
    let deep = Readout {
        states: vec![1, 6],
        ..readout
    };
    let refused = TextEncoder::load_read(&params(&case), &Device::Cpu, &config, &deep);
    let message = refused.map(|_| ()).unwrap_err().to_string();
    assert!(
        message.contains("of 6 layers has no features after layer 6"),
        "{message}"
    );
    Ok(())
}

/// The library's pipeline and ours from the same folder, features and noise.
fn pictures_equal_the_pipelines() -> Outcome {
    let group = Group::load(GROUP);
    let case = group.case("pipeline");
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let write = |part: &str, params: MemoryParams, config: serde_json::Value| {
        let part = folder.path().join(part);
        std::fs::create_dir(&part).expect("it can be made");
        let tensors = params.0.into_iter();
        let tensors: Vec<_> = tensors
            .map(|(name, (shape, values))| (name, Values { shape, values }))
            .collect();
        write_values(&part.join("diffusion_pytorch_model.safetensors"), &tensors).expect("it can be written");
        std::fs::write(part.join("config.json"), config.to_string()).expect("it can be written");
    };
    let mut transformer = params(&case);
    transformer.0.retain(|name, _| !name.starts_with("vae."));
    let mut config = case.config(&["config"]).clone();
    config["_class_name"] = "Flux2Transformer2DModel".into();
    write("transformer", transformer, config);
    write("vae", vae_params(&case, "vae."), vae_json(&case, "vae"));
    let scheduler = folder.path().join("scheduler");
    std::fs::create_dir(&scheduler).expect("it can be made");
    let settings = r#"{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": true}"#;
    std::fs::write(scheduler.join("scheduler_config.json"), settings).expect("it can be written");
    std::fs::write(folder.path().join("model_index.json"), "{}").expect("it can be written");

    let paths = ModelPaths::resolve(folder.path(), &PathOverrides::default())?;
    let mut pipeline = Pipeline::open(paths, Device::Cpu, false)?;
    assert_eq!((pipeline.size_multiple(), pipeline.notes()?.len()), (8, 0));
    let [height, width] = case.sizes(&["size"])[..] else {
        panic!("a size is two numbers");
    };
    let settings = pipeline.settings(&Asked {
        width: Some(width),
        height: Some(height),
        steps: Some(case.size(&["steps"])),
        cfg: Some(4.0),
        shift: None,
        solver: None,
    })?;
    let schedule = Schedule::new(settings.steps, f64::from(settings.shift))?;
    let sigmas: Vec<f32> = (0..=settings.steps).map(|step| schedule.sigma(step)).collect();
    case.check("sigmas", &sigmas)?;
    let features = |name: &str| {
        let (values, shape) = case.input(name);
        Tensor::from_f32(&Device::Cpu, &values, shape.as_slice())
    };
    let captions = Captions {
        prompts: vec![features("prompt")?],
        negatives: vec![features("negative")?],
    };
    pipeline.load(&mut |_, _| Ok(()))?;
    let drawn = pipeline.denoise(&captions, input_image(&case, "noise")?, &settings, &mut |_| Ok(()))?;
    let image = channels_first(&pipeline.decode(&drawn)?)?;
    let shown: Vec<f32> = image
        .into_iter()
        .map(|value| (value / 2.0 + 0.5).clamp(0.0, 1.0))
        .collect();
    case.check("image", &shown)
}

fn trainable(
    spec: &Flux2,
    params: &MemoryParams,
    device: &Device,
    policy: &str,
    recompute: Recompute,
) -> Result<TrainableModel> {
    let options = TrainOptions {
        policy: policy.parse()?,
        recompute,
        adamw: AdamWOptions::default(),
        clip_norm: None,
        ema_decay: None,
        trunk: Precision::default(),
    };
    TrainableModel::load(spec, params, device, &options, &mut |_, _| Ok(()))
}

/// Policies, and what the names of what they train begin with, of models of two and two blocks.
const POLICIES: [(&str, &[&str]); 6] = [
    ("full", &[""]),
    (
        "paper:1",
        &[
            "x_embedder.",
            "transformer_blocks.0.",
            "single_transformer_blocks.1.",
            "local_decoder.",
            "norm_out.",
            "proj_out.",
        ],
    ),
    (
        "released:1",
        &[
            "x_embedder.",
            "context_embedder.",
            "time_guidance_embed.",
            "double_stream_modulation",
            "single_stream_modulation",
            "transformer_blocks.0.",
            "single_transformer_blocks.1.",
            "local_decoder.",
            "norm_out.",
            "proj_out.",
        ],
    ),
    ("head-only", &["local_decoder.", "norm_out.", "proj_out."]),
    ("single_transformer_blocks.0.*", &["single_transformer_blocks.0."]),
    (
        "double_stream_modulation_txt.*,transformer_blocks.1.*",
        &["double_stream_modulation_txt.", "transformer_blocks.1."],
    ),
];

fn gradients_equal_torch() -> Outcome {
    let group = Group::load(GROUP);
    for case in group.cases("grads.") {
        let params = params(&case);
        let spec = spec(&case, &params)?;
        let (x, target) = (input_image(&case, "x")?, input_image(&case, "target")?);
        let sigmas = case.input("t").0;
        let item = x.elements() / sigmas.len();
        // (1 − sigma) · image + sigma · noise = x and noise − image = target.
        let moved = |by: &dyn Fn(f32) -> f32| {
            let values = x.as_slice::<f32>()?.iter().zip(target.as_slice::<f32>()?).enumerate();
            let values: Vec<f32> = values
                .map(|(index, (x, target))| x + by(sigmas[index / item]) * target)
                .collect();
            Tensor::from_slice(&Device::Cpu, &values, x.shape())
        };
        let (images, noise) = (moved(&|sigma| -sigma)?, moved(&|sigma| 1.0 - sigma)?);
        let captions = captions(&case)?;
        let batch = Batch {
            images: &images,
            noise: &noise,
            sigmas: &sigmas,
            captions: &captions.iter().collect::<Vec<_>>(),
        };
        for (index, (policy, parts)) in POLICIES.into_iter().enumerate() {
            let mut model = trainable(&spec, &params, &Device::Cpu, policy, Recompute::ALL[index % 3])?;
            case.check("loss", &model.accumulate(&batch, 1.0)?.to_vec_f32()?)?;
            case.check("loss", &model.evaluate(&batch)?.to_vec_f32()?)?;
            let mut names = Vec::new();
            for tensor in model.trained() {
                let gradient = tensor.read(StatePart::Gradient)?.expect("it is trained");
                case.check(&format!("grad.{}", tensor.name), &gradient)?;
                names.push(tensor.name);
            }
            names.sort();
            let trains = |name: &&String| parts.iter().any(|part| name.starts_with(part));
            let mut expected: Vec<String> = params.0.keys().filter(trains).cloned().collect();
            expected.sort();
            assert_eq!(names, expected, "{policy}");
        }
    }
    Ok(())
}

/// A model of these sizes with random weights that bf16 can hold.
fn random(config: Flux2Config) -> (Flux2, MemoryParams) {
    let widths: &[usize] = if config.patch == 16 {
        &[8, 16, 24, 32]
    } else {
        &[8, 8, 16, 16, 24, 32]
    };
    let head = || DetailerLayout::for_patch(config.patch, Some(widths), Some(32), config.dim);
    let head = (config.kind == ModelKind::Pixel).then(|| head().expect("the widths are as many as the stages"));
    let spec = Flux2 { config, head };
    let generated = spec.tensors().into_iter().map(|(name, shape)| {
        let values = rounded(&generated_weight(&name, &shape, 0));
        (name, (shape, values))
    });
    let params = MemoryParams(generated.collect());
    (spec, params)
}

/// Sizes, heights, widths and numbers of caption tokens.
fn cuda_cases() -> [(Flux2Config, [usize; 2], &'static [usize]); 3] {
    [
        (sizes(384, 1, 128), [5, 7], &[20, 45]),
        (sizes(384, 16, 3), [96, 112], &[20, 20]),
        (sizes(384, 64, 3), [128, 192], &[33]),
    ]
}

fn random_captions(device: &Device, lengths: &[usize]) -> Result<Vec<Tensor>> {
    let caption = |(index, length): (usize, &usize)| {
        let values = random_bf16(&format!("cap.{index}"), length * 96);
        Tensor::from_f32(device, &values, [1, *length, 96])
    };
    lengths.iter().enumerate().map(caption).collect()
}

/// 1.25 times the errors that Z-Image's small models have in PyTorch's own bf16, whose widths and depths are alike.
const BF16_TOLERANCE: f64 = 1.12e-2;

fn on_cuda_equals_cpu(device: &Device) -> Outcome {
    for (config, [height, width], lengths) in cuda_cases() {
        let (spec, params) = random(config);
        let run = |device: &Device| -> Result<Tensor> {
            let dit = load(&spec, &params, device)?;
            let shape = [lengths.len(), height, width, spec.config.in_channels];
            let x = Tensor::from_f32(device, &random_bf16("x", shape.iter().product()), shape)?;
            let captions = random_captions(device, lengths)?;
            let prepared = dit.prepare(&captions.iter().collect::<Vec<_>>(), [height, width])?;
            dit.forward(&x, &prepared, &dit.modulate(&vec![0.4; lengths.len()], None)?)
        };
        let (expected, found) = (run(&Device::Cpu)?, run(device)?);
        expect_close(
            "v",
            &found.to_vec_f32()?,
            &expected.to_vec_f32()?,
            expected.shape(),
            BF16_TOLERANCE,
        )?;
    }
    Ok(())
}

/// A gradient's name, shape and values.
type Gradient = (String, Vec<usize>, Vec<f32>);

/// As for Z-Image's models.
const BF16_GRADIENT_TOLERANCE: Tolerance = Tolerance::of_gradients(4e-2);

fn cuda_gradients_equal_cpu(device: &Device) -> Outcome {
    for (index, (config, [height, width], lengths)) in cuda_cases().into_iter().enumerate() {
        let (spec, params) = random(config);
        let run = |device: &Device| -> Result<Vec<Gradient>> {
            let shape = [lengths.len(), height, width, spec.config.in_channels];
            let image = |name| Tensor::from_slice(device, &random_bf16(name, shape.iter().product()), shape);
            let (images, noise) = (image("images")?, image("noise")?);
            let captions = random_captions(device, lengths)?;
            let mut model = trainable(&spec, &params, device, "full", Recompute::ALL[index])?;
            let batch = Batch {
                images: &images,
                noise: &noise,
                sigmas: &[0.75, 0.25][..lengths.len()],
                captions: &captions.iter().collect::<Vec<_>>(),
            };
            model.accumulate(&batch, 1.0)?;
            let gradients = model.trained().into_iter().map(|tensor| {
                let gradient = tensor.read(StatePart::Gradient)?.expect("it is trained");
                Ok((tensor.name, tensor.shape, gradient))
            });
            gradients.collect()
        };
        for ((name, shape, expected), (_, _, found)) in run(&Device::Cpu)?.iter().zip(&run(device)?) {
            expect_close(name, found, expected, shape.as_slice(), BF16_GRADIENT_TOLERANCE)?;
        }
    }
    Ok(())
}
