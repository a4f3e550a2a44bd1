//! The README's table about FLUX.2 [klein] and the pixel models that are made of it.

use serde::Deserialize;

use super::records::Gpu;
use super::{LARGEST_RATIO, place, rows_of_targets};
use crate::environment::Environment;
use crate::targets::{Bound, Pair, TargetRow};

/// The record of `bench/peers/train.py --family klein`.
#[derive(Clone, Debug, Deserialize)]
pub struct Gradients {
    /// Where and when.
    #[serde(flatten)]
    pub environment: Environment,
    policy: String,
    rows: Vec<Requirement>,
}

#[derive(Clone, Debug, Deserialize)]
struct Requirement {
    name: String,
    ours: f64,
    peer: f64,
}

impl Gradients {
    /// What counts for all of them together.
    fn rows(&self) -> Vec<TargetRow> {
        let together = self.rows.iter().filter(|row| row.name == "gradients together");
        together
            .map(|row| {
                let pair = Pair {
                    ours: row.ours * 1e3,
                    peer: Some(("PyTorch in bf16".to_owned(), row.peer * 1e3)),
                };
                let name = format!("gradients of klein-pixel-1k, policy {}: error against f32", self.policy);
                TargetRow::ratio(name, "‰", pair, Bound::AtMost(LARGEST_RATIO))
            })
            .collect()
    }
}

/// The models whose steps are shown.
const MODELS: [&str; 4] = ["klein-pixel-1k", "klein-pixel-4k", "klein-latent-1k", "klein-latent-4k"];

/// The table of a GPU; empty without records.
pub fn table(gpu: &Gpu) -> String {
    let step = |name: &&str| {
        let row = gpu.row(name)?;
        let peer = row.best_peer();
        let pair = Pair {
            ours: row.timing.milliseconds,
            peer: peer.map(|peer| (format!("diffusers, {}", peer.name), peer.timing.milliseconds)),
        };
        let row = TargetRow::ratio(format!("{name} step"), "ms", pair, Bound::AtMost(0.85));
        // The target is about the compiled peer; without it the row tells the ratio alone.
        let compiled = row.against.as_ref().is_some_and(|peer| peer.contains("compiled"));
        Some(TargetRow {
            target: if compiled { row.target } else { String::new() },
            ..row
        })
    };
    let mut rows: Vec<TargetRow> = MODELS.iter().filter_map(step).collect();
    rows.extend(gpu.klein_gradients.iter().flat_map(Gradients::rows));
    let of_step = gpu
        .records
        .iter()
        .rev()
        .find(|record| MODELS.iter().any(|name| record.row(name).is_some()));
    let environment = of_step
        .map(|record| &record.environment)
        .or(gpu.klein_gradients.as_ref().map(|gradients| &gradients.environment));
    match environment {
        Some(environment) => format!("\n{}:\n\n{}\n", place(environment), rows_of_targets(&rows)),
        None => String::new(),
    }
}
