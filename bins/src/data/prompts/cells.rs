//! Sub-classes in a language, and whose turn is whose.

use anyhow::bail;

use super::{Plan, Turn};
use crate::data::dice::{Dice, hash};
use crate::data::language::{Language, Subject};
use crate::data::taxonomy::{SubClass, Taxonomy, path};

/// Letters of a word that is taken for more than a preposition.
const WORD: usize = 4;

/// A sub-class in a language, and what it has had.
pub(super) struct Cell<'a> {
    /// The class and sub-class, as `nature/food`.
    pub path: String,
    /// The sub-class.
    pub sub_class: &'a SubClass,
    /// The language.
    pub language: Language,
    /// What can be asked for: all categories with a name.
    subjects: Vec<Subject>,
    /// Prompts that it is to have.
    target: usize,
    kept: usize,
    /// Subjects that were asked for.
    asked: usize,
    turns: usize,
    last_round: Option<usize>,
    /// Turns in a row that brought nothing.
    pub fruitless: usize,
    /// The last reason for that.
    pub trouble: String,
}

/// All cells of a plan, in the order in which they are asked for; the first ones have one prompt more where the count cannot be divided.
///
/// # Errors
/// When a sub-class has no category with a name in a language.
pub(super) fn cells<'a>(plan: &Plan, taxonomy: &'a Taxonomy) -> anyhow::Result<Vec<Cell<'a>>> {
    let mut cells = Vec::new();
    let mut sub_classes: Vec<_> = taxonomy.sub_classes().collect();
    // So that few prompts are of many classes.
    Dice::new(plan.seed, "order of sub-classes", 0).shuffle(&mut sub_classes);
    for pass in 0..plan.languages.len() {
        for (index, &(class, sub_class)) in sub_classes.iter().enumerate() {
            // All sub-classes before one comes again, and all languages in turn.
            let language = plan.languages[(index + pass) % plan.languages.len()];
            let path = path(class, sub_class);
            let categories = sub_class.categories.0.iter();
            let subjects: Vec<Subject> = categories
                .filter_map(|category| {
                    let shown = match language {
                        Language::En => category.name.clone(),
                        Language::Zh => category.zh.clone()?,
                    };
                    Some(Subject {
                        name: category.name.clone(),
                        shown,
                    })
                })
                .collect();
            if subjects.is_empty() {
                bail!(
                    "`{path}` has no category with a name in {}: give its categories as {{\"name\": \"名称\"}}, or leave --languages {} away",
                    language.name(),
                    language.code()
                );
            }
            cells.push(Cell {
                path,
                sub_class,
                language,
                subjects,
                target: 0,
                kept: 0,
                asked: 0,
                turns: 0,
                last_round: None,
                fruitless: 0,
                trouble: String::new(),
            });
        }
    }
    let count = cells.len();
    for (index, cell) in cells.iter_mut().enumerate() {
        cell.target = plan.count / count + usize::from(index < plan.count % count);
    }
    Ok(cells)
}

impl Cell<'_> {
    /// Its name for people.
    pub fn label(&self) -> String {
        format!("{} in {}", self.path, self.language.name())
    }

    /// Whether a turn is one of it.
    pub fn is_of(&self, turn: &Turn) -> bool {
        self.path == turn.sub_class && self.language == turn.language
    }

    /// Counts a turn.
    pub fn had(&mut self, turn: &Turn) {
        self.kept += turn.kept;
        self.asked += turn.asked;
        self.turns += 1;
        self.last_round = Some(turn.round);
        match (turn.kept, turn.rejects.last()) {
            (0, Some(reject)) => {
                self.fruitless += 1;
                self.trouble = match reject.detail.is_empty() {
                    true => reject.reason.clone(),
                    false => format!("{}: {}", reject.reason, reject.detail),
                };
            }
            (0, None) => self.fruitless += 1,
            _ => self.fruitless = 0,
        }
    }

    /// Prompts that it still needs.
    pub fn lacks(&self) -> usize {
        self.target.saturating_sub(self.kept)
    }

    /// Whether it has had its turn in a round.
    pub fn is_done_in(&self, round: usize) -> bool {
        self.last_round.is_some_and(|last| last >= round)
    }

    /// What its next request asks for: every subject once in an order of its own, then all again in another.
    pub fn next_subjects(&self, plan: &Plan) -> Vec<Subject> {
        let count = self.lacks().min(plan.batch.max(1)).min(self.subjects.len());
        let all = self.subjects.len();
        let mut next = Vec::with_capacity(count);
        let mut at = self.asked;
        while next.len() < count {
            let pass = at / all;
            let purpose = format!("subjects of {} {}", self.path, self.language.code());
            let mut order: Vec<usize> = (0..all).collect();
            Dice::new(plan.seed, &purpose, pass as u64).shuffle(&mut order);
            let subject = &self.subjects[order[at % all]];
            at += 1;
            if !next.contains(subject) {
                next.push(subject.clone());
            }
        }
        next
    }

    /// The seed of its next request, at the so-manieth attempt.
    pub fn seed(&self, seed: u64, attempt: usize) -> u64 {
        let of = format!(
            "{} {} turn {} attempt {attempt}",
            self.path,
            self.language.code(),
            self.turns
        );
        hash(seed, of.as_bytes())
    }
}

/// Whether a prompt speaks of a subject: its name as it was shown, or a long word of it.
pub(super) fn mentions(text: &str, subject: &Subject) -> bool {
    let lower = text.to_lowercase();
    let shown = subject.shown.to_lowercase();
    let mut words = shown
        .split([' ', '-'])
        .filter(|word| word.is_ascii() && word.len() >= WORD);
    lower.contains(&shown) || words.any(|word| lower.contains(word))
}
