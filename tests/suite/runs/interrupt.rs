//! Ctrl-C, SIGTERM, and the end that no program sees coming.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use l2p_engine::train::run::checkpoint::Checkpoint;
use l2p_engine::train::run::log::read;
use l2p_tests::{Outcome, Suite, hash_uniform};
use libtest_mimic::Failed;

use super::{checkpoints, command, curve, delta, has_begun, train, validation, world};

pub fn register(suite: &mut Suite) {
    if cfg!(unix) {
        suite.cpu("runs::interrupt::signals_save_and_exit", signals);
        suite.cpu("runs::interrupt::kill_leaves_the_last_checkpoint", kill);
        suite.cpu(
            "runs::interrupt::kill_in_a_divergence_leaves_the_last_good_checkpoint",
            kill_in_divergence,
        );
        suite.cpu("runs::interrupt::a_signal_within_a_step_is_heard", within_a_step);
        suite.cpu("runs::interrupt::a_closed_terminal_is_as_it_is_told", closed_terminal);
    }
}

/// More steps than any of these runs takes.
const MANY: &str = "100000";

fn start(out: &Path, arguments: &[&str]) -> Result<Child, Failed> {
    let mut command = command(world()?, out, arguments)?;
    Ok(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?)
}

pub(super) fn signal(child: &Child, name: &str) -> Outcome {
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

/// Waits until `reached` says so, at most a minute, while the program runs.
fn wait_until(child: &mut Child, reached: &dyn Fn() -> bool) -> Outcome {
    let started = Instant::now();
    while !reached() {
        if let Some(status) = child.try_wait()? {
            return Err(format!("the program ended by itself: {status}").into());
        }
        assert!(started.elapsed() < Duration::from_secs(60), "it takes too long");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// The step of the newest checkpoint, which is whole, of numbers that are finite, and says so.
fn newest_good(out: &Path) -> Result<u64, Failed> {
    let (found, refused) = Checkpoint::newest(out)?;
    assert!(refused.is_empty(), "{refused:?}");
    let found = found.ok_or("there is no checkpoint")?;
    assert_eq!(found.state.finite, Some(true));
    assert!(found.verify(&mut |_, _| Ok(()))?.is_empty());
    Ok(found.state.step)
}

/// Kills runs at 20 moments: some that train as they should, and between them such whose learning rate destroys the weights with
/// their first step. The last good checkpoint is there each time, and in the end all is as if nothing had happened.
fn kill_in_divergence() -> Outcome {
    const KILLS: usize = 20;
    let folder = tempfile::tempdir()?;
    let (out, whole) = (folder.path().join("run"), folder.path().join("whole"));
    let saving = [
        "--save-every",
        "1",
        "--keep-last",
        "1",
        "--validate-every",
        "0",
        "--log-every",
        "1",
    ];
    train(world()?, &out, &[&saving[..], &["--steps", "3"]].concat())?.success()?;
    let mut newest = newest_good(&out)?;
    for (index, wait) in hash_uniform("moments of death in a divergence", KILLS)
        .into_iter()
        .enumerate()
    {
        let diverges = index % 4 != 3;
        let rate = if diverges { "1e36" } else { "1e-3" };
        let patient = ["--steps", MANY, "--max-skipped", "1000000", "--lr", rate];
        let before = match diverges {
            true => Some(delta(&out, &format!("step-{newest:08}"))?),
            false => None,
        };
        let mut child = start(&out, &[&saving[..], &patient].concat())?;
        // At any moment from the start on, or after steps that may have destroyed the weights.
        if index % 2 == 0 {
            let last = |out: &Path| curve(out).ok().and_then(|curve| curve.last().map(|point| point.0));
            wait_until(&mut child, &|| last(&out).is_some_and(|step| step > newest))?;
        }
        std::thread::sleep(Duration::from_secs_f32(0.15 * (wait + 1.0)));
        assert!(child.try_wait()?.is_none(), "the program ended by itself");
        child.kill()?;
        child.wait()?;
        let found = newest_good(&out)?;
        match before {
            Some(before) => {
                assert_eq!(found, newest, "a diverged step was saved, or a good one is gone");
                assert!(delta(&out, &format!("step-{newest:08}"))? == before);
            }
            None => assert!(found >= newest),
        }
        newest = found;
    }
    let steps = (newest + 2).to_string();
    let last = [&saving[..], &["--steps", &steps]].concat();
    train(world()?, &out, &last)?.success()?;
    train(world()?, &whole, &last)?.success()?;
    assert_eq!(curve(&out)?, curve(&whole)?);
    let name = format!("step-{steps:0>8}");
    assert!(delta(&out, &name)? == delta(&whole, &name)?);
    Ok(())
}

/// A step of thousands of batches: the wish to stop is heard between two of them.
fn within_a_step() -> Outcome {
    let folder = tempfile::tempdir()?;
    let mut child = start(folder.path(), &["--accumulate", "65536", "--validate-every", "0"])?;
    wait_until(&mut child, &|| {
        read(folder.path()).is_ok_and(|records| !records.is_empty())
    })?;
    std::thread::sleep(Duration::from_millis(100));
    signal(&child, "TERM")?;
    let asked = Instant::now();
    while child.try_wait()?.is_none() && asked.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let ended = child.try_wait()?;
    child.kill()?;
    let stderr = String::from_utf8(child.wait_with_output()?.stderr)?;
    assert_eq!(ended.and_then(|status| status.code()), Some(130), "{stderr}");
    assert!(
        stderr.contains("a step takes 131072 pictures (batch 2 x accumulate 65536)"),
        "{stderr}"
    );
    assert!(checkpoints(folder.path())?.is_empty());
    Ok(())
}

/// Closing the terminal saves and ends; where it was to be ignored, as by `nohup`, the run goes on.
fn closed_terminal() -> Outcome {
    let folder = tempfile::tempdir()?;
    let arguments = ["--validate-every", "0", "--save-every", "0", "--steps", MANY];
    for (name, trap) in [("heard", ""), ("ignored", "trap '' HUP; ")] {
        let out = folder.path().join(name);
        let program = command(world()?, &out, &arguments)?;
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", &format!("{trap}exec \"$@\""), "sh"]);
        shell.arg(program.get_program()).args(program.get_args());
        let words = folder.path().join(format!("{name}.txt"));
        shell.stdout(Stdio::null()).stderr(std::fs::File::create(&words)?);
        let mut child = shell.spawn()?;
        wait_until(&mut child, &|| has_begun(&out))?;
        signal(&child, "HUP")?;
        if name == "ignored" {
            let lines = curve(&out)?.len();
            wait_until(&mut child, &|| curve(&out).is_ok_and(|curve| curve.len() > lines + 2))?;
            signal(&child, "TERM")?;
        }
        let code = child.wait()?.code();
        assert_eq!(code, Some(130), "{name}: {}", std::fs::read_to_string(&words)?);
        assert!(newest_good(&out)? > 0);
    }
    Ok(())
}
