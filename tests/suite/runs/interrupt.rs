//! Ctrl-C, SIGTERM, and the end that no program sees coming.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use l2p_engine::train::run::checkpoint::Checkpoint;
use l2p_tests::{Outcome, Suite, hash_uniform};
use libtest_mimic::Failed;

use super::{checkpoints, command, curve, delta, has_begun, train, validation, world};

pub fn register(suite: &mut Suite) {
    if cfg!(unix) {
        suite.cpu("runs::interrupt::signals_save_and_exit", signals);
        suite.cpu("runs::interrupt::kill_leaves_the_last_checkpoint", kill);
    }
}

/// More steps than any of these runs takes.
const MANY: &str = "100000";

fn start(out: &Path, arguments: &[&str]) -> Result<Child, Failed> {
    let mut command = command(world()?, out, arguments)?;
    Ok(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?)
}

fn signal(child: &Child, name: &str) -> Outcome {
    let status = std::process::Command::new("sh")
        .args(["-c", &format!("kill -{name} {}", child.id())])
        .status()?;
    assert!(status.success());
    Ok(())
}

fn signals() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (parted, whole) = (folder.path().join("parted"), folder.path().join("whole"));
    let arguments = ["--validate-every", "0", "--save-every", "0"];
    for name in ["TERM", "INT"] {
        let mut child = start(&parted, &[&arguments[..], &["--steps", MANY]].concat())?;
        let before = curve(&parted).map_or(0, |curve| curve.len());
        let started = Instant::now();
        while !(has_begun(&parted) && curve(&parted)?.len() > before) && started.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(2));
            assert!(child.try_wait()?.is_none(), "the program ended by itself");
        }
        signal(&child, name)?;
        let asked = Instant::now();
        let output = child.wait_with_output()?;
        let stderr = String::from_utf8(output.stderr)?;
        assert_eq!(output.status.code(), Some(130), "{stderr}");
        assert!(asked.elapsed() < Duration::from_secs(20));
        assert!(stderr.ends_with("error: interrupted\n"), "{stderr}");
        // What was trained is saved, to the last step.
        let saved = Checkpoint::newest(&parted)?.0.ok_or("there is no checkpoint")?;
        assert!(saved.state.step >= curve(&parted)?.last().ok_or("no interval")?.0);
    }
    let steps = Checkpoint::newest(&parted)?
        .0
        .ok_or("there is no checkpoint")?
        .state
        .step
        + 3;
    let step_count = steps.to_string();
    let last = [&arguments[..], &["--steps", &step_count]].concat();
    train(world()?, &parted, &last)?.success()?;
    train(world()?, &whole, &last)?.success()?;
    assert_eq!(curve(&parted)?, curve(&whole)?);
    let name = format!("step-{steps:08}");
    assert!(delta(&parted, &name)? == delta(&whole, &name)?);
    Ok(())
}

/// Kills a run at 20 moments, most of them while a checkpoint is written or deleted, each time continuing from what the last
/// one left; in the end all is as if nothing had happened.
fn kill() -> Outcome {
    const KILLS: usize = 20;
    let folder = tempfile::tempdir()?;
    let (parted, whole) = (folder.path().join("parted"), folder.path().join("whole"));
    let saving = ["--save-every", "1", "--validate-every", "0", "--log-every", "1"];
    let arguments = [&saving[..], &["--steps", MANY]].concat();
    let mut newest = 0;
    for wait in hash_uniform("moments of death", KILLS) {
        let mut child = start(&parted, &arguments)?;
        let first = newest;
        let started = Instant::now();
        // Some progress first, so that every moment is one of training; then a moment that nobody can foresee.
        while newest <= first && started.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(2));
            let names = checkpoints(&parted)?;
            let steps = names.iter().filter_map(|name| name.strip_prefix("step-")?.parse().ok());
            newest = steps.max().unwrap_or(0);
            assert!(child.try_wait()?.is_none(), "the program ended by itself");
        }
        std::thread::sleep(Duration::from_secs_f32(0.02 * (wait + 1.0)));
        child.kill()?;
        child.wait()?;
        let (found, refused) = Checkpoint::newest(&parted)?;
        assert!(refused.is_empty(), "{refused:?}");
        let step = found.ok_or("there is no checkpoint")?.state.step;
        assert!(
            step >= newest,
            "the checkpoint of step {newest} is gone, the newest is of {step}"
        );
        newest = step;
    }
    let steps = (newest + 2).to_string();
    let last = [&saving[..], &["--steps", &steps]].concat();
    train(world()?, &parted, &last)?.success()?;
    // Nothing half-written is left.
    let names = checkpoints(&parted)?;
    assert!(names.iter().all(|name| name.starts_with("step-")), "{names:?}");
    let whole_arguments = [
        "--save-every",
        "0",
        "--validate-every",
        "0",
        "--log-every",
        "1",
        "--steps",
        &steps,
    ];
    train(world()?, &whole, &whole_arguments)?.success()?;
    assert_eq!(curve(&parted)?, curve(&whole)?);
    assert_eq!(validation(&parted)?, validation(&whole)?);
    Ok(())
}
