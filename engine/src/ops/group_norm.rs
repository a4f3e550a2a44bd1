//! Group normalisation of images, optionally with SiLU.
//!
//! [`group_norm`], and [`group_norm_in_place`] where memory is short: for `x` `[batch, height, width, channels]` whose channels fall into `groups` equal runs,
//! `y = (x − mean) / sqrt(variance + ε) · weight + bias`, then `y · sigmoid(y)` where asked for. Mean and (biased) variance are
//! those of all pixels of the run in one batch item. Weight and bias `[channels]`. Statistics are f32 or better whatever the
//! storage; the same input gives the same bits. On CUDA `channels` is a multiple of 8 and at most 2048. Source: Wu and He,
//! "Group Normalization" (2018).

use rayon::prelude::*;

use super::conv::Activation;
use super::elementwise::silu_scalar;
use super::{ensure_parameter, grid};
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The normalisation's parameters.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    /// Factor per channel.
    pub weight: Tensor,
    /// Offset per channel.
    pub bias: Tensor,
    /// Runs of channels with statistics of their own.
    pub groups: usize,
    /// Added to the variance.
    pub epsilon: f32,
}

/// What the kernels and loops need to know of the input.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    /// Per item.
    pixels: usize,
    channels: usize,
    groups: usize,
}

/// The group normalisation of `x`, activated; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn group_norm(x: &Tensor, norm: &GroupNorm, activation: Activation) -> Result<Tensor> {
    let sizes = expect(x, norm)?;
    let mut y = Tensor::empty(&x.device(), x.shape(), x.dtype())?;
    if x.elements() == 0 {
        return Ok(y);
    }
    let _op = crate::profile::op("group_norm", x, 0, 2 * x.bytes());
    match x.cuda() {
        None => {
            let factors = cpu_factors(x.as_slice()?, norm, sizes)?;
            y.as_mut_slice::<f32>()?.copy_from_slice(x.as_slice()?);
            cpu_apply(y.as_mut_slice()?, &factors, activation, sizes);
        }
        Some(device) => {
            let factors = cuda_factors(device, x, norm, sizes)?;
            cuda_apply(device, &factors, activation, sizes, Args::new().input(x)?, &mut y)?;
        }
    }
    Ok(y)
}

/// The same in place of `x`, which must be the only tensor on its buffer.
///
/// # Errors
/// When shapes, types or devices do not fit, or the buffer is shared.
pub fn group_norm_in_place(x: &mut Tensor, norm: &GroupNorm, activation: Activation) -> Result<()> {
    let sizes = expect(x, norm)?;
    if x.elements() == 0 {
        return Ok(());
    }
    let _op = crate::profile::op("group_norm", x, 0, 2 * x.bytes());
    match x.cuda().cloned() {
        None => {
            let factors = cpu_factors(x.as_slice()?, norm, sizes)?;
            cpu_apply(x.as_mut_slice()?, &factors, activation, sizes);
            Ok(())
        }
        Some(device) => {
            let factors = cuda_factors(&device, x, norm, sizes)?;
            cuda_apply(&device, &factors, activation, sizes, Args::new().input(x)?, x)
        }
    }
}

fn expect(x: &Tensor, norm: &GroupNorm) -> Result<Sizes> {
    const OP: &str = "group_norm";
    x.ensure_rank(OP, "x", 4, "[batch, height, width, channels]")?;
    x.ensure_dtype(OP, "x", x.device().compute_dtype())?;
    let sizes = Sizes {
        batch: x.dim(0),
        pixels: x.dim(1) * x.dim(2),
        channels: x.dim(3),
        groups: norm.groups,
    };
    if norm.groups == 0 || sizes.channels == 0 || !sizes.channels.is_multiple_of(norm.groups) {
        return Err(Error::invalid(format!(
            "{OP}: {} channels do not fall into {} equal groups",
            sizes.channels, norm.groups
        )));
    }
    ensure_parameter(OP, "weight", &norm.weight, &[sizes.channels], x)?;
    ensure_parameter(OP, "bias", &norm.bias, &[sizes.channels], x)?;
    Ok(sizes)
}

/// Pixels whose sums one task takes on the CPU; a fixed number, so that sums do not depend on the number of threads.
const CPU_SLAB: usize = 1024;

/// Factor and offset of each channel of each item.
fn cpu_factors(x: &[f32], norm: &GroupNorm, sizes: Sizes) -> Result<Vec<(f32, f32)>> {
    let (weight, bias) = (norm.weight.as_slice::<f32>()?, norm.bias.as_slice::<f32>()?);
    let width = sizes.channels / sizes.groups;
    let count = (sizes.pixels * width) as f64;
    let mut factors = Vec::with_capacity(sizes.batch * sizes.channels);
    for x in x.chunks(sizes.pixels * sizes.channels) {
        let mean: Vec<f64> = group_sums(x, sizes, |value, _| value)
            .iter()
            .map(|sum| sum / count)
            .collect();
        let squares = group_sums(x, sizes, |value, group| (value - mean[group]).powi(2));
        factors.extend((0..sizes.channels).map(|channel| {
            let group = channel / width;
            let inverse = 1.0 / (squares[group] / count + f64::from(norm.epsilon)).sqrt();
            let factor = inverse * f64::from(weight[channel]);
            (factor as f32, (f64::from(bias[channel]) - mean[group] * factor) as f32)
        }));
    }
    Ok(factors)
}

fn cpu_apply(x: &mut [f32], factors: &[(f32, f32)], activation: Activation, sizes: Sizes) {
    let items = x.chunks_mut(sizes.pixels * sizes.channels);
    for (x, factors) in items.zip(factors.chunks(sizes.channels)) {
        x.par_chunks_mut(sizes.channels).for_each(|x| {
            for (x, (factor, offset)) in x.iter_mut().zip(factors) {
                let value = *x * factor + offset;
                *x = match activation {
                    Activation::None => value,
                    Activation::Silu => silu_scalar(value),
                };
            }
        });
    }
}

/// For each group of one item the sum of `term(value, group)`, in f64 and in a fixed order.
fn group_sums(x: &[f32], sizes: Sizes, term: impl Fn(f64, usize) -> f64 + Sync) -> Vec<f64> {
    let width = sizes.channels / sizes.groups;
    let partial: Vec<Vec<f64>> = x
        .par_chunks(CPU_SLAB * sizes.channels)
        .map(|slab| {
            let mut sums = vec![0.0; sizes.groups];
            for pixel in slab.chunks(sizes.channels) {
                for (group, (sum, values)) in sums.iter_mut().zip(pixel.chunks(width)).enumerate() {
                    *sum += values.iter().map(|&value| term(f64::from(value), group)).sum::<f64>();
                }
            }
            sums
        })
        .collect();
    let mut sums = vec![0.0; sizes.groups];
    for slab in partial {
        sums.iter_mut().zip(slab).for_each(|(sum, value)| *sum += value);
    }
    sums
}

/// Blocks of an item at most: enough to fill any GPU, few enough that combining their moments costs nothing.
const MAX_BLOCKS: usize = 2048;
/// Pixels that a thread reads at least, so that a block's own sums are worth their reduction.
const LEAST_PIXELS: usize = 8;

/// Blocks of an item, and the pixels that each takes: the same slabs for every device, so that sums are too.
fn slabs(device: &CudaDevice, sizes: Sizes) -> Result<(usize, usize)> {
    let threads = device.kernel("group_norm", "group_norm_moments")?.info().threads as usize;
    let rows = threads / (sizes.channels / 8);
    let slab = sizes.pixels.div_ceil(MAX_BLOCKS).max(rows * LEAST_PIXELS);
    Ok((sizes.pixels.div_ceil(slab), slab))
}

/// f32 `[batch, 2, channels]`: the factor and the offset of each channel.
fn cuda_factors(device: &CudaDevice, x: &Tensor, norm: &GroupNorm, sizes: Sizes) -> Result<Tensor> {
    const OP: &str = "group_norm";
    let moments_kernel = device.kernel("group_norm", "group_norm_moments")?;
    let most_channels = moments_kernel.info().tile[0] as usize;
    if !sizes.channels.is_multiple_of(8) || sizes.channels > most_channels {
        return Err(Error::invalid(format!(
            "{OP}: the CUDA kernels take a multiple of 8 channels up to {most_channels}, not {}",
            sizes.channels
        )));
    }
    let (blocks, slab) = slabs(device, sizes)?;
    let grid = [grid(OP, blocks)?, grid(OP, sizes.batch)?, 1];

    let mut moments = Tensor::empty(&x.device(), [sizes.batch, blocks, sizes.groups, 2], DType::F32)?;
    let args = Args::new()
        .input(x)?
        .output(&mut moments)?
        .long(sizes.pixels as u64)
        .int(sizes.channels)
        .int(sizes.groups)
        .int(slab);
    // SAFETY: the arguments are those of `group_norm_moments`; shapes and types were checked, `moments` has an entry per item,
    // block and group, and the channels fit the kernel's shared memory.
    unsafe { moments_kernel.launch(device, grid, args)? };

    let mut factors = Tensor::empty(&x.device(), [sizes.batch, 2, sizes.channels], DType::F32)?;
    let args = Args::new()
        .input(&moments)?
        .input(&norm.weight)?
        .input(&norm.bias)?
        .output(&mut factors)?
        .long(sizes.pixels as u64)
        .int(sizes.channels)
        .int(slab)
        .int(blocks)
        .float(norm.epsilon);
    let factors_kernel = device.kernel("group_norm", "group_norm_factors")?;
    // SAFETY: the arguments are those of `group_norm_factors`; one block per group and item.
    unsafe { factors_kernel.launch(device, [sizes.groups as u32, grid[1], 1], args)? };
    Ok(factors)
}

/// `source` holds the address of the tensor that is read, which may be `y`.
fn cuda_apply(
    device: &CudaDevice,
    factors: &Tensor,
    activation: Activation,
    sizes: Sizes,
    source: Args,
    y: &mut Tensor,
) -> Result<()> {
    const OP: &str = "group_norm";
    let (blocks, slab) = slabs(device, sizes)?;
    let grid = [grid(OP, blocks)?, grid(OP, sizes.batch)?, 1];
    let args = source
        .input(factors)?
        .output(y)?
        .long(sizes.pixels as u64)
        .int(sizes.channels)
        .int(slab)
        .int(usize::from(activation == Activation::Silu));
    let apply_kernel = device.kernel("group_norm", "group_norm_apply")?;
    // SAFETY: the arguments are those of `group_norm_apply`, on the grid of `group_norm_moments`; a thread reads each element
    // before it writes it, so that both may be the same.
    unsafe { apply_kernel.launch(device, grid, args) }
}
