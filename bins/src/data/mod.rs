//! `l2p-data`: a training set without any real picture, in stages that work in one folder.
//!
//! | stage | module | writes |
//! | --- | --- | --- |
//! | `taxonomy` | `taxonomy`, `expand` | what pictures can show |
//! | `prompts` | `prompts`, asking `language` | `prompts.jsonl`, `turns.jsonl` |
//! | `check` | `check`, by `rules` and `language` | `checks.jsonl` |
//! | `synthesize` | `synthesize` | pictures, `metadata.jsonl`, `metadata.csv` |
//! | `report` | `report` | `report.html` |
//!
//! Each stage goes on where it was interrupted, however that happened; `folder` says how.

mod all;
pub mod answers;
mod arguments;
mod ask;
pub mod check;
mod dice;
mod expand;
pub mod folder;
mod forecast;
pub mod language;
mod near;
pub mod prompts;
mod report;
pub mod rules;
mod stages;
mod synthesize;
pub mod taxonomy;

use std::process::ExitCode;

pub use arguments::Arguments;
use arguments::Command;

use synthesize::{Order, synthesize_among};

use crate::score;

/// Does what the arguments ask for, and returns the exit code. Errors are printed.
pub fn main(arguments: &Arguments) -> ExitCode {
    match &arguments.command {
        Command::All(arguments) => all::run(arguments),
        Command::Taxonomy(arguments) => crate::run(|| expand::show_or_expand(arguments)),
        Command::Prompts(arguments) => crate::run(|| stages::prompts(arguments)),
        Command::Check(arguments) => crate::run(|| stages::check(arguments)),
        Command::Synthesize(arguments) => {
            let order = Order::from(&**arguments);
            arguments.draw.ranks.run(|launch| synthesize_among(&order, launch))
        }
        Command::Report(arguments) => crate::run(|| stages::report(arguments)),
        Command::Score(arguments) => crate::run(|| score::score(arguments)),
    }
}

/// Does what the arguments ask for, in this process alone.
///
/// # Errors
/// Whatever the user needs to know, as one sentence.
pub fn data(arguments: Arguments) -> anyhow::Result<()> {
    match arguments.command {
        Command::All(arguments) => all::alone(&arguments),
        Command::Taxonomy(arguments) => expand::show_or_expand(&arguments),
        Command::Prompts(arguments) => stages::prompts(&arguments),
        Command::Check(arguments) => stages::check(&arguments),
        Command::Synthesize(arguments) => synthesize_among(&Order::from(&*arguments), None),
        Command::Report(arguments) => stages::report(&arguments),
        Command::Score(arguments) => score::score(&arguments),
    }
}
