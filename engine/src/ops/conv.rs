//! Same-size convolutions of images and feature maps, and what is fused with them.
//!
//! With `sum = bias + Σ weight · x` over the taps of a 1×1 or 3×3 kernel (padding 1, stride 1) and all input channels:
//!
//! * [`conv2d`]: `activation(sum) + residual`; the input may be two images, as if concatenated along channels
//! * [`conv3x3_silu_pool`]: `full = silu(sum)` and its 2×2 maxima (an odd last row or column is dropped)
//! * [`upsample_conv3x3`]: `sum` over the input at twice its height and width, nearest; no activation
//! * [`conv2d_f32`]: `scale · sum` in f32, for the last layer of a model
//!
//! Shapes: images `[batch, height, width, channels]`, weight `[outputs, taps · inputs]` with taps in row-major order outermost
//! and input channels fastest, bias `[outputs]`. A second source with another grid is nearest-resized to the first one's (see
//! [`super::resize`]), before padding. On CUDA a source has a multiple of 8 channels, except that the last source of a 3×3
//! convolution may be an image of at most 3 channels, in bf16 or in f32 (which is rounded to bf16). Sums are f32.

mod backward;
mod cpu;

pub use backward::{
    ConvGrads, ConvSaved, SourceGrads, conv2d_backward, conv2d_f32_backward, conv2d_silu_with_sum,
    conv3x3_silu_pool_backward, conv3x3_silu_pool_with_sum, upsample_conv3x3_backward,
};

use super::resize::NearestAxis;
use super::{expect_parameter, grid};
use crate::device::{Args, CudaDevice};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

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
        weight.expect_rank(OP, "weight", 2, "[outputs, taps * inputs]")?;
        let inputs = channels[0] + channels[1];
        weight.expect_shape(OP, "weight", [weight.dim(0), kernel * kernel * inputs])?;
        bias.expect_shape(OP, "bias", [weight.dim(0)])?;
        Ok(Conv {
            weight,
            bias,
            kernel,
            channels,
        })
    }

    /// `[outputs, taps · inputs]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// `[outputs]`.
    pub fn bias(&self) -> &Tensor {
        &self.bias
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
    call.expect_3x3()?;
    let (full, pooled) = call.run()?;
    let pooled = pooled.ok_or_else(|| Error::invalid("conv3x3_silu_pool: no maxima were made"))?;
    Ok((full, pooled))
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
    call.expect_3x3()?;
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

    fn expect_3x3(&self) -> Result<()> {
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
        self.expect_source("x", x, conv.channels[0])?;
        let factor = if self.upsample { 2 } else { 1 };
        let (height, width) = (factor * x.dim(1), factor * x.dim(2));
        let mut second_axes = [NearestAxis::new(x.dim(1), height), NearestAxis::new(x.dim(2), width)];
        match self.second {
            Some(second) => {
                self.expect_source("second", second, conv.channels[1])?;
                second.expect_shape(op, "second", [x.dim(0), second.dim(1), second.dim(2), second.dim(3)])?;
                second.expect_device(op, "second", &x.device())?;
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
        expect_parameter(op, "weight", &conv.weight, &conv.weight.shape(), x)?;
        expect_parameter(op, "bias", &conv.bias, &[outputs], x)?;
        if let Some(residual) = self.residual {
            residual.expect_shape(op, "residual", [x.dim(0), height, width, outputs])?;
            residual.expect_dtype(op, "residual", x.device().compute_dtype())?;
            residual.expect_device(op, "residual", &x.device())?;
        }
        Ok(Sizes {
            batch: x.dim(0),
            height,
            width,
            outputs,
            second_axes,
        })
    }

    fn expect_source(&self, name: &str, source: &Tensor, channels: usize) -> Result<()> {
        source.expect_rank(self.op, name, 4, "[batch, height, width, channels]")?;
        source.expect_shape(self.op, name, [source.dim(0), source.dim(1), source.dim(2), channels])?;
        let may_be_f32 = channels <= MAX_IMAGE_CHANNELS && source.dtype() == DType::F32;
        match may_be_f32 {
            true => Ok(()),
            false => source.expect_dtype(self.op, name, self.x.device().compute_dtype()),
        }
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
        match self.x.cuda() {
            None => cpu::convolve(self, sizes, &mut output, pooled.as_mut())?,
            Some(device) => self.launch(device, sizes, &mut output, pooled.as_mut())?,
        }
        Ok((output, pooled))
    }
}

/// An image with at most this many channels may be the last source of a 3×3 convolution on CUDA, and may be f32.
const MAX_IMAGE_CHANNELS: usize = 3;

// Flags of the kernels, as in `cuda/common/conv_tile.cuh`.
const SILU: u32 = 1;
const F32_OUTPUT: u32 = 2;
const F32_IMAGE: u32 = 4;

impl Call<'_> {
    fn launch(
        &self,
        device: &CudaDevice,
        sizes: Sizes,
        output: &mut Tensor,
        pooled: Option<&mut Tensor>,
    ) -> Result<()> {
        let with_image = self.expect_kernel_sources()?;
        if self.residual.is_some() && !sizes.outputs.is_multiple_of(8) {
            return Err(Error::invalid(format!(
                "{}: the CUDA kernels add a residual of a multiple of 8 channels, not of {}",
                self.op, sizes.outputs
            )));
        }
        if let Some(scale) = self.scale
            && self.conv.kernel == 1
            && self.launch_picture(device, scale, output)?
        {
            return Ok(());
        }
        // The kernels for images take them as the second source, alone or after another.
        let (first, second) = match self.second {
            None if with_image => (None, Some(self.x)),
            second => (Some(self.x), second),
        };
        let channels = |source: Option<&Tensor>| source.map_or(0, |source| source.dim(3));
        let second_extent = |axis: usize| second.map_or(0, |second| second.dim(axis));
        let image_is_f32 = with_image && second.is_some_and(|second| second.dtype() == DType::F32);
        let flags = [
            (self.activation == Activation::Silu, SILU),
            (self.scale.is_some(), F32_OUTPUT),
            (image_is_f32, F32_IMAGE),
        ];
        let flags = flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum();
        let kernel = device.kernel("conv", self.kernel_name(with_image))?;
        let args = Args::new()
            .optional(first)?
            .optional(second)?
            .input(&self.conv.weight)?
            .input(&self.conv.bias)?
            .optional(self.residual)?
            .output(output)?
            .optional_output(pooled)?
            .int(sizes.height)
            .int(sizes.width)
            .int(channels(first))
            .int(channels(second))
            .int(second_extent(1))
            .int(second_extent(2))
            .int(sizes.outputs)
            .unsigned(flags)
            .float(self.scale.unwrap_or(1.0))
            .float(sizes.second_axes[0].ratio)
            .float(sizes.second_axes[1].ratio);
        let [tile_height, tile_width, tile_outputs, _] = kernel.info().tile.map(|extent| extent.max(1) as usize);
        let tiles = sizes.batch * sizes.height.div_ceil(tile_height) * sizes.width.div_ceil(tile_width);
        let blocks = grid(self.op, tiles * sizes.outputs.div_ceil(tile_outputs))?;
        // SAFETY: the arguments are those of the kernels of `conv.cu`, of the shapes and types checked above; one block per
        // tile of pixels and output channels; null pointers stand for what is absent.
        unsafe { kernel.launch(device, [blocks, 1, 1], args) }
    }

    /// Checks what the kernels ask of the sources' channels; returns whether the last source is an image.
    fn expect_kernel_sources(&self) -> Result<bool> {
        let last = self.second.unwrap_or(self.x);
        let whole_vectors = |source: &Tensor| source.dim(3).is_multiple_of(8);
        let with_image = last.dim(3) <= MAX_IMAGE_CHANNELS && self.conv.kernel == 3 && !self.upsample;
        if (whole_vectors(last) || with_image) && (self.second.is_none() || whole_vectors(self.x)) {
            return Ok(with_image);
        }
        Err(Error::invalid(format!(
            "{}: the CUDA kernels take sources of a multiple of 8 channels, or for 3x3 kernels a last one of at most \
             {MAX_IMAGE_CHANNELS}; these have {:?}",
            self.op, self.conv.channels
        )))
    }

    /// The kernel whose tile suits the channels.
    fn kernel_name(&self, with_image: bool) -> &'static str {
        if self.conv.kernel == 1 {
            return "conv1x1";
        }
        let outputs = match self.conv.outputs() {
            0..=16 => 16,
            17..=32 => 32,
            33..=64 => 64,
            _ => 128,
        };
        match (with_image, self.upsample, outputs, self.conv.inputs()) {
            (true, _, 16, _) => "conv3x3_image_16",
            (true, _, _, _) => "conv3x3_image_32",
            (_, false, 16, 0..=16) => "conv3x3_16x16",
            (_, false, 16, 17..=32) => "conv3x3_16x32",
            (_, false, 16, _) => "conv3x3_16x32_chunked",
            (_, false, 32, 0..=16) => "conv3x3_32x16",
            (_, false, 32, 17..=32) => "conv3x3_32x32",
            (_, false, 32, _) => "conv3x3_32x32_chunked",
            (_, false, 64, _) => "conv3x3_64x32_chunked",
            (_, false, _, _) => "conv3x3_128x32_chunked",
            (_, true, 16, 0..=16) => "upsample_conv3x3_16x16",
            (_, true, 16, 17..=32) => "upsample_conv3x3_16x32",
            (_, true, 16, _) => "upsample_conv3x3_16x32_chunked",
            (_, true, 32, 0..=16) => "upsample_conv3x3_32x16",
            (_, true, 32, 17..=32) => "upsample_conv3x3_32x32",
            (_, true, 32, _) => "upsample_conv3x3_32x32_chunked",
            (_, true, 64, _) => "upsample_conv3x3_64x32_chunked",
            (_, true, _, _) => "upsample_conv3x3_128x32_chunked",
        }
    }

    /// Launches the kernel for 1×1 convolutions to a picture, if it can do this one.
    fn launch_picture(&self, device: &CudaDevice, scale: f32, output: &mut Tensor) -> Result<bool> {
        const PICTURE_CHANNELS: usize = 3;
        let kernel = device.kernel("conv", "conv1x1_picture")?;
        let [pixels_per_block, most_inputs, ..] = kernel.info().tile.map(|extent| extent as usize);
        let plain = self.second.is_none() && self.residual.is_none() && self.activation == Activation::None;
        if !plain || self.conv.outputs() != PICTURE_CHANNELS || self.conv.inputs() > most_inputs {
            return Ok(false);
        }
        let pixels = self.x.shape().rows();
        let args = Args::new()
            .input(self.x)?
            .input(&self.conv.weight)?
            .input(&self.conv.bias)?
            .output(output)?
            .long(pixels as u64)
            .int(self.conv.inputs())
            .float(scale);
        let blocks = grid(self.op, pixels.div_ceil(pixels_per_block.max(1)))?;
        // SAFETY: the arguments are those of `conv1x1_picture`: one bf16 source of a multiple of 8 channels, three f32 outputs.
        unsafe { kernel.launch(device, [blocks, 1, 1], args)? };
        Ok(true)
    }
}
