//! The gradients of a convolution's sources: a convolution of the sum's gradient with the mirrored, transposed weights.
//!
//! On Hopper, where the channels are multiples of what its kernels take at a time, both sources' gradients are one convolution's
//! outputs, and an upsampled source's gathers from 4×4 pixels at once.

use std::sync::Arc;

use rayon::prelude::*;

use super::super::hopper::{Candidate, Shape, TILE_WIDTH};
use super::super::{Activation, Conv, Input, conv2d, map_of};
use super::activation::launch_windows;
use super::{Gradient, SourceGrads};
use crate::device::{Args, CudaDevice, MemoryTag};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::grid;
use crate::ops::resize::resize_nearest_backward;
use crate::tensor::Tensor;

const HOPPER_IMAGE: &str = "conv_sources_hopper";

/// Hopper's kernels: size and input of the convolution whose sources they are for, names, source channels of a tile, channels of
/// the sum in a chunk; ordered as in `hopper.rs`.
#[rustfmt::skip]
const KERNELS: [Candidate; 17] = [
    Candidate::new(3, Input::Same, "mirrored3x3_16x64_resident", 16, 64),
    Candidate::new(3, Input::Same, "mirrored3x3_16x32_resident", 16, 32),
    Candidate::new(3, Input::Same, "mirrored3x3_16x16_resident", 16, 16),
    Candidate::new(3, Input::Same, "mirrored3x3_32x64_resident", 32, 64),
    Candidate::new(3, Input::Same, "mirrored3x3_32x32_resident", 32, 32),
    Candidate::new(3, Input::Same, "mirrored3x3_32x16_resident", 32, 16),
    Candidate::new(3, Input::Same, "mirrored3x3_64x64", 64, 64),
    Candidate::new(3, Input::Same, "mirrored3x3_64x32_resident", 64, 32),
    Candidate::new(3, Input::Same, "mirrored3x3_64x16_resident", 64, 16),
    Candidate::new(3, Input::Same, "mirrored3x3_128x64", 128, 64),
    Candidate::new(3, Input::Same, "mirrored3x3_128x32", 128, 32),
    Candidate::new(3, Input::Same, "mirrored3x3_128x16", 128, 16),
    Candidate::new(3, Input::Upsampled, "gathered_16x16_resident", 16, 16),
    Candidate::new(3, Input::Upsampled, "gathered_32x32_resident", 32, 32),
    Candidate::new(3, Input::Upsampled, "gathered_64x64_resident", 64, 64),
    Candidate::new(3, Input::Upsampled, "gathered_128x64", 128, 64),
    Candidate::new(1, Input::Same, "mirrored1x1_128x64", 128, 64),
];

/// Consecutive channels of the sources, on the grid of the first one.
struct Channels {
    first: usize,
    count: usize,
    /// How many of them go to the first image; the others go to the second.
    to_first: usize,
}

impl Gradient<'_> {
    /// The gradients of the sources that are wanted, each on its own grid.
    pub(super) fn source_gradients(&self, ds: &Tensor, want: [bool; 2]) -> Result<SourceGrads> {
        let [first, second] = self.call.conv.channels;
        let all = Channels {
            first: 0,
            count: first + second,
            to_first: first,
        };
        if want == [true, true]
            && self.on_one_grid()
            && let Some((x, second)) = self.by_hopper(ds, all)?
        {
            return Ok(SourceGrads { x: Some(x), second });
        }
        let x = want[0].then(|| self.source_gradient(ds, 0)).transpose()?;
        let second = want[1].then(|| self.source_gradient(ds, 1)).transpose()?;
        Ok(SourceGrads { x, second })
    }

    /// Whether there is no second source on another grid.
    pub(super) fn on_one_grid(&self) -> bool {
        let grid = [self.sizes.height, self.sizes.width];
        self.call
            .second
            .is_none_or(|second| [second.dim(1), second.dim(2)] == grid)
    }

    /// The gradient of source 0 or 1, on its own grid.
    fn source_gradient(&self, ds: &Tensor, source: usize) -> Result<Tensor> {
        let [first, second] = self.call.conv.channels;
        let count = [first, second][source];
        let channels = Channels {
            first: if source == 0 { 0 } else { first },
            count,
            to_first: count,
        };
        let gradient = match self.by_hopper(ds, channels)? {
            Some((gradient, _)) => gradient,
            None => {
                let gradient = conv2d(ds, None, &self.mirrored(source)?, Activation::None, None)?;
                match self.call.upsample {
                    true => self.gather_copies(&gradient)?,
                    false => gradient,
                }
            }
        };
        match self.call.second.filter(|_| source == 1 && !self.on_one_grid()) {
            Some(second) => resize_nearest_backward(&gradient, second.dim(1), second.dim(2)),
            None => Ok(gradient),
        }
    }

    /// The gradients of some channels by Hopper's kernels, if one of them can do it: one image or two.
    fn by_hopper(&self, ds: &Tensor, channels: Channels) -> Result<Option<(Tensor, Option<Tensor>)>> {
        let Some(device) = ds.cuda().filter(|device| device.has_hopper_kernels()) else {
            return Ok(None);
        };
        let Channels { first, count, to_first } = channels;
        // Stores of 16 bytes.
        if !count.is_multiple_of(8) || !to_first.is_multiple_of(8) {
            return Ok(None);
        }
        let (conv, x) = (self.call.conv, self.call.x);
        let shape = Shape {
            kernel: conv.kernel,
            input: if self.call.upsample {
                Input::Upsampled
            } else {
                Input::Same
            },
            channels: [conv.outputs(), 0],
            outputs: count,
        };
        let Some(candidate) = Candidate::choose(device, HOPPER_IMAGE, &KERNELS, &shape)? else {
            return Ok(None);
        };
        let kernel = device.kernel(HOPPER_IMAGE, candidate.name)?;
        let [columns, chunk, tile_height, _] = kernel.info().tile;
        let margin = candidate.taps_along() as u32 - 1;
        let box_extents = [tile_height + margin, TILE_WIDTH as u32 + margin];
        let map = map_of(ds, chunk, box_extents, self.call.upsample)?;
        let arranged = self.arrange(device, candidate, &shape, first)?;
        let image = |channels: usize| Tensor::empty_compute(&ds.device(), [x.dim(0), x.dim(1), x.dim(2), channels]);
        let mut gradient = image(to_first)?;
        let mut second = (to_first < count).then(|| image(count - to_first)).transpose()?;
        let parities = if self.call.upsample { 4 } else { 1 };
        let args = Args::new()
            .tensor_map(map)
            .input(&arranged)?
            .output(&mut gradient)?
            .optional_output(second.as_mut())?
            .int(x.dim(0))
            .int(x.dim(1))
            .int(x.dim(2))
            .int(count)
            .int(to_first)
            .int(parities * conv.outputs() / chunk as usize);
        let places = x.dim(1).div_ceil(tile_height as usize) * x.dim(2).div_ceil(TILE_WIDTH);
        let tiles = x.dim(0) * places * count.div_ceil(columns as usize);
        let blocks = grid(self.call.op, tiles)?.min(device.multiprocessors());
        // SAFETY: the arguments are those of the kernels of `conv_sources_hopper.cu`, the map's boxes and the weights as they want
        // them; the blocks share the tiles whatever their number; a null pointer stands for an absent image, which gets no channels.
        unsafe { kernel.launch(device, [blocks, 1, 1], args)? };
        Ok(Some((gradient, second)))
    }

    /// The weights that lead from the channels of the sources from `first` on, as the kernel wants them.
    fn arrange(&self, device: &Arc<CudaDevice>, candidate: &Candidate, shape: &Shape, first: usize) -> Result<Tensor> {
        let conv = self.call.conv;
        let elements = candidate.arranged_elements(shape);
        let _tag = MemoryTag::Workspace.scope();
        let mut arranged = Tensor::empty(&conv.weight.device(), [elements], DType::Bf16)?;
        let kernel = device.kernel(HOPPER_IMAGE, "conv_arrange_sources")?;
        let units = elements / 8;
        let args = Args::new()
            .input(&conv.weight)?
            .output(&mut arranged)?
            .long(units as u64)
            .int(conv.outputs())
            .int(conv.inputs())
            .int(first)
            .int(shape.outputs)
            .int(candidate.columns)
            .int(candidate.chunk)
            .int(conv.kernel)
            .int(usize::from(shape.input == Input::Upsampled));
        let blocks = grid(self.call.op, units.div_ceil(kernel.info().tile[0].max(1) as usize))?;
        // SAFETY: the arguments are those of `conv_arrange_sources`; the weights have the shape that `Conv::new` checked, the result
        // eight elements per thread.
        unsafe { kernel.launch(device, [blocks, 1, 1], args)? };
        Ok(arranged)
    }

    /// The convolution from the sum's channels to those of one source, with mirrored taps and no bias.
    fn mirrored(&self, source: usize) -> Result<Conv> {
        let conv = self.call.conv;
        let (outputs, channels) = (conv.outputs(), conv.channels[source]);
        let first = if source == 0 { 0 } else { conv.channels[0] };
        let taps = conv.kernel * conv.kernel;
        let device = self.call.x.device();
        let mut weight = Tensor::empty_compute(&device, [channels, taps * outputs])?;
        let bias = Tensor::zeros(&device, [channels], device.compute_dtype())?;
        if let Some(cuda) = conv.weight.cuda() {
            let kernel = cuda.kernel("conv_activation", "conv_mirror")?;
            let elements = weight.elements();
            let args = Args::new()
                .input(&conv.weight)?
                .output(&mut weight)?
                .int(outputs)
                .int(taps)
                .int(conv.inputs())
                .int(first)
                .int(channels);
            let blocks = grid(self.call.op, elements.div_ceil(kernel.info().tile[0].max(1) as usize))?;
            // SAFETY: the arguments are those of `conv_mirror`; the weights have the shape that `Conv::new` checked, the result one
            // element per thread.
            unsafe { kernel.launch(cuda, [blocks, 1, 1], args)? };
            return Conv::new(weight, bias, conv.kernel, &[outputs]);
        }
        let from = conv.weight.as_slice::<f32>()?;
        let rows = weight.as_mut_slice::<f32>()?.par_chunks_mut(taps * outputs);
        rows.enumerate().for_each(|(channel, row)| {
            for (index, to) in row.iter_mut().enumerate() {
                let (tap, output) = (taps - 1 - index / outputs, index % outputs);
                *to = from[(output * taps + tap) * conv.inputs() + first + channel];
            }
        });
        Conv::new(weight, bias, conv.kernel, &[outputs])
    }

    /// The gradient of an image from that of itself at twice its height and width.
    fn gather_copies(&self, gradient: &Tensor) -> Result<Tensor> {
        let x = self.call.x;
        let (width, channels) = (x.dim(2), x.dim(3));
        let mut gathered = Tensor::empty_compute(&x.device(), x.shape())?;
        if let Some(device) = x.cuda() {
            let args = Args::new().input(gradient)?.output(&mut gathered)?;
            let names = ["conv_gather_copies", "conv_gather_copies_single"];
            // SAFETY: the kernel's images are the copies, of twice the result's height and width, and the result, both bf16.
            unsafe { launch_windows(device, self.call.op, names, gradient, args)? };
            return Ok(gathered);
        }
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
