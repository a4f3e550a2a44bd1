use l2p_engine::Device;
use l2p_engine::layers::MemoryParams;
use l2p_engine::model::config::TextConfig;
use l2p_engine::model::text::TextEncoder;
use l2p_tests::fixtures::{Case, Group};
use l2p_tests::{Outcome, Suite, expect_like_cpu};
use serde_json::{Value, json};

use super::{params, rounded_params};

pub fn register(suite: &mut Suite) {
    suite.cpu("models::text::cpu_equals_transformers", cpu_equals_transformers);
    suite.cpu("models::text::configurations_are_read", configurations_are_read);
    suite.cpu("models::text::mistakes_are_named", mistakes_are_named);
    suite.cuda("models::text::cuda_equals_cpu", cuda_equals_cpu);
}

/// 1.25 times the error of PyTorch's own bf16 on these cases, 8.4e-3.
const BF16_ENCODER_TOLERANCE: f64 = 1.05e-2;

/// Reads a configuration as it stands on disk.
pub(super) fn read(config: &Value) -> l2p_engine::Result<TextConfig> {
    let dir = tempfile::tempdir().expect("a temporary folder can be made");
    std::fs::write(dir.path().join("config.json"), config.to_string()).expect("it can be written to");
    TextConfig::read(dir.path())
}

/// The sizes of a case, in the layout of older versions of transformers.
pub(super) fn config(case: &Case<'_>) -> Value {
    let mut config = case.config(&["config"]).clone();
    config["model_type"] = json!("qwen3");
    config
}

fn ids(case: &Case<'_>) -> Vec<u32> {
    case.input("input_ids").0.into_iter().map(|id| id as u32).collect()
}

fn cpu_equals_transformers() -> Outcome {
    let group = Group::load("text");
    for case in group.cases("") {
        let encoder = TextEncoder::load(&params(&case), &Device::Cpu, &read(&config(&case))?)?;
        let hidden = encoder.encode(&ids(&case))?;
        assert_eq!(hidden.shape().to_vec(), [1, ids(&case).len(), 256]);
        case.check("hidden", hidden.as_slice()?)?;
    }
    // The names of a whole language model; the last layer is not needed.
    let case = group.case("l13");
    let named = params(&case)
        .0
        .into_iter()
        .filter(|(name, _)| !name.starts_with("layers.2.") && name != "norm.weight");
    let prefixed = MemoryParams(named.map(|(name, tensor)| (format!("model.{name}"), tensor)).collect());
    let encoder = TextEncoder::load(&prefixed, &Device::Cpu, &read(&config(&case))?)?;
    case.check("hidden", encoder.encode(&ids(&case))?.as_slice()?)
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    let group = Group::load("text");
    for case in group.cases("") {
        let (params, config) = (rounded_params(&case), read(&config(&case))?);
        expect_like_cpu(case.name(), device, BF16_ENCODER_TOLERANCE, |device| {
            let encoder = TextEncoder::load(&params, device, &config)?;
            Ok(vec![encoder.encode(&ids(&case))?])
        })?;
    }
    Ok(())
}

fn configurations_are_read() -> Outcome {
    let group = Group::load("text");
    let mut older = config(&group.case("l13"));
    older["rope_theta"] = json!(12345.0);
    let mut newer = older.clone();
    newer.as_object_mut().expect("an object").remove("rope_theta");
    newer["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 12345.0});
    let found = read(&older)?;
    assert_eq!(found, read(&newer)?);
    assert_eq!(found.rope_theta, 12345.0);
    assert_eq!(
        [
            found.vocabulary,
            found.dim,
            found.layers,
            found.heads,
            found.kv_heads,
            found.head_dim,
            found.ffn_hidden
        ],
        [300, 256, 3, 4, 2, 128, 608]
    );
    Ok(())
}

fn mistakes_are_named() -> Outcome {
    let group = Group::load("text");
    let case = group.case("l13");
    let config = read(&config(&case))?;
    let encoder = TextEncoder::load(&params(&case), &Device::Cpu, &config)?;
    let message = encoder.encode(&[5, 300]).unwrap_err().to_string();
    assert_eq!(
        message,
        "text encoder: token 300 is not in a vocabulary of 300; tokenizer and text encoder are of different models"
    );
    let message = encoder.encode(&[]).unwrap_err().to_string();
    assert_eq!(message, "text encoder: a prompt has at least one token");

    let load = |params: &MemoryParams, config: &TextConfig| {
        let outcome = TextEncoder::load(params, &Device::Cpu, config);
        outcome.err().map(|error| error.to_string()).unwrap_or_default()
    };
    let empty = TextConfig {
        layers: 0,
        ..config.clone()
    };
    assert_eq!(
        load(&params(&case), &empty),
        "a text encoder without layers has no features to read out"
    );
    let mut wrong = params(&case);
    wrong.insert("layers.1.self_attn.k_proj.weight", &[512, 256], vec![0.0; 512 * 256]);
    let message = load(&wrong, &config);
    assert!(
        message.contains("self_attn.k_proj.weight") || message.contains("v_proj"),
        "{message}"
    );
    wrong.0.remove("embed_tokens.weight");
    assert_eq!(load(&wrong, &config), "there is no parameter `embed_tokens.weight`");
    Ok(())
}
