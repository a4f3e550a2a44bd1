//! `l2p-train` as a user runs it: mostly a tiny pixel model on a handful of pictures, with the demo's text encoder.

mod background;
mod damage;
mod demo;
mod disk;
mod divergence;
mod folder;
mod interrupt;
mod latent;
mod objectives;
mod outputs;
mod printing;
pub mod ranks;
mod resume;
mod tools;
mod words;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use l2p_engine::checkpoint::{Values, write_values};
use l2p_engine::image_io::{RgbImage, WriteOptions, write_image};
use l2p_engine::model::config::ModelKind;
use l2p_engine::model::zimage::DitConfig;
use l2p_engine::train::run::log::{LOG, Record, TrainRecord, read};
use l2p_tests::cli::{Finished, program};
use l2p_tests::{Suite, models_folder};
use libtest_mimic::Failed;
use serde_json::json;
use tempfile::TempDir;

use crate::models::{random_model, small_config};

pub fn register(suite: &mut Suite) {
    background::register(suite);
    damage::register(suite);
    demo::register(suite);
    disk::register(suite);
    divergence::register(suite);
    folder::register(suite);
    interrupt::register(suite);
    latent::register(suite);
    objectives::register(suite);
    outputs::register(suite);
    printing::register(suite);
    ranks::register(suite);
    resume::register(suite);
    tools::register(suite);
    words::register(suite);
}

/// What most runs begin from: a folder with `model/`, `data/` and `train.toml`.
struct World {
    folder: TempDir,
}

/// Pictures in the data set.
const PICTURES: usize = 24;

const CONFIG: &str = "\
model = \"model\"
data = \"data\"
size = \"32x32\"
held_out = 4
cache = \"cache\"
policy = \"paper:1\"
steps = 12
batch = 2
lr = 1e-3
clip_norm = 1.0
log_every = 2
validate_every = 6
save_every = 4
";

/// The world that tests share; nobody writes into it but the cache of captions.
fn world() -> Result<&'static World, Failed> {
    static WORLD: OnceLock<Result<World, String>> = OnceLock::new();
    let world = WORLD.get_or_init(|| make_world().map_err(|failed| failed.message().unwrap_or_default().to_owned()));
    world.as_ref().map_err(|message| Failed::from(message.as_str()))
}

impl World {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

fn make_world() -> Result<World, Failed> {
    let world = World {
        folder: tempfile::tempdir()?,
    };
    let config = DitConfig {
        caption_width: 256,
        ..small_config(ModelKind::Pixel, 128, 16)
    };
    write_model(&world.path("model"), &config, &[4, 4, 8, 8])?;
    write_pictures(&world.path("data"), PICTURES)?;
    std::fs::write(world.path("train.toml"), CONFIG)?;
    // The captions' features are made once, before tests at the same time would each make them.
    let out = world.path("first");
    train(&world, &out, &["--steps", "1", "--validate-every", "0"])?.success()?;
    Ok(world)
}

/// A model of these sizes with random weights, and the demo's text encoder and VAE.
fn write_model(folder: &Path, config: &DitConfig, head_widths: &[usize]) -> Result<(), Failed> {
    std::fs::create_dir_all(folder)?;
    let tensors = random_model(config, head_widths).0.into_iter();
    let mut tensors: Vec<(String, Values)> = tensors
        .map(|(name, (shape, values))| (name, Values { shape, values }))
        .collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    write_values(&folder.join("weights.safetensors"), &tensors)?;
    let demo = demo()?;
    let manifest = json!({
        "format": 1,
        "transformer": "weights.safetensors",
        "text_encoder": demo.join("text_encoder"),
        "tokenizer": demo.join("tokenizer"),
        "vae": demo.join("vae"),
        "defaults": { "width": 32, "height": 32, "steps": 2, "cfg": 1.0 },
    });
    std::fs::write(folder.join("l2p.json"), manifest.to_string())?;
    Ok(())
}

/// The demo source model.
fn demo() -> Result<PathBuf, Failed> {
    Ok(models_folder().join("demo/source").canonicalize()?)
}

/// A data set of `count` small pictures of different colours.
fn write_pictures(folder: &Path, count: usize) -> Result<(), Failed> {
    std::fs::create_dir_all(folder)?;
    let mut lines = String::new();
    for index in 0..count {
        let name = format!("{index:03}.png");
        write_image(&folder.join(&name), &picture(index)?, &WriteOptions::default())?;
        let caption = ["fox", "red apple", "house"][index % 3];
        let line = json!({ "file_name": name, "prompt": caption, "seed": index });
        lines.push_str(&format!("{line}\n"));
    }
    std::fs::write(folder.join("metadata.jsonl"), lines)?;
    Ok(())
}

/// A gradient in a colour that depends on the number.
fn picture(index: usize) -> Result<RgbImage, Failed> {
    const SIDE: usize = 32;
    let pixels = (0..SIDE * SIDE).flat_map(|pixel| {
        let (x, y) = (pixel % SIDE, pixel / SIDE);
        [x * 8, y * 8, index * 10].map(|value| value as u8)
    });
    Ok(RgbImage::new(SIDE, SIDE, pixels.collect())?)
}

/// The program with the world's configuration on the CPU, about to write to `out`.
fn command(world: &World, out: &Path, arguments: &[&str]) -> Result<Command, Failed> {
    let mut command = Command::new(program("l2p-train")?);
    command.arg("--config").arg(world.path("train.toml"));
    command.args(["--device", "cpu", "--out"]).arg(out).args(arguments);
    Ok(command)
}

/// Runs it, whatever comes of it.
fn train(world: &World, out: &Path, arguments: &[&str]) -> Result<Finished, Failed> {
    Finished::from(&mut command(world, out, arguments)?)
}

/// Runs `l2p-train` with these arguments alone.
fn l2p_train(arguments: &[&str]) -> Result<Finished, Failed> {
    l2p_tests::cli::run("l2p-train", arguments)
}

/// The intervals of a run's log.
fn intervals(out: &Path) -> Result<Vec<TrainRecord>, Failed> {
    let records = read(out)?.into_iter();
    Ok(records
        .filter_map(|record| match record {
            Record::Train(train) => Some(train),
            _ => None,
        })
        .collect())
}

/// Steps, losses and gradient norms.
type Curve = Vec<(u64, Option<f64>, Option<f64>)>;

/// Steps, losses and norms of a run, each number's bits as they are.
fn curve(out: &Path) -> Result<Curve, Failed> {
    let intervals = intervals(out)?.into_iter();
    Ok(intervals
        .map(|interval| (interval.step, interval.loss, interval.grad_norm))
        .collect())
}

/// The validation losses of a run.
fn validation(out: &Path) -> Result<Vec<(u64, f64)>, Failed> {
    let records = read(out)?.into_iter();
    Ok(records
        .filter_map(|record| match record {
            Record::Validation { step, loss, .. } => Some((step, loss)),
            _ => None,
        })
        .collect())
}

/// The names of the checkpoints of a run, oldest first.
fn checkpoints(out: &Path) -> Result<Vec<String>, Failed> {
    let mut names: Vec<String> = match out.join("checkpoints").read_dir() {
        Err(_) => Vec::new(),
        Ok(entries) => entries
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<std::io::Result<_>>()?,
    };
    names.sort();
    Ok(names)
}

/// The file of trained tensors of a checkpoint.
fn delta(out: &Path, checkpoint: &str) -> Result<Vec<u8>, Failed> {
    let path = out.join("checkpoints").join(checkpoint).join("delta.safetensors");
    Ok(std::fs::read(path)?)
}

/// Whether the log of a run exists and has an interval.
fn has_begun(out: &Path) -> bool {
    out.join(LOG).exists() && intervals(out).is_ok_and(|intervals| !intervals.is_empty())
}
