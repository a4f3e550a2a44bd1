//! `l2p-train`: arguments, progress and lines for people. The work itself is `l2p_engine::train::run`.

mod arguments;
mod flags;
mod lines;
mod plan;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;

use anyhow::Context;
use l2p_engine::checkpoint::ensure_free;
use l2p_engine::dist::Launch;
use l2p_engine::image_io::{WriteOptions, write_image};
use l2p_engine::train::run::{
    self, Comparison, Event, Forecast, Observer, PackageOptions, XAxis, compare, write_report,
};
use l2p_engine::train::{BUCKET_BYTES, Ranks};
use l2p_engine::{Device, DeviceChoice};

pub use arguments::Arguments;
use arguments::{Command, Run, Source};

use crate::progress::PhaseBar;

/// Does what the arguments ask for, and returns the exit code. Errors are printed.
pub fn main(arguments: Arguments) -> ExitCode {
    match &arguments.command {
        None => {
            let run = &arguments.run;
            run.ranks.run(|launch| train_run(run, launch))
        }
        Some(_) => crate::run(|| train(arguments)),
    }
}

/// Does what the arguments ask for, in this process alone.
///
/// # Errors
/// Whatever the user needs to know, as one sentence.
pub fn train(arguments: Arguments) -> anyhow::Result<()> {
    match arguments.command {
        None => train_run(&arguments.run, None),
        Some(command) => other(command),
    }
}

/// Everything but training.
fn other(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Compare {
            runs,
            out,
            over,
            title,
            samples,
            columns,
            force,
            json,
        } => {
            let targets = Targets { out, samples, force };
            compare_runs(&labelled(&runs), &targets, over, &title, columns as usize, json)
        }
        Command::Plan {
            source,
            ranks,
            caption_tokens,
            json,
        } => plan(&source, ranks.get(), caption_tokens as usize, json),
        Command::Evaluate { source, json } => evaluate(&source, json),
        Command::Package {
            checkpoint,
            out,
            average,
            base,
            force,
            json,
        } => {
            let options = PackageOptions { average, base, force };
            let packaged = run::package(&checkpoint, &out, &options)?;
            match json {
                true => crate::print(&format!("{:#}\n", serde_json::to_value(&packaged)?)),
                false => crate::print(&lines::packaged(&packaged)),
            }
        }
        Command::Report { run } => crate::print(&format!("{}\n", write_report(&run)?.display())),
    }
}

fn train_run(arguments: &Run, launch: Option<Launch>) -> anyhow::Result<()> {
    let config = arguments.source.read()?;
    let (device, world) = arguments.ranks.join(launch, arguments.source.device)?;
    let ranks = Ranks {
        world: Rc::new(world),
        sharding: config.shard,
        bucket_bytes: BUCKET_BYTES,
    };
    let mut display = Display::new(arguments.json, config.steps);
    let (out, resume) = (&arguments.out, &arguments.resume);
    let outcome = run::train(&config, out, &device, resume, &ranks, &mut display);
    display.bar.clear();
    let summary = outcome?;
    if !ranks.world.is_first() {
        return Ok(());
    }
    crate::say(format_args!("checkpoint {}", summary.checkpoint.display()));
    crate::say(format_args!("report     {}", summary.report.display()));
    crate::say(format_args!(
        "draw with it: l2p-sample --model {} --prompt \"…\"",
        summary.checkpoint.display()
    ));
    Ok(())
}

/// Shows what happens: a bar where there is a terminal, a line for each record, and JSON where it is asked for.
struct Display {
    bar: PhaseBar,
    json: bool,
    steps: u64,
}

/// What the bar shows while steps are taken.
const STEPS: &str = "training";

impl Display {
    fn new(json: bool, steps: u64) -> Self {
        Display {
            bar: PhaseBar::new(),
            json,
            steps,
        }
    }

    fn line(&self, text: &str) {
        self.bar.suspend(|| crate::say(text));
    }
}

impl Observer for Display {
    fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Progress { what, done, total } => self.bar.show(what, *done as u64, *total as u64),
            Event::Begins { step, steps, resumed } => {
                if let Some(folder) = resumed {
                    self.line(&format!("continuing from {}", folder.display()));
                }
                self.bar.show(STEPS, *step, *steps);
            }
            Event::Batch { done, total } => self.bar.detail(format!(", batch {done} of {total} of the next step")),
            Event::Step { step } => self.bar.show(STEPS, *step, self.steps),
            Event::Notice(text) => self.line(&format!("note: {text}")),
            Event::Record(record) => {
                if let Some(line) = lines::of(record, self.steps) {
                    self.line(&line);
                }
                if self.json
                    && let Ok(json) = serde_json::to_string(record)
                {
                    // That nobody reads it any more is no reason to stop training.
                    let _ = self.bar.suspend(|| crate::print(&format!("{json}\n")));
                }
            }
        }
    }

    fn stop_requested(&self) -> bool {
        crate::stop_requested()
    }
}

/// What a run would hold and compute; for a device that is named, though this machine may not have it.
fn plan(source: &Source, ranks: usize, caption_tokens: usize, json: bool) -> anyhow::Result<()> {
    let config = source.read()?;
    let device = match source.device {
        DeviceChoice::Cpu => Some(Device::Cpu),
        choice => match Device::open(choice) {
            Ok(device @ Device::Cuda(_)) => Some(device),
            _ => None,
        },
    };
    let cuda = !matches!(device, Some(Device::Cpu));
    let forecast = Forecast::new(&config, ranks, caption_tokens, cuda)?;
    let available = device.as_ref().map(Device::available_memory).transpose()?;
    match json {
        true => {
            let mut value = serde_json::to_value(&forecast)?;
            value["available_bytes"] = serde_json::to_value(available)?;
            crate::print(&format!("{value:#}\n"))
        }
        false => crate::print(&plan::text(&forecast, available)),
    }
}

/// The loss of a model on a data set.
fn evaluate(source: &Source, json: bool) -> anyhow::Result<()> {
    let config = source.read()?;
    let device = Device::open(source.device)?;
    let mut display = Display::new(false, config.steps);
    // Features of captions go to the cache that the configuration names; without one they are not kept.
    let scratch = tempfile::tempdir().context("cannot make a temporary folder")?;
    let outcome = run::evaluate(&config, scratch.path(), &device, &mut display);
    display.bar.clear();
    let evaluation = outcome?;
    match json {
        true => crate::print(&format!("{:#}\n", serde_json::to_value(evaluation)?)),
        false => crate::print(&format!("{:.5} on {} pictures\n", evaluation.loss, evaluation.pictures)),
    }
}

/// Folders of runs with the labels that were given.
fn labelled(runs: &[String]) -> Vec<(Option<String>, PathBuf)> {
    let labelled = runs.iter().map(|run| match run.split_once('=') {
        Some((label, folder)) if !Path::new(run).is_dir() => (Some(label.into()), folder.into()),
        _ => (None, run.into()),
    });
    labelled.collect()
}

/// What a comparison writes.
struct Targets {
    /// The picture.
    out: PathBuf,
    /// The samples beside each other.
    samples: Option<PathBuf>,
    /// Whether what is there is replaced.
    force: bool,
}

fn compare_runs(
    runs: &[(Option<String>, PathBuf)],
    targets: &Targets,
    over: XAxis,
    title: &str,
    columns: usize,
    json: bool,
) -> anyhow::Result<()> {
    let files = Comparison::files(&targets.out)?;
    for path in files.iter().chain(&targets.samples) {
        ensure_free(path, targets.force)?;
    }
    let comparison = compare(runs, over)?;
    if let Some(path) = &targets.samples {
        let folders: Vec<PathBuf> = runs.iter().map(|(_, folder)| folder.clone()).collect();
        let image = run::sample_rows(&folders, columns)?;
        write_image(path, &image, &WriteOptions::default())?;
    }
    let numbers = comparison.write(&files, title)?;
    match json {
        true => crate::print(&format!("{numbers}\n")),
        false => crate::print(&lines::table(&comparison)),
    }
}
