//! Drawing the pictures of a set: prompts of a file, or the checked ones of the folder. The work itself is `l2p_engine::data`.

use std::collections::HashMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use l2p_engine::checkpoint::ModelPaths;
use l2p_engine::data::{SynthesisJob, SynthesisOptions, SynthesisReport, synthesize, write_table};
use l2p_engine::dist::{Launch, World};
use l2p_engine::files;
use l2p_engine::limits::{Budget, Entries, Side, Steps};
use l2p_engine::pipeline::{Asked, Batching, ModelFiles, Pipeline, Settings};
use l2p_engine::{Device, Error};
use serde::Deserialize;
use serde_json::json;

use super::arguments::{DrawFlags, Synthesize};
use super::folder::{self, Manifest};
use super::forecast::{self, Forecast};
use crate::progress::PhaseBar;
use crate::{launch, prompts};

/// What the engine lists pictures in.
const METADATA: &str = "metadata.jsonl";

/// What is to be drawn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Order<'a> {
    /// A file of prompts; the checked ones of the folder without one.
    pub prompts: Option<&'a Path>,
    /// Pictures of each prompt.
    pub per_prompt: usize,
    /// Only so many prompts.
    pub limit: Option<usize>,
    /// The folder.
    pub out: &'a Path,
    /// Of the first picture.
    pub seed: u64,
    /// Whether the result is wanted as JSON.
    pub json: bool,
    /// Whether nothing is printed of the result.
    pub quiet: bool,
    /// How it is drawn.
    pub draw: &'a DrawFlags,
    /// What stands before the name of what is being done.
    pub stage: &'static str,
}

impl<'a> From<&'a Synthesize> for Order<'a> {
    fn from(arguments: &'a Synthesize) -> Self {
        Order {
            prompts: arguments.prompts.as_deref(),
            per_prompt: arguments.count.get(),
            limit: arguments.limit.map(|limit| limit.get()),
            out: &arguments.out,
            seed: arguments.seed,
            json: arguments.json,
            quiet: false,
            draw: &arguments.draw,
            stage: "",
        }
    }
}

/// Draws, as one of several ranks where a launcher started this process.
///
/// # Errors
/// Whatever the user needs to know, as one sentence.
pub(super) fn synthesize_among(order: &Order<'_>, launch: Option<Launch>) -> anyhow::Result<()> {
    let (device, world) = order.draw.ranks.join(launch, order.draw.device)?;
    let outcome = synthesize_set(order, device, &world);
    launch::part(&world, outcome)
}

fn synthesize_set(order: &Order<'_>, device: Device, world: &World) -> anyhow::Result<()> {
    let say = |text: fmt::Arguments<'_>| {
        if world.is_first() {
            crate::say(text);
        }
    };
    let jobs = jobs(order)?;
    let flags = order.draw;
    let paths = ModelPaths::resolve(&flags.model, &flags.parts.overrides())?;
    let mut files = flags.weights.open(paths, device)?;
    let settings = settings(flags, &files)?;
    for note in files.notes()? {
        say(format_args!("note: {note}"));
    }
    let batch = match flags.batch {
        Some(batch) => batch.get().min(jobs.len()),
        None if flags.memory.vram.is_some() => 1,
        None => files.batch_size(&settings, jobs.len(), Batching::BULK)?,
    };
    // All draw the same batches.
    let batch = world.decide("batch", || Ok(batch))?;
    if let Some(note) = flags.memory.fit(&mut files, &settings, batch)? {
        say(format_args!("note: {note}"));
    }
    files.ensure_room(&settings, batch)?;
    let mut pipeline = Pipeline::of(Arc::new(files), false);
    pipeline.keep_steps(usize::from(jobs.len() > batch));
    let options = SynthesisOptions {
        settings,
        rng: flags.rng,
        batch,
        extension: flags.extension().into(),
        cache: flags.cache.clone().unwrap_or_else(|| order.out.join("cache")),
    };
    agree(flags, &jobs, &settings, world)?;
    if world.is_first() {
        announce(jobs.len(), batch, &settings, pipeline.device(), world);
        say(format_args!("{}", forecast::disk(order, &settings, jobs.len())));
    }
    let started = Instant::now();
    let mut display = PhaseBar::new();
    display.stage(order.stage);
    let mut forecast = Forecast::new(order.out, jobs.len(), batch * settings.steps);
    let report = synthesize(
        &mut pipeline,
        order.out,
        &jobs,
        &options,
        world,
        &mut |what, done, total| {
            if world.is_first() {
                display.show(what, done as u64, total as u64);
                if let Some(word) = forecast.after(what, done, total) {
                    display.suspend(|| crate::say(word));
                }
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
            order.out.display()
        ));
    }
    if world.is_first() {
        write_table(order.out)?;
        note(order, &settings, &report)?;
    }
    match world.is_first() {
        true => tell(order, &report, batch, started.elapsed()),
        false => Ok(()),
    }
}

fn announce(pictures: usize, batch: usize, settings: &Settings, device: &Device, world: &World) {
    crate::say(format_args!(
        "{pictures} pictures of {}x{} on {}{device}, {batch} at once: {} steps{}, shift {}, cfg {}",
        settings.width,
        settings.height,
        match world.size() {
            1 => String::new(),
            ranks => format!("{ranks} ranks, the first on "),
        },
        settings.steps,
        settings.solver.in_words(),
        settings.shift,
        settings.cfg
    ));
    if let Some(word) = prompts::word_on_guidance(settings.cfg) {
        crate::say(format_args!("note: {word}"));
    }
}

/// Sees to it that all ranks draw the same.
fn agree(flags: &DrawFlags, jobs: &[SynthesisJob], settings: &Settings, world: &World) -> anyhow::Result<()> {
    let mut prompts = std::hash::DefaultHasher::new();
    jobs.hash(&mut prompts);
    let (rng, extension, prompts) = (flags.rng, flags.extension(), prompts.finish());
    let weights = &flags.weights;
    let asked = format!("{settings:?}\n{rng}\n{extension}\n{weights:?}\nprompts {prompts:x}");
    Ok(world.agree("settings", asked.as_bytes())?)
}

fn tell(order: &Order<'_>, report: &SynthesisReport, batch: usize, taken: Duration) -> anyhow::Result<()> {
    if order.quiet {
        return Ok(());
    }
    if order.json {
        let mut value = serde_json::to_value(report)?;
        value["batch"] = batch.into();
        value["seconds"] = serde_json::to_value(taken.as_secs_f64())?;
        return crate::print(&format!("{value:#}\n"));
    }
    crate::print(&format!(
        "{}: {} pictures drawn in {:.1} s{}, {} were there; {} prompts encoded\n",
        order.out.display(),
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

/// The pictures to be drawn: every prompt once, then every prompt a second time and so on, so that a larger count adds at the end.
/// Prompts of the folder itself may have become more since pictures were drawn; those that are drawn come first, as they were.
fn jobs(order: &Order<'_>) -> anyhow::Result<Vec<SynthesisJob>> {
    let mut lines = match order.prompts {
        Some(path) => prompts::read::<Line>(path)?
            .into_iter()
            .map(|line| line.content)
            .collect(),
        None => checked(order)?,
    };
    lines.truncate(order.limit.unwrap_or(usize::MAX));
    let pictures = lines.len().saturating_mul(order.per_prompt);
    let pictures = Entries::new(pictures as u64).with_context(|| {
        format!(
            "{} prompts, {} pictures of each (--count), are more than the {} pictures that a data set may have",
            lines.len(),
            order.per_prompt,
            Entries::MOST
        )
    })?;
    let mut jobs = Vec::with_capacity(pictures.get());
    for copy in 0..order.per_prompt as u64 {
        for line in &lines {
            let seed = match (line.seed, order.prompts) {
                (Some(seed), Some(_)) => seed.wrapping_add(copy),
                // Of a prompt in the folder: whatever other prompts there are, and how many pictures of each.
                (Some(seed), None) => seed.wrapping_add(copy << 32),
                (None, _) => order.seed.wrapping_add(jobs.len() as u64),
            };
            jobs.push(SynthesisJob {
                prompt: line.prompt.clone(),
                seed,
            });
        }
    }
    match order.prompts {
        Some(_) => Ok(jobs),
        None => as_drawn(order.out, jobs),
    }
}

/// The prompts of the folder that may be used, each with a seed of its own.
fn checked(order: &Order<'_>) -> anyhow::Result<Vec<Line>> {
    let prompts = folder::prompts(order.out)?;
    let verdicts = folder::verdicts(order.out, prompts.len())?;
    let open = verdicts.iter().filter(|verdict| verdict.is_none()).count();
    if open > 0 {
        bail!(
            "{}: {open} of {} prompts are not checked yet; do that with l2p-data check --out {0}",
            order.out.display(),
            prompts.len()
        );
    }
    let valid = prompts
        .into_iter()
        .zip(verdicts)
        .filter(|(_, verdict)| verdict.as_ref().is_some_and(|check| check.is_valid));
    let lines: Vec<Line> = valid
        .map(|(prompt, _)| Line {
            seed: Some(order.seed.wrapping_add(prompt.id as u64)),
            prompt: prompt.prompt,
        })
        .collect();
    if lines.is_empty() {
        bail!(
            "{}: none of its prompts may be used; see the reasons with l2p-data report {0}",
            order.out.display()
        );
    }
    Ok(lines)
}

/// These jobs, in the order of the pictures that are there as far as they are of them.
fn as_drawn(out: &Path, jobs: Vec<SynthesisJob>) -> anyhow::Result<Vec<SynthesisJob>> {
    let path = out.join(METADATA);
    if !path.exists() {
        return Ok(jobs);
    }
    let bytes = files::read(&path, Budget::METADATA)?;
    let mut places: HashMap<SynthesisJob, usize> = HashMap::with_capacity(jobs.len());
    for (index, job) in jobs.iter().enumerate() {
        places.entry(job.clone()).or_insert(index);
    }
    let mut taken = vec![false; jobs.len()];
    let mut ordered = Vec::with_capacity(jobs.len());
    for line in bytes.split(|byte| *byte == b'\n') {
        // A line that is cut, or of another set, is the engine's to judge.
        let Ok(Line {
            prompt,
            seed: Some(seed),
        }) = serde_json::from_slice(line)
        else {
            break;
        };
        let job = SynthesisJob { prompt, seed };
        let Some(place) = places.get(&job).copied().filter(|place| !taken[*place]) else {
            break;
        };
        taken[place] = true;
        ordered.push(job);
    }
    ordered.extend(
        jobs.into_iter()
            .zip(taken)
            .filter(|(_, taken)| !taken)
            .map(|(job, _)| job),
    );
    Ok(ordered)
}

/// Notes in the folder's manifest what was drawn, where the prompts are its own.
fn note(order: &Order<'_>, settings: &Settings, report: &SynthesisReport) -> anyhow::Result<()> {
    if order.prompts.is_some() {
        return Ok(());
    }
    let results = json!({
        "model": order.draw.model.display().to_string(),
        "seed": order.seed,
        "per_prompt": order.per_prompt,
        "drawing": settings,
        "format": order.draw.extension(),
        "pictures": report.found + report.drawn,
    });
    Manifest::open(order.out)?.finish("synthesize", results)
}

/// The settings: what was asked for, then what the model says.
fn settings(flags: &DrawFlags, files: &ModelFiles) -> anyhow::Result<Settings> {
    let settings = files.settings(&Asked {
        width: flags.width.map(Side::get),
        height: flags.height.map(Side::get),
        steps: flags.steps.map(Steps::get),
        shift: flags.shift,
        cfg: flags.cfg,
        solver: flags.solver,
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
