//! Gradients of the convolutions.
//!
//! With `ds` the gradient of a convolution's sum: of a source `Σ weightᵀ · ds` over the mirrored taps, of the weight
//! `Σ ds · xᵀ` over the pixels, of the bias `Σ ds`. Before that, through what was applied to the sum:
//!
//! * [`conv2d_backward`]: `ds = dy · silu'(sum)`, or `dy` without activation; a residual's gradient is `dy` itself
//! * [`conv3x3_silu_pool_backward`]: `dy` is the gradient of `full` and, added where it came from, that of each maximum: the first
//!   largest value of its window in row-major order, or the last NaN, as in PyTorch
//! * [`upsample_conv3x3_backward`]: `dy`; each pixel of `x` gathers from its four copies
//! * [`conv2d_f32_backward`]: `scale · dy`
//!
//! `silu'` needs the sum, which the result does not determine. Forward may keep it ([`conv2d_silu_with_sum`],
//! [`conv3x3_silu_pool_with_sum`]), which costs an image as large as the result until backward, or not, which costs that
//! convolution once more. Gradients of parameters are added to what the given tensors hold, and are computed only when
//! there are such tensors; those of sources only when they are wanted.
//!
//! Shapes as in the forward contract; a gradient has the shape of what it belongs to, and the device's compute type. On CUDA
//! the result of a convolution has a multiple of 8 channels, or, for 3×3 kernels and [`conv2d_f32_backward`], at most 3. Sums are
//! f32 and taken in one order: two runs give the same bits. On Hopper an upsampled convolution's weights that meet the same pixel
//! are added up and rounded to bf16 before its source's gradient is computed.

mod activation;
mod inputs;
mod picture;
mod weights;

pub use activation::{conv2d_silu_with_sum, conv3x3_silu_pool_with_sum};

use super::{Activation, Call, Conv, MAX_IMAGE_CHANNELS, Sizes, conv2d};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// What a convolution read, and its sum where that was kept.
pub struct ConvSaved<'a> {
    /// The first source.
    pub x: &'a Tensor,
    /// The second source.
    pub second: Option<&'a Tensor>,
    /// The sum, before the activation. Its memory is used for the gradient, so no other tensor may share it. When absent it
    /// is computed again; without activation it is not needed.
    pub sum: Option<Tensor>,
}

impl<'a> ConvSaved<'a> {
    /// One source, and no sum.
    pub fn of(x: &'a Tensor) -> Self {
        ConvSaved {
            x,
            second: None,
            sum: None,
        }
    }
}

/// Where the gradients of a convolution's parameters are added.
pub struct ConvGrads<'a> {
    /// `[outputs, taps · inputs]`, like the weight.
    pub weight: &'a mut Tensor,
    /// `[outputs]`.
    pub bias: &'a mut Tensor,
}

/// The gradients of a convolution's sources, as far as they were wanted.
pub struct SourceGrads {
    /// Of the first source.
    pub x: Option<Tensor>,
    /// Of the second source, on its own grid.
    pub second: Option<Tensor>,
}

/// The gradients of [`super::conv2d`]; `want` says for which of its sources. See the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit, or the sum or a gradient shares its buffer.
pub fn conv2d_backward(
    dy: &Tensor,
    saved: ConvSaved<'_>,
    conv: &Conv,
    activation: Activation,
    want: [bool; 2],
    grads: Option<ConvGrads<'_>>,
) -> Result<SourceGrads> {
    let ConvSaved { x, second, sum } = saved;
    let gradient = Gradient::new("conv2d_backward", x, second, conv, false)?;
    gradient.ensure_compute("dy", dy)?;
    let grads = gradient.parameters(grads)?;
    let ds = match activation {
        Activation::None => dy.clone(),
        Activation::Silu => gradient.through_silu(dy, None, sum)?,
    };
    gradient.finish(&ds, want, grads)
}

/// The gradients of [`super::conv3x3_silu_pool`] from those of its two results, of which `full` is the first; `want` says whether
/// that of the source is wanted. See the module's head comment.
///
/// # Errors
/// As for [`conv2d_backward`].
pub fn conv3x3_silu_pool_backward(
    [d_full, d_pooled]: [&Tensor; 2],
    full: &Tensor,
    saved: ConvSaved<'_>,
    conv: &Conv,
    want: bool,
    grads: Option<ConvGrads<'_>>,
) -> Result<Option<Tensor>> {
    let ConvSaved { x, second, sum } = saved;
    let gradient = Gradient::new("conv3x3_silu_pool_backward", x, second, conv, false)?;
    gradient.call.ensure_3x3()?;
    gradient.ensure_compute("d_full", d_full)?;
    gradient.ensure_compute("full", full)?;
    let Sizes {
        batch,
        height,
        width,
        outputs,
        ..
    } = gradient.sizes;
    d_pooled.ensure_shape(gradient.call.op, "d_pooled", [batch, height / 2, width / 2, outputs])?;
    d_pooled.ensure_dtype(gradient.call.op, "d_pooled", x.device().compute_dtype())?;
    d_pooled.ensure_device(gradient.call.op, "d_pooled", &x.device())?;
    let grads = gradient.parameters(grads)?;
    let ds = gradient.through_silu(d_full, Some([d_pooled, full]), sum)?;
    Ok(gradient.finish(&ds, [want, false], grads)?.x)
}

/// The gradients of [`super::upsample_conv3x3`]; `want` says whether that of the source is wanted. See the module's head comment.
///
/// # Errors
/// As for [`conv2d_backward`].
pub fn upsample_conv3x3_backward(
    dy: &Tensor,
    x: &Tensor,
    conv: &Conv,
    want: bool,
    grads: Option<ConvGrads<'_>>,
) -> Result<Option<Tensor>> {
    let gradient = Gradient::new("upsample_conv3x3_backward", x, None, conv, true)?;
    gradient.call.ensure_3x3()?;
    gradient.ensure_compute("dy", dy)?;
    let grads = gradient.parameters(grads)?;
    Ok(gradient.finish(dy, [want, false], grads)?.x)
}

/// The gradients of [`super::conv2d_f32`] from a `dy` in f32 or in the device's compute type; `want` says whether that of the
/// source is wanted. See the module's head comment.
///
/// # Errors
/// As for [`conv2d_backward`].
pub fn conv2d_f32_backward(
    dy: &Tensor,
    x: &Tensor,
    conv: &Conv,
    scale: f32,
    want: bool,
    grads: Option<ConvGrads<'_>>,
) -> Result<Option<Tensor>> {
    let gradient = Gradient::new("conv2d_f32_backward", x, None, conv, false)?;
    gradient.ensure_result("dy", dy)?;
    if dy.dtype() != DType::F32 {
        dy.ensure_dtype(gradient.call.op, "dy", x.device().compute_dtype())?;
    }
    let grads = gradient.parameters(grads)?;
    if let Some(device) = x.cuda()
        && let Some(kernel) = gradient.picture_kernel(device, dy)?
    {
        return gradient.picture(device, &kernel, dy, scale, want, grads);
    }
    let ds = gradient.scaled(dy, scale)?;
    Ok(gradient.finish(&ds, [want, false], grads)?.x)
}

/// A convolution whose gradients are asked for, and what was checked at the door.
struct Gradient<'a> {
    call: Call<'a>,
    sizes: Sizes,
}

impl<'a> Gradient<'a> {
    fn new(
        op: &'static str,
        x: &'a Tensor,
        second: Option<&'a Tensor>,
        conv: &'a Conv,
        upsample: bool,
    ) -> Result<Self> {
        let call = Call {
            second,
            upsample,
            ..Call::new(op, x, conv)
        };
        let sizes = call.sizes()?;
        Ok(Gradient { call, sizes })
    }

    /// The number of pixels of the result.
    fn pixels(&self) -> usize {
        self.sizes.batch * self.sizes.height * self.sizes.width
    }

    /// Checks a tensor of the result's shape.
    fn ensure_result(&self, name: &str, tensor: &Tensor) -> Result<()> {
        let Sizes {
            batch,
            height,
            width,
            outputs,
            ..
        } = self.sizes;
        tensor.ensure_shape(self.call.op, name, [batch, height, width, outputs])?;
        tensor.ensure_device(self.call.op, name, &self.call.x.device())
    }

    fn ensure_compute(&self, name: &str, tensor: &Tensor) -> Result<()> {
        self.ensure_result(name, tensor)?;
        tensor.ensure_dtype(self.call.op, name, self.call.x.device().compute_dtype())
    }

    /// The gradients of weight and bias, checked.
    fn parameters<'g>(&self, grads: Option<ConvGrads<'g>>) -> Result<Option<ConvGrads<'g>>> {
        if let Some(ConvGrads { weight, bias }) = &grads {
            let (op, x, conv) = (self.call.op, self.call.x, self.call.conv);
            super::ensure_parameter(op, "the weight's gradient", weight, &conv.weight.shape(), x)?;
            super::ensure_parameter(op, "the bias's gradient", bias, &conv.bias.shape(), x)?;
        }
        Ok(grads)
    }

    /// The sum, kept or computed again.
    fn sum(&self, kept: Option<Tensor>) -> Result<Tensor> {
        match kept {
            Some(sum) => self.ensure_compute("sum", &sum).map(|()| sum),
            None => conv2d(self.call.x, self.call.second, self.call.conv, Activation::None, None),
        }
    }

    /// From the sum's gradient to those of the sources and the parameters.
    fn finish(&self, ds: &Tensor, want: [bool; 2], grads: Option<ConvGrads<'_>>) -> Result<SourceGrads> {
        if want[1] && self.call.second.is_none() {
            return Err(Error::invalid(format!(
                "{}: the gradient of a second source is wanted, but there is none",
                self.call.op
            )));
        }
        if self.call.x.cuda().is_some() {
            self.ensure_kernels()?;
        }
        if let Some(grads) = grads {
            self.add_parameter_gradients(ds, grads)?;
        }
        self.source_gradients(ds, want)
    }

    /// Checks what the CUDA kernels ask of the channels.
    fn ensure_kernels(&self) -> Result<()> {
        self.call.ensure_kernel_sources()?;
        let (conv, outputs) = (self.call.conv, self.sizes.outputs);
        if outputs.is_multiple_of(8) || (conv.kernel == 3 && outputs <= MAX_IMAGE_CHANNELS) {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "{}: the CUDA kernels take gradients of a multiple of 8 channels, or for 3x3 kernels of at most \
             {MAX_IMAGE_CHANNELS}; these have {outputs}",
            self.call.op
        )))
    }
}
