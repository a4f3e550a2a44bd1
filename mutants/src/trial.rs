//! Runs the tests with one mutant on.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Pid, Resource, Rlimit, Signal};

use crate::weave::Number;

/// How long tests may take beside what they take without a mutant, and at least.
const SLOWER: u32 = 5;
const AT_LEAST: Duration = Duration::from_secs(30);

/// Address space that tests may take; a mutant that asks for more is caught.
const MEMORY: u64 = 8 << 30;

/// What became of a mutant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Tests failed: the first group of tests that did.
    Caught(String),
    /// Tests did not come to an end.
    Timeout,
    /// All tests passed.
    Survived,
}

/// Some of the tests of one program.
struct Group {
    program: PathBuf,
    filter: String,
    /// How long they take without a mutant.
    usual: Duration,
}

/// The tests, in groups.
pub struct Tests<'a> {
    folder: &'a Path,
    suite: PathBuf,
    library: PathBuf,
    groups: Vec<Group>,
}

impl<'a> Tests<'a> {
    /// The tests of these programs, run in `folder`.
    pub fn new(folder: &'a Path, [suite, library]: [PathBuf; 2]) -> Self {
        Tests {
            folder,
            suite,
            library,
            groups: Vec::new(),
        }
    }

    /// Runs the tests of a mutated file: those of its own operation first, then all.
    ///
    /// # Errors
    /// When a program cannot be started, or tests fail without a mutant.
    pub fn run(&mut self, number: Number, file: &Path) -> anyhow::Result<Fate> {
        for (of_library, filter) in filters(file) {
            let program = if of_library { &self.library } else { &self.suite };
            let group = self.group(program.clone(), filter)?;
            let limit = (SLOWER * self.groups[group].usual).max(AT_LEAST);
            match self.attempt(group, Some(number), limit)? {
                Ended::Passed => {}
                Ended::Failed => return Ok(Fate::Caught(self.groups[group].filter.clone())),
                Ended::Late => return Ok(Fate::Timeout),
            }
        }
        Ok(Fate::Survived)
    }

    /// The group's place; a new one is run without a mutant first.
    fn group(&mut self, program: PathBuf, filter: String) -> anyhow::Result<usize> {
        let mut known = self.groups.iter();
        if let Some(index) = known.position(|group| group.program == program && group.filter == filter) {
            return Ok(index);
        }
        self.groups.push(Group {
            program,
            filter,
            usual: Duration::ZERO,
        });
        let index = self.groups.len() - 1;
        let start = Instant::now();
        if self.attempt(index, None, Duration::from_secs(1800))? != Ended::Passed {
            bail!("the tests {} fail without a mutant", self.groups[index].filter);
        }
        self.groups[index].usual = start.elapsed();
        Ok(index)
    }

    fn attempt(&self, group: usize, mutant: Option<Number>, limit: Duration) -> anyhow::Result<Ended> {
        let Group { program, filter, .. } = &self.groups[group];
        let mut command = Command::new(program);
        command
            .args(["--quiet", filter])
            .current_dir(self.folder)
            .env("RUST_BACKTRACE", "0")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if let Some(number) = mutant {
            command.env("L2P_MUTANT", number.to_string());
        }
        let child = command.spawn().with_context(|| program.display().to_string())?;
        let bytes = Some(MEMORY);
        let limit_of = Rlimit {
            current: bytes,
            maximum: bytes,
        };
        // A test that has ended already needs no limit.
        let _ = rustix::process::prlimit(Pid::from_child(&child).into(), Resource::As, limit_of);
        wait(child, limit)
    }
}

#[derive(PartialEq, Eq)]
enum Ended {
    Passed,
    Failed,
    Late,
}

fn wait(mut child: Child, limit: Duration) -> anyhow::Result<Ended> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(if status.success() { Ended::Passed } else { Ended::Failed });
        }
        if start.elapsed() > limit {
            let _ = rustix::process::kill_process(Pid::from_child(&child), Signal::KILL);
            child.wait()?;
            return Ok(Ended::Late);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The filters that a file's mutants are tested with, and whether they are for the library's own tests.
fn filters(file: &Path) -> Vec<(bool, String)> {
    let mut parts = file
        .iter()
        .map(|part| part.to_string_lossy())
        .skip_while(|part| part != "src")
        .skip(1);
    let (folder, name) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let stem = name.trim_end_matches(".rs");
    let mut filters = match stem {
        "mod" => Vec::new(),
        _ => vec![(false, format!("{folder}::{stem}"))],
    };
    filters.extend(["ops::", "flow::"].map(|filter| (false, filter.to_owned())));
    filters.extend(["ops::", "flow::"].map(|filter| (true, filter.to_owned())));
    // A folder's own tests first.
    filters.sort_by_key(|(_, filter)| !filter.starts_with(&*folder));
    filters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operations_own_tests_come_first() {
        let of = |file: &str| -> Vec<String> {
            let all = filters(Path::new(file)).into_iter();
            all.map(|(library, filter)| if library { format!("lib {filter}") } else { filter })
                .collect()
        };
        assert_eq!(
            of("engine/src/ops/conv/backward/inputs.rs"),
            ["ops::conv", "ops::", "lib ops::", "flow::", "lib flow::"]
        );
        assert_eq!(of("engine/src/ops/mod.rs")[0], "ops::");
        assert_eq!(
            of("engine/src/flow/schedule.rs")[..3],
            ["flow::schedule", "flow::", "lib flow::"]
        );
    }
}
