//! The page of a folder: what is in it, what was refused and why, and its pictures to look through.

mod page;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::bail;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use l2p_engine::data::Metadata;
use l2p_engine::files;
use l2p_engine::image_io::{Filter, ImageFormat, WriteOptions, encode_image, read_image, resize};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::Value;

use super::folder::{self, Check, Prompt};
use super::prompts::Turn;

/// The page.
pub(super) const FILE: &str = "report.html";

/// The longer side of a picture on the sheet, in pixels.
const THUMBNAIL: usize = 160;

/// Refused texts that the page lists.
const MOST_REFUSED: usize = 2000;

/// What the page says in numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Numbers {
    /// Prompts that were kept.
    pub prompts: usize,
    /// Those that may be used.
    pub valid: usize,
    /// Those that have no verdict.
    pub unchecked: usize,
    /// Those that may not be used, by rule.
    pub rejected: BTreeMap<String, usize>,
    /// Texts that were dropped when prompts were written, by reason.
    pub dropped: BTreeMap<String, usize>,
    /// The share of all texts that were dropped as near-duplicates.
    pub duplicate_rate: f64,
    /// Pictures.
    pub pictures: usize,
    /// Kept and usable prompts and pictures of each sub-class.
    pub sub_classes: BTreeMap<String, [usize; 3]>,
    /// Prompts of each language.
    pub languages: BTreeMap<String, usize>,
}

/// A picture on the sheet.
#[derive(Serialize)]
struct Shown {
    file: String,
    prompt: String,
    sub_class: String,
    language: String,
    seed: Option<u64>,
    /// A JPEG in base64; nothing where the picture cannot be read.
    picture: Option<String>,
}

/// A text that was refused.
#[derive(Serialize)]
struct Refused {
    stage: &'static str,
    rule: String,
    reason: String,
    sub_class: String,
    text: String,
}

/// All that the page is made of.
struct Content {
    numbers: Numbers,
    /// Lengths of kept prompts in characters, by language.
    lengths: BTreeMap<String, Vec<usize>>,
    shown: Vec<Shown>,
    refused: Vec<Refused>,
    manifest: Option<Value>,
}

/// Writes the page of `folder` to `path`, with up to `most` pictures, and returns its numbers.
///
/// # Errors
/// When the folder holds neither prompts nor pictures, a file in it is damaged, or the page cannot be written.
pub(super) fn write(folder: &Path, path: &Path, most: usize) -> anyhow::Result<Value> {
    let content = read(folder, most)?;
    let title = format!(
        "Data set {}",
        folder.file_name().unwrap_or(folder.as_os_str()).display()
    );
    files::replace(path, page::page(&title, &content)?.as_bytes())?;
    Ok(serde_json::to_value(&content.numbers)?)
}

fn read(folder: &Path, most: usize) -> anyhow::Result<Content> {
    let (has_prompts, has_pictures) = (
        folder.join(folder::PROMPTS).exists(),
        folder.join("metadata.jsonl").exists(),
    );
    if !has_prompts && !has_pictures {
        bail!(
            "{}: holds neither prompts.jsonl nor metadata.jsonl, so there is nothing to report",
            folder.display()
        );
    }
    let prompts = if has_prompts {
        folder::prompts(folder)?
    } else {
        Vec::new()
    };
    let verdicts = folder::verdicts(folder, prompts.len())?;
    let turns: Vec<Turn> = folder::entries(&folder.join(folder::TURNS))?;
    let records =
        match has_pictures && std::fs::metadata(folder.join("metadata.jsonl")).is_ok_and(|found| found.len() > 0) {
            true => Metadata::read(&folder.join("metadata.jsonl"))?.records,
            false => Vec::new(),
        };
    let mut numbers = count(&prompts, &verdicts, &turns);
    numbers.pictures = records.len();
    let by_text: HashMap<&str, &Prompt> = prompts.iter().map(|prompt| (prompt.prompt.as_str(), prompt)).collect();
    for record in &records {
        if let Some(prompt) = by_text.get(record.caption.as_str()) {
            numbers.sub_classes.entry(prompt.sub_class.clone()).or_default()[2] += 1;
        }
    }
    let count = records.len().min(most);
    let chosen = (0..count)
        .into_par_iter()
        .map(|index| &records[index * records.len() / count.max(1)]);
    let shown = chosen
        .map(|record| {
            let prompt = by_text.get(record.caption.as_str());
            Shown {
                file: record.name.clone(),
                prompt: record.caption.clone(),
                sub_class: prompt.map(|prompt| prompt.sub_class.clone()).unwrap_or_default(),
                language: prompt
                    .map(|prompt| prompt.language.code().to_owned())
                    .unwrap_or_default(),
                seed: record.seed,
                picture: thumbnail(&record.path),
            }
        })
        .collect();
    let mut lengths: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for prompt in &prompts {
        lengths
            .entry(prompt.language.name().into())
            .or_default()
            .push(prompt.prompt.chars().count());
    }
    let manifest = folder.join("factory.json");
    let manifest = match manifest.exists() {
        true => Some(files::read_json(&manifest, l2p_engine::limits::Budget::CONFIG)?),
        false => None,
    };
    Ok(Content {
        numbers,
        lengths,
        shown,
        refused: refused(&prompts, &verdicts, &turns),
        manifest,
    })
}

fn count(prompts: &[Prompt], verdicts: &[Option<Check>], turns: &[Turn]) -> Numbers {
    let mut numbers = Numbers {
        prompts: prompts.len(),
        ..Numbers::default()
    };
    for (prompt, verdict) in prompts.iter().zip(verdicts) {
        *numbers.languages.entry(prompt.language.name().into()).or_default() += 1;
        let of = numbers.sub_classes.entry(prompt.sub_class.clone()).or_default();
        of[0] += 1;
        match verdict {
            None => numbers.unchecked += 1,
            Some(check) if check.is_valid => {
                numbers.valid += 1;
                of[1] += 1;
            }
            Some(check) => *numbers.rejected.entry(check.rule.clone()).or_default() += 1,
        }
    }
    let mut texts = prompts.len();
    for reject in turns.iter().flat_map(|turn| &turn.rejects) {
        *numbers.dropped.entry(reject.reason.clone()).or_default() += 1;
        texts += usize::from(!matches!(reject.reason.as_str(), "bad answer" | "no answer"));
    }
    let copies = numbers.dropped.get("near-duplicate").copied().unwrap_or(0);
    numbers.duplicate_rate = copies as f64 / texts.max(1) as f64;
    numbers
}

fn refused(prompts: &[Prompt], verdicts: &[Option<Check>], turns: &[Turn]) -> Vec<Refused> {
    let judged = prompts.iter().zip(verdicts).filter_map(|(prompt, verdict)| {
        let check = verdict.as_ref().filter(|check| !check.is_valid)?;
        Some(Refused {
            stage: "check",
            rule: check.rule.clone(),
            reason: format!("{} ({})", check.reason, check.by),
            sub_class: prompt.sub_class.clone(),
            text: prompt.prompt.clone(),
        })
    });
    let dropped = turns.iter().flat_map(|turn| {
        turn.rejects.iter().map(|reject| Refused {
            stage: "prompts",
            rule: reject.reason.clone(),
            reason: reject.detail.clone(),
            sub_class: turn.sub_class.clone(),
            text: reject.text.clone(),
        })
    });
    judged.chain(dropped).take(MOST_REFUSED).collect()
}

/// A small JPEG of a picture.
fn thumbnail(path: &Path) -> Option<String> {
    let image = read_image(path).ok()?;
    let longer = image.width().max(image.height());
    let side = |side: usize| (side * THUMBNAIL / longer).max(1);
    let small = match longer > THUMBNAIL {
        true => resize(&image, side(image.width()), side(image.height()), Filter::Lanczos).ok()?,
        false => image,
    };
    let options = WriteOptions::default();
    let bytes = encode_image(&small, ImageFormat::Jpeg, &options).ok()?;
    Some(BASE64_STANDARD.encode(bytes))
}
