//! Files that are no plain weights are called by their name: quantised models and LoRA, whichever part they are given for.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use l2p_tests::{Outcome, Suite, cli};
use libtest_mimic::Failed;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use super::model::{self, Stored, Tensors};

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "checkpoint::encoded::quantised_models_are_named",
        quantised_models_are_named,
    );
    suite.cpu("checkpoint::encoded::so_are_quantised_parts", so_are_quantised_parts);
    suite.cpu(
        "checkpoint::encoded::low_rank_changes_are_named",
        low_rank_changes_are_named,
    );
}

fn convert(folder: &Path, arguments: &str) -> Result<cli::Finished, Failed> {
    let program = cli::program("l2p-convert")?;
    cli::Finished::from(
        std::process::Command::new(program)
            .current_dir(folder)
            .args(arguments.split_whitespace()),
    )
}

/// As [`model::save`], with more metadata.
fn save_with(path: &Path, tensors: &Tensors, metadata: &[(&str, &str)]) -> Result<PathBuf, Failed> {
    let mut views = Vec::new();
    for (name, tensor) in tensors {
        views.push((
            name,
            TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes)?,
        ));
    }
    let metadata = metadata.iter().map(|(key, value)| ((*key).into(), (*value).into()));
    safetensors::serialize_to_file(views, Some(metadata.collect::<HashMap<_, _>>()), path)?;
    Ok(path.into())
}

/// A tensor of one byte per element.
fn bytes(dtype: Dtype, shape: &[usize], value: u8) -> Stored {
    Stored {
        dtype,
        shape: shape.to_vec(),
        bytes: vec![value; shape.iter().product()],
    }
}

/// The model with the matrices of its feed-forward networks in another type of one byte.
fn narrowed(plain: &Tensors, dtype: Dtype) -> Tensors {
    let mut tensors = plain.clone();
    for (name, tensor) in &mut tensors {
        if name.contains("feed_forward") {
            *tensor = bytes(dtype, &tensor.shape.clone(), 0x38);
        }
    }
    tensors
}

/// Adds a tensor beside each matrix of a feed-forward network.
fn beside(mut tensors: Tensors, end: &str, make: &dyn Fn(usize) -> Stored) -> Tensors {
    let matrices: Vec<(String, usize)> = tensors
        .iter()
        .filter(|(name, _)| name.contains("feed_forward") && name.ends_with(".weight"))
        .map(|(name, tensor)| (name.clone(), tensor.shape[0]))
        .collect();
    for (name, rows) in matrices {
        let layer = name.trim_end_matches(".weight");
        tensors.insert(format!("{layer}.{end}"), make(rows));
    }
    tensors
}

struct Case {
    name: &'static str,
    tensors: Tensors,
    metadata: Option<&'static str>,
    how: &'static str,
}

fn cases() -> Vec<Case> {
    let plain = model::pixel(Dtype::BF16);
    let fp8 = narrowed(&plain, Dtype::F8_E4M3);
    let int8 = narrowed(&plain, Dtype::I8);
    let scalar = |_: usize| model::stored("s", Dtype::F32, &[]);
    let rows = |rows: usize| model::stored("s", Dtype::F32, &[rows, 1]);
    let note = |text: &'static str| {
        move |_: usize| Stored {
            dtype: Dtype::U8,
            shape: vec![text.len()],
            bytes: text.as_bytes().to_vec(),
        }
    };
    let case = |name, tensors, metadata, how| Case {
        name,
        tensors,
        metadata,
        how,
    };
    vec![
        case(
            "mxfp8",
            fp8.clone(),
            Some("{\"layers\": {\"layers.0.feed_forward.w1\": {\"format\": \"mxfp8\"}}}"),
            "as `mxfp8`",
        ),
        case(
            "metadata",
            fp8.clone(),
            Some("{\"layers\": {}, \"rotation\": \"all\"}"),
            "with the setting `rotation`",
        ),
        case(
            "no_json",
            fp8,
            Some("eight bits"),
            "in a way that it does not tell in a form that is known",
        ),
        case(
            "convrot_w4a4",
            beside(
                beside(int8, "weight_scale", &rows),
                "comfy_quant",
                &note("{\"format\": \"convrot_w4a4\", \"convrot_groupsize\": 256}"),
            ),
            None,
            "as `convrot_w4a4`",
        ),
        case(
            "nvfp4",
            beside(
                beside(narrowed(&plain, Dtype::U8), "weight_scale", &rows),
                "weight_scale_2",
                &scalar,
            ),
            None,
            "to 4 bits",
        ),
        case(
            "four_bits",
            beside(narrowed(&plain, Dtype::U8), "weight_scale", &rows),
            None,
            "to 4 bits",
        ),
    ]
}

fn quantised_models_are_named() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    model::save(&folder.join("delta.safetensors"), &model::delta(Dtype::BF16))?;
    for Case {
        name,
        tensors,
        metadata,
        how,
    } in cases()
    {
        let file = format!("{name}.safetensors");
        let metadata: Vec<_> = metadata
            .map(|text| ("_quantization_metadata", text))
            .into_iter()
            .collect();
        save_with(&folder.join(&file), &tensors, &metadata)?;
        let said = format!("is quantised {how} (it holds `");
        let way_out =
            "which this program does not read; use the model's BF16, F16 or F32 file, or one of 8 bits with scales";
        for arguments in [
            format!("init --source {file} --patch 64 --out o.safetensors"),
            format!("export --in {file} --out o.safetensors --layout plain"),
            format!("merge --base {file} --delta delta.safetensors --out o.safetensors"),
        ] {
            let finished = convert(folder, &arguments)?;
            let clear = finished.stderr.contains(&said) && finished.stderr.contains(way_out);
            assert!(finished.code == 1 && clear, "{arguments}: {}", finished.stderr);
        }
        let finished = convert(folder, &format!("inspect {file} --json"))?.success()?;
        let found: Value = serde_json::from_str(&finished.stdout)?;
        assert_eq!(found["complete"], json!(false), "{name}");
        let quantised = found["quantised"]
            .as_str()
            .ok_or_else(|| format!("{name}: {found:#}"))?;
        assert!(quantised.contains(&said), "{name}: {quantised}");
        let text = convert(folder, &format!("inspect {file} --quick"))?.success()?.stdout;
        assert!(text.contains("QUANTISED, which is not read"), "{text}");
    }
    Ok(())
}

fn so_are_quantised_parts() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = super::demo::copy(folder.path())?;
    for (file, matrix) in [
        ("text_encoder/model.safetensors", "model.layers.0.mlp.up_proj"),
        (
            "vae/diffusion_pytorch_model.safetensors",
            "decoder.mid_block.attentions.0.to_q",
        ),
    ] {
        let path = source.join(file);
        let kept = std::fs::read(&path)?;
        super::demo::edit(&path, |tensors| {
            let weight = tensors
                .get_mut(&format!("{matrix}.weight"))
                .expect("a matrix of the demo");
            *weight = bytes(Dtype::U8, &weight.shape.clone(), 0x38);
            tensors.insert(format!("{matrix}.weight_scale"), model::stored("s", Dtype::F32, &[]));
        })?;
        let message = "is quantised to 4 bits";
        super::demo::expect_refused(folder.path(), "source", &[], message)?;
        let text = convert(folder.path(), "inspect source")?.success()?.stdout;
        assert!(text.contains(message), "{text}");
        super::demo::replace(&path, &kept)?;
    }
    let config = source.join("text_encoder/config.json");
    let quantised = super::demo::with_entry(&config, "quantization_config", Some(json!({ "bits": 4 })))?;
    super::demo::replace(&config, &quantised)?;
    let message = "config.json: says quantization_config: its weights are quantised";
    super::demo::expect_refused(folder.path(), "source", &[], message)
}

/// All styles of names, in every place where a model or a part of one may be named.
fn low_rank_changes_are_named() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = super::demo::copy(folder.path())?;
    model::save(&folder.path().join("pixel.safetensors"), &model::pixel(Dtype::BF16))?;
    std::fs::write(
        folder.path().join("config.json"),
        std::fs::read(source.join("vae/config.json"))?,
    )?;
    for (down, up) in [
        (
            "diffusion_model.layers.0.attention.to_q.lora_A.weight",
            "diffusion_model.layers.0.attention.to_q.lora_B.weight",
        ),
        (
            "lora_unet_layers_0_attention_to_q.lora_down.weight",
            "lora_unet_layers_0_attention_to_q.lora_up.weight",
        ),
        (
            "transformer.layers.0.attention.to_q.lora.down.weight",
            "transformer.layers.0.attention.to_q.lora.up.weight",
        ),
        (
            "base_model.model.layers.0.attention.to_q.lora_A.default.weight",
            "base_model.model.layers.0.attention.to_q.lora_B.default.weight",
        ),
        (
            "diffusion_model.layers.0.attention.qkv.lokr_w1",
            "diffusion_model.layers.0.attention.qkv.lokr_w2",
        ),
        ("layers.0.attention.to_q.hada_w1_a", "layers.0.attention.to_q.hada_w1_b"),
    ] {
        let tensors: Tensors = [(down, [4, 128]), (up, [128, 4])]
            .map(|(name, shape)| (name.to_owned(), model::stored(name, Dtype::BF16, &shape)))
            .into();
        let path = folder.path().join("lora.safetensors");
        model::save(&path, &tensors)?;
        let said = |finished: &cli::Finished| {
            finished.code == 1
                && finished.stderr.contains("lora.safetensors: is a LoRA (it holds `")
                && finished
                    .stderr
                    .contains("this program does not apply them; merge it into its model")
        };
        for arguments in [
            "inspect lora.safetensors",
            "inspect lora.safetensors --base pixel.safetensors",
            "init --source lora.safetensors --patch 16 --out o.safetensors",
            "merge --base pixel.safetensors --delta lora.safetensors --out o.safetensors",
            "export --in lora.safetensors --base pixel.safetensors --out o.safetensors --layout plain",
        ] {
            let finished = convert(folder.path(), arguments)?;
            assert!(said(&finished), "{down}, {arguments}: {}", finished.stderr);
        }
        for (model, more) in [
            ("lora.safetensors", vec![]),
            ("source", vec!["--vae", "lora.safetensors"]),
            ("source", vec!["--text-encoder", "lora.safetensors"]),
        ] {
            let finished = super::demo::draw(folder.path(), model, &more)?;
            assert!(said(&finished), "{down}, {model} {more:?}: {}", finished.stderr);
        }
    }
    Ok(())
}
