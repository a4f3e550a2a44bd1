//! Broken files for every reader: no panic, no end of the process, no hang, no more than 2 GiB, no picture that is not finite.

use std::process::Command;

use l2p_tests::cli::{Finished, program};
use l2p_tests::{Outcome, Suite};
use serde_json::Value;

/// As many as continuous integration has time for; `scripts/fuzz` runs more.
const CASES: &str = "100000";

pub fn register(suite: &mut Suite) {
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

/// A campaign in which faults are planted tells each kind.
fn planted_faults_are_found() -> Outcome {
    let folder = tempfile::tempdir()?;
    let summary = folder.path().join("summary.json");
    let mut command = Command::new(program("l2p-fuzz")?);
    command
        .args(["run", "--planted", "--cases", "3000", "--folder"])
        .arg(folder.path())
        .arg("--json")
        .arg(&summary);
    let finished = Finished::from(&mut command)?;
    assert_eq!(finished.code, 1, "{}{}", finished.stdout, finished.stderr);
    let summary: Value = serde_json::from_slice(&std::fs::read(&summary)?)?;
    assert_eq!(summary["cases"], 3000);
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
        assert!(summary["ends"][end].as_u64() > Some(0), "{end}: {summary}");
    }
    Ok(())
}
