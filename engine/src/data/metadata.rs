//! What is in a data set: `metadata.jsonl`, `metadata.json` (a list of objects) or `metadata.csv` (with a header) in its folder.
//!
//! | column | meaning |
//! | --- | --- |
//! | `image` or `file_name` | the picture, relative to the metadata's folder |
//! | `prompt` or `text` | its caption; may be empty |
//! | `seed` | optional: the seed of its noise |
//!
//! Other columns are ignored. A line that cannot be used is damaged, like a picture that cannot be decoded.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::damage::Damage;
use crate::error::{Error, Result};

/// The names that a folder's metadata may have.
const FILES: [&str; 3] = ["metadata.jsonl", "metadata.json", "metadata.csv"];

/// The names of the picture's column and of the caption's, the first that is there being used.
const IMAGE: [&str; 2] = ["image", "file_name"];
const CAPTION: [&str; 2] = ["prompt", "text"];
const SEED: &str = "seed";

/// One picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The picture as the metadata names it.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// What it shows.
    pub caption: String,
    /// The seed of its noise.
    pub seed: Option<u64>,
}

/// The content of a metadata file.
#[derive(Clone, Debug)]
pub struct Metadata {
    /// The file.
    pub path: PathBuf,
    /// The pictures, in the order of the file.
    pub records: Vec<Record>,
    /// The lines that cannot be used.
    pub damaged: Vec<Damage>,
}

impl Metadata {
    /// Reads the metadata of a folder, or a metadata file itself.
    ///
    /// # Errors
    /// When there is none or more than one, or no picture or caption is in it at all.
    pub fn read(path: &Path) -> Result<Self> {
        let path = find(path)?;
        let bytes = std::fs::read(&path).map_err(|error| Error::io(&path, error))?;
        // Editors on Windows begin a file with a byte order mark.
        let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&bytes);
        let mut reader = Reader::new(&path);
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("jsonl") => reader.json_lines(bytes),
            Some("json") => reader.json(bytes)?,
            Some("csv") => reader.csv(bytes)?,
            _ => return Err(Error::file(path, "metadata is a .jsonl, .json or .csv file")),
        }
        let Reader { records, damaged, .. } = reader;
        if records.is_empty() {
            let reason = match damaged.first() {
                None => "lists no pictures".to_owned(),
                Some(first) => format!(
                    "lists no picture that can be used; the first line's fault: {}",
                    first.reason
                ),
            };
            return Err(Error::file(path, reason));
        }
        Ok(Metadata { path, records, damaged })
    }

    /// Entries of the file, damaged ones included.
    pub fn entries(&self) -> usize {
        self.records.len() + self.damaged.len()
    }
}

fn find(path: &Path) -> Result<PathBuf> {
    if !path.metadata().map_err(|error| Error::io(path, error))?.is_dir() {
        return Ok(path.into());
    }
    let found: Vec<PathBuf> = FILES
        .iter()
        .map(|name| path.join(name))
        .filter(|path| path.is_file())
        .collect();
    match &found[..] {
        [one] => Ok(one.clone()),
        [] => Err(Error::file(path, format!("holds none of {}", FILES.join(", ")))),
        [first, second, ..] => Err(Error::file(
            path,
            format!(
                "holds both {} and {}: name the file that is meant",
                first.file_name().unwrap_or_default().display(),
                second.file_name().unwrap_or_default().display()
            ),
        )),
    }
}

/// Collects records and damages.
struct Reader<'a> {
    path: &'a Path,
    folder: &'a Path,
    records: Vec<Record>,
    damaged: Vec<Damage>,
}

/// The three columns of a row, as text.
struct Row<'a> {
    image: Option<&'a str>,
    caption: Option<&'a str>,
    seed: Option<&'a str>,
}

impl<'a> Reader<'a> {
    fn new(path: &'a Path) -> Self {
        Reader {
            path,
            folder: path.parent().unwrap_or(Path::new("")),
            records: Vec::new(),
            damaged: Vec::new(),
        }
    }

    fn json_lines(&mut self, bytes: &[u8]) {
        for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
            if line.trim_ascii().is_empty() {
                continue;
            }
            let value = serde_json::from_slice(line).map_err(|error| format!("is not JSON: {error}"));
            let outcome = value.and_then(|value| self.record_of_json(&value));
            self.add(&format!("line {}", index + 1), outcome);
        }
    }

    fn json(&mut self, bytes: &[u8]) -> Result<()> {
        let values: Vec<Value> = serde_json::from_slice(bytes)
            .map_err(|error| Error::file(self.path, format!("is not a list of JSON objects: {error}")))?;
        for (index, value) in values.iter().enumerate() {
            let outcome = self.record_of_json(value);
            self.add(&format!("entry {}", index + 1), outcome);
        }
        Ok(())
    }

    fn csv(&mut self, bytes: &[u8]) -> Result<()> {
        let path = self.path;
        let refuse = |error: csv::Error| Error::file(path, format!("is not CSV: {error}"));
        let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(bytes);
        let header = reader.headers().map_err(refuse)?.clone();
        let column = |name: &str| header.iter().position(|found| found.trim() == name);
        let one_of = |names: [&str; 2]| {
            let found = names.iter().find_map(|name| column(name));
            found.ok_or_else(|| {
                let columns: Vec<_> = header.iter().collect();
                let reason = format!(
                    "has no column `{}`; its columns are {}",
                    names.join("` or `"),
                    columns.join(", ")
                );
                Error::file(path, reason)
            })
        };
        let (image, caption, seed) = (one_of(IMAGE)?, one_of(CAPTION)?, column(SEED));
        let mut row = csv::ByteRecord::new();
        while reader.read_byte_record(&mut row).map_err(refuse)? {
            let place = format!("line {}", row.position().map_or(0, csv::Position::line));
            let text = |column: Option<usize>| {
                let bytes = column.and_then(|column| row.get(column));
                bytes
                    .map(std::str::from_utf8)
                    .transpose()
                    .map_err(|_| "is not UTF-8".to_owned())
            };
            let fields = || {
                self.record(Row {
                    image: text(Some(image))?,
                    caption: text(Some(caption))?,
                    seed: text(seed)?,
                })
            };
            let outcome = fields();
            self.add(&place, outcome);
        }
        Ok(())
    }

    fn record_of_json(&self, value: &Value) -> std::result::Result<Record, String> {
        let first_of = |names: &[&str]| {
            names
                .iter()
                .find_map(|name| value.get(name))
                .filter(|value| !value.is_null())
        };
        let text = |names: &[&str]| match first_of(names) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str())),
            Some(other) => Err(format!("says {} = {other}, expected a text", names.join(" or "))),
        };
        let seed = first_of(&[SEED]).map(|seed| match seed {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        });
        self.record(Row {
            image: text(&IMAGE)?,
            caption: text(&CAPTION)?,
            seed: seed.as_deref(),
        })
    }

    fn record(&self, row: Row<'_>) -> std::result::Result<Record, String> {
        let missing = |names: [&str; 2]| format!("has no {}", names.join(" or "));
        let image = row.image.map(str::trim).filter(|name| !name.is_empty());
        let image = image.ok_or_else(|| missing(IMAGE))?;
        let seed = row.seed.map(str::trim).filter(|seed| !seed.is_empty());
        Ok(Record {
            name: image.into(),
            path: self.folder.join(image),
            caption: row.caption.ok_or_else(|| missing(CAPTION))?.into(),
            seed: seed.map(parse_seed).transpose()?,
        })
    }

    fn add(&mut self, place: &str, outcome: std::result::Result<Record, String>) {
        match outcome {
            Ok(record) => self.records.push(record),
            Err(reason) => self.damaged.push(Damage {
                what: format!("{}, {place}", self.path.display()),
                reason,
            }),
        }
    }
}

/// A seed; tables with gaps are often saved with whole numbers as `123.0`, and PyTorch takes negative ones modulo 2⁶⁴.
fn parse_seed(text: &str) -> std::result::Result<u64, String> {
    let digits = text.strip_suffix(".0").unwrap_or(text);
    let unsigned = digits.parse::<u64>().ok();
    let seed = unsigned.or_else(|| digits.parse::<i64>().ok().map(|seed| seed as u64));
    seed.ok_or_else(|| format!("says seed = {text}, expected a whole number of 64 bits"))
}
