//! Nothing that happens to the output ends a program's work.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use l2p_engine::image_io::read_image;
use l2p_engine::train::run::log::Record;
use l2p_engine::train::run::log::read;
use l2p_tests::cli::program;
use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;

use super::{checkpoints, command, world};

pub fn register(suite: &mut Suite) {
    suite.cpu("runs::printing::a_reader_that_leaves_ends_no_program", lost_reader);
    if cfg!(target_os = "linux") {
        suite.cpu("runs::printing::a_full_disk_behind_the_log_ends_no_program", full_disk);
    }
}

/// A program about to run, and a look at whether it did its work.
type Case = (Command, Box<dyn Fn() -> Outcome>);

/// The three programs that work long, each with a line or more to say.
fn programs(folder: &Path) -> Result<Vec<Case>, Failed> {
    let world = world()?;
    let (run, picture, set) = (folder.join("run"), folder.join("picture.png"), folder.join("set"));
    let train = command(world, &run, &["--json", "--log-every", "1"])?;
    let mut sample = Command::new(program("l2p-sample")?);
    sample
        .arg("--model")
        .arg(world.path("model"))
        .arg("--out")
        .arg(&picture);
    sample.args(["--prompt", "fox", "--device", "cpu", "--report"]);
    let prompts = folder.join("prompts.txt");
    std::fs::write(&prompts, "{\"prompt\":\"fox\"}\n{\"prompt\":\"house\"}\n")?;
    let mut data = Command::new(program("l2p-data")?);
    data.args(["synthesize", "--device", "cpu", "--model"])
        .arg(world.path("model"));
    data.arg("--prompts").arg(&prompts).arg("--out").arg(&set);
    let trained = move || {
        let end = read(&run)?.pop();
        assert!(matches!(end, Some(Record::End { step: 12, outcome }) if outcome == "done"));
        assert!(checkpoints(&run)?.contains(&"step-00000012".to_owned()));
        Ok(())
    };
    let drawn = move || {
        read_image(&picture)?;
        Ok(())
    };
    let made = move || {
        let rows = std::fs::read_to_string(set.join("metadata.jsonl"))?;
        assert_eq!(rows.lines().count(), 2);
        Ok(())
    };
    Ok(vec![
        (train, Box::new(trained)),
        (sample, Box::new(drawn)),
        (data, Box::new(made)),
    ])
}

/// `… 2>&1 | head -2`: two lines are read, then nobody reads any more.
fn lost_reader() -> Outcome {
    let folder = tempfile::tempdir()?;
    for (mut command, check) in programs(folder.path())? {
        let name = format!("{command:?}");
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        drop(child.stdout.take());
        if let Some(stderr) = child.stderr.take() {
            let mut line = String::new();
            BufReader::new(stderr).read_line(&mut line)?;
        }
        let status = child.wait()?;
        assert!(status.success(), "{name}: {status}");
        check()?;
    }
    Ok(())
}

/// `… > log 2>&1` where the log's disk is full and that of the work is not.
fn full_disk() -> Outcome {
    let folder = tempfile::tempdir()?;
    let full = || OpenOptions::new().write(true).open("/dev/full");
    for (mut command, check) in programs(folder.path())? {
        let name = format!("{command:?}");
        let status = command.stderr(full()?).stdout(Stdio::null()).status()?;
        assert!(status.success(), "{name}: {status}");
        check()?;
        // What was asked for on standard output is another matter for the programs whose work it is, but not for a run.
        if name.contains("l2p-train") {
            let mut again = super::command(world()?, &folder.path().join("second"), &["--json"])?;
            assert!(again.stderr(full()?).stdout(full()?).status()?.success());
        }
    }
    Ok(())
}
