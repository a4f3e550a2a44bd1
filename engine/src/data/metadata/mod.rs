//! What is in a data set: `metadata.jsonl`, `metadata.json` (a list of objects) or `metadata.csv` (with a header) in its folder.
//!
//! | column | meaning |
//! | --- | --- |
//! | `image` or `file_name` | the picture, relative to the metadata's folder |
//! | `prompt` or `text` | its caption; may be empty |
//! | `seed` | optional: the seed of its noise |
//!
//! A folder that was drawn (`synthesis.json` is in it) has its list as a table too; then the list counts.
//!
//! Other columns are ignored. A line that cannot be used is damaged, like a picture that cannot be decoded.

mod csv;
mod json;

use std::path::{Path, PathBuf};

use super::damage::Damage;
use crate::error::{Error, Result};
use crate::files;
use crate::limits::{Budget, Entries};

/// The names that a folder's metadata may have.
const FILES: [&str; 3] = ["metadata.jsonl", "metadata.json", "metadata.csv"];

/// The names of the picture's column and of the caption's, the first that is there being used.
const IMAGE: [&str; 2] = ["image", "file_name"];
const CAPTION: [&str; 2] = ["prompt", "text"];
const SEED: &str = "seed";

/// What a folder holds whose pictures were drawn, the table being made of the list.
const DRAWN: &str = "synthesis.json";

/// Damaged lines after which a file is taken for one of another kind.
const MOST_DAMAGED: usize = 100_000;

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
    /// The pictures that such lines name all the same.
    pub(super) named_by_damaged: Vec<PathBuf>,
}

impl Metadata {
    /// Reads the metadata of a folder, or a metadata file itself.
    ///
    /// # Errors
    /// When there is none or more than one, or no picture or caption is in it at all.
    pub fn read(path: &Path) -> Result<Self> {
        let path = find(path)?;
        let bytes = files::read(&path, Budget::METADATA)?;
        let bytes = files::without_mark(bytes).map_err(|reason| Error::file(&path, reason))?;
        let mut reader = Reader::new(&path);
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("jsonl") => json::read_lines(&mut reader, &bytes)?,
            Some("json") => json::read_list(&mut reader, &bytes)?,
            Some("csv") => csv::read(&mut reader, &bytes)?,
            _ => return Err(Error::file(path, "metadata is a .jsonl, .json or .csv file")),
        }
        let Reader {
            records,
            damaged,
            named_by_damaged,
            ..
        } = reader;
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
        Ok(Metadata {
            path,
            records,
            damaged,
            named_by_damaged,
        })
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
        .filter(|path| path.exists())
        .collect();
    match &found[..] {
        [one] => Ok(one.clone()),
        [list, table] if path.join(DRAWN).is_file() && list.ends_with(FILES[0]) && table.ends_with(FILES[2]) => {
            Ok(list.clone())
        }
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
    named_by_damaged: Vec<PathBuf>,
}

/// The three columns of a row, as text.
#[derive(Clone, Copy, Default)]
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
            named_by_damaged: Vec::new(),
        }
    }

    /// Adds what a row says. `place` is where it stands.
    fn add_row(&mut self, place: impl Fn() -> String, row: Row<'_>) -> Result<()> {
        match self.record(row) {
            Ok(record) => self.records.push(record),
            Err(reason) => return self.add_damaged(place(), reason, row.image),
        }
        match self.records.len() as u64 > Entries::MOST {
            true => Err(Error::file(
                self.path,
                format!(
                    "lists more than {} pictures, the most that a data set may have",
                    Entries::MOST
                ),
            )),
            false => Ok(()),
        }
    }

    /// Adds a row that cannot be used, which may name a picture.
    fn add_damaged(&mut self, place: String, reason: String, image: Option<&str>) -> Result<()> {
        self.named_by_damaged
            .extend(image.map(|image| self.folder.join(image.trim())));
        self.damaged.push(Damage {
            what: format!("{}, {place}", self.path.display()),
            reason,
        });
        if self.damaged.len() <= MOST_DAMAGED {
            return Ok(());
        }
        let first = &self.damaged[0];
        Err(Error::file(
            self.path,
            format!("holds more than {MOST_DAMAGED} lines that cannot be used; the first of them: {first}"),
        ))
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
}

/// A seed; tables with gaps are often saved with whole numbers as `123.0`, and PyTorch takes negative ones modulo 2⁶⁴.
fn parse_seed(text: &str) -> std::result::Result<u64, String> {
    let digits = text.strip_suffix(".0").unwrap_or(text);
    let unsigned = digits.parse::<u64>().ok();
    let seed = unsigned.or_else(|| digits.parse::<i64>().ok().map(|seed| seed as u64));
    seed.ok_or_else(|| {
        let text = crate::shown_name(text);
        format!("says seed = {text}, expected a whole number of 64 bits")
    })
}
