//! Models, made of operations: written once, for every device.

pub mod detailer;
pub mod params;
pub mod vae;
