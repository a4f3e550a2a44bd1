//! The convolution that halves an autoencoder's images.
//!
//! [`downsample_conv3x3`]: `y[i, j] = bias + Σ weight[a, b] · x[2i + a, 2j + b]` for a, b = 0 … 2 over all input channels, x being
//! zero beyond its last row and column; an odd last row or column only appears as a neighbour. Shapes and types are those of
//! [`super::conv`]: x `[batch, height, width, inputs]`, weight `[outputs, 9 · inputs]`, result `[batch, ⌊height / 2⌋,
//! ⌊width / 2⌋, outputs]`.
//!
//! The neighbourhoods are gathered into rows, whose product with the weights is the result: the rows are 9/4 of the image, which
//! suits the few downsamplings of an autoencoder and nothing that runs in a step. On CUDA inputs and outputs are multiples
//! of 8. Source: AutoencoderKL's encoder, which pads right and below only.

use rayon::prelude::*;

use super::linear::linear;
use super::{ensure_parameter, grid};
use crate::device::{Args, CudaDevice};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Rows and columns of the kernel.
const KERNEL: usize = 3;

/// Elements that a CUDA thread moves at a time.
const VECTOR: usize = 8;

/// The halved image; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit, or the device has no room.
pub fn downsample_conv3x3(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    const OP: &str = "downsample_conv3x3";
    x.ensure_rank(OP, "x", 4, "[batch, height, width, channels]")?;
    x.ensure_dtype(OP, "x", x.device().compute_dtype())?;
    let [batch, height, width, channels] = [x.dim(0), x.dim(1), x.dim(2), x.dim(3)];
    if height < 2 || width < 2 {
        return Err(Error::invalid(format!(
            "{OP}: an image of {width}x{height} cannot be halved"
        )));
    }
    weight.ensure_rank(OP, "weight", 2, "[outputs, 9 * inputs]")?;
    let outputs = weight.dim(0);
    ensure_parameter(OP, "weight", weight, &[outputs, KERNEL * KERNEL * channels], x)?;
    ensure_parameter(OP, "bias", bias, &[outputs], x)?;
    let (rows, columns) = (height / 2, width / 2);
    let mut gathered = Tensor::empty_compute(&x.device(), [batch, rows * columns, KERNEL * KERNEL * channels])?;
    match x.cuda() {
        None => cpu_gather(x, &mut gathered)?,
        Some(device) => cuda_gather(OP, device, x, &mut gathered)?,
    }
    linear(&gathered, weight, Some(bias))?.into_shape([batch, rows, columns, outputs])
}

fn cpu_gather(x: &Tensor, gathered: &mut Tensor) -> Result<()> {
    let [height, width, channels] = [x.dim(1), x.dim(2), x.dim(3)];
    let (rows, columns) = (height / 2, width / 2);
    let source = x.as_slice::<f32>()?;
    let taps = KERNEL * KERNEL * channels;
    let lines = gathered.as_mut_slice::<f32>()?.par_chunks_mut((columns * taps).max(1));
    lines.enumerate().for_each(|(line, output)| {
        let (item, row) = (line / rows, line % rows);
        for (column, output) in output.chunks_mut(taps).enumerate() {
            for (tap, output) in output.chunks_mut(channels).enumerate() {
                let (y, x) = (2 * row + tap / KERNEL, 2 * column + tap % KERNEL);
                match y < height && x < width {
                    true => {
                        let start = ((item * height + y) * width + x) * channels;
                        output.copy_from_slice(&source[start..start + channels]);
                    }
                    false => output.fill(0.0),
                }
            }
        }
    });
    Ok(())
}

fn cuda_gather(op: &'static str, device: &CudaDevice, x: &Tensor, gathered: &mut Tensor) -> Result<()> {
    let [batch, height, width, channels] = [x.dim(0), x.dim(1), x.dim(2), x.dim(3)];
    if !channels.is_multiple_of(VECTOR) {
        return Err(Error::invalid(format!(
            "{op}: the CUDA kernel takes a multiple of {VECTOR} channels, not {channels}"
        )));
    }
    let kernel = device.kernel("downsample_conv", "gather_3x3_stride_2")?;
    let vectors = width / 2 * KERNEL * KERNEL * channels / VECTOR;
    let blocks = vectors.div_ceil(kernel.info().threads.max(1) as usize);
    let args = Args::new()
        .input(x)?
        .output(gathered)?
        .int(height)
        .int(width)
        .int(channels / VECTOR);
    // SAFETY: the arguments are those of `gather_3x3_stride_2`; x holds `batch` images of the extents it is told, the output nine
    // pixels for each of a quarter of theirs; the grid has one row of blocks for each output row.
    unsafe { kernel.launch(device, [grid(op, batch * (height / 2))?, grid(op, blocks)?, 1], args) }
}
