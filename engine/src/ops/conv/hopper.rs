//! Convolutions on Hopper's warpgroup products: which kernel, the arrangement of its weights, and its launch.

use std::sync::Arc;

use super::{Activation, Call, Canvas, Conv, Input, Sizes};
use crate::device::{Args, CudaDevice, Kernel, TensorMap, TensorMapSpec};
use crate::error::Result;
use crate::ops::grid;
use crate::tensor::{DType, Tensor};

const IMAGE: &str = "conv_hopper";

/// Pixels that a tile is wide, as in `conv_hopper.cu`.
const TILE_WIDTH: usize = 16;

/// The kernels: size and input of the convolution, names, output channels of a tile, input channels of a chunk. Those with
/// fewer columns come first, then those with larger chunks.
#[rustfmt::skip]
const KERNELS: [Candidate; 13] = [
    Candidate::new(3, Input::Same, "conv3x3_16x64_resident", 16, 64),
    Candidate::new(3, Input::Same, "conv3x3_16x32_resident", 16, 32),
    Candidate::new(3, Input::Same, "conv3x3_32x64_resident", 32, 64),
    Candidate::new(3, Input::Same, "conv3x3_32x32_resident", 32, 32).with_picture("picture_32x32_resident"),
    Candidate::new(3, Input::Same, "conv3x3_32x16_resident", 32, 16),
    Candidate::new(3, Input::Same, "conv3x3_64x64", 64, 64).with_picture("picture_64x64"),
    Candidate::new(3, Input::Same, "conv3x3_64x32_resident", 64, 32),
    Candidate::new(3, Input::Same, "conv3x3_128x64", 128, 64),
    Candidate::new(3, Input::Same, "conv3x3_128x16", 128, 16),
    Candidate::new(3, Input::Upsampled, "upsample_32x32_resident", 32, 32),
    Candidate::new(3, Input::Upsampled, "upsample_64x64_resident", 64, 64),
    Candidate::new(3, Input::Upsampled, "upsample_128x64", 128, 64),
    Candidate::new(1, Input::Same, "conv1x1_128x64", 128, 64),
];

#[derive(Debug)]
struct Candidate {
    kernel: usize,
    input: Input,
    name: &'static str,
    /// The same convolution followed by one to a picture.
    picture: Option<&'static str>,
    columns: usize,
    chunk: usize,
}

impl Candidate {
    const fn new(kernel: usize, input: Input, name: &'static str, columns: usize, chunk: usize) -> Self {
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

    /// Taps that a pixel of the output meets, along each axis.
    fn taps_along(&self) -> usize {
        match self.input {
            Input::Same => self.kernel,
            Input::Upsampled => 2,
        }
    }

    /// Pieces of weights of one block of output channels.
    fn pieces(&self, conv: &Conv) -> usize {
        let parities = match self.input {
            Input::Same => 1,
            Input::Upsampled => 4,
        };
        parities * conv.inputs() / self.chunk * self.taps_along().pow(2)
    }

    fn suits(&self, conv: &Conv, input: Input) -> bool {
        self.kernel == conv.kernel
            && self.input == input
            && conv.channels.iter().all(|channels| channels.is_multiple_of(self.chunk))
    }

    /// Whether all weights fit where the kernel keeps them; `capacity` is the number of pieces, 0 if that does not matter.
    fn holds(&self, conv: &Conv, capacity: usize) -> bool {
        capacity == 0 || (conv.outputs() <= self.columns && self.pieces(conv) <= capacity)
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
        let mut found = None;
        for candidate in KERNELS.iter().filter(|candidate| candidate.suits(conv, input)) {
            let capacity = device.kernel(IMAGE, candidate.name)?.info().tile[3] as usize;
            // The fewest columns that hold all outputs, or the most there are.
            if candidate.holds(conv, capacity) && (conv.outputs() <= candidate.columns || candidate.columns == 128) {
                found = Some(candidate);
                break;
            }
        }
        let Some(candidate) = found else { return Ok(None) };
        let elements =
            conv.outputs().div_ceil(candidate.columns) * candidate.pieces(conv) * candidate.columns * candidate.chunk;
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
            .optional(canvas.delta)?;
        let args = self.extents(arranged, args).float(canvas.scale);
        let blocks = self.blocks(device, &kernel, sizes, arranged)?;
        // SAFETY: as above; the picture has one colour triple per pixel, checked at the door.
        unsafe { kernel.launch(device, [blocks, 1, 1], args) }
    }

    /// The kernels' first arguments: the sources' maps and the weights.
    fn sources(&self, kernel: &Kernel, arranged: &Arranged) -> Result<Args> {
        let [_, chunk, tile_height, _] = kernel.info().tile;
        let margin = arranged.candidate.taps_along() as u32 - 1;
        let tile = [chunk, TILE_WIDTH as u32 + margin, tile_height + margin, 1];
        let map = |source: &Tensor| {
            let [items, height, width, channels] = [source.dim(0), source.dim(1), source.dim(2), source.dim(3)];
            let pixel = channels * DType::Bf16.size();
            let strides = [pixel, pixel * width, pixel * width * height].map(|stride| stride as u64);
            TensorMap::new(
                source,
                &TensorMapSpec {
                    extents: &[channels, width, height, items].map(|extent| extent as u64),
                    strides: &strides,
                    tile: &tile,
                    swizzle: chunk * DType::Bf16.size() as u32,
                },
            )
        };
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
