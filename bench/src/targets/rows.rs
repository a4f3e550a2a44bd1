//! The rows of the target table, each from the measurements of the benchmarks.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::plan::Sizes;
use crate::record::{PeerTime, Record, Row};

/// Measurements by the name of the benchmark's part; see [`super::plan::PARTS`].
pub type Measurements = BTreeMap<String, Record>;

/// One row of the table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TargetRow {
    /// What is measured; also the key of its reason.
    pub name: String,
    /// Our figure.
    pub ours: f64,
    /// The figure of what it is compared with; `None` for a target of its own.
    pub peer: Option<f64>,
    /// What it is compared with.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub against: Option<String>,
    /// Of both figures.
    pub unit: String,
    /// What the target is about: ours over the peer's, unless the name says otherwise.
    pub ratio: Option<f64>,
    /// As it is written in the table.
    pub target: String,
    /// Whether it is reached.
    pub pass: bool,
    /// What there is to know about it; of a miss, the reason found.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
}

/// What a figure must be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bound {
    /// No more than this.
    AtMost(f64),
    /// No less than this.
    AtLeast(f64),
}

impl Bound {
    fn holds(self, value: f64) -> bool {
        match self {
            Bound::AtMost(bound) => value <= bound,
            Bound::AtLeast(bound) => value >= bound,
        }
    }

    fn text(self) -> String {
        match self {
            Bound::AtMost(bound) => format!("≤ {bound}"),
            Bound::AtLeast(bound) => format!("≥ {bound}"),
        }
    }
}

/// Ours and the peer's figure, the latter with its name.
pub(crate) struct Pair {
    pub(crate) ours: f64,
    pub(crate) peer: Option<(String, f64)>,
}

impl Pair {
    /// Ours, compared with nothing.
    pub(crate) fn alone(ours: f64) -> Self {
        Pair { ours, peer: None }
    }
}

impl TargetRow {
    /// A target for the ratio of ours to the peer's figure; without a peer it is missed.
    pub(crate) fn ratio(name: impl Into<String>, unit: &str, pair: Pair, bound: Bound) -> Self {
        let ratio = pair.peer.as_ref().map(|(_, peer)| pair.ours / peer);
        let (against, peer) = pair.peer.unzip();
        TargetRow {
            name: name.into(),
            ours: pair.ours,
            peer,
            reason: peer.is_none().then(|| "the peer was not measured".to_owned()),
            against,
            unit: unit.into(),
            target: format!("ratio {}", bound.text()),
            pass: ratio.is_some_and(|ratio| bound.holds(ratio)),
            ratio,
        }
    }

    /// A target for our own figure.
    pub(crate) fn own(name: impl Into<String>, unit: &str, pair: Pair, bound: Bound) -> Self {
        let of_ratio = Self::ratio(name, unit, pair, bound);
        TargetRow {
            target: format!("{} {unit}", bound.text()).trim().to_owned(),
            pass: bound.holds(of_ratio.ours),
            reason: None,
            ..of_ratio
        }
    }

    /// A figure that has no target.
    pub(crate) fn told(name: impl Into<String>, unit: &str, ours: f64) -> Self {
        TargetRow {
            target: String::new(),
            ..Self::own(name, unit, Pair::alone(ours), Bound::AtLeast(ours))
        }
    }
}

/// A GB is 10⁹ bytes.
fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

/// A step with weights in eight bits, against the same in bf16 and against PyTorch's products and attention alone.
fn eight_bits(record: &Record, coding: &str) -> Vec<TargetRow> {
    let [Some(usual), Some(row)] = [record.row("pixel-4k"), record.row(&format!("pixel-4k-{coding}"))] else {
        return Vec::new();
    };
    let pair = |peer| Pair {
        ours: row.timing.milliseconds,
        peer,
    };
    let peer = row
        .peers
        .first()
        .map(|peer| (format!("PyTorch {}", peer.name), peer.timing.milliseconds));
    let peak = Pair {
        ours: row
            .details
            .get("driver_bytes")
            .and_then(|bytes| bytes.as_u64())
            .map_or(f64::INFINITY, gigabytes),
        peer: usual
            .details
            .get("driver_bytes")
            .and_then(|bytes| bytes.as_u64())
            .map(|bytes| ("ours, bf16".to_owned(), gigabytes(bytes))),
    };
    let usual = Some(("ours, bf16".to_owned(), usual.timing.milliseconds));
    vec![
        TargetRow::ratio(
            format!("4K step, {coding} trunk"),
            "ms",
            pair(usual),
            Bound::AtMost(0.62),
        ),
        TargetRow::ratio(
            format!("4K step, {coding} trunk, against fp8"),
            "ms",
            pair(peer),
            Bound::AtMost(0.93),
        ),
        TargetRow::own(
            format!("4K step, {coding} trunk, memory as the driver counts it"),
            "GB",
            peak,
            Bound::AtMost(8.0),
        ),
    ]
}

/// A step whose main blocks are in host memory, against the longer of copying them and of a step that has them.
fn in_host_memory(row: &Row, resident: Option<&Row>) -> Vec<TargetRow> {
    let copies = row.details.get("copy_ms").and_then(|ms| ms.as_f64());
    let copies = copies.map(|ms| ("copying alone".to_owned(), ms));
    let computing = resident.map(|row| ("the step without copies".to_owned(), row.timing.milliseconds));
    let longer = copies.into_iter().chain(computing).max_by(|a, b| a.1.total_cmp(&b.1));
    let pair = Pair {
        ours: row.timing.milliseconds,
        peer: longer,
    };
    let driver = row.details.get("driver_bytes").and_then(|bytes| bytes.as_u64());
    let memory = Pair {
        ours: driver.map_or(f64::INFINITY, gigabytes),
        peer: None,
    };
    vec![
        TargetRow::ratio("4K step, int8 trunk in host memory", "ms", pair, Bound::AtMost(1.15)),
        TargetRow::own(
            "4K step, int8 trunk in host memory, memory as the driver counts it",
            "GB",
            memory,
            Bound::AtMost(4.0),
        ),
    ]
}

/// Memory of whole pictures as the driver counts it, and their time.
fn with_less(row: &Row, what: &str, most: f64) -> Vec<TargetRow> {
    let driver = row.details.get("driver_bytes").and_then(|bytes| bytes.as_u64());
    let own = |ours| Pair { ours, peer: None };
    let memory = own(driver.map_or(f64::INFINITY, gigabytes));
    vec![TargetRow::own(
        format!("{what}, peak as the driver counts it"),
        "GB",
        memory,
        Bound::AtMost(most),
    )]
}

/// Weights in eight bits, and in host memory.
fn in_less_memory(measured: &Measurements) -> Vec<TargetRow> {
    let part = |name: &str| measured.get(name);
    let mut rows = Vec::new();
    if let Some(record) = part("eight-bit") {
        rows.extend(["int8", "fp8"].iter().flat_map(|coding| eight_bits(record, coding)));
    }
    let streamed = part("streamed").and_then(|record| record.row("pixel-4k-int8-streamed"));
    let resident = part("eight-bit").and_then(|record| record.row("pixel-4k-int8"));
    rows.extend(streamed.into_iter().flat_map(|row| in_host_memory(row, resident)));
    for (name, what, most) in [
        ("sample-8gb", "4K sampling in int8, 12 of 30 blocks in host memory", 8.0),
        ("sample-4gb", "4K sampling in int8, all blocks in host memory", 4.0),
        ("sample-8k", "8K sampling in int8", 16.0),
    ] {
        rows.extend(
            part(name)
                .and_then(|record| record.rows.first())
                .into_iter()
                .flat_map(|row| with_less(row, what, most)),
        );
    }
    rows
}

/// The rows that follow from what was measured, in the table's order.
pub fn rows(measured: &Measurements, sizes: &Sizes) -> Vec<TargetRow> {
    let mut rows = Vec::new();
    let part = |name: &str| measured.get(name);
    if let Some(record) = part("attention") {
        rows.extend(sizes.tokens.iter().filter_map(|&tokens| attention(record, tokens)));
    }
    if let Some(record) = part("elementwise") {
        let step = part("step-4k").and_then(|record| record.row("pixel-4k"));
        rows.extend(record.rows.iter().map(|row| elementwise(record, row, step)));
    }
    if let Some(record) = part("products") {
        // Products with what follows them are compared in another unit than the target's.
        let alone = record.rows.iter().filter(|row| row.inputs.get("then").is_none());
        rows.extend(alone.map(product));
    }
    if let Some(record) = part("head") {
        rows.extend(record.row("head-4k").map(|row| head_time(row, "4K", 0.35)));
        rows.extend(record.row("head-4k").map(head_memory));
        rows.extend(record.row("head-1k").map(|row| head_time(row, "1K", 0.70)));
    }
    let step_4k = part("step-4k").and_then(|record| record.row("pixel-4k"));
    let step_1k = part("step-1k").and_then(|record| record.row("pixel-1k"));
    let latent = part("latent-4k");
    let latent_step = latent.and_then(|record| record.row("latent-4k"));
    let decode = latent.and_then(|record| record.row("latent-4k-decode"));
    rows.extend(step_4k.map(|row| step(row, "4K")));
    rows.extend(step_4k.zip(latent_step).map(|(ours, latent)| speed_up(ours, latent)));
    rows.extend(in_less_memory(measured));
    rows.extend(step_1k.map(|row| step(row, "1K")));
    rows.extend(step_4k.into_iter().flat_map(submission));
    let sample = part("sample").and_then(|record| record.row("sample-pixel-4k"));
    if let Some(sample) = sample {
        rows.extend(memory(sample, latent_step, decode));
    }
    rows.extend(latent_step.map(|row| {
        let pair = times(row, eager(row));
        TargetRow::ratio("latent 4K step", "ms", pair, Bound::AtMost(1.0))
    }));
    if let Some(row) = decode {
        rows.push(TargetRow::ratio(
            "VAE decode 4096²",
            "ms",
            times(row, eager(row)),
            Bound::AtMost(1.0),
        ));
        let peer = eager(row).and_then(|peer| Some((described(peer), gigabytes(peer.activation_bytes?))));
        let pair = Pair {
            ours: gigabytes(row.activation_bytes),
            peer,
        };
        rows.push(TargetRow::ratio(
            "VAE decode 4096², activations",
            "GB",
            pair,
            Bound::AtMost(0.5),
        ));
    }
    if let Some(sample) = sample {
        let steps = sample.inputs["steps"].as_u64().unwrap_or_default();
        let pair = Pair {
            ours: sample.timing.milliseconds / 1e3,
            peer: None,
        };
        let name = format!("{steps} steps of 4K, prompt to PNG, model resident");
        rows.push(TargetRow::own(name, "s", pair, Bound::AtMost(1.1)));
    }
    rows
}

fn described(peer: &PeerTime) -> String {
    format!("PyTorch, {}", peer.name)
}

/// Our time and that of a peer.
fn times(row: &Row, peer: Option<&PeerTime>) -> Pair {
    Pair {
        ours: row.timing.milliseconds,
        peer: peer.map(|peer| (described(peer), peer.timing.milliseconds)),
    }
}

/// Our rate of products and that of a peer for the same work.
fn rates(row: &Row, peer: Option<&PeerTime>) -> Pair {
    let rate = |milliseconds: f64| row.work.flops as f64 / milliseconds / 1e9;
    Pair {
        ours: row.tflops,
        peer: peer.map(|peer| (described(peer), rate(peer.timing.milliseconds))),
    }
}

/// The fastest of the peers whose name begins so.
fn peer<'a>(row: &'a Row, name: &str) -> Option<&'a PeerTime> {
    let named = row
        .peers
        .iter()
        .filter(|peer| peer.failure.is_none() && peer.name.starts_with(name));
    named.min_by(|a, b| a.timing.milliseconds.total_cmp(&b.timing.milliseconds))
}

fn compiled(row: &Row) -> Option<&PeerTime> {
    peer(row, "compiled")
}

fn eager(row: &Row) -> Option<&PeerTime> {
    peer(row, "eager")
}

fn attention(record: &Record, tokens: usize) -> Option<TargetRow> {
    let row = record.row(&format!("attention-{tokens}-auto"))?;
    let name = format!("attention forward, L = {tokens}");
    Some(TargetRow::ratio(
        name,
        "TFLOP/s",
        rates(row, peer(row, "cudnn")),
        Bound::AtLeast(1.0),
    ))
}

/// An operation that moves memory, against the copy. One that the step no longer runs, since its neighbour does it, counts as
/// reached.
fn elementwise(record: &Record, row: &Row, step: Option<&Row>) -> TargetRow {
    let pair = Pair {
        ours: row.terabytes_per_second,
        peer: Some(("copy".into(), record.ceilings.bytes_per_second / 1e12)),
    };
    let mut target = TargetRow::ratio(format!("{}, rate", row.name), "TB/s", pair, Bound::AtLeast(0.85));
    let operations = step.and_then(|step| step.details.get("operations")?["operations"].as_array());
    let fused = operations.is_some_and(|found| !found.is_empty() && found.iter().all(|op| op["name"] != *row.name));
    if fused {
        target.target = format!("{}, or gone into a neighbour", target.target);
        target.pass = true;
        target.reason = Some("gone into its neighbour: the 4K step does not run it".into());
    }
    target
}

fn product(row: &Row) -> TargetRow {
    let inputs = &row.inputs;
    let shape = [&inputs["m"], &inputs["n"], &inputs["k"]].map(|extent| extent.as_u64().unwrap_or_default());
    let [m, n, k] = shape;
    let name = format!("product {}, {m} x {n} x {k}", row.name.trim_start_matches("gemm-"));
    TargetRow::ratio(name, "TFLOP/s", rates(row, row.best_peer()), Bound::AtLeast(0.98))
}

fn head_time(row: &Row, size: &str, bound: f64) -> TargetRow {
    let name = format!("Detailer Head {size}");
    TargetRow::ratio(name, "ms", times(row, compiled(row)), Bound::AtMost(bound))
}

fn head_memory(row: &Row) -> TargetRow {
    let peer = compiled(row).and_then(|peer| Some((described(peer), gigabytes(peer.activation_bytes?))));
    let pair = Pair {
        ours: gigabytes(row.activation_bytes),
        peer,
    };
    TargetRow::own("Detailer Head 4K, activations", "GB", pair, Bound::AtMost(0.8))
}

fn step(row: &Row, size: &str) -> TargetRow {
    let name = format!("whole {size} step");
    TargetRow::ratio(name, "ms", times(row, compiled(row)), Bound::AtMost(0.85))
}

/// How many of our pixel steps PyTorch's latent step takes.
fn speed_up(ours: &Row, latent: &Row) -> TargetRow {
    let mut row = TargetRow::ratio(
        "whole 4K step, speed-up over the latent one",
        "ms",
        times(ours, peer(latent, "eager, cudnn")),
        Bound::AtMost(f64::INFINITY),
    );
    row.against = row.against.map(|against| format!("latent step, {against}"));
    row.ratio = row.ratio.map(|ratio| 1.0 / ratio);
    let bound = Bound::AtLeast(60.0);
    row.target = format!("peer / ours {}", bound.text());
    row.pass = row.ratio.is_some_and(|ratio| bound.holds(ratio));
    row
}

/// What submitting a step costs the host, and the share of it in which the GPU does nothing.
fn submission(row: &Row) -> Vec<TargetRow> {
    let number = |key: &str| row.details.get(key).and_then(serde_json::Value::as_f64);
    let own = |name: &str, unit: &str, ours: f64, bound: f64| {
        TargetRow::own(name, unit, Pair { ours, peer: None }, Bound::AtMost(bound))
    };
    let host = number("host_ms").map(|host| own("4K step, host time", "ms", host, 1.0));
    let idle = number("idle").map(|idle| own("4K step, GPU idle", "%", 100.0 * idle, 1.0));
    host.into_iter().chain(idle).collect()
}

/// Memory of sampling: as the driver counts it, against the latent baseline, and how much of it the engine's own account explains.
fn memory(sample: &Row, latent_step: Option<&Row>, decode: Option<&Row>) -> Vec<TargetRow> {
    let detail = |key: &str| Some(gigabytes(sample.details.get(key)?.as_u64()?));
    let Some(ours) = detail("driver_bytes") else {
        return Vec::new();
    };
    let name = "4K sampling, peak as the driver counts it";
    let mut rows = vec![TargetRow::own(
        name,
        "GB",
        Pair { ours, peer: None },
        Bound::AtMost(14.5),
    )];
    // Its tensors alone, without context and cache: what counts against us.
    let phases = [
        (latent_step, "latent step"),
        (decode, "VAE decode beside the transformer"),
    ];
    let peaks = phases.into_iter().filter_map(|(row, phase)| {
        let peer = eager(row?)?;
        Some((
            format!("{phase}, tensors of {}", described(peer)),
            gigabytes(peer.peak_bytes?),
        ))
    });
    if let Some(largest) = peaks.max_by(|a, b| a.1.total_cmp(&b.1)) {
        rows.push(TargetRow::ratio(
            "4K sampling, peak against the latent baseline's",
            "GB",
            Pair {
                ours,
                peer: Some(largest),
            },
            Bound::AtMost(0.28),
        ));
    }
    if let Some(accounted) = detail("accounted_bytes") {
        let unexplained = Pair {
            ours: ours - accounted,
            peer: None,
        };
        rows.push(TargetRow::own(
            "4K sampling, driver's count less what the report accounts for",
            "GB",
            unexplained,
            Bound::AtMost(0.5),
        ));
    }
    rows
}

#[cfg(test)]
mod tests;
