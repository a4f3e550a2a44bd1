//! Models, made of operations: written once, for every device.

pub mod config;
pub mod detailer;
pub mod limits;
pub mod rope;
pub mod text;
pub mod vae;
pub mod zimage;

pub use limits::DeviceLimits;
