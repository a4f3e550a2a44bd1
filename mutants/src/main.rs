//! Runs mutants of the engine: small changes of its source, each of which a test should notice.
//!
//! What is changed is decided by `cargo mutants` (its list is read); this program only builds all of them into one program, each
//! behind a switch, instead of one program each. A build of the engine takes minutes where the tests of an operation take
//! seconds. What `build` leaves in its folder needs no compiler any more: `run` may happen on another machine. `scripts/mutants`
//! does everything from the list to the table.

mod kit;
mod list;
mod table;
mod tree;
mod trial;
mod weave;

use std::fs::OpenOptions;
use std::io::Write as _;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context;
use clap::{Parser, Subcommand};

use self::kit::{Kit, Planned};
use self::tree::Tree;
use self::trial::Tests;

/// Builds mutants into one program, and runs the tests with each.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    work: Work,
}

#[derive(Subcommand)]
enum Work {
    /// Builds the test programs with all mutants in them
    Build {
        /// What `cargo mutants --list --json` wrote
        #[arg(long, value_name = "FILE")]
        list: PathBuf,
        /// A copy of the source tree, which is changed
        #[arg(long, value_name = "DIR")]
        tree: PathBuf,
        /// Where the programs and the plan go
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Runs the tests with one mutant on at a time, on the CPU; prints the table and the survivors
    Run {
        /// What `build` made
        #[arg(value_name = "DIR")]
        kit: PathBuf,
        /// Where results go, a line each as they come; mutants that have one are not run again
        #[arg(long, value_name = "FILE")]
        results: PathBuf,
        /// Run again what survived before
        #[arg(long)]
        survivors: bool,
        /// Mutants at once
        #[arg(long, value_name = "N", default_value = "1")]
        jobs: NonZero<usize>,
        /// Stop after so many seconds; what is left is run by the next call
        #[arg(long, value_name = "SECONDS")]
        within: Option<u64>,
    },
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().work {
        Work::Build { list, tree, out } => build(&list, &tree, &out),
        Work::Run {
            kit,
            results,
            survivors,
            jobs,
            within,
        } => {
            let end = within.map(|seconds| std::time::Instant::now() + std::time::Duration::from_secs(seconds));
            run(&Kit::open(&kit)?, &results, survivors, jobs.get(), end)
        }
    }
}

fn build(list: &Path, tree: &Path, out: &Path) -> anyhow::Result<()> {
    let mutants = list::read(list)?;
    let mut tree = Tree::open(tree, &mutants)?;
    tree.weave()?;
    let programs = tree.build()?;
    let planned = (1..).zip(&mutants).map(|(number, mutant)| Planned {
        number,
        name: mutant.name.clone(),
        file: mutant.file.clone(),
        left_out: tree.left_out.get(&number).map(|why| table::left_out(*why).to_owned()),
    });
    Kit::write(out, planned.collect(), programs)
}

fn run(kit: &Kit, path: &Path, survivors: bool, jobs: usize, end: Option<std::time::Instant>) -> anyhow::Result<()> {
    let mut results = table::read(path)?;
    if survivors {
        results.retain(|_, result| result != table::SURVIVED);
    }
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| path.display().to_string())?;
    let open: Vec<&Planned> = kit
        .mutants
        .iter()
        .filter(|one| !results.contains_key(&one.name))
        .collect();
    let mut left = Vec::new();
    for mutant in open {
        match &mutant.left_out {
            Some(why) => {
                writeln!(file, "{why}\t{}", mutant.name)?;
                results.insert(mutant.name.clone(), why.clone());
            }
            None => left.push(mutant),
        }
    }
    let tests = Tests::new(kit, jobs, left.iter().map(|mutant| mutant.file.as_path()))?;
    let (next, shared) = (AtomicUsize::new(0), Mutex::new((file, results)));
    let work = || -> anyhow::Result<()> {
        while let Some(mutant) = left.get(next.fetch_add(1, Ordering::Relaxed)) {
            if end.is_some_and(|end| std::time::Instant::now() > end) {
                break;
            }
            let result = table::fate(&tests.run(mutant.number, &mutant.file)?);
            let (file, results) = &mut *shared.lock().expect("no worker panics while it holds the results");
            writeln!(file, "{result}\t{}", mutant.name)?;
            results.insert(mutant.name.clone(), result);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        let ends = workers
            .into_iter()
            .map(|worker| worker.join().expect("a worker does not panic"));
        ends.collect::<anyhow::Result<Vec<()>>>()
    })?;
    let (_, results) = shared.into_inner().expect("no worker panicked");
    println!("{}", table::summary(&kit.mutants, &results));
    Ok(())
}
