//! `bench-train`: whole training steps, optimizer included.

mod checkpoint;
mod ranks;
pub(crate) mod record;

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Context;
use clap::{Parser, ValueEnum};
use l2p_bins::launch::RankFlags;
use l2p_engine::device::{MemoryTag, format_bytes};
use l2p_engine::model::Precision;
use l2p_engine::model::config::ModelKind;
use l2p_engine::train::{
    AdamWOptions, Batch, PlanInput, Policy, Ranks, Recompute, TrainOptions, TrainableModel, TrainingPlan,
};
use l2p_engine::{Device, Result, Tensor};
use serde_json::{Map, Value, json};

use self::checkpoint::CheckpointTimes;
use self::record::{Measured, Record};
use crate::arguments::Common;
use crate::inputs::{random, random_f32};
use crate::params::RandomParams;
use crate::published::{Family, Model, ModelName};
use crate::record::{PeerTime, Timing, milliseconds, percent, write_json};
use crate::runner::Bench;
use crate::timing::sample;

const HELP: &str = "\
Examples:
  bench-train                                   pixel 1K, policy released, without recomputing and with all blocks recomputed
  bench-train --peer --record                   beside PyTorch; the rows go to bench/results/GPU/train.json
  bench-train --recompute frozen --policy paper
  bench-train --recompute none --checkpoints /data what a checkpoint takes on the disk of /data (36 GB at a time)
  bench-train --tiny --device cpu
  bench-train --ranks 2 --recompute none --peer --record    two GPUs: alone, dividing the optimizer, dividing nothing, and PyTorch's
                                                            DistributedDataParallel and ZeroRedundancyOptimizer

A step is forward, backward and AdamW with f32 master weights, on one picture; random weights of the published size are made on the
device. Each choice of recomputing runs in a process of its own, so that its memory is its own; PyTorch, which takes as much memory
again, runs before ours and ends. Checked: losses are numbers, and fall on the one picture; bench-parity grad compares gradients.

TFLOP/s counts the arithmetic that training needs: what is computed a second time to save memory takes time but counts for nothing.
MFU is its share of the GPU's dense bf16 peak by the datasheet; there is none for a GPU whose datasheet is not known. The share of
the measured product rate is of a large matrix product's, measured in the same run.

Exit code: 0 when the losses are right, 1 when they are not or on an error.";

/// Steps before the timed ones: the first loads kernels and looks for algorithms.
const WARM_STEPS: usize = 2;

/// The published learning rate.
const LEARNING_RATE: f32 = 5e-5;

/// The noise level of the picture.
const SIGMA: f32 = 0.65;

/// Times whole training steps with random weights.
#[derive(Parser, Debug)]
#[command(name = "bench-train", version, after_help = HELP)]
pub struct Arguments {
    /// Blocks that keep only their input: none, frozen, all
    #[arg(long, value_name = "BLOCKS,..", value_delimiter = ',', default_values_t = [Recompute::None, Recompute::All])]
    recompute: Vec<Recompute>,
    /// What is trained; with --peer one of paper, released and full
    #[arg(long, value_name = "POLICY", default_value = "released")]
    policy: Policy,
    /// Tokens of the caption
    #[arg(long, value_name = "N", default_value_t = 96, value_parser = clap::value_parser!(u32).range(1..))]
    caption: u32,
    /// How the weights of main blocks that are not trained are kept: bf16, int8 or fp8; what is not bf16 ends the row's name
    #[arg(long, value_name = "TYPE", default_value_t = Precision::default())]
    trunk: Precision,
    /// The pixel model that is trained: pixel-1k or pixel-4k
    #[arg(long, value_name = "MODEL", default_value_t = ModelName::new(ModelKind::Pixel, 1))]
    model: ModelName,
    /// Side of the picture, a multiple of the model's patch [default: the model's own, 1024 or 4096; --tiny four patches]
    #[arg(long, value_name = "PIXELS")]
    side: Option<usize>,
    /// A small model of the same structure
    #[arg(long)]
    tiny: bool,
    /// Write checkpoints into this folder too, and measure for how long training stands still
    #[arg(long, value_name = "DIR")]
    checkpoints: Option<PathBuf>,
    /// Write the rows to bench/results/GPU/train.json too
    #[arg(long)]
    record: bool,
    /// How many ranks, and how long they wait.
    #[command(flatten)]
    pub ranks: RankFlags,
    #[command(flatten)]
    common: Common,
}

/// Runs the benchmark, alone or in each of the processes that it starts, and returns its exit code. Errors are printed.
pub fn main(arguments: &Arguments) -> ExitCode {
    arguments.ranks.run(|launch| match launch {
        Some(launch) => ranks::run(arguments, launch),
        None => run(arguments),
    })
}

/// Runs the benchmark.
///
/// # Errors
/// When a case cannot be run or its losses are wrong.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    anyhow::ensure!(
        arguments.model.family == Family::ZImage || !arguments.common.peer,
        "{}: the peer trains Z-Image's models alone; leave out --peer",
        arguments.model
    );
    let record = match arguments.recompute[..] {
        [recompute] => run_one(recompute, arguments)?,
        _ => run_each(arguments)?,
    };
    let Some(record) = record else { return Ok(()) };
    for line in record.table() {
        say(&arguments.common, &line)?;
    }
    if arguments.record {
        let folder = std::path::Path::new("bench/results").join(record.environment.folder());
        write_json(&folder.join("train.json"), &record)?;
    }
    if let Some(path) = &arguments.common.json {
        write_json(path, &record)?;
    }
    Ok(())
}

/// Prints a line; to standard error where the record goes to standard output.
fn say(common: &Common, line: &str) -> anyhow::Result<()> {
    match common.json.as_deref() == Some("-".as_ref()) {
        true => eprintln!("{line}"),
        false => l2p_bins::print(&format!("{line}\n"))?,
    }
    Ok(())
}

/// Runs this program once per choice and puts the records together; `None` where nothing was measured.
fn run_each(arguments: &Arguments) -> anyhow::Result<Option<Record>> {
    let program = std::env::current_exe().context("this program cannot be started again")?;
    let folder = tempfile::tempdir()?;
    let mut whole: Option<Record> = None;
    for recompute in &arguments.recompute {
        let path = folder.path().join(format!("{recompute}.json"));
        let mut command = Command::new(&program);
        command
            .args(passed_on(arguments))
            .arg(format!("--recompute={recompute}"));
        if arguments.common.once.is_none() {
            command.arg("--json").arg(&path);
        }
        // The tables of the parts are for people to watch; the whole one follows.
        command.stdout(std::io::stderr());
        let status = command.status();
        let status = status.with_context(|| format!("{} does not start", program.display()))?;
        anyhow::ensure!(status.success(), "the run with --recompute {recompute} failed");
        if arguments.common.once.is_some() {
            continue;
        }
        let record = Record::read(&path)?;
        match &mut whole {
            None => whole = Some(record),
            Some(whole) => whole.join(record),
        }
    }
    Ok(whole)
}

impl Arguments {
    /// The model that is trained, with the side of the picture.
    fn model(&self) -> anyhow::Result<Model> {
        anyhow::ensure!(
            self.model.kind == ModelKind::Pixel,
            "--model {}: only pixel models are trained here",
            self.model
        );
        let mut model = self.model.model(self.tiny)?;
        model.side = self.side.unwrap_or(model.side);
        let patch = model.spec.geometry().patch;
        anyhow::ensure!(
            model.side > 0 && model.side.is_multiple_of(patch),
            "--side {} is no multiple of {patch}",
            model.side
        );
        Ok(model)
    }

    fn case<'a>(&self, model: &'a Model, recompute: Recompute) -> Case<'a> {
        Case {
            model,
            caption: self.caption as usize,
            seed: self.common.seed,
            options: TrainOptions {
                policy: self.policy.clone(),
                recompute,
                adamw: AdamWOptions::default(),
                clip_norm: None,
                ema_decay: None,
                trunk: self.trunk.clone(),
            },
        }
    }
}

/// The arguments but for the choice and the record.
fn passed_on(arguments: &Arguments) -> Vec<String> {
    let common = &arguments.common;
    let mut passed = vec![
        format!("--device={}", common.device),
        format!("--repeats={}", common.repeats),
        format!("--seed={}", common.seed),
        format!("--caption={}", arguments.caption),
        format!("--policy={}", arguments.policy),
        format!("--trunk={}", arguments.trunk),
    ];
    let how = common.peer_compile.to_possible_value();
    passed.extend(how.map(|how| format!("--peer-compile={}", how.get_name())));
    let folder = arguments.checkpoints.as_ref();
    passed.extend(folder.map(|folder| format!("--checkpoints={}", folder.display())));
    passed.push(format!("--model={}", arguments.model));
    passed.extend(arguments.side.map(|side| format!("--side={side}")));
    passed.extend(common.once.as_ref().map(|name| format!("--once={name}")));
    let flags = [(common.peer, "--peer"), (arguments.tiny, "--tiny")];
    passed.extend(flags.iter().filter(|(set, _)| *set).map(|(_, flag)| (*flag).to_owned()));
    passed
}

fn run_one(recompute: Recompute, arguments: &Arguments) -> anyhow::Result<Option<Record>> {
    let model = arguments.model()?;
    let name = match arguments.trunk.coding {
        None => format!("train-{recompute}"),
        Some(coding) => format!("train-{recompute}-{coding}"),
    };
    let mut bench = Bench::start("train", &arguments.common, "train.py")?;
    let case = arguments.case(&model, recompute);
    let plan = case.plan(&bench.device, &Ranks::solo())?;
    bench.ensure_feasible(&name, plan.operations(), "give --tiny, or a GPU")?;
    let sizes = json!({
        "model": arguments.model.to_string(), "side": model.side, "caption": arguments.caption, "policy": arguments.policy.to_string(),
        "trunk": arguments.trunk.to_string(),
        "recompute": recompute.to_string(), "tiny": arguments.tiny, "learning_rate": LEARNING_RATE,
    });
    let repeats = arguments.common.repeats as usize;
    let peers = match bench.peer() {
        Some(peer) => peer.run_alone(&sizes, repeats)?,
        None => Vec::new(),
    };
    bench.end_peer();
    let device = bench.device.clone();
    let mut trained = case.load(&device, &Ranks::solo())?;
    if !bench.wants(&name, &mut || trained.step().map(drop))? {
        bench.finish()?;
        return Ok(None);
    }
    let mut measured = measure(&device, &name, sizes, &plan, &mut trained, repeats)?;
    if let Some(folder) = &arguments.checkpoints {
        measured.checkpoints = Some(CheckpointTimes::measure(&device, &mut trained, folder)?);
    }
    let record = Record::new(&bench, measured, peers);
    for peer in &record.measured[0].peers {
        bench.say(&peer_line(peer))?;
    }
    Ok(Some(record))
}

fn peer_line(peer: &PeerTime) -> String {
    match &peer.failure {
        Some(reason) => format!("  PyTorch, {}: cannot be run: {reason}", peer.name),
        None => format!(
            "  PyTorch, {}: {}, spread {}, peak {}",
            peer.name,
            milliseconds(peer.timing.milliseconds),
            percent(peer.timing.spread),
            format_bytes(peer.peak_bytes.unwrap_or(0)),
        ),
    }
}

/// Warms up, takes memory and times.
fn measure(
    device: &Device,
    name: &str,
    sizes: Value,
    plan: &TrainingPlan,
    trained: &mut Trained,
    repeats: usize,
) -> anyhow::Result<Measured> {
    let mut losses = Vec::new();
    for _ in 0..WARM_STEPS {
        losses.push(trained.step()?);
    }
    device.synchronize()?;
    device.reset_memory_peaks();
    losses.push(trained.step()?);
    device.synchronize()?;
    let memory = device.memory_report();
    let mut samples_ms = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        samples_ms.push(sample(device, &mut || {
            losses.push(trained.step()?);
            Ok(())
        })?);
    }
    let losses: Vec<f32> = losses
        .iter()
        .map(|loss| Ok(loss.to_vec::<f32>()?[0]))
        .collect::<Result<_>>()?;
    let falls = losses.first() > losses.last();
    anyhow::ensure!(
        falls && losses.iter().all(|loss| loss.is_finite()),
        "wrong losses of steps on one picture, which should fall: {losses:?}"
    );
    let needed: f64 = plan.arithmetic.iter().map(|part| part.total() - part.again).sum();
    let tags = MemoryTag::ALL.map(|tag| (tag.name().to_owned(), json!(memory.tag(tag).peak)));
    Ok(Measured {
        name: name.into(),
        inputs: sizes,
        timing: Timing::of(samples_ms),
        needed_flops: needed,
        computed_flops: plan.operations(),
        trained_parameters: plan.trained_parameters,
        peak_bytes: memory.total.peak,
        peak_bytes_by_tag: Map::from_iter(tags),
        planned_peak_bytes: plan.memory.peak,
        driver_bytes: match device {
            Device::Cpu => None,
            Device::Cuda(device) => Some(device.driver_memory_in_use()?),
        },
        losses,
        checkpoints: None,
        peers: Vec::new(),
    })
}

/// What is trained.
struct Case<'a> {
    model: &'a Model,
    caption: usize,
    seed: u64,
    options: TrainOptions,
}

impl Case<'_> {
    fn params(&self) -> RandomParams {
        RandomParams::transformer(self.seed, &*self.model.spec)
    }

    fn plan(&self, device: &Device, ranks: &Ranks) -> Result<TrainingPlan> {
        let [height, width, _] = self.model.canvas();
        TrainingPlan::new(&PlanInput {
            spec: &*self.model.spec,
            options: &self.options,
            size: [height, width],
            caption_tokens: self.caption,
            batch: 1,
            cuda: matches!(device, Device::Cuda(_)),
            division: ranks.division(),
        })
    }

    fn load(&self, device: &Device, ranks: &Ranks) -> Result<Trained> {
        let (model, seed) = (self.model, self.seed);
        let [height, width, channels] = model.canvas();
        let picture = |stream| random_f32(device, [1, height, width, channels], seed, stream);
        Ok(Trained {
            model: TrainableModel::load_among(
                &*model.spec,
                &self.params(),
                device,
                &self.options,
                ranks,
                &mut |_, _| Ok(()),
            )?,
            image: picture(2)?,
            noise: picture(3)?,
            caption: random(device, [1, self.caption, model.spec.caption_width()], seed, 1)?,
        })
    }
}

/// A model in training and its one picture.
struct Trained {
    model: TrainableModel,
    image: Tensor,
    noise: Tensor,
    caption: Tensor,
}

impl Trained {
    /// A step; the loss before it, on the device.
    fn step(&mut self) -> Result<Tensor> {
        let batch = Batch {
            images: &self.image,
            noise: &self.noise,
            sigmas: &[SIGMA],
            captions: &[&self.caption],
        };
        let loss = self.model.accumulate_last(&batch, 1.0)?;
        self.model.step(LEARNING_RATE)?;
        Ok(loss)
    }
}
