//! `l2p-sample`: arguments, what to draw, progress and files. The work itself is done by a worker of `l2p_engine::serve`.

mod arguments;
mod inputs;
mod jobs;
mod report;
mod warm;
mod writer;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use l2p_engine::ceilings::Ceilings;
use l2p_engine::checkpoint::ModelPaths;
use l2p_engine::device::probe;
use l2p_engine::flow::noise_source::NoiseSource;
use l2p_engine::limits::{Batch, Side, Steps};
use l2p_engine::pipeline::{Asked, Batching, ModelFiles, Settings};
use l2p_engine::serve::{Caption, Drawn, Event, Item, Request, Ticket, Worker, WorkerOptions};
use l2p_engine::{Device, DeviceChoice, Error, HostTensor};

pub use arguments::Arguments;
use arguments::{Command, Precision};
use inputs::{Captions, RawImages};
use jobs::Job;
use report::Report;
use writer::{Finished, Writer};

use crate::prompts;

/// Batches that the worker has at a time: while one's pictures are written, the next one is drawn.
const BATCHES_AHEAD: usize = 2;

/// Does what the arguments ask for.
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
    let _range = l2p_engine::profile::range(c"run");
    let start = Instant::now();
    let like = arguments
        .like
        .as_deref()
        .map(l2p_engine::image_io::read_settings)
        .transpose()?;
    let named = arguments.model.is_some();
    let arguments = arguments.completed(like.as_ref())?;
    let jobs = jobs::jobs(&arguments)?;
    let files = Arc::new(open_model(&arguments, named)?);
    let settings = settings(&arguments, &files)?;
    let batch = match arguments.batch.map(Batch::get) {
        Some(batch) => batch.min(jobs.len()),
        None => files.batch_size(&settings, jobs.len(), Batching::PROMPT)?,
    };
    files.ensure_room(&settings, batch)?;
    let noise = arguments
        .noise
        .as_deref()
        .map(|path| inputs::read_noise(path, &files, &settings))
        .transpose()?;
    let guided = settings.cfg != 1.0;
    let embeds = arguments
        .embeds
        .as_deref()
        .map(|path| inputs::read_embeds(path, &files, jobs.len(), guided))
        .transpose()?;
    if embeds.is_none() {
        files.ensure_text_encoder()?;
    }
    jobs::ensure_writable(&jobs, &settings)?;
    let raw = arguments.save_raw.as_deref().map(RawImages::new).transpose()?;
    announce(&jobs, &files, &settings);

    let mut report = Report::new(&arguments, &files, &settings, batch);
    let options = WorkerOptions {
        keep_text_encoder: arguments.keep_text_encoder,
        recordings: usize::from(jobs.len() > batch),
        most_open: BATCHES_AHEAD,
    };
    let worker = Worker::start(files, options)?;
    let captions = match embeds {
        Some(captions) => captions,
        None => encode(&worker, &jobs, guided, &mut report)?,
    };
    report.took(load(&worker)?);
    let work = Work {
        jobs: &jobs,
        captions: &captions,
        noise: noise.map(Arc::new),
        settings,
        rng: arguments.rng.unwrap_or_default(),
        batch,
        raw: raw.is_some(),
    };
    draw(&arguments, &worker, &work, raw, &mut report)?;
    report.total(start.elapsed());
    if arguments.profile {
        profile(&worker, &work, &mut report)?;
    }
    crate::print(&report.finish(arguments.report)?)
}

/// Says what is about to be drawn.
fn announce(jobs: &[Job], files: &ModelFiles, settings: &Settings) {
    crate::say(format_args!(
        "{} {}x{} on {}: {}, shift {}, cfg {}",
        count(jobs.len(), "picture"),
        settings.width,
        settings.height,
        files.device(),
        count(settings.steps, "step"),
        settings.shift,
        settings.cfg
    ));
    if let Some(word) = prompts::word_on_guidance(settings.cfg) {
        notice(&word);
    }
}

/// The model of complete arguments; `named` where they named it themselves and not through a picture.
fn open_model(arguments: &Arguments, named: bool) -> anyhow::Result<ModelFiles> {
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
    let paths = ModelPaths::resolve(path, &arguments.path_overrides())?;
    let device = open_device(arguments)?;
    Ok(arguments.weights.open(paths, device)?)
}

/// Adds the operations of a step of the first batch, and what the device reaches at best.
fn profile(worker: &Worker, work: &Work<'_>, report: &mut Report) -> anyhow::Result<()> {
    let spinner = spinner("timing the operations of a step");
    let first = 0..work.batch.min(work.jobs.len());
    let profile = worker.profile(work.request(first))?.wait_with(&mut |_| go_on())?;
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

/// The device, when it computes in the precision that was asked for.
fn open_device(arguments: &Arguments) -> anyhow::Result<Device> {
    let choice = match (arguments.device, arguments.dtype) {
        // Asking for f32 is asking for the device that has it.
        (DeviceChoice::Auto, Precision::F32) => DeviceChoice::Cpu,
        (choice, _) => choice,
    };
    let device = Device::open(choice)?;
    match (&device, arguments.dtype) {
        (Device::Cpu, Precision::Bf16) => {
            anyhow::bail!("the CPU computes in f32: use --dtype auto or f32, or --device cuda for bf16")
        }
        (Device::Cuda(_), Precision::F32) => {
            anyhow::bail!("CUDA computes in bf16 with f32 sums: use --dtype auto or bf16, or --device cpu for f32")
        }
        _ => Ok(device),
    }
}

/// The settings: what was asked for, then what the model says. Sides are rounded up to what the model can draw.
fn settings(arguments: &Arguments, files: &ModelFiles) -> anyhow::Result<Settings> {
    files.notes()?.iter().for_each(|note| notice(note));
    let settings = files.settings(&Asked {
        width: arguments.width.map(Side::get),
        height: arguments.height.map(Side::get),
        steps: arguments.steps.map(Steps::get),
        shift: arguments.shift,
        cfg: arguments.cfg,
    })?;
    let (settings, notes) = files.rounded(settings);
    notes.iter().for_each(|note| notice(note));
    Ok(settings)
}

/// Something that the user may not expect, and that stops nothing.
fn notice(text: &str) {
    crate::say(format_args!("note: {text}"));
}

/// Caption features of every job.
fn encode(worker: &Worker, jobs: &[Job], guided: bool, report: &mut Report) -> anyhow::Result<Captions> {
    if !guided && jobs.iter().any(|job| !job.negative.is_empty()) {
        notice("what to stay away from has no effect without guidance: give a --cfg other than 1");
    }
    let mut texts: Vec<String> = jobs.iter().map(|job| job.prompt.clone()).collect();
    if guided {
        texts.extend(jobs.iter().map(|job| job.negative.clone()));
    }
    let spinner = spinner("reading the prompts");
    let answer = worker.encode(texts)?.wait_with(&mut |event| {
        if let Event::Encoded { text, dropped_tokens } = event
            && dropped_tokens > 0
        {
            spinner.suspend(|| notice(&cut(&text, dropped_tokens)));
        }
        go_on()
    })?;
    spinner.finish_and_clear();
    report.took(answer.report);
    let mut prompts = answer.value;
    let negatives = prompts.split_off(jobs.len());
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

/// Whether to continue, asked by long work now and then.
fn go_on() -> l2p_engine::Result<()> {
    match crate::stop_requested() {
        true => Err(Error::Interrupted),
        false => Ok(()),
    }
}

fn load(worker: &Worker) -> anyhow::Result<l2p_engine::pipeline::Report> {
    let bar = bar("loading the model [{bar:32}] {pos}/{len} blocks  {eta} left");
    let answer = worker.load()?.wait_with(&mut |event| {
        if let Event::Loaded { done, total } = event {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        }
        go_on()
    })?;
    bar.finish_and_clear();
    Ok(answer.report)
}

/// What is drawn, all of it known before the first step.
struct Work<'a> {
    jobs: &'a [Job],
    captions: &'a Captions,
    /// For every picture, instead of that of its seed.
    noise: Option<Arc<HostTensor>>,
    settings: Settings,
    rng: NoiseSource,
    /// Pictures at once.
    batch: usize,
    /// The numbers behind the pictures too.
    raw: bool,
}

impl Work<'_> {
    /// The request for some of the pictures, all at once.
    fn request(&self, range: std::ops::Range<usize>) -> Request {
        let nothing = Caption::Text(String::new());
        let items = range.map(|index| Item {
            prompt: self.captions.prompts[index].clone(),
            negative: self.captions.negatives.get(index).unwrap_or(&nothing).clone(),
            seed: self.jobs[index].seed,
        });
        Request {
            items: items.collect(),
            settings: self.settings,
            rng: self.rng,
            noise: self.noise.clone(),
            start: None,
            at_once: None,
            raw: self.raw,
        }
    }
}

fn draw(
    arguments: &Arguments,
    worker: &Worker,
    work: &Work<'_>,
    raw: Option<RawImages>,
    report: &mut Report,
) -> anyhow::Result<()> {
    let bar = bar("{msg} [{bar:32}] step {pos}/{len}  {per_step}  {eta} left");
    bar.set_length((work.jobs.len().div_ceil(work.batch) * work.settings.steps) as u64);
    let mut takes = Takes {
        work,
        bar,
        writer: Writer::start(arguments.quality.get() as u8),
        raw,
        model: jobs::published(arguments.model.as_deref().unwrap_or(Path::new(""))),
        report,
    };
    let mut asked: VecDeque<(usize, Ticket<Drawn>)> = VecDeque::new();
    for first in (0..work.jobs.len()).step_by(work.batch) {
        if asked.len() == BATCHES_AHEAD
            && let Some((first, ticket)) = asked.pop_front()
        {
            takes.take(first, ticket)?;
        }
        let last = (first + work.batch).min(work.jobs.len());
        asked.push_back((first, worker.draw(work.request(first..last))?));
    }
    for (first, ticket) in asked {
        takes.take(first, ticket)?;
    }
    takes.finish()
}

/// Takes pictures as they come, and has them written.
struct Takes<'a> {
    work: &'a Work<'a>,
    bar: ProgressBar,
    writer: Writer,
    raw: Option<RawImages>,
    /// What pictures say of the model.
    model: String,
    report: &'a mut Report,
}

impl Takes<'_> {
    /// Waits for the batch that begins with picture `first`.
    fn take(&mut self, first: usize, ticket: Ticket<Drawn>) -> anyhow::Result<()> {
        let Work {
            jobs, settings, batch, ..
        } = self.work;
        self.bar.set_message(jobs::title(&jobs[first].prompt));
        let before = first / batch * settings.steps;
        let answer = ticket.wait_with(&mut |event| {
            if let Event::Step { done, .. } = event {
                self.bar.set_position((before + done) as u64);
            }
            go_on()
        })?;
        self.report.took(answer.report);
        if let Some(all) = &mut self.raw {
            answer.value.raw.iter().for_each(|raw| all.add(raw));
        }
        for (job, image) in jobs[first..].iter().zip(answer.value.pictures) {
            self.writer.write(Finished {
                path: job.out.clone(),
                keep_others: job.numbered,
                image,
                settings: job.settings(settings, &self.model, self.work.rng),
            })?;
        }
        Ok(())
    }

    /// Waits until everything is written, and says where.
    fn finish(mut self) -> anyhow::Result<()> {
        self.bar.finish_and_clear();
        let written = self.writer.finish()?;
        if let Some(raw) = self.raw {
            raw.finish()?;
        }
        for (job, file) in self.work.jobs.iter().zip(&written) {
            self.report.add(job, file);
            crate::say(format_args!("{}", file.display()));
        }
        Ok(())
    }
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

fn bar(template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let per_step = |state: &indicatif::ProgressState, out: &mut dyn std::fmt::Write| {
        let seconds = state.elapsed().as_secs_f64() / state.pos().max(1) as f64;
        // Nothing can be done about a terminal that does not take text.
        let _ = match state.pos() {
            0 => write!(out, "- s/step"),
            _ => write!(out, "{seconds:.3} s/step"),
        };
    };
    let bar = ProgressBar::no_length();
    bar.set_style(style.with_key("per_step", per_step));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn spinner(message: &'static str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(message);
    spinner.enable_steady_tick(Duration::from_millis(200));
    spinner
}
