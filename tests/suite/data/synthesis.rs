//! `l2p-data synthesize`.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use l2p_engine::Device;
use l2p_engine::data::{DataSet, Sizing};
use l2p_engine::image_io::read_image;
use l2p_tests::cli::{Finished, program, run};
use l2p_tests::{Outcome, Suite, models_folder};
use libtest_mimic::Failed;

pub fn register(suite: &mut Suite) {
    suite.cpu("data::synthesis::sets_are_drawn_continued_and_grown", on_the_cpu);
    suite.cuda("data::synthesis::many_at_once_on_cuda", on_cuda);
    suite.cpu("data::synthesis::other_jobs_are_refused", refused);
}

const PROMPTS: &str =
    "{\"prompt\": \"fox\", \"class\": \"animal\"}\n{\"text\": \"red apple\", \"seed\": 40}\n{\"prompt\": \"house\"}\n";

fn command(folder: &Path, device: &str, arguments: &[&str]) -> Result<Command, Failed> {
    std::fs::write(folder.join("prompts.jsonl"), PROMPTS)?;
    let mut command = Command::new(program("l2p-data")?);
    command.current_dir(folder).arg("synthesize").arg("--model");
    command.arg(models_folder().join("demo/source").canonicalize()?);
    command.args(["--prompts", "prompts.jsonl", "--device", device, "--steps", "2"]);
    command.args(arguments);
    Ok(command)
}

fn synthesize(folder: &Path, device: &str, arguments: &[&str]) -> Result<Finished, Failed> {
    Finished::from(&mut command(folder, device, arguments)?)
}

fn lines(folder: &Path) -> Result<String, Failed> {
    Ok(std::fs::read_to_string(folder.join("metadata.jsonl"))?)
}

fn on_the_cpu() -> Outcome {
    let folder = tempfile::tempdir()?;
    let whole = folder.path().join("whole");
    synthesize(folder.path(), "cpu", &["--count", "2", "--seed", "9", "--out", "whole"])?.success()?;
    let expected = [
        (0, "fox", 9),
        (1, "red apple", 40),
        (2, "house", 11),
        (3, "fox", 12),
        (4, "red apple", 41),
        (5, "house", 14),
    ];
    let expected = expected.map(|(index, prompt, seed)| {
        format!("{{\"file_name\":\"000/{index:06}.png\",\"prompt\":\"{prompt}\",\"seed\":{seed}}}\n")
    });
    assert_eq!(lines(&whole)?, expected.concat());
    let set = DataSet::open(&whole, &Sizing::MaxPixels(1 << 20), 16, 0.0, &mut |_, _| Ok(()))?;
    assert!(set.sizes().iter().all(|size| size.to_string() == "128x128"));
    // Each picture is the one that l2p-sample draws.
    let source = models_folder()
        .join("demo/source")
        .canonicalize()?
        .display()
        .to_string();
    let one = folder.path().join("one.png").display().to_string();
    let prompt = [
        "--model",
        &source,
        "--device",
        "cpu",
        "--steps",
        "2",
        "--prompt",
        "red apple",
        "--seed",
        "41",
    ];
    run("l2p-sample", [&prompt[..], &["--out", &one]].concat())?.success()?;
    assert!(read_image(Path::new(&one))?.pixels() == read_image(&whole.join("000/000004.png"))?.pixels());

    // Killed in the middle of the second copy, with a line half-written, and given again: the same set.
    let parted = folder.path().join("parted");
    let arguments = ["--count", "2", "--seed", "9", "--out", "parted"];
    let mut child = command(folder.path(), "cpu", &arguments)?
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let started = Instant::now();
    while lines(&parted).map_or(0, |lines| lines.lines().count()) < 3 && started.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(2));
        assert!(child.try_wait()?.is_none(), "the program ended by itself");
    }
    child.kill()?;
    child.wait()?;
    let cut = lines(&parted)?;
    std::fs::write(
        parted.join("metadata.jsonl"),
        format!("{}{}", expected[..2].concat(), &cut[cut.len() - 20..cut.len() - 1]),
    )?;
    let report = synthesize(folder.path(), "cpu", &[&arguments[..], &["--json"]].concat())?
        .success()?
        .stdout;
    let report: serde_json::Value = serde_json::from_str(&report)?;
    assert_eq!(
        (
            report["found"].as_u64(),
            report["drawn"].as_u64(),
            report["encoded"].as_u64()
        ),
        (Some(2), Some(4), Some(0))
    );
    assert_eq!(lines(&parted)?, lines(&whole)?);
    for index in 0..6 {
        let name = format!("000/{index:06}.png");
        assert!(
            std::fs::read(parted.join(&name))? == std::fs::read(whole.join(&name))?,
            "{name}"
        );
    }
    Ok(())
}

fn refused() -> Outcome {
    let folder = tempfile::tempdir()?;
    let first = ["--limit", "1", "--out", "set"];
    synthesize(folder.path(), "cpu", &first)?.success()?;
    let message = |arguments: &[&str]| -> Result<String, Failed> {
        let finished = synthesize(folder.path(), "cpu", arguments)?;
        assert_eq!(finished.code, 1, "{}", finished.stderr);
        Ok(finished.stderr)
    };
    let seed = message(&["--seed", "3", "--out", "set"])?;
    assert!(
        seed.contains("line 1 is \"fox\" with seed 0, the prompts call for \"fox\" with seed 3"),
        "{seed}"
    );
    let cfg = message(&["--cfg", "1", "--out", "set"])?;
    assert!(cfg.contains("drawn with another settings"), "{cfg}");
    let size = message(&["--width", "100", "--out", "other"])?;
    assert!(size.contains("use --width 112"), "{size}");
    // Given again, there is nothing left to do.
    let again = synthesize(folder.path(), "cpu", &first)?.success()?;
    assert!(
        again.stdout.contains("0 pictures drawn") && again.stdout.contains("1 were there"),
        "{}",
        again.stdout
    );
    let empty = run(
        "l2p-data",
        ["synthesize", "--model", "m", "--prompts", "/dev/null", "--out", "o"],
    )?;
    assert!(empty.stderr.contains("holds no prompts"), "{}", empty.stderr);
    Ok(())
}

/// In batches on a GPU, whose pictures differ from those drawn alone by no more than rounding.
fn on_cuda(_: &Device) -> Outcome {
    let folder = tempfile::tempdir()?;
    synthesize(folder.path(), "cuda", &["--count", "30", "--out", "many"])?.success()?;
    synthesize(folder.path(), "cuda", &["--count", "2", "--out", "few", "--batch", "1"])?.success()?;
    let (many, few) = (folder.path().join("many"), folder.path().join("few"));
    assert_eq!(lines(&many)?.lines().count(), 90);
    assert_eq!(
        lines(&many)?.lines().take(6).collect::<Vec<_>>(),
        lines(&few)?.lines().collect::<Vec<_>>()
    );
    for index in 0..6 {
        let name = format!("000/{index:06}.png");
        let (a, b) = (read_image(&many.join(&name))?, read_image(&few.join(&name))?);
        let squares = a.pixels().iter().zip(b.pixels());
        let squares = squares
            .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
            .sum::<f64>();
        let error = (squares / a.pixels().len() as f64).sqrt();
        assert!(error < 8.0, "{name}: {error} levels off");
    }
    Ok(())
}
