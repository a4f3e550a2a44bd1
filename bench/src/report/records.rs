//! The records of one GPU.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use l2p_engine::ceilings::Ceilings;
use serde::Deserialize;

use super::data::{Serving, Synthesis};
use super::klein::Gradients;
use crate::environment::Environment;
use crate::record::{Record, Row};
use crate::targets::{self, Targets};
use crate::train;

/// The record of `bench/peers/parity.py`.
#[derive(Clone, Debug, Deserialize)]
pub struct Parity {
    /// Where and when.
    #[serde(flatten)]
    pub environment: Environment,
    /// By component.
    pub rows: Vec<ParityRow>,
}

/// One component at its published size.
#[derive(Clone, Debug, Deserialize)]
pub struct ParityRow {
    /// Its name.
    pub component: String,
    /// PyTorch's own bf16 error.
    pub torch_bf16_error: f64,
    /// Milliseconds.
    pub torch_ms: f64,
    /// Bytes.
    pub torch_peak_bytes: Option<u64>,
    /// Our error; `None` when it failed.
    pub ours_error: Option<f64>,
    /// Our error over PyTorch's.
    pub ratio: Option<f64>,
    /// Milliseconds.
    pub ours_ms: Option<f64>,
    /// Bytes.
    pub ours_peak_bytes: Option<u64>,
    /// The same with the weights of blocks in eight bits, by how they are kept.
    #[serde(default)]
    pub weights: BTreeMap<String, ParityWeights>,
}

/// A component with the weights of its blocks in eight bits.
#[derive(Clone, Debug, Deserialize)]
pub struct ParityWeights {
    /// Our error.
    pub error: f64,
    /// Our error over PyTorch's bf16 error.
    pub ratio: f64,
    /// Milliseconds.
    pub ms: f64,
    /// Bytes.
    pub peak_bytes: u64,
}

/// What there is about one GPU.
#[derive(Debug)]
pub struct Gpu {
    /// The folder's name.
    pub folder: String,
    /// The comparison with PyTorch.
    pub parity: Option<Parity>,
    /// The target table.
    pub targets: Option<Targets>,
    /// The target table of weights in eight bits and in host memory.
    pub eight_bit: Option<Targets>,
    /// The comparison with PyTorch with weights in eight bits.
    pub eight_bit_parity: Option<Parity>,
    /// Training steps beside PyTorch's.
    pub training: Option<train::record::Record>,
    /// A set of pictures beside diffusers.
    pub synthesis: Option<Synthesis>,
    /// A server under load.
    pub serving: Option<Serving>,
    /// Gradients of the second source's pixel model.
    pub klein_gradients: Option<Gradients>,
    /// Records of single benchmarks, those of the target table's parts among them, the newest last.
    pub records: Vec<Record>,
}

impl Gpu {
    /// Reads all records of the folder.
    ///
    /// # Errors
    /// When a file cannot be read or is no record.
    fn read(path: &Path) -> anyhow::Result<Self> {
        let folder = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (mut parity, mut table, mut training, mut records) = (None, None, None, Vec::new());
        let (mut eight_bit, mut eight_bit_parity) = (None, None);
        let (mut synthesis, mut serving, mut klein_gradients) = (None, None, None);
        for path in entries(path)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match name.as_str() {
                "parity.json" => parity = Some(read(&path)?),
                targets::FILE => table = Some(Targets::read(&path)?),
                "eight-bit-parity.json" => eight_bit_parity = Some(read(&path)?),
                targets::EIGHT_BIT_FILE => eight_bit = Some(Targets::read(&path)?),
                "train.json" => training = Some(train::record::Record::read(&path)?),
                "klein-grad.json" => klein_gradients = Some(read(&path)?),
                "data.json" => synthesis = Some(Synthesis::read(&path)?),
                "serve.json" => serving = Some(Serving::read(&path)?),
                // Of every gradient: too long for the README.
                "grad.json" => {}
                // Between ranks and beside training: shown in other pages (scripts/record-tables).
                "ranks.json" | "faults.json" | "checkpoints.json" => {}
                name if name.starts_with("train-") => {}
                name if name.ends_with(".json") => records.push(Record::read(&path)?),
                _ => {}
            }
        }
        if let Some(table) = &table {
            records.extend(table.measurements.values().cloned());
        }
        records.sort_by(|a, b| a.environment.date.cmp(&b.environment.date));
        Ok(Gpu {
            folder,
            parity,
            targets: table,
            eight_bit,
            eight_bit_parity,
            training,
            synthesis,
            serving,
            klein_gradients,
            records,
        })
    }

    /// The newest row of that name.
    pub fn row(&self, name: &str) -> Option<&Row> {
        self.records.iter().rev().find_map(|record| record.row(name))
    }

    /// The newest rows, each once, of the benchmarks of this name.
    pub fn rows_of(&self, bench: &str) -> Vec<&Row> {
        let mut rows: Vec<&Row> = Vec::new();
        for record in self.records.iter().rev().filter(|record| record.bench == bench) {
            for row in &record.rows {
                if rows.iter().all(|known| known.name != row.name) {
                    rows.push(row);
                }
            }
        }
        rows
    }

    /// The ceilings of the newest record, and where it was made.
    pub fn newest(&self) -> Option<(&Ceilings, &Environment)> {
        let record = self.records.last()?;
        Some((&record.ceilings, &record.environment))
    }
}

/// All GPUs with a folder under `results`, by name.
///
/// # Errors
/// When a file cannot be read or is no record.
pub fn read_all(results: &Path) -> anyhow::Result<Vec<Gpu>> {
    let folders = entries(results)?.into_iter().filter(|path| path.is_dir());
    folders.map(|folder| Gpu::read(&folder)).collect()
}

fn entries(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let cannot = || format!("cannot read {}", folder.display());
    let mut paths = std::fs::read_dir(folder)
        .with_context(cannot)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .with_context(cannot)?;
    paths.sort();
    Ok(paths)
}

pub(super) fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> anyhow::Result<T> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is no record of this kind", path.display()))
}
