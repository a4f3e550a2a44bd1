//! Writing prompts: balanced over sub-classes and languages, a request for each and a few subjects, until there are enough.
//!
//! The work goes in rounds. In each, every cell (a sub-class in a language) that lacks prompts makes one request for as many as it lacks, at
//! most a batch; a round is written when all of its answers are there, request by request, in the order of the cells. What a request is
//! depends on the seed and on what its own cell has had before, so that a run that is interrupted asks the same again, whatever it had
//! asked when it ended. Answers that cost something are kept on disk meanwhile.

mod cells;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::bail;
use l2p_engine::files::FolderLock;
use l2p_engine::limits::Batch;
use l2p_engine::{Error, shown_name};
use serde::{Deserialize, Serialize};
use serde_json::json;

use self::cells::{Cell, cells};
use super::answers;
use super::ask::{self, Drawing};
use super::folder::{self, Journal, Manifest, Prompt};
use super::language::{Language, LanguageModel, Request, Subject};
use super::near::Near;
use super::rules::Lengths;
use super::taxonomy::Taxonomy;
use crate::progress::PhaseBar;
use crate::stop_requested;

/// Requests of a cell in a row that may bring nothing before it is given up.
const FRUITLESS: usize = 4;

/// What is to be written.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The folder.
    pub out: PathBuf,
    /// Prompts in the end.
    pub count: usize,
    /// Languages, each with the same share.
    pub languages: Vec<Language>,
    /// Of all draws.
    pub seed: u64,
    /// Subjects of a request.
    pub batch: usize,
    /// How often a request is made whose answer makes no sense.
    pub attempts: usize,
    /// How long prompts may be.
    pub lengths: Lengths,
    /// From which likeness on a prompt is a copy of another.
    pub near: f64,
    /// How a model draws its words.
    pub drawing: Drawing,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// Prompts in the folder.
    pub prompts: usize,
    /// Those that this run wrote.
    pub written: usize,
    /// Requests that are done.
    pub requests: usize,
    /// Tokens of all answers, where the model counts them.
    pub tokens: usize,
    /// Texts that were refused, by reason.
    pub rejects: BTreeMap<String, usize>,
    /// What was mended in answers, and how often.
    pub mended: BTreeMap<String, usize>,
    /// Prompts of each sub-class and language.
    pub by_cell: BTreeMap<String, usize>,
}

/// A request that is done, as a line of `turns.jsonl`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Turn {
    /// The round.
    pub round: usize,
    /// The sub-class, as `nature/food`.
    pub sub_class: String,
    /// The language.
    pub language: Language,
    /// Subjects that were asked for.
    pub asked: usize,
    /// Prompts that were kept.
    pub kept: usize,
    /// Lines of `prompts.jsonl` with these.
    pub lines: usize,
    /// Requests that it took.
    pub attempts: usize,
    /// Tokens of the answers.
    #[serde(default)]
    pub tokens: usize,
    /// What was refused, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rejects: Vec<Reject>,
    /// What was mended in the answer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mended: Vec<String>,
}

/// A text that was refused.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Reject {
    /// Why: `length`, `near-duplicate`, `off subject`, `bad answer`, `no answer`.
    pub reason: String,
    /// More about it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// The text; that of an answer is cut.
    pub text: String,
}

/// What was asked for one cell in a round, and what has come of it.
struct Asked {
    cell: usize,
    subjects: Vec<Subject>,
    attempts: usize,
    tokens: usize,
    texts: Option<answers::Texts>,
    rejects: Vec<Reject>,
}

/// Has `model` write prompts until the folder holds as many as are asked for.
///
/// # Errors
/// When another run holds the folder, it was begun with something else, the model cannot be asked, or brings nothing of use.
pub fn write(
    plan: &Plan,
    taxonomy: &Taxonomy,
    model: &mut dyn LanguageModel,
    bar: &mut PhaseBar,
) -> anyhow::Result<Outcome> {
    std::fs::create_dir_all(&plan.out).map_err(|error| Error::io(&plan.out, error))?;
    let _lock = FolderLock::acquire(&plan.out, "l2p-data")?;
    let mut manifest = Manifest::open(&plan.out)?;
    let settings = json!({
        "model": model.name(),
        "understands": model.judges(),
        "seed": plan.seed,
        "taxonomy": taxonomy.identity()?,
        "taxonomy_version": taxonomy.version,
        "length_en": [plan.lengths.en.start(), plan.lengths.en.end()],
        "length_zh": [plan.lengths.zh.start(), plan.lengths.zh.end()],
        "near": plan.near,
        "temperature": plan.drawing.temperature,
        "top_p": plan.drawing.top_p,
    });
    // Numbers as a file gives them back.
    manifest.begin("prompts", &serde_json::from_str(&settings.to_string())?)?;
    let mut writing = Writing::open(plan, taxonomy)?;
    let before = writing.prompts;
    let written = writing.run(model, bar);
    bar.clear();
    let outcome = writing.outcome(before);
    let mut results = serde_json::to_value(&outcome)?;
    // What is of this run alone says nothing about the folder.
    results.as_object_mut().map(|results| results.remove("written"));
    manifest.finish("prompts", results)?;
    written?;
    Ok(outcome)
}

/// Refuses requests that cannot have been written one after the other.
fn ensure_turns(out: &Path, turns: &[Turn]) -> anyhow::Result<()> {
    let (mut lines, mut round) = (0usize, 0);
    for (index, turn) in turns.iter().enumerate() {
        let follows = turn.lines.checked_sub(turn.kept) == Some(lines);
        if !follows
            || turn.kept > turn.asked
            || turn.round < round
            || turn.round > index
            || turn.asked as u64 > Batch::MOST
        {
            bail!(
                "{}, line {}: does not follow from the lines before it; it was changed by hand, so use another folder",
                out.join(folder::TURNS).display(),
                index + 1
            );
        }
        (lines, round) = (turn.lines, turn.round);
    }
    Ok(())
}

/// The state of a folder's prompts.
struct Writing<'a> {
    plan: &'a Plan,
    cells: Vec<Cell<'a>>,
    prompts_file: Journal,
    turns_file: Journal,
    prompts: usize,
    near: Near,
    turns: Vec<Turn>,
}

impl<'a> Writing<'a> {
    /// Reads what is there, and drops prompts of a request that was not finished, which is made again.
    fn open(plan: &'a Plan, taxonomy: &'a Taxonomy) -> anyhow::Result<Self> {
        let prompts_path = plan.out.join(folder::PROMPTS);
        let (mut prompts_file, mut prompts) = Journal::open::<Prompt>(&prompts_path)?;
        let (turns_file, turns) = Journal::open::<Turn>(&plan.out.join(folder::TURNS))?;
        ensure_turns(&plan.out, &turns)?;
        let done = turns.last().map_or(0, |turn| turn.lines);
        if prompts.len() < done {
            bail!(
                "{}: holds {} prompts, but {} says {done}: lines were taken away by hand; use another folder",
                prompts_path.display(),
                prompts.len(),
                folder::TURNS
            );
        }
        if prompts.len() > done {
            crate::say(format_args!(
                "note: {}: the last {} prompts are of a request that was not finished; it is made again",
                prompts_path.display(),
                prompts.len() - done
            ));
            prompts.truncate(done);
            prompts_file.keep(done)?;
        }
        folder::ensure_order(&prompts_path, &prompts)?;
        let mut near = Near::new(plan.near);
        prompts.iter().for_each(|prompt| near.add(&prompt.prompt));
        let mut cells = cells(plan, taxonomy)?;
        for turn in &turns {
            if let Some(cell) = cells.iter_mut().find(|cell| cell.is_of(turn)) {
                cell.had(turn);
            }
        }
        Ok(Writing {
            plan,
            cells,
            prompts_file,
            turns_file,
            prompts: prompts.len(),
            near,
            turns,
        })
    }

    fn run(&mut self, model: &mut dyn LanguageModel, bar: &mut PhaseBar) -> anyhow::Result<()> {
        let mut round = self.turns.iter().map(|turn| turn.round).max().unwrap_or(0);
        let goal = |writing: &Self| writing.prompts + writing.cells.iter().map(|cell| cell.lacks()).sum::<usize>();
        loop {
            let open: Vec<usize> = (0..self.cells.len())
                .filter(|&index| self.cells[index].lacks() > 0 && !self.cells[index].is_done_in(round))
                .collect();
            if open.is_empty() {
                match self.cells.iter().any(|cell| cell.lacks() > 0) {
                    true => round += 1,
                    false => return Ok(()),
                }
                continue;
            }
            bar.show("writing prompts", self.prompts as u64, goal(self) as u64);
            let asked = self.ask(model, &open, bar)?;
            for asked in asked {
                self.keep(asked, round)?;
                bar.show("writing prompts", self.prompts as u64, goal(self) as u64);
            }
            if let Some(cell) = self
                .cells
                .iter()
                .find(|cell| cell.fruitless >= FRUITLESS && cell.lacks() > 0)
            {
                bail!(
                    "{}: the last {FRUITLESS} requests for {} brought nothing of use; the last reason: {}",
                    model.name(),
                    cell.label(),
                    cell.trouble
                );
            }
        }
    }

    /// Asks for all of these cells, again where an answer makes no sense.
    fn ask(&mut self, model: &mut dyn LanguageModel, open: &[usize], bar: &PhaseBar) -> anyhow::Result<Vec<Asked>> {
        let mut asked: Vec<Asked> = open
            .iter()
            .map(|&cell| Asked {
                cell,
                subjects: self.cells[cell].next_subjects(self.plan),
                attempts: 0,
                tokens: 0,
                texts: None,
                rejects: Vec::new(),
            })
            .collect();
        for attempt in 0..self.plan.attempts.max(1) {
            let missing: Vec<usize> = (0..asked.len()).filter(|&index| asked[index].texts.is_none()).collect();
            if missing.is_empty() {
                break;
            }
            let requests: Vec<Request> = missing
                .iter()
                .map(|&index| self.request(&asked[index], attempt))
                .collect();
            let (mut done, all) = (0, requests.len());
            model.answer(&requests, &mut |number, answer| {
                let asked = &mut asked[missing[number]];
                asked.attempts = attempt + 1;
                let (reason, detail, text) = match answer {
                    Ok(answer) => {
                        asked.tokens += answer.tokens;
                        match answers::texts(&answer.text) {
                            Ok(texts) => {
                                asked.texts = Some(texts);
                                (None, String::new(), String::new())
                            }
                            Err(detail) => (Some("bad answer"), detail, shown_name(&answer.text).into_owned()),
                        }
                    }
                    Err(detail) => (Some("no answer"), detail, String::new()),
                };
                if let Some(reason) = reason {
                    asked.rejects.push(Reject {
                        reason: reason.into(),
                        detail,
                        text,
                    });
                }
                done += 1;
                bar.detail(format!(", answer {done} of {all}"));
                match stop_requested() {
                    true => Err(Error::Interrupted.into()),
                    false => Ok(()),
                }
            })?;
        }
        Ok(asked)
    }

    fn request(&self, asked: &Asked, attempt: usize) -> Request {
        let (cell, plan) = (&self.cells[asked.cell], self.plan);
        ask::for_prompts(
            &cell.path,
            cell.sub_class.renders_text,
            cell.language,
            asked.subjects.clone(),
            plan.lengths.of(cell.language),
            plan.drawing,
            cell.seed(plan.seed, attempt),
        )
    }

    /// Keeps what is good of an answer: first the prompts, then the line that makes them count.
    fn keep(&mut self, asked: Asked, round: usize) -> anyhow::Result<()> {
        let Asked {
            subjects,
            texts,
            mut rejects,
            ..
        } = asked;
        let cell = &self.cells[asked.cell];
        let texts = texts.unwrap_or_default();
        let length = self.plan.lengths.of(cell.language);
        let in_order = texts.texts.len() == subjects.len();
        let mut kept: Vec<Prompt> = Vec::new();
        for (index, text) in texts.texts.into_iter().enumerate() {
            let mut refuse = |reason: &str, detail: String, text: String| {
                rejects.push(Reject {
                    reason: reason.into(),
                    detail,
                    text,
                });
            };
            let subject = match in_order {
                true => subjects.get(index),
                // More or fewer than were asked for: who is whose can only be told by what they say.
                false => subjects.iter().find(|subject| cells::mentions(&text, subject)),
            };
            let Some(subject) =
                subject.filter(|subject| !kept.iter().any(|other| other.category.as_ref() == Some(&subject.name)))
            else {
                refuse("off subject", "no subject of the request can be told".into(), text);
                continue;
            };
            let characters = text.chars().count();
            if !length.contains(&characters) {
                refuse("length", format!("{characters} characters"), text);
                continue;
            }
            if let Some(other) = self.near.copy_of(&text) {
                refuse("near-duplicate", format!("of prompt {other}"), text);
                continue;
            }
            self.near.add(&text);
            kept.push(Prompt {
                id: self.prompts + kept.len(),
                prompt: text,
                sub_class: cell.path.clone(),
                category: Some(subject.name.clone()),
                language: cell.language,
                renders_text: cell.sub_class.renders_text,
            });
        }
        self.prompts_file.append(&kept)?;
        self.prompts += kept.len();
        let turn = Turn {
            round,
            sub_class: cell.path.clone(),
            language: cell.language,
            asked: subjects.len(),
            kept: kept.len(),
            lines: self.prompts,
            attempts: asked.attempts,
            tokens: asked.tokens,
            rejects,
            mended: texts.mended.into_iter().map(String::from).collect(),
        };
        self.turns_file.append(std::slice::from_ref(&turn))?;
        self.cells[asked.cell].had(&turn);
        self.turns.push(turn);
        Ok(())
    }

    fn outcome(&self, before: usize) -> Outcome {
        let mut outcome = Outcome {
            prompts: self.prompts,
            written: self.prompts - before,
            requests: self.turns.len(),
            ..Outcome::default()
        };
        for turn in &self.turns {
            outcome.tokens += turn.tokens;
            *outcome
                .by_cell
                .entry(format!("{} {}", turn.sub_class, turn.language.code()))
                .or_default() += turn.kept;
            for reject in &turn.rejects {
                *outcome.rejects.entry(reject.reason.clone()).or_default() += 1;
            }
            for mended in &turn.mended {
                *outcome.mended.entry(mended.clone()).or_default() += 1;
            }
        }
        outcome
    }
}
