//! Models that predict noise or v on a discrete schedule: made of a flow model by fine-tuning, saved, continued, drawn with.

use std::path::Path;

use l2p_engine::image_io::{read_image, read_settings};
use l2p_tests::cli::{Finished, run};
use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;
use serde_json::{Value, json};

use super::latent::latent_model;
use super::{World, curve, delta, train, validation, world};

pub fn register(suite: &mut Suite) {
    suite.cpu("runs::objectives::noise_is_learned_and_continued", noise);
    suite.cpu(
        "runs::objectives::a_latent_models_objective_goes_to_its_pixel_model",
        to_pixels,
    );
}

/// The keys that turn a flow model into one of noise.
const NOISE: [&str; 6] = ["--objective", "epsilon", "--betas", "scaled_linear", "--shift", "1"];

fn manifest(folder: &Path) -> Result<Value, Failed> {
    Ok(serde_json::from_slice(&std::fs::read(folder.join("l2p.json"))?)?)
}

fn sample(model: &Path, out: &Path, more: &[&str]) -> Result<Finished, Failed> {
    let (model, out) = (model.display().to_string(), out.display().to_string());
    let what = ["--model", &model, "--prompt", "fox", "--out", &out, "--device", "cpu"];
    run("l2p-sample", [&what[..], more].concat())
}

fn noise() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let world: &World = world()?;
    let samples = [
        "--sample-every",
        "8",
        "--sample-prompts",
        "fox",
        "--sample-solver",
        "dpm++2m",
    ];
    let keys = [&NOISE[..], &samples].concat();
    let whole = train(world, &at("whole"), &[&keys[..], &["--steps", "8"]].concat())?.success()?;
    let told = "was trained for flow and is trained for epsilon over 1000 scaled_linear betas 0.00085 to 0.012";
    assert!(whole.stderr.contains(told), "{}", whole.stderr);
    assert!(at("whole").join("samples").is_dir());
    let losses = validation(&at("whole"))?;
    assert!(losses[losses.len() - 1].1 < losses[0].1, "{losses:?}");

    // A break in the middle changes nothing, and another objective is refused by name.
    train(world, &at("parted"), &[&keys[..], &["--steps", "4"]].concat())?.success()?;
    for (other, word) in [
        (vec!["--steps", "8"], "go on for flow"),
        (vec!["--steps", "8", "--objective", "v"], "go on for v over"),
        (vec!["--steps", "8", "--objective", "epsilon"], "linear betas 0.0001"),
    ] {
        let refused = train(world, &at("parted"), &other)?;
        assert!(
            refused.code == 1 && refused.stderr.contains("was trained for epsilon"),
            "{}",
            refused.stderr
        );
        assert!(refused.stderr.contains(word), "{}", refused.stderr);
    }
    train(world, &at("parted"), &[&keys[..], &["--steps", "8"]].concat())?.success()?;
    assert_eq!(curve(&at("parted"))?, curve(&at("whole"))?);
    assert!(delta(&at("parted"), "step-00000008")? == delta(&at("whole"), "step-00000008")?);

    // The checkpoint and the package say what they predict.
    let checkpoint = at("whole").join("checkpoints/step-00000008");
    let name = checkpoint.display().to_string();
    run(
        "l2p-train",
        ["package", &name, "--out", &at("package").display().to_string()],
    )?
    .success()?;
    for model in [&checkpoint, &at("package")] {
        let said = manifest(model)?;
        assert_eq!(said["objective"]["prediction"], json!("epsilon"), "{said}");
        assert_eq!(said["objective"]["schedule"]["beta_schedule"], json!("scaled_linear"));
        assert_eq!(
            (&said["defaults"]["solver"], &said["defaults"]["shift"]),
            (&json!("dpm++2m"), &json!(1.0))
        );
    }
    let inspected = run("l2p-convert", ["inspect", &at("package").display().to_string()])?.success()?;
    assert!(
        inspected.stdout.contains("epsilon over 1000 scaled_linear"),
        "{}",
        inspected.stdout
    );

    // Either solver draws, guided, the one before as the package says; that of flow matching does not.
    let draw = |model: &Path, out: &str, more: &[&str]| -> Result<Vec<u8>, Failed> {
        let settings = ["--steps", "4", "--cfg", "2", "--width", "32", "--height", "32"];
        sample(model, &at(out), &[&settings[..], more].concat())?.success()?;
        Ok(read_image(&at(out))?.pixels().to_vec())
    };
    let ddim = draw(&checkpoint, "ddim.png", &["--solver", "ddim"])?;
    let second = draw(&checkpoint, "second.png", &["--solver", "dpm++2m"])?;
    assert!(ddim != second && second == draw(&at("package"), "default.png", &[])?);
    assert_eq!(read_settings(&at("second.png"))?.solver.as_deref(), Some("dpm++2m"));
    let refused = sample(&checkpoint, &at("euler.png"), &["--solver", "euler"])?;
    assert!(
        refused.code != 0 && refused.stderr.contains("use ddim or dpm++2m"),
        "{}",
        refused.stderr
    );
    Ok(())
}

fn to_pixels() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let world: &World = world()?;
    let model = latent_model(folder.path())?;
    let refused = train(world, &at("none"), &["--model", &model, "--zero-snr", "true"])?;
    assert!(
        refused.code == 1 && refused.stderr.contains("flow matching has none"),
        "{}",
        refused.stderr
    );
    let refused = train(
        world,
        &at("none"),
        &["--model", &model, "--objective", "epsilon", "--zero-snr", "true"],
    )?;
    assert!(
        refused.code == 1 && refused.stderr.contains("exclude each other"),
        "{}",
        refused.stderr
    );
    let latent = [
        "--model",
        &model,
        "--policy",
        "full",
        "--steps",
        "2",
        "--objective",
        "v",
        "--zero-snr",
        "true",
    ];
    train(world, &at("latent"), &latent)?.success()?;
    let source = at("latent").join("checkpoints/step-00000002").display().to_string();
    let pixel = [
        "--model",
        &source,
        "--patch",
        "16",
        "--head-widths",
        "4,4,8,8",
        "--steps",
        "2",
    ];
    let finished = train(world, &at("pixel"), &pixel)?.success()?;
    assert!(!finished.stderr.contains("from now on"), "{}", finished.stderr);
    let checkpoint = at("pixel").join("checkpoints/step-00000002");
    let said = manifest(&checkpoint)?;
    assert_eq!(
        (
            &said["kind"],
            &said["objective"]["prediction"],
            &said["objective"]["schedule"]["rescale_betas_zero_snr"]
        ),
        (&json!("pixel"), &json!("v"), &json!(true)),
        "{said}"
    );
    for solver in ["ddim", "dpm++2m"] {
        let settings = ["--steps", "3", "--solver", solver, "--width", "32", "--height", "32"];
        sample(&checkpoint, &at(&format!("{solver}.png")), &settings)?.success()?;
    }
    Ok(())
}
