//! `bench-train --ranks N`: the step of one rank among several, beside the same step alone and beside PyTorch.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context, ensure};
use l2p_engine::device::format_bytes;
use l2p_engine::dist::{Launch, Peer, World};
use l2p_engine::train::{BUCKET_BYTES, Ranks, Sharding};
use l2p_engine::{DType, Device, Shape, Tensor};
use serde::{Deserialize, Serialize};

use super::{Arguments, Case, LEARNING_RATE, Trained, WARM_STEPS};
use crate::environment::Environment;
use crate::record::{Timing, milliseconds, percent, write_json};

/// The peer, beside the benchmark's own.
const PEER: &str = "ranks.py";

/// How a step was taken.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Way {
    /// `alone`, or what ranks divide.
    name: String,
    /// Of whole steps, the slowest rank's.
    #[serde(flatten)]
    step: Timing,
    /// Of the exchange of gradients, AdamW and the exchange of weights by themselves, with nothing to hide behind.
    update: Timing,
    /// Gradients, and weights or sums, with nothing beside them; where ranks divide something.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    exchange: Option<Timing>,
    /// The largest of a rank's ledger.
    peak_bytes: u64,
    /// What the plan says of it.
    planned_peak_bytes: u64,
    /// The largest that a driver counts.
    driver_bytes: Option<u64>,
    /// The first rank's, before each step.
    losses: Vec<f32>,
}

/// The same in PyTorch.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct PeerWay {
    name: String,
    samples_ms: Vec<f64>,
    peak_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    failure: Option<String>,
}

#[derive(Debug, Deserialize)]
struct PeerRecord {
    torch: String,
    ways: Vec<PeerWay>,
}

/// What was found at one size.
#[derive(Debug, Serialize)]
struct Record {
    environment: Environment,
    ranks: Vec<Peer>,
    policy: String,
    recompute: String,
    model: String,
    side: usize,
    tiny: bool,
    trained_parameters: u64,
    bucket_bytes: usize,
    ways: Vec<Way>,
    /// By what ranks divide.
    scaling: Vec<Scaling>,
    torch: Option<String>,
    peers: Vec<PeerWay>,
}

/// What ranks gain, and what of their exchange is hidden.
#[derive(Debug, Serialize)]
struct Scaling {
    name: String,
    pictures_per_second: f64,
    /// Over one rank alone.
    speedup: f64,
    /// Milliseconds that the exchange takes by itself, and those by which a step is longer for it.
    exchange_ms: f64,
    exposed_ms: f64,
    /// The share of the exchange behind which something else is done.
    hidden: f64,
}

/// Runs the benchmark as one rank.
///
/// # Errors
/// When a case cannot be run, its losses are wrong, or a rank is lost.
pub(super) fn run(arguments: &Arguments, launch: Launch) -> anyhow::Result<()> {
    let (device, world) = arguments.ranks.join(Some(launch), arguments.common.device)?;
    let world = Rc::new(world);
    match work(arguments, &device, &world) {
        Ok(()) => Ok(world.leave()?),
        Err(error) => {
            world.give_up(&format!("{error:#}"));
            Err(error)
        }
    }
}

fn work(arguments: &Arguments, device: &Device, world: &Rc<World>) -> anyhow::Result<()> {
    ensure!(
        !arguments.record || arguments.recompute.len() == 1,
        "--record with --ranks takes one choice of --recompute"
    );
    let recompute = arguments.recompute[0];
    let model = arguments.model()?;
    world.agree(
        "arguments",
        format!("{} {} {} {recompute}", arguments.model, model.side, arguments.policy).as_bytes(),
    )?;
    let peers = match arguments.common.peer {
        true => peers(arguments, model.side, world)?,
        false => None,
    };
    let case = arguments.case(&model, recompute);
    let plan = case.plan(device, &Ranks::solo())?;
    let show = |text: &str| match world.is_first() {
        true => super::say(&arguments.common, text),
        false => Ok(()),
    };
    show(&format!(
        "{} ranks on {}, {}, side {}, policy {}, recompute {recompute}: {:.2} G parameters trained",
        world.size(),
        Environment::of(device).gpu,
        arguments.model,
        model.side,
        arguments.policy,
        plan.trained_parameters as f64 / 1e9
    ))?;
    let mut ways = Vec::new();
    for sharding in [None, Some(Sharding::Optimizer), Some(Sharding::None)] {
        let ranks = match sharding {
            None => Ranks::solo(),
            Some(sharding) => Ranks {
                world: world.clone(),
                sharding,
                bucket_bytes: BUCKET_BYTES,
            },
        };
        let name = sharding.map_or("alone".into(), |sharding| sharding.to_string());
        let way = measure(&name, &case, device, world, &ranks, arguments.common.repeats as usize)?;
        show(&line(&way))?;
        ways.push(way);
    }
    let Some(record) = world.is_first().then(|| Record {
        environment: Environment::of(device),
        ranks: world.peers().to_vec(),
        policy: arguments.policy.to_string(),
        recompute: recompute.to_string(),
        model: arguments.model.to_string(),
        side: model.side,
        tiny: arguments.tiny,
        trained_parameters: plan.trained_parameters,
        bucket_bytes: BUCKET_BYTES,
        scaling: ways[1..]
            .iter()
            .map(|way| scaling(&ways[0], way, world.size()))
            .collect(),
        ways,
        torch: peers.as_ref().map(|peers| peers.torch.clone()),
        peers: peers.map(|peers| peers.ways).unwrap_or_default(),
    }) else {
        return Ok(());
    };
    for text in lines(&record) {
        show(&text)?;
    }
    if arguments.record {
        let folder = Path::new("bench/results").join(format!("{}x{}", record.environment.folder(), world.size()));
        write_json(&folder.join(format!("train-{}.json", record.side)), &record)?;
    }
    if let Some(path) = &arguments.common.json {
        write_json(path, &record)?;
    }
    Ok(())
}

/// What a rank has measured: milliseconds of steps, of updates and of exchanges, the largest memory by ledger and by driver.
type Times = (Vec<f64>, Vec<f64>, Vec<f64>, u64, Option<u64>);

/// Times steps of one way on all ranks.
fn measure(
    name: &str,
    case: &Case<'_>,
    device: &Device,
    world: &World,
    ranks: &Ranks,
    repeats: usize,
) -> anyhow::Result<Way> {
    let trained = world.together("model", case.load(device, ranks));
    let mut trained = trained?;
    let mut losses = Vec::new();
    for _ in 0..WARM_STEPS {
        losses.push(trained.step()?);
    }
    device.synchronize()?;
    device.reset_memory_peaks();
    let mut step = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        step.push(timed(device, world, &mut || {
            losses.push(trained.step()?);
            Ok(())
        })?);
    }
    let mut update = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        update.push(timed(device, world, &mut || trained.update())?);
    }
    let peak = device.memory_report().total.peak;
    let plan = case.plan(device, ranks)?;
    let exchange = match ranks.world.size() {
        1 => Vec::new(),
        _ => exchanges(device, world, ranks, plan.trained_parameters as usize, repeats)?,
    };
    let driver = match device {
        Device::Cpu => None,
        Device::Cuda(device) => Some(device.driver_memory_in_use()?),
    };
    let all: Vec<Times> = world.share("times", (step, update, exchange, peak, driver))?;
    let slowest = |times: fn(&Times) -> &Vec<f64>| {
        let samples = all.iter().map(|rank| times(rank).len()).max().unwrap_or(0);
        let samples = (0..samples).map(|index| all.iter().map(|rank| times(rank)[index]).fold(0.0, f64::max));
        Timing::of(samples.collect())
    };
    let losses = losses.iter().map(|loss| Ok(loss.to_vec::<f32>()?[0]));
    let losses: Vec<f32> = losses.collect::<l2p_engine::Result<_>>()?;
    let falls = losses.first() > losses.last() && losses.iter().all(|loss| loss.is_finite());
    ensure!(
        falls,
        "{name}: wrong losses of steps on one picture, which should fall: {losses:?}"
    );
    Ok(Way {
        name: name.into(),
        step: slowest(|rank| &rank.0),
        update: slowest(|rank| &rank.1),
        exchange: (ranks.world.size() > 1).then(|| slowest(|rank| &rank.2)),
        peak_bytes: all.iter().map(|rank| rank.3).max().unwrap_or(0),
        planned_peak_bytes: plan.memory.peak,
        driver_bytes: all.iter().filter_map(|rank| rank.4).max(),
        losses,
    })
}

/// Milliseconds of what travels in a step, bucket after bucket and with nothing beside it: gradients, and what is gathered after them.
fn exchanges(
    device: &Device,
    world: &World,
    ranks: &Ranks,
    trained: usize,
    repeats: usize,
) -> anyhow::Result<Vec<f64>> {
    let communicator = world.communicator();
    let compute = device.compute_dtype();
    let gathered = match ranks.sharding {
        Sharding::Optimizer => compute,
        Sharding::None => DType::F32,
    };
    let elements = ranks.bucket_bytes / compute.size();
    let shape = Shape::new(&[world.size(), elements.div_ceil(world.size())]);
    let buckets = trained.div_ceil(elements);
    let lost = || l2p_engine::Error::invalid("the exchange before failed");
    let zeros = |dtype| Tensor::zeros(device, shape, dtype);
    let (parts, part) = (zeros(compute)?, zeros(gathered)?.narrow(0, 1)?.into_shape([shape[1]])?);
    // Owned by an operation while it runs, and kept for the next.
    let (mut received, mut whole) = (Some(zeros(compute)?), Some(zeros(gathered)?));
    let mut once = || -> l2p_engine::Result<()> {
        for _ in 0..buckets {
            let target = received.take().ok_or_else(lost)?;
            received = Some(communicator.all_to_all(&parts, target)?.wait()?);
        }
        for _ in 0..buckets {
            let target = whole.take().ok_or_else(lost)?;
            whole = Some(communicator.all_gather(&part, target)?.wait()?);
        }
        Ok(())
    };
    once()?;
    (0..repeats).map(|_| timed(device, world, &mut once)).collect()
}

/// Milliseconds of some work, which all ranks begin together, to the end of this one's part.
fn timed(device: &Device, world: &World, work: &mut dyn FnMut() -> l2p_engine::Result<()>) -> anyhow::Result<f64> {
    device.synchronize()?;
    world.barrier("sample")?;
    let started = Instant::now();
    work()?;
    device.synchronize()?;
    Ok(started.elapsed().as_secs_f64() * 1e3)
}

impl Trained {
    /// What follows the backward pass, by itself; of gradients that are zero.
    fn update(&mut self) -> l2p_engine::Result<()> {
        self.model.step(LEARNING_RATE).map(drop)
    }
}

/// What is gained. Alone, a step is its passes and an update; divided, a rank updates its share.
fn scaling(alone: &Way, way: &Way, ranks: usize) -> Scaling {
    let share = if way.name == Sharding::Optimizer.to_string() {
        1.0 / ranks as f64
    } else {
        1.0
    };
    let passes = alone.step.milliseconds - alone.update.milliseconds;
    let own = alone.update.milliseconds * share;
    let exchange = way.exchange.as_ref().map_or(0.0, |exchange| exchange.milliseconds);
    let exposed = way.step.milliseconds - passes - own;
    Scaling {
        name: way.name.clone(),
        pictures_per_second: 1e3 * ranks as f64 / way.step.milliseconds,
        speedup: ranks as f64 * alone.step.milliseconds / way.step.milliseconds,
        exchange_ms: exchange,
        exposed_ms: exposed,
        hidden: 1.0 - exposed / exchange.max(f64::MIN_POSITIVE),
    }
}

fn line(way: &Way) -> String {
    format!(
        "  {:<12} step {} (spread {}), update alone {}, peak {} (planned {})",
        way.name,
        milliseconds(way.step.milliseconds),
        percent(way.step.spread),
        milliseconds(way.update.milliseconds),
        format_bytes(way.peak_bytes),
        format_bytes(way.planned_peak_bytes),
    )
}

fn lines(record: &Record) -> Vec<String> {
    let mut lines = Vec::new();
    for scaling in &record.scaling {
        lines.push(format!(
            "  dividing {:<10} {:.2} pictures/s, {:.2} x one; exchange {} of which {} are seen, {} hidden",
            scaling.name,
            scaling.pictures_per_second,
            scaling.speedup,
            milliseconds(scaling.exchange_ms),
            milliseconds(scaling.exposed_ms),
            percent(scaling.hidden),
        ));
    }
    for peer in &record.peers {
        lines.push(match &peer.failure {
            Some(reason) => format!("  PyTorch, {:<8} cannot be run: {reason}", peer.name),
            None => format!(
                "  PyTorch, {:<8} step {}, peak {}",
                peer.name,
                milliseconds(Timing::of(peer.samples_ms.clone()).milliseconds),
                format_bytes(peer.peak_bytes)
            ),
        });
    }
    lines
}

/// Has the first rank run PyTorch's ranks, while the others wait.
fn peers(arguments: &Arguments, side: usize, world: &World) -> anyhow::Result<Option<PeerRecord>> {
    let outcome = match world.is_first() {
        true => run_peers(arguments, side, world).map(Some),
        false => Ok(None),
    };
    let outcome = outcome.map_err(|error| l2p_engine::Error::Invalid(format!("{error:#}")));
    Ok(world.together("peers", outcome)?)
}

fn run_peers(arguments: &Arguments, side: usize, world: &World) -> anyhow::Result<PeerRecord> {
    let folder = tempfile::tempdir()?;
    let out = folder.path().join("peers.json");
    let script = crate::peer::folder()?.join(PEER);
    let mut command = Command::new("python3");
    command
        .args(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"])
        .arg(world.size().to_string())
        .arg(&script)
        .args(peer_arguments(arguments, side, &out));
    // It is no rank of this program.
    for name in [
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
    ] {
        command.env_remove(name);
    }
    command.stdout(std::io::stderr());
    let mut child = command.spawn().context("python3 does not start")?;
    let status = loop {
        world.work();
        match child.try_wait()? {
            Some(status) => break status,
            None => std::thread::sleep(std::time::Duration::from_millis(200)),
        }
    };
    ensure!(status.success(), "PyTorch's ranks failed");
    let text = std::fs::read_to_string(&out).with_context(|| format!("{} cannot be read", out.display()))?;
    Ok(serde_json::from_str(&text)?)
}

fn peer_arguments(arguments: &Arguments, side: usize, out: &Path) -> Vec<PathBuf> {
    let device = if arguments.tiny { "cpu" } else { "cuda" };
    let mut all = vec![
        format!("--model={}", arguments.model),
        format!("--side={side}"),
        format!("--caption={}", arguments.caption),
        format!("--policy={}", arguments.policy),
        format!("--repeats={}", arguments.common.repeats),
        format!("--device={device}"),
    ];
    all.extend(arguments.tiny.then(|| "--tiny".to_owned()));
    let mut all: Vec<PathBuf> = all.into_iter().map(PathBuf::from).collect();
    all.push(format!("--out={}", out.display()).into());
    all
}
