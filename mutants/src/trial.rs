//! Runs the tests with one mutant on.

use std::collections::BTreeSet;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Pid, Resource, Rlimit, Signal};

use crate::kit::Kit;
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
    of_library: bool,
    filter: String,
    /// How long they take without a mutant.
    usual: Duration,
}

/// The tests, in groups.
pub struct Tests {
    programs: [PathBuf; 2],
    /// Threads of each program.
    threads: usize,
    groups: Vec<Group>,
}

impl Tests {
    /// The tests of these programs for mutants of `files`, of which `jobs` run at once; all run once without a mutant.
    ///
    /// # Errors
    /// When a program cannot be started, or tests fail.
    pub fn new<'a>(kit: &Kit, jobs: usize, files: impl Iterator<Item = &'a Path>) -> anyhow::Result<Self> {
        let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
        let mut tests = Tests {
            programs: [kit.suite(), kit.library()],
            threads: (processors / jobs).max(1),
            groups: Vec::new(),
        };
        let wanted: BTreeSet<(bool, String)> = files.flat_map(filters).collect();
        for (of_library, filter) in wanted {
            let mut group = Group {
                of_library,
                filter,
                usual: Duration::ZERO,
            };
            let start = Instant::now();
            if tests.attempt(&group, None, Duration::from_secs(1800))? != Ended::Passed {
                bail!("the tests {} fail without a mutant", group.filter);
            }
            group.usual = start.elapsed();
            tests.groups.push(group);
        }
        Ok(tests)
    }

    /// Runs the tests of a mutated file: those of its own operation first, then all.
    ///
    /// # Errors
    /// When a program cannot be started.
    pub fn run(&self, number: Number, file: &Path) -> anyhow::Result<Fate> {
        for (of_library, filter) in filters(file) {
            let mut groups = self.groups.iter();
            let group = groups.find(|group| group.of_library == of_library && group.filter == filter);
            let group = group.context("a file that was not announced")?;
            let limit = (SLOWER * group.usual).max(AT_LEAST);
            match self.attempt(group, Some(number), limit)? {
                Ended::Passed => {}
                Ended::Failed => return Ok(Fate::Caught(filter)),
                Ended::Late => return Ok(Fate::Timeout),
            }
        }
        Ok(Fate::Survived)
    }

    fn attempt(&self, group: &Group, mutant: Option<Number>, limit: Duration) -> anyhow::Result<Ended> {
        let program = &self.programs[usize::from(group.of_library)];
        let threads = self.threads.to_string();
        let mut command = Command::new(program);
        command
            .args(["--quiet", &group.filter, "--test-threads", &threads])
            .env("RAYON_NUM_THREADS", &threads)
            // The mutants are of what runs on the CPU.
            .env("CUDA_VISIBLE_DEVICES", "-1")
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
