//! `l2p-data`: arguments, prompts and progress. The work itself is `l2p_engine::data`.

mod arguments;
mod dice;
pub mod language;

use std::fmt;
use std::hash::{Hash, Hasher};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use l2p_engine::checkpoint::ModelPaths;
use l2p_engine::data::{SynthesisJob, SynthesisOptions, SynthesisReport, synthesize};
use l2p_engine::dist::{Launch, World};
use l2p_engine::limits::{Entries, Side, Steps};
use l2p_engine::pipeline::{Asked, Batching, ModelFiles, Pipeline, Settings};
use l2p_engine::{Device, Error};
use serde::Deserialize;

pub use arguments::Arguments;
use arguments::{Command, Synthesize};

use crate::progress::PhaseBar;
use crate::{launch, prompts};

/// Does what the arguments ask for, and returns the exit code. Errors are printed.
pub fn main(arguments: &Arguments) -> ExitCode {
    match &arguments.command {
        Command::Synthesize(arguments) => arguments.ranks.run(|launch| synthesize_among(arguments, launch)),
    }
}

/// Does what the arguments ask for, in this process alone.
///
/// # Errors
/// Whatever the user needs to know, as one sentence.
pub fn data(arguments: Arguments) -> anyhow::Result<()> {
    match arguments.command {
        Command::Synthesize(arguments) => synthesize_among(&arguments, None),
    }
}

fn synthesize_among(arguments: &Synthesize, launch: Option<Launch>) -> anyhow::Result<()> {
    let (device, world) = arguments.ranks.join(launch, arguments.device)?;
    let outcome = synthesize_set(arguments, device, &world);
    launch::part(&world, outcome)
}

fn synthesize_set(arguments: &Synthesize, device: Device, world: &World) -> anyhow::Result<()> {
    let say = |text: fmt::Arguments<'_>| {
        if world.is_first() {
            crate::say(text);
        }
    };
    let jobs = jobs(arguments)?;
    let paths = ModelPaths::resolve(&arguments.model, &arguments.path_overrides())?;
    let mut files = arguments.weights.open(paths, device)?;
    let settings = settings(arguments, &files)?;
    for note in files.notes()? {
        say(format_args!("note: {note}"));
    }
    let batch = match arguments.batch {
        Some(batch) => batch.get().min(jobs.len()),
        None if arguments.memory.vram.is_some() => 1,
        None => files.batch_size(&settings, jobs.len(), Batching::BULK)?,
    };
    // All draw the same batches.
    let batch = world.decide("batch", || Ok(batch))?;
    if let Some(note) = arguments.memory.fit(&mut files, &settings, batch)? {
        say(format_args!("note: {note}"));
    }
    files.ensure_room(&settings, batch)?;
    let mut pipeline = Pipeline::of(Arc::new(files), false);
    pipeline.keep_steps(usize::from(jobs.len() > batch));
    let options = SynthesisOptions {
        settings,
        rng: arguments.rng,
        batch,
        extension: arguments.extension().into(),
        cache: arguments.cache.clone().unwrap_or_else(|| arguments.out.join("cache")),
    };
    agree(arguments, &jobs, &settings, world)?;
    if world.is_first() {
        announce(jobs.len(), batch, &settings, pipeline.device(), world);
    }
    let started = Instant::now();
    let mut display = PhaseBar::new();
    let report = synthesize(
        &mut pipeline,
        &arguments.out,
        &jobs,
        &options,
        world,
        &mut |what, done, total| {
            if world.is_first() {
                display.show(what, done as u64, total as u64);
            }
            match crate::stop_requested() {
                true => Err(Error::Interrupted),
                false => Ok(()),
            }
        },
    );
    display.clear();
    let report = report?;
    if !report.held {
        say(format_args!(
            "note: the file system of {} knows no locks: see to it that no other run writes into it",
            arguments.out.display()
        ));
    }
    match world.is_first() {
        true => tell(arguments, &report, started.elapsed()),
        false => Ok(()),
    }
}

fn announce(pictures: usize, batch: usize, settings: &Settings, device: &Device, world: &World) {
    crate::say(format_args!(
        "{pictures} pictures of {}x{} on {}{device}, {batch} at once: {} steps, shift {}, cfg {}",
        settings.width,
        settings.height,
        match world.size() {
            1 => String::new(),
            ranks => format!("{ranks} ranks, the first on "),
        },
        settings.steps,
        settings.shift,
        settings.cfg
    ));
    if let Some(word) = prompts::word_on_guidance(settings.cfg) {
        crate::say(format_args!("note: {word}"));
    }
}

/// Sees to it that all ranks draw the same.
fn agree(arguments: &Synthesize, jobs: &[SynthesisJob], settings: &Settings, world: &World) -> anyhow::Result<()> {
    let mut prompts = std::hash::DefaultHasher::new();
    jobs.hash(&mut prompts);
    let (rng, extension, prompts) = (arguments.rng, arguments.extension(), prompts.finish());
    let weights = &arguments.weights;
    let asked = format!("{settings:?}\n{rng}\n{extension}\n{weights:?}\nprompts {prompts:x}");
    Ok(world.agree("settings", asked.as_bytes())?)
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
fn settings(arguments: &Synthesize, files: &ModelFiles) -> anyhow::Result<Settings> {
    let settings = files.settings(&Asked {
        width: arguments.width.map(Side::get),
        height: arguments.height.map(Side::get),
        steps: arguments.steps.map(Steps::get),
        shift: arguments.shift,
        cfg: arguments.cfg,
    })?;
    let multiple = files.size_multiple();
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
