//! `bench-targets`: the whole target table, measured and judged.

mod plan;
mod rows;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use clap::Parser;
use serde::{Deserialize, Serialize};

use crate::environment::Environment;
use crate::record::{Record, write_json};
pub use plan::{PARTS, Part, Sizes};
pub(crate) use rows::{Bound, Pair};
pub use rows::{Measurements, TargetRow};

/// The record's name in the folder of its GPU.
pub const FILE: &str = "4k.json";

/// The record of the parts about weights in eight bits and in host memory.
pub const EIGHT_BIT_FILE: &str = "eight-bit.json";

/// The help's end.
fn help() -> String {
    let parts: Vec<String> = PARTS
        .iter()
        .map(|part| format!("  {:<13}{}", part.name, part.about))
        .collect();
    format!(
        "\
Examples:
  bench-targets                                  everything, beside PyTorch ($L2P_PYTHON, or python3): some five minutes
  bench-targets --only sample,attention,elementwise,products,head --out first.json
  bench-targets --only step-4k,step-1k,latent-4k --merge first.json
  bench-targets --no-run --merge bench/results/h200/4k.json --reasons reasons.toml
  bench-targets --tiny --device cpu --no-peer    to try it, on small models

The parts, in the order in which they are measured, each by a program of its own that runs alone:
{}

The record holds the rows and, under `measurements`, what the programs found, every sample included; rows are made anew from
these whenever records are merged. Ratios are ours over the peer's, both from one program in alternation; what compiled code
PyTorch keeps on disk is used again by later parts. A reason is a line `\"name of the row\" = \"text\"` in the file after --reasons.

Exit code: 0 when everything was measured, whether targets are reached or missed; 1 when a program failed or a result is wrong.",
        parts.join("\n")
    )
}

/// Measures every target and prints which are reached.
#[derive(Parser, Debug)]
#[command(name = "bench-targets", version, after_help = help())]
pub struct Arguments {
    /// Measure these parts only
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    only: Vec<String>,
    /// Measure nothing: put together what --merge names
    #[arg(long, requires = "merge", conflicts_with = "only")]
    no_run: bool,
    /// Take parts that are not measured now from this record; the last one that has them counts; repeatable
    #[arg(long, value_name = "FILE")]
    merge: Vec<PathBuf>,
    /// Reasons of misses, a TOML file: row names to texts
    #[arg(long, value_name = "FILE.toml")]
    reasons: Option<PathBuf>,
    /// The record [default: bench/results/GPU/4k.json]
    #[arg(long, value_name = "FILE|-")]
    out: Option<PathBuf>,
    /// Where to run: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,
    /// Timed samples of each case, instead of each part's own number
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    repeats: Option<u32>,
    /// Do not run PyTorch; rows that need it are missed
    #[arg(long)]
    no_peer: bool,
    /// Small models
    #[arg(long)]
    tiny: bool,
}

/// The table's record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Targets {
    /// Where and when the last part was measured.
    #[serde(flatten)]
    pub environment: Environment,
    /// The version of PyTorch, where there were peers.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub torch: Option<String>,
    /// Whether the models were small.
    #[serde(default)]
    pub tiny: bool,
    /// The table.
    pub rows: Vec<TargetRow>,
    /// What it was made from.
    pub measurements: Measurements,
}

impl Targets {
    /// The table of what was measured, with reasons by row.
    ///
    /// # Errors
    /// When nothing was measured, not all of it on one GPU, or a reason is for a row that there is not.
    pub fn of(measurements: Measurements, tiny: bool, reasons: &BTreeMap<String, String>) -> anyhow::Result<Self> {
        let latest = measurements
            .values()
            .max_by(|a, b| a.environment.date.cmp(&b.environment.date))
            .context("nothing was measured")?;
        let environment = latest.environment.clone();
        let other = measurements
            .values()
            .find(|record| record.environment.gpu != environment.gpu);
        if let Some(other) = other {
            bail!(
                "a table is about one GPU: there are measurements of {} and of {}",
                environment.gpu,
                other.environment.gpu
            );
        }
        let sizes = if tiny { Sizes::tiny() } else { Sizes::published() };
        let mut rows = rows::rows(&measurements, &sizes);
        for (name, reason) in reasons {
            let row = rows.iter_mut().find(|row| row.name == *name);
            let row = row.with_context(|| format!("there is a reason for `{name}`, but no such row"))?;
            row.reason = Some(reason.clone());
        }
        Ok(Targets {
            torch: measurements.values().find_map(|record| record.torch.clone()),
            environment,
            tiny,
            rows,
            measurements,
        })
    }

    /// Reads a record.
    ///
    /// # Errors
    /// When the file cannot be read or holds something else.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is no record of bench-targets", path.display()))
    }

    /// The table for people.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<58}{:>11}{:>11}{:>9}  {:<22}\n",
            "", "ours", "peer", "ratio", "target"
        );
        for row in &self.rows {
            let peer = row.peer.map_or_else(|| "-".into(), figure);
            let ratio = row.ratio.map_or_else(|| "-".into(), |ratio| format!("{ratio:.3}"));
            let unit = format!("{} [{}]", row.name, row.unit);
            let verdict = if row.pass { "pass" } else { "MISS" };
            let ours = figure(row.ours);
            text += &format!(
                "{unit:<58}{ours:>11}{peer:>11}{ratio:>9}  {:<22}{verdict}\n",
                row.target
            );
            if let Some(reason) = &row.reason {
                text += &format!("    {reason}\n");
            }
        }
        let reached = self.rows.iter().filter(|row| row.pass).count();
        text + &format!("{reached} of {} reached", self.rows.len())
    }
}

/// A figure with four digits.
pub fn figure(value: f64) -> String {
    let digits = match value.abs() {
        value if value < 0.9995 => 4,
        value if value < 9.9995 => 3,
        value if value < 99.995 => 2,
        value if value < 999.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$}")
}

/// Runs the benchmarks and writes the record.
///
/// # Errors
/// When a program fails or gives wrong results (the record then holds what there is), or files cannot be read or written.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let parts = parts(arguments)?;
    let reasons = match &arguments.reasons {
        Some(path) => read_reasons(path)?,
        None => BTreeMap::new(),
    };
    let mut measured = Measurements::new();
    for path in &arguments.merge {
        let earlier = Targets::read(path)?;
        ensure!(
            earlier.tiny == arguments.tiny,
            "{} is about {} models",
            path.display(),
            if earlier.tiny { "small" } else { "published" }
        );
        measured.extend(earlier.measurements);
    }
    let folder = tempfile::tempdir()?;
    let mut failed = Vec::new();
    for part in parts {
        let path = folder.path().join(format!("{}.json", part.name));
        let start = Instant::now();
        eprintln!("== {}: {}", part.name, part.about);
        let succeeded = measure(part, &path, arguments)?;
        eprintln!("== {} took {:.0} s\n", part.name, start.elapsed().as_secs_f64());
        if path.is_file() {
            measured.insert(part.name.into(), Record::read(&path)?);
        }
        if !succeeded {
            failed.push(part.name);
        }
        // What there is by now is kept, whatever comes next.
        if !measured.is_empty() {
            let targets = Targets::of(measured.clone(), arguments.tiny, &BTreeMap::new())?;
            if arguments.out.as_deref() != Some(Path::new("-")) {
                write_json(&destination(arguments, &targets), &targets)?;
            }
        }
    }
    if measured.is_empty() && !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    let targets = Targets::of(measured, arguments.tiny, &reasons)?;
    let path = destination(arguments, &targets);
    write_json(&path, &targets)?;
    match path == Path::new("-") {
        true => eprintln!("{}", targets.table()),
        false => {
            l2p_bins::print(&format!("{}\n", targets.table()))?;
            eprintln!("{}", path.display());
        }
    }
    match failed[..] {
        [] => Ok(()),
        _ => bail!("failed: {}", failed.join(", ")),
    }
}

fn parts(arguments: &Arguments) -> anyhow::Result<Vec<Part>> {
    if arguments.no_run {
        return Ok(Vec::new());
    }
    for name in &arguments.only {
        if Part::named(name).is_none() {
            let names: Vec<&str> = PARTS.iter().map(|part| part.name).collect();
            bail!("there is no part `{name}`; there are {}", names.join(", "));
        }
    }
    // The CPU's weights are in host memory as it is.
    let streams = ["streamed", "sample-8gb", "sample-4gb"];
    let usual = |part: &Part| arguments.only.is_empty() && (arguments.device != "cpu" || !streams.contains(&part.name));
    let wanted = |part: &Part| usual(part) || arguments.only.iter().any(|name| name == part.name);
    Ok(PARTS.into_iter().filter(wanted).collect())
}

fn destination(arguments: &Arguments, targets: &Targets) -> PathBuf {
    let own = || Path::new("bench/results").join(targets.environment.folder()).join(FILE);
    arguments.out.clone().unwrap_or_else(own)
}

fn read_reasons(path: &Path) -> anyhow::Result<BTreeMap<String, String>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    toml::from_str(&text).with_context(|| {
        format!(
            "{} holds no reasons: write lines like \"whole 4K step\" = \"why\"",
            path.display()
        )
    })
}

/// Runs a part's program; its table goes to standard error. Returns whether it succeeded.
fn measure(part: Part, record: &Path, arguments: &Arguments) -> anyhow::Result<bool> {
    let sizes = if arguments.tiny {
        Sizes::tiny()
    } else {
        Sizes::published()
    };
    let own = std::env::current_exe().context("this program does not know where it is")?;
    let program = own.with_file_name(format!("{}{}", part.program, std::env::consts::EXE_SUFFIX));
    let mut command = Command::new(&program);
    command
        .args(part.arguments(&sizes, !arguments.no_peer, arguments.repeats))
        .arg(format!("--device={}", arguments.device))
        .arg("--json")
        .arg(record)
        .stdout(std::io::stderr());
    let status = command.status().with_context(|| {
        format!(
            "{} does not start: it has to stand beside bench-targets",
            program.display()
        )
    })?;
    Ok(status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_four_digits() {
        let found = [0.25398, 3.4612, 14.234, 781.26, 5604.3].map(figure);
        assert_eq!(found, ["0.2540", "3.461", "14.23", "781.3", "5604"]);
    }

    #[test]
    fn a_table_of_nothing_is_refused() {
        let error = Targets::of(Measurements::new(), false, &BTreeMap::new()).unwrap_err();
        assert_eq!(error.to_string(), "nothing was measured");
    }
}
