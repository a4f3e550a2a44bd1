//! Broken files for every reader: no panic, no end of the process, no hang, no more than 2 GiB, no picture that is not finite.

use std::process::Command;

use l2p_tests::cli::{Finished, program};
use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;
use serde_json::Value;

/// As many as continuous integration has time for; `scripts/fuzz` runs more.
const CASES: &str = "100000";

pub fn register(suite: &mut Suite) {
    suite.cpu("fuzz::planted_faults_are_found", planted_faults_are_found);
    suite.cpu(
        "fuzz::every_reader_stands_broken_files",
        every_reader_stands_broken_files,
    );
}

fn every_reader_stands_broken_files() -> Outcome {
    let folder = tempfile::tempdir()?;
    let mut command = Command::new(program("l2p-fuzz")?);
    command
        .args(["run", "--cases", CASES, "--every", "30", "--folder"])
        .arg(folder.path());
    let finished = Finished::from(&mut command)?;
    match finished.code {
        0 => Ok(()),
        _ => Err(format!(
            "run `scripts/fuzz --case CASE` for\n{}{}",
            finished.stdout, finished.stderr
        )
        .into()),
    }
}

/// A campaign in which faults are planted tells each kind, and one that was interrupted goes on.
fn planted_faults_are_found() -> Outcome {
    let folder = tempfile::tempdir()?;
    let summary = folder.path().join("summary.json");
    let run = |cases: u64| -> Result<Value, Failed> {
        let mut command = Command::new(program("l2p-fuzz")?);
        command
            .args(["run", "--planted", "--cases", &cases.to_string(), "--folder"])
            .arg(folder.path());
        let finished = Finished::from(command.arg("--json").arg(&summary))?;
        match finished.code {
            1 => Ok(serde_json::from_slice(&std::fs::read(&summary)?)?),
            code => Err(format!("exit code {code}\n{}{}", finished.stdout, finished.stderr).into()),
        }
    };
    let (part, whole) = (run(1000)?, run(3000)?);
    let count = |summary: &Value, end: &str| summary["ends"][end].as_u64().unwrap_or(0);
    assert_eq!((&part["cases"], &whole["cases"]), (&1000.into(), &3000.into()));
    let ends = [
        "panic",
        "abort",
        "stack overflow",
        "memory",
        "hang",
        "a picture that is not finite",
        "a message without end",
    ];
    for end in ends {
        assert!(count(&whole, end) > 0, "{end}: {whole}");
    }
    assert!(
        count(&part, "panic") > 0 && count(&part, "panic") < count(&whole, "panic"),
        "{part} {whole}"
    );
    let found: u64 = ends.iter().map(|end| count(&whole, end)).sum();
    assert_eq!(whole["unexpected"].as_u64(), Some(found), "{whole}");
    Ok(())
}
