//! Models, made of operations: written once, for every device.

pub mod block;
pub mod config;
pub mod detailer;
pub mod dit;
pub mod limits;
pub mod parameters;
pub mod params;
pub mod rope;
pub mod text;
pub mod vae;

pub use limits::DeviceLimits;
pub use params::{MemoryParams, ParamSource};
