//! Losses that are no numbers, and losses that explode.

use l2p_engine::train::run::log::{Record, read};
use l2p_tests::{Outcome, Suite};

use super::{checkpoints, intervals, train, world};

pub fn register(suite: &mut Suite) {
    suite.cpu("runs::divergence::steps_that_are_not_finite_are_skipped", skipped);
    suite.cpu("runs::divergence::a_loss_that_explodes_stops_the_run", explodes);
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

fn refused() -> Outcome {
    let folder = tempfile::tempdir()?;
    let message = |arguments: &[&str]| -> Result<String, libtest_mimic::Failed> {
        let finished = train(world()?, folder.path(), arguments)?;
        assert_eq!(finished.code, 1, "{}", finished.stderr);
        Ok(finished.stderr)
    };
    let batch = message(&["--batch", "5000000"])?;
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
