//! The gradient of a convolution's source: a convolution of the sum's gradient with the mirrored, transposed weights.

use rayon::prelude::*;

use super::super::{Activation, Conv, conv2d};
use super::Gradient;
use crate::error::Result;
use crate::ops::resize::resize_nearest_backward;
use crate::tensor::Tensor;

impl Gradient<'_> {
    /// The gradient of source 0 or 1, on its own grid.
    pub(super) fn source_gradient(&self, ds: &Tensor, source: usize) -> Result<Tensor> {
        let mirrored = self.mirrored(source)?;
        let gradient = conv2d(ds, None, &mirrored, Activation::None, None)?;
        if self.call.upsample {
            return self.gather_copies(&gradient);
        }
        match self.call.second.filter(|_| source == 1) {
            Some(second) if [second.dim(1), second.dim(2)] != [self.sizes.height, self.sizes.width] => {
                resize_nearest_backward(&gradient, second.dim(1), second.dim(2))
            }
            _ => Ok(gradient),
        }
    }

    /// The convolution from the sum's channels to those of one source, with mirrored taps and no bias.
    fn mirrored(&self, source: usize) -> Result<Conv> {
        let conv = self.call.conv;
        let (outputs, channels) = (conv.outputs(), conv.channels[source]);
        let first = if source == 0 { 0 } else { conv.channels[0] };
        let taps = conv.kernel * conv.kernel;
        let device = self.call.x.device();
        let mut weight = Tensor::empty_compute(&device, [channels, taps * outputs])?;
        let from = conv.weight.as_slice::<f32>()?;
        let rows = weight.as_mut_slice::<f32>()?.par_chunks_mut(taps * outputs);
        rows.enumerate().for_each(|(channel, row)| {
            for (index, to) in row.iter_mut().enumerate() {
                let (tap, output) = (taps - 1 - index / outputs, index % outputs);
                *to = from[(output * taps + tap) * conv.inputs() + first + channel];
            }
        });
        let bias = Tensor::zeros(&device, [channels], device.compute_dtype())?;
        Conv::new(weight, bias, conv.kernel, &[outputs])
    }

    /// The gradient of an image from that of itself at twice its height and width.
    fn gather_copies(&self, gradient: &Tensor) -> Result<Tensor> {
        let x = self.call.x;
        let (width, channels) = (x.dim(2), x.dim(3));
        let mut gathered = Tensor::empty_compute(&x.device(), x.shape())?;
        let copies = gradient.as_slice::<f32>()?;
        let rows = gathered
            .as_mut_slice::<f32>()?
            .par_chunks_mut((width * channels).max(1));
        rows.enumerate().for_each(|(row, values)| {
            let top = 2 * row * 2 * width * channels;
            for (index, value) in values.iter_mut().enumerate() {
                let at = top + index / channels * 2 * channels + index % channels;
                let below = at + 2 * width * channels;
                *value = copies[at] + copies[at + channels] + copies[below] + copies[below + channels];
            }
        });
        Ok(gathered)
    }
}
