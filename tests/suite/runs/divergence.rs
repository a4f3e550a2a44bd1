//! Losses that are no numbers, and losses that explode.

use l2p_engine::train::run::log::{Record, read};
use l2p_tests::{Outcome, Suite};

use super::{checkpoints, curve, delta, intervals, train, world};

pub fn register(suite: &mut Suite) {
    suite.cpu("runs::divergence::steps_that_are_not_finite_are_skipped", skipped);
    suite.cpu("runs::divergence::a_loss_that_explodes_stops_the_run", explodes);
    suite.cpu(
        "runs::divergence::the_last_good_checkpoint_stays_and_is_taken",
        recovers,
    );
    suite.cpu(
        "runs::divergence::a_loss_that_rose_unseen_takes_no_checkpoint_with_it",
        rose_unseen,
    );
    suite.cpu(
        "runs::divergence::weights_that_are_not_finite_are_no_success",
        no_success,
    );
    suite.cpu("runs::divergence::what_does_not_fit_is_refused", refused);
}

fn skipped() -> Outcome {
    let folder = tempfile::tempdir()?;
    let arguments = [
        "--lr",
        "1e36",
        "--max-skipped",
        "3",
        "--steps",
        "40",
        "--validate-every",
        "0",
    ];
    let finished = train(world()?, folder.path(), &arguments)?;
    assert_eq!(finished.code, 1);
    assert!(
        finished
            .stderr
            .contains("steps in a row had gradients that are not finite (max_skipped = 3)"),
        "{}",
        finished.stderr
    );
    let last = intervals(folder.path())?.pop().ok_or("no interval")?;
    assert!(last.skipped > 3 && last.loss.is_none(), "{last:?}");
    let noticed = read(folder.path())?.into_iter();
    let noticed = noticed.filter(|record| matches!(record, Record::Notice { text, .. } if text.contains("skipped")));
    assert!(noticed.count() > 0);
    // No step but the first had gradients, and what that one made of the weights is nothing to go on from.
    assert!(checkpoints(folder.path())?.is_empty());
    Ok(())
}

fn explodes() -> Outcome {
    let folder = tempfile::tempdir()?;
    let arguments = ["--log-every", "1", "--validate-every", "0", "--save-every", "0"];
    train(world()?, folder.path(), &[&arguments[..], &["--steps", "8"]].concat())?.success()?;
    let finished = train(
        world()?,
        folder.path(),
        &[&arguments[..], &["--steps", "60", "--lr", "0.1"]].concat(),
    )?;
    assert_eq!(finished.code, 1, "{}", finished.stderr);
    assert!(finished.stderr.contains("the loss diverged: "), "{}", finished.stderr);
    assert!(finished.stderr.contains("a spike"), "{}", finished.stderr);
    // What diverged is not kept; what was before it is.
    assert_eq!(checkpoints(folder.path())?, ["step-00000008"]);
    Ok(())
}

/// Good steps, then a learning rate that destroys the weights at once: nothing of that is saved, nothing good is deleted, and the
/// advice of the message leads back to the good ones.
fn recovers() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (out, whole) = (folder.path().join("run"), folder.path().join("whole"));
    let saving = ["--save-every", "1", "--keep-last", "1", "--log-every", "1"];
    train(world()?, &out, &[&saving[..], &["--steps", "8"]].concat())?.success()?;
    let kept = ["step-00000007", "step-00000008"];
    assert_eq!(
        checkpoints(&out)?,
        kept,
        "the newest one and one that a later step has proven"
    );
    let before = delta(&out, kept[1])?;
    let bad = ["--steps", "40", "--lr", "1e36", "--max-skipped", "3"];
    for _ in 0..2 {
        let finished = train(world()?, &out, &[&saving[..], &bad].concat())?;
        assert_eq!(finished.code, 1, "{}", finished.stderr);
        assert!(
            finished.stderr.contains("no checkpoint at step 9: "),
            "{}",
            finished.stderr
        );
        assert!(finished.stderr.contains("goes on from step 8"), "{}", finished.stderr);
        assert_eq!(checkpoints(&out)?, kept);
        assert!(delta(&out, kept[1])? == before);
        // Not stopped before its time by what the run before it counted.
        assert!(intervals(&out)?.last().is_some_and(|last| last.step > 11));
    }
    let finished = train(world()?, &out, &saving)?.success()?;
    assert!(finished.stderr.contains("continuing from") && finished.stderr.contains("step-00000008"));
    train(world()?, &whole, &saving)?.success()?;
    assert_eq!(curve(&out)?, curve(&whole)?);
    assert!(delta(&out, "step-00000012")? == delta(&whole, "step-00000012")?);
    Ok(())
}

/// The loss explodes between two lines of the log, and each step is saved: what was saved since the last good line is set aside, and
/// the same command with another rate goes on from before.
fn rose_unseen() -> Outcome {
    let folder = tempfile::tempdir()?;
    let out = folder.path();
    let arguments = [
        "--log-every",
        "3",
        "--save-every",
        "1",
        "--keep-last",
        "1",
        "--validate-every",
        "0",
        "--spike-patience",
        "1",
    ];
    train(world()?, out, &[&arguments[..], &["--steps", "18"]].concat())?.success()?;
    let finished = train(
        world()?,
        out,
        &[&arguments[..], &["--steps", "90", "--lr", "0.1"]].concat(),
    )?;
    assert!(
        finished.code == 1 && finished.stderr.contains("the loss diverged: "),
        "{}",
        finished.stderr
    );
    // The last line before the one that told of it.
    let calm = intervals(out)?.last().ok_or("no interval")?.step - 3;
    let names = checkpoints(out)?;
    let (aside, kept): (Vec<_>, Vec<_>) = names.iter().partition(|name| name.starts_with("refused-"));
    let step = |name: &&String| name.strip_prefix("step-").and_then(|step| step.parse::<u64>().ok());
    let steps: Vec<u64> = kept.iter().filter_map(step).collect();
    assert!(
        !steps.is_empty() && steps.iter().all(|step| *step <= calm),
        "{names:?}, calm at {calm}"
    );
    assert!(
        !aside.is_empty(),
        "{names:?}: every step was saved until the line that told of the spike"
    );
    let next = (calm + 6).to_string();
    let finished = train(world()?, out, &[&arguments[..], &["--steps", &next]].concat())?.success()?;
    let newest = steps.iter().max().ok_or("no checkpoint")?;
    assert!(
        finished.stderr.contains(&format!("step-{newest:08}")),
        "{}",
        finished.stderr
    );
    Ok(())
}

fn no_success() -> Outcome {
    let folder = tempfile::tempdir()?;
    for (name, lr) in [("huge", "3e38"), ("large", "1e30")] {
        let out = folder.path().join(name);
        let finished = train(world()?, &out, &["--steps", "1", "--lr", lr])?;
        assert_eq!(finished.code, 1, "{}", finished.stderr);
        assert!(finished.stderr.contains("step 1 is not saved: "), "{}", finished.stderr);
        assert!(checkpoints(&out)?.is_empty());
    }
    Ok(())
}

fn refused() -> Outcome {
    let folder = tempfile::tempdir()?;
    let message = |arguments: &[&str]| -> Result<String, libtest_mimic::Failed> {
        let finished = train(world()?, folder.path(), arguments)?;
        assert_eq!(finished.code, 1, "{}", finished.stderr);
        Ok(finished.stderr)
    };
    let batch = message(&["--batch", "65536", "--size", "1024x1024"])?;
    assert!(
        batch.contains("training takes about ") && batch.contains("to spare: ") && batch.contains(" fits"),
        "{batch}"
    );
    let size = message(&["--size", "40x40"])?;
    assert!(size.contains("40x40 is not, 48x48 is"), "{size}");
    let policy = message(&["--policy", "lazers.*"])?;
    assert!(
        policy.contains("`lazers.*`") && policy.contains("fits no tensor"),
        "{policy}"
    );
    assert!(checkpoints(folder.path())?.is_empty());
    Ok(())
}
