//! Damaged, incomplete and mixed-up model files: the same one line from `l2p-sample` as from the library, and nothing written.

use std::path::Path;

use l2p_tests::{Outcome, Suite};
use safetensors::Dtype;
use serde_json::json;

use super::{demo, names, run};
use crate::checkpoint::{damage, model};

pub fn register(suite: &mut Suite) {
    suite.cpu("sample::files::damaged_files_end_with_1", damaged_files_end_with_1);
    suite.cpu("sample::files::wrong_models_end_with_1", wrong_models_end_with_1);
    suite.cpu("sample::files::damaged_parts_end_with_1", damaged_parts_end_with_1);
}

const OUT: [&str; 6] = ["--prompt", "fox", "--device", "cpu", "--out", "new/a.png"];

/// Missing, truncated and lying files, shards of two models, and whatever else can be wrong with them.
fn damaged_files_end_with_1() -> Outcome {
    let folder = tempfile::tempdir()?;
    let cases = damage::cases(folder.path())?;
    let before = names(folder.path())?;
    for case in &cases {
        let expected = format!("{}/{}", folder.path().display(), case.message);
        let path = case.path.display().to_string();
        run(folder.path(), &[&["--model", &path], &OUT[..]].concat())?.failure(1, &expected)?;
    }
    assert_eq!(names(folder.path())?, before);
    Ok(())
}

fn wrong_models_end_with_1() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let pixel = model::pixel(Dtype::BF16);
    let save = |name: &str, change: &dyn Fn(&mut model::Tensors)| {
        let mut tensors = pixel.clone();
        change(&mut tensors);
        model::save(&folder.join(name), &tensors).map(|_| ())
    };
    save("lacking.safetensors", &|tensors| {
        tensors.remove("layers.1.attention.to_v.weight");
        tensors.remove("local_decoder.dec2.0.bias");
    })?;
    save("shape.safetensors", &|tensors| {
        let name = "layers.2.feed_forward.w2.weight";
        tensors.insert(name.into(), model::stored(name, Dtype::BF16, &[model::DIM, 95]));
    })?;
    save("type.safetensors", &|tensors| {
        let number = model::Stored {
            dtype: Dtype::I64,
            shape: vec![1, model::DIM],
            bytes: vec![0; 8 * model::DIM],
        };
        tensors.insert("x_pad_token".into(), number);
    })?;
    save("unknown.safetensors", &|tensors| {
        let name = "layers.0.attention.gate.weight";
        tensors.insert(name.into(), model::stored(name, Dtype::BF16, &[3]));
    })?;
    save("heads.safetensors", &|tensors| {
        let name = "local_decoder.enc2.0.weight";
        tensors.insert(name.into(), model::stored(name, Dtype::BF16, &[6, 5, 3, 3]));
    })?;
    model::save(&folder.join("delta.safetensors"), &model::delta(Dtype::BF16))?;
    model::save(&folder.join("latent.safetensors"), &model::latent(Dtype::BF16))?;
    std::fs::create_dir(folder.join("empty"))?;
    std::fs::write(
        folder.join("l2p.json"),
        json!({ "format": 1, "transformer": "nowhere.safetensors" }).to_string(),
    )?;
    let before = names(folder)?;
    for (model, message) in [
        (
            "lacking.safetensors",
            "lacks 2 tensors of the model: `layers.1.attention.to_v.weight`, `local_decoder.dec2.0.bias`",
        ),
        (
            "shape.safetensors",
            "tensor `layers.2.feed_forward.w2.weight` has shape [128, 95], expected [128, 96] as in the rest of the model",
        ),
        (
            "type.safetensors",
            "tensor `x_pad_token` holds I64, which cannot be read; BF16, F16 and F32 can",
        ),
        (
            "unknown.safetensors",
            "holds 1 tensor that a pixel model has no place for: `layers.0.attention.gate.weight`",
        ),
        (
            "heads.safetensors",
            "tensor `local_decoder.enc2.0.weight` has shape [6, 5, 3, 3], expected [6, 4, 3, 3] as in the rest of the model",
        ),
        (
            "delta.safetensors",
            "is a delta, or damaged: it lacks `t_embedder`, `cap_embedder`, `x_pad_token`, `cap_pad_token` and 4 more; give the \
             model that it was trained over with --base",
        ),
        (
            "latent.safetensors",
            "comes without a VAE, which a latent model needs: name one with --vae DIR|FILE, or in an l2p.json beside the model",
        ),
        ("empty", "holds no safetensors file"),
        ("gone", "No such file or directory (os error 2)"),
        ("l2p.json", "names nowhere.safetensors, which is not there"),
    ] {
        run(folder, &[&["--model", model], &OUT[..]].concat())?.failure(1, &format!("{model}: {message}"))?;
    }
    run(folder, &OUT)?.failure(1, "no model: name one with --model DIR|FILE")?;
    assert_eq!(names(folder)?, before);
    Ok(())
}

/// A copy of the demo model with links in place of its files.
pub fn linked_demo(folder: &Path) -> Outcome {
    let demo = demo()?;
    let all = names(&demo)?;
    for name in all.iter().filter(|name| demo.join(name).is_dir()) {
        std::fs::create_dir_all(folder.join(name))?;
    }
    for name in all.iter().filter(|name| demo.join(name).is_file()) {
        #[cfg(unix)]
        std::os::unix::fs::symlink(demo.join(name), folder.join(name))?;
        #[cfg(not(unix))]
        std::fs::copy(demo.join(name), folder.join(name))?;
    }
    Ok(())
}

/// Each part of a whole model in turn.
fn damaged_parts_end_with_1() -> Outcome {
    type Damage = fn(&Path) -> Outcome;
    let cases: [(&str, Damage, &str); 11] = [
        (
            "vae/diffusion_pytorch_model.safetensors",
            |file| replace(file, |bytes| bytes.truncate(bytes.len() - 10)),
            "the file is truncated",
        ),
        (
            "text_encoder/model.safetensors",
            |file| replace(file, |bytes| bytes.truncate(1000)),
            "the file is truncated or damaged",
        ),
        (
            "transformer/diffusion_pytorch_model-00002-of-00003.safetensors",
            |file| Ok(std::fs::remove_file(file)?),
            "which is not there: the download is incomplete",
        ),
        (
            "text_encoder/model.safetensors",
            |file| without(file, "model.layers.1.mlp.up_proj.weight"),
            "tensor `layers.1.mlp.up_proj.weight` is missing",
        ),
        (
            "vae/diffusion_pytorch_model.safetensors",
            |file| without(file, "decoder.conv_norm_out.weight"),
            "tensor `decoder.conv_norm_out.weight` is missing",
        ),
        (
            "vae/diffusion_pytorch_model.safetensors",
            |file| without(file, "decoder.conv_in.weight"),
            "vae: there is no parameter `decoder.conv_in.weight`",
        ),
        (
            "tokenizer/tokenizer.json",
            |file| replace(file, |bytes| bytes.truncate(100)),
            "not a tokenizer that can be used",
        ),
        (
            "tokenizer/tokenizer_config.json",
            |file| replace(file, |bytes| *bytes = b"{}".to_vec()),
            "has no chat_template",
        ),
        (
            "text_encoder/config.json",
            |file| replace(file, |bytes| *bytes = b"{\"model_type\": \"llama\"}".to_vec()),
            "text_encoder/config.json: describes a `llama` model, expected `qwen3`",
        ),
        (
            "vae/config.json",
            |file| replace(file, |bytes| *bytes = b"[".to_vec()),
            "vae/config.json: is not what was expected",
        ),
        (
            "scheduler/scheduler_config.json",
            |file| replace(file, |bytes| *bytes = b"{\"shift\": -3}".to_vec()),
            "scheduler_config.json: is not what was expected: entry `shift`: expected a number from 0.01 to 1000, found -3",
        ),
    ];
    for (part, damage, message) in cases {
        let folder = tempfile::tempdir()?;
        let model = folder.path().join("model");
        std::fs::create_dir(&model)?;
        linked_demo(&model)?;
        damage(&model.join(part))?;
        let finished = run(
            folder.path(),
            &[&["--model", "model", "--steps", "1"], &OUT[..]].concat(),
        )?;
        let last = finished.stderr.lines().next_back().unwrap_or_default();
        if finished.code != 1 || !last.starts_with("error: model/") || !last.contains(message) {
            return Err(format!(
                "{part}: expected 1 and …{message}…\nfound {} and\n{}",
                finished.code, finished.stderr
            )
            .into());
        }
        assert!(
            names(folder.path())?
                .iter()
                .all(|name| !name.ends_with(".png") && !name.ends_with(".tmp"))
        );
    }
    Ok(())
}

/// Puts a changed copy in the place of a file or link.
pub fn replace(file: &Path, change: impl Fn(&mut Vec<u8>)) -> Outcome {
    let mut bytes = std::fs::read(file)?;
    change(&mut bytes);
    std::fs::remove_file(file)?;
    Ok(std::fs::write(file, bytes)?)
}

/// Puts a copy without one tensor in the place of a file or link.
fn without(file: &Path, name: &str) -> Outcome {
    let mut tensors = model::read(file)?;
    tensors.remove(name).ok_or_else(|| format!("there is no {name}"))?;
    std::fs::remove_file(file)?;
    model::save(file, &tensors).map(|_| ())
}
