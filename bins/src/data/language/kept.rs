//! Answers that are kept on disk, so that nothing is asked twice.

use std::path::PathBuf;

use l2p_engine::files;
use l2p_engine::limits::Budget;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Answer, LanguageModel, Request, Take};

/// A file of one answer.
const FILE: Budget = Budget::new("kept answer", 32 << 20);

/// A language model whose answers are kept in a folder, each in a file under the hash of the model's name and the whole request. A file
/// that cannot be read is no answer, and is written again.
pub struct Kept {
    model: Box<dyn LanguageModel>,
    folder: PathBuf,
    /// Answers that were there.
    found: usize,
}

/// What is in a file.
#[derive(Serialize, Deserialize)]
struct Entry {
    model: String,
    answer: Answer,
}

impl Kept {
    /// `model`, whose answers are in `folder`, which is made when the first one is kept.
    pub fn new(model: Box<dyn LanguageModel>, folder: PathBuf) -> Self {
        Kept {
            model,
            folder,
            found: 0,
        }
    }

    fn path(&self, request: &Request) -> anyhow::Result<PathBuf> {
        let mut hash = Sha256::new();
        hash.update(self.model.name().as_bytes());
        hash.update([0]);
        hash.update(serde_json::to_vec(request)?);
        let name: String = hash
            .finalize()
            .iter()
            .take(20)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Ok(self.folder.join(&name[..2]).join(format!("{name}.json")))
    }
}

impl LanguageModel for Kept {
    fn name(&self) -> String {
        self.model.name()
    }

    fn judges(&self) -> bool {
        self.model.judges()
    }

    fn is_free(&self) -> bool {
        self.model.is_free()
    }

    fn notes(&mut self) -> Vec<String> {
        let mut notes = self.model.notes();
        if self.found > 0 {
            notes.push(format!("{} answers were there from before", self.found));
            self.found = 0;
        }
        notes
    }

    fn answer(&mut self, requests: &[Request], take: &mut Take<'_>) -> anyhow::Result<()> {
        if self.is_free() {
            return self.model.answer(requests, take);
        }
        let (mut open, mut numbers, mut paths) = (Vec::new(), Vec::new(), Vec::new());
        for (number, request) in requests.iter().enumerate() {
            let path = self.path(request)?;
            match files::read_json::<Entry>(&path, FILE) {
                Ok(entry) => {
                    self.found += 1;
                    take(number, Ok(entry.answer))?;
                }
                Err(_) => {
                    open.push(request.clone());
                    numbers.push(number);
                    paths.push(path);
                }
            }
        }
        if open.is_empty() {
            return Ok(());
        }
        let name = self.model.name();
        self.model.answer(&open, &mut |index, answer| {
            if let Ok(answer) = &answer {
                let path = &paths[index];
                let folder = path.parent().unwrap_or(&self.folder);
                std::fs::create_dir_all(folder).map_err(|error| l2p_engine::Error::io(folder, error))?;
                let entry = Entry {
                    model: name.clone(),
                    answer: answer.clone(),
                };
                files::replace(path, &serde_json::to_vec(&entry)?)?;
            }
            take(numbers[index], answer)
        })
    }
}
