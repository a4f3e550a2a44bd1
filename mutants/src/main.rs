//! Runs mutants of the engine: small changes of its source, each of which a test should notice.
//!
//! What is changed is decided by `cargo mutants` (its list is read); this program only builds all of them into one program, each
//! behind a switch, instead of one program each. A build of the engine takes minutes where the tests of an operation take
//! seconds. `scripts/mutants` does everything from the list to the table.

mod list;
mod table;
mod tree;
mod trial;
mod weave;

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;

use self::tree::Tree;
use self::trial::Tests;

/// Runs mutants from one build.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// What `cargo mutants --list --json` wrote
    #[arg(long, value_name = "FILE")]
    list: PathBuf,
    /// A copy of the source tree, which is changed
    #[arg(long, value_name = "DIR")]
    tree: PathBuf,
    /// Where results go, a line each as they come; mutants that have one are not run again
    #[arg(long, value_name = "FILE")]
    results: PathBuf,
    /// Run again what survived before
    #[arg(long)]
    survivors: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let mutants = list::read(&arguments.list)?;
    let mut results = table::read(&arguments.results)?;
    if arguments.survivors {
        results.retain(|_, result| result != table::SURVIVED);
    }
    let mut tree = Tree::open(&arguments.tree, &mutants)?;
    tree.weave()?;
    let mut tests = Tests::new(&arguments.tree, tree.build()?);
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&arguments.results)
        .with_context(|| arguments.results.display().to_string())?;
    for (number, mutant) in (1..).zip(&mutants) {
        if results.contains_key(&mutant.name) {
            continue;
        }
        let result = match tree.left_out.get(&number) {
            Some(why) => table::left_out(*why).to_owned(),
            None => table::fate(&tests.run(number, &mutant.file)?),
        };
        writeln!(file, "{result}\t{}", mutant.name)?;
        results.insert(mutant.name.clone(), result);
    }
    println!("{}", table::summary(&mutants, &results));
    Ok(())
}
