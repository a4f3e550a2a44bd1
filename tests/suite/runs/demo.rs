//! The demo, as the README has it: the real model, a few steps.

use std::collections::BTreeMap;
use std::path::Path;

use l2p_engine::image_io::read_image;
use l2p_tests::cli::{Finished, program, run};
use l2p_tests::{Outcome, Suite, models_folder};
use libtest_mimic::Failed;
use serde_json::Value;

use super::{curve, delta, validation};
use crate::checkpoint::model;

pub fn register(suite: &mut Suite) {
    suite.cpu("runs::demo::twenty_steps_learn_continue_and_draw", twenty_steps);
}

fn train(folder: &Path, out: &str, arguments: &[&str]) -> Result<Finished, Failed> {
    let mut command = std::process::Command::new(program("l2p-train")?);
    command.arg("--config").arg(models_folder().join("demo/train.toml"));
    command
        .current_dir(folder)
        .args(["--device", "cpu", "--steps", "20", "--out", out]);
    Finished::from(command.args(arguments))?.success()
}

/// The loss falls, and the last ten steps from a checkpoint equal those of the whole run bit by bit. What was trained draws, as
/// a checkpoint, as a package over the source model and as one merged file, the same picture.
fn twenty_steps() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name).display().to_string();
    train(folder.path(), "whole", &["--save-every", "10"])?;
    let losses = validation(&folder.path().join("whole"))?;
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    assert_eq!((first.0, last.0), (0, 20));
    assert!(last.1 < 0.85 * first.1, "{losses:?}");

    let middle = at("whole/checkpoints/step-00000010");
    train(folder.path(), "second", &["--resume", &middle, "--sample-every", "0"])?;
    let (whole, second) = (folder.path().join("whole"), folder.path().join("second"));
    let whole_curve = curve(&whole)?;
    assert_eq!(curve(&second)?[..], whole_curve[whole_curve.len() / 2..]);
    assert_eq!(validation(&second)?.last(), Some(&last));
    assert!(delta(&second, "step-00000020")? == delta(&whole, "step-00000020")?);

    let checkpoint = at("whole/checkpoints/step-00000020");
    run("l2p-train", ["package", &checkpoint, "--out", &at("pixel")])?.success()?;
    let manifest: Value = serde_json::from_slice(&std::fs::read(folder.path().join("pixel/l2p.json"))?)?;
    let base = manifest["base"].as_str().ok_or("the package names no base")?;
    // The delta holds all that the pixel model has beyond the source model, so it lies over that one.
    assert!(
        base.ends_with("demo/source") && !Path::new(base).is_absolute(),
        "{base}"
    );
    let again = run("l2p-train", ["package", &checkpoint, "--out", &at("pixel")])?;
    assert!(again.code == 1 && again.stderr.contains("--force"), "{}", again.stderr);
    let source = models_folder().join("demo/source").display().to_string();
    let merge = [
        "merge",
        "--base",
        &source,
        "--delta",
        &at("pixel/delta.safetensors"),
        "--out",
        &at("merged.safetensors"),
    ];
    run("l2p-convert", merge)?.success()?;
    let (merged, published) = (merged_shapes(&at("merged.safetensors"))?, published_shapes()?);
    let strange: Vec<_> = merged
        .iter()
        .filter(|(name, shape)| published.get(*name) != Some(*shape))
        .collect();
    assert!(strange.is_empty(), "not as published: {strange:?}");
    assert_eq!(merged.len(), published.len());
    let parts = [
        "--text-encoder",
        &format!("{source}/text_encoder"),
        "--tokenizer",
        &format!("{source}/tokenizer"),
    ];
    let draw = |model: &str, out: &str, more: &[&str]| -> Outcome {
        let (model, out) = (at(model), at(out));
        let settings = [
            "--steps", "1", "--cfg", "1", "--width", "128", "--height", "128", "--device", "cpu",
        ];
        let what = ["--model", &model, "--prompt", "fox", "--out", &out];
        run("l2p-sample", [&what[..], &settings, more].concat())?.success()?;
        Ok(())
    };
    draw("whole/checkpoints/step-00000020", "a.png", &[])?;
    draw("pixel", "b.png", &[])?;
    draw("merged.safetensors", "c.png", &parts)?;
    let picture = |name: &str| read_image(&folder.path().join(name));
    assert!(picture("a.png")?.pixels() == picture("b.png")?.pixels());
    assert!(picture("a.png")?.pixels() == picture("c.png")?.pixels());
    Ok(())
}

/// Names and shapes of the tensors of a file.
fn merged_shapes(path: &str) -> Result<BTreeMap<String, Vec<usize>>, Failed> {
    let tensors = model::read(Path::new(path))?.into_iter();
    Ok(tensors.map(|(name, tensor)| (name, tensor.shape)).collect())
}

/// Those of a pixel model in the published layout: the source's trunk as diffusers names it, input projection and head.
fn published_shapes() -> Result<BTreeMap<String, Vec<usize>>, Failed> {
    // The head of a trunk so narrow is half as wide as the published one.
    const DIM: usize = 384;
    const WIDTHS: [usize; 4] = [32, 64, 128, 256];
    let folder = models_folder().join("demo/source/transformer");
    let mut shapes: BTreeMap<String, Vec<usize>> = model::pixel_ends(DIM, WIDTHS, 256).into_iter().collect();
    for entry in folder.read_dir()? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let tensors = model::read(&path)?.into_iter();
            let trunk = tensors.filter(|(name, _)| !name.contains(".2-1."));
            shapes.extend(trunk.map(|(name, tensor)| (name, tensor.shape)));
        }
    }
    Ok(shapes)
}
