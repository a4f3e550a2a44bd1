//! Readers of the data factory: a taxonomy, what language models answer, and the files of a folder that a run goes on in.

use clap::Parser;

use super::Ended;
use crate::case::Case;

/// Runs `l2p-data` with these arguments.
fn run(arguments: &[&str]) -> Result<(), String> {
    let all = std::iter::once("l2p-data").chain(arguments.iter().copied());
    let parsed = l2p_bins::data::Arguments::try_parse_from(all).map_err(|error| error.to_string())?;
    l2p_bins::data::data(parsed).map_err(|error| format!("{error:#}"))
}

/// A taxonomy of one's own. What is taken names things and nothing else.
pub fn taxonomy(case: &mut Case) -> Ended {
    let bytes = std::fs::read(case.path("factory/taxonomy.json")).unwrap_or_default();
    let taxonomy = match l2p_bins::data::taxonomy::Taxonomy::parse(&bytes) {
        Ok(taxonomy) => taxonomy,
        Err(error) => return Ended::Refused(format!("{error:#}")),
    };
    let names = taxonomy.sub_classes().flat_map(|(_, sub)| &sub.categories.0);
    match names
        .map(|category| &category.name)
        .find(|name| name.contains(['"', '{', '\n']))
    {
        Some(name) => Ended::Wrong("a name that is none", name.clone()),
        None => Ended::Accepted,
    }
}

/// What a language model answered.
pub fn answers(case: &mut Case) -> Ended {
    let bytes = std::fs::read(case.path(&case.changed[0])).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let list = l2p_bins::data::answers::texts(&text);
    let verdict = l2p_bins::data::answers::verdict(&text);
    if let Ok(list) = &list
        && let Some(odd) = list.texts.iter().find(|text| text.contains('\n'))
    {
        return Ended::Wrong("a text of several lines", odd.clone());
    }
    match (list, verdict) {
        (Err(reason), Err(_)) => Ended::Refused(reason),
        _ => Ended::Accepted,
    }
}

/// A folder in which prompts were written and checked.
pub fn folder(case: &mut Case) -> Ended {
    let path = |name: &str| case.path(name).display().to_string();
    let (set, taxonomy) = (path("factory/set"), path("factory/taxonomy.json"));
    for arguments in [
        &["prompts", "--count", "7", "--taxonomy", &taxonomy, "--out", &set][..],
        &["check", "--out", &set],
        &["report", &set],
    ] {
        if let Err(error) = run(arguments) {
            return Ended::Refused(error);
        }
    }
    Ended::Accepted
}
