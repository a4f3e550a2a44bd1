//! A copy of the source tree with all mutants in it, and the programs built from it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::list::Mutant;
use crate::weave::{Number, Woven, weave};

/// The switch that [`crate::weave`] asks; `L2P_MUTANT` holds the number of the mutant that is on.
const SWITCH: &str = "
#[doc(hidden)]
#[allow(missing_docs, dead_code)]
pub mod woven {
    static ON: std::sync::LazyLock<u32> = std::sync::LazyLock::new(|| {
        std::env::var(\"L2P_MUTANT\").ok().and_then(|number| number.parse().ok()).unwrap_or(0)
    });

    #[inline]
    pub fn on(number: u32) -> bool {
        *ON == number
    }
}
";

/// Why a mutant is in no program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeftOut {
    /// No place was found where it could be put behind a switch.
    NotWoven,
    /// It stands where only constants may.
    Constant,
    /// The compiler refuses it.
    Unviable,
}

/// The tree, and the source files as they were.
pub struct Tree<'a> {
    root: &'a Path,
    mutants: &'a [Mutant],
    sources: BTreeMap<PathBuf, String>,
    /// The mutants that are in no program.
    pub left_out: BTreeMap<Number, LeftOut>,
}

impl<'a> Tree<'a> {
    /// The copy at `root`, whose files are still those that the mutants were listed for.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn open(root: &'a Path, mutants: &'a [Mutant]) -> anyhow::Result<Self> {
        let files: BTreeSet<&PathBuf> = mutants.iter().map(|mutant| &mutant.file).collect();
        let read = |file: &PathBuf| {
            let path = root.join(file);
            let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            Ok((file.clone(), text))
        };
        Ok(Tree {
            root,
            mutants,
            sources: files.into_iter().map(read).collect::<anyhow::Result<_>>()?,
            left_out: BTreeMap::new(),
        })
    }

    /// Puts the mutants into the files, and takes those out again that the compiler refuses, until it takes the rest.
    ///
    /// # Errors
    /// When the compiler refuses something that is no mutant.
    pub fn weave(&mut self) -> anyhow::Result<()> {
        let library = self.root.join("engine/src/lib.rs");
        let text = std::fs::read_to_string(&library)?;
        // Mutants of constants that the compiler computes.
        let allowed = "#![allow(arithmetic_overflow, unconditional_panic)]\n";
        std::fs::write(&library, allowed.to_owned() + &text + SWITCH)?;
        loop {
            let woven = self.write()?;
            let refused = self.refused(&woven)?;
            eprintln!(
                "{} mutants in the tree, of which the compiler refuses {}",
                woven.values().map(|file| file.woven.len()).sum::<usize>(),
                refused.len()
            );
            if refused.is_empty() {
                return Ok(());
            }
            self.left_out.extend(refused);
        }
    }

    fn write(&mut self) -> anyhow::Result<BTreeMap<PathBuf, Woven>> {
        let mut all = BTreeMap::new();
        for (file, source) in &self.sources {
            let numbered = (1..).zip(self.mutants);
            let here: Vec<(Number, &Mutant)> = numbered
                .filter(|(number, mutant)| mutant.file == *file && !self.left_out.contains_key(number))
                .collect();
            let woven = weave(source, &here).with_context(|| file.display().to_string())?;
            let found: BTreeSet<Number> = woven.woven.iter().copied().collect();
            for (number, _) in here.iter().filter(|(number, _)| !found.contains(number)) {
                self.left_out.insert(*number, LeftOut::NotWoven);
            }
            std::fs::write(self.root.join(file), &woven.text)?;
            all.insert(file.clone(), woven);
        }
        Ok(all)
    }

    /// The mutants that the compiler's errors are about.
    fn refused(&self, woven: &BTreeMap<PathBuf, Woven>) -> anyhow::Result<BTreeMap<Number, LeftOut>> {
        let output = Command::new("cargo")
            .args([
                "check",
                "--release",
                "--package",
                "l2p-engine",
                "--message-format",
                "json",
            ])
            .current_dir(self.root)
            .stderr(Stdio::null())
            .output()
            .context("cargo cannot be started")?;
        let mut refused = BTreeMap::new();
        let mut others = Vec::new();
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let Ok(Message {
                message: Some(message), ..
            }) = serde_json::from_str(line)
            else {
                continue;
            };
            if message.level != "error" || message.spans.is_empty() {
                continue;
            }
            let why = match message.code.as_ref().map(|code| code.code.as_str()) {
                Some("E0015") => LeftOut::Constant,
                _ => LeftOut::Unviable,
            };
            let blamed = |primary: bool| -> Vec<Number> {
                let spans = message.spans.iter().filter(|span| span.is_primary == primary);
                spans
                    .filter_map(|span| Some(woven.get(&span.file_name)?.blamed(&span.range())))
                    .flatten()
                    .collect()
            };
            let numbers = match blamed(true) {
                numbers if numbers.is_empty() => blamed(false),
                numbers => numbers,
            };
            if numbers.is_empty() {
                others.push(message.rendered.unwrap_or_default());
            }
            refused.extend(numbers.into_iter().map(|number| (number, why)));
        }
        if refused.is_empty() && !output.status.success() {
            bail!("the tree does not compile:\n{}", others.join("\n"));
        }
        Ok(refused)
    }

    /// Builds the tests and returns their programs: the suite, and the engine's own.
    ///
    /// # Errors
    /// When they do not build.
    pub fn build(&self) -> anyhow::Result<[PathBuf; 2]> {
        // In one go, so that what both are made of is built once.
        let output = Command::new("cargo")
            .args(["test", "--release", "--no-run", "--message-format", "json"])
            .args([
                "--package",
                "l2p-tests",
                "--package",
                "l2p-engine",
                "--lib",
                "--test",
                "suite",
            ])
            .current_dir(self.root)
            .stderr(Stdio::inherit())
            .output()
            .context("cargo cannot be started")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let messages: Vec<Message> = text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect();
        let program = |name: &str| {
            let mut built = messages.iter().filter(|message| message.executable.is_some());
            let found = built.find(|message| message.target.as_ref().is_some_and(|target| target.name == name));
            let path = found.and_then(|message| message.executable.clone());
            path.with_context(|| format!("cargo builds no program {name}"))
        };
        Ok([program("suite")?, program("l2p_engine")?])
    }
}

/// A line of what cargo says.
#[derive(Deserialize)]
struct Message {
    message: Option<Diagnostic>,
    executable: Option<PathBuf>,
    target: Option<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

#[derive(Deserialize)]
struct Diagnostic {
    level: String,
    code: Option<Code>,
    spans: Vec<DiagnosticSpan>,
    rendered: Option<String>,
}

#[derive(Deserialize)]
struct Code {
    code: String,
}

#[derive(Deserialize)]
struct DiagnosticSpan {
    file_name: PathBuf,
    byte_start: usize,
    byte_end: usize,
    is_primary: bool,
}

impl DiagnosticSpan {
    fn range(&self) -> Range<usize> {
        self.byte_start..self.byte_end
    }
}
