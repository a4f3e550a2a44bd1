//! Models, made of operations: written once, for every device.

pub mod config;
pub mod params;

pub use params::{MemoryParams, ParamSource};
