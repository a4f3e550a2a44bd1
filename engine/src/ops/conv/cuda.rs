//! Convolutions on CUDA by the kernels that every GPU runs; `hopper` has those that Hopper adds.

use super::{Activation, Call, MAX_IMAGE_CHANNELS, PICTURE_CHANNELS, Sizes};
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::grid;
use crate::tensor::Tensor;

// Flags of the kernels, as in `cuda/common/conv_tile.cuh`.
const SILU: u32 = 1;
const F32_OUTPUT: u32 = 2;
const F32_IMAGE: u32 = 4;

impl Call<'_> {
    pub(super) fn launch(
        &self,
        device: &CudaDevice,
        sizes: Sizes,
        output: Option<&mut Tensor>,
        pooled: Option<&mut Tensor>,
    ) -> Result<()> {
        if let Some(arranged) = self.arranged() {
            return self.launch_hopper(device, sizes, arranged, output, pooled);
        }
        if self.suits_image_kernel() {
            return self.launch_image(device, sizes, output, pooled);
        }
        let Some(output) = output else {
            return Err(Error::invalid(format!(
                "{}: there is no kernel for the maxima alone",
                self.op
            )));
        };
        let with_image = self.ensure_kernel_sources()?;
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

    /// Whether the kernels for an image alone can do this.
    fn suits_image_kernel(&self) -> bool {
        self.second.is_none()
            && self.conv.kernel == 3
            && !self.upsample
            && self.scale.is_none()
            && self.residual.is_none()
            && self.x.dim(3) == PICTURE_CHANNELS
            && self.conv.outputs().is_multiple_of(8)
    }

    fn launch_image(
        &self,
        device: &CudaDevice,
        sizes: Sizes,
        output: Option<&mut Tensor>,
        pooled: Option<&mut Tensor>,
    ) -> Result<()> {
        let name = match (self.x.dtype(), sizes.outputs) {
            (DType::F32, 0..=16) => "conv_image_16_f32",
            (DType::F32, _) => "conv_image_32_f32",
            (_, 0..=16) => "conv_image_16",
            (_, _) => "conv_image_32",
        };
        let kernel = device.kernel("conv_image", name)?;
        let args = Args::new()
            .input(self.x)?
            .input(&self.conv.weight)?
            .input(&self.conv.bias)?
            .optional_output(output)?
            .optional_output(pooled)?
            .int(sizes.batch)
            .int(sizes.height)
            .int(sizes.width)
            .int(sizes.outputs)
            .unsigned(if self.activation == Activation::Silu { SILU } else { 0 });
        let info = kernel.info();
        let [tile_height, tile_width, tile_outputs, _] = info.tile.map(|extent| extent.max(1) as usize);
        let tiles = sizes.batch * sizes.height.div_ceil(tile_height) * sizes.width.div_ceil(tile_width);
        let channel_blocks = grid(self.op, sizes.outputs.div_ceil(tile_outputs))?;
        // As many blocks as run at once: each reads the weights once for all its tiles.
        let resident =
            (device.multiprocessors() * kernel.resident_blocks(info.threads)?).div_ceil(channel_blocks.max(1));
        let blocks = grid(self.op, tiles)?.min(resident.max(1));
        // SAFETY: the arguments are those of the kernels of `conv_image.cu`, of the shapes and types checked at the door; the blocks
        // share the tiles whatever their number; null pointers stand for what is absent.
        unsafe { kernel.launch(device, [blocks, channel_blocks, 1], args) }
    }

    /// The maxima alone, where there is a kernel for that.
    pub(super) fn launch_pooled(&self) -> Result<Option<Tensor>> {
        let Some(device) = self.x.cuda() else { return Ok(None) };
        let sizes = self.sizes()?;
        if self.arranged().is_none() && !self.suits_image_kernel() {
            return Ok(None);
        }
        let shape = [sizes.batch, sizes.height / 2, sizes.width / 2, sizes.outputs];
        let mut pooled = Tensor::empty_compute(&self.x.device(), shape)?;
        let _op = self.told(sizes, pooled.bytes());
        self.launch(device, sizes, None, Some(&mut pooled))?;
        Ok(Some(pooled))
    }

    /// Checks what the kernels ask of the sources' channels; returns whether the last source is an image.
    pub(super) fn ensure_kernel_sources(&self) -> Result<bool> {
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
