//! The gradients of a convolution's weight and bias: the product, over all pixels, of the sum's gradient and the
//! neighbourhoods, and the sum over all pixels.
//!
//! On CUDA blocks share the pixels and leave their sums in f32, and a second kernel adds these up in one order. On Hopper sources
//! on one grid go through warpgroup products.

use std::sync::Arc;

use rayon::prelude::*;

use super::super::cpu::{BAND_VALUES, gather_row, sources};
use super::super::hopper::TILE_WIDTH;
use super::super::map_of;
use super::{ConvGrads, Gradient};
use crate::device::{Args, CudaDevice, Kernel, MemoryTag};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::grid;
use crate::ops::linear::{Matrix, cpu_matmul};
use crate::tensor::Tensor;

const IMAGE: &str = "conv_weights";
const HOPPER_IMAGE: &str = "conv_weights_hopper";

/// From so many parts on, threads share an element's.
const MANY_PARTS: usize = 16;

// Flags of the portable kernels, as in `conv_weights.cu`.
const F32_FIRST: u32 = 1;
const F32_SECOND: u32 = 2;

/// What blocks that share the pixels have left.
pub(super) struct Parts {
    /// f32 `[count · turns, outputs, taps, stride]`
    pub weights: Tensor,
    /// f32 `[count · turns, outputs]`
    pub biases: Tensor,
    pub count: usize,
    /// Kinds of pixels that are summed apart: the parities of an upsampled image's rows and columns, with 2×2 taps each, or one.
    pub turns: usize,
    /// Channels of both sources, rounded up.
    pub stride: usize,
}

/// A kernel for the sums, and how it covers the work.
struct Cover {
    kernel: Arc<Kernel>,
    turns: usize,
    /// Blocks for each part of the pixels.
    blocks: usize,
    /// Parts of the pixels.
    splits: usize,
}

impl Gradient<'_> {
    /// Adds the gradients of weight and bias.
    pub(super) fn add_parameter_gradients(&self, ds: &Tensor, grads: ConvGrads<'_>) -> Result<()> {
        if self.pixels() == 0 || ds.elements() == 0 {
            return Ok(());
        }
        let Some(device) = self.call.x.cuda() else {
            self.cpu_add_weight_gradient(ds, grads.weight)?;
            return self.cpu_add_bias_gradient(ds, grads.bias);
        };
        let parts = match self.hopper_name(device) {
            Some(name) => self.hopper_parts(device, name, ds)?,
            None => self.portable_parts(device, ds)?,
        };
        let taps = self.call.conv.kernel * self.call.conv.kernel;
        add_parts(device, self.call.op, &parts, taps, grads)
    }

    fn cpu_add_weight_gradient(&self, ds: &Tensor, weight: &mut Tensor) -> Result<()> {
        let (conv, sizes) = (self.call.conv, self.sizes);
        let depth = conv.kernel * conv.kernel * conv.inputs();
        let (row_depth, row_outputs) = (sizes.width * depth, sizes.width * sizes.outputs);
        let band_rows = (BAND_VALUES / row_depth).clamp(1, sizes.batch * sizes.height);
        let mut neighbourhoods = vec![0.0; band_rows * row_depth];
        let sources = sources(&self.call, sizes)?;
        let weight = weight.as_mut_slice::<f32>()?;
        for (band, ds) in ds.as_slice::<f32>()?.chunks(band_rows * row_outputs).enumerate() {
            let rows = ds.len() / row_outputs;
            let neighbourhoods = &mut neighbourhoods[..rows * row_depth];
            let by_row = neighbourhoods.par_chunks_mut(row_depth).enumerate();
            by_row.for_each(|(row, values)| gather_row(conv.kernel, sizes, &sources, band * band_rows + row, values));
            let ds = Matrix {
                values: ds,
                row_stride: 1,
                column_stride: sizes.outputs,
            };
            let neighbourhoods = Matrix {
                values: neighbourhoods,
                row_stride: depth,
                column_stride: 1,
            };
            cpu_matmul(
                [sizes.outputs, rows * sizes.width, depth],
                ds,
                neighbourhoods,
                true,
                weight,
            );
        }
        Ok(())
    }
    fn cpu_add_bias_gradient(&self, ds: &Tensor, bias: &mut Tensor) -> Result<()> {
        let mut sums = vec![0.0; self.sizes.outputs];
        for pixel in ds.as_slice::<f32>()?.chunks(self.sizes.outputs) {
            sums.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += value);
        }
        let bias = bias.as_mut_slice::<f32>()?;
        bias.iter_mut().zip(sums).for_each(|(bias, sum)| *bias += sum);
        Ok(())
    }

    /// Hopper's kernel for this convolution, if there is one.
    fn hopper_name(&self, device: &CudaDevice) -> Option<&'static str> {
        let (conv, outputs) = (self.call.conv, self.sizes.outputs);
        let whole_vectors =
            conv.channels.iter().all(|channels| channels.is_multiple_of(8)) && outputs.is_multiple_of(8);
        if !device.has_hopper_kernels() || !whole_vectors || !self.on_one_grid() {
            return None;
        }
        // The smallest block that holds all channels, or the largest there is.
        let size = |channels: usize| match channels {
            0..=16 => 16,
            17..=32 => 32,
            _ => 64,
        };
        let channels = conv.channels[0].max(conv.channels[1]);
        match (conv.kernel, self.call.upsample, size(outputs), size(channels)) {
            (1, _, 64, 64) => Some("weights_1x1_128x128"),
            (1, _, _, _) => None,
            (_, true, 16, 16) => Some("weights_upsampled_16x16"),
            (_, true, 16 | 32, 16 | 32) => Some("weights_upsampled_32x32"),
            (_, true, _, _) => Some("weights_upsampled_64x64"),
            (_, false, 16, 16) => Some("weights_3x3_16x16"),
            (_, false, 16, 32) => Some("weights_3x3_16x32"),
            (_, false, 16, _) => Some("weights_3x3_16x64"),
            (_, false, 32, 16) => Some("weights_3x3_32x16"),
            (_, false, 32, 32) => Some("weights_3x3_32x32"),
            (_, false, 32, _) => Some("weights_3x3_32x64"),
            (_, false, _, 16) => Some("weights_3x3_64x16"),
            (_, false, _, 32) => Some("weights_3x3_64x32"),
            (_, false, _, _) => Some("weights_3x3_64x64"),
        }
    }

    /// The portable kernel for this convolution.
    fn portable_name(&self) -> &'static str {
        let channels = self.call.conv.channels[0].max(self.call.conv.channels[1]);
        match (self.call.conv.kernel, self.call.upsample, self.sizes.outputs, channels) {
            (1, ..) => "weights_1x1_32x64",
            (_, true, 0..=16, 0..=16) => "weights_upsampled_16x16",
            (_, true, ..) => "weights_upsampled_32x64",
            (_, false, 0..=16, 0..=8) => "weights_3x3_16x8",
            (_, false, 0..=16, 9..=16) => "weights_3x3_16x16",
            (_, false, 0..=16, _) => "weights_3x3_16x64",
            (_, false, _, 0..=8) => "weights_3x3_32x8",
            (_, false, _, 9..=16) => "weights_3x3_32x16",
            (_, false, ..) => "weights_3x3_32x64",
        }
    }

    /// How the kernel covers a grid of `height` × `width` pixels, with `slots` blocks at a time.
    fn cover(&self, kernel: Arc<Kernel>, [height, width]: [usize; 2], turns: usize, slots: usize) -> Cover {
        let [outputs, channels, tile_height, _] = kernel.info().tile.map(|extent| extent.max(1) as usize);
        let of_channels = self.call.conv.channels.map(|count| count.div_ceil(channels));
        let blocks = turns * self.sizes.outputs.div_ceil(outputs) * (of_channels[0] + of_channels[1]);
        let units = self.sizes.batch * height.div_ceil(tile_height) * width.div_ceil(TILE_WIDTH);
        Cover {
            kernel,
            turns,
            blocks,
            splits: best_splits(blocks, units, slots),
        }
    }

    /// Room for what the blocks leave.
    fn parts(&self, cover: &Cover) -> Result<Parts> {
        let _tag = MemoryTag::Workspace.scope();
        let (conv, outputs) = (self.call.conv, self.sizes.outputs);
        let count = cover.splits * cover.kernel.info().tile[3].max(1) as usize;
        let taps = match cover.turns {
            1 => conv.kernel * conv.kernel,
            _ => 4,
        };
        let stride = conv.inputs().next_multiple_of(8);
        let device = self.call.x.device();
        Ok(Parts {
            weights: Tensor::empty(&device, [count * cover.turns, outputs, taps, stride], DType::F32)?,
            biases: Tensor::empty(&device, [count * cover.turns, outputs], DType::F32)?,
            count,
            turns: cover.turns,
            stride,
        })
    }

    fn hopper_parts(&self, device: &Arc<CudaDevice>, name: &'static str, ds: &Tensor) -> Result<Parts> {
        let (conv, x) = (self.call.conv, self.call.x);
        let kernel = device.kernel(HOPPER_IMAGE, name)?;
        let (taps_along, turns) = match self.call.upsample {
            true => (2, 4),
            false => (conv.kernel, 1),
        };
        let [outputs, channels, tile_height, _] = kernel.info().tile;
        // With one tap a block of either is two boxes.
        let boxes = if taps_along == 1 { 2 } else { 1 };
        let margin = taps_along as u32 - 1;
        let width = TILE_WIDTH as u32;
        let ds_map = map_of(ds, outputs / boxes, [tile_height + margin, width], self.call.upsample)?;
        let source = |source: &Tensor| map_of(source, channels / boxes, [tile_height, width + margin], false);
        let cover = self.cover(kernel, [x.dim(1), x.dim(2)], turns, device.multiprocessors() as usize);
        let mut parts = self.parts(&cover)?;
        let args = Args::new()
            .tensor_map(ds_map)
            .tensor_map(source(x)?)
            .tensor_map(source(self.call.second.unwrap_or(x))?)
            .output(&mut parts.weights)?
            .output(&mut parts.biases)?
            .int(self.sizes.batch)
            .int(x.dim(1))
            .int(x.dim(2))
            .int(conv.outputs())
            .int(conv.channels[0])
            .int(conv.channels[1])
            .int(parts.stride)
            .int(cover.splits);
        let blocks = grid(self.call.op, cover.blocks * cover.splits)?;
        // SAFETY: the arguments are those of the kernels of `conv_weights_hopper.cu`, the maps' boxes and the parts as they want
        // them; shapes and types were checked at the door.
        unsafe { cover.kernel.launch(device, [blocks, 1, 1], args)? };
        Ok(parts)
    }

    fn portable_parts(&self, device: &Arc<CudaDevice>, ds: &Tensor) -> Result<Parts> {
        let (call, sizes) = (&self.call, self.sizes);
        let kernel = device.kernel(IMAGE, self.portable_name())?;
        let slots = device.multiprocessors() * kernel.resident_blocks(kernel.info().threads)?;
        let cover = self.cover(kernel, [sizes.height, sizes.width], 1, slots as usize);
        let mut parts = self.parts(&cover)?;
        let second_extent = |axis: usize| call.second.map_or(0, |second| second.dim(axis));
        let is_f32 = |source: Option<&Tensor>| source.is_some_and(|source| source.dtype() == DType::F32);
        let flags = [(is_f32(Some(call.x)), F32_FIRST), (is_f32(call.second), F32_SECOND)];
        let flags = flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum();
        let args = Args::new()
            .input(ds)?
            .input(call.x)?
            .optional(call.second)?
            .output(&mut parts.weights)?
            .output(&mut parts.biases)?
            .int(sizes.batch)
            .int(sizes.height)
            .int(sizes.width)
            .int(sizes.outputs)
            .int(call.x.dim(1))
            .int(call.x.dim(2))
            .int(call.x.dim(3))
            .int(second_extent(1))
            .int(second_extent(2))
            .int(second_extent(3))
            .int(parts.stride)
            .int(cover.splits)
            .unsigned(flags)
            .float(sizes.second_axes[0].ratio)
            .float(sizes.second_axes[1].ratio);
        let blocks = grid(call.op, cover.blocks * cover.splits)?;
        // SAFETY: the arguments are those of the kernels of `conv_weights.cu`, the parts as they want them; shapes and types were
        // checked at the door; a null pointer stands for an absent source, which has no channels.
        unsafe { cover.kernel.launch(device, [blocks, 1, 1], args)? };
        Ok(parts)
    }
}

/// Adds the sums of all parts to the gradients of a convolution's parameters.
pub(super) fn add_parts(
    device: &CudaDevice,
    op: &'static str,
    parts: &Parts,
    taps: usize,
    grads: ConvGrads<'_>,
) -> Result<()> {
    let (outputs, inputs) = (grads.weight.dim(0), grads.weight.dim(1) / taps);
    let elements = grads.weight.elements() + grads.bias.elements();
    let name = match parts.count {
        0..MANY_PARTS => "conv_weights_sum_few",
        _ => "conv_weights_sum",
    };
    let kernel = device.kernel(IMAGE, name)?;
    let args = Args::new()
        .input(&parts.weights)?
        .input(&parts.biases)?
        .output(grads.weight)?
        .output(grads.bias)?
        .int(parts.count)
        .int(parts.turns)
        .int(outputs)
        .int(taps)
        .int(inputs)
        .int(parts.stride);
    let blocks = grid(op, elements.div_ceil(kernel.info().tile[0].max(1) as usize))?;
    // SAFETY: the arguments are those of the `conv_weights_sum` kernels; the parts have the shapes above, the gradients those that were checked
    // at the door.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}

/// In how many parts to cut `units` of pixels when each part takes `blocks` blocks, of which `slots` run at a time: the fewest
/// that keep all slots about as busy as any number does.
fn best_splits(blocks: usize, units: usize, slots: usize) -> usize {
    let most = (3 * slots).div_ceil(blocks.max(1)).clamp(1, units.max(1));
    // The time, in that of one block that does all units.
    let time = |splits: usize| (blocks * splits).div_ceil(slots.max(1)) as f64 / splits as f64;
    let shortest = (1..=most).map(time).fold(f64::INFINITY, f64::min);
    (1..=most).find(|&splits| time(splits) <= 1.05 * shortest).unwrap_or(1)
}
