//! `bench-serve`: many clients of one `l2p-serve`, some of which leave half-way and some of which send nonsense.

mod client;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use l2p_engine::limits::{Batch, Pictures, Side, Steps, Threads};
use l2p_engine::{Device, DeviceChoice};
use serde::Serialize;
use serde_json::{Value, json};

use crate::children::beside;
use crate::environment::Environment;
use crate::record::{Record, write_json};
use client::{Address, Asked, Outcome};

const HELP: &str = "\
Examples:
  bench-serve                                             the demo on the CPU, 1000 requests of 32 clients
  bench-serve --model z-image --requests 200 --side 1024  a server of its own on the GPU
  bench-serve --url 127.0.0.1:7860 --json serve.json      a server that runs already

Every request is a picture with a prompt and a seed of its own out of --seeds, asked for through the page's interface. Checked: each
picture has the bytes that its prompt and seed give when they are drawn alone; each request has exactly one end; nonsense gets
a 4xx; the server's memory in the last quarter is that of the second. Leaving clients cut the connection after their first step.";

/// Loads a server with requests, and checks what it answers.
#[derive(Parser, Debug)]
#[command(name = "bench-serve", version, after_help = HELP)]
pub struct Arguments {
    /// The address of a server that runs already [default: one is started]
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "model")]
    url: Option<String>,
    /// The model of the server that is started
    #[arg(long, value_name = "DIR|FILE", default_value = "models/demo/pixel")]
    model: PathBuf,
    /// Requests
    #[arg(long, value_name = "N", default_value = "1000")]
    requests: Pictures,
    /// Clients at a time
    #[arg(long, value_name = "N", default_value = "32")]
    clients: Threads,
    /// Pixels of a side
    #[arg(long, value_name = "PIXELS", default_value = "64")]
    side: Side,
    /// Denoising steps
    #[arg(long, value_name = "N", default_value = "4")]
    steps: Steps,
    /// Different seeds
    #[arg(long, value_name = "N", default_value = "16")]
    seeds: Batch,
    /// One of so many requests is given up half-way
    #[arg(long, value_name = "N", default_value = "10")]
    leaving: Batch,
    /// One of so many requests is nonsense
    #[arg(long, value_name = "N", default_value = "10")]
    nonsense: Batch,
    /// A record of bench-step of the same model on the same device: the rate is compared with what its steps alone would give
    #[arg(long, value_name = "FILE")]
    step: Option<PathBuf>,
    /// Flags for the server that is started, behind --
    #[arg(last = true)]
    flags: Vec<String>,
    /// Write the record to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A server that was started here.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What was measured.
#[derive(Serialize)]
struct Measured {
    pictures: usize,
    refused_nonsense: usize,
    left: usize,
    seconds: f64,
    pictures_per_second: f64,
    /// From a request to its picture, in seconds.
    latency: Quantiles,
    /// From a request to its first preview.
    first_preview: Quantiles,
    /// Resident bytes of the server when each quarter of the requests was done.
    resident_bytes: Vec<u64>,
}

#[derive(Serialize)]
struct Quantiles {
    count: usize,
    p50: f64,
    p90: f64,
    p99: f64,
    most: f64,
}

impl Quantiles {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let place = ((values.len() as f64 * share).ceil() as usize).clamp(1, values.len().max(1)) - 1;
            values.get(place).copied().unwrap_or(0.0)
        };
        Quantiles {
            count: values.len(),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            most: at(1.0),
        }
    }
}

impl Measured {
    /// What requests that ended so within so many seconds come to.
    fn of(outcomes: Vec<Outcome>, seconds: f64, resident_bytes: Vec<u64>) -> Self {
        let (mut latency, mut first, mut refused, mut left) = (Vec::new(), Vec::new(), 0, 0);
        for outcome in outcomes {
            match outcome {
                Outcome::Picture { seconds, preview, .. } => {
                    latency.push(seconds);
                    first.extend(preview);
                }
                Outcome::Refused => refused += 1,
                Outcome::Left => left += 1,
            }
        }
        Measured {
            pictures: latency.len(),
            refused_nonsense: refused,
            left,
            seconds,
            pictures_per_second: latency.len() as f64 / seconds,
            latency: Quantiles::of(latency),
            first_preview: Quantiles::of(first),
            resident_bytes,
        }
    }
}

/// Runs the benchmark.
///
/// # Errors
/// When the server cannot be reached, or answers anything but what it should.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let (server, address) = match &arguments.url {
        Some(url) => (None, Address(url.clone())),
        None => {
            let (server, address) = start(arguments)?;
            (Some(server), address)
        }
    };
    let process = server.as_ref().map(|server| server.0.id());
    let expected: Vec<String> = (0..arguments.seeds.get())
        .map(|seed| match address.draw(&asked(arguments, seed), false)? {
            Outcome::Picture { bytes, .. } => Ok(bytes),
            other => bail!("the server does not draw: {other:?}"),
        })
        .collect::<anyhow::Result<_>>()?;
    let measured = load(arguments, &address, &expected, process)?;
    l2p_bins::print(&table(arguments, &measured))?;
    let alone = arguments
        .step
        .as_deref()
        .map(|path| steps_alone(path, arguments.steps.get()))
        .transpose()?;
    if let Some(alone) = alone {
        let share = measured.pictures_per_second / alone;
        l2p_bins::print(&format!("steps alone would give {alone:.3}/s: {share:.3} of it\n"))?;
    }
    if let [_, second, .., last] = measured.resident_bytes[..] {
        ensure!(
            last as f64 <= second as f64 * 1.1 + 32e6,
            "the server's memory grows: {second} bytes after a half, {last} at the end"
        );
    }
    if let Some(path) = &arguments.json {
        write_json(path, &record(arguments, &address, &measured, alone)?)?;
    }
    Ok(())
}

/// Starts a server beside this program.
fn start(arguments: &Arguments) -> anyhow::Result<(Server, Address)> {
    let program = beside("l2p-serve")?;
    let queue = (4 * arguments.clients.get()).to_string();
    let mut command = Command::new(&program);
    command
        .arg("--model")
        .arg(&arguments.model)
        .args(["--port", "0", "--queue", &queue, "--log", "json"]);
    command.args(&arguments.flags).env("RUST_LOG", "warn");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let child = command.spawn();
    let child = child.with_context(|| format!("{} cannot be started", program.display()))?;
    let mut server = Server(child);
    let mut lines = BufReader::new(server.0.stderr.take().context("no standard error")?).lines();
    let mut said = String::new();
    let address = loop {
        let Some(line) = lines.next().transpose()? else {
            bail!("the server has ended: {}", said.trim());
        };
        if let Some(address) = line
            .strip_prefix("listening at http://")
            .and_then(|rest| rest.strip_suffix('/'))
        {
            break Address(address.to_owned());
        }
        said += &line;
    };
    std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| l2p_bins::say(&line)));
    let started = Instant::now();
    while address.status("/readyz")? != 200 {
        ensure!(
            started.elapsed() < Duration::from_secs(600),
            "the server does not become ready"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok((server, address))
}

/// What the request of a seed asks for.
fn asked(arguments: &Arguments, seed: usize) -> Asked {
    const WORDS: [&str; 5] = [
        "fox",
        "slice of pizza",
        "red apple",
        "smiling face with sunglasses",
        "green car",
    ];
    Asked {
        prompt: WORDS[seed % WORDS.len()].into(),
        seed,
        side: arguments.side.get(),
        steps: arguments.steps.get(),
    }
}

/// Pictures a second of so many steps of the only model of a record of bench-step, one after the other.
fn steps_alone(path: &Path, steps: usize) -> anyhow::Result<f64> {
    let record = Record::read(path)?;
    match &record.rows[..] {
        [row] => Ok(1e3 / (row.timing.milliseconds * steps as f64)),
        rows => bail!(
            "{}: a record of one step is needed, it has {}",
            path.display(),
            rows.len()
        ),
    }
}

/// Sends all requests.
fn load(
    arguments: &Arguments,
    address: &Address,
    expected: &[String],
    process: Option<u32>,
) -> anyhow::Result<Measured> {
    let requests = arguments.requests.get();
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let outcomes = Mutex::new(Vec::with_capacity(requests));
    let resident = Mutex::new(BTreeMap::new());
    let start = Instant::now();
    let client = || -> anyhow::Result<()> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= requests {
                return Ok(());
            }
            let seed = number % expected.len();
            let outcome = if number % arguments.nonsense.get() == 3 % arguments.nonsense.get() {
                address.nonsense(number)?
            } else {
                let leaves = number % arguments.leaving.get() == 7 % arguments.leaving.get();
                address.draw(&asked(arguments, seed), leaves)?
            };
            if let Outcome::Picture { bytes, .. } = &outcome {
                ensure!(
                    *bytes == expected[seed],
                    "request {number} has another picture than seed {seed} gives"
                );
            }
            outcomes
                .lock()
                .map_err(|_| anyhow::anyhow!("a client panicked"))?
                .push(outcome);
            let done = 1 + done.fetch_add(1, Ordering::Relaxed);
            if let Some(process) = process.filter(|_| (4 * done).is_multiple_of(requests) || done == requests) {
                let bytes = resident_bytes(process)?;
                resident
                    .lock()
                    .map_err(|_| anyhow::anyhow!("a client panicked"))?
                    .insert(done, bytes);
            }
        }
    };
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..arguments.clients.get()).map(|_| scope.spawn(client)).collect();
        clients.into_iter().try_for_each(|client| match client.join() {
            Ok(outcome) => outcome,
            Err(_) => bail!("a client panicked"),
        })
    })?;
    let outcomes = outcomes
        .into_inner()
        .map_err(|_| anyhow::anyhow!("a client panicked"))?;
    ensure!(
        outcomes.len() == requests,
        "{} of {requests} requests have an end",
        outcomes.len()
    );
    let resident = resident
        .into_inner()
        .map_err(|_| anyhow::anyhow!("a client panicked"))?;
    Ok(Measured::of(
        outcomes,
        start.elapsed().as_secs_f64(),
        resident.into_values().collect(),
    ))
}

/// The memory that a process holds, as Linux counts it.
fn resident_bytes(process: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{process}/status");
    let status = std::fs::read_to_string(Path::new(&path)).with_context(|| path.clone())?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Ok(kilobytes.with_context(|| format!("{path} does not tell VmRSS"))? * 1024)
}

fn table(arguments: &Arguments, measured: &Measured) -> String {
    let milliseconds = |name: &str, of: &Quantiles| {
        format!(
            "{name:16} {:8.0} {:8.0} {:8.0} {:8.0} ms\n",
            of.p50 * 1e3,
            of.p90 * 1e3,
            of.p99 * 1e3,
            of.most * 1e3
        )
    };
    let memory: Vec<String> = measured
        .resident_bytes
        .iter()
        .map(|bytes| format!("{:.0}", *bytes as f64 / 1e6))
        .collect();
    format!(
        "{} requests of {} clients, {} pixels, {} steps: {} pictures in {:.1} s, {:.2}/s; {} left, {} nonsense refused\n\
         {:16} {:>8} {:>8} {:>8} {:>8}\n{}{}server's memory by quarter: {} MB\n",
        arguments.requests.get(),
        arguments.clients.get(),
        arguments.side.get(),
        arguments.steps.get(),
        measured.pictures,
        measured.seconds,
        measured.pictures_per_second,
        measured.left,
        measured.refused_nonsense,
        "",
        "p50",
        "p90",
        "p99",
        "most",
        milliseconds("picture", &measured.latency),
        milliseconds("first preview", &measured.first_preview),
        memory.join(", ")
    )
}

fn record(arguments: &Arguments, address: &Address, measured: &Measured, alone: Option<f64>) -> anyhow::Result<Value> {
    let device = address.info()?["device"].clone();
    let environment = match device == json!("cpu") {
        true => Environment::of(&Device::Cpu),
        false => Environment::of(&Device::open(DeviceChoice::Auto)?),
    };
    Ok(json!({
        "benchmark": "serve",
        "environment": environment,
        "device": device,
        "processors": std::thread::available_parallelism()?.get(),
        "inputs": {
            "model": arguments.model, "requests": arguments.requests.get(), "clients": arguments.clients.get(),
            "side": arguments.side.get(), "steps": arguments.steps.get(), "seeds": arguments.seeds.get(),
            "flags": arguments.flags,
        },
        "measured": measured,
        "steps_alone": alone,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_what_is_there() {
        let of = Quantiles::of((1..=100).rev().map(f64::from).collect());
        assert_eq!(
            (of.count, of.p50, of.p90, of.p99, of.most),
            (100, 50.0, 90.0, 99.0, 100.0)
        );
        assert_eq!(Quantiles::of(Vec::new()).most, 0.0);
        assert_eq!(Quantiles::of(vec![3.0]).p50, 3.0);
    }
}
