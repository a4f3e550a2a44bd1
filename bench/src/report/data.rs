//! The README's tables about sets of pictures and about the server: what is promised of them, and what the records say.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::records::{Gpu, read};
use super::{place, rows_of_targets};
use crate::environment::Environment;
use crate::record::Row;
use crate::targets::{Bound, Pair, TargetRow};

/// The record of `bench-synthesize`.
#[derive(Clone, Debug, Deserialize)]
pub struct Synthesis {
    /// Where and when.
    pub environment: Environment,
    inputs: SetInputs,
    measured: SetMeasured,
    peers: Vec<SetPeer>,
}

#[derive(Clone, Debug, Deserialize)]
struct SetInputs {
    side: usize,
    steps: usize,
}

#[derive(Clone, Debug, Deserialize)]
struct SetMeasured {
    pictures_per_second: f64,
    batch: usize,
    idle: Option<f64>,
}

#[derive(Clone, Debug, Deserialize)]
struct SetPeer {
    pictures_per_second: f64,
    batch: usize,
}

/// The record of `bench-serve`.
#[derive(Clone, Debug, Deserialize)]
pub struct Serving {
    /// Where and when.
    pub environment: Environment,
    inputs: ServingInputs,
    measured: ServingMeasured,
    /// What steps alone would give, in pictures per second.
    steps_alone: Option<f64>,
}

#[derive(Clone, Debug, Deserialize)]
struct ServingInputs {
    clients: usize,
    side: usize,
    steps: usize,
}

#[derive(Clone, Debug, Deserialize)]
struct ServingMeasured {
    pictures_per_second: f64,
    first_preview: Quantile,
}

#[derive(Clone, Debug, Deserialize)]
struct Quantile {
    p50: f64,
}

impl Synthesis {
    /// Reads a record.
    ///
    /// # Errors
    /// When the file cannot be read or holds something else.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        read(path)
    }

    fn rows(&self) -> Vec<TargetRow> {
        let (inputs, measured) = (&self.inputs, &self.measured);
        let peers = self.peers.iter();
        let best = peers.max_by(|a, b| a.pictures_per_second.total_cmp(&b.pictures_per_second));
        let pair = Pair {
            ours: measured.pictures_per_second,
            peer: best.map(|peer| (format!("diffusers, {} at once", peer.batch), peer.pictures_per_second)),
        };
        let (side, steps, batch) = (inputs.side, inputs.steps, measured.batch);
        let name = format!("a set of {side} × {side}, {steps} steps, {batch} at once");
        let mut rows = vec![TargetRow::ratio(name, "pictures/s", pair, Bound::AtLeast(1.7))];
        let idle = measured.idle.map(|idle| Pair::alone(100.0 * idle));
        rows.extend(idle.map(|idle| TargetRow::own("– the GPU idle meanwhile", "%", idle, Bound::AtMost(2.0))));
        rows
    }
}

impl Serving {
    /// Reads a record.
    ///
    /// # Errors
    /// When the file cannot be read or holds something else.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        read(path)
    }

    fn rows(&self) -> Vec<TargetRow> {
        let (inputs, measured) = (&self.inputs, &self.measured);
        let (side, steps, clients) = (inputs.side, inputs.steps, inputs.clients);
        let pair = Pair {
            ours: measured.pictures_per_second,
            peer: self
                .steps_alone
                .map(|alone| ("steps alone (bench-step)".to_owned(), alone)),
        };
        let name = format!("l2p-serve, {clients} clients, {side} × {side}, {steps} steps");
        let preview = "– from a request to its first preview, the queue included (median)";
        vec![
            TargetRow::ratio(name, "pictures/s", pair, Bound::AtLeast(0.97)),
            TargetRow::told(preview, "s", measured.first_preview.p50),
        ]
    }
}

/// What a text encoder writes.
fn decoding(gpu: &Gpu) -> Vec<TargetRow> {
    let detail = |row: &Row, name: &str| row.details.get(name).and_then(Value::as_f64);
    let mut rows = Vec::new();
    for (texts, name) in [
        (1, "the text encoder writes a text"),
        (32, "the text encoder writes 32 texts"),
    ] {
        let Some(row) = gpu.row(&format!("decode-{texts}")) else {
            continue;
        };
        let peer = detail(row, "peer_tokens_per_second").map(|peer| ("transformers".to_owned(), peer));
        let pair = detail(row, "tokens_per_second").map(|ours| Pair { ours, peer });
        rows.extend(pair.map(|pair| TargetRow::ratio(name, "tokens/s", pair, Bound::AtLeast(3.0))));
    }
    let share = gpu.row("step-1").map(|row| Pair::alone(100.0 * row.share));
    let name = "– a step's bytes, of the copy's rate";
    rows.extend(share.map(|share| TargetRow::own(name, "%", share, Bound::AtLeast(70.0))));
    rows
}

/// The tables of a GPU; empty without records.
pub fn table(gpu: &Gpu) -> String {
    let set = gpu.synthesis.as_ref();
    let decoded = gpu.records.iter().rev().find(|record| record.bench == "decode");
    let served = gpu.serving.as_ref();
    let parts = [
        set.map(|set| (&set.environment, set.rows())),
        decoded.map(|record| (&record.environment, decoding(gpu))),
        served.map(|served| (&served.environment, served.rows())),
    ];
    let tables = parts.into_iter().flatten();
    let tables: String = tables
        .map(|(environment, rows)| format!("\n{}:\n\n{}", place(environment), rows_of_targets(&rows)))
        .collect();
    match tables.is_empty() {
        true => tables,
        false => tables + "\n",
    }
}
