//! Results: a file with a line per mutant, and the table of them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context;

use crate::kit::Planned;
use crate::tree::LeftOut;
use crate::trial::Fate;

/// The result of a mutant that all tests passed with.
pub const SURVIVED: &str = "survived";

/// A result in the file.
pub fn fate(fate: &Fate) -> String {
    match fate {
        Fate::Caught(by) => format!("caught by {by}"),
        Fate::Timeout => "timeout".into(),
        Fate::Survived => SURVIVED.into(),
    }
}

/// The same of a mutant that was not run.
pub fn left_out(why: LeftOut) -> &'static str {
    match why {
        LeftOut::NotWoven => "not woven",
        LeftOut::Constant => "constant",
        LeftOut::Unviable => "unviable",
    }
}

/// The results so far, by the mutant's name; a later line counts more.
///
/// # Errors
/// When the file cannot be read.
pub fn read(path: &Path) -> anyhow::Result<BTreeMap<String, String>> {
    if !path.exists() {
        return Ok(BTreeMap::new());
    }
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let lines = text.lines().filter_map(|line| line.split_once('\t'));
    Ok(lines
        .map(|(result, name)| (name.to_owned(), result.to_owned()))
        .collect())
}

/// Counts by file, and the names of the survivors.
pub fn summary(mutants: &[Planned], results: &BTreeMap<String, String>) -> String {
    let mut counts: BTreeMap<String, [usize; 5]> = BTreeMap::new();
    let mut survivors = Vec::new();
    for mutant in mutants {
        let column = match results.get(&mutant.name).map(String::as_str) {
            Some("timeout") => 1,
            Some(SURVIVED) => {
                survivors.push(&mutant.name);
                2
            }
            Some("unviable") => 3,
            Some(result) if result.starts_with("caught") => 0,
            _ => 4,
        };
        for name in [mutant.file.display().to_string(), "all".into()] {
            counts.entry(name).or_default()[column] += 1;
        }
    }
    let all = counts.remove("all").unwrap_or_default();
    let mut text = String::from("| file | mutants | caught | timeout | survived | unviable | not run |\n");
    text.push_str("| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n");
    for (name, counts) in counts.into_iter().chain([("**all**".to_owned(), all)]) {
        let total: usize = counts.iter().sum();
        let columns: Vec<String> = counts.iter().map(ToString::to_string).collect();
        // Writing to a string succeeds.
        let _ = writeln!(text, "| {name} | {total} | {} |", columns.join(" | "));
    }
    text.push_str("\nSurvivors:\n");
    for name in survivors {
        let _ = writeln!(text, "* {name}");
    }
    text
}
