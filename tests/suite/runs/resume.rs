//! A run in parts equals one without a break.

use std::path::Path;

use l2p_engine::train::Ranks;
use l2p_engine::train::run::log::Record;
use l2p_engine::train::run::{self, Event, Observer, Resume, TrainConfig};
use l2p_engine::{Device, Error};
use l2p_tests::{Outcome, Suite};

use super::{World, checkpoints, curve, delta, l2p_train, train, validation, world, write_pictures};

pub fn register(suite: &mut Suite) {
    suite.cpu("runs::resume::parts_equal_the_whole", parts);
    suite.cpu(
        "runs::resume::accumulation_average_and_cosine_continue",
        with_everything,
    );
    suite.cpu("runs::resume::three_batches_of_two_are_one_of_six", accumulation);
    suite.cpu("runs::resume::checkpoints_of_other_runs_are_refused", refusals);
    suite.cpu("runs::resume::lines_of_the_log_that_stay_are_not_touched", log_lines);
    suite.cpu(
        "runs::resume::an_interrupted_validation_is_made_up_for",
        interrupted_validation,
    );
    suite.cpu("runs::resume::checkpoints_are_kept_as_asked", kept);
}

/// `validate_every` of the world's configuration.
const VALIDATE_EVERY: u64 = 6;

/// Takes `break_at` steps, continues to the end, and compares with the run `whole`.
fn expect_equal(world: &World, folder: &Path, arguments: &[&str], break_at: &str) -> Outcome {
    let (whole, parted) = (folder.join("whole"), folder.join("parted"));
    let whole_arguments = [arguments, &["--steps", "12"]].concat();
    train(world, &whole, &whole_arguments)?.success()?;
    train(world, &parted, &[arguments, &["--steps", break_at]].concat())?.success()?;
    let finished = train(world, &parted, &whole_arguments)?.success()?;
    assert!(finished.stderr.contains("continuing from"), "{}", finished.stderr);
    assert_eq!(curve(&parted)?, curve(&whole)?);
    // A part ends with a validation of its own, between those of the whole.
    let break_at: u64 = break_at.parse()?;
    let shared = validation(&parted)?.into_iter();
    let shared: Vec<(u64, f64)> = shared
        .filter(|(step, _)| *step != break_at || break_at.is_multiple_of(VALIDATE_EVERY))
        .collect();
    assert_eq!(shared, validation(&whole)?);
    assert!(delta(&parted, "step-00000012")? == delta(&whole, "step-00000012")?);
    Ok(())
}

fn parts() -> Outcome {
    let folder = tempfile::tempdir()?;
    // Between two lines of the log, in the middle of an epoch, and past the end of one.
    for (index, break_at) in ["4", "10"].into_iter().enumerate() {
        expect_equal(world()?, &folder.path().join(index.to_string()), &[], break_at)?;
    }
    Ok(())
}

fn with_everything() -> Outcome {
    let folder = tempfile::tempdir()?;
    let arguments = [
        "--accumulate",
        "3",
        "--ema",
        "0.9",
        "--warmup",
        "3",
        "--caption-dropout",
        "0.5",
        "--policy",
        "released:1",
        "--recompute",
        "all",
        "--noise",
        "fresh",
    ];
    expect_equal(world()?, folder.path(), &arguments, "6")?;
    let average = folder.path().join("whole/checkpoints/step-00000012/ema.safetensors");
    assert!(std::fs::read(average)? != delta(&folder.path().join("whole"), "step-00000012")?);
    Ok(())
}

/// Three batches of two are one of six: of six pictures in all, with the noise of their seeds and one noise level, each step takes the
/// same whatever the batches, so the loss and the gradients' norm are the same but for the order of sums. The first step tells, before
/// any rounding can grow.
fn accumulation() -> Outcome {
    let folder = tempfile::tempdir()?;
    let data = folder.path().join("data");
    write_pictures(&data, 6)?;
    let data = data.display().to_string();
    let first = |name: &str, batch: &str, accumulate: &str| -> Result<(f64, f64), libtest_mimic::Failed> {
        let out = folder.path().join(name);
        let arguments = [
            "--data",
            &data,
            "--held-out",
            "0",
            "--noise",
            "seed",
            "--sigmas",
            "1",
            "--validate-every",
            "0",
            "--log-every",
            "1",
            "--steps",
            "1",
            "--batch",
            batch,
            "--accumulate",
            accumulate,
        ];
        train(world()?, &out, &arguments)?.success()?;
        match curve(&out)?.as_slice() {
            &[(1, Some(loss), Some(norm))] => Ok((loss, norm)),
            other => Err(format!("not one step: {other:?}").into()),
        }
    };
    let (threes, once) = (first("threes", "2", "3")?, first("once", "6", "1")?);
    let close = |a: f64, b: f64| (a - b).abs() <= 1e-5 * b.abs();
    assert!(
        close(threes.0, once.0) && close(threes.1, once.1),
        "{threes:?} {once:?}"
    );
    // Other pictures have another loss: the comparison means something.
    let twos = first("twos", "2", "2")?;
    assert!(!close(twos.0, once.0) && !close(twos.1, once.1), "{twos:?} {once:?}");
    Ok(())
}

fn refusals() -> Outcome {
    let (world, folder) = (world()?, tempfile::tempdir()?);
    let out = folder.path().join("run");
    train(world, &out, &["--steps", "8"])?.success()?;
    let message = |arguments: &[&str]| -> Result<String, libtest_mimic::Failed> {
        let finished = train(world, &out, arguments)?;
        assert_eq!(finished.code, 1, "{arguments:?}: {}", finished.stderr);
        Ok(finished.stderr)
    };
    let fresh = message(&["--resume", "none"])?;
    assert!(fresh.contains("is a checkpoint of an earlier run"), "{fresh}");
    let policy = message(&["--policy", "full"])?;
    assert!(policy.contains("written with another policy"), "{policy}");
    let old = out.join("checkpoints/step-00000004").display().to_string();
    let newer = message(&["--resume", &old])?;
    assert!(newer.contains("step-00000008: is newer than"), "{newer}");
    // In a folder of its own the same continuation is welcome.
    let other = folder.path().join("other");
    train(world, &other, &["--resume", &old, "--steps", "8"])?.success()?;
    assert_eq!(curve(&other)?[..], curve(&out)?[2..]);
    assert!(delta(&other, "step-00000008")? == delta(&out, "step-00000008")?);
    // A damaged checkpoint is reported, and the one before it is taken.
    let state = out.join("checkpoints/step-00000008/state.safetensors");
    let bytes = std::fs::read(&state)?;
    std::fs::write(&state, &bytes[..bytes.len() / 2])?;
    let finished = train(world, &out, &["--steps", "8"])?.success()?;
    assert!(
        finished.stderr.contains("a checkpoint cannot be used"),
        "{}",
        finished.stderr
    );
    assert!(finished.stderr.contains("step-00000004"), "{}", finished.stderr);
    assert_eq!(curve(&other)?[..], curve(&out)?[2..]);
    let missing = l2p_train(&["--model", "m", "--data", "d", "--resume", "/nowhere"])?;
    assert!(
        missing.code == 1 && missing.stderr.contains("/nowhere"),
        "{}",
        missing.stderr
    );
    Ok(())
}

fn kept() -> Outcome {
    let folder = tempfile::tempdir()?;
    let arguments = [
        "--save-every",
        "2",
        "--keep-last",
        "2",
        "--keep-every",
        "6",
        "--validate-every",
        "0",
    ];
    train(world()?, folder.path(), &arguments)?.success()?;
    assert_eq!(
        checkpoints(folder.path())?,
        ["step-00000006", "step-00000010", "step-00000012"]
    );
    Ok(())
}

fn log_lines() -> Outcome {
    let folder = tempfile::tempdir()?;
    let read = || std::fs::read_to_string(folder.path().join("log.jsonl"));
    let arguments = |steps: &'static str| ["--log-every", "1", "--validate-every", "1", "--steps", steps];
    train(world()?, folder.path(), &arguments("4"))?.success()?;
    for steps in ["5", "6", "7"] {
        let before = read()?;
        let stays: Vec<&str> = before
            .lines()
            .filter(|line| !line.contains("\"kind\":\"end\""))
            .collect();
        train(world()?, folder.path(), &arguments(steps))?.success()?;
        let after = read()?;
        for (before, after) in stays.iter().zip(after.lines()) {
            assert_eq!(*before, after);
        }
        assert!(after.lines().count() > stays.len());
    }
    Ok(())
}

/// Asks to stop as soon as the log has a line of this step, so that the next to ask is the validation that is due.
struct StopsAt {
    step: u64,
    reached: bool,
}

impl Observer for StopsAt {
    fn event(&mut self, event: &Event<'_>) {
        if let Event::Record(Record::Train(train)) = event {
            self.reached |= train.step == self.step;
        }
    }

    fn stop_requested(&self) -> bool {
        self.reached
    }
}

fn interrupted_validation() -> Outcome {
    let (world, folder) = (world()?, tempfile::tempdir()?);
    let (out, whole) = (folder.path().join("run"), folder.path().join("whole"));
    let config = TrainConfig::read(Some(&world.path("train.toml")), &[])?;
    for step in [VALIDATE_EVERY, 2 * VALIDATE_EVERY] {
        let mut observer = StopsAt { step, reached: false };
        let outcome = run::train(
            &config,
            &out,
            &Device::Cpu,
            &Resume::Auto,
            &Ranks::solo(),
            &mut observer,
        );
        assert!(matches!(outcome, Err(Error::Interrupted)));
        assert!(validation(&out)?.iter().all(|(at, _)| *at < step));
    }
    // Once: given again, the command finds nothing left to do.
    for _ in 0..2 {
        train(world, &out, &[])?.success()?;
    }
    train(world, &whole, &[])?.success()?;
    assert_eq!(validation(&out)?, validation(&whole)?);
    assert_eq!(curve(&out)?, curve(&whole)?);
    Ok(())
}
