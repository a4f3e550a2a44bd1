//! Models against the reference library, and their CUDA runs against the CPU's.

mod block;
mod detailer;
pub mod dit;
mod eight_bit;
mod flux2;
mod language;
mod limits;
mod rope;
mod text;
mod vae;

use half::bf16;
use l2p_engine::layers::MemoryParams;
use l2p_engine::model::Spec;
use l2p_engine::model::config::ModelKind;
use l2p_engine::model::detailer::DetailerLayout;
use l2p_engine::model::zimage::{DitConfig, ZImage};
use l2p_engine::{Device, Result, Tensor};
use l2p_tests::Suite;
use l2p_tests::fixtures::{Case, generated_weight};

pub fn register(suite: &mut Suite) {
    block::register(suite);
    detailer::register(suite);
    dit::register(suite);
    eight_bit::register(suite);
    flux2::register(suite);
    language::register(suite);
    limits::register(suite);
    rope::register(suite);
    text::register(suite);
    vae::register(suite);
}

/// The sizes of the fixtures' small transformers: two blocks, one refiner of each kind, heads of 128.
pub fn small_config(kind: ModelKind, dim: usize, patch: usize) -> DitConfig {
    DitConfig {
        kind,
        dim,
        heads: dim / 128,
        head_dim: 128,
        layers: 2,
        refiner_layers: 1,
        ffn_hidden: dim * 8 / 3,
        caption_width: 96,
        patch,
        in_channels: match kind {
            ModelKind::Latent => 16,
            ModelKind::Pixel => 3,
        },
        rope_theta: 256.0,
        axes_dims: [32, 48, 48],
        norm_eps: 1e-5,
        t_scale: 1000.0,
        t_frequencies: 256,
        t_hidden: 1024,
        adaln_width: 256,
    }
}

/// The parameters of a model of these sizes, by the fixtures' rules and rounded to what bf16 can hold; a pixel model's head
/// has the given widths.
pub fn random_model(config: &DitConfig, head_widths: &[usize]) -> MemoryParams {
    let head = || DetailerLayout::for_patch(config.patch, Some(head_widths), Some(32), config.dim);
    let spec = ZImage {
        config: config.clone(),
        head: (config.kind == ModelKind::Pixel).then(|| head().expect("the widths are as many as the stages")),
    };
    let generated = spec.tensors().into_iter().map(|(name, shape)| {
        let values = rounded(&generated_weight(&name, &shape, 0));
        (name, (shape, values))
    });
    MemoryParams(generated.collect())
}

/// The weights of a case.
pub fn params(case: &Case<'_>) -> MemoryParams {
    MemoryParams(case.weights().into_iter().collect())
}

/// The same, rounded to what bf16 can hold, so that CPU and CUDA start from the same numbers.
pub fn rounded_params(case: &Case<'_>) -> MemoryParams {
    let mut params = params(case);
    params.0.values_mut().for_each(|(_, values)| *values = rounded(values));
    params
}

pub fn rounded(values: &[f32]) -> Vec<f32> {
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
pub fn channels_first(image: &Tensor) -> Result<Vec<f32>> {
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
pub fn input_image(case: &Case<'_>, name: &str) -> Result<Tensor> {
    let (values, shape) = case.input(name);
    let (values, shape) = channels_last(&values, &shape);
    Tensor::from_slice(&Device::Cpu, &values, shape)
}
