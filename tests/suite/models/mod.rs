//! Models against the reference library, and their CUDA runs against the CPU's.

mod detailer;
mod text;
mod vae;

use half::bf16;
use l2p_engine::model::params::MemoryParams;
use l2p_engine::{Device, Result, Tensor};
use l2p_tests::Suite;
use l2p_tests::fixtures::Case;

pub fn register(suite: &mut Suite) {
    detailer::register(suite);
    text::register(suite);
    vae::register(suite);
}

/// The weights of a case.
fn params(case: &Case<'_>) -> MemoryParams {
    MemoryParams(case.weights().into_iter().collect())
}

/// The same, rounded to what bf16 can hold, so that CPU and CUDA start from the same numbers.
fn rounded_params(case: &Case<'_>) -> MemoryParams {
    let mut params = params(case);
    params.0.values_mut().for_each(|(_, values)| *values = rounded(values));
    params
}

fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&value| bf16::from_f32(value).to_f32()).collect()
}

/// Reorders `[batch, channels, height, width]` into `[batch, height, width, channels]`.
fn channels_last(values: &[f32], shape: &[usize]) -> (Vec<f32>, [usize; 4]) {
    let [batch, channels, height, width] = shape[..] else {
        panic!("{shape:?} is no image");
    };
    (
        transpose_items(values, channels, height * width),
        [batch, height, width, channels],
    )
}

/// Reorders an image `[batch, height, width, channels]` into `[batch, channels, height, width]`.
fn channels_first(image: &Tensor) -> Result<Vec<f32>> {
    Ok(transpose_items(
        &image.to_vec_f32()?,
        image.dim(1) * image.dim(2),
        image.dim(3),
    ))
}

/// Transposes each `[rows, columns]` of a batch.
fn transpose_items(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let items = values.chunks(rows * columns);
    items
        .flat_map(|item| (0..rows * columns).map(|index| item[index % rows * columns + index / rows]))
        .collect()
}

/// An input of a case as an image on the CPU.
fn input_image(case: &Case<'_>, name: &str) -> Result<Tensor> {
    let (values, shape) = case.input(name);
    let (values, shape) = channels_last(&values, &shape);
    Tensor::from_slice(&Device::Cpu, &values, shape)
}
