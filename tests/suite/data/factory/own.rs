//! The text encoder of a source as the factory's language model: random weights, which answer in the shape that is asked for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::bf16;
use l2p_engine::layers::metas;
use l2p_engine::model::config::TextConfig;
use l2p_engine::model::language::LanguageModel;
use l2p_tests::fixtures::generated_weight;
use l2p_tests::{Outcome, Suite, models_folder};
use libtest_mimic::Failed;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use super::{data, lines};

pub fn register(suite: &mut Suite) {
    suite.cpu("data::factory::own::the_sources_text_encoder_judges", judges);
    suite.cpu("data::factory::own::encoders_that_cannot_write_are_named", cannot_write);
}

/// A text encoder with just enough parameters to be taken for a language model.
fn encoder() -> TextConfig {
    TextConfig {
        vocabulary: 4096,
        dim: 1024,
        layers: 8,
        heads: 8,
        kv_heads: 2,
        head_dim: 128,
        ffn_hidden: 3584,
        ..TextConfig::published()
    }
}

/// Makes `encoder`, which takes the demo's tokens.
fn write_encoder(folder: &Path) -> Result<(), Failed> {
    let demo = demo()?;
    let encoder_folder = folder.join("encoder");
    std::fs::create_dir_all(&encoder_folder)?;
    let config = encoder();
    let text = std::fs::read_to_string(demo.join("text_encoder/config.json"))?;
    let mut written: Value = serde_json::from_str(&text)?;
    for (key, value) in [
        ("hidden_size", config.dim),
        ("intermediate_size", config.ffn_hidden),
        ("num_attention_heads", config.heads),
        ("num_key_value_heads", config.kv_heads),
        ("num_hidden_layers", config.layers),
    ] {
        written[key] = json!(value);
    }
    written["layer_types"] = json!(vec!["full_attention"; config.layers]);
    std::fs::write(encoder_folder.join("config.json"), written.to_string())?;
    let described = LanguageModel::describe(&config, "model.", false)?;
    let tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = metas(&described)
        .iter()
        .flat_map(|meta| meta.parts.clone())
        .map(|part| {
            let values = generated_weight(&part.name, &part.shape, 5).into_iter();
            let bytes = values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect();
            (part.name, (part.shape, bytes))
        })
        .collect();
    let views = tensors
        .iter()
        .map(|(name, (shape, bytes))| Ok((name, TensorView::new(Dtype::BF16, shape.clone(), bytes)?)));
    let views: Vec<_> = views.collect::<Result<_, Failed>>()?;
    safetensors::serialize_to_file(views, None, &encoder_folder.join("model.safetensors"))?;
    Ok(())
}

/// The demo's folder.
fn demo() -> Result<PathBuf, Failed> {
    Ok(models_folder().join("demo/source").canonicalize()?)
}

fn judges() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    write_encoder(folder)?;
    let demo = demo()?.display().to_string();
    data(folder, &["prompts", "--count", "3", "--out", "set", "--by-grammar"])?.success()?;
    let check = [
        "check",
        "--out",
        "set",
        "--model",
        &demo,
        "--text-encoder",
        "encoder",
        "--device",
        "cpu",
        "--json",
    ];
    let finished = data(folder, &check)?.success()?;
    let result: Value = serde_json::from_str(&finished.stdout)?;
    let auditor = result["auditor"].as_str().ok_or("no auditor")?;
    assert!(
        auditor.starts_with("text encoder ") && auditor.ends_with("f32"),
        "{auditor}"
    );
    // Whatever it says, it says in the shape of a verdict.
    let verdicts = lines(&folder.join("set/checks.jsonl"))?;
    assert_eq!(verdicts.len(), 3);
    assert!(
        verdicts
            .iter()
            .all(|verdict| verdict["by"] == auditor && verdict["is_valid"].is_boolean())
    );
    // Its answers are kept.
    let again = data(folder, &[&check[..], &["--again"]].concat())?.success()?;
    assert!(
        again.stderr.contains("3 answers were there from before"),
        "{}",
        again.stderr
    );
    Ok(())
}

fn cannot_write() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let demo = demo()?.display().to_string();
    let write = [
        "prompts", "--count", "3", "--out", "set", "--device", "cpu", "--model", &demo,
    ];
    let finished = data(folder, &write)?.success()?;
    assert!(
        finished.stderr.contains("is no language model") && finished.stderr.contains("written by a grammar"),
        "{}",
        finished.stderr
    );
    // What is damaged or missing is an error, not a reason to write otherwise.
    let nothing = data(
        folder,
        &["prompts", "--count", "3", "--out", "other", "--model", "nothing"],
    )?;
    assert!(
        nothing.code != 0 && nothing.stderr.contains("nothing"),
        "{}",
        nothing.stderr
    );
    let both = [
        "prompts",
        "--count",
        "3",
        "--out",
        "other",
        "--by-grammar",
        "--llm-url",
        "http://localhost",
        "--llm-model",
        "a",
    ];
    assert!(data(folder, &both)?.code != 0);
    Ok(())
}
