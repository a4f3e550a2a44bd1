//! Flow matching: what turns a velocity model into a sampler.

mod torch_rng;

pub use torch_rng::TorchNormal;
