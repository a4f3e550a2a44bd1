//! Results that the programs of GenEval and DPG-Bench wrote, tabulated.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::bail;
use l2p_engine::limits::Budget;
use l2p_engine::{files, shown_name};
use serde::Deserialize;

use crate::prompts;

/// What GenEval's `evaluate_images.py` found, summed up as its `summary_scores.py` does.
pub struct Geneval {
    /// Pictures, and how many of them are correct.
    pub pictures: Share,
    /// Prompts, and of how many at least one picture is correct.
    pub prompts: Share,
    /// Pictures by task, in the order of the file.
    pub tasks: Vec<(String, Share)>,
}

/// How many of how many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Those that are.
    pub correct: usize,
    /// All.
    pub all: usize,
}

impl Share {
    /// From 0 to 1.
    pub fn part(self) -> f64 {
        self.correct as f64 / self.all.max(1) as f64
    }

    fn add(&mut self, correct: bool) {
        self.all += 1;
        self.correct += usize::from(correct);
    }
}

impl Geneval {
    /// The score: the mean over tasks.
    pub fn overall(&self) -> f64 {
        self.tasks.iter().map(|(_, share)| share.part()).sum::<f64>() / self.tasks.len().max(1) as f64
    }

    /// Reads `results.jsonl`.
    ///
    /// # Errors
    /// Naming the line that cannot be read.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        #[derive(Deserialize)]
        struct Line {
            filename: String,
            tag: String,
            correct: bool,
            metadata: String,
        }
        let mut found = Geneval {
            pictures: Share::default(),
            prompts: Share::default(),
            tasks: Vec::new(),
        };
        let expected = "{\"filename\": \"...\", \"tag\": \"...\", \"correct\": true, \"metadata\": \"...\", ...} of GenEval's evaluate_images.py";
        let (mut prompts, mut files) = (BTreeMap::new(), BTreeMap::new());
        for line in prompts::read_lines::<Line>(path, "results", expected)? {
            let (number, line) = (line.number, line.content);
            if let Some(first) = files.insert(line.filename.clone(), number) {
                bail!(
                    "{}, line {number}: {} stands in line {first} too; results of two runs make no score",
                    path.display(),
                    shown_name(&line.filename)
                );
            }
            found.pictures.add(line.correct);
            let task = match found.tasks.iter().position(|(tag, _)| *tag == line.tag) {
                Some(task) => task,
                None => {
                    found.tasks.push((line.tag, Share::default()));
                    found.tasks.len() - 1
                }
            };
            found.tasks[task].1.add(line.correct);
            *prompts.entry(line.metadata).or_insert(false) |= line.correct;
        }
        prompts.into_values().for_each(|correct| found.prompts.add(correct));
        Ok(found)
    }
}

/// What DPG-Bench's `compute_dpg_bench.py` found.
pub struct Dpg {
    /// Prompts that were scored.
    pub prompts: usize,
    /// Pictures of each.
    pub per_prompt: usize,
    /// The mean over prompts, from 0 to 100.
    pub score: f64,
    /// Whether the program came to its end, and so says the same.
    pub finished: bool,
    /// Scores of categories, the broad ones and the detailed ones, from 0 to 100.
    pub categories: [Vec<(String, f64)>; 2],
}

impl Dpg {
    /// Reads the file of `--res-path`.
    ///
    /// # Errors
    /// Naming the line that cannot be read; when its own score is not the mean of its lines.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = files::read_text(path, Budget::METADATA)?;
        let mut lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let (mut sum, mut prompts, mut per_prompt) = (0.0, BTreeMap::new(), None);
        let mut summary = None;
        for (index, line) in lines.by_ref() {
            if line.starts_with("Model: ") {
                summary = Some(());
                break;
            }
            let place = || format!("{}, line {}", path.display(), index + 1);
            let (name, scores) = picture_line(line).ok_or_else(|| {
                anyhow::anyhow!(
                    "{}: expected a picture's path and its scores from 0 to 1, separated by commas",
                    place()
                )
            })?;
            let [pictures @ .., mean] = &scores[..] else { continue };
            if (pictures.iter().sum::<f64>() / pictures.len() as f64 - mean).abs() > 1e-9 {
                bail!("{}: its last number is not the mean of its scores", place());
            }
            if *per_prompt.get_or_insert(scores.len() - 1) != scores.len() - 1 {
                bail!(
                    "{}: has scores of {} pictures, the lines before of another number",
                    place(),
                    scores.len() - 1
                );
            }
            if let Some(first) = prompts.insert(name.to_owned(), index + 1) {
                bail!(
                    "{}: {} stands in line {first} too; results of two runs make no score",
                    place(),
                    shown_name(name)
                );
            }
            sum += mean;
        }
        let Some(per_prompt) = per_prompt else {
            bail!(
                "{}: holds no picture's scores; is it the file of --res-path of compute_dpg_bench.py?",
                path.display()
            );
        };
        let mut found = Dpg {
            score: 100.0 * sum / prompts.len() as f64,
            prompts: prompts.len(),
            per_prompt,
            finished: false,
            categories: [Vec::new(), Vec::new()],
        };
        if summary.is_some() {
            found.read_summary(path, lines)?;
        }
        Ok(found)
    }

    fn read_summary<'a>(&mut self, path: &Path, lines: impl Iterator<Item = (usize, &'a str)>) -> anyhow::Result<()> {
        let mut level = None;
        for (index, line) in lines {
            let refused = || {
                anyhow::anyhow!(
                    "{}, line {}: cannot be read as part of the summary",
                    path.display(),
                    index + 1
                )
            };
            match line.trim_end() {
                "L1 category scores:" => level = Some(0),
                "L2 category scores:" => level = Some(1),
                text if text.starts_with("Image path: ") || text.starts_with("Save results to: ") => level = None,
                text => {
                    if let Some(score) = text.strip_prefix("DPG-Bench score: ") {
                        let stated = number(score, 100.0).ok_or_else(refused)?;
                        // Other lines than those that it was the mean of.
                        if (stated - self.score).abs() > 1e-6 * stated.max(1.0) {
                            bail!(
                                "{}, line {}: says {stated}, but the lines of its pictures make {}: some are missing, or of another run",
                                path.display(),
                                index + 1,
                                self.score
                            );
                        }
                        self.finished = true;
                        continue;
                    }
                    let (name, score) = text.trim_start().rsplit_once(": ").ok_or_else(refused)?;
                    let score = number(score, 100.0).ok_or_else(refused)?;
                    self.categories[level.ok_or_else(refused)?].push((name.to_owned(), score));
                }
            }
        }
        Ok(())
    }
}

/// `path, score, score, …, mean`; a path may hold commas, and ends with an extension.
fn picture_line(line: &str) -> Option<(&str, Vec<f64>)> {
    let (mut rest, mut scores) = (line, Vec::new());
    while let Some((before, text)) = rest.rsplit_once(", ")
        && let Some(score) = number(text, 1.0)
    {
        scores.push(score);
        rest = before;
    }
    scores.reverse();
    (scores.len() >= 2 && !rest.is_empty()).then_some((rest, scores))
}

/// A number from 0 to `most`, but for rounding.
fn number(text: &str, most: f64) -> Option<f64> {
    let number: f64 = text.trim().parse().ok()?;
    (0.0..=most * (1.0 + 1e-9)).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results");
        std::fs::write(&path, text).unwrap();
        (folder, path)
    }

    #[test]
    fn geneval_is_summed_up_by_task() {
        let line = |file: &str, tag: &str, correct: bool, metadata: &str| {
            format!(
                "{{\"filename\":\"{file}\",\"tag\":\"{tag}\",\"prompt\":\"p\",\"correct\":{correct},\"reason\":\"\",\"metadata\":\"{metadata}\"}}\n"
            )
        };
        let text = [
            line("0/0", "single_object", true, "a"),
            line("0/1", "single_object", false, "a"),
            line("1/0", "colors", false, "b"),
            line("1/1", "colors", false, "b"),
            line("2/0", "colors", true, "c"),
        ];
        let (_folder, path) = file(&text.concat());
        let found = Geneval::read(&path).unwrap();
        assert_eq!((found.pictures.correct, found.pictures.all), (2, 5));
        assert_eq!((found.prompts.correct, found.prompts.all), (2, 3));
        assert_eq!(found.tasks[1], ("colors".into(), Share { correct: 1, all: 3 }));
        assert!((found.overall() - (0.5 + 1.0 / 3.0) / 2.0).abs() < 1e-15);
        let (_folder, path) = file(&[&text[0][..], &text[0]].concat());
        assert!(
            Geneval::read(&path)
                .err()
                .unwrap()
                .to_string()
                .contains("stands in line 1 too")
        );
        let (_folder, path) = file("{\"tag\": 1}\n");
        assert!(format!("{:#}", Geneval::read(&path).err().unwrap()).contains("line 1: expected {\"filename\""));
    }

    const DPG: &str = "out/a, b.png, 1.0, 0.5, 0.75, 0.75, 0.75\nout/c.png, 0.0, 0.5, 0.25, 0.25, 0.25\nModel: out\n\
                       L1 category scores:\n\tentity: 60.0\n\tother: 40\nL2 category scores:\n\tentity - whole: 60.0\n\
                       Image path: out\nSave results to: r.txt\nDPG-Bench score: 50.0\n";

    #[test]
    fn dpg_is_read_with_its_categories() {
        let (_folder, path) = file(DPG);
        let found = Dpg::read(&path).unwrap();
        assert_eq!(
            (found.prompts, found.per_prompt, found.score, found.finished),
            (2, 4, 50.0, true)
        );
        assert_eq!(
            found.categories[0],
            [("entity".to_owned(), 60.0), ("other".to_owned(), 40.0)]
        );
        assert_eq!(found.categories[1], [("entity - whole".to_owned(), 60.0)]);
        // The program was ended before it summed up.
        let (_folder, path) = file(&DPG[..DPG.find("Model").unwrap()]);
        let found = Dpg::read(&path).unwrap();
        assert_eq!((found.score, found.finished), (50.0, false));
    }

    #[test]
    fn results_that_are_none_are_named() {
        for (text, words) in [
            (
                DPG.replace("score: 50.0", "score: 51"),
                "line 11: says 51, but the lines of its pictures make 50",
            ),
            (
                DPG.replace("0.25\nModel", "nan\nModel"),
                "line 2: expected a picture's path",
            ),
            (
                DPG.replace("0.25\nModel", "0.25, 0.25\nModel"),
                "line 2: has scores of 5 pictures",
            ),
            (
                DPG.replace("0.25\nModel", "0.5\nModel"),
                "line 2: its last number is not the mean",
            ),
            (DPG.replace("out/c.png", "out/a, b.png"), "stands in line 1 too"),
            (DPG.replace("\tother: 40", "\tother"), "line 6: cannot be read"),
            ("Model: x\n".into(), "holds no picture's scores"),
            (String::new(), "holds no picture's scores"),
        ] {
            let (_folder, path) = file(&text);
            let message = Dpg::read(&path).err().unwrap().to_string();
            assert!(message.contains(words), "{message}");
        }
    }
}
