//! `l2p-convert inspect`.

use l2p_tests::{Outcome, Suite};
use safetensors::Dtype;
use serde_json::{Value, json};

use super::{json, run};
use crate::checkpoint::model;

pub fn register(suite: &mut Suite) {
    suite.cpu("convert::inspect::a_pixel_file", a_pixel_file);
    suite.cpu("convert::inspect::a_diffusers_folder", a_diffusers_folder);
    suite.cpu(
        "convert::inspect::a_delta_with_and_without_its_base",
        a_delta_with_and_without_its_base,
    );
    suite.cpu("convert::inspect::an_incomplete_model", an_incomplete_model);
    suite.cpu("convert::inspect::text_for_people", text_for_people);
}

fn parameters(tensors: &model::Tensors) -> usize {
    tensors
        .values()
        .map(|tensor| tensor.shape.iter().product::<usize>())
        .sum()
}

fn bytes(tensors: &model::Tensors) -> usize {
    tensors.values().map(|tensor| tensor.bytes.len()).sum()
}

/// Fails unless `found` has these entries, given by path.
fn expect(found: &Value, entries: &[(&str, Value)]) -> Outcome {
    for (path, expected) in entries {
        match found.pointer(path) {
            Some(value) if value == expected => {}
            value => return Err(format!("{path} is {value:?}, expected {expected}\n{found:#}").into()),
        }
    }
    Ok(())
}

fn a_pixel_file() -> Outcome {
    let folder = tempfile::tempdir()?;
    let pixel = model::pixel(Dtype::BF16);
    let all = model::prefixed(&model::packed(&pixel), "model.diffusion_model.");
    model::save(&folder.path().join("pixel.safetensors"), &all)?;
    let found = json(folder.path(), "inspect pixel.safetensors")?;
    let weights = 2 * parameters(&pixel);
    expect(
        &found,
        &[
            ("/path", json!("pixel.safetensors")),
            ("/container", json!("file")),
            ("/layout", json!("packed")),
            ("/prefixes", json!(["model.diffusion_model."])),
            ("/delta", json!(false)),
            ("/complete", json!(true)),
            ("/kind", json!("pixel")),
            ("/patch", json!(16)),
            ("/resolution", json!({ "width": 1024, "height": 1024, "stated": false })),
            ("/transformer/dim", json!(model::DIM)),
            ("/transformer/layers", json!(model::LAYERS)),
            ("/transformer/ffn_hidden", json!(model::FFN)),
            ("/head/variant", json!("1k")),
            ("/head/stages/3", json!({ "name": "4", "width": 10 })),
            ("/head/bottleneck", json!(model::BOTTLENECK)),
            ("/parameters", json!(parameters(&pixel))),
            ("/parameters_by_part/x_pad_token", json!(model::DIM)),
            ("/parameters_by_part/all_x_embedder", json!(769 * model::DIM)),
            ("/tensors", json!(pixel.len())),
            ("/bytes", json!(bytes(&pixel))),
            ("/dtypes/BF16/tensors", json!(pixel.len())),
            ("/missing", json!([])),
            ("/unexpected", json!([])),
            ("/memory/sampling/weights", json!(weights)),
            // Four blocks, all of them among the five at either end.
            ("/memory/training/trained_parameters", json!(parameters(&pixel))),
            ("/memory/training/optimizer", json!(12 * parameters(&pixel))),
        ],
    )?;
    let number = |path: &str| found.pointer(path).and_then(Value::as_u64).unwrap_or(0);
    assert_eq!(
        number("/memory/sampling/peak"),
        number("/memory/sampling/weights") + number("/memory/sampling/activations")
    );
    // By the documented formulas: 4096 + 512 tokens; the head's maps are larger than a transformer step.
    let pixels = 1024 * 1024;
    let tokens = 4096 + 512;
    let [w1, w2, w3, w4] = model::WIDTHS;
    let head = 2
        * (pixels * w1 + pixels / 4 * w2 + pixels / 16 * w3 + pixels / 64 * w4 + 2 * pixels * w1 + tokens * model::DIM);
    assert_eq!(
        number("/memory/sampling/activations") as usize,
        head + 3 * 4 * 3 * pixels
    );
    Ok(())
}

fn a_diffusers_folder() -> Outcome {
    let folder = tempfile::tempdir()?;
    model::save_diffusers(&folder.path().join("source"), 3)?;
    let found = json(folder.path(), "inspect source")?;
    expect(
        &found,
        &[
            ("/container", json!("diffusers")),
            ("/layout", json!("plain")),
            ("/complete", json!(true)),
            ("/kind", json!("latent")),
            ("/patch", json!(2)),
            ("/head", Value::Null),
            ("/text_encoder/parameters", json!(64 * model::CAPTION)),
            ("/vae/parameters", json!(16 * 16 * 9)),
            ("/tokenizer", json!("source/tokenizer")),
            ("/shift", json!(3.0)),
            ("/memory/sampling/text_encoder", json!(2 * 64 * model::CAPTION)),
        ],
    )?;
    assert_eq!(found["files"].as_array().map(Vec::len), Some(3));
    Ok(())
}

fn a_delta_with_and_without_its_base() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let delta = model::delta(Dtype::F32);
    model::save(&at("delta.safetensors"), &delta)?;
    model::save(&at("base.safetensors"), &model::latent(Dtype::BF16))?;
    let alone = json(folder.path(), "inspect delta.safetensors")?;
    expect(
        &alone,
        &[
            ("/delta", json!(true)),
            ("/complete", json!(false)),
            ("/kind", json!("pixel")),
            ("/patch", json!(16)),
            ("/transformer", Value::Null),
            ("/problem", Value::Null),
            ("/memory", Value::Null),
            ("/parameters", json!(parameters(&delta))),
            (
                "/missing",
                json!([
                    "t_embedder",
                    "cap_embedder",
                    "x_pad_token",
                    "cap_pad_token",
                    "layers.1",
                    "layers.2",
                    "noise_refiner.0",
                    "context_refiner.0"
                ]),
            ),
        ],
    )?;
    let whole = json(folder.path(), "inspect delta.safetensors --base base.safetensors")?;
    expect(
        &whole,
        &[
            ("/delta", json!(true)),
            ("/complete", json!(true)),
            ("/base", json!("base.safetensors")),
            ("/missing", json!([])),
            ("/unused", json!([])),
            ("/parameters", json!(parameters(&model::pixel(Dtype::BF16)))),
        ],
    )
}

fn an_incomplete_model() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("m.safetensors");
    let mut tensors = model::pixel(Dtype::BF16);
    tensors.remove("layers.2.attention.to_v.weight");
    tensors.insert(
        "layers.2.attention.to_v.bias".into(),
        model::stored("b", Dtype::BF16, &[128]),
    );
    tensors.insert(
        "layers.1.ffn_norm1.weight".into(),
        model::stored("n", Dtype::F32, &[64]),
    );
    tensors.insert(
        "all_final_layer.2-1.linear.bias".into(),
        model::stored("f", Dtype::BF16, &[64]),
    );
    tensors.insert("vae.x".into(), model::stored("v", Dtype::BF16, &[1]));
    model::save(&path, &tensors)?;
    expect(
        &json(folder.path(), "inspect m.safetensors")?,
        &[
            ("/complete", json!(false)),
            ("/delta", json!(false)),
            ("/missing", json!(["layers.2.attention.to_v.weight"])),
            ("/unexpected", json!(["layers.2.attention.to_v.bias"])),
            (
                "/wrong",
                json!([{ "name": "layers.1.ffn_norm1.weight", "found": [64], "expected": [128] }]),
            ),
            ("/unused", json!(["all_final_layer.2-1.linear.bias"])),
            ("/foreign", json!(["vae.x"])),
            ("/dtypes/F32", json!({ "tensors": 1, "bytes": 256 })),
        ],
    )?;
    tensors.remove("cap_embedder.0.weight");
    model::save(&path, &tensors)?;
    let problem = json!("the caption width is unknown: tensor `cap_embedder.0.weight` is missing");
    expect(
        &json(folder.path(), "inspect m.safetensors")?,
        &[("/problem", problem), ("/complete", json!(false))],
    )
}

fn text_for_people() -> Outcome {
    let folder = tempfile::tempdir()?;
    model::save(&folder.path().join("pixel.safetensors"), &model::pixel(Dtype::BF16))?;
    let text = run(folder.path(), "inspect pixel.safetensors")?.success()?.stdout;
    for line in [
        "  model        pixel model, patch 16, complete",
        "  layout       file, plain names",
        "  size         1024×1024 pixels, of the published model with this patch",
        "  transformer  width 128, 1 heads × 128, 4 blocks and 1+1 refiners, feed-forward 96, captions 48, 3 channels",
        "  head         stages of the 1k head, widths 4/6/8/10, bottleneck 12",
    ] {
        assert!(text.lines().any(|found| found == line), "`{line}` is not in\n{text}");
    }
    for word in ["missing", "unexpected", "problem"] {
        assert!(!text.contains(word), "{text}");
    }
    Ok(())
}
