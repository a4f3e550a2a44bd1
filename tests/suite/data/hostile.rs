//! Folders of pictures that nobody would make: what can be used is, what cannot is named, and memory stays where it was.

use std::fmt::Write;
use std::path::Path;

use l2p_engine::data::{DataSet, Sizing};
use l2p_tests::cli::Finished;
use l2p_tests::{Outcome, Suite, models_folder};
use libtest_mimic::Failed;

use super::write_grey;
use crate::image_io::hostile;

pub fn register(suite: &mut Suite) {
    suite.cpu("data::hostile::headers_tell_them_apart", told_apart);
    #[cfg(unix)]
    suite.cpu("data::hostile::evaluated_within_two_gigabytes", evaluated);
    #[cfg(unix)]
    suite.cpu("data::hostile::trained_on_within_two_gigabytes", trained_on);
}

/// Pictures of the usual kind beside the others.
const PLAIN: usize = 30;

/// Those that can be used although they are odd.
const ODD: [&str; 2] = ["long.png", "long.webp"];

/// A set with every kind of hostile picture; returns the names of those that cannot be used.
fn write_set(folder: &Path) -> Result<Vec<&'static str>, Failed> {
    let path = |name: &str| folder.join(name);
    for index in 0..PLAIN {
        write_grey(&path(&format!("{index}.png")), 64, 64, 90)?;
    }
    hostile::write_long_png(&path("long.png"))?;
    hostile::write_long_webp(&path("long.webp"))?;
    hostile::write_huge_png(&path("huge.png"))?;
    hostile::write_lying_jpeg(&path("lying.jpg"), 65_500, 65_500)?;
    hostile::write_lying_jpeg(&path("taller.jpg"), 16_000, 16_000)?;
    hostile::write_png(&path("short.png"), [16_000; 2], [8, 2], |rows| {
        rows.write_all(&[0; 1000])
    })?;
    std::fs::write(path("text.png"), "no picture")?;
    let mut damaged = vec![
        "huge.png",
        "lying.jpg",
        "taller.jpg",
        "short.png",
        "text.png",
        "gone.png",
    ];
    if cfg!(target_os = "linux") {
        assert!(
            std::process::Command::new("mkfifo")
                .arg(path("pipe.png"))
                .status()?
                .success()
        );
        damaged.push("pipe.png");
    }
    let plain: Vec<String> = (0..PLAIN).map(|index| format!("{index}.png")).collect();
    let mut text = String::new();
    for name in plain
        .iter()
        .map(String::as_str)
        .chain(ODD)
        .chain(damaged.iter().copied())
    {
        writeln!(text, "{{\"image\":\"{name}\",\"prompt\":\"fox\"}}")?;
    }
    std::fs::write(path("metadata.jsonl"), text)?;
    Ok(damaged)
}

fn told_apart() -> Outcome {
    let folder = tempfile::tempdir()?;
    write_set(folder.path())?;
    let sizing = Sizing::Fixed("64x64".parse()?);
    let set = DataSet::open(folder.path(), &sizing, 16, 0.5, &mut |_, _| Ok(()))?;
    // Those whose headers are sound show when they are decoded.
    assert_eq!(set.records().len(), PLAIN + ODD.len() + 2);
    let fresh = set.damages().take_fresh();
    let reason = |name: &str| {
        let damage = fresh.iter().find(|damage| damage.what == name);
        damage.map_or_else(String::new, |damage| damage.reason.clone())
    };
    assert!(reason("huge.png").contains("60000x60000 pixels"), "{fresh:?}");
    assert!(reason("lying.jpg").contains("65500x65500 pixels"), "{fresh:?}");
    assert!(
        reason("text.png").contains("is not a PNG, JPEG or WebP picture"),
        "{fresh:?}"
    );
    assert!(reason("gone.png").contains("No such file"), "{fresh:?}");
    if cfg!(target_os = "linux") {
        assert!(reason("pipe.png").contains("is a pipe or device"), "{fresh:?}");
    }
    Ok(())
}

/// Runs `l2p-train` with the demo's latent model on the set, with no more than two gigabytes of address space: whatever asks for
/// more is aborted, as on a machine that has no more. Threads reserve some for themselves, so that a large machine must not start
/// one for each processor.
#[cfg(unix)]
fn train(folder: &Path, arguments: &[&str]) -> Result<Finished, Failed> {
    let mut shell = std::process::Command::new("sh");
    shell
        .current_dir(folder)
        .envs([("RAYON_NUM_THREADS", "4"), ("MALLOC_ARENA_MAX", "4")]);
    shell.args(["-c", "ulimit -v 2000000; exec \"$@\"", "sh"]);
    shell.arg(l2p_tests::cli::program("l2p-train")?).args(arguments);
    let model = models_folder().join("demo/source").canonicalize()?;
    shell.arg("--model").arg(model);
    shell.args(["--data", "set", "--size", "64x64", "--device", "cpu"]);
    shell.args(["--batch", "8", "--cache", "cache", "--workers", "2"]);
    Finished::from(&mut shell)
}

#[cfg(unix)]
fn evaluated() -> Outcome {
    let folder = tempfile::tempdir()?;
    std::fs::create_dir(folder.path().join("set"))?;
    let damaged = write_set(&folder.path().join("set"))?;
    let finished = train(folder.path(), &["evaluate", "--max-damaged", "0.5"])?.success()?;
    assert!(
        finished
            .stdout
            .ends_with(&format!(" on {} pictures\n", PLAIN + ODD.len())),
        "{}",
        finished.stdout
    );
    // None of them goes without a word.
    for name in damaged {
        let word = format!("note: damaged, skipped: {name}: ");
        assert_eq!(finished.stderr.matches(&word).count(), 1, "{name}\n{}", finished.stderr);
    }
    let few = train(folder.path(), &["evaluate", "--max-damaged", "0.1"])?;
    assert!(
        few.code == 1 && few.stderr.contains("entries of the data set are damaged"),
        "{} {}",
        few.code,
        few.stderr
    );
    Ok(())
}

#[cfg(unix)]
fn trained_on() -> Outcome {
    let folder = tempfile::tempdir()?;
    std::fs::create_dir(folder.path().join("set"))?;
    let damaged = write_set(&folder.path().join("set"))?;
    let arguments = [
        "--patch",
        "16",
        "--steps",
        "6",
        "--out",
        "run",
        "--max-damaged",
        "0.5",
        "--held-out",
        "0",
    ];
    let finished = train(folder.path(), &arguments)?.success()?;
    // A damaged picture never ends a run; six batches of eight are more than all there are.
    for name in damaged {
        assert!(
            finished.stderr.contains(&format!("damaged, skipped: {name}: ")),
            "{name}\n{}",
            finished.stderr
        );
    }
    Ok(())
}
