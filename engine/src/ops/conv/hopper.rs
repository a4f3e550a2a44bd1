//! Convolutions on Hopper's warpgroup products: which kernel, the arrangement of its weights, and its launch. Gradients of
//! sources are convolutions of the same kind (`backward/inputs.rs`).

use std::sync::Arc;

use super::{Activation, Call, Canvas, Conv, Input, Sizes};
use crate::device::{Args, CudaDevice, Kernel, TensorMap, TensorMapSpec};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::grid;
use crate::tensor::Tensor;

const IMAGE: &str = "conv_hopper";

/// Pixels that a tile is wide, as in `cuda/common/conv_hopper.cuh`.
pub(super) const TILE_WIDTH: usize = 16;

/// The kernels: size and input of the convolution, names, output channels of a tile, input channels of a chunk. Those with
/// fewer columns come first, then those with larger chunks.
#[rustfmt::skip]
const KERNELS: [Candidate; 15] = [
    Candidate::new(3, Input::Same, "conv3x3_16x64_resident", 16, 64),
    Candidate::new(3, Input::Same, "conv3x3_16x32_resident", 16, 32),
    Candidate::new(3, Input::Same, "conv3x3_16x16_resident", 16, 16),
    Candidate::new(3, Input::Same, "conv3x3_32x64_resident", 32, 64),
    Candidate::new(3, Input::Same, "conv3x3_32x32_resident", 32, 32).with_picture("picture_32x32_resident"),
    Candidate::new(3, Input::Same, "conv3x3_32x16_resident", 32, 16),
    Candidate::new(3, Input::Same, "conv3x3_64x64", 64, 64).with_picture("picture_64x64"),
    Candidate::new(3, Input::Same, "conv3x3_64x32_resident", 64, 32),
    Candidate::new(3, Input::Same, "conv3x3_128x64", 128, 64),
    Candidate::new(3, Input::Same, "conv3x3_128x16", 128, 16),
    Candidate::new(3, Input::Upsampled, "upsample_16x16_resident", 16, 16),
    Candidate::new(3, Input::Upsampled, "upsample_32x32_resident", 32, 32),
    Candidate::new(3, Input::Upsampled, "upsample_64x64_resident", 64, 64),
    Candidate::new(3, Input::Upsampled, "upsample_128x64", 128, 64),
    Candidate::new(1, Input::Same, "conv1x1_128x64", 128, 64),
];

/// A convolution's sizes, as far as the choice of its kernel depends on them.
pub(super) struct Shape {
    pub kernel: usize,
    pub input: Input,
    /// Of the sources; 0 for a second one that is not there.
    pub channels: [usize; 2],
    pub outputs: usize,
}

/// A kernel, and what it is for.
#[derive(Debug)]
pub(super) struct Candidate {
    kernel: usize,
    input: Input,
    pub name: &'static str,
    /// The same convolution followed by one to a picture.
    picture: Option<&'static str>,
    pub columns: usize,
    pub chunk: usize,
}

impl Candidate {
    pub const fn new(kernel: usize, input: Input, name: &'static str, columns: usize, chunk: usize) -> Self {
        Candidate {
            kernel,
            input,
            name,
            picture: None,
            columns,
            chunk,
        }
    }

    const fn with_picture(mut self, name: &'static str) -> Self {
        self.picture = Some(name);
        self
    }

    /// The candidate of an image that suits a convolution best; `None` where there is none.
    pub fn choose(
        device: &Arc<CudaDevice>,
        image: &'static str,
        candidates: &'static [Candidate],
        shape: &Shape,
    ) -> Result<Option<&'static Candidate>> {
        for candidate in candidates.iter().filter(|candidate| candidate.suits(shape)) {
            let capacity = device.kernel(image, candidate.name)?.info().tile[3] as usize;
            // The fewest columns that hold all outputs, or the most there are.
            if candidate.holds(shape, capacity) && (shape.outputs <= candidate.columns || candidate.columns == 128) {
                return Ok(Some(candidate));
            }
        }
        Ok(None)
    }

    /// Taps that a pixel of the output meets, along each axis.
    pub fn taps_along(&self) -> usize {
        match self.input {
            Input::Same => self.kernel,
            Input::Upsampled => 2,
        }
    }

    /// Pieces of weights of one block of output channels.
    fn pieces(&self, shape: &Shape) -> usize {
        let parities = match self.input {
            Input::Same => 1,
            Input::Upsampled => 4,
        };
        parities * (shape.channels[0] + shape.channels[1]) / self.chunk * self.taps_along().pow(2)
    }

    /// Elements of the arranged weights.
    pub fn arranged_elements(&self, shape: &Shape) -> usize {
        shape.outputs.div_ceil(self.columns) * self.pieces(shape) * self.columns * self.chunk
    }

    fn suits(&self, shape: &Shape) -> bool {
        self.kernel == shape.kernel
            && self.input == shape.input
            && shape
                .channels
                .iter()
                .all(|channels| channels.is_multiple_of(self.chunk))
    }

    /// Whether all weights fit where the kernel keeps them; `capacity` is the number of pieces, 0 if that does not matter.
    fn holds(&self, shape: &Shape, capacity: usize) -> bool {
        capacity == 0 || (shape.outputs <= self.columns && self.pieces(shape) <= capacity)
    }
}

/// A convolution's weights as one of the kernels wants them.
#[derive(Clone, Debug)]
pub(super) struct Arranged {
    weights: Tensor,
    candidate: &'static Candidate,
}

impl Arranged {
    /// Arranges the weights of `conv` for the kernel that suits it best; `None` where there is none.
    pub fn new(conv: &Conv, input: Input) -> Result<Option<Self>> {
        let Some(device) = conv.weight.cuda().filter(|device| device.has_hopper_kernels()) else {
            return Ok(None);
        };
        let shape = Shape {
            kernel: conv.kernel,
            input,
            channels: conv.channels,
            outputs: conv.outputs(),
        };
        let Some(candidate) = Candidate::choose(device, IMAGE, &KERNELS, &shape)? else {
            return Ok(None);
        };
        let elements = candidate.arranged_elements(&shape);
        let weights = Tensor::empty(&conv.weight.device(), [elements], DType::Bf16)?;
        Arranged { weights, candidate }.renewed(conv).map(Some)
    }

    /// The same with the weights that `conv` has now.
    pub fn renewed(mut self, conv: &Conv) -> Result<Self> {
        if let Some(device) = conv.weight.cuda() {
            arrange(device, conv, self.candidate, &mut self.weights)?;
        }
        Ok(self)
    }
}

fn arrange(device: &Arc<CudaDevice>, conv: &Conv, candidate: &Candidate, weights: &mut Tensor) -> Result<()> {
    const OP: &str = "conv_arrange";
    let Candidate { columns, chunk, .. } = *candidate;
    let elements = weights.elements();
    let kernel = device.kernel(IMAGE, OP)?;
    let args = Args::new()
        .input(&conv.weight)?
        .output(weights)?
        .long(elements as u64)
        .int(conv.outputs())
        .int(conv.inputs())
        .int(columns)
        .int(chunk)
        .int(conv.kernel)
        .int(usize::from(candidate.input == Input::Upsampled));
    let blocks = grid(OP, elements.div_ceil(kernel.info().tile[0].max(1) as usize))?;
    // SAFETY: the arguments are those of `conv_arrange`; the weights have the shape that `Conv::new` checked, the result one
    // element per thread.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}

impl Call<'_> {
    /// The arranged weights, if the call is one that their kernel can do.
    pub(super) fn arranged(&self) -> Option<&Arranged> {
        let arranged = self.conv.arranged.as_ref()?;
        let input = match self.upsample {
            true => Input::Upsampled,
            false => Input::Same,
        };
        let one_grid = self
            .second
            .is_none_or(|second| second.shape()[..3] == self.x.shape()[..3]);
        // Stores of 16 bytes; f32 is stored one by one.
        let whole_vectors = self.scale.is_some() || self.conv.outputs().is_multiple_of(8);
        let plain_end = self.scale.is_none() || (self.residual.is_none() && !self.pool);
        (arranged.candidate.input == input && one_grid && whole_vectors && plain_end).then_some(arranged)
    }

    /// Whether the kernel of the arranged weights can go on to a picture.
    pub(super) fn suits_picture(&self, picture: &Conv) -> bool {
        let outputs = self.conv.outputs();
        self.arranged()
            .is_some_and(|arranged| arranged.candidate.picture.is_some() && outputs <= arranged.candidate.columns)
            && picture.inputs() == outputs
    }

    pub(super) fn launch_hopper(
        &self,
        device: &CudaDevice,
        sizes: Sizes,
        arranged: &Arranged,
        output: Option<&mut Tensor>,
        pooled: Option<&mut Tensor>,
    ) -> Result<()> {
        let kernel = device.kernel(IMAGE, arranged.candidate.name)?;
        let flags = u32::from(self.activation == Activation::Silu) | u32::from(self.scale.is_some()) << 1;
        let args = self
            .sources(&kernel, arranged)?
            .input(&self.conv.bias)?
            .optional(self.residual)?
            .optional_output(output)?
            .optional_output(pooled)?;
        let args = self
            .extents(arranged, args)
            .unsigned(flags)
            .float(self.scale.unwrap_or(1.0));
        let blocks = self.blocks(device, &kernel, sizes, arranged)?;
        // SAFETY: the arguments are those of the kernels of `conv_hopper.cu`, of the shapes and types checked at the door; the blocks
        // share the tiles whatever their number; null pointers stand for what is absent.
        unsafe { kernel.launch(device, [blocks, 1, 1], args) }
    }

    /// Runs a call for which [`Call::suits_picture`] holds.
    pub(super) fn launch_picture_end(&self, sizes: Sizes, picture: &Conv, canvas: Canvas<'_>) -> Result<()> {
        let (device, arranged) = self
            .x
            .cuda()
            .zip(self.arranged())
            .expect("a call that suits has a device and arranged weights");
        let name = arranged.candidate.picture.expect("a call that suits has such a kernel");
        let kernel = device.kernel(IMAGE, name)?;
        let args = self
            .sources(&kernel, arranged)?
            .input(&self.conv.bias)?
            .input(&picture.weight)?
            .input(&picture.bias)?
            .output(canvas.picture)?
            .optional(canvas.factors)?;
        let args = self.extents(arranged, args).float(canvas.scale);
        let blocks = self.blocks(device, &kernel, sizes, arranged)?;
        // SAFETY: as above; the picture has one colour triple per pixel, checked at the door.
        unsafe { kernel.launch(device, [blocks, 1, 1], args) }
    }

    /// The kernels' first arguments: the sources' maps and the weights.
    fn sources(&self, kernel: &Kernel, arranged: &Arranged) -> Result<Args> {
        let [_, chunk, tile_height, _] = kernel.info().tile;
        let margin = arranged.candidate.taps_along() as u32 - 1;
        let map = |source: &Tensor| map_of(source, chunk, [tile_height + margin, TILE_WIDTH as u32 + margin], false);
        Args::new()
            .tensor_map(map(self.x)?)
            .tensor_map(map(self.second.unwrap_or(self.x))?)
            .input(&arranged.weights)
    }

    /// The extents that all kernels take: of the grid on which tiles are counted, and of channels.
    fn extents(&self, arranged: &Arranged, args: Args) -> Args {
        let chunk = arranged.candidate.chunk;
        args.int(self.x.dim(0))
            .int(self.x.dim(1))
            .int(self.x.dim(2))
            .int(self.conv.outputs())
            .int(self.conv.inputs() / chunk)
            .int(self.conv.channels[0] / chunk)
    }

    /// One block per multiprocessor, or one per tile where these are fewer.
    fn blocks(&self, device: &CudaDevice, kernel: &Kernel, sizes: Sizes, arranged: &Arranged) -> Result<u32> {
        let [columns, _, tile_height, _] = kernel.info().tile.map(|extent| extent.max(1) as usize);
        let turns = if arranged.candidate.input == Input::Upsampled {
            4
        } else {
            1
        };
        let places = self.x.dim(1).div_ceil(tile_height) * self.x.dim(2).div_ceil(TILE_WIDTH);
        let tiles = sizes.batch * places * turns * sizes.outputs.div_ceil(columns);
        Ok(grid(self.op, tiles)?.min(device.multiprocessors()))
    }
}

/// The map of an image `[items, height, width, channels]` by boxes of `chunk` channels of `rows` × `columns` pixels; with
/// `by_parity` of `[items, height / 2, 2, width / 2, 2 · channels]`, by boxes of rows of one parity.
pub(super) fn map_of(image: &Tensor, chunk: u32, [rows, columns]: [u32; 2], by_parity: bool) -> Result<TensorMap> {
    let [items, height, width, channels] = [image.dim(0), image.dim(1), image.dim(2), image.dim(3)];
    let row = width * channels * DType::Bf16.size();
    let swizzle = chunk * DType::Bf16.size() as u32;
    let wide = |extents: &[usize]| extents.iter().map(|&extent| extent as u64).collect::<Vec<_>>();
    let (extents, strides, tile) = match by_parity {
        false => (
            wide(&[channels, width, height, items]),
            wide(&[row / width, row, row * height]),
            vec![chunk, columns, rows, 1],
        ),
        true => (
            wide(&[2 * channels, width / 2, 2, height / 2, items]),
            wide(&[2 * row / width, row, 2 * row, row * height]),
            vec![chunk, columns, 1, rows, 1],
        ),
    };
    TensorMap::new(
        image,
        &TensorMapSpec {
            extents: &extents,
            strides: &strides,
            tile: &tile,
            swizzle,
        },
    )
}
