//! A run in parts equals one without a break.

use std::path::Path;

use l2p_tests::{Outcome, Suite};

use super::{World, checkpoints, curve, delta, l2p_train, train, validation, world};

pub fn register(suite: &mut Suite) {
    suite.cpu("runs::resume::parts_equal_the_whole", parts);
    suite.cpu(
        "runs::resume::accumulation_average_and_cosine_continue",
        with_everything,
    );
    suite.cpu("runs::resume::checkpoints_of_other_runs_are_refused", refusals);
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
    // Gradients of three batches of two are those of one of six: the first loss tells, before any rounding can grow.
    let once = folder.path().join("once");
    let arguments = ["--steps", "2", "--batch", "6", "--noise", "fresh", "--warmup", "3"];
    train(world()?, &once, &arguments)?.success()?;
    let (sixes, threes) = (curve(&once)?, curve(&folder.path().join("whole"))?);
    assert_eq!((sixes[0].0, threes[0].0), (2, 2));
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
