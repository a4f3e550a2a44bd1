//! What a run needs: the programs with all mutants in them, and the list of these.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::weave::Number;

const PLAN: &str = "mutants.json";

/// A mutant of the list.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Planned {
    /// Its switch.
    pub number: Number,
    /// In words, with its place.
    pub name: String,
    /// The file that it changes.
    pub file: PathBuf,
    /// Why it is in no program, if it is not.
    pub left_out: Option<String>,
}

/// A folder with all of it.
pub struct Kit {
    folder: PathBuf,
    /// The mutants in the order of their switches.
    pub mutants: Vec<Planned>,
}

impl Kit {
    /// Reads what [`Kit::write`] wrote.
    ///
    /// # Errors
    /// When something of it is not there.
    pub fn open(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join(PLAN);
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let folder = folder.canonicalize()?;
        Ok(Kit {
            mutants: serde_json::from_str(&text).with_context(|| path.display().to_string())?,
            folder,
        })
    }

    /// Writes the plan, and copies the programs: the suite, and the engine's own tests.
    ///
    /// # Errors
    /// When that fails.
    pub fn write(folder: &Path, mutants: Vec<Planned>, [suite, library]: [PathBuf; 2]) -> anyhow::Result<()> {
        std::fs::create_dir_all(folder)?;
        let kit = Kit {
            folder: folder.to_owned(),
            mutants,
        };
        for (from, to) in [(suite, kit.suite()), (library, kit.library())] {
            std::fs::copy(&from, &to).with_context(|| from.display().to_string())?;
        }
        std::fs::write(folder.join(PLAN), serde_json::to_vec(&kit.mutants)?)?;
        Ok(())
    }

    /// The suite.
    pub fn suite(&self) -> PathBuf {
        self.folder.join("suite")
    }

    /// The engine's own tests.
    pub fn library(&self) -> PathBuf {
        self.folder.join("library")
    }
}
