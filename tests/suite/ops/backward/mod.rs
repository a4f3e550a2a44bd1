//! Gradients of single operations: against torch autograd, against central differences, and on CUDA against the CPU. Those of
//! attention and of convolutions have files of their own.

mod cuda;
mod differences;
mod fixtures;
mod mistakes;

use l2p_engine::ops::Modulation;
use l2p_engine::{DType, Device, Result, Tensor};
use l2p_tests::{Suite, hash_uniform, random_bf16};

pub fn register(suite: &mut Suite) {
    cuda::register(suite);
    differences::register(suite);
    fixtures::register(suite);
    mistakes::register(suite);
}

const EPSILON: f32 = 1e-5;

/// A tensor in the compute type with deterministic values of about unit variance that bf16 holds.
fn tensor(device: &Device, name: &str, shape: &[usize]) -> Result<Tensor> {
    Tensor::from_f32(device, &random_bf16(name, shape.iter().product()), shape)
}

/// A table of modulation vectors, f32, in [−½, ½).
fn table(device: &Device, shape: [usize; 3]) -> Result<Tensor> {
    let values: Vec<f32> = hash_uniform("table", shape.iter().product())
        .into_iter()
        .map(|value| value / 2.0)
        .collect();
    Tensor::from_slice(device, &values, shape)
}

fn vector(table: &Tensor, index: usize) -> Result<Option<Modulation<'_>>> {
    Modulation::new(table, index).map(Some)
}

/// A place for a gradient that holds something already, in the compute type.
fn begun(device: &Device, shape: &[usize]) -> Result<Tensor> {
    tensor(device, "begun", shape)
}

/// A table of gradients that is to be overwritten.
fn gradients(device: &Device, shape: [usize; 3]) -> Result<Tensor> {
    Tensor::empty(device, shape, DType::F32)
}
