//! A disk that takes no more.

use std::process::Command;

use l2p_tests::cli::{Finished, program};
use l2p_tests::{Outcome, Suite};

use super::{checkpoints, curve, delta, train, world};

pub fn register(suite: &mut Suite) {
    if cfg!(unix) {
        suite.cpu("runs::disk::a_full_disk_is_reported_and_the_old_checkpoint_stays", full);
    }
}

/// Kibibytes of the largest file that can be written: enough for logs, too little for a checkpoint.
const LIMIT: &str = "256";

fn full() -> Outcome {
    let (world, folder) = (world()?, tempfile::tempdir()?);
    let (out, whole) = (folder.path().join("run"), folder.path().join("whole"));
    train(world, &out, &["--steps", "4"])?.success()?;
    let before = delta(&out, "step-00000004")?;
    // The limit ends a write as a full disk does: with an error, once the signal that comes with it is ignored.
    let script = format!("trap '' XFSZ; ulimit -f {LIMIT}; exec \"$@\"");
    let mut limited = Command::new("bash");
    limited.args(["-c", &script, "bash"]).arg(program("l2p-train")?);
    limited.arg("--config").arg(world.path("train.toml"));
    limited.args(["--device", "cpu", "--out"]).arg(&out);
    let finished = Finished::from(&mut limited)?;
    assert_eq!(finished.code, 1, "{}", finished.stderr);
    let reported = finished.stderr.matches("note: no checkpoint: ").count();
    assert_eq!(reported, 1, "{}", finished.stderr);
    let last = finished.stderr.lines().last().unwrap_or_default();
    assert!(
        last.starts_with("error: ") && last.contains("step-00000012") && last.contains("safetensors"),
        "{last}"
    );
    assert_eq!(checkpoints(&out)?, ["step-00000004"]);
    assert!(delta(&out, "step-00000004")? == before);
    // With room again the run goes on from there.
    train(world, &out, &[])?.success()?;
    train(world, &whole, &[])?.success()?;
    assert_eq!(curve(&out)?, curve(&whole)?);
    Ok(())
}
