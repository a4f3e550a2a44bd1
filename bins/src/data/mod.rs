//! `l2p-data`: arguments, prompts and progress. The work itself is `l2p_engine::data`.

mod arguments;

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use l2p_engine::checkpoint::ModelPaths;
use l2p_engine::data::{SynthesisJob, SynthesisOptions, SynthesisReport, synthesize};
use l2p_engine::limits::{Batch, Entries, Side, Steps};
use l2p_engine::pipeline::{Pipeline, Settings};
use l2p_engine::{Device, Error};
use serde::Deserialize;

pub use arguments::Arguments;
use arguments::{Command, Synthesize};

use crate::progress::PhaseBar;
use crate::prompts;

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
    for note in pipeline.notes()? {
        crate::say(format_args!("note: {note}"));
    }
    let batch = batch_size(arguments, &pipeline, &settings).min(jobs.len());
    pipeline.expect_room(&settings, batch)?;
    if jobs.len() > batch {
        pipeline.share_steps(&settings, batch)?;
    }
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
    if let Some(word) = prompts::word_on_guidance(settings.cfg) {
        crate::say(format_args!("note: {word}"));
    }
    let started = Instant::now();
    let mut display = PhaseBar::new();
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
    let report = report?;
    if !report.held {
        crate::say(format_args!(
            "note: the file system of {} knows no locks: see to it that no other run writes into it",
            arguments.out.display()
        ));
    }
    tell(arguments, &report, started.elapsed())
}

fn tell(arguments: &Synthesize, report: &SynthesisReport, taken: Duration) -> anyhow::Result<()> {
    if arguments.json {
        let mut value = serde_json::to_value(report)?;
        value["seconds"] = serde_json::to_value(taken.as_secs_f64())?;
        return crate::print(&format!("{value:#}\n"));
    }
    crate::print(&format!(
        "{}: {} pictures drawn in {:.1} s{}, {} were there; {} prompts encoded\n",
        arguments.out.display(),
        report.drawn,
        taken.as_secs_f64(),
        match report.redrawn {
            0 => String::new(),
            redrawn => format!(" ({redrawn} of them in place of damaged ones)"),
        },
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
    let mut lines = prompts::read::<Line>(&arguments.prompts)?;
    if let Some(limit) = arguments.limit {
        lines.truncate(limit.get());
    }
    let pictures = lines.len().saturating_mul(arguments.count.get());
    let pictures = Entries::new(pictures as u64).with_context(|| {
        format!(
            "{} prompts, {} pictures of each (--count), are more than the {} pictures that a data set may have",
            lines.len(),
            arguments.count,
            Entries::MOST
        )
    })?;
    let mut jobs = Vec::with_capacity(pictures.get());
    for copy in 0..arguments.count.get() as u64 {
        for line in &lines {
            let seed = match line.content.seed {
                Some(seed) => seed.wrapping_add(copy),
                None => arguments.seed.wrapping_add(jobs.len() as u64),
            };
            jobs.push(SynthesisJob {
                prompt: line.content.prompt.clone(),
                seed,
            });
        }
    }
    Ok(jobs)
}

/// The settings: what was asked for, then what the model says.
fn settings(arguments: &Synthesize, pipeline: &Pipeline) -> anyhow::Result<Settings> {
    let defaults = pipeline.defaults()?;
    let side = |asked: Option<Side>, default: usize| asked.map_or(default, Side::get);
    let settings = Settings {
        width: side(arguments.width, defaults.width),
        height: side(arguments.height, defaults.height),
        steps: arguments.steps.map_or(defaults.steps, Steps::get),
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
    arguments.batch.map_or(automatic, Batch::get)
}
