//! Every way to lose a rank, one after the other, with ranks started anew for each: who notices, how soon, and what they say.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use l2p_engine::Device;
use serde::Serialize;

use super::{Arguments, Fault};
use crate::environment::Environment;
use crate::record::write_json;

/// How long ranks wait for one that hangs.
const PATIENCE: u32 = 5;

/// Seconds of exchange before it happens.
const AFTER: f64 = 1.0;

/// The longest that all ranks may take to notice, to end, and to be ended by their launcher.
const LONGEST: Duration = Duration::from_secs(120);

/// What became of the ranks.
#[derive(Debug, Serialize)]
struct Row {
    fault: String,
    ranks: usize,
    /// From the fault to the first line that names the lost rank.
    seconds: f64,
    exit_code: Option<i32>,
    /// That line.
    line: String,
}

#[derive(Serialize)]
struct Record {
    environment: Environment,
    /// The seconds that ranks wait for one that hangs.
    rank_timeout: u32,
    faults: Vec<Row>,
}

/// Loses the first and the last rank in every way, or one in the way asked for.
///
/// # Errors
/// When a lost rank is not named by all others, or the run counts as a success.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let ranks = arguments.ranks.ranks.map_or(1, |ranks| ranks.get());
    ensure!(
        ranks > 1,
        "faults: there must be ranks that can be lost: say --ranks N with at least 2"
    );
    ensure!(
        arguments.parts.len() == 1,
        "faults: ranks are started anew for each; it is done by itself, without check, measure or overlap"
    );
    let mut faults = Vec::new();
    let all = match arguments.fault {
        Some(fault) => vec![fault],
        None => Fault::all(&[0, ranks - 1]),
    };
    for fault in all {
        let row = lose(arguments, fault, ranks).with_context(|| format!("--fault {fault}"))?;
        if arguments.shows() {
            l2p_bins::print(&format!("{:<9} {:>7.3} s  {}\n", row.fault, row.seconds, row.line))?;
        }
        faults.push(row);
    }
    if let Some(path) = &arguments.json {
        let record = Record {
            environment: Environment::of(&Device::open(arguments.device)?),
            rank_timeout: PATIENCE,
            faults,
        };
        write_json(path, &record)?;
    }
    Ok(())
}

/// Starts ranks, of which one is lost, and judges what the others print.
fn lose(arguments: &Arguments, fault: Fault, ranks: usize) -> anyhow::Result<Row> {
    let lost = fault.rank().context("nothing happens to any rank")?;
    let fault = fault.to_string();
    let mut command = Command::new(std::env::current_exe().context("cannot find this program to start it again")?);
    command
        .args(["--ranks", &ranks.to_string(), "--device", &arguments.device.to_string()])
        .args(["--rank-timeout", &PATIENCE.to_string(), "--fault", &fault])
        .args(["--after", &AFTER.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().context("cannot start ranks")?;
    let (sender, lines) = mpsc::channel();
    let stdout = child.stdout.take().context("standard output is piped")?;
    let stderr = child.stderr.take().context("standard error is piped")?;
    let begun = sender.clone();
    std::thread::spawn(move || send_lines(BufReader::new(stdout), &begun));
    std::thread::spawn(move || send_lines(BufReader::new(stderr), &sender));
    let (mut begun, mut named, mut all) = (None, Vec::new(), Vec::new());
    let end = Instant::now() + LONGEST;
    loop {
        match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok((when, line)) if line == "exchanging" => begun = Some(when),
            Ok((when, line)) => {
                if line.contains(&format!("rank {lost} on ")) && line.contains(" was lost: ") {
                    named.push((when, line.clone()));
                }
                all.push(line);
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                // Its ranks end with it.
                let _ = child.kill();
                let _ = child.wait();
                anyhow::bail!(
                    "ranks have not ended within {} s: {}",
                    LONGEST.as_secs(),
                    all.join(" | ")
                );
            }
        }
    }
    let exit_code = child.wait()?.code();
    let all = all.join(" | ");
    let begun = begun.with_context(|| format!("ranks have not begun: {all}"))?;
    ensure!(exit_code != Some(0), "the run counts as a success: {all}");
    ensure!(
        named.len() >= ranks - 1,
        "{} of {} ranks have named the lost one: {all}",
        named.len(),
        ranks - 1
    );
    let (first, line) = named.swap_remove(0);
    let seconds = (first - begun).as_secs_f64() - AFTER;
    Ok(Row {
        fault,
        ranks,
        seconds,
        exit_code,
        line,
    })
}

/// Sends each line with when it came, until the output ends.
fn send_lines(output: impl BufRead, to: &mpsc::Sender<(Instant, String)>) {
    for line in output.lines().map_while(Result::ok) {
        if to.send((Instant::now(), line)).is_err() {
            return;
        }
    }
}
