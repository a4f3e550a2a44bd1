//! The gradient of a nearest resize: each source pixel gets the sum over the pixels that show it.

use rayon::prelude::*;

use super::NearestAxis;
use crate::device::{Args, CudaDevice};
use crate::error::{Error, Result};
use crate::ops::grid;
use crate::tensor::Tensor;

const OP: &str = "resize_nearest_backward";

/// The gradient of [`super::resize_nearest`] with respect to an image of `height` × `width`, from the gradient `dy`
/// `[batch, output height, output width, channels]` of its result, both in the device's compute type. Sums are f32 and taken
/// in one order.
///
/// # Errors
/// When `dy` is no image or an extent is 0.
pub fn resize_nearest_backward(dy: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    dy.ensure_rank(OP, "dy", 4, "[batch, height, width, channels]")?;
    dy.ensure_dtype(OP, "dy", dy.device().compute_dtype())?;
    if [dy.dim(1), dy.dim(2), height, width].contains(&0) {
        return Err(Error::invalid(format!(
            "{OP}: there is no resize of {height}x{width} to {}x{}",
            dy.dim(1),
            dy.dim(2)
        )));
    }
    let mut dx = Tensor::empty_compute(&dy.device(), [dy.dim(0), height, width, dy.dim(3)])?;
    let axes = [NearestAxis::new(height, dy.dim(1)), NearestAxis::new(width, dy.dim(2))];
    match dy.cuda() {
        None => cpu_gather(dy, axes, &mut dx)?,
        Some(device) => cuda_gather(device, dy, axes, &mut dx)?,
    }
    Ok(dx)
}

impl NearestAxis {
    /// Where in an output of `extent` pixels each source index begins to show; one more entry says where the last ends. An
    /// index that shows nowhere begins where it ends.
    fn starts(&self, extent: usize) -> Vec<usize> {
        let mut starts = Vec::with_capacity(self.source + 1);
        let mut output = 0;
        for source in 0..=self.source {
            while output < extent && self.index(output) < source {
                output += 1;
            }
            starts.push(output);
        }
        starts
    }
}

fn cpu_gather(dy: &Tensor, [rows, columns]: [NearestAxis; 2], dx: &mut Tensor) -> Result<()> {
    let (height, width, channels) = (dy.dim(1), dy.dim(2), dy.dim(3));
    if dx.elements() == 0 {
        return Ok(());
    }
    let (row_starts, column_starts) = (rows.starts(height), columns.starts(width));
    let gradient = dy.as_slice::<f32>()?;
    let sums = dx.as_mut_slice::<f32>()?.par_chunks_mut(columns.source * channels);
    sums.enumerate().for_each(|(row, sums)| {
        sums.fill(0.0);
        let (item, row) = (row / rows.source, row % rows.source);
        for y in row_starts[row]..row_starts[row + 1] {
            for (column, sums) in sums.chunks_mut(channels).enumerate() {
                for x in column_starts[column]..column_starts[column + 1] {
                    let pixel = &gradient[((item * height + y) * width + x) * channels..][..channels];
                    sums.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += value);
                }
            }
        }
    });
    Ok(())
}

fn cuda_gather(device: &CudaDevice, dy: &Tensor, [rows, columns]: [NearestAxis; 2], dx: &mut Tensor) -> Result<()> {
    let channels = dy.dim(3);
    let name = match channels.is_multiple_of(8) {
        true => "resize_nearest_backward",
        false => "resize_nearest_backward_single",
    };
    let kernel = device.kernel("resize", name)?;
    let vectors = columns.source * channels / kernel.info().tile[0].max(1) as usize;
    let blocks_per_row = vectors.div_ceil(kernel.info().threads.max(1) as usize);
    let blocks = [grid(OP, dx.dim(0) * rows.source)?, grid(OP, blocks_per_row)?, 1];
    let args = Args::new()
        .input(dy)?
        .output(dx)?
        .int(rows.source)
        .int(columns.source)
        .int(dy.dim(1))
        .int(dy.dim(2))
        .int(channels)
        .float(rows.ratio)
        .float(columns.ratio);
    // SAFETY: the arguments are those of the kernel, of the shapes and types checked at the door; it takes as many channels at a
    // time as divide a pixel's; one block per row of `dx` and `threads` vectors of it.
    unsafe { kernel.launch(device, blocks, args) }
}
