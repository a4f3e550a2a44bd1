//! `bench-step`: whole denoising steps, from the image to the image moved by Euler's rule, and the decoding of latents.

mod trace;
mod twin;

use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use l2p_engine::device::{MemoryReport, MemoryTag, format_bytes};
use l2p_engine::flow::sampler::{Conditioning, Walk};
use l2p_engine::flow::schedule::Schedule;
use l2p_engine::layers::{ParamSource, Spread, Streamed};
use l2p_engine::model::config::VaeConfig;
use l2p_engine::model::vae::VaeDecoder;
use l2p_engine::model::{Denoiser, Precision};
use l2p_engine::profile::{Profile, measure};
use l2p_engine::{Device, Result, Tensor};
use serde_json::{Map, Value, json};

use crate::arguments::{COLUMNS, Common};
use crate::check::{relative_error, worse};
use crate::children;
use crate::inputs::{random, random_f32};
use crate::params::RandomParams;
use crate::peer::Turns;
use crate::published::{Model, ModelName};
use crate::record::{Row, Timing, percent};
use crate::runner::Bench;
use crate::timing::{median, sample, samples};

const HELP: &str = "\
Examples:
  bench-step                                     pixel 1K and 4K, latent 1K
  bench-step --model all                         every size; each model in a process of its own
  bench-step --model pixel-4k --peer             beside PyTorch: diffusers' transformer, eager and compiled
  bench-step --model latent-4k --peer            the latent baseline, its decoder included
  bench-step --model klein-pixel-4k,klein-latent-4k --peer
                                                 FLUX.2 [klein] base 4B, and a pixel model of it
  bench-step --tiny --device cpu --model pixel-1k

A step is what l2p-sample runs: recorded once, replayed with its own time. Random weights of the published sizes are made on
the device. Checked: replayed steps give the bits of steps run call by call; and a model of the same widths with one block of
each kind gives on a small image what the CPU gives in f32 (decoders: on a small latent).

host is the time in which a step is submitted; idle the share of a step in which the GPU runs nothing, as CUPTI sees it.";

/// Steps before the timed ones: the first runs call by call, the second is recorded, the third replayed.
const WARM_STEPS: usize = 3;

/// Longer steps are not traced: nothing between kernels counts beside such kernels.
const TRACED_BELOW_MS: f64 = 1000.0;

/// The shift of the schedule; it changes no time.
const SHIFT: f64 = 3.0;

/// Times whole denoising steps with random weights; checks them against the CPU.
#[derive(Parser, Debug)]
#[command(name = "bench-step", version, after_help = HELP, after_long_help = format!("{HELP}\n\n{COLUMNS}"))]
pub struct Arguments {
    /// Which models: pixel-1k, pixel-2k (the model for 1K at 2048 x 2048), pixel-4k, pixel-8k, pixel-10k, latent-1k, latent-2k,
    /// latent-4k, of FLUX.2 klein-pixel-1k, klein-pixel-4k, klein-latent-1k and klein-latent-4k, or all
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', default_values_t = ["pixel-1k", "pixel-4k", "latent-1k"].map(String::from))]
    model: Vec<String>,
    /// Tokens of the caption [default: 96; of FLUX.2, whose captions are filled up, 512]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    caption: Option<u32>,
    /// Side of the picture [default: that of the model's name]
    #[arg(long, value_name = "PIXELS")]
    side: Option<usize>,
    /// Main blocks whose weights stay in host memory and are copied to the GPU in every step, spread over the model. The row's name ends
    /// with -streamed
    #[arg(long, value_name = "N", default_value_t = 0)]
    stream: usize,
    /// Small models of the same structure
    #[arg(long)]
    tiny: bool,
    /// How the weights of the main blocks are kept: bf16, int8 or fp8; the twin on the CPU computes with the same, and the peer of
    /// a step in eight bits is PyTorch's sequence of fp8 products and attention alone, recorded as a graph
    #[arg(long, value_name = "TYPE,..", value_delimiter = ',', default_values_t = [Precision::default()])]
    trunk: Vec<Precision>,
    /// Print what each kernel takes (needs CUPTI)
    #[arg(long)]
    kernels: bool,
    #[command(flatten)]
    common: Common,
}

/// Runs the benchmark.
///
/// # Errors
/// When a case cannot be run or its result is wrong.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let names = match &arguments.model[..] {
        [all] if all == "all" => ModelName::ALL.to_vec(),
        names => names
            .iter()
            .map(|name| name.parse())
            .collect::<Result<Vec<ModelName>>>()?,
    };
    let cases: Vec<(ModelName, &Precision)> = names
        .iter()
        .flat_map(|name| arguments.trunk.iter().map(|trunk| (*name, trunk)))
        .collect();
    match cases[..] {
        [(name, trunk)] => run_model(name, trunk, arguments),
        // What the driver sees of one model's memory must not be another's.
        _ => children::run(
            &cases
                .iter()
                .map(|(name, trunk)| case_name(*name, trunk))
                .collect::<Vec<_>>(),
            &arguments.common,
            |case| {
                let named = cases.iter().find(|(name, trunk)| case_name(*name, trunk) == case);
                let (name, trunk) = named.expect("it is one of these");
                let mut passed = vec![
                    format!("--model={name}"),
                    format!("--trunk={trunk}"),
                    format!("--stream={}", arguments.stream),
                ];
                passed.extend(arguments.caption.map(|tokens| format!("--caption={tokens}")));
                passed.extend(arguments.side.map(|side| format!("--side={side}")));
                let flags = [(arguments.tiny, "--tiny"), (arguments.kernels, "--kernels")];
                passed.extend(flags.iter().filter(|(set, _)| *set).map(|(_, flag)| (*flag).to_owned()));
                passed
            },
        ),
    }
}

/// A row's name: the model's, and where it is not the usual one how its weights are kept.
fn case_name(name: ModelName, trunk: &Precision) -> String {
    match trunk.coding {
        None => name.to_string(),
        Some(coding) => format!("{name}-{coding}"),
    }
}

fn run_model(name: ModelName, trunk: &Precision, arguments: &Arguments) -> anyhow::Result<()> {
    let mut model = name.model(arguments.tiny)?;
    if let Some(side) = arguments.side {
        model.side = side;
    }
    let multiple = side_multiple(&model);
    anyhow::ensure!(
        model.side > 0 && model.side.is_multiple_of(multiple),
        "--side {} is no multiple of {multiple}, which {name} needs",
        model.side
    );
    let blocks = model.spec.main_blocks();
    anyhow::ensure!(
        arguments.stream <= blocks && (arguments.stream == 0 || model.spec.streams()),
        "--stream {}: {name} has {blocks} main blocks, and those of {} can stay in host memory",
        arguments.stream,
        if model.spec.streams() { "all" } else { "none" }
    );
    let trunk = &Precision {
        stream: Spread::of(arguments.stream, blocks)?,
        ..trunk.clone()
    };
    let mut bench = Bench::start("step", &arguments.common, "step.py")?;
    let name = match arguments.stream {
        0 => case_name(name, trunk),
        _ => format!("{}-streamed", case_name(name, trunk)),
    };
    bench.ensure_feasible(&name, rough_flops(&model), "give --tiny, or a GPU")?;
    run_step(&mut bench, &name, &model, trunk, arguments)?;
    bench.finish()
}

/// Sides are multiples of this many pixels.
fn side_multiple(model: &Model) -> usize {
    model
        .spec
        .size_multiple(model.vae.as_ref().map_or(1, VaeConfig::downsampling))
}

/// Two operations for each parameter and token.
fn rough_flops(model: &Model) -> f64 {
    let parameters: f64 = model.spec.metas().iter().map(|meta| meta.elements() as f64).sum();
    let [height, width, _] = model.canvas();
    2.0 * parameters * model.spec.geometry().image_tokens([height, width]) as f64
}

/// A transformer on the device and what it is run with.
pub struct Setup {
    dit: Box<dyn Denoiser>,
    conditioning: Conditioning,
    /// f32
    noise: Tensor,
    /// Main blocks in host memory.
    streamed: Option<Arc<Streamed>>,
}

impl Setup {
    /// The model with random weights.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(
        device: &Device,
        model: &Model,
        precision: &Precision,
        caption_tokens: usize,
        seed: u64,
    ) -> Result<Self> {
        let params = RandomParams::transformer(seed, &*model.spec);
        let params = precision.over_blocks(&params, &model.spec.metas(), device)?;
        let dit = model.spec.load(&params, device, &mut |_, _| Ok(()))?;
        let caption = random(device, [1, caption_tokens, model.spec.caption_width()], seed, 1)?;
        let [height, width, channels] = model.canvas();
        Ok(Setup {
            conditioning: Conditioning {
                prompt: dit.prepare(&[&caption], [height, width])?,
                negative: None,
            },
            noise: random_f32(device, [1, height, width, channels], seed, 2)?,
            streamed: params.streamed(),
            dit,
        })
    }

    /// A walk of `steps` steps from the noise on.
    fn walk(&self, steps: usize) -> Result<Walk<'_>> {
        let mut noise = Tensor::empty(self.dit.device(), self.noise.shape(), self.noise.dtype())?;
        noise.copy_from(&self.noise)?;
        Walk::new(&*self.dit, &self.conditioning, &Schedule::new(steps, SHIFT)?, noise)
    }

    /// Brings every block in host memory to the device once, and computes nothing.
    fn copy_blocks(&self) -> Result<()> {
        let Some(streamed) = &self.streamed else { return Ok(()) };
        let mut pass = streamed.pass()?;
        for block in streamed.spread().chosen() {
            pass.before(block)?;
            pass.after(block)?;
        }
        pass.end()
    }

    /// Steps that are replayed, against what the same gave call by call, and the memory that they take.
    fn replayed(&self, called: &[f32]) -> Result<Replay> {
        let device = self.dit.device();
        device.synchronize()?;
        device.reset_memory_peaks();
        let resident = device.memory_report().total.current;
        let replayed = self.drawn(WARM_STEPS)?;
        device.synchronize()?;
        Ok(Replay {
            resident,
            memory: device.memory_report(),
            driver: driver_bytes(device)?,
            error: replay_error(&replayed.to_vec::<f32>()?, called),
        })
    }

    /// Adds what is copied in every step, and how long that takes by itself.
    fn describe_copies(&self, details: &mut Map<String, Value>) -> Result<()> {
        let Some(streamed) = &self.streamed else { return Ok(()) };
        let copies = samples(self.dit.device(), 1, 5, || self.copy_blocks())?;
        details.insert("streamed_bytes".into(), json!(streamed.host_bytes()));
        details.insert("copy_ms".into(), json!(median(&copies)));
        Ok(())
    }

    /// What `steps` steps give.
    fn drawn(&self, steps: usize) -> Result<Tensor> {
        let mut walk = self.walk(steps)?;
        for _ in 0..steps {
            walk.advance()?;
        }
        Ok(walk.finish())
    }

    /// As [`Setup::drawn`] call by call, with the operations of the last step one by one; the step before keeps the device
    /// busy while it is submitted.
    fn profiled(&self) -> Result<(Tensor, Profile)> {
        let mut walk = self.walk(WARM_STEPS)?.unrecorded();
        for _ in 1..WARM_STEPS {
            walk.advance()?;
        }
        let ((), profile) = measure(self.dit.device(), || walk.advance())?;
        Ok((walk.finish(), profile))
    }
}

/// Device times in alternation with the peer's, and the host's time for each step, in milliseconds.
fn timed(bench: &mut Bench, setup: &Setup, sizes: &Value) -> anyhow::Result<(Turns, Vec<f64>)> {
    let device = bench.device.clone();
    let repeats = bench.common.repeats as usize;
    let mut walk = setup.walk(WARM_STEPS + repeats)?;
    for _ in 0..WARM_STEPS {
        walk.advance()?;
    }
    device.synchronize()?;
    let mut host_ms = Vec::with_capacity(repeats);
    let turns = bench.take_turns(Some(sizes), &mut || {
        sample(&device, &mut || {
            let start = Instant::now();
            walk.advance()?;
            host_ms.push(start.elapsed().as_secs_f64() * 1e3);
            Ok(())
        })
    })?;
    Ok((turns, host_ms))
}

/// What replayed steps give and take.
struct Replay {
    error: f64,
    /// Bytes before them.
    resident: u64,
    memory: MemoryReport,
    /// Bytes as the driver counts them.
    driver: Option<u64>,
}

fn run_step(
    bench: &mut Bench,
    name: &str,
    model: &Model,
    trunk: &Precision,
    arguments: &Arguments,
) -> anyhow::Result<()> {
    let (device, seed) = (bench.device.clone(), bench.common.seed);
    let caption = arguments
        .caption
        .map_or(model.name.family.caption_tokens(), |tokens| tokens as usize);
    let start = Instant::now();
    let setup = Setup::new(&device, model, trunk, caption, seed)?;
    device.synchronize()?;
    let load_seconds = start.elapsed().as_secs_f64();
    let once = &mut || setup.drawn(1).map(drop);
    if bench.wants(name, once)? {
        let (called, profile) = setup.profiled()?;
        let called = called.to_vec::<f32>()?;
        // The small model has one block of each kind, which it holds.
        let resident = Precision {
            stream: None,
            ..trunk.clone()
        };
        let twin = twin::step_error(&device, model, &resident, seed)?;
        let Replay {
            error,
            resident,
            memory,
            driver,
        } = setup.replayed(&called)?;
        let error = worse(error, twin);

        let sizes = json!({
            "model": name, "side": model.side, "tokens": setup.conditioning.prompt.tokens(), "caption": caption, "tiny": arguments.tiny,
            "trunk": trunk.to_string(), "streamed": arguments.stream,
        });
        let (turns, host_ms) = timed(bench, &setup, &sizes)?;
        let mut row =
            Row::new(name, sizes, Timing::of(turns.ours), profile.work(), bench.ceilings()).checked(error, 3e-2);
        row.peak_bytes = memory.total.peak;
        row.activation_bytes = memory.total.peak - resident;
        row.peers = turns.peers;
        let details = &mut row.details;
        details.insert("load_seconds".into(), json!(load_seconds));
        setup.describe_copies(details)?;
        let tags = MemoryTag::ALL.map(|tag| (tag.name().to_owned(), json!(memory.tag(tag).peak)));
        details.insert("peak_bytes_by_tag".into(), Value::Object(Map::from_iter(tags)));
        details.insert("driver_bytes".into(), json!(driver));
        details.insert("operations".into(), l2p_bins::profile::json(&profile, bench.ceilings()));
        let host = matches!(device, Device::Cuda(_)).then(|| median(&host_ms));
        details.insert("host_ms".into(), json!(host));
        let trace = match row.timing.milliseconds < TRACED_BELOW_MS {
            true => trace::of_steps(&setup),
            false => Ok(None),
        };
        let reason = trace.as_ref().err().map(ToString::to_string);
        let (idle, kernels) = trace.ok().flatten().map(|trace| (trace.idle, trace.kernels)).unzip();
        let kernels = kernels.unwrap_or_default();
        details.insert("idle".into(), json!(idle));
        details.insert("kernels".into(), json!(kernels));
        bench.add(row)?;
        say_details(bench, driver, host, idle, reason.as_deref())?;
        if arguments.kernels {
            for kernel in &kernels {
                bench.say(&kernel.line())?;
            }
        }
        bench.say(&l2p_bins::profile::table(&profile, bench.ceilings()))?;
    }
    if let Some(config) = &model.vae {
        run_decode(bench, name, model, config, seed)?;
    }
    Ok(())
}

fn say_details(
    bench: &Bench,
    driver: Option<u64>,
    host: Option<f64>,
    idle: Option<f64>,
    reason: Option<&str>,
) -> anyhow::Result<()> {
    let idle = match (idle, reason) {
        (Some(idle), _) => percent(idle),
        (None, Some(reason)) => format!("not known: {reason}"),
        (None, None) if driver.is_none() => return Ok(()),
        (None, None) => "not traced".to_owned(),
    };
    let host = host.map_or_else(String::new, |host| format!("host {host:.3} ms, "));
    let driver = driver.map_or_else(String::new, |bytes| format!("driver {}, ", format_bytes(bytes)));
    bench.say(&format!("  {driver}{host}idle {idle}"))
}

/// Bytes of the GPU in use as its driver counts them.
///
/// # Errors
/// When the driver cannot be asked.
pub fn driver_bytes(device: &Device) -> Result<Option<u64>> {
    match device {
        Device::Cpu => Ok(None),
        Device::Cuda(device) => Ok(Some(device.driver_memory_in_use()?)),
    }
}

/// How far replayed steps are from steps run call by call: 0, or the result is wrong.
fn replay_error(replayed: &[f32], called: &[f32]) -> f64 {
    match replayed.iter().zip(called).all(|(a, b)| a.to_bits() == b.to_bits()) {
        true => 0.0,
        false => relative_error(replayed, called).max(1.0),
    }
}

/// The decoding of a latent, beside the resident transformer.
fn run_decode(bench: &mut Bench, name: &str, model: &Model, config: &VaeConfig, seed: u64) -> anyhow::Result<()> {
    let device = bench.device.clone();
    let name = format!("{name}-decode");
    let vae = VaeDecoder::load(&RandomParams::vae(seed, config), &device, config)?;
    let [height, width, channels] = model.canvas();
    let latent = random_f32(&device, [1, height, width, channels], seed, 3)?;
    let mut decode = || vae.decode(&latent).map(drop);
    if !bench.wants(&name, &mut decode)? {
        return Ok(());
    }
    decode()?;
    let (work, peak, resident) = bench.peak_of(&mut decode)?;
    let driver = driver_bytes(&device)?;
    let sizes = json!({ "model": name, "side": model.side, "tiny": config.block_out_channels[0] < 128 });
    let turns = bench.take_turns(Some(&sizes), &mut || sample(&device, &mut decode))?;
    let error = twin::decode_error(&device, config, seed)?;
    let mut row = Row::new(&name, sizes, Timing::of(turns.ours), work, bench.ceilings()).checked(error, 3e-2);
    row.peak_bytes = peak;
    row.activation_bytes = peak - resident;
    row.peers = turns.peers;
    row.details.insert("driver_bytes".into(), json!(driver));
    bench.add(row)
}
