//! A number that is not finite, anywhere in a model, ends what uses it with an error: nothing is kept of a picture, none enters a
//! data set, and no mean is taken.

use std::path::Path;
use std::process::Command;

use half::bf16;
use l2p_tests::cli::{Finished, program};
use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;
use safetensors::Dtype;

use super::write_grey;
use crate::checkpoint::model;
use crate::sample::files::{linked_demo, replace};
use crate::sample::names;

pub fn register(suite: &mut Suite) {
    suite.cpu("data::finite::nothing_is_kept_of_a_picture", nothing_is_kept);
    suite.cpu("data::finite::none_enters_a_set", none_in_data_sets);
    suite.cpu("data::finite::no_mean_is_taken", no_mean_of_them);
}

const TRANSFORMER: (&str, &str) = (
    "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
    "layers.0.feed_forward.w2.weight",
);
const DECODER: (&str, &str) = (
    "vae/diffusion_pytorch_model.safetensors",
    "decoder.conv_norm_out.weight",
);
const ENCODER: (&str, &str) = (
    "vae/diffusion_pytorch_model.safetensors",
    "encoder.conv_norm_out.weight",
);
const TEXT: (&str, &str) = (
    "text_encoder/model.safetensors",
    "model.layers.0.input_layernorm.weight",
);

/// A copy of the demo model in `folder/model`, one of whose numbers is `value`.
fn spoilt(folder: &Path, (file, tensor): (&str, &str), value: f32) -> Outcome {
    let copy = folder.join("model");
    if copy.exists() {
        std::fs::remove_dir_all(&copy)?;
    }
    std::fs::create_dir(&copy)?;
    linked_demo(&copy)?;
    let path = copy.join(file);
    let mut tensors = model::read(&path)?;
    let stored = tensors.get_mut(tensor).ok_or_else(|| format!("there is no {tensor}"))?;
    assert_eq!(stored.dtype, Dtype::BF16);
    stored.bytes[..2].copy_from_slice(&bf16::from_f32(value).to_le_bytes());
    replace(&path, |_| ())?;
    model::save(&path, &tensors).map(|_| ())
}

/// Fails unless the program ended with an error of one line that says so.
fn expect_refused(finished: &Finished) -> Outcome {
    let last = finished.stderr.lines().next_back().unwrap_or_default();
    match finished.code == 1 && last.starts_with("error: ") && last.contains("not finite") {
        true => Ok(()),
        false => Err(format!("exit code {} and\n{}", finished.code, finished.stderr).into()),
    }
}

fn nothing_is_kept() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    for (part, value) in [
        (TRANSFORMER, f32::NAN),
        (TRANSFORMER, f32::INFINITY),
        (DECODER, f32::NAN),
        (TEXT, f32::NAN),
    ] {
        spoilt(folder, part, value)?;
        let mut command = Command::new(program("l2p-sample")?);
        command
            .current_dir(folder)
            .args(["--model", "model", "--device", "cpu"]);
        command.args(["--steps", "1", "--prompt", "fox", "--out", "out/", "--count", "2"]);
        expect_refused(&Finished::from(command.args(["--save-raw", "raw.safetensors"]))?)?;
        let left = names(folder)?;
        assert!(
            left.iter().all(|name| name.starts_with("model") || name == "out"),
            "{part:?}: {left:?}"
        );
    }
    Ok(())
}

fn none_in_data_sets() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    std::fs::write(
        folder.join("p.jsonl"),
        "{\"prompt\": \"fox\"}\n{\"prompt\": \"frog\"}\n",
    )?;
    let synthesize = || -> Result<Finished, Failed> {
        let mut command = Command::new(program("l2p-data")?);
        command
            .current_dir(folder)
            .args(["synthesize", "--model", "model", "--device", "cpu"]);
        Finished::from(command.args(["--steps", "1", "--prompts", "p.jsonl", "--batch", "2", "--out", "set"]))
    };
    for part in [TRANSFORMER, DECODER, TEXT] {
        spoilt(folder, part, f32::NAN)?;
        expect_refused(&synthesize()?)?;
        let lines = std::fs::read_to_string(folder.join("set/metadata.jsonl")).unwrap_or_default();
        assert_eq!(lines, "", "{part:?}");
        let left = names(&folder.join("set"))?;
        assert!(left.iter().all(|name| !name.ends_with(".png")), "{part:?}: {left:?}");
        std::fs::remove_dir_all(folder.join("set"))?;
    }
    Ok(())
}

fn no_mean_of_them() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    std::fs::create_dir(folder.join("set"))?;
    write_grey(&folder.join("set/a.png"), 64, 64, 90)?;
    std::fs::write(
        folder.join("set/metadata.jsonl"),
        "{\"image\": \"a.png\", \"prompt\": \"fox\"}\n",
    )?;
    for part in [TRANSFORMER, ENCODER] {
        spoilt(folder, part, f32::NAN)?;
        let mut command = Command::new(program("l2p-train")?);
        command
            .current_dir(folder)
            .args(["evaluate", "--model", "model", "--device", "cpu"]);
        let finished = Finished::from(command.args(["--data", "set", "--size", "64x64"]))?;
        expect_refused(&finished)?;
        assert_eq!(finished.stdout, "", "{part:?}");
    }
    Ok(())
}
