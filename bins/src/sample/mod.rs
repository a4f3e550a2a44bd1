//! `l2p-sample`: arguments, what to draw, progress and files. The work itself is done by a worker of `l2p_engine::serve`.

mod arguments;
mod display;
mod drawing;
mod found;
mod grids;
mod inputs;
mod jobs;
mod manifest;
mod plan;
mod report;
mod sets;
mod start;
mod warm;
mod writer;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use l2p_engine::ceilings::Ceilings;
use l2p_engine::checkpoint::ModelPaths;
use l2p_engine::device::probe;
use l2p_engine::dist::{Launch, World};
use l2p_engine::files::FolderLock;
use l2p_engine::limits::Ranks;
use l2p_engine::pipeline::ModelFiles;
use l2p_engine::serve::{Event, Worker, WorkerOptions};
use l2p_engine::{Device, Error};

pub use arguments::Arguments;
pub(crate) use arguments::device_choice;
use arguments::{Command, Precision};
use drawing::{BATCHES_AHEAD, Work};
use inputs::{Captions, RawImages};
pub(crate) use jobs::published;
use manifest::Manifest;
use plan::Plan;
use report::{Report, Share};
use sets::Set;
pub(crate) use start::start_settings;

use crate::launch;
use crate::progress::PhaseBar;

/// Does what the arguments ask for, alone or as one of many ranks, and returns the exit code. Errors are printed.
pub fn main(arguments: Arguments) -> ExitCode {
    if arguments.draws_nothing() {
        return crate::run(|| sample(arguments));
    }
    let ranks = arguments.ranks.clone();
    // Before any of them is started, so that it is said once.
    if let Err(error) = arguments.ensure_shareable(ranks.ranks.map_or(1, Ranks::get)) {
        return crate::run(|| Err(error));
    }
    ranks.run(|launch| sample_among(arguments, launch))
}

/// Does what the arguments ask for, in this process alone.
///
/// # Errors
/// Whatever the user needs to know, as one sentence.
pub fn sample(arguments: Arguments) -> anyhow::Result<()> {
    if arguments.list_devices || matches!(arguments.command, Some(Command::Devices { .. })) {
        let as_json = matches!(arguments.command, Some(Command::Devices { json: true }));
        return list_devices(as_json);
    }
    if let Some(Command::Warm(options)) = &arguments.command {
        return warm::warm(options);
    }
    sample_among(arguments, None)
}

fn sample_among(arguments: Arguments, launch: Option<Launch>) -> anyhow::Result<()> {
    let _range = l2p_engine::profile::range(c"run");
    let start = Instant::now();
    if let Some(launch) = &launch {
        arguments.ensure_shareable(launch.world)?;
    }
    let like = arguments
        .like
        .as_deref()
        .map(l2p_engine::image_io::read_settings)
        .transpose()?;
    let named = arguments.model.is_some();
    let mut arguments = arguments.completed(like.as_ref())?;
    arguments
        .start
        .check(arguments.width.is_some() || arguments.height.is_some())?;
    let set = match &arguments.prompts {
        Some(path) => Set::open(path, arguments.layout, arguments.count, &arguments.out)?,
        None => None,
    };
    if set.is_some() {
        arguments = arguments.for_a_set()?;
    }
    let (device, world) = arguments.ranks.join(launch, arguments.device_choice())?;
    let outcome = sample_part(&arguments, set.as_ref(), (named, start), device, &world);
    launch::part(&world, outcome)
}

/// What one of the ranks does; `named` where the arguments named the model themselves and not through a picture.
fn sample_part(
    arguments: &Arguments,
    set: Option<&Set>,
    (named, start): (bool, Instant),
    device: Device,
    world: &World,
) -> anyhow::Result<()> {
    let jobs = jobs::jobs(arguments, set, world)?;
    let mut files = open_model(arguments, named, device)?;
    let plan = Plan::new(arguments, set, jobs, &mut files, world)?;
    let files = Arc::new(files);
    let noise = arguments
        .noise
        .as_deref()
        .map(|path| inputs::read_noise(path, &files, &plan.settings))
        .transpose()?;
    let embeds = arguments
        .embeds
        .as_deref()
        .map(|path| inputs::read_embeds(path, &files, plan.jobs.len(), plan.guided()))
        .transpose()?;
    if embeds.is_none() {
        files.ensure_text_encoder()?;
    }
    let raw = world.on_first("folders", || {
        jobs::ensure_writable(&plan.jobs, plan.shown).map_err(crate::as_engine)?;
        arguments.save_raw.as_deref().map(RawImages::new).transpose()
    })?;
    let raw = raw.flatten();
    let _held = set
        .map(|set| prepare(arguments, set, &plan, &files, world))
        .transpose()?;
    if world.is_first() {
        plan.announce(&files, world);
    }
    let mut report = Report::new(arguments, &files, &plan);
    let own = drawing::own(&plan.missing, plan.batch, world.rank(), world.size());
    let options = WorkerOptions {
        keep_text_encoder: arguments.keep_text_encoder,
        recordings: usize::from(own.len() > plan.batch),
        most_open: BATCHES_AHEAD,
    };
    let worker = match own.is_empty() {
        true => None,
        false => Some(Worker::start(files, options)?),
    };
    let work = Work {
        jobs: own.iter().map(|&number| &plan.jobs[number]).collect(),
        plan: &plan,
        noise: noise.map(Arc::new),
        start: plan.start.as_ref().map(|start| start.image.clone()),
        raw: raw.is_some(),
    };
    let captions = match embeds {
        Some(captions) => captions,
        None => encode(worker.as_ref(), &work, world, &mut report)?,
    };
    let loaded = worker.as_ref().map(|worker| load(worker, world)).transpose();
    let loaded = world.together("model", loaded)?;
    loaded.into_iter().for_each(|taken| report.took(taken));
    let drawn = drawing::draw(arguments, worker.as_ref(), &work, &captions, raw, world)?;
    report.took(drawn.taken);
    let share = Share::of(own, drawn.copies, &report);
    let Some(shares) = world.gather("what was drawn", share)? else {
        return Ok(());
    };
    for file in report.drawn(&plan, shares, world) {
        crate::say(format_args!("{}", file.display()));
    }
    if let Some(set) = set {
        finish(set, &plan, world)?;
    }
    report.total(start.elapsed());
    if let (true, Some(worker)) = (arguments.profile, &worker) {
        profile(worker, &work, &captions, &mut report)?;
    }
    crate::print(&report.finish(arguments.report)?)
}

/// Holds the folder of a set's pictures, and writes what stands beside them.
fn prepare(
    arguments: &Arguments,
    set: &Set,
    plan: &Plan,
    files: &ModelFiles,
    world: &World,
) -> anyhow::Result<Option<FolderLock>> {
    let prepared = world.on_first("set", || {
        let held = FolderLock::acquire(&set.folder, "l2p-sample")?;
        let manifest = Manifest::of(arguments, set, (&plan.model, &plan.settings, plan.rng), files)?;
        // Another run may have drawn meanwhile.
        manifest.ensure_same(&set.folder).map_err(crate::as_engine)?;
        manifest.write(&set.folder)?;
        for (name, text) in set.entries.iter().filter_map(|entry| entry.note.as_ref()) {
            l2p_engine::files::replace(&set.folder.join(name), text.as_bytes())?;
        }
        if set.folder != set.out {
            std::fs::create_dir_all(&set.out).map_err(|error| Error::io(&set.out, error))?;
        }
        Ok(held)
    })?;
    Ok(prepared)
}

/// Makes the grids of a set, and says what reads its folder.
fn finish(set: &Set, plan: &Plan, world: &World) -> anyhow::Result<()> {
    let mut display = PhaseBar::new();
    let made = grids::make(set, &plan.missing, &mut |done, total| {
        display.show("making grids", done as u64, total as u64);
        // The others have ended, or wait for this one.
        world.work();
        match crate::stop_requested() {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    });
    display.clear();
    if let made @ 1.. = made? {
        crate::say(format_args!("{} in {}", count(made, "grid"), set.out.display()));
    }
    let side = plan.settings.width.max(plan.settings.height);
    crate::say(format_args!("next: {}", set.next_command(side)));
    Ok(())
}

/// The model of complete arguments; `named` where they named it themselves and not through a picture.
fn open_model(arguments: &Arguments, named: bool, device: Device) -> anyhow::Result<ModelFiles> {
    let path = arguments
        .model
        .as_deref()
        .context("no model: name one with --model DIR|FILE")?;
    if let Some(picture) = arguments.like.as_deref().filter(|_| !named && !path.exists()) {
        anyhow::bail!(
            "{}: was drawn with a model named {}, which is not here: name it with --model DIR|FILE",
            picture.display(),
            l2p_engine::shown_name(&path.display().to_string())
        );
    }
    let paths = ModelPaths::resolve(path, &arguments.parts.overrides())?;
    ensure_precision(&device, arguments.dtype)?;
    Ok(arguments.weights.open(paths, device)?)
}

/// Adds the operations of a step of the first batch, and what the device reaches at best.
fn profile(worker: &Worker, work: &Work<'_>, captions: &Captions, report: &mut Report) -> anyhow::Result<()> {
    let world = World::solo();
    let spinner = display::spinner("timing the operations of a step", &world);
    let request = work.request(captions, 0..work.plan.batch.min(work.jobs.len()));
    let profile = worker.profile(request)?.wait_with(&mut |event| go_on(&world, &event))?;
    let ceilings = worker.call(|pipeline| Ceilings::measure(pipeline.device()))?.wait()?;
    spinner.finish_and_clear();
    report.profiled(profile.value, ceilings.value);
    Ok(())
}

fn list_devices(as_json: bool) -> anyhow::Result<()> {
    let report = probe()?;
    match as_json {
        true => crate::print(&format!("{}\n", serde_json::to_string_pretty(&report)?)),
        false => crate::print(&format!("{report}\n")),
    }
}

/// Checks that the device computes in the precision that was asked for.
fn ensure_precision(device: &Device, precision: Precision) -> anyhow::Result<()> {
    match (device, precision) {
        (Device::Cpu, Precision::Bf16) => {
            anyhow::bail!("the CPU computes in f32: use --dtype auto or f32, or --device cuda for bf16")
        }
        (Device::Cuda(_), Precision::F32) => {
            anyhow::bail!("CUDA computes in bf16 with f32 sums: use --dtype auto or bf16, or --device cpu for f32")
        }
        _ => Ok(()),
    }
}

/// Something that the user may not expect, and that stops nothing.
fn notice(text: &str) {
    crate::say(format_args!("note: {text}"));
}

/// Caption features of a rank's jobs; what is cut off of any rank's is said.
fn encode(
    worker: Option<&Worker>,
    work: &Work<'_>,
    world: &World,
    report: &mut Report,
) -> l2p_engine::Result<Captions> {
    let plan = work.plan;
    if world.is_first() && !plan.guided() && plan.jobs.iter().any(|job| !job.negative.is_empty()) {
        notice("what to stay away from has no effect without guidance: give a --cfg other than 1");
    }
    let mut texts: Vec<String> = work.jobs.iter().map(|job| job.prompt.clone()).collect();
    if plan.guided() {
        texts.extend(work.jobs.iter().map(|job| job.negative.clone()));
    }
    let mut shortened = Vec::new();
    let spinner = display::spinner("reading the prompts", world);
    let encode = |worker: &Worker| {
        worker.encode(texts)?.wait_with(&mut |event| {
            if let Event::Encoded { text, dropped_tokens } = &event
                && *dropped_tokens > 0
            {
                shortened.push(cut(text, *dropped_tokens));
            }
            go_on(world, &event)
        })
    };
    let encoded = world.together("prompts", worker.map(encode).transpose())?;
    spinner.finish_and_clear();
    if let Some(ranks) = world.gather("prompts that are cut", shortened)? {
        // Several pictures may have the same prompt.
        let mut told = BTreeSet::new();
        let words = ranks.iter().flatten().filter(|words| told.insert(*words));
        words.for_each(|words| notice(words));
    }
    let Some(answer) = encoded else {
        return Ok(Captions::default());
    };
    report.took(answer.report);
    let mut prompts = answer.value;
    let negatives = prompts.split_off(work.jobs.len());
    Ok(Captions { prompts, negatives })
}

/// The words for a prompt that is longer than the tokenizer's limit.
fn cut(text: &str, dropped_tokens: usize) -> String {
    format!(
        "the last {} of the prompt \"{}\" are cut off: it is longer than the text encoder reads",
        count(dropped_tokens, "token"),
        jobs::title(text)
    )
}

/// Whether to continue, asked by long work now and then. That something has happened shows the other ranks that this one is no cause for
/// worry; that it waits does not.
fn go_on(world: &World, event: &Event) -> l2p_engine::Result<()> {
    if *event != Event::Waiting {
        world.work();
    }
    world.check()?;
    match crate::stop_requested() {
        true => Err(Error::Interrupted),
        false => Ok(()),
    }
}

fn load(worker: &Worker, world: &World) -> l2p_engine::Result<l2p_engine::pipeline::Report> {
    let bar = display::bar("loading the model [{bar:32}] {pos}/{len} blocks  {eta} left", world);
    let answer = worker.load()?.wait_with(&mut |event| {
        if let Event::Loaded { done, total } = &event {
            bar.set_length(*total as u64);
            bar.set_position(*done as u64);
        }
        go_on(world, &event)
    })?;
    bar.finish_and_clear();
    Ok(answer.report)
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}
