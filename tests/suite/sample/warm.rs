//! Algorithms of matrix products: searched once for a class of shapes, or ahead of time by `l2p-sample warm`.

use std::path::Path;

use l2p_engine::Device;
use l2p_tests::cli::Finished;
use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;
use serde_json::Value;

use super::{command, demo, run};

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "sample::warm::without_a_gpu_there_is_nothing_to_choose",
        nothing_to_choose,
    );
    suite.cuda("sample::warm::a_new_caption_length_searches_nothing", another_caption);
    suite.cuda("sample::warm::after_warm_nothing_is_searched", after_warm);
}

fn nothing_to_choose() -> Outcome {
    let folder = tempfile::tempdir()?;
    let demo = demo()?.display().to_string();
    run(folder.path(), &["warm", "--model", &demo, "--device", "cpu"])?.failure(
        1,
        "the CPU has no matrix algorithms to choose from: `warm` is for GPUs, see `l2p-sample devices`",
    )?;
    for (flag, value, word) in [
        ("--size", "1024", "1024x1024"),
        ("--tokens", "600", "1 to 512"),
        ("--batch", "0", "1"),
    ] {
        let finished = run(folder.path(), &["warm", "--model", &demo, flag, value])?;
        assert!(finished.code == 2 && finished.stderr.contains(word), "{finished:?}");
    }
    Ok(())
}

/// Runs the program with choices kept below `folder`.
fn with_own_choices(folder: &Path, arguments: &[&str]) -> Result<Finished, Failed> {
    let mut command = command(folder, arguments)?;
    Finished::from(command.env("L2P_CACHE_DIR", folder.join("cache")))?.success()
}

/// Draws a picture of 1024² and returns whether anything was searched for.
fn searches(folder: &Path, prompt: &str, out: &str) -> Result<bool, Failed> {
    let demo = demo()?.display().to_string();
    let size = [
        "--width", "1024", "--height", "1024", "--steps", "3", "--device", "cuda",
    ];
    let arguments = ["--model", &demo, "--prompt", prompt, "--out", out, "--report", "json"];
    let finished = with_own_choices(folder, &[&arguments[..], &size].concat())?;
    let report: Value = serde_json::from_str(&finished.stdout)?;
    let phases = report["phases"].as_array().ok_or("a report has phases")?;
    Ok(phases.iter().any(|phase| phase["name"] == "search"))
}

fn another_caption(_device: &Device) -> Outcome {
    let folder = tempfile::tempdir()?;
    let long = "red apple ".repeat(40);
    assert!(
        searches(folder.path(), "fox", "a.png")?,
        "the first picture has nothing to go by"
    );
    assert!(
        !searches(folder.path(), &long, "b.png")?,
        "a longer caption is of the same class"
    );
    assert!(!searches(folder.path(), "fox", "c.png")?);
    let read = |name: &str| std::fs::read(folder.path().join(name));
    assert!(read("a.png")? == read("c.png")?, "the same choices, other bits");
    Ok(())
}

fn after_warm(_device: &Device) -> Outcome {
    let folder = tempfile::tempdir()?;
    let demo = demo()?.display().to_string();
    let warm = ["warm", "--model", &demo, "--size", "1024x1024", "--device", "cuda"];
    let first = with_own_choices(folder.path(), &warm)?;
    assert!(first.stderr.contains("kept in ") && !first.stderr.contains("0 products searched in 0.0 s in all"));
    assert!(!searches(folder.path(), "fox", "a.png")?);
    // Once is enough.
    let again = with_own_choices(folder.path(), &warm)?;
    assert!(
        again.stderr.contains("0 products searched in 0.0 s in all"),
        "{}",
        again.stderr
    );
    Ok(())
}
