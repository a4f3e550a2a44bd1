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
    suite.cpu("data::synthesis::ranks_draw_what_one_draws", ranks);
    suite.cpu("data::synthesis::other_jobs_are_refused", refused);
    suite.cpu("data::synthesis::one_run_at_a_time", one_at_a_time);
    suite.cpu("data::synthesis::what_is_there_is_verified", verified);
    suite.cpu("data::synthesis::numbers_and_files_out_of_range", out_of_range);
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
        seed.contains(
            "line 1 is 000/000000.png of \"fox\" with seed 0, the prompts call for 000/000000.png of \"fox\" with seed 3"
        ),
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
    std::fs::write(folder.path().join("empty.jsonl"), "\n")?;
    let empty = folder.path().join("empty.jsonl").display().to_string();
    let empty = run(
        "l2p-data",
        ["synthesize", "--model", "m", "--prompts", &empty, "--out", "o"],
    )?;
    assert!(empty.stderr.contains("holds no prompts"), "{}", empty.stderr);
    Ok(())
}

/// Two runs in one folder, and one after another was killed.
fn one_at_a_time() -> Outcome {
    let folder = tempfile::tempdir()?;
    let out = folder.path().join("set");
    let arguments = ["--count", "20", "--out", "set"];
    let mut first = command(folder.path(), "cpu", &arguments)?
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let started = Instant::now();
    while lines(&out).map_or(0, |lines| lines.lines().count()) < 2 && started.elapsed() < Duration::from_secs(120) {
        std::thread::sleep(Duration::from_millis(2));
        assert!(first.try_wait()?.is_none(), "the program ended by itself");
    }
    let second = synthesize(folder.path(), "cpu", &arguments)?;
    let process = format!("l2p-data, process {}", first.id());
    first.kill()?;
    first.wait()?;
    assert_eq!(second.code, 1, "{}", second.stderr);
    assert!(
        second.stderr.contains("set: is in use by ") && second.stderr.contains(&process),
        "{}",
        second.stderr
    );
    // The dead hold nothing.
    let third = synthesize(folder.path(), "cpu", &["--count", "1", "--out", "set"])?.success()?;
    assert!(third.stdout.contains(" were there"), "{}", third.stdout);
    let all = lines(&out)?;
    let mut names: Vec<&str> = all.lines().collect();
    names.dedup();
    assert_eq!(names.len(), all.lines().count());
    Ok(())
}

/// Pictures that a crash, a copy or a hand left damaged are drawn again, and only these.
fn verified() -> Outcome {
    let folder = tempfile::tempdir()?;
    for format in ["png", "webp", "jpg"] {
        let out = folder.path().join(format);
        let arguments = ["--count", "2", "--format", format, "--out", format];
        synthesize(folder.path(), "cpu", &arguments)?.success()?;
        let path = |index: usize| out.join(format!("000/{index:06}.{format}"));
        let pictures = || {
            (0..6)
                .map(|index| std::fs::read(path(index)))
                .collect::<std::io::Result<Vec<_>>>()
        };
        let (whole, metadata) = (pictures()?, lines(&out)?);
        // Two cut, to a hundred bytes and to all but twenty, one gone, one of another size.
        std::fs::write(path(0), &whole[0][..100])?;
        std::fs::write(path(2), &whole[2][..whole[2].len() - 20])?;
        std::fs::remove_file(path(3))?;
        super::write_grey(&path(4), 16, 16, 90)?;
        // And what a killed run had begun to write.
        for name in ["000/.l2p-x.tmp", ".l2p-y.tmp"] {
            std::fs::write(out.join(name), "a part")?;
        }
        let kept = std::fs::metadata(path(1))?.modified()?;
        let again = synthesize(folder.path(), "cpu", &[&arguments[..], &["--json"]].concat())?.success()?;
        let report: serde_json::Value = serde_json::from_str(&again.stdout)?;
        let numbers = ["found", "drawn", "redrawn"].map(|key| report[key].as_u64());
        assert_eq!(numbers, [Some(2), Some(4), Some(4)], "{format}");
        assert!(pictures()? == whole && lines(&out)? == metadata, "{format}");
        assert_eq!(std::fs::metadata(path(1))?.modified()?, kept, "{format}");
        assert!(!out.join("000/.l2p-x.tmp").exists() && !out.join(".l2p-y.tmp").exists());
        // A part of a line at the end, and one in the middle, are not taken for lines.
        for cut in [metadata.len() - 1, metadata.len() - 30] {
            std::fs::write(out.join("metadata.jsonl"), &metadata[..cut])?;
            let again = synthesize(folder.path(), "cpu", &arguments)?.success()?;
            assert!(
                again.stdout.contains("1 pictures drawn") && again.stdout.contains("5 were there"),
                "{}",
                again.stdout
            );
            assert!(pictures()? == whole && lines(&out)? == metadata, "{format}");
        }
    }
    let other = lines(&folder.path().join("png"))?.replacen("000/000000.png", "../../other.png", 1);
    std::fs::write(folder.path().join("png/metadata.jsonl"), other)?;
    let refused = synthesize(
        folder.path(),
        "cpu",
        &["--count", "2", "--format", "png", "--out", "png"],
    )?;
    assert!(
        refused.stderr.contains("line 1 is ../../other.png of \"fox\""),
        "{}",
        refused.stderr
    );
    Ok(())
}

fn out_of_range() -> Outcome {
    let folder = tempfile::tempdir()?;
    for (arguments, message) in [
        (
            "--count 4294967296",
            "'--count <N>': expected a whole number from 1 to 1000000",
        ),
        (
            "--count -1",
            "'--count <N>': expected a whole number from 1 to 1000000, found `-1`",
        ),
        ("--limit 0", "'--limit <N>': expected a whole number from 1 to 1000000"),
        (
            "--batch 18446744073709551615",
            "'--batch <N>': expected a whole number from 1 to 65536",
        ),
        (
            "--width 65537",
            "'--width <PIXELS>': expected a whole number from 1 to 65536, found `65537`",
        ),
        (
            "--height 0",
            "'--height <PIXELS>': expected a whole number from 1 to 65536",
        ),
        ("--seed -1", "there is no random seed (-1 in other programs)"),
    ] {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        let finished = synthesize(folder.path(), "cpu", &[&arguments[..], &["--out", "o"]].concat())?;
        assert!(
            finished.code == 2 && finished.stderr.contains(message),
            "{message}\n{}",
            finished.stderr
        );
    }
    let line = "{\"prompt\": \"fox\"}\n";
    let with = |text: Vec<u8>, count: &str| -> Result<Finished, Failed> {
        std::fs::write(folder.path().join("p.jsonl"), text)?;
        let path = folder.path().join("p.jsonl").display().to_string();
        run(
            "l2p-data",
            [
                "synthesize",
                "--model",
                "m",
                "--out",
                "o",
                "--count",
                count,
                "--prompts",
                &path,
            ],
        )
    };
    let many = with(line.repeat(11).into_bytes(), "1000000")?;
    assert!(
        many.stderr
            .contains("11 prompts, 1000000 pictures of each (--count), are more than the 10000000 pictures"),
        "{}",
        many.stderr
    );
    let latin = with([line.as_bytes(), b"{\"prompt\": \"caf\xe9\"}\n"].concat(), "1")?;
    let word =
        "p.jsonl: is not UTF-8: line 2 has the byte 0xe9 (an older Windows or Latin encoding?); save it as UTF-8\n";
    assert!(latin.code == 1 && latin.stderr.ends_with(word), "{}", latin.stderr);
    let wide = with(b"\xff\xfe{\0}\0".to_vec(), "1")?;
    assert!(wide.stderr.contains("p.jsonl: is UTF-16 text"), "{}", wide.stderr);
    // What few mean gets a word.
    let zero = synthesize(folder.path(), "cpu", &["--cfg", "0", "--limit", "1", "--out", "zero"])?.success()?;
    assert!(
        zero.stderr.contains("note: cfg 0 ignores the prompt"),
        "{}",
        zero.stderr
    );
    Ok(())
}

/// In batches on a GPU, whose pictures differ from those drawn alone by no more than rounding.
/// Two ranks draw the set of one, bit for bit, also after one of them was killed on the way.
fn ranks() -> Outcome {
    let folder = tempfile::tempdir()?;
    let arguments = |out| ["--count", "3", "--seed", "9", "--batch", "1", "--out", out];
    synthesize(folder.path(), "cpu", &arguments("one"))?.success()?;
    let at = |name: &str| folder.path().join(name);
    let together = |out, ranks| [&arguments(out)[..], &["--ranks", ranks]].concat();
    let finished = synthesize(folder.path(), "cpu", &together("two", "2"))?.success()?;
    assert!(finished.stdout.contains("9 pictures drawn"), "{}", finished.stdout);
    let mut child = command(
        folder.path(),
        "cpu",
        &[&together("killed", "2")[..], &["--max-restarts", "1"]].concat(),
    )?
    .stdout(Stdio::null())
    .stderr(Stdio::piped())
    .spawn()?;
    let started = Instant::now();
    while lines(&at("killed")).map_or(0, |lines| lines.lines().count()) < 2
        && started.elapsed() < Duration::from_secs(60)
    {
        std::thread::sleep(Duration::from_millis(2));
        assert!(child.try_wait()?.is_none(), "the program ended by itself");
    }
    if cfg!(target_os = "linux") {
        let ranks = crate::runs::ranks::children(child.id())?;
        crate::runs::ranks::kill(ranks[1], "KILL")?;
    }
    let output = child.wait_with_output()?;
    let stderr = String::from_utf8(output.stderr)?;
    assert!(output.status.success(), "{stderr}");
    assert_eq!(
        stderr.contains("note: rank 1 was ended by signal 9; starting all ranks again"),
        cfg!(target_os = "linux"),
        "{stderr}"
    );
    for other in ["two", "killed"] {
        assert_eq!(lines(&at(other))?, lines(&at("one"))?);
        for number in 0..9 {
            let name = format!("000/{number:06}.png");
            assert!(
                std::fs::read(at(other).join(&name))? == std::fs::read(at("one").join(&name))?,
                "{other} {name}"
            );
        }
    }
    Ok(())
}

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
