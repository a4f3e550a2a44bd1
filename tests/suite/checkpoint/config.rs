//! Sizes read off tensors, and the files that must not contradict them.

use std::path::Path;

use l2p_engine::checkpoint::Checkpoint;
use l2p_engine::layers::MemoryParams;
use l2p_engine::model::Spec;
use l2p_engine::model::config::{ModelKind, SchedulerConfig, TextConfig, VaeConfig};
use l2p_engine::model::detailer::DetailerLayout;
use l2p_engine::model::family::TransformerConfig;
use l2p_engine::model::objective::{BetaSchedule, NoiseSchedule, Prediction, Spacing, Trained};
use l2p_engine::model::zimage::{DitConfig, HEAD_PREFIX, ZImage};
use l2p_tests::{Outcome, Suite, fixtures};
use libtest_mimic::Failed;
use safetensors::Dtype;
use serde_json::{Value, json};

use super::layouts::open;
use super::model;

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "checkpoint::config::sizes_follow_from_tensors",
        sizes_follow_from_tensors,
    );
    suite.cpu(
        "checkpoint::config::tensors_are_those_of_the_reference",
        tensors_are_those_of_the_reference,
    );
    suite.cpu(
        "checkpoint::config::contradictions_are_errors",
        contradictions_are_errors,
    );
    suite.cpu(
        "checkpoint::config::incomplete_models_are_errors",
        incomplete_models_are_errors,
    );
    suite.cpu("checkpoint::config::parts_are_read", parts_are_read);
    suite.cpu(
        "checkpoint::config::heads_are_those_published",
        heads_are_those_published,
    );
}

fn sizes_follow_from_tensors() -> Outcome {
    let folder = tempfile::tempdir()?;
    let expected = DitConfig {
        kind: ModelKind::Pixel,
        dim: model::DIM,
        heads: 1,
        head_dim: 128,
        layers: model::LAYERS,
        refiner_layers: 1,
        ffn_hidden: model::FFN,
        caption_width: model::CAPTION,
        patch: 16,
        in_channels: 3,
        rope_theta: 256.0,
        axes_dims: [32, 48, 48],
        norm_eps: 1e-5,
        t_scale: 1000.0,
        t_frequencies: 32,
        t_hidden: 64,
        adaln_width: model::DIM,
    };
    let path = folder.path().join("pixel.safetensors");
    let found = open(&model::save(&path, &model::packed(&model::pixel(Dtype::BF16)))?, None)?;
    assert_eq!(found.spec.sizes(), json!(expected));
    let head = found.spec.head().ok_or("no head")?;
    assert_eq!(head.variant().map(|variant| variant.name), Some("1k"));
    assert_eq!(
        (head.widths(), head.bottleneck),
        (model::WIDTHS.to_vec(), model::BOTTLENECK)
    );
    // What a pixel model was made from may still be in the file.
    let mut both = model::latent(Dtype::BF16);
    both.extend(model::pixel(Dtype::BF16));
    let found = open(&model::save(&path, &both)?, None)?;
    assert_eq!(found.spec.sizes(), json!(expected));

    let found = open(&model::save(&path, &model::latent(Dtype::BF16))?, None)?;
    let latent = DitConfig {
        kind: ModelKind::Latent,
        patch: 2,
        in_channels: 16,
        ..expected
    };
    assert_eq!((found.spec.sizes(), found.spec.head()), (json!(latent), None));
    Ok(())
}

/// The tensors that a model is expected to have are those of PyTorch's module, at several sizes.
fn tensors_are_those_of_the_reference() -> Outcome {
    let mut models = 0;
    for fixture in ["dit_pixel", "dit_latent"] {
        let path = fixtures::folder().join(format!("data/{fixture}.json"));
        let fixture: Value = serde_json::from_slice(&std::fs::read(path)?)?;
        for case in fixture["cases"].as_array().ok_or("no cases")? {
            let mut params = MemoryParams::default();
            for weight in case["weights"].as_array().ok_or("no weights")? {
                let shape: Vec<usize> = serde_json::from_value(weight["shape"].clone())?;
                let name = weight["name"].as_str().ok_or("no name")?;
                params.insert(name, &shape, Vec::new());
            }
            let config = DitConfig::read(&params, None)?;
            let settings = &case["config"]["config"];
            assert_eq!(json!(config.heads), settings["n_heads"]);
            assert_eq!(json!([config.patch]), settings["all_patch_size"]);
            assert_eq!(json!(config.in_channels), settings["in_channels"]);
            let spec = ZImage {
                head: DetailerLayout::seen(&params, HEAD_PREFIX, config.dim)
                    .filter(|_| config.kind == ModelKind::Pixel),
                config,
            };
            if let Some(head) = &spec.head {
                assert_eq!(settings["head"]["layout"], head.variant().ok_or("no variant")?.name);
            }
            assert_eq!(spec.head.is_some(), spec.config.kind == ModelKind::Pixel);
            let expected = spec.tensors();
            for (name, shape) in &expected {
                let found = params.0.get(name).map(|(shape, _)| shape);
                assert_eq!(found, Some(shape), "{} {name}", case["case"]);
            }
            assert_eq!(expected.len(), params.0.len(), "{}", case["case"]);
            models += 1;
        }
    }
    assert!(models >= 5, "only {models} models were compared");
    Ok(())
}

fn contradictions_are_errors() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = folder.path().join("source");
    model::save_diffusers(&source, 1)?;
    let config = source.join("transformer/config.json");
    let with = |key: &str, value: Value| -> Result<String, Failed> {
        let mut changed = model::latent_config();
        changed[key] = value;
        std::fs::write(&config, changed.to_string())?;
        let error = open(&source, None)
            .err()
            .ok_or_else(|| format!("{key} was accepted"))?
            .to_string();
        let at = format!("{}: ", config.display());
        Ok(error.strip_prefix(&at).unwrap_or(&error).to_owned())
    };
    for (key, value, message) in [
        ("dim", json!(256), "says dim = 256, but the tensors have 128"),
        ("n_layers", json!(30), "says n_layers = 30, but the tensors have 4"),
        (
            "n_refiner_layers",
            json!(2),
            "says n_refiner_layers = 2, but the tensors have 1",
        ),
        (
            "cap_feat_dim",
            json!(2560),
            "says cap_feat_dim = 2560, but the tensors have 48",
        ),
        ("in_channels", json!(3), "says in_channels = 3, but the tensors have 16"),
        (
            "all_patch_size",
            json!([16]),
            "says all_patch_size = [16], but the tensors have 2",
        ),
        (
            "n_heads",
            json!(2),
            "says n_heads = 2 and n_kv_heads = 1; they must be equal",
        ),
        (
            "qk_norm",
            json!(false),
            "says qk_norm = false; models without normalised queries and keys are not supported",
        ),
        (
            "all_f_patch_size",
            json!([2]),
            "says all_f_patch_size other than [1]; video models are not supported",
        ),
        (
            "_class_name",
            json!("FluxTransformer2DModel"),
            "describes a FluxTransformer2DModel, expected a ZImageTransformer2DModel or Flux2Transformer2DModel",
        ),
    ] {
        assert_eq!(with(key, value)?, message);
    }
    let axes = with("axes_dims", json!([32, 32, 32]))?;
    assert!(axes.ends_with("position axes of [32, 32, 32] do not make up heads of 128; put a config.json with `axes_dims` beside the tensors"), "{axes}");
    let malformed = with("dim", json!("wide"))?;
    assert!(
        malformed.starts_with("is not what was expected: entry `dim`: invalid type: string \"wide\""),
        "{malformed}"
    );
    // Settings that tensors do not tell come from the file.
    let mut changed = model::latent_config();
    changed["rope_theta"] = json!(1000.0);
    changed["norm_eps"] = json!(1e-6);
    changed["axes_dims"] = json!([64, 32, 32]);
    std::fs::write(&config, changed.to_string())?;
    let found = open(&source, None)?.spec;
    for (key, value) in [
        ("rope_theta", json!(1000.0)),
        ("norm_eps", json!(1e-6_f32)),
        ("axes_dims", json!([64, 32, 32])),
    ] {
        assert_eq!(found.sizes()[key], value);
    }
    // They hold for the file that they stand beside, too, unless they are another part's.
    let file = source.join("transformer/diffusion_pytorch_model.safetensors");
    assert_eq!(open(&file, None)?.spec.sizes()["rope_theta"], 1000.0);
    let of_text = json!({ "model_type": "qwen3", "rope_theta": 7.0 });
    std::fs::write(&config, of_text.to_string())?;
    assert_eq!(open(&file, None)?.spec.sizes()["rope_theta"], 256.0);
    // What is written for diffusers is read back as the same model.
    std::fs::write(&config, found.config_json().to_string())?;
    let read = TransformerConfig::read(&config)?;
    let checkpoint = Checkpoint::open_transformer(&source.join("transformer"))?;
    assert_eq!(json!(DitConfig::read(&checkpoint, Some(&read))?), found.sizes());
    Ok(())
}

fn incomplete_models_are_errors() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("m.safetensors");
    let pixel = model::pixel(Dtype::BF16);
    let expect = |change: &dyn Fn(&mut model::Tensors), message: &str| -> Outcome {
        let mut changed = pixel.clone();
        change(&mut changed);
        model::save(&path, &changed)?;
        let found = open(&path, None)
            .err()
            .ok_or_else(|| format!("accepted, expected {message}"))?
            .to_string();
        assert_eq!(found, format!("{}: {message}", path.display()));
        Ok(())
    };
    expect(
        &|tensors| drop(tensors.remove("layers.2.attention.to_v.weight")),
        "lacks 1 tensor of the model: `layers.2.attention.to_v.weight`",
    )?;
    expect(
        &|tensors| drop(tensors.remove("cap_embedder.0.weight")),
        "the caption width is unknown: tensor `cap_embedder.0.weight` is missing",
    )?;
    expect(
        &|tensors| tensors.retain(|name, _| !name.starts_with("layers.2.")),
        "is a delta, or damaged: it lacks `layers.2`; give the model that it was trained over with --base",
    )?;
    expect(
        &|tensors| drop(tensors.remove("local_decoder.enc2.0.weight")),
        "lacks 1 tensor of the model: `local_decoder.enc2.0.weight`",
    )?;
    expect(
        &|tensors| tensors.retain(|name, _| !name.starts_with("local_decoder.up2.")),
        "lacks 2 tensors of the model: `local_decoder.up2.1.bias`, `local_decoder.up2.1.weight`",
    )?;
    expect(
        &|tensors| {
            drop(tensors.insert(
                "layers.1.attention.to_q.bias".into(),
                model::stored("b", Dtype::BF16, &[128]),
            ))
        },
        "holds 1 tensor that a pixel model has no place for: `layers.1.attention.to_q.bias`",
    )?;
    // As when shards of two models are mixed without an index.
    let wide = model::stored("w", Dtype::BF16, &[256, 256]);
    expect(
        &|tensors| drop(tensors.insert("layers.1.attention.to_q.weight".into(), wide.clone())),
        "tensor `layers.1.attention.to_q.weight` has shape [256, 256], expected [128, 128] as in the rest of the model",
    )?;
    expect(
        &|tensors| {
            drop(tensors.insert(
                "all_x_embedder.16-1.weight".into(),
                model::stored("e", Dtype::BF16, &[128, 256]),
            ))
        },
        "tensor `all_x_embedder.16-1.weight` takes 256 features, expected 768 for an image's patches",
    )
}

fn parts_are_read() -> Outcome {
    let folder = tempfile::tempdir()?;
    model::save_diffusers(folder.path(), 1)?;
    let at = |name: &str| folder.path().join(name);
    let text = TextConfig::read(&at("text_encoder"))?;
    assert_eq!(
        (text.vocabulary, text.dim, text.layers, text.heads, text.kv_heads),
        (64, 48, 2, 2, 1)
    );
    assert_eq!(
        (text.head_dim, text.ffn_hidden, text.norm_eps, text.rope_theta),
        (32, 80, 1e-6, 1e6)
    );
    let vae = VaeConfig::read(&at("vae"))?;
    assert_eq!(
        (vae.downsampling(), vae.scaling_factor, vae.shift_factor),
        (8, 0.3611, 0.1159)
    );
    assert!(vae.mid_block_add_attention && !vae.use_post_quant_conv);
    assert_eq!(SchedulerConfig::read(&at("scheduler"))?.shift, 3.0);

    let expect =
        |file: &str, content: Value, read: &dyn Fn(&Path) -> l2p_engine::Result<()>, message: &str| -> Outcome {
            let path = at(file);
            std::fs::write(&path, content.to_string())?;
            let found = read(path.parent().ok_or("no folder")?)
                .err()
                .ok_or("accepted")?
                .to_string();
            assert_eq!(found, format!("{}: {message}", path.display()));
            Ok(())
        };
    let qwen = |key: &str, value: Value| {
        let mut entries = json!({
            "model_type": "qwen3", "vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 80, "rope_theta": 5e5,
        });
        entries[key] = value;
        entries
    };
    let read = |folder: &Path| TextConfig::read(folder).map(drop);
    let file = "text_encoder/config.json";
    expect(
        file,
        qwen("model_type", json!("llama")),
        &read,
        "describes a `llama` model, expected `qwen3`",
    )?;
    expect(
        file,
        qwen("num_key_value_heads", json!(3)),
        &read,
        "says 2 query heads and 3 key heads, which does not divide",
    )?;
    expect(
        file,
        qwen("rope_scaling", json!({ "factor": 4 })),
        &read,
        "scales its rotary frequencies, which is not supported",
    )?;
    std::fs::write(at(file), qwen("head_dim", Value::Null).to_string())?;
    let older = TextConfig::read(&at("text_encoder"))?;
    assert_eq!((older.head_dim, older.kv_heads, older.rope_theta), (24, 2, 5e5));
    let read = |folder: &Path| SchedulerConfig::read(folder).map(drop);
    let file = "scheduler/scheduler_config.json";
    expect(
        file,
        json!({ "shift": -1.0 }),
        &read,
        "is not what was expected: entry `shift`: expected a number from 0.01 to 1000, found -1 at line 1 column 14",
    )?;
    let ddim = |name: &str, value: Value| {
        let mut config = json!({ "_class_name": "DDIMScheduler", "clip_sample": false });
        config[name] = value;
        config
    };
    for (name, value, message) in [
        ("clip_sample", Value::Null, "clips pictures at every step"),
        ("clip_sample", json!(true), "clips pictures at every step"),
        ("thresholding", json!(true), "says thresholding = true"),
        ("trained_betas", json!([0.1]), "says trained_betas"),
        ("beta_schedule", json!("sigmoid"), "says beta_schedule = sigmoid"),
        ("prediction_type", json!("score"), "says prediction_type = score"),
        ("num_train_timesteps", json!(0), "says num_train_timesteps"),
        (
            "variance_type",
            json!("learned_range"),
            "says variance_type = learned_range",
        ),
        ("rescale_betas_zero_snr", json!(true), "exclude each other"),
        ("beta_start", json!(0.5), "is larger than beta_end"),
        (
            "_class_name",
            json!("PNDMScheduler"),
            "describes a PNDMScheduler; only FlowMatchEulerDiscreteScheduler, DDIM",
        ),
    ] {
        std::fs::write(at(file), ddim(name, value).to_string())?;
        let refused = read(&at("scheduler")).err().ok_or(message)?.to_string();
        assert!(refused.contains(message), "{refused}");
    }
    discrete_schedules(&at("scheduler"))?;
    let read = |folder: &Path| VaeConfig::read(folder).map(drop);
    let vae = json!({
        "latent_channels": 4, "out_channels": 3, "block_out_channels": [6], "layers_per_block": 1, "norm_num_groups": 4,
        "scaling_factor": 1.0, "shift_factor": null, "use_post_quant_conv": false,
    });
    expect(
        "vae/config.json",
        vae,
        &read,
        "says block_out_channels = [6], only multiples of norm_num_groups = 4 is supported",
    )
}

/// What the classes of discrete schedules say of a model, with their own defaults.
fn discrete_schedules(folder: &Path) -> Outcome {
    let read = |text: &str| {
        std::fs::write(folder.join("scheduler_config.json"), text)?;
        SchedulerConfig::read(folder).map_err(Failed::from)
    };
    // Infinity is no JSON, and is written all the same.
    let found = read(
        r#"{ "_class_name": "DPMSolverMultistepScheduler", "prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2",
             "lambda_min_clipped": -Infinity, "num_train_timesteps": 500, "rescale_betas_zero_snr": true, "shift": 3.0 }"#,
    )?;
    let schedule = NoiseSchedule {
        beta_schedule: BetaSchedule::Cosine,
        num_train_timesteps: 500,
        rescale_betas_zero_snr: true,
        timestep_spacing: Spacing::Linspace,
        ..NoiseSchedule::default()
    };
    assert_eq!(found.trained, Trained::new(Prediction::V, Some(schedule))?);
    assert_eq!((found.shift, found.notes), (1.0, Vec::new()));
    let found = read(r#"{ "_class_name": "DDPMScheduler", "clip_sample": false, "steps_offset": 1 }"#)?;
    let schedule = found.trained.schedule().ok_or("a DDPM has a schedule")?;
    assert_eq!(
        (schedule.timestep_spacing, schedule.steps_offset),
        (Spacing::Leading, 1)
    );
    assert!(
        found.notes[0].contains("describes a DDPMScheduler; steps are ddim's"),
        "{:?}",
        found.notes
    );
    let flow = r#"{ "_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": true, "flow_shift": 2.5 }"#;
    let found = read(flow)?;
    assert_eq!((found.trained, found.shift), (Trained::FLOW, 2.5));
    Ok(())
}

fn heads_are_those_published() -> Outcome {
    for (patch, dim, widths, bottleneck) in [
        (16, 3840, vec![64, 128, 256, 512], 512),
        (64, 3840, vec![16, 32, 64, 128, 256, 512], 512),
        (128, 3840, vec![3, 16, 32, 64, 128, 256, 512], 512),
        (160, 3840, vec![3, 16, 32, 64, 128, 256], 512),
        (16, 384, vec![32, 64, 128, 256], 256),
        (160, 384, vec![3, 8, 16, 32, 64, 128], 256),
    ] {
        let head = DetailerLayout::for_patch(patch, None, None, dim)?;
        assert_eq!(
            (head.widths(), head.bottleneck),
            (widths, bottleneck),
            "patch {patch}, width {dim}"
        );
        assert_eq!(head.variant().map(|variant| variant.patch), Some(patch));
    }
    // The published 10K head, by hand.
    let tensors = DetailerLayout::for_patch(160, None, None, 3840)?.tensors(HEAD_PREFIX);
    for (name, shape) in [
        ("enc_10k_a.0", [3, 3, 3, 3]),
        ("enc0.0", [16, 3, 3, 3]),
        ("enc3.0", [256, 128, 3, 3]),
        ("bottleneck.0", [512, 256 + 3840, 1, 1]),
        ("up3.1", [256, 512, 3, 3]),
        ("dec3.0", [128, 512, 3, 3]),
        ("dec0.0", [16, 32, 3, 3]),
        ("up_10k_a.1", [16, 16, 3, 3]),
        ("dec_10k_a.0", [16, 19, 3, 3]),
        ("out_conv", [3, 16, 1, 1]),
    ] {
        let name = format!("local_decoder.{name}.weight");
        assert!(tensors.contains(&(name.clone(), shape.to_vec())), "{name}");
    }
    let refused = DetailerLayout::for_patch(16, Some(&[1, 2]), None, 3840)
        .unwrap_err()
        .to_string();
    assert_eq!(
        refused,
        "head widths [1, 2] do not fit the 1k head, which has 4 stages, for example [64, 128, 256, 512]"
    );
    for (widths, bottleneck) in [([8, 8, 16, 1 << 62], None), ([8, 8, 16, 16], Some(1 << 62))] {
        let refused = DetailerLayout::for_patch(16, Some(&widths), bottleneck, 384).unwrap_err();
        let message = "head widths: expected a whole number from 1 to 262144, found 4611686018427387904";
        assert_eq!(refused.to_string(), message);
    }
    Ok(())
}
