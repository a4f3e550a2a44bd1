//! Flow matching: what turns a velocity model into a sampler.

pub mod held;
pub mod noise_source;
pub mod sampler;
pub mod schedule;
mod torch_rng;
mod walk;

pub use torch_rng::{MersenneTwister, TorchNormal};
