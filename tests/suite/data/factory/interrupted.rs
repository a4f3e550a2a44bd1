//! `l2p-data all`, killed and gone on with, and training on what it made.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use l2p_tests::cli::run;
use l2p_tests::{Outcome, Suite, models_folder};
use libtest_mimic::Failed;
use serde_json::Value;

use super::{command, data, lines, texts};

pub fn register(suite: &mut Suite) {
    suite.cpu("data::factory::all::killed_twice_and_trained_on", killed_twice);
    suite.cpu("data::factory::all::ranks_draw_what_one_draws", ranks);
}

const COUNT: usize = 8;

fn all<'a>(model: &'a str, out: &'a str) -> Vec<&'a str> {
    [
        "all",
        "--model",
        model,
        "--count",
        "8",
        "--languages",
        "en,zh",
        "--steps",
        "2",
        "--batch",
        "1",
        "--device",
        "cpu",
        "--out",
        out,
    ]
    .to_vec()
}

fn demo() -> Result<String, Failed> {
    Ok(models_folder()
        .join("demo/source")
        .canonicalize()?
        .display()
        .to_string())
}

/// Starts the command and kills it as soon as `is_due`; returns whether it was still at work then.
fn kill_when(folder: &Path, arguments: &[&str], is_due: impl Fn() -> bool) -> Result<bool, Failed> {
    let mut child = command(folder, arguments)?
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let started = Instant::now();
    while !is_due() {
        if child.try_wait()?.is_some() {
            return Ok(false);
        }
        assert!(started.elapsed() < Duration::from_secs(300), "nothing happens");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill()?;
    child.wait()?;
    Ok(true)
}

fn pictures(set: &Path) -> usize {
    std::fs::read_to_string(set.join("metadata.jsonl")).map_or(0, |text| text.lines().count())
}

fn killed_twice() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (model, set) = (demo()?, folder.path().join("set"));
    let arguments = all(&model, "set");
    // While prompts are written, and while pictures are drawn.
    let turns = || std::fs::metadata(set.join("turns.jsonl")).is_ok_and(|found| found.len() > 0);
    assert!(kill_when(folder.path(), &arguments, turns)?);
    assert!(kill_when(folder.path(), &arguments, || pictures(&set) >= 3)?);
    let there = pictures(&set);
    assert!((3..COUNT).contains(&there), "{there}");
    let finished = data(folder.path(), &[&arguments[..], &["--json"]].concat())?.success()?;
    let result: Value = serde_json::from_str(&finished.stdout)?;
    let report = &result["report"];
    assert_eq!(
        (&report["prompts"], &report["valid"], &report["pictures"]),
        (&Value::from(8), &Value::from(8), &Value::from(8))
    );
    // Nothing is lost, nothing is there twice, and all is as if it had never been killed.
    let whole = all(&model, "whole");
    data(folder.path(), &whole)?.success()?;
    let other = folder.path().join("whole");
    for name in [
        "prompts.jsonl",
        "checks.jsonl",
        "metadata.jsonl",
        "metadata.csv",
        "report.html",
    ] {
        let (a, b) = (
            std::fs::read_to_string(set.join(name))?,
            std::fs::read_to_string(other.join(name))?,
        );
        assert!(a.replace("Data set set", "Data set whole") == b, "{name}");
    }
    let listed: Vec<String> = lines(&set.join("metadata.jsonl"))?
        .iter()
        .map(|line| line["prompt"].as_str().unwrap_or_default().into())
        .collect();
    assert_eq!(
        listed.iter().collect::<BTreeSet<_>>(),
        texts(&set)?.iter().collect::<BTreeSet<_>>()
    );
    for number in 0..COUNT {
        let name = format!("000/{number:06}.png");
        assert!(
            std::fs::read(set.join(&name))? == std::fs::read(other.join(&name))?,
            "{name}"
        );
    }
    // Given again, nothing is left to do.
    let again = data(folder.path(), &arguments)?.success()?;
    assert!(
        again.stdout.contains("set: 8 pictures of 8 prompts"),
        "{}",
        again.stdout
    );
    trained_on(folder.path(), &model)
}

/// `l2p-train` takes the folder as it is.
fn trained_on(folder: &Path, model: &str) -> Outcome {
    let path = |name: &str| folder.join(name).display().to_string();
    let (set, cache, out) = (path("set"), path("set/cache"), path("run"));
    let arguments = [
        "--model",
        model,
        "--patch",
        "16",
        "--data",
        &set,
        "--cache",
        &cache,
        "--size",
        "128x128",
        "--steps",
        "2",
        "--batch",
        "2",
        "--held-out",
        "2",
        "--device",
        "cpu",
        "--out",
        &out,
    ];
    let finished = run("l2p-train", arguments)?.success()?;
    assert!(!finished.stderr.contains("damaged"), "{}", finished.stderr);
    Ok(())
}

/// Ranks only draw: prompts and verdicts are written once, before they start.
fn ranks() -> Outcome {
    let folder = tempfile::tempdir()?;
    let model = demo()?;
    data(folder.path(), &all(&model, "one"))?.success()?;
    data(folder.path(), &[&all(&model, "two")[..], &["--ranks", "2"]].concat())?.success()?;
    let read = |out: &str, name: &str| std::fs::read(folder.path().join(out).join(name));
    for name in [
        "prompts.jsonl",
        "checks.jsonl",
        "metadata.jsonl",
        "000/000000.png",
        "000/000007.png",
    ] {
        assert!(read("one", name)? == read("two", name)?, "{name}");
    }
    let mut under = command(folder.path(), &all(&model, "three"))?;
    for (name, value) in [
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "29999"),
    ] {
        under.env(name, value);
    }
    let refused = l2p_tests::cli::Finished::from(&mut under)?;
    assert!(
        refused.code == 1 && refused.stderr.contains("give --ranks N instead of a launcher"),
        "{}",
        refused.stderr
    );
    Ok(())
}
