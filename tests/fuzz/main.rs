//! Every reader of files against many files that are broken on purpose.
//!
//! A case is a few small files, one of them changed, given to one reader; it is made again from the campaign's seed and its number.
//! Cases run in worker processes: a case that panics, ends its process, takes more than 5 s of a processor or 2 GiB, or draws what
//! is not finite, is a finding.

mod base;
mod bytes;
mod campaign;
mod case;
mod eight_bit;
mod json;
mod lines;
mod memory;
mod pictures;
mod random;
mod readers;
mod templates;
mod tensors;
mod vocabulary;
mod worker;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

use base::Base;
use campaign::Plan;
use case::{Campaign, Case};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

/// Gives broken files to everything that reads files.
#[derive(Parser)]
#[command(name = "l2p-fuzz", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run many cases; a campaign that was interrupted goes on
    Run {
        /// How many
        #[arg(long, value_name = "N", default_value_t = 100_000)]
        cases: u64,
        /// The campaign
        #[arg(long, value_name = "N", default_value_t = 1)]
        seed: u64,
        /// Processes [default: one for each processor]
        #[arg(long, value_name = "N")]
        workers: Option<usize>,
        /// Where the campaign is kept
        #[arg(long, value_name = "DIR", default_value = "target/fuzz")]
        folder: PathBuf,
        /// Write the summary as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Run cases with faults of all kinds instead, which have to be found
        #[arg(long, hide = true)]
        planted: bool,
        /// Seconds between lines of progress
        #[arg(long, value_name = "SECONDS", default_value_t = 10)]
        every: u64,
    },
    /// Make one case again, say where its files are, and run it
    Case {
        /// Its number
        index: u64,
        /// The campaign
        #[arg(long, value_name = "N", default_value_t = 1)]
        seed: u64,
        /// Where the campaign is kept
        #[arg(long, value_name = "DIR", default_value = "target/fuzz")]
        folder: PathBuf,
    },
    /// Run the cases that come through a socket
    #[command(hide = true)]
    Worker {
        socket: PathBuf,
        base: PathBuf,
        scratch: PathBuf,
        seed: u64,
        #[arg(long)]
        planted: bool,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run {
            cases,
            seed,
            workers,
            folder,
            json,
            planted,
            every,
        } => {
            let plan = Plan {
                campaign: Campaign { seed, planted },
                cases,
                workers: workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(2, usize::from)),
                folder: campaign_folder(&folder, seed)?,
                every: Duration::from_secs(every),
            };
            let state = campaign::run(&plan)?;
            println!("{}", state.table());
            if let Some(path) = json {
                std::fs::write(path, format!("{:#}\n", state.summary()))?;
            }
            Ok(if state.unexpected == 0 {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        Command::Case { index, seed, folder } => one(&campaign_folder(&folder, seed)?, seed, index),
        Command::Worker {
            socket,
            base,
            scratch,
            seed,
            planted,
        } => worker::serve(&socket, &base, &scratch, Campaign { seed, planted }).map(|()| ExitCode::SUCCESS),
    }
}

/// The folder of a campaign, with its base in it. What another build of this program left there is removed: its base may be of
/// another format, and its results are not this one's.
fn campaign_folder(folder: &Path, seed: u64) -> anyhow::Result<PathBuf> {
    std::fs::create_dir_all(folder)?;
    let folder = folder.canonicalize()?.join(format!("seed-{seed}"));
    let program = std::env::current_exe()?.metadata()?;
    let build = format!("{:?} {}\n", program.modified()?, program.len());
    if std::fs::read_to_string(folder.join("build")).unwrap_or_default() != build {
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => std::fs::create_dir_all(&folder)?,
        }
        base::make(&folder.join("base"))?;
        std::fs::write(folder.join("build"), build)?;
    }
    Ok(folder)
}

/// Runs one case where it can be looked at.
fn one(folder: &Path, seed: u64, index: u64) -> anyhow::Result<ExitCode> {
    let base = Base::load(&folder.join("base"))?;
    let files = folder.join(format!("case-{index}"));
    let _ = std::fs::remove_dir_all(&files);
    std::fs::create_dir_all(&files)?;
    let case = Case::make(&base, Campaign { seed, planted: false }, index, &files)?;
    eprintln!("reader: {}", case.reader.name);
    for name in &case.changed {
        eprintln!("changed: {}", case.path(name).display());
    }
    worker::note_panics();
    let report = worker::run_made(case);
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(if report.is_fine() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
