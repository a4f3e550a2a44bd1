//! A folder in which a data set comes about: its files, and how they survive whatever happens to a run.
//!
//! | file | holds |
//! | --- | --- |
//! | `factory.json` | the manifest: what each stage was done with, and its counts |
//! | `prompts.jsonl` | a prompt a line |
//! | `turns.jsonl` | a line for each request that is done: what was asked, how many lines `prompts.jsonl` then has, and what was refused |
//! | `checks.jsonl` | verdicts, the last one of a prompt counting |
//! | `answers/` | what a language model answered |
//!
//! The `.jsonl` files only grow. A line counts when it is whole; prompts count when the line of their request is whole, which is written
//! after them.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use l2p_engine::limits::Budget;
use l2p_engine::{Error, files};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::language::Language;

/// The prompts.
pub(super) const PROMPTS: &str = "prompts.jsonl";
/// The requests that are done.
pub(super) const TURNS: &str = "turns.jsonl";
/// The verdicts.
pub(super) const CHECKS: &str = "checks.jsonl";
/// What a language model answered.
pub(super) const ANSWERS: &str = "answers";
const MANIFEST: &str = "factory.json";

/// The version of the manifest's format.
const FORMAT: u64 = 1;

/// A prompt, as a line of `prompts.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prompt {
    /// Its number, which is that of its line, from 0.
    pub id: usize,
    /// The text.
    pub prompt: String,
    /// The class and sub-class, as `nature/food`.
    pub sub_class: String,
    /// The fine category that it was asked to show; nothing where that cannot be told.
    #[serde(default)]
    pub category: Option<String>,
    /// The language that it is in.
    pub language: Language,
    /// Whether its picture is to show text.
    #[serde(default)]
    pub renders_text: bool,
}

/// A verdict on a prompt, as a line of `checks.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// The prompt's number.
    pub id: usize,
    /// Whether it may be used.
    pub is_valid: bool,
    /// The rule that it breaks, or `auditor` or `undecided`; empty where it is valid.
    #[serde(default)]
    pub rule: String,
    /// Why, in words.
    pub reason: String,
    /// Who says so: `rules`, or the name of a language model.
    pub by: String,
}

/// A file of lines that only grows.
pub(super) struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// Opens a journal, made where there is none, and returns what its whole lines say. A last line that is cut is dropped, which is said.
    ///
    /// # Errors
    /// When it cannot be read or written, or a line before the last is damaged.
    pub(super) fn open<T: DeserializeOwned>(path: &Path) -> anyhow::Result<(Self, Vec<T>)> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.map_err(|error| Error::io(path, error))?;
        let (entries, whole) = read(path)?;
        let length = file.metadata().map_err(|error| Error::io(path, error))?.len();
        if length > whole {
            crate::say(format_args!(
                "note: {}: its last line is cut and is dropped ({} bytes)",
                path.display(),
                length - whole
            ));
            file.set_len(whole).map_err(|error| Error::io(path, error))?;
        }
        let journal = Journal {
            path: path.into(),
            file,
        };
        Ok((journal, entries))
    }

    /// Adds lines, and brings them onto the disk.
    pub(super) fn append<T: Serialize>(&mut self, entries: &[T]) -> anyhow::Result<()> {
        let mut text = Vec::new();
        for entry in entries {
            serde_json::to_writer(&mut text, entry)?;
            text.push(b'\n');
        }
        let written = self.file.write_all(&text).and_then(|()| self.file.sync_data());
        Ok(written.map_err(|error| Error::io(&self.path, error))?)
    }

    /// Keeps only so many lines.
    pub(super) fn keep(&mut self, lines: usize) -> anyhow::Result<()> {
        let bytes = files::read(&self.path, Budget::METADATA)?;
        let length = bytes
            .split_inclusive(|byte| *byte == b'\n')
            .take(lines)
            .map(<[u8]>::len)
            .sum::<usize>();
        let cut = self.file.set_len(length as u64).and_then(|()| self.file.sync_data());
        Ok(cut.map_err(|error| Error::io(&self.path, error))?)
    }
}

/// What the whole lines of a journal say, and how many bytes they have.
fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<(Vec<T>, u64)> {
    let bytes = files::read(path, Budget::METADATA)?;
    let (mut entries, mut whole) = (Vec::new(), 0);
    for (index, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
        let is_last = whole + line.len() == bytes.len();
        match (serde_json::from_slice(line), line.ends_with(b"\n")) {
            (Ok(entry), true) => entries.push(entry),
            // Zeros, as some disks leave them after a crash, or a part of a line.
            _ if is_last && (!line.ends_with(b"\n") || line.contains(&0)) => return Ok((entries, whole as u64)),
            (Err(error), _) => {
                let reason = format!(
                    "line {} is damaged: {error}; mend it or choose another folder",
                    index + 1
                );
                return Err(Error::file(path, reason).into());
            }
            (Ok(_), false) => return Ok((entries, whole as u64)),
        }
        whole += line.len();
    }
    Ok((entries, whole as u64))
}

/// What the whole lines of a journal say, which may not be there; nothing is changed.
///
/// # Errors
/// When it cannot be read, or a line before the last is damaged.
pub(super) fn entries<T: DeserializeOwned>(path: &Path) -> anyhow::Result<Vec<T>> {
    match path.exists() {
        true => Ok(read(path)?.0),
        false => Ok(Vec::new()),
    }
}

/// The prompts of a folder, which must be in order; those of a request that is not finished are left out.
///
/// # Errors
/// When there are none, or a file is damaged.
pub fn prompts(folder: &Path) -> anyhow::Result<Vec<Prompt>> {
    let path = folder.join(PROMPTS);
    let mut prompts: Vec<Prompt> = entries(&path)?;
    let turns: Vec<Lines> = entries(&folder.join(TURNS))?;
    prompts.truncate(turns.last().map_or(0, |turn| turn.lines));
    ensure_order(&path, &prompts)?;
    if prompts.is_empty() {
        bail!(
            "{}: holds no prompts; have some written with l2p-data prompts --out {0}",
            folder.display()
        );
    }
    Ok(prompts)
}

/// The last verdict on each prompt, by its number.
///
/// # Errors
/// When the file is damaged.
pub fn verdicts(folder: &Path, prompts: usize) -> anyhow::Result<Vec<Option<Check>>> {
    let checks = entries(&folder.join(CHECKS))?;
    by_prompt(&folder.join(CHECKS), checks, prompts)
}

/// The last of some verdicts on each prompt.
pub(super) fn by_prompt(path: &Path, checks: Vec<Check>, prompts: usize) -> anyhow::Result<Vec<Option<Check>>> {
    let mut found = vec![None; prompts];
    for (index, check) in checks.into_iter().enumerate() {
        let id = check.id;
        let place = found.get_mut(id).with_context(|| {
            format!(
                "{}, line {}: judges prompt {id}, and there are {prompts}",
                path.display(),
                index + 1
            )
        })?;
        *place = Some(check);
    }
    Ok(found)
}

/// Refuses prompts whose numbers are not those of their lines.
pub(super) fn ensure_order(path: &Path, prompts: &[Prompt]) -> anyhow::Result<()> {
    match prompts.iter().enumerate().find(|(index, prompt)| prompt.id != *index) {
        None => Ok(()),
        Some((index, prompt)) => bail!(
            "{}, line {}: says id {}, expected {index}: a line was added or taken away by hand",
            path.display(),
            index + 1,
            prompt.id
        ),
    }
}

/// What [`prompts`] reads of a line of `turns.jsonl`.
#[derive(Deserialize)]
struct Lines {
    lines: usize,
}

/// The manifest.
pub(super) struct Manifest {
    path: PathBuf,
    content: Map<String, Value>,
}

impl Manifest {
    /// That of a folder, empty where there is none.
    ///
    /// # Errors
    /// When it cannot be read, or is of another format.
    pub(super) fn open(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join(MANIFEST);
        let mut content = Map::new();
        content.insert("format".into(), FORMAT.into());
        if path.exists() {
            content = files::read_json(&path, Budget::CONFIG)?;
            if content.get("format") != Some(&FORMAT.into()) {
                return Err(Error::file(path, format!("is not of format {FORMAT}, which this version reads")).into());
            }
        }
        Ok(Manifest { path, content })
    }

    /// What it says about a stage.
    pub(super) fn stage(&self, name: &str) -> Option<&Value> {
        self.content.get(name)
    }

    /// Notes what a stage is done with, unless it was begun with something else.
    ///
    /// # Errors
    /// Naming what differs, and when the file cannot be written.
    pub(super) fn begin(&mut self, name: &str, settings: &Value) -> anyhow::Result<()> {
        let found = self.content.get(name).and_then(|stage| stage.get("settings"));
        if let Some(found) = found.and_then(Value::as_object) {
            let asked = settings.as_object().into_iter().flatten();
            let differing: Vec<&str> = asked
                .filter(|(key, value)| found.get(*key) != Some(value))
                .map(|(key, _)| key.as_str())
                .collect();
            if !differing.is_empty() {
                let reason = format!(
                    "says that the {name} here were begun with another {}: use the same again, or another folder",
                    differing.join(" and ")
                );
                return Err(Error::file(&self.path, reason).into());
            }
            return Ok(());
        }
        self.content.insert(name.into(), json!({"settings": settings}));
        self.write()
    }

    /// Notes what came of a stage.
    pub(super) fn finish(&mut self, name: &str, results: Value) -> anyhow::Result<()> {
        let stage = self.content.entry(name).or_insert_with(|| json!({}));
        if let (Some(stage), Value::Object(results)) = (stage.as_object_mut(), results) {
            stage.extend(results);
        }
        self.write()
    }

    fn write(&self) -> anyhow::Result<()> {
        let text = format!("{:#}\n", Value::Object(self.content.clone()));
        Ok(files::replace(&self.path, text.as_bytes())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_line_is_dropped_wherever_it_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let whole = "{\"lines\":1}\n{\"lines\":22}\n";
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let (mut journal, found) = Journal::open::<Value>(&path).unwrap();
            let expected = whole[..cut].matches('\n').count();
            assert_eq!(found.len(), expected, "{cut}");
            journal.append(&[json!({"lines": 3})]).unwrap();
            drop(journal);
            let (_, found) = Journal::open::<Value>(&path).unwrap();
            assert_eq!(found.len(), expected + 1, "{cut}");
        }
        std::fs::write(&path, b"{\"lines\":1}\n\0\0\0\0").unwrap();
        assert_eq!(Journal::open::<Value>(&path).unwrap().1.len(), 1);
        std::fs::write(&path, "{\"lines\":1}\noops\n{\"lines\":2}\n").unwrap();
        let message = Journal::open::<Value>(&path).err().unwrap().to_string();
        assert!(message.contains("line 2 is damaged"), "{message}");
    }

    #[test]
    fn a_manifest_refuses_other_settings() {
        let folder = tempfile::tempdir().unwrap();
        let mut manifest = Manifest::open(folder.path()).unwrap();
        manifest.begin("prompts", &json!({"seed": 1, "model": "a"})).unwrap();
        let mut again = Manifest::open(folder.path()).unwrap();
        again.begin("prompts", &json!({"seed": 1, "model": "a"})).unwrap();
        let message = again
            .begin("prompts", &json!({"seed": 2, "model": "a"}))
            .unwrap_err()
            .to_string();
        assert!(message.contains("another seed:"), "{message}");
        again.finish("prompts", json!({"kept": 3})).unwrap();
        assert_eq!(
            Manifest::open(folder.path()).unwrap().stage("prompts").unwrap()["kept"],
            3
        );
        std::fs::write(folder.path().join(MANIFEST), "{\"format\": 2}").unwrap();
        assert!(Manifest::open(folder.path()).is_err());
    }
}
