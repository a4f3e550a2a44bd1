//! `bench-decode`: the text encoder as a language model: prompts that are read, and tokens that are written one by one.

use std::time::Instant;

use clap::Parser;
use l2p_engine::device::format_bytes;
use l2p_engine::model::config::TextConfig;
use l2p_engine::model::language::{Decoding, Feed, LanguageModel};
use l2p_engine::ops::linear_few::MOST_ROWS;
use l2p_engine::ops::sample_tokens::{TokenChoice, sample_tokens};
use l2p_engine::profile::{Work, measure};
use l2p_engine::{Device, Result, Tensor};
use serde_json::{Value, json};

use crate::arguments::{COLUMNS, Common};
use crate::check::{relative_error, worse};
use crate::params::RandomParams;
use crate::published;
use crate::record::{Row, Timing, percent};
use crate::runner::Bench;
use crate::timing::{sample, samples};

const HELP: &str = "\
Examples:
  bench-decode                                   Qwen3-4B, 1 and 32 texts at a time
  bench-decode --peer --repeats 5                beside PyTorch: transformers' generate, greedy
  bench-decode --batch 1,4,8,16,32 --kernels     every number of texts; what each operation takes
  bench-decode --tiny --device cpu               a small model

Two rows for each number of texts. decode-N is everything: N prompts are read and N texts written, greedy, each token brought to the
host before the next step, as l2p-data does it; its bytes are those of the steps alone. step-N is one recorded step of N texts that have
half of their tokens, replayed: its bytes are the weights and the keys and values up to there, read once. Random weights of the published
sizes are made on the device. Checked: replayed steps give the bits of steps run call by call; and a model of the same widths with two
layers gives the logits that the CPU gives in f32.";

/// Layers of the model that is compared with the CPU, and entries of its vocabulary.
const TWIN_LAYERS: usize = 2;
const TWIN_VOCABULARY: usize = 4096;

/// The largest error of logits that passes.
const TOLERANCE: f64 = 3e-2;

/// Times a language model's prompts and tokens with random weights; checks them against the CPU.
#[derive(Parser, Debug)]
#[command(name = "bench-decode", version, after_help = HELP, after_long_help = format!("{HELP}\n\n{COLUMNS}"))]
pub struct Arguments {
    /// How many texts are written at a time, 1 to 32
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_values_t = [1, 32], value_parser = clap::value_parser!(u32).range(1..=MOST_ROWS as i64))]
    batch: Vec<u32>,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65536))]
    prompt: u32,
    /// Tokens that are written of each text
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..=65536))]
    tokens: u32,
    /// A small model of the same structure
    #[arg(long)]
    tiny: bool,
    /// Print what each operation of a step takes
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
    let config = published::text(arguments.tiny.then_some(256));
    let mut bench = Bench::start("decode", &arguments.common, "decode.py")?;
    let most = arguments.batch.iter().copied().max().unwrap_or(1) as usize;
    let parameters = config.layers * config.dim * (config.ffn_hidden * 3 + config.head_dim * config.heads * 2);
    let tokens = most * (arguments.prompt + arguments.tokens) as usize;
    bench.ensure_feasible(
        "decode",
        2.0 * parameters as f64 * tokens as f64,
        "give --tiny, or a GPU",
    )?;
    let model = model(&bench.device, &config, bench.common.seed)?;
    let twin = match bench.common.once {
        None => twin_error(&bench.device, &config, bench.common.seed)?,
        Some(_) => 0.0,
    };
    for &batch in &arguments.batch {
        let case = Case {
            model: &model,
            batch: batch as usize,
            prompt: arguments.prompt as usize,
            tokens: arguments.tokens as usize,
            twin,
        };
        case.run(&mut bench, arguments)?;
    }
    bench.finish()
}

fn model(device: &Device, config: &TextConfig, seed: u64) -> Result<LanguageModel> {
    let params = RandomParams::text(seed, config);
    LanguageModel::load(&params, device, config, &mut |_, _| Ok(()))
}

/// Some tokens, the same on every device.
fn prompt(config: &TextConfig, text: usize, tokens: usize) -> Vec<u32> {
    let token = |index: usize| (7 + 31 * index + index * index / 3 + 101 * text) % config.vocabulary;
    (0..tokens).map(|index| token(index) as u32).collect()
}

/// How far a model of the same widths is from the CPU's in f32: the logits of texts of unequal lengths over some steps.
fn twin_error(device: &Device, config: &TextConfig, seed: u64) -> Result<f64> {
    let config = TextConfig {
        layers: TWIN_LAYERS,
        vocabulary: config.vocabulary.min(TWIN_VOCABULARY),
        ..config.clone()
    };
    let lengths = [37, 1, 70];
    let logits = |device: &Device| -> Result<Vec<f32>> {
        let model = model(device, &config, seed)?;
        let mut decoding = Decoding::new(&model, lengths.len(), 96)?;
        let texts: Vec<Vec<u32>> = (0..lengths.len())
            .map(|text| prompt(&config, text, lengths[text] + 4))
            .collect();
        let before = texts.iter().zip(lengths).enumerate();
        let before: Vec<(usize, &[u32])> = before
            .filter(|(_, (_, length))| *length > 1)
            .map(|(slot, (text, length))| (slot, &text[..length - 1]))
            .collect();
        decoding.read(&before)?;
        let mut found = Vec::new();
        for step in 0..4 {
            let feed = |(text, length): (&Vec<u32>, usize)| {
                let position = length - 1 + step;
                let token = text[position];
                Some(Feed { token, position })
            };
            let feeds: Vec<Option<Feed>> = texts.iter().zip(lengths).map(feed).collect();
            found.extend(decoding.step(&feeds)?.to_vec::<f32>()?);
        }
        Ok(found)
    };
    Ok(relative_error(&logits(device)?, &logits(&Device::Cpu)?))
}

/// One number of texts.
struct Case<'a> {
    model: &'a LanguageModel,
    batch: usize,
    prompt: usize,
    tokens: usize,
    twin: f64,
}

impl Case<'_> {
    fn run(&self, bench: &mut Bench, arguments: &Arguments) -> anyhow::Result<()> {
        let device = bench.device.clone();
        let mut decoding = Decoding::new(self.model, self.batch, self.prompt + self.tokens)?;
        let replayed = self.prepare(&mut decoding)?;
        let error = worse(self.twin, replayed);
        let sizes = json!({
            "batch": self.batch, "prompt": self.prompt, "tokens": self.tokens, "tiny": arguments.tiny,
        });
        let name = format!("step-{}", self.batch);
        if bench.wants(&name, &mut || decoding.again())? {
            self.step(bench, &mut decoding, &name, &sizes, error, arguments.kernels)?;
        }
        let name = format!("decode-{}", self.batch);
        let once = &mut || self.write(&mut decoding).map(drop);
        if bench.wants(&name, once)? {
            let (_, peak, resident) = bench.peak_of(once)?;
            let mut parts = [Vec::new(), Vec::new()];
            let turns = bench.take_turns(Some(&sizes), &mut || {
                let mut taken = [0.0; 2];
                let whole = sample(&device, &mut || {
                    taken = self.write(&mut decoding)?;
                    Ok(())
                })?;
                parts.iter_mut().zip(taken).for_each(|(part, taken)| part.push(taken));
                Ok(whole)
            })?;
            let work = self.work(self.tokens, self.prompt + self.tokens / 2);
            let mut row =
                Row::new(&name, sizes, Timing::of(turns.ours), work, bench.ceilings()).checked(error, TOLERANCE);
            row.peak_bytes = peak;
            row.activation_bytes = peak - resident;
            row.peers = turns.peers;
            let rate = |milliseconds: f64| (self.batch * self.tokens) as f64 * 1e3 / milliseconds;
            let [prompts, tokens] = parts.map(|part| Timing::of(part).milliseconds);
            let ours = rate(row.timing.milliseconds);
            let peer = row.best_peer().map(|peer| rate(peer.timing.milliseconds));
            row.details.insert("tokens_per_second".into(), json!(ours));
            row.details.insert("peer_tokens_per_second".into(), json!(peer));
            row.details
                .insert("speed_up".into(), json!(peer.map(|peer| ours / peer)));
            row.details.insert("prompts_ms".into(), json!(prompts));
            row.details.insert("tokens_ms".into(), json!(tokens));
            bench.add(row)?;
            let beside = peer.map_or_else(String::new, |peer| {
                format!(", PyTorch {peer:.0}, {:.2} times", ours / peer)
            });
            bench.say(&format!(
                "  {ours:.0} tokens/s{beside}; prompts {prompts:.2} ms, then {:.3} ms a token",
                tokens / self.tokens as f64
            ))?;
        }
        Ok(())
    }

    /// A recorded step.
    fn step(
        &self,
        bench: &mut Bench,
        decoding: &mut Decoding<'_>,
        name: &str,
        sizes: &Value,
        error: f64,
        kernels: bool,
    ) -> anyhow::Result<()> {
        let device = bench.device.clone();
        let (_, peak, resident) = bench.peak_of(&mut || decoding.again())?;
        let times = samples(&device, 3, bench.common.repeats as usize, || decoding.again())?;
        let work = self.work(1, self.half());
        let mut row =
            Row::new(name, sizes.clone(), Timing::of(times), work, bench.ceilings()).checked(error, TOLERANCE);
        row.peak_bytes = peak;
        row.activation_bytes = peak - resident;
        let rate = self.batch as f64 * 1e3 / row.timing.milliseconds;
        row.details.insert("tokens_per_second".into(), json!(rate));
        row.details.insert("copy_share".into(), json!(row.share));
        let share = row.share;
        bench.add(row)?;
        bench.say(&format!(
            "  {} a step at {} of the copy's rate, {rate:.0} tokens/s",
            format_bytes(work.bytes),
            percent(share)
        ))?;
        if kernels {
            let ((), profile) = measure(&device, || decoding.called())?;
            bench.say(&l2p_bins::profile::table(&profile, bench.ceilings()))?;
        }
        Ok(())
    }

    /// Tokens of a text at which a single step is timed.
    fn half(&self) -> usize {
        self.prompt + self.tokens / 2
    }

    /// What so many steps read when the texts have that many tokens.
    fn work(&self, steps: usize, keys: usize) -> Work {
        let config = self.model.config();
        let element = self.model.device().compute_dtype().size();
        let cached = 2 * config.layers * config.kv_heads * config.head_dim * element * keys * self.batch;
        let weights = self.model.step_bytes();
        let products = weights / element as u64 * self.batch as u64;
        Work {
            flops: 2 * products * steps as u64,
            bytes: (weights + cached as u64) * steps as u64,
        }
    }

    fn texts(&self) -> Vec<Vec<u32>> {
        (0..self.batch)
            .map(|text| prompt(self.model.config(), text, self.half()))
            .collect()
    }

    /// Reads half of every text and takes steps at that place until they are recorded. Gives how far a replayed step is from one run call
    /// by call: 0, or it is wrong.
    fn prepare(&self, decoding: &mut Decoding<'_>) -> Result<f64> {
        let texts = self.texts();
        let before: Vec<(usize, &[u32])> = texts.iter().map(|text| &text[..text.len() - 1]).enumerate().collect();
        decoding.read(&before)?;
        let position = self.half() - 1;
        let feed = |text: &Vec<u32>| {
            let token = text[position];
            Some(Feed { token, position })
        };
        let feeds: Vec<Option<Feed>> = texts.iter().map(feed).collect();
        let mut step = || decoding.step(&feeds)?.to_vec::<f32>();
        let called = step()?;
        step()?;
        let replayed = step()?;
        match called.iter().zip(&replayed).all(|(a, b)| a.to_bits() == b.to_bits()) {
            true => Ok(0.0),
            false => Ok(relative_error(&replayed, &called).max(1.0)),
        }
    }

    /// Reads all prompts and writes all texts; the milliseconds of both, by the host's clock.
    fn write(&self, decoding: &mut Decoding<'_>) -> Result<[f64; 2]> {
        let start = Instant::now();
        let texts: Vec<Vec<u32>> = (0..self.batch)
            .map(|text| prompt(self.model.config(), text, self.prompt))
            .collect();
        let before = texts.iter().map(|text| &text[..text.len() - 1]).enumerate();
        let before: Vec<(usize, &[u32])> = before.filter(|(_, text)| !text.is_empty()).collect();
        decoding.read(&before)?;
        self.model.device().synchronize()?;
        let prompts = start.elapsed().as_secs_f64() * 1e3;
        let mut last: Vec<u32> = texts.iter().filter_map(|text| text.last().copied()).collect();
        let choices = vec![TokenChoice::GREEDY; self.batch];
        for step in 0..self.tokens {
            let position = self.prompt - 1 + step;
            let feeds: Vec<Option<Feed>> = last.iter().map(|&token| Some(Feed { token, position })).collect();
            let logits: Tensor = decoding.step(&feeds)?;
            let chosen = sample_tokens(&logits, &choices, None)?;
            last = chosen
                .to_vec::<i32>()?
                .into_iter()
                .map(|token| token.max(0) as u32)
                .collect();
        }
        Ok([prompts, start.elapsed().as_secs_f64() * 1e3 - prompts])
    }
}
