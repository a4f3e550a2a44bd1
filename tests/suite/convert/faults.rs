//! What `l2p-convert` says when it cannot do what it is asked for, and what it leaves behind: nothing.

use std::path::Path;
use std::process::Command;

use l2p_tests::cli::{Finished, program};
use l2p_tests::{Outcome, Suite};
use safetensors::Dtype;

use super::{names, run};
use crate::checkpoint::model;

pub fn register(suite: &mut Suite) {
    suite.cpu("convert::faults::wrong_usage_ends_with_2", wrong_usage_ends_with_2);
    suite.cpu("convert::faults::wrong_models_end_with_1", wrong_models_end_with_1);
    suite.cpu(
        "convert::faults::targets_are_not_overwritten",
        targets_are_not_overwritten,
    );
    suite.cpu(
        "convert::faults::unwritable_targets_are_named",
        unwritable_targets_are_named,
    );
    suite.cpu(
        "convert::faults::a_full_disk_leaves_nothing_behind",
        a_full_disk_leaves_nothing_behind,
    );
    suite.cpu(
        "convert::faults::an_interruption_leaves_nothing_behind",
        an_interruption_leaves_nothing_behind,
    );
    suite.cpu("convert::faults::beyond_f16_is_an_error", beyond_f16_is_an_error);
}

fn wrong_usage_ends_with_2() -> Outcome {
    let folder = tempfile::tempdir()?;
    for (arguments, message) in [
        ("", "Usage: l2p-convert"),
        ("inspekt m", "unrecognized subcommand 'inspekt'"),
        ("inspect", "<PATH>"),
        ("init --source a --out b", "--patch"),
        (
            "init --source a --patch 32 --out b",
            "[possible values: 16, 64, 128, 160]",
        ),
        (
            "init --source a --patch 16 --head-widths 1,x --out b",
            "expected a whole number from 1 to 262144, found `x`",
        ),
        ("export --in a --out b", "--layout"),
        (
            "export --in a --out b --layout plain --dtype int8",
            "[possible values: bf16, f16, f32]",
        ),
        (
            "export --in a --out b --layout plain --max-shard-size 4XB",
            "`XB` is no unit",
        ),
        ("merge --base a --out b", "--delta"),
    ] {
        let finished = run(folder.path(), arguments)?;
        assert_eq!(finished.code, 2, "{arguments}\n{}", finished.stderr);
        assert!(finished.stderr.contains(message), "{arguments}\n{}", finished.stderr);
    }
    Ok(())
}

fn wrong_models_end_with_1() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    model::save(&at("latent.safetensors"), &model::latent(Dtype::BF16))?;
    model::save(&at("pixel.safetensors"), &model::pixel(Dtype::BF16))?;
    model::save(&at("delta.safetensors"), &model::delta(Dtype::BF16))?;
    let mut lacking = model::latent(Dtype::BF16);
    lacking.remove("layers.0.attention.to_v.weight");
    model::save(&at("lacking.safetensors"), &lacking)?;
    let mut wrong_type = model::latent(Dtype::BF16);
    let number = model::Stored {
        dtype: Dtype::I64,
        shape: vec![1, model::DIM],
        bytes: vec![0; 8 * model::DIM],
    };
    wrong_type.insert("x_pad_token".into(), number);
    model::save(&at("wrong_type.safetensors"), &wrong_type)?;
    let before = names(folder.path())?;
    let lacks = "lacks 1 tensor of the model: `layers.0.attention.to_v.weight`";
    let delta_lacks = "is a delta, or damaged: it lacks `t_embedder`, `cap_embedder`, `x_pad_token`, `cap_pad_token` and 4 more; \
                       give the model that it was trained over with --base";
    for (arguments, message) in [
        (
            "inspect gone",
            "gone: No such file or directory (os error 2)".to_owned(),
        ),
        (
            "init --source gone --patch 16 --out o.safetensors",
            "gone: No such file or directory (os error 2)".into(),
        ),
        (
            "init --source lacking.safetensors --patch 16 --out o.safetensors",
            format!("lacking.safetensors: {lacks}"),
        ),
        (
            "init --source wrong_type.safetensors --patch 16 --out o.safetensors",
            "wrong_type.safetensors: tensor `x_pad_token` holds I64, which cannot be read; BF16, F16 and F32 can"
                .into(),
        ),
        (
            "init --source delta.safetensors --patch 16 --out o.safetensors",
            format!("delta.safetensors: {delta_lacks}"),
        ),
        (
            "init --source latent.safetensors --patch 16 --head-widths 1,2 --out o.safetensors",
            "head widths [1, 2] do not fit the 1k head, which has 4 stages, for example [32, 64, 128, 256]".into(),
        ),
        (
            "merge --base pixel.safetensors --delta latent.safetensors --out o.safetensors",
            "latent.safetensors: is a whole model, there is nothing to merge it with".into(),
        ),
        (
            "merge --base delta.safetensors --delta delta.safetensors --out o.safetensors",
            "delta.safetensors: is a delta, or damaged; the base must be a whole model".into(),
        ),
        (
            "merge --base lacking.safetensors --delta delta.safetensors --out o.safetensors",
            "lacking.safetensors: is a delta, or damaged; the base must be a whole model".into(),
        ),
        (
            "export --in pixel.safetensors --out o.safetensors --layout plain --max-shard-size 1MB",
            "o.safetensors: one file would be 2.15 MB, above --max-shard-size; name a folder instead".into(),
        ),
    ] {
        run(folder.path(), arguments)?.failure(1, &message)?;
    }
    assert_eq!(names(folder.path())?, before, "nothing was written");
    Ok(())
}

fn targets_are_not_overwritten() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    model::save(&at("m.safetensors"), &model::pixel(Dtype::BF16))?;
    std::fs::write(at("o.safetensors"), "mine")?;
    std::fs::create_dir_all(at("folder.safetensors"))?;
    std::fs::create_dir_all(at("home"))?;
    std::fs::write(at("home/letter.txt"), "mine")?;
    std::fs::create_dir_all(at("old"))?;
    std::fs::write(at("old/model.safetensors"), "mine")?;
    let export = |out: &str| {
        run(
            folder.path(),
            &format!("export --in m.safetensors --layout plain --out {out}"),
        )
    };
    export("o.safetensors")?.failure(1, "o.safetensors: is already there; replace it with --force")?;
    let message = "folder.safetensors: is a folder, expected the name of a file to write";
    export("folder.safetensors --force")?.failure(1, message)?;
    let message = "home: holds `letter.txt`, which is no part of a transformer; choose another folder";
    export("home --force")?.failure(1, message)?;
    export("old")?.failure(1, "old: is already there; replace it with --force")?;
    assert_eq!(std::fs::read_to_string(at("o.safetensors"))?, "mine");
    assert_eq!(std::fs::read_to_string(at("home/letter.txt"))?, "mine");
    assert_eq!(std::fs::read_to_string(at("old/model.safetensors"))?, "mine");
    export("o.safetensors --force")?.success()?;
    assert!(model::read(&at("o.safetensors"))? == model::pixel(Dtype::BF16));
    export("old --force")?.success()?;
    assert_eq!(
        names(&at("old"))?,
        ["config.json", "diffusion_pytorch_model.safetensors"]
    );
    assert_eq!(
        names(folder.path())?,
        ["folder.safetensors", "home", "m.safetensors", "o.safetensors", "old"]
    );
    Ok(())
}

fn unwritable_targets_are_named() -> Outcome {
    let folder = tempfile::tempdir()?;
    model::save(&folder.path().join("m.safetensors"), &model::pixel(Dtype::BF16))?;
    std::fs::write(folder.path().join("file"), "")?;
    for (out, reason) in [
        ("gone/o.safetensors", "No such file or directory (os error 2)"),
        ("gone/folder", "No such file or directory (os error 2)"),
        ("file/o.safetensors", "Not a directory (os error 20)"),
    ] {
        let arguments = format!("export --in m.safetensors --layout plain --out {out}");
        run(folder.path(), &arguments)?.failure(1, &format!("{out}: {reason}"))?;
    }
    #[cfg(unix)]
    run(
        folder.path(),
        "export --in m.safetensors --layout plain --out /dev/null/o.safetensors --force",
    )?
    .failure(1, "/dev/null/o.safetensors: Not a directory (os error 20)")?;
    Ok(())
}

/// Runs the program where no file can grow beyond 512 kB, which fails as a full disk does, in the midst of writing.
#[cfg(unix)]
fn run_without_room(folder: &Path, arguments: &str) -> Result<Finished, libtest_mimic::Failed> {
    let program = program("l2p-convert")?;
    let script = format!("trap '' XFSZ; ulimit -f 1000; exec {} {arguments}", program.display());
    Finished::from(Command::new("sh").current_dir(folder).args(["-c", &script]))
}

#[cfg(unix)]
fn a_full_disk_leaves_nothing_behind() -> Outcome {
    let folder = tempfile::tempdir()?;
    model::save(&folder.path().join("m.safetensors"), &model::pixel(Dtype::BF16))?;
    std::fs::write(folder.path().join("o.safetensors"), "mine")?;
    let before = names(folder.path())?;
    for (out, message) in [
        (
            "o.safetensors",
            "o.safetensors: no room for 2.16 MB: File too large (os error 27)",
        ),
        (
            "new.safetensors",
            "new.safetensors: no room for 2.16 MB: File too large (os error 27)",
        ),
        ("folder", "folder: no room for 2.16 MB: File too large (os error 27)"),
    ] {
        let arguments = format!("export --in m.safetensors --layout plain --force --out {out}");
        run_without_room(folder.path(), &arguments)?.failure(1, message)?;
        assert_eq!(names(folder.path())?, before, "{out}");
    }
    let arguments = "quantize m.safetensors --to int8 --force --out o.safetensors";
    let message = "o.safetensors: no room for 1.77 MB: File too large (os error 27)";
    run_without_room(folder.path(), arguments)?.failure(1, message)?;
    assert_eq!(names(folder.path())?, before);
    assert_eq!(std::fs::read_to_string(folder.path().join("o.safetensors"))?, "mine");
    Ok(())
}

#[cfg(not(unix))]
fn a_full_disk_leaves_nothing_behind() -> Outcome {
    Ok(())
}

/// Ctrl-C in the midst of writing.
#[cfg(unix)]
fn an_interruption_leaves_nothing_behind() -> Outcome {
    use std::time::{Duration, Instant};
    let folder = tempfile::tempdir()?;
    let large = model::stored("w", Dtype::F16, &[1 << 20]);
    let tensors = (0..100)
        .map(|index| (format!("layers.{index}.ffn_norm1.weight"), large.clone()))
        .collect();
    model::save(&folder.path().join("m.safetensors"), &tensors)?;
    let child = Command::new(program("l2p-convert")?)
        .current_dir(folder.path())
        .args("export --in m.safetensors --out o.safetensors --layout plain --dtype f32".split(' '))
        .stderr(std::process::Stdio::piped())
        .spawn()?;
    let started = Instant::now();
    while names(folder.path())?.len() < 2 && started.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let signal = Command::new("sh")
        .args(["-c", &format!("kill -INT {}", child.id())])
        .status()?;
    assert!(signal.success());
    let output = child.wait_with_output()?;
    assert_eq!(
        output.status.code(),
        Some(130),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(String::from_utf8_lossy(&output.stderr), "error: interrupted\n");
    assert_eq!(names(folder.path())?, ["m.safetensors"]);
    Ok(())
}

#[cfg(not(unix))]
fn an_interruption_leaves_nothing_behind() -> Outcome {
    Ok(())
}

fn beyond_f16_is_an_error() -> Outcome {
    let folder = tempfile::tempdir()?;
    let mut tensors = model::pixel(Dtype::F32);
    let name = "layers.1.ffn_norm1.weight";
    let mut changed = tensors[name].clone();
    changed.bytes[8..12].copy_from_slice(&70000f32.to_le_bytes());
    tensors.insert(name.into(), changed);
    model::save(&folder.path().join("m.safetensors"), &tensors)?;
    run(
        folder.path(),
        "export --in m.safetensors --layout plain --dtype f16 --out o.safetensors",
    )?
    .failure(
        1,
        &format!("m.safetensors: tensor `{name}` holds 70000, which is beyond F16"),
    )?;
    assert_eq!(names(folder.path())?, ["m.safetensors"]);
    Ok(())
}
