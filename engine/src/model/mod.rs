//! Models, made of operations: written once, for every device.

pub mod config;
pub mod denoiser;
pub mod detailer;
pub mod families;
pub mod family;
pub mod flux2;
pub mod language;
pub mod limits;
pub mod memory;
pub mod objective;
pub mod precision;
pub mod rope;
pub mod spec;
pub mod text;
pub mod time_embedder;
pub mod vae;
pub mod work;
pub mod zimage;

pub use denoiser::{Denoiser, Modulations, Prepared, Trainable};
pub use limits::DeviceLimits;
pub use precision::Precision;
pub use spec::Spec;

#[cfg(test)]
pub(crate) mod plain;
