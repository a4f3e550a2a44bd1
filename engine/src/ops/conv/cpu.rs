//! The loops that define convolutions, on the CPU.

use rayon::prelude::*;

use super::super::elementwise::silu_scalar;
use super::super::linear::{Matrix, cpu_matmul};
use super::{Activation, Call, Sizes};
use crate::error::Result;
use crate::tensor::Tensor;

/// The neighbourhoods of some rows of pixels are laid out as a matrix of about this many values at a time.
pub(super) const BAND_VALUES: usize = 1 << 22;

/// An image and the pixel of it that stands at each row and column of the output's grid.
pub(super) struct Source<'a> {
    values: &'a [f32],
    height: usize,
    width: usize,
    channels: usize,
    rows: Vec<usize>,
    columns: Vec<usize>,
}

impl<'a> Source<'a> {
    fn new(
        image: &'a Tensor,
        sizes: Sizes,
        row: impl Fn(usize) -> usize,
        column: impl Fn(usize) -> usize,
    ) -> Result<Self> {
        Ok(Source {
            values: image.as_slice()?,
            height: image.dim(1),
            width: image.dim(2),
            channels: image.dim(3),
            rows: (0..sizes.height).map(row).collect(),
            columns: (0..sizes.width).map(column).collect(),
        })
    }

    fn pixel(&self, item: usize, y: usize, x: usize) -> &'a [f32] {
        let pixel = (item * self.height + self.rows[y]) * self.width + self.columns[x];
        &self.values[pixel * self.channels..][..self.channels]
    }
}

/// Computes `call` into `output`, and its maxima into `pooled`.
pub(super) fn convolve(call: &Call<'_>, sizes: Sizes, output: &mut Tensor, pooled: Option<&mut Tensor>) -> Result<()> {
    if output.elements() == 0 {
        return Ok(());
    }
    let sources = sources(call, sizes)?;
    let values = output.as_mut_slice::<f32>()?;
    sum(call, sizes, &sources, values)?;
    finish(call, values)?;
    match pooled {
        Some(pooled) => maxima(sizes, values, pooled.as_mut_slice()?),
        None => Ok(()),
    }
}

/// The sources of `call`, as its output's grid sees them.
pub(super) fn sources<'a>(call: &Call<'a>, sizes: Sizes) -> Result<Vec<Source<'a>>> {
    let shrink = if call.upsample { 2 } else { 1 };
    let mut sources = vec![Source::new(call.x, sizes, |y| y / shrink, |x| x / shrink)?];
    if let Some(second) = call.second {
        let [rows, columns] = sizes.second_axes;
        sources.push(Source::new(second, sizes, |y| rows.index(y), |x| columns.index(x))?);
    }
    Ok(sources)
}

/// Bias and products, band by band.
fn sum(call: &Call<'_>, sizes: Sizes, sources: &[Source<'_>], output: &mut [f32]) -> Result<()> {
    let conv = call.conv;
    let depth = conv.kernel * conv.kernel * conv.inputs();
    let (row_depth, row_outputs) = (sizes.width * depth, sizes.width * sizes.outputs);
    let band_rows = (BAND_VALUES / row_depth).clamp(1, sizes.batch * sizes.height);
    let mut neighbourhoods = vec![0.0; band_rows * row_depth];
    let bias = conv.bias.as_slice::<f32>()?;
    let weight = Matrix {
        values: conv.weight.as_slice()?,
        row_stride: 1,
        column_stride: depth,
    };
    for (band, output) in output.chunks_mut(band_rows * row_outputs).enumerate() {
        let rows = output.len() / row_outputs;
        let neighbourhoods = &mut neighbourhoods[..rows * row_depth];
        let by_row = neighbourhoods.par_chunks_mut(row_depth).enumerate();
        by_row.for_each(|(row, values)| gather_row(conv.kernel, sizes, sources, band * band_rows + row, values));
        output
            .par_chunks_mut(sizes.outputs)
            .for_each(|pixel| pixel.copy_from_slice(bias));
        let matrix = Matrix {
            values: neighbourhoods,
            row_stride: depth,
            column_stride: 1,
        };
        cpu_matmul([rows * sizes.width, depth, sizes.outputs], matrix, weight, true, output);
    }
    Ok(())
}

/// Writes the neighbourhoods of all pixels of one row of the batch: per pixel and tap the channels of all sources, zeros
/// outside the image.
pub(super) fn gather_row(kernel: usize, sizes: Sizes, sources: &[Source<'_>], row: usize, to: &mut [f32]) {
    let (item, y) = (row / sizes.height, row % sizes.height);
    let inputs: usize = sources.iter().map(|source| source.channels).sum();
    let margin = kernel / 2;
    for (index, to) in to.chunks_mut(inputs).enumerate() {
        let (x, tap) = (index / (kernel * kernel), index % (kernel * kernel));
        // Coordinates in the image with its margin.
        let (y, x) = (y + tap / kernel, x + tap % kernel);
        let inside = (margin..sizes.height + margin).contains(&y) && (margin..sizes.width + margin).contains(&x);
        if !inside {
            to.fill(0.0);
            continue;
        }
        let mut rest = to;
        for source in sources {
            let (channels, after) = rest.split_at_mut(source.channels);
            channels.copy_from_slice(source.pixel(item, y - margin, x - margin));
            rest = after;
        }
    }
}

/// Activation, residual and scale.
fn finish(call: &Call<'_>, output: &mut [f32]) -> Result<()> {
    if call.activation == Activation::Silu {
        output.par_iter_mut().for_each(|value| *value = silu_scalar(*value));
    }
    if let Some(residual) = call.residual {
        let residual = residual.as_slice::<f32>()?;
        output
            .par_iter_mut()
            .zip(residual)
            .for_each(|(value, residual)| *value += residual);
    }
    if let Some(scale) = call.scale {
        output.par_iter_mut().for_each(|value| *value *= scale);
    }
    Ok(())
}

/// The maximum of each whole 2×2 window; NaN when one of its values is.
pub(super) fn maxima(sizes: Sizes, full: &[f32], pooled: &mut [f32]) -> Result<()> {
    let (height, width, channels) = (sizes.height / 2, sizes.width / 2, sizes.outputs);
    if pooled.is_empty() {
        return Ok(());
    }
    let row_values = sizes.width * channels;
    let rows = pooled.par_chunks_mut(width * channels).enumerate();
    rows.for_each(|(row, pooled)| {
        let (item, y) = (row / height, row % height);
        let top = (item * sizes.height + 2 * y) * row_values;
        for (index, pooled) in pooled.iter_mut().enumerate() {
            let at = top + index / channels * 2 * channels + index % channels;
            let window = [at, at + channels, at + row_values, at + row_values + channels];
            *pooled = window.map(|at| full[at]).into_iter().fold(f32::NEG_INFINITY, maximum);
        }
    });
    Ok(())
}

fn maximum(a: f32, b: f32) -> f32 {
    match a > b || a.is_nan() {
        true => a,
        false => b,
    }
}
