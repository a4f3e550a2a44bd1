//! Ranks as processes: under this project's launcher, under others, and killed at moments that nobody can foresee.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use l2p_tests::cli::{Finished, program, under};
use l2p_tests::{Outcome, Suite, hash_uniform};
use libtest_mimic::Failed;
use serde_json::Value;

use crate::runs::ranks::{as_rank, free_port};

pub fn register(suite: &mut Suite) {
    suite.cpu("dist::processes::the_launcher_runs_all_ranks", launcher);
    suite.cpu("dist::processes::what_the_environment_says_is_checked", environment);
    if cfg!(unix) {
        suite.cpu("dist::processes::the_launcher_names_who_failed", failures);
        suite.cpu("dist::processes::the_launcher_starts_again", restarts);
        suite.cpu("dist::processes::losses_are_timed_and_judged", judged);
        suite.cpu("dist::processes::signals_are_passed_on", signals);
        suite.cpu("dist::processes::ranks_killed_at_random_moments_are_named", kills);
        suite.cpu("dist::processes::ranks_that_hang_or_stop_are_named", silent);
    }
    if cfg!(target_os = "linux") {
        suite.cpu("dist::processes::ranks_end_with_their_launcher", orphans);
    }
    suite.with_program("mpirun", "dist::processes::under_mpirun", mpirun);
    suite.with_program("torchrun", "dist::processes::under_torchrun", torchrun);
}

const CHECK: [&str; 5] = ["check", "--device", "cpu", "--sizes", "0,1,1000"];

fn ranks(arguments: &[&str]) -> Result<Command, Failed> {
    let mut command = Command::new(program("bench-ranks")?);
    command.args(arguments).stdin(Stdio::null());
    for name in ["RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "SLURM_STEP_ID"] {
        command.env_remove(name);
    }
    Ok(command)
}

fn launched(world: &str, arguments: &[&str]) -> Result<Finished, Failed> {
    Finished::from(&mut ranks(&[&["--ranks", world], arguments].concat())?)
}

fn launcher() -> Outcome {
    let finished = launched("3", &CHECK)?.success()?;
    assert!(
        finished
            .stdout
            .starts_with("3 ranks over tcp: every operation right at 6 sizes and types\n  rank 0: process "),
        "{}",
        finished.stdout
    );
    assert_eq!(finished.stdout.lines().count(), 4);
    assert_eq!(finished.stderr, "");

    let measured = ["--device", "cpu", "--sizes", "999", "--repeats", "2", "--json", "-"];
    let record: Value = serde_json::from_str(&launched("2", &measured)?.success()?.stdout)?;
    assert_eq!(
        (record["transport"].as_str(), record["checked"].as_u64()),
        (Some("tcp"), Some(2))
    );
    let rows = record["rows"].as_array().ok_or("there are no rows")?;
    assert_eq!(rows.len(), 10);
    for row in rows {
        assert_eq!(row["elements"], 1000);
        assert_eq!(row["samples_ms"].as_array().map(Vec::len), Some(2));
        assert!(
            row["gigabytes_per_second"].as_f64().is_some_and(|speed| speed > 0.0),
            "{row}"
        );
    }
    assert!(record["overlap"]["both_ms"].as_f64().is_some_and(|time| time > 0.0));
    Ok(())
}

fn environment() -> Outcome {
    let mut command = ranks(&CHECK)?;
    as_rank(&mut command, 4, 4, 1);
    Finished::from(&mut command)?.failure(1, "RANK is 4, but WORLD_SIZE is 4: ranks are counted from 0")?;
    let mut command = ranks(&CHECK)?;
    command.env("RANK", "0");
    let message = "RANK is set, but WORLD_SIZE is not: a launcher such as torchrun sets both; remove RANK to run alone";
    Finished::from(&mut command)?.failure(1, message)?;
    let mut command = ranks(&[&CHECK[..], &["--ranks", "3"]].concat())?;
    as_rank(&mut command, 0, 2, 1);
    let message = "--ranks asks for 3 ranks on this machine, but torchrun has started 2: leave --ranks away";
    Finished::from(&mut command)?.failure(1, message)?;
    // Alone, which is no error.
    let mut command = ranks(&CHECK)?;
    let stdout = Finished::from(&mut command)?.success()?.stdout;
    assert!(stdout.starts_with("1 rank over copies: "), "{stdout}");
    Ok(())
}

fn fault<'a>(fault: &'a str, timeout: &'a str) -> Vec<&'a str> {
    vec![
        "--device",
        "cpu",
        "--fault",
        fault,
        "--after",
        "0.3",
        "--rank-timeout",
        timeout,
    ]
}

fn failures() -> Outcome {
    let killed = "its connection closed without a word: killed, crashed, or its machine went down";
    for (what, code, lost, reason) in [
        ("kill:1", 137, 1, killed),
        ("kill:0", 137, 0, killed),
        ("fail:2", 1, 2, "it gave up: the disk is full"),
        ("fail:0", 1, 0, "it gave up: the disk is full"),
        ("panic:1", 101, 1, "it ended before the others"),
    ] {
        let finished = launched("3", &fault(what, "60"))?;
        assert_eq!(finished.code, code, "{what}: {finished:?}");
        let named =
            |line: &&str| line.contains(&format!("rank {lost} on ")) && line.ends_with(&format!("was lost: {reason}"));
        let count = finished.stderr.lines().filter(named).count();
        assert_eq!(count, 2, "{what}: {}", finished.stderr);
        let ended = if code == 137 {
            "was ended by signal 9".into()
        } else {
            format!("ended with exit code {code}")
        };
        // Which one ended first is not said where all end with the same code.
        let notes: Vec<&str> = finished
            .stderr
            .lines()
            .filter(|line| line.starts_with("note: rank "))
            .collect();
        assert_eq!(notes.len(), 1, "{what}: {}", finished.stderr);
        assert!(code == 101 || notes[0].ends_with(&ended), "{what}: {notes:?}");
    }
    Ok(())
}

/// What `bench-ranks faults` finds; all faults of it are tried on GPUs.
fn judged() -> Outcome {
    let arguments = ["faults", "--device", "cpu", "--fault", "kill:2", "--json", "-"];
    let finished = launched("3", &arguments)?.success()?;
    let record: Value = serde_json::from_str(&finished.stdout)?;
    let found = &record["faults"][0];
    assert_eq!(
        (found["fault"].as_str(), found["exit_code"].as_i64()),
        (Some("kill:2"), Some(137))
    );
    assert!(
        found["seconds"]
            .as_f64()
            .is_some_and(|seconds| (0.0..20.0).contains(&seconds)),
        "{found}"
    );
    assert!(
        found["line"]
            .as_str()
            .is_some_and(|line| line.contains("error: rank 2 on ")),
        "{found}"
    );
    // A rank that nobody loses is named by nobody.
    let finished = launched("2", &["faults", "--device", "cpu", "--fault", "kill:2"])?;
    assert_eq!(finished.code, 1, "{finished:?}");
    assert!(finished.stderr.contains("there is no rank 2 among 2"), "{finished:?}");
    for (arguments, message) in [
        (
            &["check", "--fault", "kill:0"][..],
            "--fault stands by itself, or with faults",
        ),
        (
            &["check", "faults"],
            "it is done by itself, without check, measure or overlap",
        ),
    ] {
        let finished = launched("2", &[arguments, &["--device", "cpu"]].concat())?;
        assert_eq!(finished.code, 1, "{finished:?}");
        assert!(finished.stderr.contains(message), "{finished:?}");
    }
    Ok(())
}

fn restarts() -> Outcome {
    let arguments = [&fault("kill:1", "60")[..], &["--max-restarts", "2"]].concat();
    let finished = launched("2", &arguments)?;
    assert_eq!(finished.code, 137, "{finished:?}");
    assert_eq!(finished.stdout, "exchanging\n".repeat(3));
    let notes: Vec<&str> = finished
        .stderr
        .lines()
        .filter(|line| line.starts_with("note: "))
        .collect();
    assert_eq!(
        notes,
        [
            "note: rank 1 was ended by signal 9; starting all ranks again (1 of 2)",
            "note: rank 1 was ended by signal 9; starting all ranks again (2 of 2)",
            "note: rank 1 was ended by signal 9",
        ]
    );
    // Arguments that make no sense make none the next time either.
    let finished = launched("2", &["--max-restarts", "2", "--sizes", "x"])?;
    assert_eq!(finished.code, 2, "{finished:?}");
    Ok(())
}

/// A child whose first line of standard output has come.
fn begun(mut command: Command) -> Result<Child, Failed> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut line = String::new();
    let stdout = child.stdout.as_mut().ok_or("standard output is piped")?;
    BufReader::new(stdout).read_line(&mut line)?;
    if line == "exchanging\n" {
        return Ok(child);
    }
    let output = child.wait_with_output()?;
    Err(format!("it did not begin: {line}{}", String::from_utf8_lossy(&output.stderr)).into())
}

fn send(name: &str, pid: u32) -> Outcome {
    let status = Command::new("sh")
        .args(["-c", &format!("kill -{name} {pid}")])
        .status()?;
    assert!(status.success());
    Ok(())
}

fn signals() -> Outcome {
    for name in ["TERM", "INT"] {
        let child = begun(ranks(&[&["--ranks", "3"], &fault("none", "60")[..]].concat())?)?;
        send(name, child.id())?;
        let output = child.wait_with_output()?;
        let stderr = String::from_utf8(output.stderr)?;
        assert_eq!(output.status.code(), Some(130), "{stderr}");
        let mut lines: Vec<&str> = stderr.lines().collect();
        lines.sort_unstable();
        assert_eq!(
            lines,
            [
                "error: interrupted",
                "rank 1: error: interrupted",
                "rank 2: error: interrupted"
            ]
        );
    }
    Ok(())
}

/// The processes whose parent is `parent`.
fn children(parent: u32) -> Result<Vec<u32>, Failed> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name().into_string().unwrap_or_default();
        let Ok(pid) = name.parse::<u32>() else { continue };
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // Behind the name, which may hold anything: state, parent.
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        let mut fields = fields.split_whitespace();
        if fields.next() != Some("Z") && fields.next() == Some(&parent.to_string()) {
            found.push(pid);
        }
    }
    Ok(found)
}

fn is_there(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit_once(')')
        .and_then(|(_, fields)| fields.split_whitespace().next());
    state.is_some_and(|state| state != "Z")
}

fn orphans() -> Outcome {
    let mut child = begun(ranks(&[&["--ranks", "2"], &fault("none", "60")[..]].concat())?)?;
    let ranks = children(child.id())?;
    assert_eq!(ranks.len(), 2);
    child.kill()?;
    child.wait()?;
    let end = Instant::now() + Duration::from_secs(20);
    while ranks.iter().any(|pid| is_there(*pid)) {
        assert!(Instant::now() < end, "ranks outlive their launcher");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Starts ranks as another launcher does.
fn started(world: usize, arguments: &[&str]) -> Result<Vec<Child>, Failed> {
    let port = free_port()?;
    let start = |number| {
        let mut command = ranks(arguments)?;
        as_rank(&mut command, number, world, port);
        Ok(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
    };
    (0..world).map(start).collect()
}

fn wait_for_begin(ranks: &mut [Child]) -> Outcome {
    let mut line = String::new();
    let stdout = ranks[0].stdout.as_mut().ok_or("standard output is piped")?;
    BufReader::new(stdout).read_line(&mut line)?;
    assert_eq!(line, "exchanging\n");
    Ok(())
}

/// Checks that all ranks but `lost` end with one line, and returns these.
fn survivors(ranks: Vec<Child>, lost: usize) -> Result<Vec<String>, Failed> {
    let mut lines = Vec::new();
    for (number, child) in ranks.into_iter().enumerate().filter(|(number, _)| *number != lost) {
        let output = child.wait_with_output()?;
        let stderr = String::from_utf8(output.stderr)?;
        assert_eq!(output.status.code(), Some(1), "rank {number}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "rank {number}: {stderr}");
        lines.push(stderr.trim_end().to_owned());
    }
    Ok(lines)
}

fn kills() -> Outcome {
    const KILLS: usize = 20;
    const WORLD: usize = 4;
    let moments = hash_uniform("moments of a rank's death", 2 * KILLS);
    for (number, moment) in moments.chunks_exact(2).enumerate() {
        let lost = number % WORLD;
        let timeouts = ["--start-timeout", "5"];
        let mut ranks = started(WORLD, &[&fault("none", "60")[..], &timeouts].concat())?;
        // Every fourth dies while ranks still look for each other, if it is quick enough.
        let early = number % 4 == 3;
        if !early {
            wait_for_begin(&mut ranks)?;
        }
        std::thread::sleep(Duration::from_secs_f32(0.15 * (moment[0] + 1.0)));
        ranks[lost].kill()?;
        let killed = Instant::now();
        ranks[lost].wait()?;
        for line in survivors(ranks, lost)? {
            let named = line.starts_with(&format!("error: rank {lost} on ")) && line.contains(" was lost: ");
            let missing = line.contains(&format!("rank {lost} of {WORLD} did not arrive at "))
                || line.contains(" did not reach rank 0 at ");
            assert!(named || (early && missing), "kill {number} of rank {lost}: {line}");
        }
        assert!(
            killed.elapsed() < Duration::from_secs(25),
            "kill {number}: {:?}",
            killed.elapsed()
        );
    }
    Ok(())
}

fn silent() -> Outcome {
    for (what, reason) in [
        ("hang:0", "it is one operation behind: rank "),
        ("hang:2", "it is one operation behind: rank "),
        ("stop:0", "nothing was heard of it for 2 s: "),
        ("stop:2", "nothing was heard of it for 2 s: "),
    ] {
        let lost: usize = what[5..].parse()?;
        // A stopped one is also behind; its silence is noticed first.
        let mut arguments = fault(what, "2");
        arguments.extend(["--start-timeout", "60"]);
        let mut ranks = started(3, &arguments)?;
        wait_for_begin(&mut ranks)?;
        let begun = Instant::now();
        let mut last = ranks.remove(lost);
        let lines = survivors(ranks, usize::MAX);
        let killed = last.kill();
        last.wait()?;
        killed?;
        for line in lines? {
            assert!(line.starts_with(&format!("error: rank {lost} on ")), "{what}: {line}");
            assert!(line.contains(&format!(" was lost: {reason}")), "{what}: {line}");
        }
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "{what}: {:?}",
            begun.elapsed()
        );
    }
    Ok(())
}

/// Checks what ranks print that another launcher has started, whatever it prints itself.
fn expect_checked(mut command: Command, world: usize) -> Outcome {
    let finished = Finished::from(&mut command)?.success()?;
    let expected = format!("{world} ranks over tcp: every operation right at 6 sizes and types");
    let count = finished.stdout.lines().filter(|line| line.ends_with(&expected)).count();
    assert_eq!(count, 1, "{}{}", finished.stdout, finished.stderr);
    Ok(())
}

fn mpirun() -> Outcome {
    let mut command = under("mpirun", 3, &program("bench-ranks")?);
    command.args(CHECK);
    expect_checked(command, 3)
}

fn torchrun() -> Outcome {
    let ours = program("bench-ranks")?;
    for arguments in [
        &["--standalone"][..],
        &[
            "--nnodes",
            "1",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
        ],
    ] {
        let mut command = Command::new("torchrun");
        command.args(arguments).args(["--no-python", "--nproc-per-node", "3"]);
        command.arg(&ours).args(CHECK);
        expect_checked(command, 3)?;
    }
    Ok(())
}
