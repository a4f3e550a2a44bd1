//! What to draw: one job per picture.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, bail};
use l2p_engine::dist::World;
use l2p_engine::image_io::{self, ImageFormat};
use l2p_engine::limits::Pictures;
use l2p_engine::printable;
use serde::Deserialize;

use super::arguments::Arguments;
use super::sets::{self, Set};
use crate::prompts;

/// Characters of a prompt that fit beside a progress bar.
const TITLE_LENGTH: usize = 32;

/// One picture.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Job {
    /// What to draw.
    pub prompt: String,
    /// What to move away from.
    pub negative: String,
    /// Seed of the noise.
    pub seed: u64,
    /// Where it goes.
    pub out: PathBuf,
    /// Whether that name was made up here, so that no file of that name is meant to be replaced.
    pub numbered: bool,
}

/// One line of a prompt file.
#[derive(Deserialize, Clone, Debug, Default)]
#[serde(deny_unknown_fields)]
struct Line {
    prompt: String,
    negative: Option<String>,
    seed: Option<u64>,
    out: Option<PathBuf>,
}

impl Line {
    /// A prompt and nothing more.
    fn of(prompt: String) -> Self {
        Line {
            prompt,
            ..Line::default()
        }
    }
}

/// A prompt's beginning, on one line, without what would move a terminal's cursor.
pub fn title(prompt: &str) -> String {
    let line = printable(prompt);
    match line.char_indices().nth(TITLE_LENGTH) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.into_owned(),
    }
}

/// What a picture says of the model that drew it, for `--like` to find it again. A whole path says how a machine is laid out and
/// who uses it, so that of one only the name is published.
pub fn published(model: &Path) -> String {
    match (model.is_absolute(), model.file_name()) {
        (true, Some(name)) => Path::new(name).display().to_string(),
        _ => model.display().to_string(),
    }
}

/// The jobs that the arguments ask for: every prompt, `count` times, each with a seed of its own; those of a set where there is one. The
/// first of the ranks looks for what others the names go on behind.
pub fn jobs(arguments: &Arguments, set: Option<&Set>, world: &World) -> anyhow::Result<Vec<Job>> {
    if let Some(set) = set {
        return jobs_of_set(arguments, set);
    }
    let lines = match (&arguments.prompts, &arguments.prompt) {
        (Some(path), _) => match arguments.layout.map_or(Ok(None), |_| sets::prompts_alone(path))? {
            Some(prompts) => prompts.into_iter().map(Line::of).collect(),
            None => read_lines(path)?,
        },
        (None, Some(prompt)) => vec![Line::of(prompt.clone())],
        (None, None) if arguments.embeds.is_some() => vec![Line::default()],
        (None, None) => bail!("nothing to draw: give --prompt TEXT or --prompts FILE.jsonl"),
    };
    let copies = arguments.count.map_or(1, Pictures::get);
    let pictures = pictures_of(lines.len(), copies)?;
    let names = Names::new(&arguments.out, pictures.get())?;
    let first = match arguments.skip_existing {
        true => 1,
        false => world.first_decides("first number", || names.first_free().map_err(crate::as_engine))?,
    };
    let negative = arguments.negative.clone().unwrap_or_default();
    let mut jobs = Vec::with_capacity(pictures.get());
    for line in lines {
        for copy in 0..copies {
            let seed = match line.seed {
                Some(seed) => seed.wrapping_add(copy as u64),
                None => arguments.seed.unwrap_or(0).wrapping_add(jobs.len() as u64),
            };
            let out = match &line.out {
                Some(name) => names.named(name, copy, copies),
                None => names.numbered(first + jobs.len(), seed),
            };
            let negative = line.negative.clone().unwrap_or_else(|| negative.clone());
            jobs.push(Job {
                prompt: line.prompt.clone(),
                negative,
                seed,
                out,
                numbered: line.out.is_none() && !matches!(names, Names::One(_)) && !arguments.skip_existing,
            });
        }
    }
    Ok(jobs)
}

/// Of a set every picture has its place, and the first one's seed is what the next ones' follow.
fn jobs_of_set(arguments: &Arguments, set: &Set) -> anyhow::Result<Vec<Job>> {
    let negative = arguments.negative.clone().unwrap_or_default();
    let copies = set.entries.first().map_or(1, |entry| entry.pictures.len());
    let mut jobs = Vec::with_capacity(pictures_of(set.entries.len(), copies)?.get());
    for entry in &set.entries {
        for picture in &entry.pictures {
            jobs.push(Job {
                prompt: entry.prompt.clone(),
                negative: negative.clone(),
                seed: arguments.seed.unwrap_or(0).wrapping_add(jobs.len() as u64),
                out: set.folder.join(picture),
                numbered: false,
            });
        }
    }
    Ok(jobs)
}

fn pictures_of(prompts: usize, copies: usize) -> anyhow::Result<Pictures> {
    Pictures::new(prompts.saturating_mul(copies) as u64).with_context(|| {
        format!(
            "{} with {copies} each (--count) are more pictures than the {} that one run draws",
            super::count(prompts, "prompt"),
            Pictures::MOST
        )
    })
}

fn read_lines(path: &Path) -> anyhow::Result<Vec<Line>> {
    let lines = prompts::read::<Line>(path)?.into_iter().map(|line| {
        let out = line.content.out.as_deref();
        match out.filter(|out| !stays_within(out)) {
            None => Ok(line.content),
            Some(out) => bail!(
                "{}, line {}: \"out\" is {}, which is no name of a file within --out",
                path.display(),
                line.number,
                out.display()
            ),
        }
    });
    lines.collect()
}

/// Whether a name, taken as within a folder, is: a list of prompts from elsewhere must not write where it likes.
fn stays_within(name: &Path) -> bool {
    let sound = |component: Component<'_>| matches!(component, Component::Normal(_) | Component::CurDir);
    name.components().all(sound) && name.file_name().is_some()
}

/// How pictures are named.
enum Names {
    /// The only picture.
    One(PathBuf),
    /// `folder/stem-0001.extension`
    Numbered {
        folder: PathBuf,
        stem: OsString,
        extension: OsString,
    },
    /// `folder/0001-seed.png`
    Folder { folder: PathBuf },
}

/// Numbers of names have at least so many digits.
const DIGITS: usize = 4;

impl Names {
    fn new(out: &Path, pictures: usize) -> anyhow::Result<Self> {
        if out.is_dir() || out.extension().is_none() || ends_with_separator(out) {
            return Ok(Names::Folder { folder: out.into() });
        }
        let extension = out.extension().unwrap_or_default();
        if extension.as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            bail!(
                "{}: pictures are written as .png, .jpg, .jpeg or .webp; end the name of a folder with /",
                out.display()
            );
        }
        ImageFormat::of(out)?;
        if pictures == 1 {
            return Ok(Names::One(out.into()));
        }
        Ok(Names::Numbered {
            folder: out.parent().unwrap_or(Path::new("")).into(),
            stem: out.file_stem().unwrap_or_default().into(),
            extension: extension.into(),
        })
    }

    /// The number behind the largest of the names that are there.
    fn first_free(&self) -> anyhow::Result<usize> {
        match self {
            Names::One(_) => Ok(1),
            Names::Numbered {
                folder,
                stem,
                extension,
            } => {
                let start = format!("{}-", stem.to_string_lossy());
                let end = format!(".{}", extension.to_string_lossy());
                first_free(folder, |name| name.strip_prefix(&start)?.strip_suffix(&end))
            }
            Names::Folder { folder } => first_free(folder, |name| {
                let (number, _) = name.split_once('-')?;
                Some(number)
            }),
        }
    }

    fn numbered(&self, number: usize, seed: u64) -> PathBuf {
        match self {
            Names::One(path) => path.clone(),
            Names::Numbered {
                folder,
                stem,
                extension,
            } => {
                // Not by way of text, for a name need not be any.
                let mut name = stem.clone();
                name.push(format!("-{number:0DIGITS$}."));
                name.push(extension);
                folder.join(name)
            }
            Names::Folder { folder } => folder.join(format!("{number:0DIGITS$}-{seed}.png")),
        }
    }

    /// A name given in the prompt file, in the folder of the others.
    fn named(&self, name: &Path, copy: usize, copies: usize) -> PathBuf {
        let folder = match self {
            Names::One(path) => path.parent().unwrap_or(Path::new("")),
            Names::Numbered { folder, .. } | Names::Folder { folder } => folder,
        };
        let mut name = name.to_path_buf();
        if copies > 1 {
            let extension = name
                .extension()
                .map(|extension| format!(".{}", extension.to_string_lossy()));
            let stem = name.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            name.set_file_name(format!("{stem}-{}{}", copy + 1, extension.unwrap_or_default()));
        }
        folder.join(name)
    }
}

/// Whether a path is written as a folder's.
pub fn ends_with_separator(path: &Path) -> bool {
    let last = path.as_os_str().as_encoded_bytes().last();
    last.is_some_and(|byte| std::path::is_separator(char::from(*byte)))
}

/// The number behind the largest that names in `folder` hold, so that no picture of an earlier run is overwritten. `number_in`
/// finds the number's digits in a name.
fn first_free(folder: &Path, number_in: impl Fn(&str) -> Option<&str>) -> anyhow::Result<usize> {
    let folder = match folder.as_os_str().is_empty() {
        true => Path::new("."),
        false => folder,
    };
    if !folder.is_dir() {
        // What is wrong with it, if anything, shows when it is made.
        return Ok(1);
    }
    let entries = folder
        .read_dir()
        .with_context(|| format!("cannot look into {}", folder.display()))?;
    let numbers = entries.flatten().filter_map(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let digits = number_in(&name)?;
        let sound = digits.len() >= DIGITS && digits.bytes().all(|byte| byte.is_ascii_digit());
        digits.parse::<u32>().ok().filter(|_| sound)
    });
    Ok(numbers.max().map_or(1, |number| number as usize + 1))
}

/// Checks before the work begins that every picture can be written, and makes the folders they go to.
pub fn ensure_writable(jobs: &[Job], [width, height]: [usize; 2]) -> anyhow::Result<()> {
    let mut names = BTreeSet::new();
    for job in jobs {
        ImageFormat::of(&job.out)?;
        // `./name` and `name` are one file.
        if !names.insert(Path::new(".").join(&job.out)) {
            bail!("two pictures would be written to {}", job.out.display());
        }
    }
    let folders: BTreeSet<&Path> = jobs.iter().filter_map(|job| job.out.parent()).collect();
    for folder in folders.into_iter().filter(|folder| !folder.as_os_str().is_empty()) {
        if folder.exists() && !folder.is_dir() {
            bail!("{}: is a file, expected a folder for the pictures", folder.display());
        }
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    }
    jobs.iter()
        .try_for_each(|job| image_io::ensure_writable(&job.out, width, height))
        .map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn jobs_of(arguments: &[&str]) -> anyhow::Result<Vec<Job>> {
        jobs(
            &Arguments::parse_from([&["l2p-sample"], arguments].concat()),
            None,
            &World::solo(),
        )
    }

    #[test]
    fn every_picture_has_its_own_seed_and_name() {
        let jobs = jobs_of(&[
            "--prompt",
            "a fox",
            "--count",
            "3",
            "--seed",
            "7",
            "--out",
            "dir/fox.jpg",
        ])
        .unwrap();
        assert_eq!(jobs.iter().map(|job| job.seed).collect::<Vec<_>>(), [7, 8, 9]);
        assert_eq!(jobs[2].out, Path::new("dir/fox-0003.jpg"));
        let one = jobs_of(&["--prompt", "a fox", "--out", "fox.webp"]).unwrap();
        assert_eq!(one[0].out, Path::new("fox.webp"));
        assert_eq!(
            jobs_of(&["--prompt", "a fox", "--out", "folder"]).unwrap()[0].out,
            Path::new("folder/0001-0.png")
        );
    }

    #[test]
    fn unknown_formats_and_missing_prompts_are_named() {
        assert!(
            jobs_of(&["--prompt", "a", "--out", "x.gif"])
                .unwrap_err()
                .to_string()
                .contains("x.gif")
        );
        assert!(jobs_of(&[]).unwrap_err().to_string().contains("--prompt"));
    }

    #[test]
    fn numbers_go_on_behind_those_that_are_there() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "0007-3.png",
            "0012-4.png",
            "9-1.png",
            "99999999999-1.png",
            "0100x-1.png",
            "fox-0031.jpg",
        ] {
            std::fs::write(folder.path().join(name), "mine").unwrap();
        }
        let names = |out: &Path, count: &str| -> Vec<String> {
            let jobs = jobs_of(&["--prompt", "a", "--count", count, "--out", &out.display().to_string()]).unwrap();
            let names = jobs
                .iter()
                .map(|job| job.out.file_name().unwrap().display().to_string());
            names.collect()
        };
        assert_eq!(names(folder.path(), "2"), ["0013-0.png", "0014-1.png"]);
        let out = folder.path().display().to_string();
        let again = jobs_of(&["--prompt", "a", "--skip-existing", "--out", &out]).unwrap();
        assert_eq!(again[0].out, folder.path().join("0001-0.png"));
        assert!(!again[0].numbered);
        assert_eq!(
            names(&folder.path().join("fox.jpg"), "2"),
            ["fox-0032.jpg", "fox-0033.jpg"]
        );
        assert_eq!(
            names(&folder.path().join("frog.jpg"), "2"),
            ["frog-0001.jpg", "frog-0002.jpg"]
        );
    }

    #[test]
    fn a_name_with_a_dot_can_be_a_folders() {
        let one = jobs_of(&["--prompt", "a fox", "--out", "v1.6/"]).unwrap();
        assert_eq!(one[0].out, Path::new("v1.6/0001-0.png"));
        let message = jobs_of(&["--prompt", "a fox", "--out", "v1.6"])
            .unwrap_err()
            .to_string();
        assert!(message.contains("end the name of a folder with /"), "{message}");
    }

    #[test]
    fn names_of_a_list_stay_within_the_folder() {
        for good in ["a.png", "b/a.png", "./a.png"] {
            assert!(stays_within(Path::new(good)), "{good}");
        }
        for bad in ["../a.png", "b/../../a.png", "/a.png", "..", "", "."] {
            assert!(!stays_within(Path::new(bad)), "{bad}");
        }
    }

    #[test]
    fn of_whole_paths_the_name_is_published() {
        assert_eq!(published(Path::new("models/demo/pixel")), "models/demo/pixel");
        if cfg!(unix) {
            assert_eq!(published(Path::new("/home/jane/models/pixel/")), "pixel");
            assert_eq!(published(Path::new("/")), "/");
        }
    }

    #[test]
    fn long_prompts_are_cut_between_characters() {
        assert_eq!(title(&"字".repeat(40)).chars().count(), TITLE_LENGTH + 1);
        assert_eq!(title("two\nlines"), "two lines");
        assert_eq!(title("\x1b[2J\u{202e}"), "\\u{1b}[2J\\u{202e}");
    }
}
