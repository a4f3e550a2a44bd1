//! A picture that is not finite is no picture: it is not written, and the program does not end well.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use l2p_tests::cli::{Finished, program};
use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;
use serde_json::Value;

use super::{demo, names, run};

pub fn register(suite: &mut Suite) {
    suite.cpu("sample::finite::a_weight_that_is_nan_draws_nothing", nothing_is_drawn);
    suite.cpu(
        "sample::finite::a_weight_that_is_nan_makes_no_data_set",
        nothing_is_synthesised,
    );
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in from.read_dir()? {
        let entry = entry?;
        let (entry, target) = (entry.path(), to.join(entry.file_name()));
        match entry.is_dir() {
            true => copy(&entry, &target)?,
            false => std::fs::copy(&entry, &target).map(|_| ())?,
        }
    }
    Ok(())
}

/// A weight of each part of the demo model that every picture depends on.
const WEIGHTS: [[&str; 2]; 3] = [
    ["transformer", "layers.0.feed_forward.w1.weight"],
    ["text_encoder", "layers.0.mlp.down_proj.weight"],
    ["vae", "decoder.conv_in.weight"],
];

/// The demo model in `folder/model`, with the first four bytes of a weight set so that whatever they are of, two bf16 or an f32, is NaN.
fn damaged(folder: &Path, [part, weight]: [&str; 2]) -> Result<(), Failed> {
    copy(&demo()?, &folder.join("model"))?;
    for entry in folder.join("model").join(part).read_dir()? {
        let path = entry?.path();
        if path.extension().is_none_or(|end| end != "safetensors") {
            continue;
        }
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        let mut length = [0; 8];
        file.read_exact_at(&mut length, 0)?;
        let length = u64::from_le_bytes(length);
        let mut header = vec![0; length as usize];
        file.read_exact_at(&mut header, 8)?;
        let header: serde_json::Map<String, Value> = serde_json::from_slice(&header)?;
        if let Some((_, tensor)) = header.iter().find(|(name, _)| name.ends_with(weight)) {
            let start = tensor["data_offsets"][0].as_u64().ok_or("a tensor without data")?;
            return Ok(file.write_all_at(&[0xff; 4], 8 + length + start)?);
        }
    }
    Err(format!("the demo model has no {weight} in {part}").into())
}

fn expect_refused(outcome: &Finished, part: &str) {
    assert_eq!(outcome.code, 1, "{part}: {outcome:?}");
    assert!(outcome.stderr.contains("not finite"), "{part}: {}", outcome.stderr);
}

fn nothing_is_drawn() -> Outcome {
    for weight in WEIGHTS {
        let folder = tempfile::tempdir()?;
        damaged(folder.path(), weight)?;
        std::fs::create_dir(folder.path().join("out"))?;
        let arguments = [
            "--model",
            "model",
            "--prompt",
            "fox",
            "--steps",
            "2",
            "--device",
            "cpu",
            "--out",
            "out/fox.png",
        ];
        let outcome = run(folder.path(), &arguments)?;
        expect_refused(&outcome, weight[0]);
        // The weight to blame, and its file.
        let [part, name] = weight;
        let named = outcome.stderr.contains(&format!("{name}` holds NaN or infinity in "));
        assert!(
            named && outcome.stderr.contains(&format!("(model/{part}/")),
            "{}",
            outcome.stderr
        );
        assert!(names(&folder.path().join("out"))?.is_empty(), "{weight:?}");
    }
    Ok(())
}

fn nothing_is_synthesised() -> Outcome {
    let folder = tempfile::tempdir()?;
    damaged(folder.path(), WEIGHTS[0])?;
    std::fs::write(folder.path().join("prompts.jsonl"), "{\"prompt\": \"fox\"}\n")?;
    let mut command = std::process::Command::new(program("l2p-data")?);
    command
        .current_dir(folder.path())
        .args(["synthesize", "--model", "model", "--prompts", "prompts.jsonl"]);
    command.args(["--device", "cpu", "--steps", "2", "--out", "set"]);
    expect_refused(&Finished::from(&mut command)?, "synthesize");
    let rows = std::fs::read_to_string(folder.path().join("set/metadata.jsonl")).unwrap_or_default();
    assert_eq!(rows, "");
    let pictures = names(&folder.path().join("set"))?;
    assert!(!pictures.iter().any(|name| name.ends_with(".png")), "{pictures:?}");
    Ok(())
}
