//! What to draw: one job per picture.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use l2p_engine::flow::noise_source::NoiseSource;
use l2p_engine::image_io::{self, ImageFormat};
use l2p_engine::pipeline::Settings;
use serde::Deserialize;

use super::arguments::Arguments;

/// Characters of a prompt that fit beside a progress bar.
const TITLE_LENGTH: usize = 32;

/// More pictures than this are taken for a slip.
const MOST_PICTURES: usize = 1_000_000;

/// One picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// What to draw.
    pub prompt: String,
    /// What to move away from.
    pub negative: String,
    /// Seed of the noise.
    pub seed: u64,
    /// Where it goes.
    pub out: PathBuf,
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

impl Job {
    /// What is written into the picture.
    pub fn settings(&self, settings: &Settings, model: &str, rng: NoiseSource) -> image_io::Settings {
        image_io::Settings {
            prompt: self.prompt.clone(),
            negative: self.negative.clone(),
            seed: self.seed,
            steps: settings.steps,
            cfg: settings.cfg,
            shift: settings.shift,
            width: settings.width,
            height: settings.height,
            model: model.into(),
            rng: rng.to_string(),
        }
    }
}

/// A prompt's beginning, on one line.
pub fn title(prompt: &str) -> String {
    let line = prompt.replace(char::is_control, " ");
    match line.char_indices().nth(TITLE_LENGTH) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// The jobs that the arguments ask for: every prompt, `count` times, each with a seed of its own.
pub fn jobs(arguments: &Arguments) -> anyhow::Result<Vec<Job>> {
    let lines = match (&arguments.prompts, &arguments.prompt) {
        (Some(path), _) => read_lines(path)?,
        (None, Some(prompt)) => vec![Line {
            prompt: prompt.clone(),
            ..Line::default()
        }],
        (None, None) if arguments.embeds.is_some() => vec![Line::default()],
        (None, None) => bail!("nothing to draw: give --prompt TEXT or --prompts FILE.jsonl"),
    };
    let pictures = lines
        .len()
        .checked_mul(arguments.count)
        .filter(|pictures| *pictures <= MOST_PICTURES)
        .with_context(|| {
            format!(
                "{} with {} each are more pictures than the {MOST_PICTURES} that one run draws",
                super::count(lines.len(), "prompt"),
                arguments.count
            )
        })?;
    let names = Names::new(&arguments.out, pictures)?;
    let negative = arguments.negative.clone().unwrap_or_default();
    let mut jobs = Vec::with_capacity(pictures);
    for line in lines {
        for copy in 0..arguments.count {
            let seed = match line.seed {
                Some(seed) => seed.wrapping_add(copy as u64),
                None => arguments.seed.unwrap_or(0).wrapping_add(jobs.len() as u64),
            };
            let out = match &line.out {
                Some(name) => names.named(name, copy, arguments.count),
                None => names.numbered(jobs.len(), seed),
            };
            let negative = line.negative.clone().unwrap_or_else(|| negative.clone());
            jobs.push(Job {
                prompt: line.prompt.clone(),
                negative,
                seed,
                out,
            });
        }
    }
    Ok(jobs)
}

fn read_lines(path: &Path) -> anyhow::Result<Vec<Line>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    // Editors on Windows begin a file with a byte order mark.
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let lines: Vec<Line> = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(index, line)| {
            serde_json::from_str(line).with_context(|| {
                format!(
                    "{}, line {}: expected {{\"prompt\": \"...\"}}",
                    path.display(),
                    index + 1
                )
            })
        })
        .collect::<anyhow::Result<_>>()?;
    if lines.is_empty() {
        bail!(
            "{}: holds no prompts; write one JSON object per line, {{\"prompt\": \"...\"}}",
            path.display()
        );
    }
    Ok(lines)
}

/// How pictures are named.
enum Names {
    /// The only picture.
    One(PathBuf),
    /// `folder/stem-0001.extension`
    Numbered {
        folder: PathBuf,
        stem: String,
        extension: String,
    },
    /// `folder/0001-seed.png`
    Folder(PathBuf),
}

impl Names {
    fn new(out: &Path, pictures: usize) -> anyhow::Result<Self> {
        let looks_like_folder = out.is_dir() || out.extension().is_none();
        if looks_like_folder {
            return Ok(Names::Folder(out.into()));
        }
        ImageFormat::of(out)?;
        if pictures == 1 {
            return Ok(Names::One(out.into()));
        }
        let text = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
        Ok(Names::Numbered {
            folder: out.parent().unwrap_or(Path::new("")).into(),
            stem: text(out.file_stem()),
            extension: text(out.extension()),
        })
    }

    fn numbered(&self, index: usize, seed: u64) -> PathBuf {
        match self {
            Names::One(path) => path.clone(),
            Names::Numbered {
                folder,
                stem,
                extension,
            } => folder.join(format!("{stem}-{:04}.{extension}", index + 1)),
            Names::Folder(folder) => folder.join(format!("{:04}-{seed}.png", index + 1)),
        }
    }

    /// A name given in the prompt file, in the folder of the others.
    fn named(&self, name: &Path, copy: usize, copies: usize) -> PathBuf {
        let folder = match self {
            Names::One(path) => path.parent().unwrap_or(Path::new("")),
            Names::Numbered { folder, .. } | Names::Folder(folder) => folder,
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

/// Checks before the work begins that every picture can be written, and makes the folders they go to.
pub fn expect_writable(jobs: &[Job], settings: &Settings) -> anyhow::Result<()> {
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
        .try_for_each(|job| image_io::expect_writable(&job.out, settings.width, settings.height))
        .map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn jobs_of(arguments: &[&str]) -> anyhow::Result<Vec<Job>> {
        jobs(&Arguments::parse_from([&["l2p-sample"], arguments].concat()))
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
        let many = jobs_of(&["--prompt", "a", "--count", "18446744073709551615"]);
        assert!(
            many.unwrap_err()
                .to_string()
                .contains("1 prompt with 18446744073709551615")
        );
    }

    #[test]
    fn long_prompts_are_cut_between_characters() {
        assert_eq!(title(&"字".repeat(40)).chars().count(), TITLE_LENGTH + 1);
        assert_eq!(title("two\nlines"), "two lines");
    }
}
