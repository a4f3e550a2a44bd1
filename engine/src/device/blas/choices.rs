//! The choices of algorithms for one GPU and one version of the library, and the file that they are kept in.
//!
//! A choice belongs to a class of products ([`super::class`]); whether it can be used is asked of the library for every exact
//! shape. The file is `matmul-<gpu>-<library version>.json` under [`DeviceOptions::cache_folder`]. What
//! several processes find is put together; for one class the first choice stays, unless a later search was more thorough.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Matmul;
use super::class::{class_of, key};
use super::search::Effort;
use crate::device::options::DeviceOptions;
use crate::error::Result;
use crate::files::{self, FolderLock};
use crate::limits::Budget;

/// Multiply-adds of a class's largest product below which a search would take longer than it saves.
const SMALLEST_PRODUCT: f64 = 2e9;

/// An algorithm in the library's own words.
pub(super) type Words = [u64; 8];

/// What a search chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Choice {
    /// The algorithm.
    pub algorithm: Words,
    /// Whether the search was a thorough one.
    pub thorough: bool,
}

/// What a product is to run with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The choice for its class.
    Chosen(Words),
    /// What the library itself expects to be fastest for this shape.
    Librarys,
    /// Nothing is known; a search is to be made.
    Unknown,
}

/// The choices.
pub(super) struct Choices {
    enabled: bool,
    path: Option<PathBuf>,
    known: Known,
}

/// The file's content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    /// By the class's name.
    choices: BTreeMap<String, Choice>,
}

impl Choices {
    /// Those kept for this kind of GPU and version of the library. A file that cannot be read counts as empty, with a warning.
    pub fn open(gpu: &str, version: usize, options: &DeviceOptions) -> Self {
        let gpu: String = gpu
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .collect();
        let folder = options.cache_folder.as_deref();
        Self::at(
            options.matmul_search,
            folder.map(|folder| folder.join(format!("matmul-{gpu}-{version}.json"))),
        )
    }

    fn at(enabled: bool, path: Option<PathBuf>) -> Self {
        let known = path.as_deref().map(read).unwrap_or_default();
        Choices { enabled, path, known }
    }

    /// Where they are kept.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Goes on with those of another file.
    pub fn move_to(&mut self, path: Option<PathBuf>) {
        *self = Self::at(self.enabled, path);
    }

    /// What `product` runs with; `valid` asks the library whether it can run with an algorithm.
    pub fn answer(&self, product: Matmul, effort: Effort, valid: impl FnOnce(Words) -> bool) -> Answer {
        let class = class_of(product);
        let size = class.m as f64 * class.n as f64 * class.k as f64;
        if !self.enabled || size < SMALLEST_PRODUCT {
            return Answer::Librarys;
        }
        match self.known.choices.get(&key(&class)) {
            Some(choice) if choice.thorough || effort == Effort::Bounded => match valid(choice.algorithm) {
                true => Answer::Chosen(choice.algorithm),
                false => Answer::Librarys,
            },
            _ => Answer::Unknown,
        }
    }

    /// Keeps what a search found for the class of `product`, here and on disk. Where another process was faster, what it found
    /// holds, so that a later run has the same results as this one: ask again.
    pub fn keep(&mut self, product: Matmul, effort: Effort, algorithm: Words) {
        let choice = Choice {
            algorithm,
            thorough: effort == Effort::Thorough,
        };
        let found = Known {
            choices: [(key(&class_of(product)), choice)].into(),
        };
        let kept = match &self.path {
            Some(path) => self.write(path, &found),
            None => Ok(self.known.clone().with(&found)),
        };
        self.known = kept.unwrap_or_else(|error| {
            tracing::warn!(
                "choices of matrix algorithms cannot be kept: {error}; later runs search again, and may differ in the last digits"
            );
            // Once is enough of both the warning and the waiting.
            self.path = None;
            self.known.clone().with(&found)
        });
    }

    /// The file's choices with those of this process and those just found.
    fn write(&self, path: &Path, found: &Known) -> Result<Known> {
        let folder = files::folder_of(path);
        std::fs::create_dir_all(&folder).map_err(|error| crate::Error::io(&folder, error))?;
        let _held = hold(&folder)?;
        let all = read(path).with(&self.known).with(found);
        let mut text = serde_json::to_vec_pretty(&all).map_err(|error| crate::Error::file(path, error.to_string()))?;
        text.push(b'\n');
        files::replace(path, &text)?;
        Ok(all)
    }
}

impl Known {
    /// With others' choices for classes that have none, and thorough ones in the place of others.
    fn with(mut self, others: &Known) -> Self {
        for (key, choice) in &others.choices {
            let kept = self.choices.entry(key.clone()).or_insert(*choice);
            if choice.thorough && !kept.thorough {
                *kept = *choice;
            }
        }
        self
    }
}

fn read(path: &Path) -> Known {
    if !path.exists() {
        return Known::default();
    }
    files::read_json(path, Budget::MATMUL_CHOICES).unwrap_or_else(|error| {
        tracing::warn!("{error}; matrix algorithms are searched anew");
        Known::default()
    })
}

/// Holds the folder; another process that keeps a choice there is done in a moment.
fn hold(folder: &Path) -> Result<FolderLock> {
    const ATTEMPTS: usize = 30;
    for _ in 1..ATTEMPTS {
        match FolderLock::acquire(folder, "a search for matrix algorithms") {
            Ok(lock) => return Ok(lock),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    FolderLock::acquire(folder, "a search for matrix algorithms")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    fn product(m: usize) -> Matmul {
        Matmul {
            m,
            n: 3840,
            k: 3840,
            transpose_a: false,
            transpose_b: true,
            output: DType::Bf16,
            bias: false,
            accumulate: false,
        }
    }

    const A: Words = [1, 2, 3, 4, 5, 6, 7, u64::MAX];
    const B: Words = [9; 8];

    fn choices(folder: &Path) -> Choices {
        Choices::at(true, Some(folder.join("cache/matmul-gpu-1.json")))
    }

    fn ask(choices: &Choices, rows: usize) -> Answer {
        choices.answer(product(rows), Effort::Bounded, |_| true)
    }

    #[test]
    fn one_search_serves_a_class() {
        let folder = tempfile::tempdir().unwrap();
        let mut choices = choices(folder.path());
        assert_eq!(ask(&choices, 4192), Answer::Unknown);
        choices.keep(product(4192), Effort::Bounded, A);
        // Other captions, and those only.
        for rows in [4097, 4128, 4608] {
            assert_eq!(ask(&choices, rows), Answer::Chosen(A), "{rows} rows");
        }
        assert_eq!(ask(&choices, 4096), Answer::Unknown);
        assert_eq!(ask(&choices, 4609), Answer::Unknown);
    }

    #[test]
    fn a_choice_that_the_exact_shape_cannot_take_is_left_to_the_library() {
        let folder = tempfile::tempdir().unwrap();
        let mut choices = choices(folder.path());
        choices.keep(product(4192), Effort::Bounded, A);
        let mut asked = None;
        let answer = choices.answer(product(4128), Effort::Bounded, |algorithm| {
            asked = Some(algorithm);
            false
        });
        assert_eq!((answer, asked), (Answer::Librarys, Some(A)));
    }

    #[test]
    fn small_products_and_a_search_that_is_off_are_left_to_the_library() {
        let folder = tempfile::tempdir().unwrap();
        let on = choices(folder.path());
        assert_eq!(ask(&on, 64), Answer::Librarys);
        // 192 · 3840² is more than the least; all of a class are treated alike.
        assert_eq!(ask(&on, 129), Answer::Unknown);
        assert_eq!(ask(&on, 192), Answer::Unknown);
        let mut off = Choices::at(false, None);
        off.keep(product(4192), Effort::Bounded, A);
        assert_eq!(ask(&off, 4192), Answer::Librarys);
    }

    #[test]
    fn choices_come_back_from_their_file() {
        let folder = tempfile::tempdir().unwrap();
        choices(folder.path()).keep(product(4192), Effort::Bounded, A);
        let again = choices(folder.path());
        assert_eq!(ask(&again, 4192), Answer::Chosen(A));
        let text = std::fs::read_to_string(again.path().unwrap()).unwrap();
        assert!(text.contains("4608x3840x3840-NT-bf16"), "{text}");
    }

    #[test]
    fn the_first_choice_stays_but_for_a_more_thorough_one() {
        let folder = tempfile::tempdir().unwrap();
        // Two processes that begin with nothing.
        let (mut one, mut other) = (choices(folder.path()), choices(folder.path()));
        one.keep(product(4192), Effort::Bounded, A);
        other.keep(product(4192), Effort::Bounded, B);
        assert_eq!(ask(&other, 4192), Answer::Chosen(A), "what came first holds for both");
        other.keep(product(8000), Effort::Bounded, B);
        let read = choices(folder.path());
        assert_eq!(
            [ask(&read, 4192), ask(&read, 8000)],
            [Answer::Chosen(A), Answer::Chosen(B)]
        );
        // A thorough search asks again where the choice was a quick one, and only there.
        let thorough = |choices: &Choices| choices.answer(product(4192), Effort::Thorough, |_| true);
        assert_eq!(thorough(&read), Answer::Unknown);
        one.keep(product(4192), Effort::Thorough, B);
        one.keep(product(4192), Effort::Bounded, A);
        let read = choices(folder.path());
        assert_eq!([thorough(&read), ask(&read, 4192)], [Answer::Chosen(B); 2]);
    }

    #[test]
    fn a_damaged_file_counts_as_empty_and_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache/matmul-gpu-1.json");
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        for text in [
            "",
            "{\"choices\": 3}",
            "{\"choices\": {\"a\": {\"algorithm\": [1], \"thorough\": true}}}",
        ] {
            std::fs::write(&path, text).unwrap();
            let mut choices = choices(folder.path());
            assert_eq!(ask(&choices, 4192), Answer::Unknown, "{text}");
            choices.keep(product(4192), Effort::Bounded, A);
            assert_eq!(ask(&self::choices(folder.path()), 4192), Answer::Chosen(A), "{text}");
        }
    }

    #[test]
    fn a_choice_that_cannot_be_kept_on_disk_holds_for_the_process() {
        let folder = tempfile::tempdir().unwrap();
        // A file where the folder should be.
        std::fs::write(folder.path().join("cache"), "").unwrap();
        let mut choices = choices(folder.path());
        choices.keep(product(4192), Effort::Bounded, A);
        assert_eq!(ask(&choices, 4192), Answer::Chosen(A));
    }
}
