//! Nearest resize of images and feature maps.
//!
//! [`resize_nearest`]: `[batch, height, width, channels]` to another height and width, in f32 or bf16. Output row `i` takes
//! source row `min(⌊i · ratio⌋, source − 1)`, where `ratio = source / output` and the product are rounded to f32; columns
//! alike. This is the rule of PyTorch's `interpolate(mode="nearest")`, whose roundings are part of it.

mod backward;

pub use backward::resize_nearest_backward;

use rayon::prelude::*;

use super::grid;
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Bytes that a CUDA thread moves at a time where it can.
const VECTOR_BYTES: usize = 16;

/// How one axis of a grid is seen through a nearest resize.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NearestAxis {
    source: usize,
    /// Source over output extent.
    pub ratio: f32,
}

impl NearestAxis {
    pub fn new(source: usize, output: usize) -> Self {
        NearestAxis {
            source,
            ratio: source as f32 / output as f32,
        }
    }

    /// The source index that stands at `index` of the output.
    pub fn index(&self, index: usize) -> usize {
        ((index as f32 * self.ratio) as usize).min(self.source - 1)
    }
}

/// `x` at another height and width; see the module's head comment.
///
/// # Errors
/// When `x` is no image or an extent is 0.
pub fn resize_nearest(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    const OP: &str = "resize_nearest";
    x.ensure_rank(OP, "x", 4, "[batch, height, width, channels]")?;
    if !matches!(x.dtype(), DType::F32 | DType::Bf16) {
        x.ensure_dtype(OP, "x", x.device().compute_dtype())?;
    }
    if [x.dim(1), x.dim(2), height, width].contains(&0) {
        return Err(Error::invalid(format!(
            "{OP}: cannot resize {}x{} to {height}x{width}",
            x.dim(1),
            x.dim(2)
        )));
    }
    let mut y = Tensor::empty(&x.device(), [x.dim(0), height, width, x.dim(3)], x.dtype())?;
    let _op = crate::profile::op(OP, x, 0, x.bytes() + y.bytes());
    let axes = [NearestAxis::new(x.dim(1), height), NearestAxis::new(x.dim(2), width)];
    match x.cuda() {
        None => cpu_resize(x, axes, &mut y)?,
        Some(device) => cuda_resize(device, x, axes, &mut y)?,
    }
    Ok(y)
}

fn cpu_resize(x: &Tensor, [rows, columns]: [NearestAxis; 2], y: &mut Tensor) -> Result<()> {
    let (height, width, channels) = (y.dim(1), y.dim(2), y.dim(3));
    if channels == 0 {
        return Ok(());
    }
    let source = x.as_slice::<f32>()?;
    let outputs = y.as_mut_slice::<f32>()?.par_chunks_mut(width * channels);
    outputs.enumerate().for_each(|(row, output)| {
        let source_row = row / height * rows.source + rows.index(row % height);
        for (column, output) in output.chunks_mut(channels).enumerate() {
            let start = (source_row * columns.source + columns.index(column)) * channels;
            output.copy_from_slice(&source[start..start + channels]);
        }
    });
    Ok(())
}

fn cuda_resize(device: &CudaDevice, x: &Tensor, [rows, columns]: [NearestAxis; 2], y: &mut Tensor) -> Result<()> {
    const OP: &str = "resize_nearest";
    let (height, width, channels) = (y.dim(1), y.dim(2), y.dim(3));
    let name = match x.dtype() {
        _ if (channels * x.dtype().size()).is_multiple_of(VECTOR_BYTES) => "resize_nearest_vectors",
        DType::Bf16 => "resize_nearest_bf16",
        _ => "resize_nearest_f32",
    };
    let kernel = device.kernel("resize", name)?;
    let units = channels * x.dtype().size() / kernel.info().tile[0].max(1) as usize;
    let blocks_per_row = (width * units).div_ceil(kernel.info().threads.max(1) as usize);
    let blocks = [grid(OP, y.dim(0) * height)?, grid(OP, blocks_per_row)?, 1];
    let args = Args::new()
        .input(x)?
        .output(y)?
        .int(rows.source)
        .int(columns.source)
        .int(height)
        .int(width)
        .int(units)
        .float(rows.ratio)
        .float(columns.ratio);
    // SAFETY: the arguments are those of the `resize_nearest` kernels; `units` counts the kernel's own unit, which divides a
    // pixel's bytes, so that both images are that many units wide; one block per row and `threads` units of it.
    unsafe { kernel.launch(device, blocks, args) }
}
