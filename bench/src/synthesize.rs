//! `bench-synthesize`: how fast `l2p-data synthesize` draws a set of pictures and writes it, beside diffusers' pipeline.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use anyhow::{Context, bail, ensure};
use clap::Parser;
use l2p_engine::limits::{Batch, Pictures, Side, Steps};
use l2p_engine::{Device, DeviceChoice};
use serde::Serialize;
use serde_json::{Value, json};

use crate::children::beside;
use crate::environment::Environment;
use crate::peer::{folder, python};
use crate::record::{percent, write_json};

const HELP: &str = "\
Examples:
  bench-synthesize --peer                                 random weights of Z-Image's sizes, 1024 x 1024, 8 steps, no guidance
  bench-synthesize --model Z-Image-Turbo --peer           a model's own
  bench-synthesize --model models/demo/source --device cpu --side 64 --pictures 16 --batch 4

The rate is that of pictures on the disk: from the end of the first batch, which warms up, to the last file. Meanwhile nvidia-smi says
ten times a second for which share of the time the GPU has worked; the rest is idle. Without --model a source with random weights is made
by PyTorch, in a temporary folder of 21 GB. The peer is diffusers' ZImagePipeline in bf16 with the same files, prompts and steps, which
writes its files on threads of its own while it draws on; of several ways (--peer-batch, compiled or not) the fastest counts.";

/// Times how fast a set of pictures is drawn and written.
#[derive(Parser, Debug)]
#[command(name = "bench-synthesize", version, after_help = HELP)]
pub struct Arguments {
    /// The source: a diffusers folder [default: one with random weights]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Small random weights
    #[arg(long, conflicts_with = "model")]
    tiny: bool,
    /// Pictures, the first batch not counted
    #[arg(long, value_name = "N", default_value = "96")]
    pictures: Pictures,
    /// Pictures drawn at once [default: as many as l2p-data chooses]
    #[arg(long, value_name = "N")]
    batch: Option<Batch>,
    /// Pixels of a side
    #[arg(long, value_name = "PIXELS", default_value = "1024")]
    side: Side,
    /// Denoising steps
    #[arg(long, value_name = "N", default_value = "8")]
    steps: Steps,
    /// Where to run: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceChoice,
    /// Do the same with diffusers' pipeline ($L2P_PYTHON, or python3)
    #[arg(long)]
    peer: bool,
    /// How many the peer draws at once; each is tried
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_values = ["1", "4"])]
    peer_batch: Vec<Batch>,
    /// Try the peer with compiled blocks too
    #[arg(long)]
    peer_compile: bool,
    /// Pictures of each way of the peer, its first batch not counted
    #[arg(long, value_name = "N", default_value = "16")]
    peer_pictures: Pictures,
    /// Write the record to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Flags for l2p-data, behind --
    #[arg(last = true)]
    flags: Vec<String>,
}

/// What l2p-data did.
#[derive(Serialize)]
struct Measured {
    /// Those that count.
    pictures: usize,
    seconds: f64,
    pictures_per_second: f64,
    /// Pictures drawn at once.
    batch: usize,
    /// The share of the time in which the GPU did not work; none where nothing tells.
    idle: Option<f64>,
    /// In percent, as nvidia-smi told it during these seconds.
    utilization: Vec<f64>,
    /// When each file was written, in seconds after the start.
    written: Vec<f64>,
}

/// Runs the benchmark.
///
/// # Errors
/// When a program cannot be run, or does not draw what it should.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let work = tempfile::tempdir()?;
    let model = match &arguments.model {
        Some(model) => model.clone(),
        None => random_source(arguments, work.path())?,
    };
    let measured = ours(arguments, &model, work.path())?;
    l2p_bins::print(&line("l2p-data", &measured))?;
    let mut peers = Vec::new();
    if arguments.peer {
        for batch in &arguments.peer_batch {
            for compiled in [false, true].into_iter().take(1 + usize::from(arguments.peer_compile)) {
                let peer = peer(arguments, &model, work.path(), batch.get(), compiled)?;
                l2p_bins::print(&peer_line(&peer))?;
                peers.push(peer);
            }
        }
    }
    let rates = peers.iter().filter_map(|peer| peer["pictures_per_second"].as_f64());
    let ratio = rates.reduce(f64::max).map(|best| measured.pictures_per_second / best);
    if let Some(ratio) = ratio {
        l2p_bins::print(&format!("{ratio:.3} times the peer's rate\n"))?;
    }
    if let Some(path) = &arguments.json {
        // The device is opened here, so that it was not held while others worked.
        let environment = Environment::of(&Device::open(arguments.device)?);
        let model = arguments.model.as_ref().map(|model| model.display().to_string());
        let model = model.unwrap_or_else(|| "random weights of the published sizes".into());
        let record = json!({
            "benchmark": "synthesize",
            "environment": environment,
            "processors": std::thread::available_parallelism()?.get(),
            "inputs": {
                "model": model, "tiny": arguments.tiny, "side": arguments.side.get(), "steps": arguments.steps.get(),
                "flags": arguments.flags,
            },
            "measured": measured,
            "peers": peers,
            "ratio": ratio,
        });
        write_json(path, &record)?;
    }
    Ok(())
}

/// A source with random weights in a folder of its own.
fn random_source(arguments: &Arguments, work: &Path) -> anyhow::Result<PathBuf> {
    let model = work.join("source");
    let mut command = Command::new(python());
    command
        .arg(folder()?.join("random_source.py"))
        .arg("--out")
        .arg(&model)
        .args(arguments.tiny.then_some("--tiny"))
        .args(on_cpu(arguments));
    output(command, "random_source.py")?;
    Ok(model)
}

/// `--device=cpu` where that is asked for; the peer chooses by itself otherwise.
fn on_cpu(arguments: &Arguments) -> Option<&'static str> {
    (arguments.device == DeviceChoice::Cpu).then_some("--device=cpu")
}

/// What a program prints; its words go where ours go.
fn output(mut command: Command, name: &str) -> anyhow::Result<String> {
    let child = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let found = child.with_context(|| format!("{name} cannot be started"))?;
    ensure!(found.status.success(), "{name} failed ({})", found.status);
    String::from_utf8(found.stdout).with_context(|| format!("{name} prints bytes that are no text"))
}

/// So many different prompts as a file.
fn write_prompts(path: &Path, pictures: usize) -> anyhow::Result<()> {
    const WHAT: [&str; 4] = ["A fox", "A lighthouse", "An old tram", "Two dancers"];
    const WHERE: [&str; 5] = [
        "on a basalt cliff",
        "under a street lamp",
        "in deep snow",
        "beside a green door",
        "at the harbour",
    ];
    const HOW: [&str; 3] = [
        "in morning light, seen from below",
        "as a woodcut in two colours",
        "in fog, with a long lens",
    ];
    let prompt = |index: usize| {
        let (what, place, how) = (WHAT[index % 4], WHERE[index / 4 % 5], HOW[index / 20 % 3]);
        format!("{}\n", json!({ "prompt": format!("{what} {place}, {how}") }))
    };
    let lines: String = (0..pictures).map(prompt).collect();
    std::fs::write(path, lines).with_context(|| path.display().to_string())
}

/// Runs l2p-data and looks at what it wrote when.
fn ours(arguments: &Arguments, model: &Path, work: &Path) -> anyhow::Result<Measured> {
    let (prompts, out) = (work.join("prompts.jsonl"), work.join("set"));
    write_prompts(&prompts, arguments.pictures.get())?;
    let side = arguments.side.get().to_string();
    let mut command = Command::new(beside("l2p-data")?);
    command
        .args(["synthesize", "--json", "--cfg", "1"])
        .arg("--model")
        .arg(model)
        .arg("--prompts")
        .arg(&prompts)
        .arg("--out")
        .arg(&out)
        .args(["--width", &side, "--height", &side])
        .arg(format!("--steps={}", arguments.steps.get()))
        .arg(format!("--device={}", arguments.device))
        .args(arguments.batch.map(|batch| format!("--batch={}", batch.get())))
        .args(&arguments.flags);
    let watch = match arguments.device {
        DeviceChoice::Cpu => None,
        _ => Watch::start(),
    };
    let start = SystemTime::now();
    let said = output(command, "l2p-data")?;
    let looks = watch.map(Watch::stop).unwrap_or_default();
    let said: Value = serde_json::from_str(&said).context("what l2p-data prints")?;
    let batch = said["batch"].as_u64().unwrap_or(0) as usize;
    let since = |time: SystemTime| time.duration_since(start).map_or(0.0, |since| since.as_secs_f64());
    let written = written(&out)?.into_iter().map(since).collect();
    let looks = looks.into_iter().map(|(time, share)| (since(time), share)).collect();
    measured(batch, written, looks)
}

/// When the pictures of a set were written.
fn written(out: &Path) -> anyhow::Result<Vec<SystemTime>> {
    let mut times = Vec::new();
    let mut folders = vec![out.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let (path, data) = entry.and_then(|entry| Ok((entry.path(), entry.metadata()?)))?;
            match path.extension().and_then(|extension| extension.to_str()) {
                _ if data.is_dir() => folders.push(path),
                Some("png" | "webp" | "jpg") => times.push(data.modified()?),
                _ => {}
            }
        }
    }
    Ok(times)
}

/// The rate behind the first batch, and how much of that time the GPU was idle.
fn measured(batch: usize, mut written: Vec<f64>, looks: Vec<(f64, f64)>) -> anyhow::Result<Measured> {
    written.sort_by(f64::total_cmp);
    let pictures = written.len();
    let (Some(&last), true) = (written.last(), (1..pictures).contains(&batch)) else {
        bail!("{pictures} pictures are not more than the first {batch}, which warm up: ask for more (--pictures)");
    };
    let first = written[batch - 1];
    let seconds = last - first;
    let utilization: Vec<f64> = looks
        .into_iter()
        .filter(|(time, _)| (first..=last).contains(time))
        .map(|(_, share)| share)
        .collect();
    let idle = 1.0 - utilization.iter().sum::<f64>() / 100.0 / utilization.len() as f64;
    Ok(Measured {
        pictures: pictures - batch,
        seconds,
        pictures_per_second: (pictures - batch) as f64 / seconds.max(f64::MIN_POSITIVE),
        batch,
        idle: idle.is_finite().then_some(idle),
        utilization,
        written,
    })
}

/// Asks nvidia-smi ten times a second for which share of the time the GPU worked.
struct Watch {
    child: Child,
    looks: Arc<Mutex<Vec<(SystemTime, f64)>>>,
}

impl Watch {
    /// None where there is no nvidia-smi.
    fn start() -> Option<Self> {
        let query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"];
        let mut child = Command::new("nvidia-smi")
            .args(query)
            .args(["--loop-ms=100", "--id=0"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let lines = BufReader::new(child.stdout.take()?).lines();
        let looks = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&looks);
        std::thread::spawn(move || {
            for share in lines.map_while(Result::ok).filter_map(|line| line.trim().parse().ok()) {
                if let Ok(mut kept) = kept.lock() {
                    kept.push((SystemTime::now(), share));
                }
            }
        });
        Some(Watch { child, looks })
    }

    fn stop(mut self) -> Vec<(SystemTime, f64)> {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.looks.lock().map(|looks| looks.clone()).unwrap_or_default()
    }
}

/// The same with diffusers.
fn peer(arguments: &Arguments, model: &Path, work: &Path, batch: usize, compiled: bool) -> anyhow::Result<Value> {
    let out = work.join(format!("peer-{batch}-{compiled}"));
    // Full batches, one more than those that count.
    let pictures = arguments.peer_pictures.get().div_ceil(batch).max(1) * batch + batch;
    let mut command = Command::new(python());
    command
        .arg(folder()?.join("synthesize.py"))
        .arg("--model")
        .arg(model)
        .arg("--prompts")
        .arg(work.join("prompts.jsonl"))
        .arg("--out")
        .arg(&out)
        .arg(format!("--pictures={pictures}"))
        .arg(format!("--batch={batch}"))
        .arg(format!("--side={}", arguments.side.get()))
        .arg(format!("--steps={}", arguments.steps.get()))
        .args(compiled.then_some("--compile"))
        .args(on_cpu(arguments));
    let said = output(command, "synthesize.py")?;
    let last = said.lines().last().unwrap_or_default();
    serde_json::from_str(last).with_context(|| format!("synthesize.py prints {last:?}"))
}

fn line(name: &str, measured: &Measured) -> String {
    let idle = measured.idle.map_or_else(String::new, |idle| {
        format!(", idle {} of {} looks", percent(idle), measured.utilization.len())
    });
    format!(
        "{name:18} {:4} pictures, {:3} at once, {:8.1} s, {:7.3}/s{idle}\n",
        measured.pictures, measured.batch, measured.seconds, measured.pictures_per_second
    )
}

fn peer_line(peer: &Value) -> String {
    let number = |name: &str| peer[name].as_f64().unwrap_or(f64::NAN);
    format!(
        "{:18} {:4} pictures, {:3} at once, {:8.1} s, {:7.3}/s\n",
        match peer["compiled"] == json!(true) {
            true => "diffusers compiled",
            false => "diffusers",
        },
        number("pictures"),
        number("batch"),
        number("seconds"),
        number("pictures_per_second")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_batch_does_not_count() -> anyhow::Result<()> {
        let looks = vec![(0.5, 0.0), (2.5, 100.0), (3.5, 90.0), (9.0, 0.0)];
        let found = measured(2, vec![4.0, 2.0, 1.0, 3.0], looks)?;
        assert_eq!(
            (found.pictures, found.seconds, found.pictures_per_second),
            (2, 2.0, 1.0)
        );
        assert_eq!((found.utilization.len(), found.written), (2, vec![1.0, 2.0, 3.0, 4.0]));
        assert!(found.idle.is_some_and(|idle| (idle - 0.05).abs() < 1e-12));
        Ok(())
    }

    #[test]
    fn a_set_of_one_batch_has_no_rate() {
        for batch in [0, 2, 3] {
            let message = measured(batch, vec![1.0, 2.0], Vec::new())
                .err()
                .map(|error| error.to_string());
            assert!(message.is_some_and(|message| message.contains("ask for more (--pictures)")));
        }
        assert!(measured(1, vec![1.0, 2.0], Vec::new()).is_ok_and(|found| found.idle.is_none()));
    }
}
