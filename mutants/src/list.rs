//! The list of mutants, as `cargo mutants --list --json` writes it.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Deserialize;

/// What is done to the source.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub enum Genre {
    /// A function returns a value at once.
    FnValue,
    /// An operator between two operands is another one.
    BinaryOperator,
    /// An operator before an operand is left out.
    UnaryOperator,
    /// A match arm is left out; a later one takes everything.
    MatchArm,
    /// A match arm's guard is always true, or never.
    MatchArmGuard,
    /// A field of a struct expression is left to its base.
    StructField,
}

/// A place in a file, counted from 1, in characters.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub struct Place {
    /// The line.
    pub line: usize,
    /// The character of the line.
    pub column: usize,
}

/// From the first character to the one after the last.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub struct Span {
    /// The first.
    pub start: Place,
    /// After the last.
    pub end: Place,
}

/// One change of the source.
#[derive(Clone, Debug, Deserialize)]
pub struct Mutant {
    /// In words, with its place.
    pub name: String,
    /// Relative to the workspace.
    pub file: PathBuf,
    /// What kind of change.
    pub genre: Genre,
    /// What is replaced.
    pub span: Span,
    /// By what.
    pub replacement: String,
}

/// Reads a list.
///
/// # Errors
/// When there is no such file, or it holds something else.
pub fn read(path: &Path) -> anyhow::Result<Vec<Mutant>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| format!("{}: not a list of mutants", path.display()))
}

/// The byte at which each line starts.
pub struct Lines<'a> {
    text: &'a str,
    starts: Vec<usize>,
}

impl<'a> Lines<'a> {
    /// Of a file's text.
    pub fn of(text: &'a str) -> Self {
        let breaks = text.match_indices('\n').map(|(at, _)| at + 1);
        Lines {
            text,
            starts: std::iter::once(0).chain(breaks).collect(),
        }
    }

    /// The byte of a place.
    pub fn byte(&self, place: Place) -> usize {
        let start = self.starts[place.line - 1];
        let line = &self.text[start..];
        line.char_indices()
            .nth(place.column - 1)
            .map_or(self.text.len(), |(at, _)| start + at)
    }

    /// The bytes of a span.
    pub fn range(&self, span: Span) -> std::ops::Range<usize> {
        self.byte(span.start)..self.byte(span.end)
    }
}
