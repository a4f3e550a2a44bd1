//! `bench-report`: the README's tables and the plots, made from the records.

mod data;
mod klein;
mod plots;
mod records;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Parser;
use l2p_engine::device::format_bytes;

use crate::environment::Environment;
use crate::record::{Row, milliseconds, write_text};
use crate::targets::{TargetRow, Targets, figure};
use crate::train;
use plots::{LineChart, Roofline, Series};
use records::{Gpu, Parity, ParityRow, read_all};

const HELP: &str = "\
Examples:
  bench-report                  write README.md's tables and docs/plots from bench/results
  bench-report --check          say whether they are what the records give; writes nothing

Records lie in bench/results/GPU/: parity.json of bench/peers/parity.py, 4k.json of bench-targets,
train.json of bench-train, data.json of bench-synthesize, serve.json of bench-serve, and any file that another bench-* program wrote with --json. In README.md
everything between <!-- bench:NAME --> and <!-- /bench:NAME --> is replaced; the names are parity, 4k,
eight-bit, data, klein, train and plots. A GPU without a record has no table.

Exit code: 0; 1 when --check finds a difference, or on an error.";

/// Writes the README's tables and plots from the records of measurements.
#[derive(Parser, Debug)]
#[command(name = "bench-report", version, after_help = HELP)]
pub struct Arguments {
    /// The source tree
    #[arg(long, value_name = "DIR", default_value = ".")]
    root: PathBuf,
    /// Write nothing; fail when something would change
    #[arg(long)]
    check: bool,
}

/// Where plots are.
const PLOTS: &str = "docs/plots";

/// Writes or checks everything.
///
/// # Errors
/// When records or README cannot be read, a section has no such name, or, for a check, something differs.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let gpus = read_all(&arguments.root.join("bench/results"))?;
    let readme = arguments.root.join("README.md");
    let old = std::fs::read_to_string(&readme).with_context(|| format!("cannot read {}", readme.display()))?;
    let plots: Vec<(PathBuf, String)> = gpus.iter().flat_map(plots).collect();
    let new = fill(&old, &|name| section(name, &gpus, &plots)).with_context(|| readme.display().to_string())?;
    let mut files = vec![(readme, new)];
    files.extend(plots.into_iter().map(|(path, text)| (arguments.root.join(path), text)));
    for (path, text) in files {
        let there = std::fs::read_to_string(&path).unwrap_or_default();
        if there == text {
            continue;
        }
        if arguments.check {
            bail!("{} is not what the records give: run bench-report", path.display());
        }
        write_text(&path, &text)?;
        eprintln!("{}", path.display());
    }
    Ok(())
}

/// The text with every section between marks replaced by what `content` gives for its name.
fn fill(text: &str, content: &dyn Fn(&str) -> Option<String>) -> anyhow::Result<String> {
    let (open, end) = ("<!-- bench:", " -->");
    let mut filled = String::new();
    let mut rest = text;
    while let Some(start) = rest.find(open) {
        let after = &rest[start + open.len()..];
        let length = after
            .find(end)
            .context("a mark `<!-- bench:` is not closed by ` -->`")?;
        let name = &after[..length];
        let close = format!("<!-- /bench:{name} -->");
        let body = &after[length + end.len()..];
        let stop = body
            .find(&close)
            .with_context(|| format!("the section {name} has no `{close}`"))?;
        let section = content(name).with_context(|| format!("nothing is known about a section {name}"))?;
        filled += &rest[..start];
        filled += &format!("{open}{name}{end}\n{section}{close}");
        rest = &body[stop + close.len()..];
    }
    Ok(filled + rest)
}

/// A section's lines, the last one ended; `None` for an unknown name.
fn section(name: &str, gpus: &[Gpu], plots: &[(PathBuf, String)]) -> Option<String> {
    match name {
        "parity" => Some(gpus.iter().filter_map(|gpu| gpu.parity.as_ref()).map(parity).collect()),
        "4k" => Some(
            gpus.iter()
                .filter_map(|gpu| gpu.targets.as_ref())
                .map(target_table)
                .collect(),
        ),
        "eight-bit" => Some(
            gpus.iter()
                .flat_map(|gpu| {
                    let table = gpu.eight_bit.as_ref().map(target_table);
                    table.into_iter().chain(gpu.eight_bit_parity.as_ref().map(parity))
                })
                .collect(),
        ),
        "data" => Some(gpus.iter().map(data::table).collect()),
        "klein" => Some(gpus.iter().map(klein::table).collect()),
        "train" => Some(
            gpus.iter()
                .filter_map(|gpu| gpu.training.as_ref())
                .map(training)
                .collect(),
        ),
        "plots" => Some(
            plots
                .iter()
                .map(|(path, _)| format!("![{}]({})\n", alternative(path), path.display()))
                .collect(),
        ),
        _ => None,
    }
}

/// What a plot shows, for those who do not see it.
fn alternative(path: &Path) -> String {
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    let (gpu, what) = name.split_once('-').unwrap_or(("", &name));
    match what {
        "latency" => format!("Time of a step by picture size on {gpu}, latent against pixel"),
        "memory" => format!("Peak memory by picture size on {gpu}, latent against pixel"),
        _ => format!("Kernels under the roofline of {gpu}"),
    }
}

fn place(environment: &Environment) -> String {
    let Environment {
        gpu,
        driver,
        commit,
        date,
    } = environment;
    let commit = commit.get(..9).unwrap_or(commit);
    let day = date.get(..10).unwrap_or(date);
    format!("{gpu}, driver {driver}, commit {commit}, {day}")
}

/// What our error may be of PyTorch's; see `bench/peers/parity.py`.
const LARGEST_RATIO: f64 = 1.25;
const LARGEST_RATIO_OF_INT8: f64 = 3.0;

fn parity(record: &Parity) -> String {
    let mut text = format!(
        "\n{}:\n\n| component | our error | PyTorch's | ratio | our time | PyTorch's | our memory | PyTorch's |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        place(&record.environment)
    );
    for row in &record.rows {
        text += &parity_row(row);
    }
    text + "\n"
}

fn parity_row(row: &ParityRow) -> String {
    let bytes = |bytes: Option<u64>| bytes.map_or_else(|| "-".into(), format_bytes);
    let misses = |ratio: Option<f64>, most: f64| ratio.is_none_or(|ratio| ratio > most);
    let name = match misses(row.ratio, LARGEST_RATIO) {
        false => row.component.clone(),
        true => format!("**{}: misses {LARGEST_RATIO}**", row.component),
    };
    let in_eight_bits = row.weights.iter().map(|(weights, found)| {
        let held = weights == "int8" && row.component != "text";
        let name = match held && misses(Some(found.ratio), LARGEST_RATIO_OF_INT8) {
            false => format!("– {weights}"),
            true => format!("– **{weights}: misses {LARGEST_RATIO_OF_INT8}**"),
        };
        let (time, memory) = (milliseconds(found.ms), format_bytes(found.peak_bytes));
        format!(
            "| {name} | {:.1e} | | {:.2} | {time} | | {memory} | |\n",
            found.error, found.ratio
        )
    });
    let in_eight_bits: String = in_eight_bits.collect();
    format!(
        "| {name} | {} | {:.1e} | {} | {} | {} | {} | {} |\n{in_eight_bits}",
        row.ours_error
            .map_or_else(|| "failed".into(), |error| format!("{error:.1e}")),
        row.torch_bf16_error,
        row.ratio.map_or_else(|| "-".into(), |ratio| format!("{ratio:.2}")),
        row.ours_ms.map_or_else(|| "-".into(), milliseconds),
        milliseconds(row.torch_ms),
        bytes(row.ours_peak_bytes),
        bytes(row.torch_peak_bytes),
    )
}

fn target_table(targets: &Targets) -> String {
    let mut text = format!(
        "\n{}{}:\n\n{}",
        place(&targets.environment),
        with_version(targets.torch.as_deref()),
        rows_of_targets(&targets.rows)
    );
    let reasons: Vec<_> = targets
        .rows
        .iter()
        .filter(|row| !row.pass && row.reason.is_some())
        .collect();
    if !reasons.is_empty() {
        text += "\nWhy targets are missed:\n\n";
    }
    for row in reasons {
        text += &format!("* {}: {}\n", row.name, row.reason.as_deref().unwrap_or_default());
    }
    text + "\n"
}

/// A table of rows, its head included.
fn rows_of_targets(rows: &[TargetRow]) -> String {
    let mut text =
        "| | ours | compared with | | ratio | target | |\n| --- | ---: | --- | ---: | ---: | --- | --- |\n".to_owned();
    for row in rows {
        text += &format!(
            "| {} | {} {} | {} | {} | {} | {} | {} |\n",
            row.name,
            figure(row.ours),
            row.unit,
            row.against.as_deref().unwrap_or_default(),
            quantity(row.peer, &row.unit),
            row.ratio.map_or_else(String::new, |ratio| format!("{ratio:.3}")),
            row.target,
            match row.pass {
                _ if row.target.is_empty() => "",
                true => "pass",
                false => "**miss**",
            },
        );
    }
    text
}

fn training(record: &train::record::Record) -> String {
    let mut text = format!(
        "\n{}{}:\n\n| | ours | PyTorch | ratio | target | |\n| --- | ---: | ---: | ---: | --- | --- |\n",
        place(&record.environment),
        with_version(record.torch.as_deref())
    );
    for row in &record.rows {
        let verdict = match row.pass {
            Some(true) => "pass",
            Some(false) => "**miss**",
            None => "",
        };
        text += &format!(
            "| {} | {} {} | {} | {} | {} | {verdict} |\n",
            row.name,
            figure(row.ours),
            row.unit,
            quantity(row.peer, &row.unit),
            row.ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}")),
            row.target.as_deref().unwrap_or_default(),
        );
    }
    text + "\n"
}

/// A figure with its unit; nothing where there is none.
fn quantity(value: Option<f64>, unit: &str) -> String {
    value.map_or_else(String::new, |value| format!("{} {unit}", figure(value)))
}

fn with_version(torch: Option<&str>) -> String {
    torch.map_or_else(String::new, |torch| format!(", PyTorch {torch}"))
}

/// The picture sizes along a plot.
const SIZES: [&str; 4] = ["1k", "2k", "4k", "8k"];

/// The plots of one GPU that its records give.
fn plots(gpu: &Gpu) -> Vec<(PathBuf, String)> {
    let found = [
        ("latency", latency(gpu).map(|chart| chart.svg())),
        ("memory", memory(gpu).map(|chart| chart.svg())),
        ("roofline", roofline(gpu).map(|chart| chart.svg())),
    ];
    found
        .into_iter()
        .filter_map(|(name, svg)| Some((Path::new(PLOTS).join(format!("{}-{name}.svg", gpu.folder)), svg?)))
        .collect()
}

/// A series of what `value` gives for the rows `KIND-SIZE`; `None` of nothing.
fn series(gpu: &Gpu, name: &str, kind: &str, value: &dyn Fn(&Row) -> Option<f64>) -> Option<Series> {
    let at = |(index, size): (usize, &&str)| Some((index, value(gpu.row(&format!("{kind}-{size}"))?)?));
    let points: Vec<(usize, f64)> = SIZES.iter().enumerate().filter_map(at).collect();
    (!points.is_empty()).then(|| Series {
        name: name.into(),
        points,
    })
}

fn chart(gpu: &Gpu, what: &str, axis: &str, series: Vec<Option<Series>>) -> Option<LineChart> {
    let series: Vec<Series> = series.into_iter().flatten().collect();
    // A line of one point tells nothing.
    let longest = series.iter().map(|series| series.points.len()).max()?;
    (longest > 1).then(|| LineChart {
        title: format!(
            "{what}, {}",
            gpu.newest().map_or("", |(_, environment)| &environment.gpu)
        ),
        categories: SIZES.map(|size| size.to_uppercase()).to_vec(),
        axis: axis.into(),
        series,
    })
}

fn latency(gpu: &Gpu) -> Option<LineChart> {
    let ours = |row: &Row| Some(row.timing.milliseconds);
    let best = |row: &Row| Some(row.best_peer()?.timing.milliseconds);
    let lines = vec![
        series(gpu, "pixel", "pixel", &ours),
        series(gpu, "pixel, PyTorch's best", "pixel", &best),
        series(gpu, "latent", "latent", &ours),
        series(gpu, "latent, PyTorch's best", "latent", &best),
    ];
    chart(gpu, "One denoising step", "ms", lines)
}

fn memory(gpu: &Gpu) -> Option<LineChart> {
    let gigabytes = |bytes: u64| (bytes > 0).then_some(bytes as f64 / 1e9);
    let ours = |row: &Row| gigabytes(row.peak_bytes);
    let peers = |row: &Row| gigabytes(row.peers.iter().filter_map(|peer| peer.peak_bytes).min()?);
    // Latents are decoded beside the resident transformer: the larger of step and decoding counts.
    let with_decode = |value: &dyn Fn(&Row) -> Option<f64>, row: &Row| {
        let decode = gpu.row(&format!("{}-decode", row.name)).and_then(value);
        Some(value(row)?.max(decode.unwrap_or(0.0)))
    };
    let lines = vec![
        series(gpu, "pixel", "pixel", &ours),
        series(gpu, "pixel, PyTorch", "pixel", &peers),
        series(gpu, "latent with decoder", "latent", &|row| with_decode(&ours, row)),
        series(gpu, "latent with decoder, PyTorch", "latent", &|row| {
            with_decode(&peers, row)
        }),
    ];
    chart(gpu, "Peak memory, weights included", "GB", lines)
}

fn roofline(gpu: &Gpu) -> Option<Roofline> {
    let (ceilings, environment) = gpu.newest()?;
    let benches = ["attention", "gemm", "head"];
    let rows = benches.iter().flat_map(|bench| gpu.rows_of(bench));
    let kernels: Vec<(String, f64, f64)> = rows
        .filter(|row| row.work.flops > 0 && row.work.bytes > 0)
        // Variants of a kernel that the engine would not choose are no news here.
        .filter(|row| !row.name.starts_with("attention-") || row.name.ends_with("-auto"))
        .map(|row| {
            let intensity = row.work.flops as f64 / row.work.bytes as f64;
            (row.name.clone(), intensity, row.tflops)
        })
        .collect();
    (!kernels.is_empty()).then(|| Roofline {
        title: format!("Kernels and their roof, {}", environment.gpu),
        terabytes_per_second: ceilings.bytes_per_second / 1e12,
        tflops: ceilings.flops_per_second / 1e12,
        kernels,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_are_replaced_and_the_rest_is_kept() {
        let content = |name: &str| (name == "a").then(|| "new\n".to_owned());
        let text = "x\n<!-- bench:a -->\nold\n<!-- /bench:a -->\ny";
        let filled = fill(text, &content).unwrap();
        assert_eq!(filled, "x\n<!-- bench:a -->\nnew\n<!-- /bench:a -->\ny");
        assert_eq!(fill(&filled, &content).unwrap(), filled);
        for (wrong, word) in [
            ("<!-- bench:b --><!-- /bench:b -->", "section b"),
            ("<!-- bench:a -->", "has no"),
            ("<!-- bench:a", "not closed"),
        ] {
            let message = fill(wrong, &content).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    }
}
