//! The record of `bench-train`: what was measured, and rows that set it beside PyTorch and the targets.

use std::path::Path;

use anyhow::Context;
use l2p_engine::ceilings::{Ceilings, mfu};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::checkpoint::CheckpointTimes;
use crate::environment::Environment;
use crate::record::{PeerTime, Timing, milliseconds};
use crate::runner::Bench;

/// The most memory that a step of the released recipe may take at 1K, in bytes, by choice of recomputing.
const LARGEST_PEAKS: [(&str, f64); 2] = [("train-none", 76e9), ("train-all", 54e9)];

/// Seconds for which training may stand still for a checkpoint of the released recipe, and the share of a run in percent, with one
/// every so many steps.
const LONGEST_STALL: f64 = 1.5;
const LARGEST_SHARE: f64 = 1.0;
const SAVE_EVERY: u64 = 500;

/// One choice of recomputing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Measured {
    pub name: String,
    /// Sizes and choices.
    pub inputs: Value,
    /// Of a step.
    #[serde(flatten)]
    pub timing: Timing,
    /// Operations of a step, without and with what is computed a second time.
    pub needed_flops: f64,
    pub computed_flops: f64,
    pub trained_parameters: u64,
    /// By the device's own ledger.
    pub peak_bytes: u64,
    pub peak_bytes_by_tag: Map<String, Value>,
    pub planned_peak_bytes: u64,
    /// As the driver counts, all of the process included.
    pub driver_bytes: Option<u64>,
    /// Before each step.
    pub losses: Vec<f32>,
    /// Of checkpoints, where that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoints: Option<CheckpointTimes>,
    pub peers: Vec<PeerTime>,
}

impl Measured {
    /// The fastest way in which the peer did it.
    fn peer(&self) -> Option<&PeerTime> {
        let ran = self.peers.iter().filter(|peer| peer.failure.is_none());
        ran.min_by(|a, b| a.timing.milliseconds.total_cmp(&b.timing.milliseconds))
    }

    /// Needed operations in a second, in 10¹².
    fn tflops(&self, milliseconds: f64) -> f64 {
        self.needed_flops / milliseconds.max(f64::MIN_POSITIVE) / 1e9
    }

    /// The rows of a run on this GPU, whose measured rates are `ceilings`.
    fn rows(&self, gpu: &str, ceilings: &Ceilings) -> Vec<Row> {
        let peer = self.peer();
        let time = peer.map(|peer| peer.timing.milliseconds);
        let ours = self.timing.milliseconds;
        let share = |milliseconds: f64| 1e14 * self.tflops(milliseconds) / ceilings.flops_per_second;
        let mfu = |milliseconds: f64| Some(100.0 * mfu(gpu, self.needed_flops, milliseconds / 1e3)?);
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        let published = self.inputs["tiny"] == Value::Bool(false) && self.inputs["side"] == 1024;
        let largest = LARGEST_PEAKS.iter().find(|(name, _)| published && *name == self.name);
        let largest = largest.map(|(_, bytes)| bytes / 1e9);
        let row = |what: &str, unit: &str, ours: f64, peer: Option<f64>| {
            Row::new(&format!("{} {what}", self.name), unit, ours, peer)
        };
        let by_driver = self.driver_bytes.map(|bytes| {
            let peer = peer.and_then(|peer| peer.driver_bytes);
            row("peak memory, driver", "GB", gigabytes(bytes), peer.map(gigabytes)).at_most(largest)
        });
        let by_ledger = peer.and_then(|peer| peer.peak_bytes).map(gigabytes);
        let mut rows = vec![
            row("step", "ms", ours, time),
            row(
                "needed arithmetic",
                "TFLOP/s",
                self.tflops(ours),
                time.map(|time| self.tflops(time)),
            ),
        ];
        rows.extend(mfu(ours).map(|ours| row("MFU", "%", ours, time.and_then(mfu))));
        rows.push(row("share of measured product rate", "%", share(ours), time.map(share)));
        rows.push(row("peak memory, tensors", "GB", gigabytes(self.peak_bytes), by_ledger).at_most(largest));
        rows.extend(by_driver);
        rows.extend(self.checkpoints.iter().flat_map(|times| {
            let row = |what: &str, unit: &str, ours: f64| row(&format!("checkpoint {what}"), unit, ours, None);
            let targets = published.then_some((LONGEST_STALL, LARGEST_SHARE));
            [
                row("files", "GB", gigabytes(times.bytes)),
                row("training stands still", "s", times.stall_seconds).at_most(targets.map(|(stall, _)| stall)),
                row("share of a run", "%", 100.0 * times.share(SAVE_EVERY)).at_most(targets.map(|(_, share)| share)),
                row("until it is on the disk", "s", times.seconds),
                row("written from the model, standing still", "s", times.plain_seconds),
                row("step while one is written", "ms", times.beside_step_ms),
                row("longest step while memory is taken", "ms", times.memory_step_ms),
            ]
        }));
        rows
    }
}

/// One line of the comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    pub name: String,
    pub ours: f64,
    pub peer: Option<f64>,
    pub unit: String,
    /// Ours over the peer's.
    pub ratio: Option<f64>,
    /// What `ours` should be; `None` where there is no target.
    pub target: Option<String>,
    pub pass: Option<bool>,
}

impl Row {
    fn new(name: &str, unit: &str, ours: f64, peer: Option<f64>) -> Self {
        Row {
            name: name.into(),
            ours,
            peer,
            unit: unit.into(),
            ratio: peer.filter(|peer| *peer > 0.0).map(|peer| ours / peer),
            target: None,
            pass: None,
        }
    }

    fn at_most(self, largest: Option<f64>) -> Self {
        Row {
            target: largest.map(|largest| format!("≤ {largest} {}", self.unit)),
            pass: largest.map(|largest| self.ours <= largest),
            ..self
        }
    }

    fn line(&self) -> String {
        let number = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.2}"));
        let verdict = match self.pass {
            Some(true) => "pass",
            Some(false) => "miss",
            None => "",
        };
        format!(
            "{:<44}{:>12.2}{:>12} {:<9}{:>8}  {:<12}{verdict}",
            self.name,
            self.ours,
            number(self.peer),
            self.unit,
            number(self.ratio),
            self.target.as_deref().unwrap_or_default(),
        )
    }
}

/// A run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    #[serde(flatten)]
    pub environment: Environment,
    /// The version of PyTorch; `None` without a peer.
    pub torch: Option<String>,
    pub ceilings: Ceilings,
    pub rows: Vec<Row>,
    pub measured: Vec<Measured>,
}

impl Record {
    pub fn new(bench: &Bench, measured: Measured, peers: Vec<PeerTime>) -> Self {
        let ours = measured.timing.milliseconds;
        let with_ratio = |peer: PeerTime| PeerTime {
            ratio: (peer.timing.milliseconds > 0.0).then(|| ours / peer.timing.milliseconds),
            ..peer
        };
        let peers = peers.into_iter().map(with_ratio).collect();
        let measured = Measured { peers, ..measured };
        Record {
            environment: bench.environment().clone(),
            torch: bench.torch().map(str::to_owned),
            ceilings: *bench.ceilings(),
            rows: measured.rows(&bench.environment().gpu, bench.ceilings()),
            measured: vec![measured],
        }
    }

    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&bytes).with_context(|| format!("{} is no record", path.display()))
    }

    /// Adds what another process found.
    pub fn join(&mut self, other: Record) {
        self.rows.extend(other.rows);
        self.measured.extend(other.measured);
    }

    pub fn table(&self) -> Vec<String> {
        let header = format!(
            "{:<44}{:>12}{:>12} {:<9}{:>8}  target",
            "", "ours", "PyTorch", "", "ratio"
        );
        let lines = self.rows.iter().map(Row::line);
        let spreads = self.measured.iter().map(|measured| {
            let Timing {
                milliseconds: median,
                spread,
                samples_ms,
            } = &measured.timing;
            format!(
                "{}: median {} of {} steps, spread {:.1} %",
                measured.name,
                milliseconds(*median),
                samples_ms.len(),
                100.0 * spread
            )
        });
        [header].into_iter().chain(lines).chain(spreads).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_say_whether_they_reach_their_target() {
        let row = |ours| Row::new("peak", "GB", ours, Some(80.0)).at_most(Some(76.0));
        assert_eq!((row(75.0).pass, row(77.0).pass), (Some(true), Some(false)));
        assert_eq!(row(40.0).ratio, Some(0.5));
        assert!(row(77.0).line().contains("≤ 76 GB") && row(77.0).line().ends_with("miss"));
        let free = Row::new("step", "ms", 3.0, None).at_most(None);
        assert_eq!((free.target.as_deref(), free.pass, free.ratio), (None, None, None));
    }

    #[test]
    fn mfu_and_the_share_of_the_measured_rate_are_two_rows() {
        let measured = Measured {
            name: "train-none".into(),
            inputs: Value::Null,
            timing: Timing::of(vec![250.0]),
            needed_flops: 123.675e12,
            computed_flops: 200e12,
            trained_parameters: 1,
            peak_bytes: 0,
            peak_bytes_by_tag: Map::new(),
            planned_peak_bytes: 0,
            driver_bytes: None,
            losses: Vec::new(),
            checkpoints: None,
            peers: Vec::new(),
        };
        let ceilings = Ceilings {
            bytes_per_second: 4e12,
            flops_per_second: 659.6e12,
            copy_bytes: 0,
            product_size: 0,
        };
        // 494.7 TFLOP/s: half of the datasheet's 989.4, three quarters of what the product reached.
        let value = |gpu: &str, what: &str| {
            let rows = measured.rows(gpu, &ceilings);
            let row = rows.into_iter().find(|row| row.name == format!("train-none {what}"))?;
            Some((row.ours * 1e6).round() / 1e6)
        };
        assert_eq!(value("NVIDIA H200", "MFU"), Some(50.0));
        assert_eq!(value("NVIDIA H200", "share of measured product rate"), Some(75.0));
        assert_eq!(value("another", "MFU"), None);
        assert_eq!(value("another", "share of measured product rate"), Some(75.0));
    }
}
