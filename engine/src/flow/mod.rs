//! What turns a model into a sampler: noise, levels, solvers.

mod aside;
pub mod held;
pub mod noise_source;
pub mod sampler;
pub mod schedule;
pub mod solver;
#[cfg(test)]
mod tests;
mod torch_rng;
mod walk;

pub use torch_rng::{MersenneTwister, TorchNormal};
