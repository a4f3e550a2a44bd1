//! `l2p-data`: arguments, prompts and progress. The work itself is `l2p_engine::data`.

mod arguments;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use l2p_engine::checkpoint::ModelPaths;
use l2p_engine::data::{SynthesisJob, SynthesisOptions, SynthesisReport, synthesize};
use l2p_engine::pipeline::{Pipeline, Settings};
use l2p_engine::{Device, Error};
use serde::Deserialize;

pub use arguments::Arguments;
use arguments::{Command, Synthesize};

use crate::progress::PhaseBar;

/// Pictures are drawn together as long as a batch has at most this many image tokens.
const TOKENS_PER_BATCH: usize = 16384;
/// No batch is larger than this.
const LARGEST_BATCH: usize = 256;

/// Does what the arguments ask for.
///
/// # Errors
/// Whatever the user needs to know, as one sentence.
pub fn data(arguments: Arguments) -> anyhow::Result<()> {
    match arguments.command {
        Command::Synthesize(arguments) => synthesize_set(&arguments),
    }
}

fn synthesize_set(arguments: &Synthesize) -> anyhow::Result<()> {
    let jobs = jobs(arguments)?;
    let paths = ModelPaths::resolve(&arguments.model, &arguments.path_overrides())?;
    let device = Device::open(arguments.device)?;
    let mut pipeline = Pipeline::open(paths, device, false)?;
    let settings = settings(arguments, &pipeline)?;
    let batch = batch_size(arguments, &pipeline, &settings).min(jobs.len());
    pipeline.expect_room(&settings, batch)?;
    let options = SynthesisOptions {
        settings,
        rng: arguments.rng,
        batch,
        extension: arguments.extension().into(),
        cache: arguments.cache.clone().unwrap_or_else(|| arguments.out.join("cache")),
    };
    crate::say(format_args!(
        "{} pictures of {}x{} on {}, {batch} at once: {} steps, shift {}, cfg {}",
        jobs.len(),
        settings.width,
        settings.height,
        pipeline.device(),
        settings.steps,
        settings.shift,
        settings.cfg
    ));
    let started = Instant::now();
    let mut display = PhaseBar::new(true);
    let report = synthesize(
        &mut pipeline,
        &arguments.out,
        &jobs,
        &options,
        &mut |what, done, total| {
            display.show(what, done as u64, total as u64);
            match crate::stop_requested() {
                true => Err(Error::Interrupted),
                false => Ok(()),
            }
        },
    );
    display.clear();
    tell(arguments, &report?, started.elapsed())
}

fn tell(arguments: &Synthesize, report: &SynthesisReport, taken: Duration) -> anyhow::Result<()> {
    if arguments.json {
        let mut value = serde_json::to_value(report)?;
        value["seconds"] = serde_json::to_value(taken.as_secs_f64())?;
        return crate::print(&format!("{value:#}\n"));
    }
    crate::print(&format!(
        "{}: {} pictures drawn in {:.1} s, {} were there; {} prompts encoded\n",
        arguments.out.display(),
        report.drawn,
        taken.as_secs_f64(),
        report.found,
        report.encoded
    ))
}

/// A line of a prompt file.
#[derive(Deserialize)]
struct Line {
    #[serde(alias = "text")]
    prompt: String,
    seed: Option<u64>,
}

/// Every prompt once, then every prompt a second time and so on, so that a larger count adds at the end.
fn jobs(arguments: &Synthesize) -> anyhow::Result<Vec<SynthesisJob>> {
    let mut lines = read_lines(&arguments.prompts)?;
    if let Some(limit) = arguments.limit {
        lines.truncate(limit as usize);
    }
    let mut jobs = Vec::with_capacity(lines.len() * arguments.count as usize);
    for copy in 0..u64::from(arguments.count) {
        for line in &lines {
            let seed = match line.seed {
                Some(seed) => seed.wrapping_add(copy),
                None => arguments.seed.wrapping_add(jobs.len() as u64),
            };
            jobs.push(SynthesisJob {
                prompt: line.prompt.clone(),
                seed,
            });
        }
    }
    Ok(jobs)
}

fn read_lines(path: &Path) -> anyhow::Result<Vec<Line>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    // Editors on Windows begin a file with a byte order mark.
    let lines = text.strip_prefix('\u{feff}').unwrap_or(&text).lines().enumerate();
    let lines: Vec<Line> = lines
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(index, line)| {
            let expected = || {
                format!(
                    "{}, line {}: expected {{\"prompt\": \"...\"}}",
                    path.display(),
                    index + 1
                )
            };
            serde_json::from_str(line).with_context(expected)
        })
        .collect::<anyhow::Result<_>>()?;
    if lines.is_empty() {
        bail!(
            "{}: holds no prompts; write one JSON object per line, {{\"prompt\": \"...\"}}",
            path.display()
        );
    }
    Ok(lines)
}

/// The settings: what was asked for, then what the model says.
fn settings(arguments: &Synthesize, pipeline: &Pipeline) -> anyhow::Result<Settings> {
    let defaults = pipeline.defaults()?;
    let side = |asked: Option<u32>, default: usize| asked.map_or(default, |side| side as usize);
    let settings = Settings {
        width: side(arguments.width, defaults.width),
        height: side(arguments.height, defaults.height),
        steps: arguments.steps.map_or(defaults.steps, |steps| steps as usize),
        shift: arguments.shift.unwrap_or(defaults.shift),
        cfg: arguments.cfg.unwrap_or(defaults.cfg),
    };
    settings.check()?;
    let multiple = pipeline.size_multiple();
    for (name, side) in [("width", settings.width), ("height", settings.height)] {
        if side % multiple != 0 {
            bail!(
                "this model draws multiples of {multiple} pixels: use --{name} {}",
                side.next_multiple_of(multiple)
            );
        }
    }
    Ok(settings)
}

fn batch_size(arguments: &Synthesize, pipeline: &Pipeline, settings: &Settings) -> usize {
    let automatic = match pipeline.device() {
        // On the CPU a batch gains nothing.
        Device::Cpu => 1,
        Device::Cuda(_) => (TOKENS_PER_BATCH / pipeline.image_tokens(settings).max(1)).clamp(1, LARGEST_BATCH),
    };
    arguments.batch.map_or(automatic, |batch| batch as usize)
}
