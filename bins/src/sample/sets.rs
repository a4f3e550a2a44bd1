//! The sets of prompts that scorers come with, and the folders that they read.
//!
//! | set | `--prompts` | what is written to `--out` |
//! | --- | --- | --- |
//! | GenEval | `evaluation_metadata.jsonl`: a line a prompt, with `tag`, `include` and `prompt` | `NNNNN/metadata.jsonl`, the line; `NNNNN/samples/0000.png` … |
//! | DPG-Bench | a folder of text files | `NAME.png`: four pictures in a grid, named as the file |
//! | a folder of captions | the same | `NAME.png`: one picture, named as the file |
//!
//! Their scorers take whatever else lies in the folder for a picture, or pass over it: the single pictures of grids lie in a folder beside.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, bail};
use clap::ValueEnum;
use l2p_engine::limits::{Budget, Pictures};
use l2p_engine::{files, shown_name};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::prompts;

/// How prompts are listed, and how their pictures are laid out.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// A file of JSON lines of this program's own; of a GenEval file the prompts alone
    Plain,
    /// GenEval's evaluation_metadata.jsonl: NNNNN/metadata.jsonl and NNNNN/samples/0000.png …, four per prompt
    Geneval,
    /// DPG-Bench's folder of prompts: a 2x2 grid of four pictures per file, under the file's name
    Dpg,
    /// A folder of captions, such as UltraHR-eval4k: a picture per file, under the file's name
    Flat,
}

/// Pictures of a grid, of two rows.
pub const CELLS: usize = 4;

/// The least digits of GenEval's folders and of the pictures in them.
const FOLDER_DIGITS: usize = 5;
const PICTURE_DIGITS: usize = 4;

/// What the names of DPG-Bench's files begin with, before a number: the collections that its prompts come from.
const DPG_COLLECTIONS: [&str; 11] = [
    "COCOval2014",
    "countbench",
    "diffusiondb",
    "drawtext",
    "localized",
    "midjourney",
    "partiprompts",
    "posescript",
    "stanford",
    "vrd",
    "whoops",
];

impl Layout {
    /// Its name as a flag gives it.
    pub fn name(self) -> &'static str {
        match self {
            Layout::Plain => "plain",
            Layout::Geneval => "geneval",
            Layout::Dpg => "dpg",
            Layout::Flat => "flat",
        }
    }

    /// What it is for, in words.
    fn what(self) -> &'static str {
        match self {
            Layout::Plain => "a file of prompts, one JSON object per line",
            Layout::Geneval => "GenEval's evaluation_metadata.jsonl",
            Layout::Dpg => "DPG-Bench's folder of prompts",
            Layout::Flat => "a folder of captions",
        }
    }

    /// The layout that these prompts are for: what they are, or what was asked for where that can be.
    ///
    /// # Errors
    /// When it cannot be, naming both; when they cannot be looked at.
    pub fn of(path: &Path, asked: Option<Layout>) -> anyhow::Result<Layout> {
        let found = recognised(path)?;
        let Some(asked) = asked else { return Ok(found) };
        match (asked, found) {
            _ if asked == found => Ok(asked),
            // Both are folders of captions: who says which knows better than a look at the names.
            (Layout::Dpg | Layout::Flat, Layout::Dpg | Layout::Flat) => Ok(asked),
            (Layout::Plain, Layout::Geneval) => Ok(asked),
            _ => bail!(
                "{}: is {}, but --layout {} is for {}: give --layout {}, or leave it away",
                path.display(),
                found.what(),
                asked.name(),
                asked.what(),
                found.name()
            ),
        }
    }

    /// Pictures per prompt.
    ///
    /// # Errors
    /// When another number was asked for than the layout has.
    fn per_prompt(self, asked: Option<Pictures>) -> anyhow::Result<usize> {
        let fixed = match self {
            Layout::Plain | Layout::Geneval => None,
            Layout::Dpg => Some(CELLS),
            Layout::Flat => Some(1),
        };
        match (asked.map(Pictures::get), fixed) {
            (Some(asked), Some(fixed)) if asked != fixed => bail!(
                "--count {asked}: {} takes {fixed} per prompt; leave --count away",
                self.what()
            ),
            (Some(asked), _) => Ok(asked),
            (None, Some(fixed)) => Ok(fixed),
            (None, None) => Ok(if self == Layout::Geneval { CELLS } else { 1 }),
        }
    }
}

/// What the prompts at `path` are.
fn recognised(path: &Path) -> anyhow::Result<Layout> {
    if path.is_dir() {
        let captions = caption_files(path)?;
        return Ok(match is_dpg(path, captions.keys()) {
            true => Layout::Dpg,
            false => Layout::Flat,
        });
    }
    let text = files::read_text(path, Budget::METADATA)?;
    let first = text.lines().find(|line| !line.trim().is_empty());
    let is_geneval = first.is_some_and(|line| {
        let object = serde_json::from_str::<BTreeMap<String, serde::de::IgnoredAny>>(line);
        object.is_ok_and(|object| object.contains_key("tag") && object.contains_key("include"))
    });
    Ok(if is_geneval { Layout::Geneval } else { Layout::Plain })
}

/// Whether a folder of text files is DPG-Bench's: by the table of questions beside it, or by its files' names.
fn is_dpg<'a>(folder: &Path, mut names: impl Iterator<Item = &'a String>) -> bool {
    let beside = folder.canonicalize().ok();
    let table = beside
        .as_deref()
        .and_then(Path::parent)
        .is_some_and(|parent| parent.join("dpg_bench.csv").is_file());
    table
        || names.any(|name| {
            DPG_COLLECTIONS.iter().any(|collection| {
                let number = name.strip_prefix(collection);
                number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
            })
        })
}

/// The text files of a folder by their names without extension.
fn caption_files(folder: &Path) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let entries = folder
        .read_dir()
        .with_context(|| format!("cannot look into {}", folder.display()))?;
    let mut found = BTreeMap::new();
    for entry in entries {
        let path = entry
            .with_context(|| format!("cannot look into {}", folder.display()))?
            .path();
        let is_text = path
            .extension()
            .is_some_and(|extension| extension.eq_ignore_ascii_case("txt"));
        let Some(stem) = path.file_stem().filter(|_| is_text) else {
            continue;
        };
        let Some(stem) = stem.to_str() else {
            bail!(
                "{}: its name is not UTF-8, so that no picture can be named as it",
                path.display()
            );
        };
        // Leftovers of other systems.
        if stem.starts_with('.') {
            continue;
        }
        if let Some(other) = found.insert(stem.to_owned(), path.clone()) {
            bail!(
                "{} and {} differ in capital letters alone: their pictures would have one name",
                path.display(),
                other.display()
            );
        }
        if found.len() as u64 > Pictures::MOST {
            bail!("{}: holds more than {} captions", folder.display(), Pictures::MOST);
        }
    }
    match found.is_empty() {
        true => bail!(
            "{}: holds no .txt file; a folder of prompts has one prompt per file",
            folder.display()
        ),
        false => Ok(found),
    }
}

/// A prompt of a set.
#[derive(Debug)]
pub struct Entry {
    /// What to draw.
    pub prompt: String,
    /// The pictures' files, relative to the folder that they go to.
    pub pictures: Vec<PathBuf>,
    /// The grid of these, relative to the folder that the scorer reads.
    pub grid: Option<PathBuf>,
    /// A text that the scorer wants beside the pictures.
    pub note: Option<(PathBuf, String)>,
}

/// A set of prompts, and where its pictures go.
#[derive(Debug)]
pub struct Set {
    /// The layout.
    pub layout: Layout,
    /// The folder that the scorer reads.
    pub out: PathBuf,
    /// The folder of single pictures, and of what is noted about all of them.
    pub folder: PathBuf,
    /// The prompts.
    pub entries: Vec<Entry>,
}

/// A line of GenEval's file, of which only the prompt means something here.
#[derive(Deserialize)]
struct Described {
    prompt: String,
    #[serde(rename = "tag")]
    _tag: String,
    #[serde(rename = "include")]
    _include: Vec<serde::de::IgnoredAny>,
}

impl Set {
    /// The set of prompts at `path`, `count` pictures of each; `None` for a file of prompts that belongs to no scorer.
    ///
    /// # Errors
    /// When they cannot be read, naming the line or file at fault; when `out` cannot be the folder, or the layout has another number of
    /// pictures.
    pub fn open(
        path: &Path,
        asked: Option<Layout>,
        count: Option<Pictures>,
        out: &Path,
    ) -> anyhow::Result<Option<Self>> {
        let layout = Layout::of(path, asked)?;
        if layout == Layout::Plain {
            return Ok(None);
        }
        let copies = layout.per_prompt(count)?;
        let entries = match layout {
            Layout::Geneval => geneval(path, copies)?,
            _ => captions(path, layout)?,
        };
        let folder = folder_of_set(layout, out)?;
        Ok(Some(Set {
            layout,
            out: out.into(),
            folder,
            entries,
        }))
    }

    /// The program that reads the folder, as one runs it next.
    pub fn next_command(&self, side: usize) -> String {
        let out = self.out.display();
        match self.layout {
            Layout::Geneval => {
                format!("python evaluation/evaluate_images.py {out} --outfile results.jsonl --model-path DETECTOR")
            }
            Layout::Dpg => format!(
                "accelerate launch dpg_bench/compute_dpg_bench.py --image-root-path {out} --resolution {side} --pic-num {CELLS} \
                 --res-path results.txt"
            ),
            _ => format!("l2p-data score, with the features that the extractors of docs/evaluation.md make of {out}"),
        }
    }
}

/// The folder of single pictures.
fn folder_of_set(layout: Layout, out: &Path) -> anyhow::Result<PathBuf> {
    if out.extension().is_some() && !out.is_dir() && !super::jobs::ends_with_separator(out) {
        bail!(
            "{}: the pictures of {} go to a folder: name one with --out DIR/",
            out.display(),
            layout.what()
        );
    }
    if layout != Layout::Dpg {
        return Ok(out.into());
    }
    match out.components().next_back() {
        Some(Component::Normal(name)) => {
            let mut cells = name.to_owned();
            cells.push("-cells");
            Ok(out.with_file_name(cells))
        }
        _ => bail!(
            "{}: grids go to a folder with a name of its own: --out DIR",
            out.display()
        ),
    }
}

fn geneval(path: &Path, copies: usize) -> anyhow::Result<Vec<Entry>> {
    let lines = prompts::read::<Box<RawValue>>(path)?;
    let entry = |(number, line): (usize, prompts::Line<Box<RawValue>>)| {
        let text = line.content.get();
        let described: Described = serde_json::from_str(text).map_err(|error| {
            let reason = shown_name(&error.to_string()).into_owned();
            anyhow::anyhow!(
                "{}, line {}: expected {{\"tag\": \"...\", \"include\": [...], \"prompt\": \"...\"}}: {reason}",
                path.display(),
                line.number
            )
        })?;
        ensure_prompt(&described.prompt, || {
            format!("{}, line {}", path.display(), line.number)
        })?;
        let folder = PathBuf::from(format!("{number:0FOLDER_DIGITS$}"));
        let picture = |copy: usize| folder.join("samples").join(format!("{copy:0PICTURE_DIGITS$}.png"));
        Ok(Entry {
            prompt: described.prompt,
            pictures: (0..copies).map(picture).collect(),
            grid: None,
            note: Some((folder.join("metadata.jsonl"), format!("{text}\n"))),
        })
    };
    lines.into_iter().enumerate().map(entry).collect()
}

/// The prompts of GenEval's file, to be drawn as others are; `None` of another file.
///
/// # Errors
/// As [`Set::open`].
pub fn prompts_alone(path: &Path) -> anyhow::Result<Option<Vec<String>>> {
    match recognised(path)? {
        Layout::Geneval => Ok(Some(geneval(path, 1)?.into_iter().map(|entry| entry.prompt).collect())),
        _ => Ok(None),
    }
}

fn captions(folder: &Path, layout: Layout) -> anyhow::Result<Vec<Entry>> {
    let entry = |(name, path): (String, PathBuf)| {
        let text = files::read_text(&path, Budget::CAPTION)?;
        let prompt = text.trim().to_owned();
        ensure_prompt(&prompt, || path.display().to_string())?;
        let named = |name: &str| PathBuf::from(format!("{name}.png"));
        let (pictures, grid) = match layout {
            Layout::Dpg => {
                let cells = (1..=CELLS).map(|cell| named(&format!("{name}-{cell}")));
                (cells.collect(), Some(named(&name)))
            }
            _ => (vec![named(&name)], None),
        };
        Ok(Entry {
            prompt,
            pictures,
            grid,
            note: None,
        })
    };
    caption_files(folder)?.into_iter().map(entry).collect()
}

fn ensure_prompt(prompt: &str, place: impl Fn() -> String) -> anyhow::Result<()> {
    match prompt.trim().is_empty() {
        true => bail!("{}: the prompt is empty", place()),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GENEVAL: &str = "{\"tag\": \"single_object\", \"include\": [{\"class\": \"bench\", \"count\": 1}], \"prompt\": \"a photo of a bench\"}\n\n\
                           {\"tag\": \"counting\", \"include\": [{\"class\": \"cow\", \"count\": 2}], \"exclude\": [], \"prompt\": \"two cows\"}\n";

    fn folder_with(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        folder
    }

    #[test]
    fn sets_are_recognised_by_what_they_are() {
        let folder = folder_with(&[
            ("meta.jsonl", GENEVAL),
            ("plain.jsonl", "{\"prompt\": \"a fox\"}\n"),
            ("names/partiprompts12.txt", "a"),
            ("beside/prompts/12.txt", "a"),
            ("beside/dpg_bench.csv", "item_id"),
            ("captions/0001.txt", "a"),
            ("captions/partiprompts.txt", "a"),
        ]);
        let of = |name: &str, asked| Layout::of(&folder.path().join(name), asked);
        for (name, layout) in [
            ("meta.jsonl", Layout::Geneval),
            ("plain.jsonl", Layout::Plain),
            ("names", Layout::Dpg),
            ("beside/prompts", Layout::Dpg),
            ("captions", Layout::Flat),
        ] {
            assert_eq!(of(name, None).unwrap(), layout, "{name}");
            assert_eq!(of(name, Some(layout)).unwrap(), layout, "{name}");
        }
        assert_eq!(of("captions", Some(Layout::Dpg)).unwrap(), Layout::Dpg);
        assert_eq!(of("names", Some(Layout::Flat)).unwrap(), Layout::Flat);
        assert_eq!(of("meta.jsonl", Some(Layout::Plain)).unwrap(), Layout::Plain);
        for (name, asked, words) in [
            (
                "meta.jsonl",
                Layout::Dpg,
                "is GenEval's evaluation_metadata.jsonl, but --layout dpg is for DPG-Bench's",
            ),
            ("meta.jsonl", Layout::Flat, "--layout flat is for a folder of captions"),
            ("plain.jsonl", Layout::Geneval, "is a file of prompts"),
            (
                "captions",
                Layout::Geneval,
                "is a folder of captions, but --layout geneval",
            ),
            ("captions", Layout::Plain, "give --layout flat"),
        ] {
            let message = of(name, Some(asked)).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn pictures_go_where_scorers_look() {
        let folder = folder_with(&[
            ("meta.jsonl", GENEVAL),
            ("dpg/b.2.txt", "two\n"),
            ("dpg/a.txt", " one "),
            ("dpg/x.csv", ""),
        ]);
        let open = |name: &str, layout, out: &str| {
            Set::open(&folder.path().join(name), Some(layout), None, Path::new(out)).map(Option::unwrap)
        };
        let set = open("meta.jsonl", Layout::Geneval, "out").unwrap();
        assert_eq!(set.folder, Path::new("out"));
        assert_eq!(set.entries[1].prompt, "two cows");
        assert_eq!(set.entries[1].pictures[3], Path::new("00001/samples/0003.png"));
        let (path, text) = set.entries[1].note.as_ref().unwrap();
        assert_eq!(
            (path.as_path(), text.as_str()),
            (
                Path::new("00001/metadata.jsonl"),
                &GENEVAL[GENEVAL.find("\n\n").unwrap() + 2..]
            )
        );
        let set = open("dpg", Layout::Dpg, "grids/").unwrap();
        assert_eq!(set.folder, Path::new("grids-cells"));
        assert_eq!(set.entries.len(), 2);
        assert_eq!(
            (set.entries[0].prompt.as_str(), set.entries[0].grid.as_deref()),
            ("one", Some(Path::new("a.png")))
        );
        assert_eq!(set.entries[1].pictures[0], Path::new("b.2-1.png"));
        let set = open("dpg", Layout::Flat, "flat").unwrap();
        assert_eq!(set.entries[1].pictures, [Path::new("b.2.png")]);
        assert!(
            open("dpg", Layout::Flat, "flat.png")
                .unwrap_err()
                .to_string()
                .contains("go to a folder")
        );
        assert!(
            open("dpg", Layout::Dpg, "..")
                .unwrap_err()
                .to_string()
                .contains("a name of its own")
        );
    }

    #[test]
    fn what_no_set_is_is_named() {
        let folder = folder_with(&[
            (
                "broken.jsonl",
                "{\"tag\": \"a\", \"include\": [], \"prompt\": \"x\"}\n{\"tag\": \"a\", \"prompt\": \"x\"}\n",
            ),
            ("empty.jsonl", "{\"tag\": \"a\", \"include\": [], \"prompt\": \" \"}\n"),
            ("none/a.png", ""),
            ("blank/a.txt", " \n"),
            ("twice/a.txt", "a"),
            ("twice/a.TXT", "b"),
        ]);
        for (name, words) in [
            ("broken.jsonl", "line 2: expected {\"tag\""),
            ("empty.jsonl", "line 1: the prompt is empty"),
            ("none", "holds no .txt file"),
            ("blank", "a.txt: the prompt is empty"),
            ("twice", "differ in capital letters alone"),
        ] {
            let message = Set::open(&folder.path().join(name), None, None, Path::new("out"));
            let message = message.unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
        let four = Pictures::new(3);
        let message = Set::open(&folder.path().join("blank"), Some(Layout::Flat), four, Path::new("out"));
        assert!(message.unwrap_err().to_string().contains("takes 1 per prompt"));
    }
}
