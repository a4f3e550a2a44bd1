//! Stages as commands: from flags to plans, and what is said in the end.

use std::fmt::Write;
use std::ops::RangeInclusive;
use std::path::Path;

use serde_json::Value;

use super::arguments::{self, CheckFlags, LanguageFlags, Opened, PromptFlags, Source};
use super::folder::{self, Manifest};
use super::language::LanguageModel;
use super::language::writer::Writer;
use super::rules::Lengths;
use super::taxonomy::Taxonomy;
use super::{check, prompts, report};
use crate::progress::PhaseBar;

/// Says who writes, where that is no language model.
const BY_GRAMMAR: &str =
    "so prompts are written by a grammar over the taxonomy: varied and well-formed, but without understanding";

/// Says who checks then.
const RULES_ALONE: &str = "so the rules alone decide";

/// `l2p-data prompts`.
pub(super) fn prompts(arguments: &arguments::Prompts) -> anyhow::Result<()> {
    let mut bar = PhaseBar::new();
    let (count, seed) = (arguments.count.get(), arguments.seed);
    let outcome = write(
        &arguments.out,
        count,
        seed,
        &arguments.prompts,
        (&arguments.language, arguments.encoder.source()),
        &mut bar,
    )?;
    match arguments.json {
        true => crate::print(&format!("{:#}\n", serde_json::to_value(&outcome)?)),
        false => crate::print(&prompts_in_words(&arguments.out, &outcome)),
    }
}

/// Has prompts written, and says how.
pub(super) fn write(
    out: &Path,
    count: usize,
    seed: u64,
    flags: &PromptFlags,
    (language, source): (&LanguageFlags, Option<Source<'_>>),
    bar: &mut PhaseBar,
) -> anyhow::Result<prompts::Outcome> {
    let taxonomy = Taxonomy::read(flags.taxonomy.as_deref())?;
    let Opened { mut model, why_none } = language.open(out.join(folder::ANSWERS), source, bar)?;
    if let Some(reason) = why_none {
        crate::say(format_args!("note: {reason}, {BY_GRAMMAR}"));
    }
    let plan = prompts::Plan {
        out: out.into(),
        count,
        languages: flags.languages(),
        seed,
        batch: flags.prompts_per_request.get(),
        attempts: flags.attempts.get(),
        lengths: flags.lengths(),
        near: flags.near,
        drawing: flags.drawing(),
    };
    let outcome = prompts::write(&plan, &taxonomy, &mut *model, bar);
    say_notes(&mut *model);
    outcome
}

/// What came of writing, for people.
pub(super) fn prompts_in_words(out: &Path, outcome: &prompts::Outcome) -> String {
    let mut text = format!(
        "{}: {} prompts, {} of them new, in {} requests",
        out.display(),
        outcome.prompts,
        outcome.written,
        outcome.requests
    );
    for (reason, count) in &outcome.rejects {
        let _ = write!(text, "; {count} × {reason}");
    }
    for (mended, count) in &outcome.mended {
        let _ = write!(text, "; mended {count} × {mended}");
    }
    text.push('\n');
    text
}

/// `l2p-data check`.
pub(super) fn check(arguments: &arguments::Check) -> anyhow::Result<()> {
    let mut bar = PhaseBar::new();
    let outcome = judge(
        &arguments.out,
        arguments.again,
        arguments.seed,
        &arguments.check,
        (&arguments.language, arguments.encoder.source()),
        &mut bar,
    )?;
    match arguments.json {
        true => crate::print(&format!("{:#}\n", serde_json::to_value(&outcome)?)),
        false => crate::print(&check_in_words(&arguments.out, &outcome)),
    }
}

/// Has prompts judged, and says by whom.
pub(super) fn judge(
    out: &Path,
    again: bool,
    seed: u64,
    flags: &CheckFlags,
    (language, source): (&LanguageFlags, Option<Source<'_>>),
    bar: &mut PhaseBar,
) -> anyhow::Result<check::Outcome> {
    let mut model: Box<dyn LanguageModel> = Box::new(Writer);
    if !flags.rules_only {
        let opened = language.open(out.join(folder::ANSWERS), source, bar)?;
        if let Some(reason) = opened.why_none {
            crate::say(format_args!("note: {reason}, {RULES_ALONE}"));
        }
        model = opened.model;
    }
    let plan = check::Plan {
        out: out.into(),
        rules: flags.rules(lengths(out)?)?,
        attempts: flags.audit_attempts.get(),
        again,
        seed,
    };
    let outcome = check::check(&plan, &mut *model, bar);
    say_notes(&mut *model);
    outcome
}

/// What came of checking, for people.
pub(super) fn check_in_words(out: &Path, outcome: &check::Outcome) -> String {
    let mut text = format!(
        "{}: {} of {} prompts may be used, {} judged now, by {}",
        out.display(),
        outcome.valid,
        outcome.prompts,
        outcome.checked,
        match &outcome.auditor {
            Some(name) => format!("rules and {name}"),
            None => "rules alone".into(),
        }
    );
    for (rule, count) in &outcome.rejects {
        let _ = write!(text, "; {count} × {rule}");
    }
    text.push('\n');
    text
}

/// `l2p-data report`.
pub(super) fn report(arguments: &arguments::Report) -> anyhow::Result<()> {
    let path = arguments
        .write
        .clone()
        .unwrap_or_else(|| arguments.folder.join(report::FILE));
    let numbers = report::write(&arguments.folder, &path, arguments.pictures.get())?;
    match arguments.json {
        true => crate::print(&format!("{numbers:#}\n")),
        false => crate::print(&format!("{}\n", path.display())),
    }
}

/// How long the prompts of a folder are to be, as they were asked for.
fn lengths(out: &Path) -> anyhow::Result<Lengths> {
    let manifest = Manifest::open(out)?;
    let settings = manifest.stage("prompts").map(|stage| &stage["settings"]);
    let of = |key: &str| -> Option<RangeInclusive<usize>> {
        let ends = settings?.get(key)?.as_array()?;
        let end = |index: usize| ends.get(index).and_then(Value::as_u64).map(|end| end as usize);
        Some(end(0)?..=end(1)?)
    };
    let usual = Lengths::default();
    Ok(Lengths {
        en: of("length_en").unwrap_or(usual.en),
        zh: of("length_zh").unwrap_or(usual.zh),
    })
}

fn say_notes(model: &mut dyn LanguageModel) {
    for note in model.notes() {
        crate::say(format_args!("note: {note}"));
    }
}
