//! Same-size convolutions of images and feature maps, and what is fused with them.
//!
//! With `sum = bias + Σ weight · x` over the taps of a 1×1 or 3×3 kernel (padding 1, stride 1) and all input channels:
//!
//! * [`conv2d`]: `activation(sum) + residual`; the input may be two images, as if concatenated along channels
//! * [`conv3x3_silu_pool`]: `full = silu(sum)` and its 2×2 maxima (an odd last row or column is dropped);
//!   [`conv3x3_silu_pooled`]: the maxima alone
//! * [`upsample_conv3x3`]: `sum` over the input at twice its height and width, nearest; no activation
//! * [`conv2d_f32`]: `scale · sum` in f32, for the last layer of a model
//! * [`conv3x3_silu_picture`]: `silu(sum)` through a 1×1 convolution to three colours, onto a [`Canvas`]
//!
//! Shapes: images `[batch, height, width, channels]`, weight `[outputs, taps · inputs]` with taps in row-major order outermost
//! and input channels fastest, bias `[outputs]`. A second source with another grid is nearest-resized to the first one's (see
//! [`super::resize`]), before padding. On CUDA a source has a multiple of 8 channels, except that the last source of a 3×3
//! convolution may be an image of at most 3 channels, in bf16 or in f32 (which is rounded to bf16). Sums are f32.
//!
//! On Hopper a convolution whose weights were arranged for it ([`Conv::arranged`]) runs on warpgroup products; that takes
//! sources of multiples of 16 channels on one grid. An upsampled one then adds up weights that meet the same pixel before it
//! multiplies, and rounds these sums to bf16.

mod backward;
mod cpu;
mod cuda;
mod hopper;

pub use backward::{
    ConvGrads, ConvSaved, SourceGrads, conv2d_backward, conv2d_f32_backward, conv2d_silu_with_sum,
    conv3x3_silu_pool_backward, conv3x3_silu_pool_with_sum, upsample_conv3x3_backward,
};

use self::hopper::{Arranged, map_of};
use super::ensure_parameter;
use super::guidance::{ensure_factors, guided_euler_step};
use super::resize::NearestAxis;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::profile;
use crate::tensor::Tensor;

/// What is applied to a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    None,
    /// `x · sigmoid(x)`.
    Silu,
}

/// A convolution's parameters.
#[derive(Clone, Debug)]
pub struct Conv {
    weight: Tensor,
    bias: Tensor,
    kernel: usize,
    /// Of the two sources; 0 for a second one that is not there.
    channels: [usize; 2],
    /// The weights once more, as the Hopper kernels want them.
    arranged: Option<Arranged>,
}

/// How a convolution sees its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// As it is.
    Same,
    /// At twice its height and width ([`upsample_conv3x3`]).
    Upsampled,
}

/// Where a picture goes: with `factors`, f32 `[2]`, `picture = factors[0] · picture + scale · factors[1] · result`; without,
/// `picture = scale · result`.
pub struct Canvas<'a> {
    /// f32 `[batch, height, width, 3]`
    pub picture: &'a mut Tensor,
    /// The factor of the result.
    pub scale: f32,
    /// Read on the device, so that recorded work can be replayed with another.
    pub factors: Option<&'a Tensor>,
}

impl Canvas<'_> {
    /// Bytes that are moved: the picture is read where something is added to it.
    pub(super) fn bytes(&self) -> usize {
        self.picture.bytes() * (1 + usize::from(self.factors.is_some()))
    }

    pub(super) fn expect(&self, op: &'static str, shape: [usize; 4], input: &Tensor) -> Result<()> {
        self.picture.ensure_shape(op, "picture", shape)?;
        self.picture.ensure_dtype(op, "picture", DType::F32)?;
        self.picture.ensure_device(op, "picture", &input.device())?;
        if let Some(factors) = self.factors {
            ensure_factors(op, factors, input)?;
        }
        Ok(())
    }
}

impl Conv {
    /// A convolution of a `kernel` × `kernel` neighbourhood of one or two sources with the given channels.
    ///
    /// # Errors
    /// When the kernel is neither 1 nor 3, or weight and bias do not have the shapes that follow.
    pub fn new(weight: Tensor, bias: Tensor, kernel: usize, channels: &[usize]) -> Result<Self> {
        const OP: &str = "convolution";
        if ![1, 3].contains(&kernel) {
            return Err(Error::invalid(format!("{OP}: a kernel of {kernel} is neither 1 nor 3")));
        }
        let channels = match *channels {
            [one] if one > 0 => [one, 0],
            [first, second] if first > 0 && second > 0 => [first, second],
            _ => {
                return Err(Error::invalid(format!(
                    "{OP}: sources of {channels:?} channels; expected one or two, none empty"
                )));
            }
        };
        weight.ensure_rank(OP, "weight", 2, "[outputs, taps * inputs]")?;
        let inputs = channels[0] + channels[1];
        weight.ensure_shape(OP, "weight", [weight.dim(0), kernel * kernel * inputs])?;
        bias.ensure_shape(OP, "bias", [weight.dim(0)])?;
        Ok(Conv {
            weight,
            bias,
            kernel,
            channels,
            arranged: None,
        })
    }

    /// The same convolution with its weights arranged for the Hopper kernels, where the device has them and one of them suits the
    /// sizes; they take as much memory again. What is arranged is the weights of now: after they change, arrange again.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn arranged(self, input: Input) -> Result<Self> {
        let arranged = Arranged::new(&self, input)?;
        Ok(Conv { arranged, ..self })
    }

    /// Arranges the weights of now in the place of those that were arranged before; nothing where none were.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn rearrange(&mut self) -> Result<()> {
        if let Some(arranged) = self.arranged.take() {
            self.arranged = Some(arranged.renewed(self)?);
        }
        Ok(())
    }

    /// Whether [`Conv::arranged`] found a Hopper kernel for it.
    pub fn is_arranged(&self) -> bool {
        self.arranged.is_some()
    }

    /// `[outputs, taps · inputs]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// `[outputs]`.
    pub fn bias(&self) -> &Tensor {
        &self.bias
    }

    /// The kernel's height and width: 1 or 3.
    pub fn kernel(&self) -> usize {
        self.kernel
    }

    /// Channels of the result.
    pub fn outputs(&self) -> usize {
        self.weight.dim(0)
    }

    /// Channels of the sources, 0 for a second one that is not there.
    pub fn channels(&self) -> [usize; 2] {
        self.channels
    }

    /// Weight and bias.
    pub fn parameters(&self) -> [&Tensor; 2] {
        [&self.weight, &self.bias]
    }

    /// Weight and bias, to be changed.
    pub fn parameters_mut(&mut self) -> [&mut Tensor; 2] {
        [&mut self.weight, &mut self.bias]
    }

    fn inputs(&self) -> usize {
        self.channels[0] + self.channels[1]
    }
}

/// `activation(sum) + residual` over `x` and then `second`; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn conv2d(
    x: &Tensor,
    second: Option<&Tensor>,
    conv: &Conv,
    activation: Activation,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let call = Call {
        second,
        activation,
        residual,
        ..Call::new("conv2d", x, conv)
    };
    Ok(call.run()?.0)
}

/// `silu(sum)` and its 2×2 maxima; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn conv3x3_silu_pool(x: &Tensor, conv: &Conv) -> Result<(Tensor, Tensor)> {
    let call = Call {
        activation: Activation::Silu,
        pool: true,
        ..Call::new("conv3x3_silu_pool", x, conv)
    };
    call.ensure_3x3()?;
    let (full, pooled) = call.run()?;
    let pooled = pooled.ok_or_else(|| Error::invalid("conv3x3_silu_pool: no maxima were made"))?;
    Ok((full, pooled))
}

/// The 2×2 maxima of `silu(sum)`; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn conv3x3_silu_pooled(x: &Tensor, conv: &Conv) -> Result<Tensor> {
    let call = Call {
        activation: Activation::Silu,
        pool: true,
        ..Call::new("conv3x3_silu_pooled", x, conv)
    };
    call.ensure_3x3()?;
    match call.launch_pooled()? {
        Some(pooled) => Ok(pooled),
        None => Ok(conv3x3_silu_pool(x, conv)?.1),
    }
}

/// `sum` over `x` at twice its height and width; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn upsample_conv3x3(x: &Tensor, conv: &Conv) -> Result<Tensor> {
    let call = Call {
        upsample: true,
        ..Call::new("upsample_conv3x3", x, conv)
    };
    call.ensure_3x3()?;
    Ok(call.run()?.0)
}

/// `scale · sum` in f32; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn conv2d_f32(x: &Tensor, conv: &Conv, scale: f32) -> Result<Tensor> {
    let call = Call {
        scale: Some(scale),
        ..Call::new("conv2d_f32", x, conv)
    };
    Ok(call.run()?.0)
}

/// `silu(sum)` over `x` and then `second`, through the 1×1 convolution `picture` to three colours; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn conv3x3_silu_picture(
    x: &Tensor,
    second: Option<&Tensor>,
    conv: &Conv,
    picture: &Conv,
    canvas: Canvas<'_>,
) -> Result<()> {
    const OP: &str = "conv3x3_silu_picture";
    let call = Call {
        second,
        activation: Activation::Silu,
        ..Call::new(OP, x, conv)
    };
    call.ensure_3x3()?;
    let sizes = call.sizes()?;
    picture.ensure_picture(OP, conv.outputs())?;
    canvas.expect(OP, [sizes.batch, sizes.height, sizes.width, PICTURE_CHANNELS], x)?;
    if call.suits_picture(picture) {
        let _op = call.told(sizes, canvas.bytes());
        return call.launch_picture_end(sizes, picture, canvas);
    }
    let activated = call.run()?.0;
    paint(&conv2d_f32(&activated, picture, canvas.scale)?, canvas)
}

/// Puts a result that has been scaled onto the canvas.
pub(super) fn paint(scaled: &Tensor, canvas: Canvas<'_>) -> Result<()> {
    match canvas.factors {
        Some(factors) => guided_euler_step(canvas.picture, scaled, None, factors),
        None => canvas.picture.copy_from(scaled),
    }
}

/// An image with at most this many channels may be the last source of a 3×3 convolution on CUDA, and may be f32.
const MAX_IMAGE_CHANNELS: usize = 3;

/// Channels of a picture.
pub(super) const PICTURE_CHANNELS: usize = 3;

impl Conv {
    /// Checks that this is a 1×1 convolution of `inputs` channels to three colours.
    pub(super) fn ensure_picture(&self, op: &'static str, inputs: usize) -> Result<()> {
        if self.kernel == 1 && self.channels == [inputs, 0] && self.outputs() == PICTURE_CHANNELS {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "{op}: the last convolution is {0}x{0} from {1:?} to {2} channels, expected 1x1 from {inputs} to \
             {PICTURE_CHANNELS}",
            self.kernel,
            self.channels,
            self.outputs()
        )))
    }
}

/// Everything that one of the functions above asks for.
struct Call<'a> {
    op: &'static str,
    x: &'a Tensor,
    second: Option<&'a Tensor>,
    conv: &'a Conv,
    activation: Activation,
    residual: Option<&'a Tensor>,
    upsample: bool,
    pool: bool,
    /// With a factor the result is f32.
    scale: Option<f32>,
}

/// The extents of a call's output and how it sees its second source.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    height: usize,
    width: usize,
    outputs: usize,
    second_axes: [NearestAxis; 2],
}

impl<'a> Call<'a> {
    fn new(op: &'static str, x: &'a Tensor, conv: &'a Conv) -> Self {
        Call {
            op,
            x,
            second: None,
            conv,
            activation: Activation::None,
            residual: None,
            upsample: false,
            pool: false,
            scale: None,
        }
    }

    fn ensure_3x3(&self) -> Result<()> {
        match self.conv.kernel {
            3 => Ok(()),
            kernel => Err(Error::invalid(format!(
                "{}: the kernel is {kernel}x{kernel}, expected 3x3",
                self.op
            ))),
        }
    }

    /// Checks everything but what only the CUDA kernels ask for.
    fn sizes(&self) -> Result<Sizes> {
        let (op, x, conv) = (self.op, self.x, self.conv);
        self.ensure_source("x", x, conv.channels[0])?;
        let factor = if self.upsample { 2 } else { 1 };
        let (height, width) = (factor * x.dim(1), factor * x.dim(2));
        let mut second_axes = [NearestAxis::new(x.dim(1), height), NearestAxis::new(x.dim(2), width)];
        match self.second {
            Some(second) => {
                self.ensure_source("second", second, conv.channels[1])?;
                second.ensure_shape(op, "second", [x.dim(0), second.dim(1), second.dim(2), second.dim(3)])?;
                second.ensure_device(op, "second", &x.device())?;
                if [second.dim(1), second.dim(2)].contains(&0) {
                    return Err(Error::invalid(format!("{op}: second is an empty image")));
                }
                second_axes = [
                    NearestAxis::new(second.dim(1), height),
                    NearestAxis::new(second.dim(2), width),
                ];
            }
            None if conv.channels[1] > 0 => {
                return Err(Error::invalid(format!(
                    "{op}: the convolution has two sources, of {} and {} channels, but one was given",
                    conv.channels[0], conv.channels[1]
                )));
            }
            None => {}
        }
        let outputs = conv.outputs();
        ensure_parameter(op, "weight", &conv.weight, &conv.weight.shape(), x)?;
        ensure_parameter(op, "bias", &conv.bias, &[outputs], x)?;
        if let Some(residual) = self.residual {
            residual.ensure_shape(op, "residual", [x.dim(0), height, width, outputs])?;
            residual.ensure_dtype(op, "residual", x.device().compute_dtype())?;
            residual.ensure_device(op, "residual", &x.device())?;
        }
        Ok(Sizes {
            batch: x.dim(0),
            height,
            width,
            outputs,
            second_axes,
        })
    }

    fn ensure_source(&self, name: &str, source: &Tensor, channels: usize) -> Result<()> {
        source.ensure_rank(self.op, name, 4, "[batch, height, width, channels]")?;
        source.ensure_shape(self.op, name, [source.dim(0), source.dim(1), source.dim(2), channels])?;
        let may_be_f32 = channels <= MAX_IMAGE_CHANNELS && source.dtype() == DType::F32;
        match may_be_f32 {
            true => Ok(()),
            false => source.ensure_dtype(self.op, name, self.x.device().compute_dtype()),
        }
    }

    /// Tells profilers of the call, whose results have so many bytes. Of an upsampled image a pixel meets four pixels.
    fn told(&self, sizes: Sizes, result_bytes: usize) -> profile::Op {
        let taps = if self.upsample { 4 } else { self.conv.kernel.pow(2) };
        let pixels = sizes.batch * sizes.height * sizes.width;
        let flops = 2 * pixels * taps * self.conv.inputs() * sizes.outputs;
        let sources = [Some(self.x), self.second, self.residual].into_iter().flatten();
        profile::op(
            self.op,
            self.x,
            flops,
            sources.map(Tensor::bytes).sum::<usize>() + result_bytes,
        )
    }

    /// The result, and its maxima when they are asked for.
    fn run(&self) -> Result<(Tensor, Option<Tensor>)> {
        let sizes = self.sizes()?;
        let Sizes {
            batch,
            height,
            width,
            outputs,
            ..
        } = sizes;
        let device = self.x.device();
        let dtype = match self.scale {
            Some(_) => DType::F32,
            None => device.compute_dtype(),
        };
        let mut output = Tensor::empty(&device, [batch, height, width, outputs], dtype)?;
        let mut pooled = match self.pool {
            true => Some(Tensor::empty(&device, [batch, height / 2, width / 2, outputs], dtype)?),
            false => None,
        };
        let _op = self.told(sizes, output.bytes() + pooled.as_ref().map_or(0, Tensor::bytes));
        match self.x.cuda() {
            None => cpu::convolve(self, sizes, &mut output, pooled.as_mut())?,
            Some(device) => self.launch(device, sizes, Some(&mut output), pooled.as_mut())?,
        }
        Ok((output, pooled))
    }
}
