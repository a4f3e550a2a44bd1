//! Weights of eight bits: every spelling is read as what it stands for, drawn with, and refused by name where it is damaged.

mod bad;
mod files;
mod quantize;

use std::path::{Path, PathBuf};
use std::process::Command;

use l2p_engine::image_io::{RgbImage, read_image};
use l2p_tests::{Outcome, Suite, cli, models_folder};
use libtest_mimic::Failed;
use safetensors::Dtype;
use serde_json::{Value, json};

use self::files::{File, Spelling};
use super::model::{self, Tensors};

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "checkpoint::eight_bit::every_spelling_is_read_and_drawn_with",
        every_spelling_is_read_and_drawn_with,
    );
    suite.cpu(
        "checkpoint::eight_bit::in_every_layout_it_is_the_same_model",
        in_every_layout_it_is_the_same_model,
    );
    suite.cpu("checkpoint::eight_bit::parts_are_read_too", parts_are_read_too);
    bad::register(suite);
    quantize::register(suite);
}

fn convert(folder: &Path, arguments: &str) -> Result<cli::Finished, Failed> {
    let program = cli::program("l2p-convert")?;
    cli::Finished::from(
        Command::new(program)
            .current_dir(folder)
            .args(arguments.split_whitespace()),
    )
}

/// Draws with a transformer in `folder`, the other parts being the demo's.
fn draw(folder: &Path, model: &str, out: &str) -> Result<cli::Finished, Failed> {
    let source = models_folder().join("demo/source").canonicalize()?;
    let mut command = Command::new(cli::program("l2p-sample")?);
    command.current_dir(folder).args(["--model", model, "--out", out]);
    for part in ["text-encoder", "tokenizer"] {
        command
            .arg(format!("--{part}"))
            .arg(source.join(part.replace('-', "_")));
    }
    let rest = "--prompt fox --device cpu --steps 4 --width 128 --height 128 --seed 1";
    cli::Finished::from(command.args(rest.split_whitespace()))
}

/// The picture that a transformer draws.
fn picture(folder: &Path, model: &str) -> Result<RgbImage, Failed> {
    let out = format!("{model}.png");
    draw(folder, model, &out)?.success()?;
    Ok(read_image(&folder.join(out))?)
}

fn psnr(a: &RgbImage, b: &RgbImage) -> f64 {
    let squares = a
        .pixels()
        .iter()
        .zip(b.pixels())
        .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
    10.0 * (255f64.powi(2) * a.pixels().len() as f64 / squares.sum::<f64>()).log10()
}

/// The demo's pixel model as one file in `folder`, and its tensors.
fn whole(folder: &Path) -> Result<Tensors, Failed> {
    let demo = models_folder().join("demo/pixel").canonicalize()?;
    let arguments = format!("export --in {} --out whole.safetensors --layout plain", demo.display());
    convert(folder, &arguments)?.success()?;
    model::read(&folder.join("whole.safetensors"))
}

/// Fails unless a file is read as the numbers that it stands for.
fn expect_numbers(folder: &Path, file: &File, path: &str) -> Outcome {
    convert(
        folder,
        &format!("export --in {path} --out f32.safetensors --layout plain --dtype f32 --force"),
    )?
    .success()?;
    let read = model::read(&folder.join("f32.safetensors"))?;
    assert!(!file.numbers.is_empty());
    for (name, expected) in &file.numbers {
        let tensor = &read[name];
        let largest = expected.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        assert_eq!(tensor.bytes.len(), 4 * expected.len());
        for (bytes, expected) in tensor.bytes.as_chunks::<4>().0.iter().zip(expected) {
            let found = f64::from(f32::from_le_bytes(*bytes));
            assert!(
                (found - expected).abs() <= 1e-6 * largest,
                "{path}, {name}: {found} {expected}"
            );
        }
    }
    Ok(())
}

fn every_spelling_is_read_and_drawn_with() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let plain = whole(folder)?;
    let expected = picture(folder, "whole.safetensors")?;
    for spelling in files::all() {
        let file = files::written(&plain, &spelling);
        let path = format!("{}.safetensors", spelling.name);
        file.save(&folder.join(&path))?;
        expect_numbers(folder, &file, &path)?;
        let found = convert(folder, &format!("inspect {path} --json"))?.success()?;
        expect_report(&spelling, file.numbers.len(), &serde_json::from_str(&found.stdout)?);
        let quality = psnr(&picture(folder, &path)?, &expected);
        assert!(quality >= 30.0, "{path}: {quality} dB");
    }
    let text = convert(folder, "inspect input-scale.safetensors --quick")?
        .success()?
        .stdout;
    let line = "tensors (weight_scale by row); 35 input_scale, not needed to read\n";
    assert!(text.contains("complete\n") && text.contains(line), "{text}");
    Ok(())
}

fn expect_report(spelling: &Spelling, tensors: usize, found: &Value) {
    assert_eq!(found["complete"], json!(true), "{}: {found:#}", spelling.name);
    let kind = &found["eight_bit"]["kinds"][0];
    assert_eq!(kind["dtype"], json!(spelling.dtype.to_string()));
    assert_eq!(kind["scale"], json!(spelling.scale.map(|(end, _)| end)));
    assert_eq!(kind["by_row"], json!(spelling.shape.first() == Some(&0)));
    assert_eq!(kind["rotation"], json!(spelling.rotation));
    assert_eq!(kind["tensors"], json!(tensors));
    assert_eq!(kind["bytes"], found["dtypes"][spelling.dtype.to_string()]["bytes"]);
    if let Some(name) = spelling.input_scale {
        assert_eq!(found["eight_bit"]["input_scales"], json!({ name: tensors }));
    }
    for (mark, is_there) in [
        ("comfy_quant", spelling.note.is_some()),
        ("_quantization_metadata", spelling.header.is_some()),
        ("scaled_fp8", spelling.marker),
    ] {
        let marks = found["eight_bit"]["marks"].as_array().expect("marks");
        assert_eq!(marks.contains(&json!(mark)), is_there, "{}: {mark}", spelling.name);
    }
}

fn spelling(name: &str) -> Spelling {
    let mut all = files::all().into_iter();
    all.find(|spelling| spelling.name == name)
        .expect("a spelling of this name")
}

/// The tensors of `file` that a test wants.
fn part(file: &File, keep: impl Fn(&str) -> bool) -> Tensors {
    let tensors = file.tensors.iter().filter(|(name, _)| keep(name));
    tensors.map(|(name, tensor)| (name.clone(), tensor.clone())).collect()
}

/// Stacks, prefixes, shards that part weights from their scales, deltas of eight bits and over eight bits.
fn in_every_layout_it_is_the_same_model() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let plain = whole(folder)?;
    let stacked = model::packed(&plain);
    for name in ["scale-weight", "header", "convrot-64"] {
        let mut file = files::written(&model::prefixed(&stacked, "model.diffusion_model."), &spelling(name));
        if let Some(marker) = file.tensors.remove("scaled_fp8") {
            file.tensors.insert("model.diffusion_model.scaled_fp8".into(), marker);
        }
        file.save(&folder.join("packed.safetensors"))?;
        // The stack's numbers are those of its three parts, one after the other.
        let mut numbers = std::collections::HashMap::new();
        for (name, values) in file.numbers.drain() {
            let name = name.trim_start_matches("model.diffusion_model.");
            match name.strip_suffix("qkv.weight") {
                Some(block) => {
                    let parts = values.chunks_exact(values.len() / 3).zip(["to_q", "to_k", "to_v"]);
                    numbers.extend(parts.map(|(values, part)| (format!("{block}{part}.weight"), values.to_vec())));
                }
                None => drop(numbers.insert(name.replace("attention.out.", "attention.to_out.0."), values)),
            }
        }
        file.numbers = numbers;
        expect_numbers(folder, &file, "packed.safetensors")?;
    }
    let file = files::written(&plain, &spelling("int8-rows"));
    model::save_shards(&folder.join("shards"), &file.tensors, 7)?;
    expect_numbers(folder, &file, "shards")?;

    let is_block = |name: &str| name.starts_with("layers.1.");
    let own = part(&file, is_block);
    model::save(&folder.join("delta.safetensors"), &own)?;
    let arguments = "merge --base whole.safetensors --delta delta.safetensors --out merged.safetensors";
    convert(folder, arguments)?.success()?;
    let merged = File {
        numbers: file
            .numbers
            .iter()
            .filter(|(name, _)| is_block(name))
            .map(|(n, v)| (n.clone(), v.clone()))
            .collect(),
        tensors: Tensors::new(),
        metadata: Default::default(),
    };
    let found = model::read(&folder.join("merged.safetensors"))?;
    for (name, values) in &merged.numbers {
        // Written as BF16.
        let expected: Vec<u8> = values
            .iter()
            .flat_map(|v| half::bf16::from_f32(*v as f32).to_le_bytes())
            .collect();
        assert_eq!(
            (found[name].dtype, &found[name].bytes),
            (Dtype::BF16, &expected),
            "{name}"
        );
    }
    file.save(&folder.join("base.safetensors"))?;
    let own: Tensors = plain
        .iter()
        .filter(|(name, _)| is_block(name))
        .map(|(n, t)| (n.clone(), t.clone()))
        .collect();
    model::save(&folder.join("plain-delta.safetensors"), &own)?;
    let arguments = "merge --base base.safetensors --delta plain-delta.safetensors --out over.safetensors";
    convert(folder, arguments)?.success()?;
    let found = model::read(&folder.join("over.safetensors"))?;
    assert_eq!(
        found["layers.1.attention.to_q.weight"],
        plain["layers.1.attention.to_q.weight"]
    );
    assert_ne!(
        found["layers.2.attention.to_q.weight"],
        plain["layers.2.attention.to_q.weight"]
    );
    let text = convert(folder, "inspect base.safetensors --json")?.success()?.stdout;
    assert!(text.contains("\"by_row\": true"), "{text}");
    Ok(())
}

/// A text encoder and a VAE with a matrix of eight bits draw; with a scale that is none they are refused.
fn parts_are_read_too() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = super::demo::copy(folder.path())?;
    for (file, matrix) in [
        ("text_encoder/model.safetensors", "model.layers.0.mlp.up_proj"),
        (
            "vae/diffusion_pytorch_model.safetensors",
            "decoder.mid_block.attentions.0.to_q",
        ),
    ] {
        let path: PathBuf = source.join(file);
        let kept = std::fs::read(&path)?;
        for (scale, problem) in [(1f32, None), (f32::NAN, Some("holds NaN at element 0: no scale of"))] {
            super::demo::edit(&path, |tensors| {
                let weight = tensors
                    .get_mut(&format!("{matrix}.weight"))
                    .expect("a matrix of the demo");
                let elements = weight.shape.iter().product();
                (weight.dtype, weight.bytes) = (Dtype::F8_E4M3, vec![0x08; elements]);
                let scale = model::Stored {
                    dtype: Dtype::F32,
                    shape: vec![1],
                    bytes: scale.to_le_bytes().to_vec(),
                };
                tensors.insert(format!("{matrix}.scale_weight"), scale);
            })?;
            match problem {
                None => {
                    super::demo::draw(folder.path(), "source", &[])?.success()?;
                    std::fs::remove_file(folder.path().join("o.png"))?;
                    let text = convert(folder.path(), "inspect source --quick")?.success()?.stdout;
                    assert!(
                        text.contains("; F8_E4M3 ") && text.contains("(scale_weight by tensor)"),
                        "{text}"
                    );
                }
                Some(problem) => {
                    super::demo::expect_refused(folder.path(), "source", &[], problem)?;
                    super::demo::expect_refused(folder.path(), "source", &[], &format!("{matrix}.scale_weight"))?;
                }
            }
            super::demo::replace(&path, &kept)?;
        }
    }
    Ok(())
}
