//! A run's folder: held by one run at a time, cleared up after those that were killed, checked for what a disk did to it.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;

use super::{checkpoints, command, curve, delta, has_begun, l2p_train, train, world};

pub fn register(suite: &mut Suite) {
    suite.cpu("runs::folder::one_run_at_a_time", locked);
    suite.cpu("runs::folder::leftovers_of_kills_are_cleared_up", leftovers);
    suite.cpu("runs::folder::a_flipped_bit_in_a_checkpoint_is_found", flipped_state);
    suite.cpu(
        "runs::folder::a_flipped_bit_in_the_initial_model_is_mended",
        flipped_init,
    );
    suite.cpu("runs::folder::a_run_never_begins_anew_over_checkpoints", none_usable);
}

fn locked() -> Outcome {
    let folder = tempfile::tempdir()?;
    let out = folder.path().join("run");
    let many = ["--steps", "100000", "--validate-every", "0", "--save-every", "1"];
    let mut first = command(world()?, &out, &many)?
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let started = Instant::now();
    while !has_begun(&out) && started.elapsed() < Duration::from_secs(60) {
        assert!(first.try_wait()?.is_none(), "the program ended by itself");
        std::thread::sleep(Duration::from_millis(5));
    }
    let second = train(world()?, &out, &["--steps", "3"])?;
    let running = first.try_wait()?.is_none();
    first.kill()?;
    first.wait()?;
    assert!(running, "the first run was disturbed");
    let named = format!("is in use by l2p-train, process {}", first.id());
    assert!(second.code == 1 && second.stderr.contains(&named), "{}", second.stderr);
    // A dead holder holds nothing.
    let steps = curve(&out)?.last().ok_or("no interval")?.0 + 2;
    train(world()?, &out, &["--steps", &steps.to_string()])?.success()?;
    assert!(!out.join(".l2p-lock").exists());
    Ok(())
}

fn leftovers() -> Outcome {
    let folder = tempfile::tempdir()?;
    let out = folder.path();
    std::fs::create_dir_all(out.join("samples"))?;
    std::fs::create_dir_all(out.join("checkpoints/.step-ab12.tmp"))?;
    let left = [
        ".init.safetensors.ab12cd.tmp",
        ".l2p-ab12cd.tmp",
        "samples/.l2p-ef34.tmp",
        "checkpoints/.step-ab12.tmp/state.safetensors",
    ];
    let kept = ["notes.tmp", ".l2p-notes", "init.safetensors.tmp"];
    for name in left.iter().chain(&kept) {
        std::fs::write(out.join(name), [0; 64])?;
    }
    train(world()?, out, &["--steps", "1", "--validate-every", "0"])?.success()?;
    for name in left {
        assert!(!out.join(name).exists(), "{name} is still there");
    }
    for name in kept {
        assert!(out.join(name).exists(), "{name} is gone");
    }
    Ok(())
}

/// Flips a bit of a file, about in the middle.
fn flip(path: &Path) -> Outcome {
    let mut bytes = std::fs::read(path)?;
    let middle = bytes.len() / 2 + 3;
    bytes[middle] ^= 1 << 2;
    std::fs::write(path, bytes)?;
    Ok(())
}

fn flipped_state() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (out, whole) = (folder.path().join("run"), folder.path().join("whole"));
    train(world()?, &out, &["--steps", "8", "--ema", "0.9"])?.success()?;
    train(world()?, &whole, &["--ema", "0.9"])?.success()?;
    let newest = out.join("checkpoints/step-00000008");
    flip(&newest.join("state.safetensors"))?;
    // By name it is refused; of itself the run takes the one before.
    let named = train(
        world()?,
        &out,
        &["--ema", "0.9", "--resume", &newest.display().to_string()],
    )?;
    assert!(
        named.code == 1 && named.stderr.contains("(checksum)"),
        "{}",
        named.stderr
    );
    let finished = train(world()?, &out, &["--ema", "0.9"])?.success()?;
    for word in [
        "step-00000008/state.safetensors: is damaged on the disk",
        "refused-step-00000008",
        "continuing from",
        "step-00000004",
    ] {
        assert!(
            finished.stderr.contains(word),
            "{word} is missing from {}",
            finished.stderr
        );
    }
    assert_eq!(curve(&out)?, curve(&whole)?);
    assert_eq!(
        checkpoints(&out)?,
        ["refused-step-00000008", "step-00000008", "step-00000012"]
    );
    assert!(delta(&out, "step-00000012")? == delta(&whole, "step-00000012")?);
    // The trained tensors alone are no reason to go back, but nothing is made of them.
    for file in ["delta.safetensors", "ema.safetensors"] {
        flip(&out.join("checkpoints/step-00000012").join(file))?;
    }
    let finished = train(world()?, &out, &["--ema", "0.9", "--steps", "14"])?.success()?;
    for file in ["delta.safetensors", "ema.safetensors"] {
        let told = format!("step-00000012/{file} is missing or damaged on the disk");
        assert!(finished.stderr.contains(&told), "{}", finished.stderr);
    }
    let at = |name: &str| folder.path().join(name).display().to_string();
    for more in [&[][..], &["--average"]] {
        let package = ["package", &at("run/checkpoints/step-00000012"), "--out", &at("model")];
        let packaged = l2p_train(&[&package[..], more].concat())?;
        assert!(
            packaged.code == 1 && packaged.stderr.contains("(checksum)"),
            "{}",
            packaged.stderr
        );
    }
    Ok(())
}

fn flipped_init() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (out, whole) = (folder.path().join("run"), folder.path().join("whole"));
    let scratch = |out: &Path, steps: &str| -> Result<String, Failed> {
        let arguments = ["--init", "scratch", "--policy", "paper:1", "--steps", steps];
        Ok(train(world()?, out, &arguments)?.success()?.stderr)
    };
    scratch(&out, "4")?;
    scratch(&whole, "8")?;
    let init = out.join("init.safetensors");
    let before = std::fs::read(&init)?;
    flip(&init)?;
    let told = scratch(&out, "8")?;
    assert!(told.contains("init.safetensors is damaged on the disk"), "{told}");
    assert!(std::fs::read(&init)? == before);
    assert_eq!(curve(&out)?, curve(&whole)?);
    assert!(delta(&out, "step-00000008")? == delta(&whole, "step-00000008")?);
    Ok(())
}

fn none_usable() -> Outcome {
    let folder = tempfile::tempdir()?;
    let out = folder.path();
    train(world()?, out, &["--steps", "4"])?.success()?;
    let state = out.join("checkpoints/step-00000004/state.safetensors");
    let bytes = std::fs::read(&state)?;
    std::fs::write(&state, &bytes[..bytes.len() / 2])?;
    let log = std::fs::read(out.join("log.jsonl"))?;
    let finished = train(world()?, out, &[])?;
    assert_eq!(finished.code, 1, "{}", finished.stderr);
    assert!(
        finished.stderr.contains("none of the 1 checkpoints can be used: ")
            && finished.stderr.contains("state.safetensors"),
        "{}",
        finished.stderr
    );
    assert!(std::fs::read(out.join("log.jsonl"))? == log, "the log was begun anew");
    assert_eq!(checkpoints(out)?, ["step-00000004"]);
    Ok(())
}
