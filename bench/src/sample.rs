//! `bench-sample`: whole pictures, from the prompt to the PNG on disk.

mod source;
mod studio;

use std::path::PathBuf;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use l2p_engine::checkpoint::{ModelPaths, PathOverrides};
use l2p_engine::device::{MemoryReport, MemoryTag, format_bytes};
use l2p_engine::flow::sampler::sample;
use l2p_engine::flow::schedule::Schedule;
use l2p_engine::layers::Spread;
use l2p_engine::model::Precision;
use l2p_engine::model::config::{ModelKind, VaeConfig};
use l2p_engine::{Device, Result};
use serde_json::{Map, Value, json};

use crate::arguments::Common;
use crate::children;
use crate::published::ModelName;
use crate::record::{Row, Timing, milliseconds};
use crate::runner::Bench;
use crate::step::driver_bytes;
use crate::timing::median;
use source::{Source, Weights};
use studio::{PARTS, Parts, SHIFT, Studio};

const HELP: &str = "\
Examples:
  bench-sample                                   8 steps of 4096 x 4096, random weights of the published sizes
  bench-sample --sizes 1k,2k,4k,8k               each size in a process of its own
  bench-sample --latent --sizes 1k --peer        the latent model with its decoder, beside diffusers' classes
  bench-sample --latent --sizes 4k --steps 1 --repeats 3 --peer
  bench-sample --model l2p_4k_sft.safetensors --text-encoder Z-Image/text_encoder --tokenizer Z-Image/tokenizer
  bench-sample --tiny --device cpu

The first picture is drawn as l2p-sample draws it: the text encoder is loaded, used and freed before the transformer comes. Its
memory is what the record calls peak: by the pool's own count, and by the driver's, which counts all of the GPU, so that nothing
else should run there. For the timed pictures everything is resident, the text encoder too. Their parts:

  text     prompt to tokens to features
  noise    the start
  steps    all of them
  decode   the VAE's, of a latent model
  rgb      to bytes, and those to the host
  png      encoded, written, flushed to disk

The time is wall time of all parts together. The peer does steps, decode and rgb, and its ratio is to our time for these.
Checked: the PNG, read again, holds the bytes that the CPU makes of the picture.

Exit code: 0 when all results are right, 1 when one is not or on an error.";

/// Times whole pictures, prompt to PNG on disk, and measures the memory that they take.
#[derive(Parser, Debug)]
#[command(name = "bench-sample", version, after_help = HELP)]
pub struct Arguments {
    /// Sizes of the picture: 1k, 2k, 4k, 8k, 10k
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', value_enum, default_values_t = [Size::FourK])]
    sizes: Vec<Size>,
    /// The latent model and its decoder instead of the pixel model
    #[arg(long)]
    latent: bool,
    /// Denoising steps
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Draw with this model instead of random weights: anything that l2p-sample takes
    #[arg(long, value_name = "DIR|FILE", conflicts_with_all = ["latent", "tiny", "peer"])]
    model: Option<PathBuf>,
    /// Folder of the text encoder, where the model names none
    #[arg(long, value_name = "DIR", requires = "model")]
    text_encoder: Option<PathBuf>,
    /// Folder of the tokenizer [default: the model's; for random weights Qwen3's, of the tests' fixtures]
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Folder of the VAE, where a latent model names none
    #[arg(long, value_name = "DIR", requires = "model")]
    vae: Option<PathBuf>,
    /// What to draw
    #[arg(long, default_value = PROMPT)]
    prompt: String,
    /// Side of the picture in pixels, instead of that of --sizes
    #[arg(long, value_name = "PIXELS")]
    side: Option<usize>,
    /// Where the pictures are written, one over the other [default: a temporary folder]
    #[arg(long, value_name = "FILE.png")]
    out: Option<PathBuf>,
    /// How the weights of the transformer's main blocks are kept: bf16, int8 or fp8
    #[arg(long, value_name = "TYPE", default_value_t = Precision::default())]
    trunk: Precision,
    /// The same for the text encoder's blocks
    #[arg(long, value_name = "TYPE", default_value_t = Precision::default())]
    text_weights: Precision,
    /// Main blocks whose weights stay in host memory; the last ones
    #[arg(long, value_name = "N", default_value_t = 0)]
    stream: usize,
    /// Layers of the text encoder whose weights stay in host memory; the last ones
    #[arg(long, value_name = "N", default_value_t = 0)]
    stream_text: usize,
    /// Small models of the same structure
    #[arg(long)]
    tiny: bool,
    #[command(flatten)]
    common: Common,
}

impl Arguments {
    /// How weights are kept, and what a row's name says of it.
    fn weights(&self, source: &Source) -> anyhow::Result<(Weights, String)> {
        let streamed = |precision: &Precision, count: usize, of: usize, flag: &str| -> anyhow::Result<Precision> {
            Ok(Precision {
                stream: Spread::of(count, of).with_context(|| format!("{flag} {count}"))?,
                ..precision.clone()
            })
        };
        let weights = Weights {
            trunk: streamed(&self.trunk, self.stream, source.spec.main_blocks(), "--stream")?,
            text: streamed(
                &self.text_weights,
                self.stream_text,
                source.text_layers(),
                "--stream-text",
            )?,
        };
        let mut name = String::new();
        if self.trunk.coding.is_some() {
            name += &format!("-{}", self.trunk);
        }
        if self.text_weights.coding.is_some() {
            name += &format!("-text-{}", self.text_weights);
        }
        if self.stream + self.stream_text > 0 {
            name += "-streamed";
        }
        Ok((weights, name))
    }
}

/// 96 tokens of Qwen3's tokenizer, the chat template's included.
const PROMPT: &str = "A lighthouse on a basalt cliff in a storm, seen from a small boat among the waves. Its beam cuts \
    through rain and spray and lights the undersides of the clouds. In the foreground the bow rises over a crest, ropes and \
    lanterns swinging, while gulls hang in the wind. Oil painting with thick strokes, deep blues and greens, one warm window \
    halfway up the tower where somebody waits with a lamp in hand.";

/// The published sizes.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    /// 1024 x 1024
    #[value(name = "1k")]
    OneK,
    /// 2048 x 2048
    #[value(name = "2k")]
    TwoK,
    /// 4096 x 4096
    #[value(name = "4k")]
    FourK,
    /// 8192 x 8192
    #[value(name = "8k")]
    EightK,
    /// 10240 x 10240
    #[value(name = "10k")]
    TenK,
}

impl Size {
    fn label(self) -> &'static str {
        match self {
            Size::OneK => "1k",
            Size::TwoK => "2k",
            Size::FourK => "4k",
            Size::EightK => "8k",
            Size::TenK => "10k",
        }
    }

    fn side(self) -> usize {
        match self {
            Size::OneK => 1024,
            Size::TwoK => 2048,
            Size::FourK => 4096,
            Size::EightK => 8192,
            Size::TenK => 10240,
        }
    }
}

/// Those that the peer does too.
const COMPARED: [&str; 3] = ["steps", "decode", "rgb"];

/// Runs the benchmark.
///
/// # Errors
/// When a picture cannot be drawn or is wrong.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    match arguments.sizes[..] {
        [size] => run_size(size, arguments),
        // What the driver sees of one size must not be another's.
        _ => {
            let names: Vec<String> = arguments.sizes.iter().map(|size| size.label().to_owned()).collect();
            children::run(&names, &arguments.common, |name| passed_on(name, arguments))
        }
    }
}

fn passed_on(name: &str, arguments: &Arguments) -> Vec<String> {
    let mut passed = vec![
        format!("--sizes={name}"),
        format!("--steps={}", arguments.steps),
        format!("--prompt={}", arguments.prompt),
    ];
    let paths = [
        (&arguments.model, "--model"),
        (&arguments.text_encoder, "--text-encoder"),
        (&arguments.tokenizer, "--tokenizer"),
        (&arguments.vae, "--vae"),
        (&arguments.out, "--out"),
    ];
    for (path, flag) in paths {
        passed.extend(path.iter().map(|path| format!("{flag}={}", path.display())));
    }
    passed.extend(arguments.side.map(|side| format!("--side={side}")));
    passed.push(format!("--trunk={}", arguments.trunk));
    passed.push(format!("--text-weights={}", arguments.text_weights));
    passed.push(format!("--stream={}", arguments.stream));
    passed.push(format!("--stream-text={}", arguments.stream_text));
    let flags = [(arguments.latent, "--latent"), (arguments.tiny, "--tiny")];
    passed.extend(flags.iter().filter(|(set, _)| *set).map(|(_, flag)| (*flag).to_owned()));
    passed
}

fn run_size(size: Size, arguments: &Arguments) -> anyhow::Result<()> {
    let kind = match arguments.latent {
        true => ModelKind::Latent,
        false => ModelKind::Pixel,
    };
    let (source, mut side) = match &arguments.model {
        Some(path) => {
            let overrides = PathOverrides {
                base: None,
                text_encoder: arguments.text_encoder.clone(),
                tokenizer: arguments.tokenizer.clone(),
                vae: arguments.vae.clone(),
            };
            (Source::files(ModelPaths::resolve(path, &overrides)?)?, size.side())
        }
        None => {
            let model = ModelName::new(kind, size.side() / 1024).model(arguments.tiny)?;
            (
                Source::random(&model, arguments.common.seed, arguments.tiny),
                model.side,
            )
        }
    };
    let (weights, kept) = arguments.weights(&source)?;
    let source = source.kept_in(weights);
    side = arguments.side.unwrap_or(side);
    let multiple = source.size_multiple();
    anyhow::ensure!(
        side > 0 && side.is_multiple_of(multiple),
        "a side of {side} is no multiple of {multiple}, which this model needs"
    );
    let size = match arguments.side {
        Some(side) => side.to_string(),
        None => size.label().to_owned(),
    };
    let geometry = source.spec.geometry();
    let name = format!("sample-{}-{size}{kept}", geometry.kind);
    let mut bench = Bench::start("sample", &arguments.common, "sample.py")?;
    let cell = source.vae.as_ref().map_or(1, VaeConfig::downsampling);
    let tokens = geometry.image_tokens([side / cell; 2]);
    let rough = match arguments.tiny {
        true => 0.0,
        false => {
            let parameters: f64 = source.spec.metas().iter().map(|meta| meta.elements() as f64).sum();
            2.0 * parameters * tokens as f64
        }
    };
    bench.ensure_feasible(
        &name,
        rough,
        "give --tiny, a small --model with a small --side, or a GPU",
    )?;
    draw(&mut bench, &name, &source, side, arguments)?;
    bench.finish()
}

/// The most memory seen at the ends of phases.
struct Peaks {
    ledger: MemoryReport,
    driver: Option<u64>,
}

impl Peaks {
    fn start(device: &Device) -> Self {
        device.reset_memory_peaks();
        Peaks {
            ledger: device.memory_report(),
            driver: None,
        }
    }

    fn look(&mut self, device: &Device) -> Result<()> {
        device.synchronize()?;
        self.ledger.keep_larger_peaks(&device.memory_report());
        // The pool gives nothing back, so that what it has now is the most it has had.
        self.driver = self.driver.max(driver_bytes(device)?);
        Ok(())
    }

    /// Puts the peaks into a row.
    fn enter(&self, row: &mut Row) {
        row.peak_bytes = self.ledger.total.peak;
        let tags = MemoryTag::ALL.map(|tag| (tag.name().to_owned(), json!(self.ledger.tag(tag).peak)));
        let details = &mut row.details;
        details.insert("peak_bytes_by_tag".into(), Value::Object(Map::from_iter(tags)));
        details.insert("reserved_bytes".into(), json!(self.ledger.reserved));
        details.insert("beside_pool_bytes".into(), json!(self.ledger.beside_pool));
        details.insert("accounted_bytes".into(), json!(self.ledger.accounted()));
        details.insert("driver_bytes".into(), json!(self.driver));
    }
}

fn draw(bench: &mut Bench, name: &str, source: &Source, side: usize, arguments: &Arguments) -> anyhow::Result<()> {
    let device = bench.device.clone();
    let folder = tempfile::tempdir()?;
    let mut studio = Studio {
        device: device.clone(),
        source,
        tokenizer: source.tokenizer(arguments.tokenizer.as_deref())?,
        text: None,
        dit: None,
        decoder: None,
        prompt: &arguments.prompt,
        schedule: Schedule::new(arguments.steps as usize, SHIFT)?,
        side,
        seed: bench.common.seed,
        out: arguments
            .out
            .clone()
            .unwrap_or_else(|| folder.path().join("picture.png")),
    };

    // As l2p-sample does it: what the text encoder frees, the transformer uses.
    let mut peaks = Peaks::start(&device);
    studio.text = Some(source.text(&device)?);
    let caption = studio.encode()?;
    peaks.look(&device)?;
    studio.text = None;
    studio.decoder = source.decoder(&device)?;
    studio.dit = Some(source.dit(&device)?);
    peaks.look(&device)?;
    let resident = device.memory_report().total.current;
    let once = &mut || {
        let conditioning = studio.conditioning(&caption)?;
        let schedule = Schedule::new(1, SHIFT)?;
        let drawn = sample(studio.dit(), &conditioning, &schedule, studio.noise()?, &mut |_| Ok(()))?;
        studio.decode(drawn).map(drop)
    };
    if !bench.wants(name, once)? {
        return Ok(());
    }
    let first = studio.draw(Some(caption.clone()))?;
    peaks.look(&device)?;
    let error = studio.file_error(&first.image)?;
    let caption_tokens = first.caption_tokens;
    drop(first);
    let work = studio.work(&caption)?;
    drop(caption);

    studio.text = Some(source.text(&device)?);
    // Loads what the first picture did not need, and finds how the text encoder's products are fastest.
    drop(studio.draw(None)?);
    let sizes = json!({
        "model": name.strip_prefix("sample-"), "side": side, "steps": arguments.steps,
        "caption": caption_tokens, "tiny": arguments.tiny, "trunk": arguments.trunk.to_string(),
        "text_weights": arguments.text_weights.to_string(), "streamed": arguments.stream, "streamed_text": arguments.stream_text,
    });
    let mut samples: Vec<Parts> = Vec::new();
    let turns = bench.take_turns(Some(&sizes), &mut || {
        let drawn = studio
            .draw(None)
            .map_err(|error| l2p_engine::Error::invalid(format!("{error:#}")))?;
        samples.push(drawn.parts);
        Ok(compared(&drawn.parts))
    })?;
    let driver_resident = driver_bytes(&device)?;

    let totals = samples.iter().map(|parts| parts.iter().sum()).collect();
    let mut row = Row::new(name, sizes, Timing::of(totals), work, bench.ceilings()).checked(error, 1e-6);
    row.activation_bytes = peaks.ledger.total.peak.saturating_sub(resident);
    row.peers = turns.peers;
    let parts = parts_of(&samples);
    peaks.enter(&mut row);
    let details = &mut row.details;
    details.insert("driver_bytes_with_text_encoder".into(), json!(driver_resident));
    details.insert("compared_ms".into(), json!(median(&turns.ours)));
    let by_name = parts.iter().map(|(part, timing)| ((*part).to_owned(), json!(timing)));
    details.insert("parts".into(), Value::Object(Map::from_iter(by_name)));
    bench.add(row)?;
    say_details(bench, &parts, &peaks, driver_resident)
}

/// The times of the parts over all samples.
fn parts_of(samples: &[Parts]) -> Vec<(&'static str, Timing)> {
    let of_part = |index: usize| Timing::of(samples.iter().map(|sample| sample[index]).collect());
    PARTS
        .iter()
        .enumerate()
        .map(|(index, part)| (*part, of_part(index)))
        .collect()
}

fn say_details(
    bench: &Bench,
    parts: &[(&str, Timing)],
    peaks: &Peaks,
    driver_resident: Option<u64>,
) -> anyhow::Result<()> {
    let line: Vec<String> = parts
        .iter()
        .map(|(part, timing)| format!("{part} {}", milliseconds(timing.milliseconds)))
        .collect();
    bench.say(&format!("  {}", line.join(", ")))?;
    if let Some(driver) = peaks.driver {
        let resident = driver_resident.map_or_else(String::new, format_bytes);
        bench.say(&format!(
            "  the driver counts {}, with the text encoder resident {resident}",
            format_bytes(driver)
        ))?;
        bench.say(&format!("  accounted for: {}", peaks.ledger.account()))?;
    }
    Ok(())
}

/// The milliseconds of the parts that the peer does too.
fn compared(parts: &Parts) -> f64 {
    let compared = PARTS.iter().zip(parts).filter(|(name, _)| COMPARED.contains(name));
    compared.map(|(_, milliseconds)| milliseconds).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peer_is_compared_with_its_own_parts() {
        assert_eq!(compared(&[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), 28.0);
    }
}
