//! All stages in a row. Each of them does what is left to do in the folder, so that a run that was interrupted goes on where it was.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::bail;
use l2p_engine::dist::Launch;
use serde_json::json;

use super::arguments::{All, Source};
use super::forecast::duration;
use super::synthesize::{Order, synthesize_among};
use super::{report, stages};
use crate::launch;
use crate::progress::PhaseBar;

/// Pictures on the report's contact sheet.
const SHEET: usize = 600;

/// Runs all stages; where `--ranks` starts ranks, the first and last ones in this process, the pictures in theirs.
pub(super) fn run(arguments: &All) -> ExitCode {
    let draw = |launch| synthesize_among(&order(arguments), launch);
    if launch::is_own_rank() {
        return arguments.draw.ranks.run(draw);
    }
    let started = Instant::now();
    let prepared = crate::run(|| {
        if Launch::from_environment()?.is_some() {
            bail!(
                "all stages are for one process: give --ranks N instead of a launcher, or run the stages one at a time"
            );
        }
        prepare(arguments)
    });
    if prepared != ExitCode::SUCCESS {
        return prepared;
    }
    let drawn = arguments.draw.ranks.run(draw);
    if drawn != ExitCode::SUCCESS {
        return drawn;
    }
    crate::run(|| finish(arguments, started))
}

/// Runs all stages in this process.
///
/// # Errors
/// Whatever the user needs to know, as one sentence.
pub(super) fn alone(arguments: &All) -> anyhow::Result<()> {
    let started = Instant::now();
    prepare(arguments)?;
    synthesize_among(&order(arguments), None)?;
    finish(arguments, started)
}

/// What draws may write, too.
fn source(arguments: &All) -> Source<'_> {
    let draw = &arguments.draw;
    Source {
        model: &draw.model,
        parts: &draw.parts,
        device: draw.device,
    }
}

/// Prompts and verdicts.
fn prepare(arguments: &All) -> anyhow::Result<()> {
    let mut bar = PhaseBar::new();
    bar.stage("1/4 ");
    let (out, seed) = (&arguments.out, arguments.seed);
    let written = stages::write(
        out,
        arguments.count.get(),
        seed,
        &arguments.prompts,
        (&arguments.language, Some(source(arguments))),
        &mut bar,
    )?;
    crate::say(stages::prompts_in_words(out, &written).trim_end());
    bar.stage("2/4 ");
    let checked = stages::judge(
        out,
        false,
        seed,
        &arguments.check,
        (&arguments.language, Some(source(arguments))),
        &mut bar,
    )?;
    crate::say(stages::check_in_words(out, &checked).trim_end());
    Ok(())
}

fn order(arguments: &All) -> Order<'_> {
    Order {
        prompts: None,
        per_prompt: arguments.per_prompt.get(),
        limit: None,
        out: &arguments.out,
        seed: arguments.seed,
        json: false,
        quiet: true,
        draw: &arguments.draw,
        stage: "3/4 ",
    }
}

/// The report.
fn finish(arguments: &All, started: Instant) -> anyhow::Result<()> {
    let mut bar = PhaseBar::new();
    bar.stage("4/4 ");
    bar.show("making the report", 0, 1);
    let path = arguments.out.join(report::FILE);
    let numbers = report::write(&arguments.out, &path, SHEET)?;
    bar.clear();
    let seconds = started.elapsed().as_secs_f64();
    if arguments.json {
        return crate::print(&format!("{:#}\n", json!({"seconds": seconds, "report": numbers})));
    }
    crate::print(&format!(
        "{}: {} pictures of {} prompts, in {}; look at {}\n",
        arguments.out.display(),
        numbers["pictures"],
        numbers["valid"],
        duration(seconds),
        path.display()
    ))
}
