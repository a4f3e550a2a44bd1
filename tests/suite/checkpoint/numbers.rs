//! Numbers in the files of a model: out of range they are refused by name and range, whatever would be computed from them.

use std::path::Path;

use l2p_tests::{Outcome, Suite, cli};
use libtest_mimic::Failed;
use safetensors::Dtype;
use serde_json::{Value, json};

use super::demo::{copy, draw, expect_refused, replace, with_entry};
use super::model;

pub fn register(suite: &mut Suite) {
    suite.cpu("checkpoint::numbers::of_configurations", of_configurations);
    suite.cpu(
        "checkpoint::numbers::of_tensors_without_elements",
        of_tensors_without_elements,
    );
    suite.cpu("checkpoint::numbers::of_heads_to_be_made", of_heads_to_be_made);
    suite.cpu(
        "checkpoint::numbers::schedules_are_carried_out_or_named",
        schedules_are_carried_out_or_named,
    );
    suite.cpu("checkpoint::numbers::inputs_must_be_finite", inputs_must_be_finite);
}

fn inspect(folder: &Path, model: &str) -> Result<cli::Finished, Failed> {
    let program = cli::program("l2p-convert")?;
    cli::Finished::from(
        std::process::Command::new(program)
            .current_dir(folder)
            .args(["inspect", model]),
    )
}

const SIZES: [&str; 5] = ["0", "-1", "1.5", "1099511627776", "9223372036854775808"];

fn of_configurations() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = copy(folder.path())?;
    let (transformer, text, vae) = ("transformer/config.json", "text_encoder/config.json", "vae/config.json");
    let numbers = |texts: &[&str]| -> Result<Vec<Value>, Failed> {
        texts.iter().map(|text| Ok(serde_json::from_str(text)?)).collect()
    };
    let width = "a whole number from 1 to 262144";
    let layers = "a whole number from 0 to 512";
    let theta = "a number from 1 to 1e12";
    let epsilon = "a number from 1e-12 to 0.1";
    let large = &SIZES[1..];
    let cases: Vec<(&str, &str, Vec<Value>, &str)> = vec![
        (transformer, "dim", numbers(&SIZES)?, width),
        (transformer, "n_layers", numbers(large)?, layers),
        (
            transformer,
            "n_heads",
            numbers(&SIZES)?,
            "a whole number from 1 to 4096",
        ),
        (transformer, "in_channels", numbers(&SIZES)?, width),
        (transformer, "cap_feat_dim", numbers(&SIZES)?, width),
        (transformer, "rope_theta", numbers(&["0", "-256", "1e300"])?, theta),
        (transformer, "norm_eps", numbers(&["0", "-1e-5", "1", "1e38"])?, epsilon),
        (
            transformer,
            "t_scale",
            numbers(&["0", "1e30"])?,
            "a number from 0.001 to 1e6",
        ),
        (text, "vocab_size", numbers(&SIZES)?, "a whole number from 1 to 4194304"),
        (text, "hidden_size", numbers(&SIZES)?, width),
        (text, "num_hidden_layers", numbers(large)?, layers),
        (text, "head_dim", numbers(&["0", "4611686018427387904"])?, width),
        (text, "intermediate_size", numbers(&SIZES)?, width),
        (text, "rms_norm_eps", numbers(&["0", "1e39"])?, epsilon),
        (text, "rope_theta", numbers(&["0", "-1"])?, theta),
        (vae, "latent_channels", numbers(&SIZES)?, width),
        (vae, "layers_per_block", numbers(large)?, layers),
        (vae, "norm_num_groups", numbers(&SIZES)?, width),
        (
            vae,
            "scaling_factor",
            numbers(&["0", "1e-38", "-1", "1e30"])?,
            "a number from 1e-4 to 10000",
        ),
        (
            vae,
            "shift_factor",
            numbers(&["3e38", "-3e38"])?,
            "a number from -1000 to 1000",
        ),
    ];
    for (file, key, values, range) in cases {
        let path = source.join(file);
        let kept = std::fs::read(&path)?;
        let said = format!("{file}: is not what was expected: entry `{key}`: expected {range}");
        for (index, value) in values.into_iter().enumerate() {
            replace(&path, &with_entry(&path, key, Some(value.clone()))?)?;
            let message = match index {
                0 => {
                    let finished = draw(folder.path(), "source", &[])?;
                    assert_eq!(finished.code, 1, "{file} {key} {value}: {}", finished.stderr);
                    finished.stderr
                }
                _ => {
                    let finished = inspect(folder.path(), "source")?;
                    finished.stdout + &finished.stderr
                }
            };
            assert!(message.contains(&said), "{file} {key} {value}: {message}");
        }
        replace(&path, &kept)?;
    }
    for (file, key, value, message) in [
        (
            transformer,
            "axes_dims",
            json!([u64::MAX / 2 + 1, 48, 48]),
            "entry `axes_dims[0]`: expected a whole number",
        ),
        (
            transformer,
            "all_patch_size",
            json!([1u64 << 40]),
            "entry `all_patch_size[0]`: expected a whole number",
        ),
        (
            vae,
            "block_out_channels",
            json!([1u64 << 63]),
            "entry `block_out_channels[0]`: expected a whole number",
        ),
        (
            vae,
            "block_out_channels",
            json!(vec![64; 65]),
            "says block_out_channels of a length = 65, only a list of 1 to 8",
        ),
        (vae, "up_block_types", json!([]), "says up_block_types = []"),
    ] {
        let path = source.join(file);
        let kept = std::fs::read(&path)?;
        replace(&path, &with_entry(&path, key, Some(value))?)?;
        expect_refused(folder.path(), "source", &[], message)?;
        replace(&path, &kept)?;
    }
    of_other_widths(folder.path(), &source.join(vae))?;
    of_manifests(folder.path(), &source.join("l2p.json"))
}

/// The widest blocks that a configuration may name, without the kinds of blocks: an estimate is made, however large.
fn of_other_widths(folder: &Path, config: &Path) -> Outcome {
    let kept = std::fs::read(config)?;
    replace(config, &with_entry(config, "up_block_types", None)?)?;
    for widths in [vec![262_144; 8], vec![262_144], vec![8, 262_144]] {
        replace(config, &with_entry(config, "block_out_channels", Some(json!(widths)))?)?;
        let finished = inspect(folder, "source")?.success()?;
        assert!(finished.stdout.contains("but the tensors have"), "{}", finished.stdout);
    }
    replace(config, &kept)
}

fn of_manifests(folder: &Path, manifest: &Path) -> Outcome {
    for (key, value, message) in [
        (
            "width",
            json!(1u64 << 63),
            "entry `defaults.width`: expected a whole number from 1 to 65536",
        ),
        (
            "height",
            json!(0),
            "entry `defaults.height`: expected a whole number from 1 to 65536, found 0",
        ),
        (
            "steps",
            json!(1u64 << 40),
            "entry `defaults.steps`: expected a whole number from 1 to 100000",
        ),
        (
            "shift",
            json!(3e38),
            "entry `defaults.shift`: expected a number from 0.01 to 1000, found 3e38",
        ),
        (
            "shift",
            json!(1e-38),
            "entry `defaults.shift`: expected a number from 0.01 to 1000, found 1e-38",
        ),
        (
            "cfg",
            json!(-1),
            "entry `defaults.cfg`: expected a number from 0 to 1000, found -1",
        ),
    ] {
        let kept = std::fs::read(manifest)?;
        replace(
            manifest,
            &with_entry(manifest, "defaults", Some(json!({ key: value })))?,
        )?;
        expect_refused(folder, "source", &[], message)?;
        replace(manifest, &kept)?;
    }
    Ok(())
}

/// A tensor without elements may have any other extents; sizes that follow from them are checked before anything is computed.
fn of_tensors_without_elements() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("m.safetensors");
    let range = "expected a whole number from 1 to 262144";
    for (name, extents, message) in [
        ("local_decoder.enc2.0.weight", vec![1 << 47, 0], range),
        ("local_decoder.bottleneck.0.weight", vec![1 << 40, 0], range),
        ("local_decoder.enc3.0.weight", vec![1 << 46, 0], range),
        ("layers.0.attention.norm_q.weight", vec![1 << 46, 0], "has shape"),
        (
            "layers.0.attention_norm1.weight",
            vec![1 << 48, 0],
            "has the impossible shape",
        ),
        (
            "layers.0.attention_norm1.weight",
            vec![1 << 62, 0],
            "has the impossible shape",
        ),
    ] {
        let mut tensors = model::pixel(Dtype::BF16);
        let entry = model::Stored {
            dtype: Dtype::BF16,
            shape: extents,
            bytes: Vec::new(),
        };
        tensors.insert(name.into(), entry);
        model::save(&path, &tensors)?;
        let finished = draw(folder.path(), "m.safetensors", &[])?;
        let clear = finished.stderr.starts_with("error: m.safetensors: ") && finished.stderr.contains(message);
        assert!(finished.code == 1 && clear, "{name}: {}", finished.stderr);
        let finished = inspect(folder.path(), "m.safetensors")?;
        assert!([0, 1].contains(&finished.code), "{name}: {}", finished.stderr);
    }
    Ok(())
}

fn of_heads_to_be_made() -> Outcome {
    let folder = tempfile::tempdir()?;
    model::save(&folder.path().join("latent.safetensors"), &model::latent(Dtype::BF16))?;
    let program = cli::program("l2p-convert")?;
    for (more, message) in [
        (
            ["--head-widths", "8,8,16,4611686018427387904"],
            "expected a whole number from 1 to 262144",
        ),
        (
            ["--head-widths", "0,8,16,16"],
            "expected a whole number from 1 to 262144",
        ),
        (
            ["--head-bottleneck", "4611686018427387904"],
            "expected a whole number from 1 to 262144",
        ),
    ] {
        let mut command = std::process::Command::new(&program);
        command.current_dir(folder.path());
        command.args([
            "init",
            "--source",
            "latent.safetensors",
            "--patch",
            "16",
            "--out",
            "o.safetensors",
        ]);
        let finished = cli::Finished::from(command.args(more))?;
        assert_eq!(finished.code, 2, "{more:?}: {}", finished.stderr);
        assert!(finished.stderr.contains(message), "{more:?}: {}", finished.stderr);
    }
    Ok(())
}

/// What a schedule asks for beyond a shift is said, or refused where the picture would be wrong.
fn schedules_are_carried_out_or_named() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = copy(folder.path())?;
    let path = source.join("scheduler/scheduler_config.json");
    let kept = std::fs::read(&path)?;
    let quiet = draw(folder.path(), "source", &[])?.success()?;
    assert!(!quiet.stderr.contains("note: "), "{}", quiet.stderr);
    std::fs::remove_file(folder.path().join("o.png"))?;
    for (key, value, note) in [
        (
            "use_dynamic_shifting",
            json!(true),
            "says use_dynamic_shifting: the shift does not follow the picture's size",
        ),
        (
            "use_karras_sigmas",
            json!(true),
            "says use_karras_sigmas: sigmas are spaced evenly",
        ),
        (
            "use_exponential_sigmas",
            json!(true),
            "says use_exponential_sigmas: sigmas are spaced evenly",
        ),
        (
            "use_beta_sigmas",
            json!(true),
            "says use_beta_sigmas: sigmas are spaced evenly",
        ),
        (
            "shift_terminal",
            json!(0.02),
            "says shift_terminal = 0.02: sigmas are not stretched",
        ),
        (
            "stochastic_sampling",
            json!(true),
            "says stochastic_sampling: no noise is added",
        ),
        (
            "_class_name",
            json!("FlowMatchHeunDiscreteScheduler"),
            "describes a FlowMatchHeunDiscreteScheduler; steps are Euler's all the same",
        ),
    ] {
        replace(&path, &with_entry(&path, key, Some(value))?)?;
        let finished = draw(folder.path(), "source", &[])?.success()?;
        let said = finished
            .stderr
            .lines()
            .any(|line| line.starts_with("note: ") && line.contains(note));
        assert!(said, "{key}: {}", finished.stderr);
        let report = inspect(folder.path(), "source")?.success()?.stdout;
        assert!(report.contains(note), "{key}: {report}");
        std::fs::remove_file(folder.path().join("o.png"))?;
        replace(&path, &kept)?;
    }
    for (key, value, message) in [
        (
            "invert_sigmas",
            json!(true),
            "says invert_sigmas = true: time runs from the picture to noise",
        ),
        (
            "num_train_timesteps",
            json!(500),
            "says num_train_timesteps = 500, only 1000 is supported",
        ),
        ("_class_name", json!("PNDMScheduler"), "describes a PNDMScheduler"),
        (
            "_class_name",
            json!("DDIMScheduler"),
            "clips pictures at every step (clip_sample, which is true where this class does not say)",
        ),
        (
            "shift",
            json!(0),
            "entry `shift`: expected a number from 0.01 to 1000, found 0",
        ),
        (
            "shift",
            json!(3e38),
            "entry `shift`: expected a number from 0.01 to 1000, found 3e38",
        ),
    ] {
        replace(&path, &with_entry(&path, key, Some(value))?)?;
        expect_refused(folder.path(), "source", &[], message)?;
        replace(&path, &kept)?;
    }
    Ok(())
}

/// Noise and caption features from files.
fn inputs_must_be_finite() -> Outcome {
    let folder = tempfile::tempdir()?;
    copy(folder.path())?;
    for value in [f32::NAN, f32::INFINITY] {
        for (option, name, shape) in [
            ("--noise", "noise", vec![16, 4, 4]),
            ("--embeds", "cap.0", vec![3, 256]),
        ] {
            let mut tensor = model::stored(name, Dtype::F32, &shape);
            tensor.bytes[8..12].copy_from_slice(&value.to_le_bytes());
            model::save(
                &folder.path().join("i.safetensors"),
                &[(name.to_owned(), tensor)].into(),
            )?;
            let message =
                format!("i.safetensors: tensor `{name}` holds {value} at element 2: no number to compute with");
            expect_refused(folder.path(), "source", &[option, "i.safetensors"], &message)?;
        }
    }
    Ok(())
}
