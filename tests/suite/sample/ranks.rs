//! Pictures of several ranks, and pictures that are there already.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use l2p_engine::image_io::{RgbImage, WriteOptions, write_image};
use l2p_tests::cli::{Finished, program, under};
use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;
use serde_json::Value;

use super::{command, draw, names, run, try_draw, with_demo};
use crate::runs::ranks::{as_rank, children, free_port, kill};

pub fn register(suite: &mut Suite) {
    suite.cpu("sample::ranks::ranks_draw_what_one_draws", like_one);
    suite.cpu("sample::ranks::one_that_draws_for_long_is_not_lost", patience);
    suite.cpu("sample::ranks::what_ranks_cannot_share_is_refused", refused);
    suite.cpu("sample::ranks::pictures_that_are_there_are_kept_or_refused", kept);
    suite.cpu("sample::ranks::what_differs_between_ranks_is_named", disagreement);
    if cfg!(target_os = "linux") {
        suite.cpu("sample::ranks::an_error_of_one_ends_all", error);
        suite.cpu("sample::ranks::after_a_loss_the_missing_are_drawn", loss);
        suite.cpu("sample::ranks::a_signal_ends_all", signal);
    }
    suite.with_program("mpirun", "sample::ranks::under_mpirun", || under_launcher("mpirun"));
    suite.with_program("torchrun", "sample::ranks::under_torchrun", || {
        under_launcher("torchrun")
    });
}

const PROMPTS: &str = "{\"prompt\": \"fox\"}\n{\"prompt\": \"red apple\", \"seed\": 40, \"negative\": \"a house by the sea\"}\n\
                       {\"prompt\": \"house\", \"out\": \"named.png\"}\n";

/// The arguments for a list of prompts, which is written to `folder`.
fn listed<'a>(folder: &Path, arguments: &[&'a str]) -> Result<Vec<&'a str>, Failed> {
    std::fs::write(folder.join("prompts.jsonl"), PROMPTS)?;
    Ok([&["--prompts", "prompts.jsonl", "--seed", "9"], arguments].concat())
}

/// All pictures of a folder, by name.
fn pictures(folder: &Path) -> Result<Vec<(String, Vec<u8>)>, Failed> {
    let names = names(folder)?.into_iter();
    names
        .map(|name| Ok((name.clone(), std::fs::read(folder.join(name))?)))
        .collect()
}

fn like_one() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let arguments = |out: &'static str, ranks: &[&'static str]| -> Result<Finished, Failed> {
        let common = [
            "--count", "3", "--batch", "2", "--cfg", "2", "--report", "json", "--out", out,
        ];
        draw(folder, &listed(folder, &[&common, ranks].concat())?)
    };
    let alone = arguments("one/", &[])?;
    let together = arguments("three/", &["--ranks", "3"])?;
    assert!(pictures(&folder.join("three"))? == pictures(&folder.join("one"))?);
    assert_eq!(names(&folder.join("three"))?.len(), 9);
    // One rank speaks for all, and counts all.
    let (first, rest) = together.stderr.split_once('\n').ok_or("nothing is said")?;
    assert_eq!(
        first,
        "9 pictures 128x128 on 3 ranks, the first on cpu: 2 steps, shift 3, cfg 2"
    );
    let (_, expected) = alone.stderr.split_once('\n').ok_or("nothing is said")?;
    assert_eq!(rest, expected.replace("one/", "three/"));
    let report: Value = serde_json::from_str(&together.stdout)?;
    let expected: Value = serde_json::from_str(&alone.stdout.replace("one/", "three/"))?;
    assert_eq!(report["pictures"], expected["pictures"]);
    assert_eq!(report["pictures"].as_array().map(Vec::len), Some(9));
    let ranks = report["ranks"].as_array().ok_or("no word on the ranks")?;
    let drawn: Vec<Option<u64>> = ranks.iter().map(|rank| rank["pictures"].as_u64()).collect();
    assert_eq!(drawn, [Some(4), Some(3), Some(2)]);
    assert!(
        ranks.iter().all(|rank| rank["peak_bytes"].as_u64() > Some(0)),
        "{ranks:?}"
    );
    assert_eq!(expected["ranks"], Value::Null);

    // Numbers go on behind those that are there; ranks with nothing to draw wait for the others, and what is cut off is said once.
    let long = "apple, ".repeat(300);
    let one = [
        "--prompt", &long, "--count", "2", "--batch", "2", "--ranks", "3", "--out", "three",
    ];
    let more = draw(folder, &one)?;
    assert!(
        more.stderr
            .contains("note: with 2 at once only 1 of 3 ranks have something to draw\n"),
        "{}",
        more.stderr
    );
    assert!(
        more.stderr.ends_with("three/0007-0.png\nthree/0008-1.png\n"),
        "{}",
        more.stderr
    );
    let apart = draw(
        folder,
        &["--prompt", &long, "--count", "2", "--ranks", "2", "--out", "two/"],
    )?;
    assert_eq!(apart.stderr.matches("are cut off").count(), 1, "{}", apart.stderr);
    Ok(())
}

/// The second rank has nothing to draw and waits for several times its patience.
fn patience() -> Outcome {
    let folder = tempfile::tempdir()?;
    let started = Instant::now();
    let arguments = [
        "--prompt",
        "fox",
        "--ranks",
        "2",
        "--rank-timeout",
        "3",
        "--steps",
        "250",
    ];
    // So many that drawing takes longer than ranks wait, on any processor; what is between takes less even where others use it too.
    draw(folder.path(), &arguments)?;
    assert!(started.elapsed() > Duration::from_secs(3), "{:?}", started.elapsed());
    Ok(())
}

fn refused() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    for flags in [
        &["--noise", "n.safetensors"][..],
        &["--embeds", "e.safetensors"],
        &["--save-raw", "r.safetensors"],
        &["--profile"],
    ] {
        let message = format!(
            "{} is for one rank, but there are 2: leave it away, or draw without --ranks",
            flags[0]
        );
        let common = ["--prompt", "fox", "--out", "x.png"];
        try_draw(folder, &[&common, flags, &["--ranks", "2"]].concat())?.failure(1, &message)?;
        // As another launcher starts it, before it looks for the others.
        let arguments = with_demo(&[&common, flags].concat())?;
        let mut rank = command(folder, &arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
        Finished::from(as_rank(&mut rank, 1, 2, free_port()?))?.failure(1, &message)?;
        let both = try_draw(folder, &[&common, flags, &["--skip-existing"]].concat())?;
        assert!(
            both.code == 2 && both.stderr.contains("cannot be used with"),
            "{}",
            both.stderr
        );
    }
    let restarts = [
        "--prompt",
        "fox",
        "--out",
        "x.png",
        "--ranks",
        "2",
        "--max-restarts",
        "1",
    ];
    try_draw(folder, &restarts)?.failure(
        1,
        "--max-restarts would draw all pictures again: give --skip-existing too, so that those that are there stay",
    )?;
    assert!(names(folder)?.is_empty());
    // What is no drawing is not done by ranks.
    let mut devices = command(folder, &["devices"])?;
    Finished::from(as_rank(&mut devices, 1, 2, free_port()?))?.success()?;
    Ok(())
}

fn kept() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    const SMALL: [&str; 8] = ["--steps", "1", "--width", "32", "--height", "32", "--prompt", "fox"];
    let again = |arguments: &[&str]| try_draw(folder, &[&SMALL, arguments, &["--skip-existing"]].concat());
    for out in ["set/", "x.png", "y.jpg", "z.webp"] {
        let several = ["--count", "4", "--out", out];
        again(&several)?.success()?;
        let place = match out {
            "set/" => folder.join("set"),
            _ => folder.into(),
        };
        let stem = out.trim_end_matches(['/', '.', 'p', 'n', 'g', 'j', 'w', 'e', 'b']);
        let own = |all: Vec<(String, Vec<u8>)>| -> Vec<(String, Vec<u8>)> {
            let is_own = |name: &str| out == "set/" || name.starts_with(&format!("{stem}-"));
            all.into_iter().filter(|(name, _)| is_own(name)).collect()
        };
        let files = || -> Result<_, Failed> {
            let entries = place.read_dir()?.flatten().filter(|entry| entry.path().is_file());
            let read = |entry: std::fs::DirEntry| {
                Ok::<_, Failed>((entry.file_name().display().to_string(), std::fs::read(entry.path())?))
            };
            let mut all: Vec<_> = entries.map(read).collect::<Result<_, _>>()?;
            all.sort();
            Ok(own(all))
        };
        let whole = files()?;
        assert_eq!(whole.len(), 4, "{out}");
        // One gone, one cut off at its end, one no picture at all, one as it was.
        std::fs::remove_file(place.join(&whole[0].0))?;
        std::fs::write(place.join(&whole[1].0), &whole[1].1[..whole[1].1.len() - 20])?;
        std::fs::write(place.join(&whole[2].0), "no picture")?;
        let before = std::fs::metadata(place.join(&whole[3].0))?.modified()?;
        let finished = again(&[&several[..], &["--report", "json"]].concat())?.success()?;
        assert!(
            finished.stderr.contains("note: 1 of them are there, 3 missing\n"),
            "{}",
            finished.stderr
        );
        let report: Value = serde_json::from_str(&finished.stdout)?;
        assert_eq!(
            (report["skipped"].as_u64(), report["pictures"].as_array().map(Vec::len)),
            (Some(1), Some(3))
        );
        assert!(files()? == whole, "{out}");
        assert_eq!(std::fs::metadata(place.join(&whole[3].0))?.modified()?, before);
        // Then there is nothing left to do, and no model is loaded for it.
        let nothing = again(&[&several[..], &["--report", "json"]].concat())?.success()?;
        let report: Value = serde_json::from_str(&nothing.stdout)?;
        assert_eq!(
            (report["skipped"].as_u64(), &report["phases"]),
            (Some(4), &serde_json::json!([]))
        );
    }

    // What was drawn otherwise is neither taken for it nor overwritten.
    let set = folder.join("set");
    let before = pictures(&set)?;
    let otherwise = |arguments: &[&str], name: &str, reason: &str| -> Outcome {
        let finished = try_draw(folder, &[&["--skip-existing"], arguments].concat())?;
        let message =
            format!("error: {name}: is there, but {reason}: use another name, or draw without --skip-existing\n");
        assert!(finished.code == 1 && finished.stderr == message, "{}", finished.stderr);
        Ok(())
    };
    let frog = ["--width", "32", "--height", "32", "--prompt", "frog", "--out", "set/"];
    otherwise(
        &[&frog[..], &["--steps", "1"]].concat(),
        "set/0001-0.png",
        "was drawn with another prompt",
    )?;
    let more = [&SMALL[2..], &["--out", "set/"]].concat();
    otherwise(&more, "set/0001-0.png", "was drawn with another number of steps")?;
    let cfg = [&SMALL[..], &["--cfg", "1.5", "--out", "set/"]].concat();
    otherwise(&cfg, "set/0001-0.png", "was drawn with another cfg")?;
    let larger = [
        "--steps", "1", "--prompt", "fox", "--width", "48", "--height", "32", "--out",
    ];
    otherwise(
        &[&larger[..], &["y-0001.jpg"]].concat(),
        "y-0001.jpg",
        "of 32x32 pixels instead of 48x32",
    )?;
    assert!(pictures(&set)? == before);
    let grey = RgbImage::new(32, 32, vec![90; 32 * 32 * 3])?;
    write_image(&folder.join("mine.png"), &grey, &WriteOptions::default())?;
    let mine = [&SMALL[..], &["--out", "mine.png"]].concat();
    otherwise(&mine, "mine.png", "does not say what it was drawn with")
}

/// Starts two ranks by hand, each with arguments of its own and in a shell that first does what `first` says.
fn by_hand(folder: &Path, ranks: [(&str, &[&str]); 2]) -> Result<[Finished; 2], Failed> {
    let port = free_port()?;
    let mut started = Vec::new();
    for (rank, (first, arguments)) in ranks.into_iter().enumerate() {
        let mut command = Command::new("bash");
        command.args(["-c", &format!("{first} exec \"$@\""), "bash"]);
        command.arg(program("l2p-sample")?).args(with_demo(arguments)?);
        command.current_dir(folder).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        started.push(as_rank(&mut command, rank, 2, port).spawn()?);
    }
    let mut finished = started.into_iter().map(|child: Child| {
        let output = child.wait_with_output()?;
        Ok::<_, Failed>(Finished {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout)?,
            stderr: String::from_utf8(output.stderr)?,
        })
    });
    match (finished.next(), finished.next()) {
        (Some(first), Some(second)) => Ok([first?, second?]),
        _ => Err("two were started".into()),
    }
}

fn disagreement() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (fox, frog) = (["--prompt", "fox", "--out", "x/"], ["--prompt", "frog", "--out", "x/"]);
    for finished in by_hand(folder.path(), [("", &fox), ("", &frog)])? {
        assert_eq!(finished.code, 1, "{finished:?}");
        assert!(
            finished
                .stderr
                .contains("the settings of rank 1 differs from that of rank 0")
                && finished.stderr.contains("prompts, seeds and names"),
            "{}",
            finished.stderr
        );
    }
    assert!(names(folder.path())?.is_empty());
    Ok(())
}

/// Rank 1 has a disk that takes no picture.
fn error() -> Outcome {
    let folder = tempfile::tempdir()?;
    let arguments = ["--prompt", "fox", "--count", "200", "--out", "x/"];
    let full = "trap '' XFSZ; ulimit -f 4;";
    let [first, second] = by_hand(folder.path(), [("", &arguments), (full, &arguments)])?;
    let own = |stderr: &str| stderr.lines().last().unwrap_or_default().to_owned();
    assert!(first.code == 1 && second.code == 1, "{first:?}\n{second:?}");
    let (first, second) = (own(&first.stderr), own(&second.stderr));
    assert!(
        second.starts_with("error: x/") && second.ends_with("File too large (os error 27)"),
        "{second}"
    );
    let reason = second.trim_start_matches("error: ");
    assert!(
        first.starts_with("error: rank 1 on ") && first.ends_with(reason),
        "{first}"
    );
    assert!(names(folder.path())?.len() < 100);
    Ok(())
}

/// A program that draws, and has begun to.
fn drawing(folder: &Path, arguments: &[&str], least: usize) -> Result<Child, Failed> {
    let arguments = with_demo(arguments)?;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut child = command(folder, &arguments)?
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let started = Instant::now();
    while whole(folder)? < least {
        std::thread::sleep(Duration::from_millis(2));
        assert!(child.try_wait()?.is_none(), "the program ended by itself");
        assert!(started.elapsed() < Duration::from_secs(120), "nothing is drawn");
    }
    Ok(child)
}

/// The pictures that are there.
fn whole(folder: &Path) -> Result<usize, Failed> {
    Ok(names(folder)?.iter().filter(|name| name.ends_with(".png")).count())
}

fn ended(child: Child) -> Result<(Option<i32>, String), Failed> {
    let output = child.wait_with_output()?;
    Ok((output.status.code(), String::from_utf8(output.stderr)?))
}

fn loss() -> Outcome {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    for name in ["whole", "killed", "restarted"] {
        std::fs::create_dir(at(name))?;
    }
    let arguments = |more: &[&'static str]| {
        [
            &["--prompt", "fox", "--count", "24", "--steps", "3", "--out", "x/"],
            more,
        ]
        .concat()
    };
    draw(&at("whole"), &arguments(&[]))?;
    let expected = pictures(&at("whole").join("x"))?;
    assert_eq!(expected.len(), 24);

    // Without another start the loss is named, and what was drawn stays.
    let child = drawing(&at("killed"), &arguments(&["--ranks", "2"]), 4)?;
    kill(children(child.id())?[1], "KILL")?;
    let (code, stderr) = ended(child)?;
    assert_eq!(code, Some(137), "{stderr}");
    assert!(
        stderr.contains("error: rank 1 on ") && stderr.contains("was lost: "),
        "{stderr}"
    );
    let there = whole(&at("killed"))?;
    assert!((4..24).contains(&there), "{there}");
    let kept = std::fs::metadata(at("killed").join("x/0001-0.png"))?.modified()?;
    let rest = draw(&at("killed"), &arguments(&["--ranks", "3", "--skip-existing"]))?;
    let word = format!("note: {there} of them are there, {} missing\n", 24 - there);
    assert!(rest.stderr.contains(&word), "{word}{}", rest.stderr);
    let left = |name: &str| -> Result<_, Failed> {
        let mut left = pictures(&at(name).join("x"))?;
        left.retain(|(name, _)| !name.ends_with(".tmp"));
        Ok(left)
    };
    assert!(left("killed")? == expected);
    assert_eq!(std::fs::metadata(at("killed").join("x/0001-0.png"))?.modified()?, kept);

    let again = arguments(&["--ranks", "2", "--skip-existing", "--max-restarts", "1"]);
    let child = drawing(&at("restarted"), &again, 4)?;
    kill(children(child.id())?[0], "KILL")?;
    let (code, stderr) = ended(child)?;
    assert_eq!(code, Some(0), "{stderr}");
    assert!(
        stderr.contains("note: rank 0 was ended by signal 9; starting all ranks again (1 of 1)")
            && stderr.contains(" of them are there, "),
        "{stderr}"
    );
    assert!(left("restarted")? == expected);
    Ok(())
}

fn signal() -> Outcome {
    let arguments = [
        "--prompt", "fox", "--count", "2000", "--ranks", "3", "--steps", "3", "--out", "x/",
    ];
    // To the launcher, as a terminal sends it, and to one rank alone.
    for rank in [None, Some(1)] {
        let folder = tempfile::tempdir()?;
        let child = drawing(folder.path(), &arguments, 2)?;
        match rank {
            None => kill(child.id(), "INT")?,
            Some(rank) => kill(children(child.id())?[rank], "INT")?,
        }
        let asked = Instant::now();
        let (code, stderr) = ended(child)?;
        assert!(asked.elapsed() < Duration::from_secs(20));
        assert_eq!(code, Some(130), "{stderr}");
        let mut lines: Vec<&str> = stderr.lines().filter(|line| line.contains("error")).collect();
        lines.sort_unstable();
        assert_eq!(
            lines,
            [
                "error: interrupted",
                "rank 1: error: interrupted",
                "rank 2: error: interrupted"
            ]
        );
        let left = names(folder.path())?;
        assert!(
            left.iter().all(|name| name == "x" || name.ends_with(".png")),
            "{left:?}"
        );
    }
    Ok(())
}

/// Under another launcher, on two ranks.
fn under_launcher(launcher: &str) -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    draw(folder, &listed(folder, &["--out", "one/"])?)?;
    let arguments = with_demo(&listed(folder, &["--report", "json", "--out", "two/"])?)?;
    let mut command = under(launcher, 2, &program("l2p-sample")?);
    let finished = Finished::from(command.current_dir(folder).args(&arguments))?.success()?;
    assert!(pictures(&folder.join("two"))? == pictures(&folder.join("one"))?);
    assert!(
        finished
            .stderr
            .contains("3 pictures 128x128 on 2 ranks, the first on cpu"),
        "{}",
        finished.stderr
    );
    assert_eq!(
        finished.stdout.matches("\"pictures\": [").count(),
        1,
        "{}",
        finished.stdout
    );
    // An error of all ranks is one of the launcher.
    let missing = ["--prompt", "fox", "--model", "nowhere", "--device", "cpu"];
    let mut command = under(launcher, 2, &program("l2p-sample")?);
    let failed = Finished::from(command.current_dir(folder).args(missing))?;
    assert!(
        failed.code != 0 && failed.stderr.contains("error: nowhere"),
        "{}: {}",
        failed.code,
        failed.stderr
    );
    assert!(run(folder, &missing)?.code == 1);
    Ok(())
}
