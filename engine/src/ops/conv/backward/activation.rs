//! Between a convolution's sum and its result: forward where the sum is kept, and from the result's gradient to that of the sum.

use std::sync::Arc;

use rayon::prelude::*;

use super::super::{Activation, Conv, conv2d, cpu};
use super::Gradient;
use crate::device::{Args, CudaDevice, Kernel};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{elementwise, grid};
use crate::tensor::Tensor;

const IMAGE: &str = "conv_activation";

/// Channels that a thread of the faster kernels takes.
const VECTOR: usize = 8;

/// `silu(sum)` like [`super::super::conv2d`] with [`Activation::Silu`], and the sum, for
/// [`conv2d_backward`](super::conv2d_backward). On CUDA the result is that of the sum rounded to bf16.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn conv2d_silu_with_sum(x: &Tensor, second: Option<&Tensor>, conv: &Conv) -> Result<(Tensor, Tensor)> {
    let sum = conv2d(x, second, conv, Activation::None, None)?;
    let y = match sum.cuda() {
        None => elementwise::silu(&sum)?,
        Some(device) => {
            let mut y = Tensor::empty_compute(&sum.device(), sum.shape())?;
            let (kernel, vectors) = kernel(device, ["conv_silu", "conv_silu_single"], &sum)?;
            let args = Args::new().input(&sum)?.output(&mut y)?.long(vectors as u64);
            let blocks = grid(
                "conv2d_silu_with_sum",
                vectors.div_ceil(kernel.info().threads.max(1) as usize),
            )?;
            // SAFETY: both images are bf16 and of one shape, of as many vectors as the kernel is told.
            unsafe { kernel.launch(device, [blocks, 1, 1], args)? };
            y
        }
    };
    Ok((y, sum))
}

/// `silu(sum)` and its 2×2 maxima like [`super::super::conv3x3_silu_pool`], and the sum, for
/// [`conv3x3_silu_pool_backward`](super::conv3x3_silu_pool_backward). On CUDA the results are those of the sum rounded to bf16.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn conv3x3_silu_pool_with_sum(x: &Tensor, conv: &Conv) -> Result<(Tensor, Tensor, Tensor)> {
    let gradient = Gradient::new("conv3x3_silu_pool", x, None, conv, false)?;
    gradient.call.ensure_3x3()?;
    let sum = conv2d(x, None, conv, Activation::None, None)?;
    let (batch, height, width) = (sum.dim(0), sum.dim(1) / 2, sum.dim(2) / 2);
    let mut pooled = Tensor::empty_compute(&x.device(), [batch, height, width, sum.dim(3)])?;
    let full = match sum.cuda() {
        None => {
            let full = elementwise::silu(&sum)?;
            cpu::maxima(gradient.sizes, full.as_slice()?, pooled.as_mut_slice()?)?;
            full
        }
        Some(device) => {
            let mut full = Tensor::empty_compute(&sum.device(), sum.shape())?;
            let args = Args::new().input(&sum)?.output(&mut full)?.output(&mut pooled)?;
            let names = ["conv_silu_pool", "conv_silu_pool_single"];
            // SAFETY: the kernel's images are the sum, its activation of the same shape, and the maxima of that, all bf16.
            unsafe { launch_windows(device, gradient.call.op, names, &sum, args)? };
            full
        }
    };
    Ok((full, pooled, sum))
}

/// Of a kernel for vectors of channels and one for single ones, that which suits the image's channels; how many of its vectors
/// the image has.
fn kernel(device: &CudaDevice, [vectors, single]: [&'static str; 2], image: &Tensor) -> Result<(Arc<Kernel>, usize)> {
    match image.dim(3).is_multiple_of(VECTOR) {
        true => Ok((device.kernel(IMAGE, vectors)?, image.elements() / VECTOR)),
        false => Ok((device.kernel(IMAGE, single)?, image.elements())),
    }
}

/// Launches a kernel whose threads take 2×2 windows of an image; extents follow the given arguments.
///
/// # Safety
/// The arguments must be the kernel's up to the extents, and its images of the shapes that follow from `image`.
pub(super) unsafe fn launch_windows(
    device: &CudaDevice,
    op: &'static str,
    names: [&'static str; 2],
    image: &Tensor,
    args: Args,
) -> Result<()> {
    let [items, height, width, channels] = [image.dim(0), image.dim(1), image.dim(2), image.dim(3)];
    let (kernel, _) = kernel(device, names, image)?;
    let [threads, vector, ..] = kernel.info().tile.map(|extent| extent.max(1) as usize);
    let windows = items * height.div_ceil(2) * width.div_ceil(2) * channels / vector;
    let args = args.int(items).int(height).int(width).int(channels);
    let blocks = grid(op, windows.div_ceil(threads))?;
    // SAFETY: by the caller's promise; one thread per window and vector of channels.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}

impl Gradient<'_> {
    /// `scale · dy`.
    pub(super) fn scaled(&self, dy: &Tensor, scale: f32) -> Result<Tensor> {
        let mut ds = Tensor::empty_compute(&dy.device(), dy.shape())?;
        let Some(device) = dy.cuda() else {
            let pairs = ds.as_mut_slice::<f32>()?.par_iter_mut().zip(dy.as_slice::<f32>()?);
            pairs.for_each(|(ds, dy)| *ds = scale * dy);
            return Ok(ds);
        };
        let name = match dy.dtype() {
            DType::F32 => "conv_scale_f32",
            _ => "conv_scale_bf16",
        };
        let kernel = device.kernel(IMAGE, name)?;
        let args = Args::new()
            .input(dy)?
            .output(&mut ds)?
            .long(dy.elements() as u64)
            .float(scale);
        let blocks = grid(
            self.call.op,
            dy.elements().div_ceil(kernel.info().threads.max(1) as usize),
        )?;
        // SAFETY: the arguments are those of the kernel for this type, the images of one shape.
        unsafe { kernel.launch(device, [blocks, 1, 1], args)? };
        Ok(ds)
    }

    /// `dy · silu'(sum)`, where `dy` is the gradient of the activated sum and, when there is one, that of its maxima; `pooled` is
    /// this gradient and what was pooled.
    pub(super) fn through_silu(
        &self,
        dy: &Tensor,
        pooled: Option<[&Tensor; 2]>,
        sum: Option<Tensor>,
    ) -> Result<Tensor> {
        let mut ds = self.sum(sum)?;
        if let Some(device) = dy.cuda() {
            self.launch_through_silu(device, dy, pooled, &mut ds)?;
            return Ok(ds);
        }
        let row_values = (self.sizes.width * self.sizes.outputs).max(1);
        let dy = dy.as_slice::<f32>()?;
        let pooled = match pooled {
            Some([gradient, full]) => Some((gradient.as_slice::<f32>()?, full.as_slice::<f32>()?)),
            None => None,
        };
        let rows = ds.as_mut_slice::<f32>()?.par_chunks_mut(row_values).enumerate();
        rows.for_each(|(row, values)| {
            let mut gradient = dy[row * row_values..][..values.len()].to_vec();
            if let Some((of_maxima, full)) = pooled {
                self.add_maxima_row(row, &mut gradient, of_maxima, full);
            }
            for (value, gradient) in values.iter_mut().zip(gradient) {
                *value = gradient * silu_derivative(*value);
            }
        });
        Ok(ds)
    }

    /// `ds` holds the sum.
    fn launch_through_silu(
        &self,
        device: &CudaDevice,
        dy: &Tensor,
        pooled: Option<[&Tensor; 2]>,
        ds: &mut Tensor,
    ) -> Result<()> {
        let Some([gradient, full]) = pooled else {
            let (kernel, vectors) = kernel(device, ["conv_silu_backward", "conv_silu_backward_single"], dy)?;
            let args = Args::new().input(dy)?.output(ds)?.long(vectors as u64);
            let blocks = grid(self.call.op, vectors.div_ceil(kernel.info().threads.max(1) as usize))?;
            // SAFETY: both images are bf16 and of one shape, of as many vectors as the kernel is told.
            return unsafe { kernel.launch(device, [blocks, 1, 1], args) };
        };
        let args = Args::new().input(dy)?.input(gradient)?.input(full)?.output(ds)?;
        let names = ["conv_silu_pool_backward", "conv_silu_pool_backward_single"];
        // SAFETY: the kernel's images are those of the result's gradient, that of its maxima, the result and the sum, all bf16 and
        // of the shapes checked at the door.
        unsafe { launch_windows(device, self.call.op, names, dy, args) }
    }

    /// Adds to one row of the gradient of the pooled image what the maxima that lie in it send back.
    fn add_maxima_row(&self, row: usize, gradient: &mut [f32], of_maxima: &[f32], full: &[f32]) {
        let (width, channels) = (self.sizes.width, self.sizes.outputs);
        let (item, y) = (row / self.sizes.height, row % self.sizes.height);
        if y / 2 >= self.sizes.height / 2 {
            return;
        }
        let row_values = width * channels;
        let top = (item * self.sizes.height + y / 2 * 2) * row_values;
        let pooled_row = (item * (self.sizes.height / 2) + y / 2) * (width / 2) * channels;
        for x in 0..width / 2 * 2 {
            for channel in 0..channels {
                let at = top + x / 2 * 2 * channels + channel;
                let window = [at, at + channels, at + row_values, at + row_values + channels].map(|at| full[at]);
                if first_largest(window) == y % 2 * 2 + x % 2 {
                    gradient[x * channels + channel] += of_maxima[pooled_row + x / 2 * channels + channel];
                }
            }
        }
    }
}

/// The derivative of `x · sigmoid(x)`.
fn silu_derivative(x: f32) -> f32 {
    let sigmoid = 1.0 / (1.0 + (-x).exp());
    sigmoid * (1.0 + x * (1.0 - sigmoid))
}

/// The index of the first largest value, or of the last NaN.
fn first_largest(values: [f32; 4]) -> usize {
    let mut best = 0;
    for (index, value) in values.into_iter().enumerate().skip(1) {
        if value > values[best] || value.is_nan() {
            best = index;
        }
    }
    best
}
