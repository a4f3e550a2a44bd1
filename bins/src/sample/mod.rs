//! `l2p-sample`: arguments, what to draw, progress and files. The work itself is `l2p_engine::pipeline`.

mod arguments;
mod inputs;
mod jobs;
mod report;
mod warm;
mod writer;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use l2p_engine::ceilings::Ceilings;
use l2p_engine::checkpoint::ModelPaths;
use l2p_engine::device::probe;
use l2p_engine::flow::sampler::StepReport;
use l2p_engine::limits::{Batch, Side, Steps};
use l2p_engine::pipeline::{Captions, EncodeReport, Pipeline, Settings};
use l2p_engine::profile::Profile;
use l2p_engine::{Device, DeviceChoice, Error, Tensor};

pub use arguments::Arguments;
use arguments::{Command, Precision};
use inputs::RawImages;
use jobs::Job;
use report::Report;
use writer::{Finished, Writer};

use crate::prompts;

/// Pictures are drawn together as long as a batch has at most this many image tokens: fewer do not fill a GPU.
const TOKENS_PER_BATCH: usize = 4096;
/// No batch is larger than this.
const LARGEST_BATCH: usize = 64;

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
    let mut pipeline = open_pipeline(&arguments, named)?;

    let settings = settings(&arguments, &pipeline)?;
    let batch = batch_size(&arguments, &pipeline, &settings, jobs.len());
    pipeline.expect_room(&settings, batch)?;
    if jobs.len() > batch {
        pipeline.share_steps(&settings, batch)?;
    }
    let noise = arguments
        .noise
        .as_deref()
        .map(|path| inputs::read_noise(path, &pipeline, &settings))
        .transpose()?;
    let guided = settings.cfg != 1.0;
    let embeds = arguments
        .embeds
        .as_deref()
        .map(|path| inputs::read_embeds(path, &pipeline, jobs.len(), guided))
        .transpose()?;
    if embeds.is_none() {
        pipeline.expect_text_encoder()?;
    }
    jobs::expect_writable(&jobs, &settings)?;
    let raw = arguments.save_raw.as_deref().map(RawImages::new).transpose()?;
    crate::say(format_args!(
        "{} {}x{} on {}: {}, shift {}, cfg {}",
        count(jobs.len(), "picture"),
        settings.width,
        settings.height,
        pipeline.device(),
        count(settings.steps, "step"),
        settings.shift,
        settings.cfg
    ));
    if let Some(word) = prompts::word_on_guidance(settings.cfg) {
        notice(&word);
    }

    let captions = match embeds {
        Some(captions) => captions,
        None => encode(&mut pipeline, &jobs, guided)?,
    };
    load(&mut pipeline)?;
    let mut report = Report::new(&arguments, &pipeline, &settings, batch);
    let work = Work {
        jobs: &jobs,
        captions: &captions,
        noise: noise.as_ref(),
        settings: &settings,
        batch,
    };
    draw(&arguments, &mut pipeline, &work, raw, &mut report)?;
    report.total(start.elapsed());
    if arguments.profile {
        report.profiled(
            profile(&arguments, &pipeline, &work)?,
            Ceilings::measure(pipeline.device())?,
        );
    }
    crate::print(&report.finish(&mut pipeline, arguments.report)?)
}

/// The model of complete arguments; `named` where they named it themselves and not through a picture.
fn open_pipeline(arguments: &Arguments, named: bool) -> anyhow::Result<Pipeline> {
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
    Ok(Pipeline::open(paths, device, arguments.keep_text_encoder)?)
}

/// The operations of a step of the first batch.
fn profile(arguments: &Arguments, pipeline: &Pipeline, work: &Work<'_>) -> anyhow::Result<Profile> {
    let spinner = spinner("timing the operations of a step");
    let first = 0..work.batch.min(work.jobs.len());
    let noise = work.noise_of(arguments, pipeline, &work.jobs[first.clone()])?;
    let profile = pipeline.profile_step(&work.captions.select(first)?, noise, work.settings)?;
    spinner.finish_and_clear();
    Ok(profile)
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
fn settings(arguments: &Arguments, pipeline: &Pipeline) -> anyhow::Result<Settings> {
    let defaults = pipeline.defaults()?;
    pipeline.notes()?.iter().for_each(|note| notice(note));
    let asked = Settings {
        width: arguments.width.map_or(defaults.width, Side::get),
        height: arguments.height.map_or(defaults.height, Side::get),
        steps: arguments.steps.map_or(defaults.steps, Steps::get),
        shift: arguments.shift.unwrap_or(defaults.shift),
        cfg: arguments.cfg.unwrap_or(defaults.cfg),
    };
    asked.check()?;
    let multiple = pipeline.size_multiple();
    let rounded = |side: usize, name: &str| {
        let rounded = side.next_multiple_of(multiple);
        if rounded != side {
            notice(&format!(
                "{name} {side} is rounded up to {rounded}: this model draws multiples of {multiple}"
            ));
        }
        rounded
    };
    Ok(Settings {
        width: rounded(asked.width, "width"),
        height: rounded(asked.height, "height"),
        ..asked
    })
}

/// Something that the user may not expect, and that stops nothing.
fn notice(text: &str) {
    crate::say(format_args!("note: {text}"));
}

fn batch_size(arguments: &Arguments, pipeline: &Pipeline, settings: &Settings, pictures: usize) -> usize {
    let automatic = match pipeline.device() {
        // On the CPU a batch gains nothing, and the first picture would come later.
        Device::Cpu => 1,
        Device::Cuda(_) => (TOKENS_PER_BATCH / pipeline.image_tokens(settings).max(1)).clamp(1, LARGEST_BATCH),
    };
    arguments.batch.map_or(automatic, Batch::get).min(pictures)
}

/// Caption features of every job.
fn encode(pipeline: &mut Pipeline, jobs: &[Job], guided: bool) -> anyhow::Result<Captions> {
    let prompts: Vec<String> = jobs.iter().map(|job| job.prompt.clone()).collect();
    let negatives: Vec<String> = match guided {
        true => jobs.iter().map(|job| job.negative.clone()).collect(),
        false => Vec::new(),
    };
    if !guided && jobs.iter().any(|job| !job.negative.is_empty()) {
        notice("what to stay away from has no effect without guidance: give a --cfg other than 1");
    }
    let spinner = spinner("reading the prompts");
    let captions = pipeline.encode(&prompts, &negatives, &mut |report| {
        if report.dropped_tokens > 0 {
            spinner.suspend(|| notice(&cut(&report)));
        }
        go_on()
    })?;
    spinner.finish_and_clear();
    Ok(captions)
}

/// The words for a prompt that is longer than the tokenizer's limit.
fn cut(report: &EncodeReport<'_>) -> String {
    format!(
        "the last {} of the prompt \"{}\" are cut off: it is longer than the text encoder reads",
        count(report.dropped_tokens, "token"),
        jobs::title(report.text)
    )
}

/// Whether to continue, asked by long work now and then.
fn go_on() -> l2p_engine::Result<()> {
    match crate::stop_requested() {
        true => Err(Error::Interrupted),
        false => Ok(()),
    }
}

fn load(pipeline: &mut Pipeline) -> anyhow::Result<()> {
    let bar = bar("loading the model [{bar:32}] {pos}/{len} blocks  {eta} left");
    pipeline.load(&mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        go_on()
    })?;
    bar.finish_and_clear();
    Ok(())
}

/// What is drawn, all of it known before the first step.
struct Work<'a> {
    jobs: &'a [Job],
    captions: &'a Captions,
    /// For every picture, instead of that of its seed.
    noise: Option<&'a Tensor>,
    settings: &'a Settings,
    /// Pictures at once.
    batch: usize,
}

impl Work<'_> {
    /// The noise that these pictures start from.
    fn noise_of(&self, arguments: &Arguments, pipeline: &Pipeline, jobs: &[Job]) -> anyhow::Result<Tensor> {
        let seeds: Vec<u64> = jobs.iter().map(|job| job.seed).collect();
        match self.noise {
            Some(noise) => Ok(inputs::repeat(noise, jobs.len())?),
            None => Ok(pipeline.noise(arguments.rng.unwrap_or_default(), &seeds, self.settings)?),
        }
    }
}

fn draw(
    arguments: &Arguments,
    pipeline: &mut Pipeline,
    work: &Work<'_>,
    mut raw: Option<RawImages>,
    report: &mut Report,
) -> anyhow::Result<()> {
    let Work {
        jobs, settings, batch, ..
    } = *work;
    let bar = bar("{msg} [{bar:32}] step {pos}/{len}  {per_step}  {eta} left");
    bar.set_length((jobs.len().div_ceil(batch) * settings.steps) as u64);
    let mut writer = Writer::start(arguments.quality.get() as u8);
    let model = jobs::published(arguments.model.as_deref().unwrap_or(Path::new("")));
    let rng = arguments.rng.unwrap_or_default();
    for (index, part) in jobs.chunks(batch).enumerate() {
        bar.set_message(jobs::title(&part[0].prompt));
        let captions = work.captions.select(index * batch..index * batch + part.len())?;
        let noise = work.noise_of(arguments, pipeline, part)?;
        let mut progress = |step: StepReport| {
            bar.set_position((index * settings.steps + step.done) as u64);
            go_on()
        };
        let drawn = pipeline.denoise(&captions, noise, settings, &mut progress)?;
        let images = pipeline.decode(&drawn)?;
        if let Some(raw) = &mut raw {
            raw.add(&drawn, &images)?;
        }
        for (job, pixels) in part.iter().zip(pipeline.to_bytes(&images)?) {
            writer.write(Finished {
                path: job.out.clone(),
                keep_others: job.numbered,
                pixels,
                settings: job.settings(settings, &model, rng),
            })?;
        }
    }
    bar.finish_and_clear();
    let written = writer.finish()?;
    if let Some(raw) = raw {
        raw.finish()?;
    }
    for (job, file) in jobs.iter().zip(&written) {
        report.add(job, file);
        crate::say(format_args!("{}", file.display()));
    }
    Ok(())
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
