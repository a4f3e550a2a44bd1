//! Training: which tensors change, how, and at what cost.
//!
//! [`TrainableModel`] owns a model with the gradients and the optimizer state of the tensors that its [`Policy`] trains.
//! One optimizer step is any number of [`TrainableModel::accumulate`], the last of them [`TrainableModel::accumulate_last`], and one
//! [`TrainableModel::step`]; none waits for the device. Several [`Ranks`] may share the work. [`TrainingPlan`] tells what a run will hold and compute before anything is allocated.

mod adamw;
mod copying;
mod exchange;
mod plan;
mod policy;
mod read_ahead;
pub mod run;
mod snapshot;
mod source;
mod trainable;

use crate::model::Precision;

pub use adamw::{AdamW, Place, StateArray};
pub use exchange::{BUCKET_BYTES, Division, Ranks, Sharding};
pub use plan::{Arithmetic, PlanInput, PlannedMemory, TrainingPlan};
pub use policy::{DEFAULT_ENDS, Policy, Recompute};
pub use snapshot::{Snapshot, SnapshotMemory};
pub use source::{StatePart, StateSlice, StateSource, StateTensor, TrainedTensor};
pub use trainable::{Batch, StepNorm, TrainableModel};

/// The settings of AdamW but the learning rate, which may change from step to step.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct AdamWOptions {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// The part of a weight, times the learning rate, that each step takes away.
    pub weight_decay: f32,
}

impl Default for AdamWOptions {
    /// The published recipe.
    fn default() -> Self {
        AdamWOptions {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
        }
    }
}

/// What is trained, and how.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct TrainOptions {
    /// Which tensors are trained.
    pub policy: Policy,
    /// Which blocks are computed twice.
    pub recompute: Recompute,
    /// The optimizer.
    pub adamw: AdamWOptions,
    /// Gradients are scaled down to this norm, over all trained tensors together, where theirs is larger.
    pub clip_norm: Option<f32>,
    /// The decay of the average of the trained weights, if one is kept.
    pub ema_decay: Option<f32>,
    /// How the weights of main blocks that are not trained are kept.
    #[serde(serialize_with = "shown")]
    pub trunk: Precision,
}

fn shown<S: serde::Serializer>(trunk: &Precision, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(trunk)
}
