//! Model files: safetensors and their checks, the layouts met in the wild and their detection, models made from others,
//! and writing.
//!
//! [`ModelPaths`] finds a model's parts, [`Transformer`] is a transformer that was checked to be whole, [`Checkpoint`] its
//! tensors. Detection is by content: names and shapes decide, file names never do.

mod audit;
mod eight_bit;
mod elements;
mod encoded;
mod estimate;
mod export;
mod file;
mod finite;
mod header;
mod hub;
mod init;
mod inspect;
mod layer;
mod manifest;
mod names;
mod params;
mod parts;
mod paths;
mod random;
mod set;
mod shards;
mod stored;
mod values;
mod write;

pub use audit::{Audit, Transformer, WrongShape, is_delta, is_whole, missing_parts};
pub use eight_bit::{
    EightBit, EightBitFormat, EightBitKind, LayerError, QuantiseOptions, QuantisePlan, ScaleName, quantise,
};
pub use elements::Float;
pub use estimate::{EstimateInput, MemoryEstimate, SamplingMemory, TrainingMemory};
pub use export::{ExportOptions, ensure_found_again, export};
pub use file::SafetensorsFile;
pub use finite::NotFinite;
pub use header::StoredTensor;
pub use init::{InitOptions, InitPlan, init, scratch};
pub use inspect::{Inspection, PartReport, Resolution, TypeCount, inspect};
pub use manifest::{Defaults, MANIFEST, MANIFEST_FORMAT, Manifest, OneOrMany};
pub use names::Prefix;
pub use parts::{open_text_encoder, open_vae};
pub use paths::{Container, ModelPaths, PathOverrides};
pub use random::UniformInit;
pub use set::{Checkpoint, Layout};
pub use stored::CheckpointTensor;
pub use values::{Values, read_chosen_values, read_values, write_values};
pub use write::{
    Content, Fetch, OutputFile, OutputTensor, WriteObserver, Written, ensure_free, ensure_writable, write_file,
    write_folder,
};
