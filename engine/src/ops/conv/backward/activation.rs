//! From a result's gradient to that of the convolution's sum, and to that of the bias on the way.

use rayon::prelude::*;

use super::super::{Activation, Conv, conv2d, cpu};
use super::Gradient;
use crate::error::Result;
use crate::ops::elementwise;
use crate::tensor::Tensor;

/// `silu(sum)` like [`super::super::conv2d`] with [`Activation::Silu`], and the sum, for
/// [`conv2d_backward`](super::conv2d_backward). On CUDA the result is that of the sum rounded to bf16.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn conv2d_silu_with_sum(x: &Tensor, second: Option<&Tensor>, conv: &Conv) -> Result<(Tensor, Tensor)> {
    let sum = conv2d(x, second, conv, Activation::None, None)?;
    Ok((elementwise::silu(&sum)?, sum))
}

/// `silu(sum)` and its 2×2 maxima like [`super::super::conv3x3_silu_pool`], and the sum, for
/// [`conv3x3_silu_pool_backward`](super::conv3x3_silu_pool_backward). On CUDA the results are those of the sum rounded to bf16.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn conv3x3_silu_pool_with_sum(x: &Tensor, conv: &Conv) -> Result<(Tensor, Tensor, Tensor)> {
    let gradient = Gradient::new("conv3x3_silu_pool", x, None, conv, false)?;
    gradient.call.expect_3x3()?;
    let sum = conv2d(x, None, conv, Activation::None, None)?;
    let full = elementwise::silu(&sum)?;
    let (batch, height, width) = (sum.dim(0), sum.dim(1) / 2, sum.dim(2) / 2);
    let mut pooled = Tensor::empty_compute(&x.device(), [batch, height, width, sum.dim(3)])?;
    cpu::maxima(gradient.sizes, full.as_slice()?, pooled.as_mut_slice()?)?;
    Ok((full, pooled, sum))
}

impl Gradient<'_> {
    /// The gradient of the sum is that of the result.
    pub(super) fn unchanged(&self, dy: &Tensor, bias: Option<&mut Tensor>) -> Result<Tensor> {
        self.add_bias_gradient(dy, bias)?;
        Ok(dy.clone())
    }

    /// `scale · dy`.
    pub(super) fn scaled(&self, dy: &Tensor, scale: f32, bias: Option<&mut Tensor>) -> Result<Tensor> {
        let mut ds = Tensor::empty_compute(&dy.device(), dy.shape())?;
        let pairs = ds.as_mut_slice::<f32>()?.par_iter_mut().zip(dy.as_slice::<f32>()?);
        pairs.for_each(|(ds, dy)| *ds = scale * dy);
        self.add_bias_gradient(&ds, bias)?;
        Ok(ds)
    }

    /// `dy · silu'(sum)`, where `dy` is the gradient of the activated sum and, when there is one, that of its maxima; `pooled` is
    /// this gradient and what was pooled.
    pub(super) fn through_silu(
        &self,
        dy: &Tensor,
        pooled: Option<[&Tensor; 2]>,
        sum: Option<Tensor>,
        bias: Option<&mut Tensor>,
    ) -> Result<Tensor> {
        let mut ds = self.sum(sum)?;
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
        self.add_bias_gradient(&ds, bias)?;
        Ok(ds)
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

    /// Adds the sum over the pixels.
    fn add_bias_gradient(&self, ds: &Tensor, bias: Option<&mut Tensor>) -> Result<()> {
        let Some(bias) = bias else { return Ok(()) };
        let mut sums = vec![0.0; self.sizes.outputs];
        for pixel in ds.as_slice::<f32>()?.chunks(self.sizes.outputs.max(1)) {
            sums.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += value);
        }
        let bias = bias.as_mut_slice::<f32>()?;
        bias.iter_mut().zip(sums).for_each(|(bias, sum)| *bias += sum);
        Ok(())
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
