//! The same work in PyTorch: a process that lives as long as the benchmark and takes turns with it.
//!
//! The scripts of `bench/peers` read one JSON object per line and answer each with one:
//!
//! ```text
//!                                        {"torch": "2.11.0"}                      once, when it is ready
//! {"case": {..}}                         {"variants": ["cudnn", "flash"]}         makes the inputs
//! {"run": "cudnn", "samples": 5}         {"samples_ms": [..]}                     warm-up included the first time
//! {"memory": "cudnn"}                    {"peak_bytes": .., "activation_bytes": .., "beside_bytes": ..}
//! {"release": true}                      {}                                       frees everything
//! ```
//!
//! An answer `{"error": ".."}` says why something cannot be done.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context, bail};
use l2p_engine::Device;
use serde_json::{Value, json};

use crate::arguments::Common;
use crate::record::{PeerTime, Timing};
use crate::timing::median;

/// Answers later than this are not waited for. Compilation is the longest of all.
const PATIENCE: Duration = Duration::from_secs(280);

/// Alternations in a case.
const ROUNDS: usize = 5;

/// Samples of ours and of the peer.
#[derive(Debug, Default)]
pub struct Turns {
    /// Milliseconds.
    pub ours: Vec<f64>,
    /// One per way in which the peer does it.
    pub peers: Vec<PeerTime>,
}

/// The process.
pub struct Peer {
    child: Child,
    input: ChildStdin,
    answers: Receiver<String>,
    torch: String,
    device: Device,
    /// Bytes of the GPU in use by others than our pool, before the peer was there.
    others_before: u64,
}

impl Peer {
    /// Starts the script `script` of the peers' folder on the device.
    ///
    /// # Errors
    /// When Python or the script is not found or does not start, with the way out.
    pub fn start(script: &str, device: &Device, common: &Common) -> anyhow::Result<Self> {
        let path = folder()?.join(script);
        let others_before = others_bytes(device)?;
        let python = python();
        let mut command = Command::new(&python);
        command.arg(&path).arg("--device").arg(match device {
            Device::Cpu => "cpu".to_owned(),
            Device::Cuda(cuda) => format!("cuda:{}", cuda.index()),
        });
        if let Some(mode) = common.peer_compile.mode() {
            command.args(["--compile", mode]);
        }
        let started = command
            .args(["--seed", &common.seed.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = started.with_context(|| {
            format!(
                "the peer does not start: {} cannot be run; name a Python with PyTorch in L2P_PYTHON",
                python.display()
            )
        })?;
        let input = child.stdin.take().context("the peer has no input")?;
        let output = child.stdout.take().context("the peer has no output")?;
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut peer = Peer {
            child,
            input,
            answers,
            torch: String::new(),
            device: device.clone(),
            others_before,
        };
        let ready = peer.answer().with_context(|| {
            format!(
                "the peer {} did not get ready (its words are above); it needs a Python with PyTorch, see L2P_PYTHON",
                path.display()
            )
        })?;
        peer.torch = ready["torch"].as_str().unwrap_or("unknown").to_owned();
        Ok(peer)
    }

    /// The version of PyTorch.
    pub fn torch(&self) -> &str {
        &self.torch
    }

    /// What the driver counts for the peer's process: what others than our pool use now and did not use before it was there.
    fn driver_bytes(&self) -> Option<u64> {
        match self.device {
            Device::Cpu => None,
            Device::Cuda(_) => Some(others_bytes(&self.device).ok()?.saturating_sub(self.others_before)),
        }
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    /// When the peer answers with an error, ends, or takes too long.
    pub fn ask(&mut self, command: &Value) -> anyhow::Result<Value> {
        let sent = writeln!(self.input, "{command}").and_then(|()| self.input.flush());
        sent.context("the peer has ended")?;
        self.answer()
    }

    fn answer(&mut self) -> anyhow::Result<Value> {
        let line = match self.answers.recv_timeout(PATIENCE) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => {
                // What it does now it would go on doing.
                let _ = self.child.kill();
                bail!("the peer did not answer within {} s", PATIENCE.as_secs());
            }
            Err(RecvTimeoutError::Disconnected) => bail!("the peer has ended"),
        };
        let answer: Value = serde_json::from_str(&line).with_context(|| format!("the peer says `{line}`"))?;
        match answer["error"].as_str() {
            Some(reason) => bail!("{reason}"),
            None => Ok(answer),
        }
    }

    /// Runs a case in alternation with `ours`, `repeats` samples of each.
    ///
    /// # Errors
    /// Those of `ours`. A way that the peer cannot go is in the result, with the reason.
    pub fn take_turns(
        &mut self,
        case: &Value,
        repeats: usize,
        ours: &mut dyn FnMut() -> l2p_engine::Result<f64>,
    ) -> anyhow::Result<Turns> {
        let mut turns = Turns::default();
        let mut variants: Vec<Variant> = match self.ask(&json!({ "case": case })) {
            Ok(answer) => {
                let names = answer["variants"].as_array().cloned().unwrap_or_default();
                names.iter().filter_map(Value::as_str).map(Variant::new).collect()
            }
            Err(error) => vec![Variant {
                failure: Some(format!("{error:#}")),
                ..Variant::new("all")
            }],
        };
        let rounds = repeats.min(ROUNDS);
        for round in 0..rounds {
            let count = repeats * (round + 1) / rounds - repeats * round / rounds;
            for _ in 0..count {
                turns.ours.push(ours()?);
            }
            for variant in variants.iter_mut().filter(|variant| variant.failure.is_none()) {
                variant.run(self, count);
            }
        }
        let ours = median(&turns.ours);
        turns.peers = variants.into_iter().map(|variant| variant.finish(self, ours)).collect();
        // Errors of a peer that has ended were told above.
        let _ = self.ask(&json!({ "release": true }));
        Ok(turns)
    }
}

impl Peer {
    /// Runs a case by itself, where memory does not allow ours beside it: `repeats` samples of each way, without ratios.
    ///
    /// # Errors
    /// None of its own; a way that the peer cannot go is in the result, with the reason.
    pub fn run_alone(&mut self, case: &Value, repeats: usize) -> anyhow::Result<Vec<PeerTime>> {
        let peers = self.take_turns(case, repeats, &mut || Ok(0.0))?.peers;
        let alone = peers.into_iter().map(|peer| PeerTime { ratio: None, ..peer });
        Ok(alone.collect())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One way in which the peer does a case.
struct Variant {
    name: String,
    samples: Vec<f64>,
    failure: Option<String>,
}

impl Variant {
    fn new(name: &str) -> Self {
        Variant {
            name: name.into(),
            samples: Vec::new(),
            failure: None,
        }
    }

    fn run(&mut self, peer: &mut Peer, count: usize) {
        match peer.ask(&json!({ "run": self.name, "samples": count })) {
            Ok(answer) => {
                let samples = answer["samples_ms"].as_array().cloned().unwrap_or_default();
                self.samples.extend(samples.iter().filter_map(Value::as_f64));
            }
            Err(error) => self.failure = Some(format!("{error:#}")),
        }
    }

    fn finish(self, peer: &mut Peer, ours: f64) -> PeerTime {
        let memory = match self.failure {
            None => peer.ask(&json!({ "memory": self.name })).unwrap_or_default(),
            Some(_) => Value::Null,
        };
        let driver = peer.driver_bytes().filter(|_| self.failure.is_none());
        let beside = memory["beside_bytes"].as_u64().unwrap_or(0);
        let timing = Timing::of(self.samples);
        PeerTime {
            ratio: (timing.milliseconds > 0.0).then(|| ours / timing.milliseconds),
            name: self.name,
            timing,
            peak_bytes: memory["peak_bytes"].as_u64(),
            activation_bytes: memory["activation_bytes"].as_u64(),
            driver_bytes: driver.map(|bytes| bytes + beside),
            failure: self.failure,
        }
    }
}

/// Bytes of the GPU in use by others than our pool; 0 on the CPU.
fn others_bytes(device: &Device) -> l2p_engine::Result<u64> {
    match device {
        Device::Cpu => Ok(0),
        Device::Cuda(cuda) => Ok(cuda
            .driver_memory_in_use()?
            .saturating_sub(device.memory_report().reserved)),
    }
}

/// The Python that runs the scripts: `L2P_PYTHON`, or `python3`.
pub(crate) fn python() -> OsString {
    std::env::var_os("L2P_PYTHON").unwrap_or_else(|| "python3".into())
}

/// The folder of the scripts: `L2P_PEERS`, that of a bundle, or that of the source tree.
pub(crate) fn folder() -> anyhow::Result<PathBuf> {
    let bundled = || Some(std::env::current_exe().ok()?.parent()?.parent()?.join("peers"));
    let given = std::env::var_os("L2P_PEERS").map(PathBuf::from);
    let places: Vec<PathBuf> = match given {
        Some(folder) => vec![folder],
        None => [
            bundled(),
            Some("bench/peers".into()),
            Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("peers")),
        ]
        .into_iter()
        .flatten()
        .collect(),
    };
    let found = places.iter().find(|folder| folder.join("peer.py").is_file());
    found.cloned().with_context(|| {
        let places: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
        format!(
            "the peers' scripts are not in {}: name their folder in L2P_PEERS",
            places.join(" or ")
        )
    })
}
