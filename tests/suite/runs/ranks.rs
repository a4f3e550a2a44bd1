//! Runs on several ranks, under this project's launcher: the losses of one rank, whoever dies on the way, and however many go on.

use std::ffi::OsString;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use l2p_engine::train::run::checkpoint::Checkpoint;
use l2p_tests::cli::{Finished, program, under};
use l2p_tests::{Outcome, Suite, expect_close, hash_uniform, models_folder};
use libtest_mimic::Failed;

use super::{checkpoints, command, curve, delta, train, validation, world};

pub fn register(suite: &mut Suite) {
    suite.cpu("runs::ranks::four_ranks_train_like_one", like_one);
    suite.cpu("runs::ranks::what_differs_between_ranks_is_named", disagreement);
    suite.cpu("runs::ranks::damage_on_one_rank_is_known_to_all", damage);
    if cfg!(target_os = "linux") {
        suite.cpu("runs::ranks::the_demo_goes_on_after_a_loss_and_with_fewer_ranks", demo);
        suite.cpu("runs::ranks::killed_at_random_moments_a_run_goes_on", kills);
        suite.cpu("runs::ranks::a_signal_stops_all_after_saving", signal);
    }
    suite.with_program("mpirun", "runs::ranks::the_demo_under_mpirun", || {
        under_launcher("mpirun")
    });
    suite.with_program("torchrun", "runs::ranks::the_demo_under_torchrun", || {
        under_launcher("torchrun")
    });
}

/// A step, its loss and its norm.
type Interval = (u64, Option<f64>, Option<f64>);

/// Losses and norms, step by step.
fn numbers(out: &Path) -> Result<[Vec<f32>; 3], Failed> {
    let curve = curve(out)?;
    let column = |value: fn(&Interval) -> f32| curve.iter().map(value).collect();
    Ok([
        column(|row| row.0 as f32),
        column(|row| row.1.unwrap_or(f64::NAN) as f32),
        column(|row| row.2.unwrap_or(f64::NAN) as f32),
    ])
}

/// Checks that two runs have the same losses but for the order of sums in f32.
fn expect_same_run(found: &Path, expected: &Path) -> Outcome {
    let ([steps, losses, norms], [other_steps, other_losses, other_norms]) = (numbers(found)?, numbers(expected)?);
    assert_eq!(steps, other_steps);
    expect_close("losses", &losses, &other_losses, [losses.len()], 1e-4)?;
    expect_close("norms", &norms, &other_norms, [norms.len()], 1e-3)?;
    let (found, expected) = (validation(found)?, validation(expected)?);
    assert_eq!(found.len(), expected.len());
    for ((step, loss), (other_step, other)) in found.into_iter().zip(expected) {
        assert!(
            step == other_step && (loss - other).abs() < 1e-4 * other,
            "{step}: {loss} {other}"
        );
    }
    Ok(())
}

fn like_one() -> Outcome {
    let folder = tempfile::tempdir()?;
    let out = |name: &str| folder.path().join(name);
    let common = ["--ema", "0.9", "--log-every", "1"];
    let run = |name: &str, arguments: &[&str]| -> Result<Finished, Failed> {
        train(world()?, &out(name), &[&common[..], arguments].concat())?.success()
    };
    run("alone", &["--accumulate", "4"])?;
    let printed = run("sharded", &["--ranks", "4"])?;
    // One rank speaks for all.
    assert_eq!(printed.stderr.matches("step 12/12").count(), 1, "{}", printed.stderr);
    assert!(!printed.stderr.contains("rank 1"), "{}", printed.stderr);
    expect_same_run(&out("sharded"), &out("alone"))?;
    run("whole", &["--ranks", "4", "--shard", "none"])?;
    assert_eq!(curve(&out("sharded"))?, curve(&out("whole"))?);
    let last = "step-00000012";
    assert!(delta(&out("sharded"), last)? == delta(&out("whole"), last)?);
    let ema = |name: &str| std::fs::read(out(name).join("checkpoints").join(last).join("ema.safetensors"));
    assert!(ema("sharded")? == ema("whole")?);
    let files = |name: &str| -> Result<Vec<String>, Failed> {
        let entries = out(name).join("checkpoints").join(last).read_dir()?;
        let mut names: Vec<String> = entries
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<std::io::Result<_>>()?;
        names.retain(|name| name.starts_with("state"));
        names.sort();
        Ok(names)
    };
    assert_eq!(files("whole")?, ["state.safetensors"]);
    assert_eq!(
        files("sharded")?,
        [
            "state-00001-of-00004.safetensors",
            "state-00002-of-00004.safetensors",
            "state-00003-of-00004.safetensors",
            "state.safetensors"
        ]
    );

    // From a checkpoint of four ranks, divided or not, any number goes on; one loses a part, none does.
    for (name, from, ranks) in [
        ("two", "sharded", &["--ranks", "2", "--accumulate", "2"][..]),
        ("three of one", "alone", &["--ranks", "4"]),
        ("one", "sharded", &["--accumulate", "4"]),
        ("undivided", "sharded", &["--ranks", "4", "--shard", "none"]),
    ] {
        let middle = out(from).join("checkpoints/step-00000008").display().to_string();
        run(name, &[&["--resume", &middle], ranks].concat())?;
        let (found, whole) = (numbers(&out(name))?, numbers(&out("alone"))?);
        let expected = whole.map(|column| column[column.len() - 4..].to_vec());
        for (found, expected) in found.iter().zip(&expected) {
            expect_close(name, found, expected, [4], 1e-3)?;
        }
    }
    let part = out("sharded").join("checkpoints/step-00000012/state-00002-of-00004.safetensors");
    std::fs::remove_file(part)?;
    let cut = out("sharded").join("checkpoints/step-00000012").display().to_string();
    let refused = train(world()?, &out("cut"), &[&common[..], &["--resume", &cut]].concat())?;
    assert!(
        refused.code == 1 && refused.stderr.contains("state-00002-of-00004.safetensors"),
        "{}",
        refused.stderr
    );
    Ok(())
}

/// A port that nobody listens at.
pub fn free_port() -> Result<u16, Failed> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// A rank's environment as torchrun sets it, for ranks of this machine that meet at `port`.
pub fn as_rank(command: &mut Command, rank: usize, world: usize, port: u16) -> &mut Command {
    command.envs([
        ("RANK", rank.to_string()),
        ("LOCAL_RANK", rank.to_string()),
        ("WORLD_SIZE", world.to_string()),
        ("LOCAL_WORLD_SIZE", world.to_string()),
        ("MASTER_ADDR", "127.0.0.1".to_owned()),
        ("MASTER_PORT", port.to_string()),
    ])
}

/// Two ranks that were started by hand.
fn disagreement() -> Outcome {
    let folder = tempfile::tempdir()?;
    let port = free_port()?;
    let start = |rank: usize, rate: &str| -> Result<_, Failed> {
        let mut command = command(world()?, &folder.path().join("run"), &["--lr", rate])?;
        let command = as_rank(&mut command, rank, 2, port).stdout(Stdio::null());
        Ok(command.stderr(Stdio::piped()).spawn()?)
    };
    let ranks = [start(0, "1e-3")?, start(1, "2e-3")?];
    for child in ranks {
        let output = child.wait_with_output()?;
        let stderr = String::from_utf8(output.stderr)?;
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(
            stderr.contains("the configuration of rank 1 differs from that of rank 0")
                && stderr.contains("\"lr\": 0.002"),
            "{stderr}"
        );
    }
    Ok(())
}

/// A damaged picture is told once; too many of them end the run on all ranks with one error and what was trained saved.
fn damage() -> Outcome {
    let folder = tempfile::tempdir()?;
    let data = folder.path().join("data");
    super::write_pictures(&data, 24)?;
    let cut = |index: usize| -> Outcome {
        let path = data.join(format!("{index:03}.png"));
        let bytes = std::fs::read(&path)?;
        Ok(std::fs::write(&path, &bytes[..bytes.len() / 2])?)
    };
    cut(3)?;
    let path = data.display().to_string();
    let arguments = [
        "--data",
        &path,
        "--held-out",
        "0",
        "--ranks",
        "3",
        "--batch",
        "1",
        "--log-every",
        "1",
    ];
    let some = [&arguments[..], &["--max-damaged", "0.1", "--steps", "20"]].concat();
    let finished = train(world()?, &folder.path().join("some"), &some)?.success()?;
    assert_eq!(finished.stderr.matches("003.png").count(), 1, "{}", finished.stderr);
    (4..9).try_for_each(cut)?;
    let out = folder.path().join("many");
    let many = [&arguments[..], &["--max-damaged", "0.1", "--steps", "20"]].concat();
    let finished = train(world()?, &out, &many)?;
    assert_eq!(finished.code, 1, "{}", finished.stderr);
    assert!(
        finished.stderr.contains("entries of the data set are damaged"),
        "{}",
        finished.stderr
    );
    Ok(())
}

/// The ranks of a launcher, by rank.
pub fn children(launcher: u32) -> Result<Vec<u32>, Failed> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // Processes come and go.
        let (Ok(stat), Ok(environment)) = (
            std::fs::read_to_string(entry.path().join("stat")),
            std::fs::read(entry.path().join("environ")),
        ) else {
            continue;
        };
        let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1));
        let rank = environment.split(|byte| *byte == 0).find_map(|line| {
            std::str::from_utf8(line)
                .ok()?
                .strip_prefix("RANK=")?
                .parse::<usize>()
                .ok()
        });
        if let (true, Some(rank)) = (parent == Some(&launcher.to_string()), rank) {
            found.push((rank, pid));
        }
    }
    found.sort_unstable();
    Ok(found.into_iter().map(|(_, pid)| pid).collect())
}

pub fn kill(pid: u32, signal: &str) -> Outcome {
    let status = Command::new("sh")
        .args(["-c", &format!("kill -{signal} {pid}")])
        .status()?;
    // It may have ended by itself just now.
    let _ = status;
    Ok(())
}

fn newest(out: &Path) -> Result<u64, Failed> {
    let names = checkpoints(out)?;
    let steps = names.iter().filter_map(|name| name.strip_prefix("step-")?.parse().ok());
    Ok(steps.max().unwrap_or(0))
}

/// Waits until a run has a checkpoint of step `least` or later.
fn wait_for(out: &Path, least: u64, child: &mut std::process::Child) -> Outcome {
    let started = Instant::now();
    while newest(out)? < least {
        assert!(
            started.elapsed() < Duration::from_secs(240),
            "no checkpoint of step {least}"
        );
        if child.try_wait()?.is_some() {
            let mut stderr = String::new();
            if let Some(pipe) = &mut child.stderr {
                pipe.read_to_string(&mut stderr)?;
            }
            return Err(format!("the run ended by itself:\n{stderr}").into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// The arguments for a run of the demo that logs and saves often.
fn demo_arguments(cache: &str, out: &Path) -> Vec<OsString> {
    let mut arguments = vec![
        "--config".into(),
        models_folder().join("demo/train.toml").into_os_string(),
    ];
    let flags = "--device cpu --batch 1 --log-every 1 --save-every 2 --sample-every 0 --validate-every 0 --cache";
    arguments.extend(flags.split(' ').chain([cache]).map(OsString::from));
    arguments.extend(["--out".into(), out.as_os_str().to_owned()]);
    arguments
}

/// The demo on two ranks that another launcher has started, bit for bit as under this project's own.
fn under_launcher(launcher: &str) -> Outcome {
    let folder = tempfile::tempdir()?;
    let out = |name: &str| folder.path().join(name);
    let cache = out("cache").display().to_string();
    let mut own = Command::new(program("l2p-train")?);
    own.args(demo_arguments(&cache, &out("own")))
        .args(["--steps", "3", "--ranks", "2"]);
    Finished::from(&mut own)?.success()?;
    let train = |name: &str, arguments: &[&str]| -> Result<Finished, Failed> {
        let mut command = under(launcher, 2, &program("l2p-train")?);
        command.args(demo_arguments(&cache, &out(name))).args(arguments);
        Finished::from(&mut command)
    };
    let finished = train("other", &["--steps", "3"])?.success()?;
    assert_eq!(finished.stderr.matches("step 3/3").count(), 1, "{}", finished.stderr);
    assert_eq!(curve(&out("own"))?.len(), 3);
    assert_eq!(curve(&out("other"))?, curve(&out("own"))?);
    let last = "step-00000003";
    assert!(delta(&out("other"), last)? == delta(&out("own"), last)?);
    // It goes on there too, and what one rank refuses ends the launcher.
    train("other", &["--steps", "4"])?.success()?;
    assert_eq!(curve(&out("other"))?.len(), 4);
    let refused = train("refused", &["--steps", "3", "--ranks", "5"])?;
    assert!(
        refused.code != 0 && refused.stderr.contains("--ranks asks for 5 ranks on this machine"),
        "{}: {}",
        refused.code,
        refused.stderr
    );
    Ok(())
}

/// The demo on four ranks, of which one is killed and all are started again, then on two: the losses of an unbroken run.
fn demo() -> Outcome {
    let folder = tempfile::tempdir()?;
    let out = |name: &str| folder.path().join(name);
    let cache = out("cache").display().to_string();
    let start = |name: &str, arguments: &[&str]| -> Result<_, Failed> {
        let mut command = Command::new(program("l2p-train")?);
        command.args(demo_arguments(&cache, &out(name))).args(arguments);
        Ok(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?)
    };
    let unbroken = start("unbroken", &["--accumulate", "4", "--steps", "8"])?.wait_with_output()?;
    assert!(
        unbroken.status.success(),
        "{}",
        String::from_utf8_lossy(&unbroken.stderr)
    );

    let mut broken = start("broken", &["--ranks", "4", "--steps", "100", "--max-restarts", "1"])?;
    wait_for(&out("broken"), 2, &mut broken)?;
    kill(children(broken.id())?[2], "KILL")?;
    wait_for(&out("broken"), 4, &mut broken)?;
    kill(broken.id(), "TERM")?;
    let broken = broken.wait_with_output()?;
    let stderr = String::from_utf8(broken.stderr)?;
    assert_eq!(broken.status.code(), Some(130), "{stderr}");
    assert!(
        stderr.contains("note: rank 2 was ended by signal 9; starting all ranks again (1 of 1)"),
        "{stderr}"
    );
    let step = Checkpoint::newest(&out("broken"))?.0.ok_or("no checkpoint")?.state.step;
    let last = step.max(8).to_string();
    let rest = ["--ranks", "2", "--accumulate", "2", "--steps", &last];
    let rest = start("broken", &rest)?.wait_with_output()?;
    let stderr = String::from_utf8(rest.stderr)?;
    assert!(rest.status.success() && stderr.contains("continuing from"), "{stderr}");
    let ([steps, losses, norms], [_, expected, expected_norms]) =
        (numbers(&out("broken"))?, numbers(&out("unbroken"))?);
    assert!(
        steps.iter().take(8).copied().eq((1..9).map(|step| step as f32)),
        "{steps:?}"
    );
    expect_close("losses", &losses[..8], &expected, [8], 1e-4)?;
    expect_close("norms", &norms[..8], &expected_norms, [8], 1e-3)?;
    Ok(())
}

/// Some rank is killed at 20 moments; all start again, and in the end everything is as if nothing had happened.
fn kills() -> Outcome {
    const KILLS: usize = 20;
    let folder = tempfile::tempdir()?;
    let (parted, whole) = (folder.path().join("parted"), folder.path().join("whole"));
    let saving = [
        "--save-every",
        "1",
        "--validate-every",
        "0",
        "--log-every",
        "1",
        "--ranks",
        "2",
    ];
    let restarts = KILLS.to_string();
    let many = [&saving[..], &["--steps", "100000", "--max-restarts", &restarts]].concat();
    let mut child = command(world()?, &parted, &many)?
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    for (number, wait) in hash_uniform("moments of a rank's death", KILLS).into_iter().enumerate() {
        let least = newest(&parted)? + 1;
        wait_for(&parted, least, &mut child)?;
        std::thread::sleep(Duration::from_secs_f32(0.02 * (wait + 1.0)));
        let (_, refused) = Checkpoint::newest(&parted)?;
        assert!(refused.is_empty(), "{refused:?}");
        kill(children(child.id())?[number % 2], "KILL")?;
    }
    let least = newest(&parted)? + 1;
    wait_for(&parted, least, &mut child)?;
    kill(child.id(), "TERM")?;
    let output = child.wait_with_output()?;
    let stderr = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert_eq!(stderr.matches("starting all ranks again").count(), KILLS, "{stderr}");
    let steps = (newest(&parted)? + 2).to_string();
    let last = [&saving[..], &["--steps", &steps]].concat();
    train(world()?, &parted, &last)?.success()?;
    train(world()?, &whole, &last)?.success()?;
    assert_eq!(curve(&parted)?, curve(&whole)?);
    let name = checkpoints(&whole)?.pop().ok_or("no checkpoint")?;
    assert!(delta(&parted, &name)? == delta(&whole, &name)?);
    Ok(())
}

/// A signal that reaches one rank alone, as some launchers send it.
fn signal() -> Outcome {
    let folder = tempfile::tempdir()?;
    let out = folder.path().join("run");
    let arguments = [
        "--ranks",
        "3",
        "--save-every",
        "1",
        "--steps",
        "100000",
        "--validate-every",
        "0",
    ];
    let mut child = command(world()?, &out, &arguments)?
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    wait_for(&out, 2, &mut child)?;
    kill(children(child.id())?[1], "TERM")?;
    let output = child.wait_with_output()?;
    let stderr = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    let saved = Checkpoint::newest(&out)?.0.ok_or("there is no checkpoint")?;
    assert_eq!(saved.state.ranks, 3);
    let logged = curve(&out)?.last().map_or(0, |row| row.0);
    assert!(saved.state.step >= logged, "{} {logged}", saved.state.step);
    Ok(())
}
