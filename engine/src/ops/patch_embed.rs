//! Patch embedding: a linear layer over the patches of an image, without an unfolded copy.
//!
//! [`patch_embed`]: `image` `[batch, height, width, channels]` → tokens `[batch, (height/patch)·(width/patch), dim]` in row-major
//! order of the patches: `token = weight · patch + bias`, `weight` `[dim, patch·patch·channels]`, `bias` `[dim]`, all in the device's
//! compute type. Inside a patch the order is (row, column, channel), channel fastest, so that a row of a patch is contiguous in
//! the image; both backends read the patches in place, row by row. On CUDA `patch·channels` and `dim` are multiples of 8.
//! [`patch_embed_backward`]: `d weight += dyᵀ · patches`, `d bias += Σ rows of dy`; the image needs no gradient.
//! Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2020).

use super::linear::{LinearGradients, Matrix, cpu_matmul, linear_backward_weight};
use super::unpatchify::patchify;
use super::{ensure_parameter, grid, linear_hopper};
use crate::device::{Args, CudaDevice, TensorMap, TensorMapSpec};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The sizes of an image and of its division into patches.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    height: usize,
    width: usize,
    channels: usize,
    patch: usize,
    dim: usize,
}

impl Sizes {
    /// Rows and columns of patches.
    fn patches(&self) -> (usize, usize) {
        (self.height / self.patch, self.width / self.patch)
    }

    fn tokens(&self) -> usize {
        let (rows, columns) = self.patches();
        self.batch * rows * columns
    }

    /// Elements of one row of a patch.
    fn patch_row(&self) -> usize {
        self.patch * self.channels
    }

    /// Elements of one row of the image.
    fn image_row(&self) -> usize {
        self.width * self.channels
    }

    /// Whether the Hopper kernel's bulk copies can gather the patches: its steps of 64 elements lie within a row of a patch, and
    /// its 64 tokens within a row of patches.
    fn suits_bulk_copies(&self) -> bool {
        const STEP: usize = 64;
        const TOKENS: usize = 64;
        self.patch_row().is_multiple_of(STEP) && self.patches().1.is_multiple_of(TOKENS) && self.dim.is_multiple_of(8)
    }

    /// Elements of a patch.
    fn inputs(&self) -> usize {
        self.patch * self.patch_row()
    }
}

/// The embedded patches of `image`; see the module's head comment.
///
/// # Errors
/// When height or width are no multiples of `patch`, or shapes, types or devices do not fit.
pub fn patch_embed(image: &Tensor, patch: usize, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    const OP: &str = "patch_embed";
    image.ensure_rank(OP, "image", 4, "[batch, height, width, channels]")?;
    image.ensure_dtype(OP, "image", image.device().compute_dtype())?;
    weight.ensure_rank(OP, "weight", 2, "[dim, patch·patch·channels]")?;
    let sizes = Sizes {
        batch: image.dim(0),
        height: image.dim(1),
        width: image.dim(2),
        channels: image.dim(3),
        patch,
        dim: weight.dim(0),
    };
    if patch == 0 || !sizes.height.is_multiple_of(patch) || !sizes.width.is_multiple_of(patch) {
        return Err(Error::invalid(format!(
            "{OP}: an image of {}x{} cannot be divided into patches of {patch}",
            sizes.height, sizes.width
        )));
    }
    ensure_parameter(OP, "weight", weight, &[sizes.dim, sizes.inputs()], image)?;
    ensure_parameter(OP, "bias", bias, &[sizes.dim], image)?;
    let (rows, columns) = sizes.patches();
    let shape = [sizes.batch, rows * columns, sizes.dim];
    let mut output = Tensor::empty(&image.device(), shape, image.dtype())?;
    let flops = 2 * sizes.tokens() * sizes.inputs() * sizes.dim;
    let _op = crate::profile::op(OP, image, flops, image.bytes() + weight.bytes() + output.bytes());
    match image.cuda() {
        None => cpu_patch_embed(image, weight, bias, sizes, &mut output)?,
        Some(device) => match linear_hopper::device_for(image, sizes.tokens(), sizes.inputs()) {
            Some(device) if sizes.suits_bulk_copies() => {
                launch_hopper(device, [image, weight, bias], sizes, &mut output)?
            }
            _ => cuda_patch_embed(OP, device, [image, weight, bias], sizes, &mut output)?,
        },
    }
    Ok(output)
}

/// Adds the gradients of weight and bias for the gradient `dy` `[batch, tokens, dim]` of the tokens to `gradients`.
///
/// # Errors
/// When shapes, types or devices do not fit, or a gradient shares its buffer.
pub fn patch_embed_backward(dy: &Tensor, image: &Tensor, patch: usize, gradients: LinearGradients<'_>) -> Result<()> {
    if gradients.weight.is_none() && gradients.bias.is_none() {
        return Ok(());
    }
    dy.ensure_rank("patch_embed_backward", "dy", 3, "[batch, tokens, dim]")?;
    let patches = patchify(image, patch, dy.dim(1), 1.0)?;
    linear_backward_weight(dy, &patches, gradients)
}

/// One product for every row of patches and row inside them: the rows of patches side by side are a matrix in the image.
fn cpu_patch_embed(image: &Tensor, weight: &Tensor, bias: &Tensor, sizes: Sizes, output: &mut Tensor) -> Result<()> {
    let (image, weight, bias) = (
        image.as_slice::<f32>()?,
        weight.as_slice::<f32>()?,
        bias.as_slice::<f32>()?,
    );
    let (_, columns) = sizes.patches();
    let (patch_row, image_row) = (sizes.patch_row(), sizes.image_row());
    if columns * sizes.dim == 0 {
        return Ok(());
    }
    let output = output.as_mut_slice::<f32>()?;
    output
        .chunks_mut(sizes.dim)
        .for_each(|token| token.copy_from_slice(bias));
    for (row_of_patches, tokens) in output.chunks_mut(columns * sizes.dim).enumerate() {
        for row in 0..sizes.patch {
            let patches = Matrix {
                values: &image[(row_of_patches * sizes.patch + row) * image_row..][..image_row],
                row_stride: patch_row,
                column_stride: 1,
            };
            let weight = Matrix {
                values: &weight[row * patch_row..],
                row_stride: 1,
                column_stride: sizes.inputs(),
            };
            cpu_matmul([columns, patch_row, sizes.dim], patches, weight, true, tokens);
        }
    }
    Ok(())
}

fn cuda_patch_embed(
    op: &'static str,
    device: &CudaDevice,
    [image, weight, bias]: [&Tensor; 3],
    sizes: Sizes,
    output: &mut Tensor,
) -> Result<()> {
    /// Elements of the chunks that the kernel copies.
    const CHUNK: usize = 8;
    if !sizes.patch_row().is_multiple_of(CHUNK) || !sizes.dim.is_multiple_of(CHUNK) {
        return Err(Error::invalid(format!(
            "{op}: patch·channels is {} and dim is {}; the CUDA kernel needs multiples of {CHUNK}",
            sizes.patch_row(),
            sizes.dim
        )));
    }
    // The kernel counts chunks in 32 bits.
    for (name, tensor) in [("image", image), ("weight", weight)] {
        if tensor.elements() / CHUNK > i32::MAX as usize {
            return Err(Error::invalid(format!(
                "{op}: {name} {} has more elements than the CUDA kernel can address",
                tensor.shape()
            )));
        }
    }
    if sizes.inputs() == 0 {
        return Err(Error::invalid(format!("{op}: an image without channels")));
    }
    let kernel = device.kernel("patch_embed", op)?;
    let [tile_tokens, tile_dim, ..] = kernel.info().tile.map(|extent| extent as usize);
    let tiles = sizes.tokens().div_ceil(tile_tokens) * sizes.dim.div_ceil(tile_dim);
    let blocks = grid(op, tiles)?;
    let (rows, columns) = sizes.patches();
    let args = Args::new()
        .input(image)?
        .input(weight)?
        .input(bias)?
        .output(output)?
        .int(sizes.tokens())
        .int(sizes.dim)
        .int(sizes.inputs() / CHUNK)
        .int(sizes.patch_row() / CHUNK)
        .int(sizes.image_row() / CHUNK)
        .int(sizes.patch)
        .int(columns)
        .int(rows * columns);
    // SAFETY: the arguments are those of `patch_embed`, of the shapes and types checked at the door and above; one block per
    // tile. The number of tokens fits 32 bits: the image holds at least one chunk for each.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}

/// By `linear_patches` of `linear_hopper.cu`, for sizes of which [`Sizes::suits_bulk_copies`] holds.
fn launch_hopper(
    device: &CudaDevice,
    [image, weight, bias]: [&Tensor; 3],
    sizes: Sizes,
    output: &mut Tensor,
) -> Result<()> {
    let kernel = device.kernel(linear_hopper::IMAGE, "linear_patches")?;
    let [.., step, box_rows] = kernel.info().tile;
    let (rows, columns) = sizes.patches();
    let bytes = |elements: usize| (elements * DType::Bf16.size()) as u64;
    // A patch's row, patches across, rows of a patch, patches down; items of the batch lie one below the other.
    let map = TensorMap::new(
        image,
        &TensorMapSpec {
            extents: &[sizes.patch_row(), columns, sizes.patch, sizes.batch * rows].map(|extent| extent as u64),
            strides: &[
                bytes(sizes.patch_row()),
                bytes(sizes.image_row()),
                bytes(sizes.patch * sizes.image_row()),
            ],
            tile: &[step, box_rows, 1, 1],
            swizzle: 128,
        },
    )?;
    let args = Args::new()
        .tensor_map(map)
        .tensor_map(linear_hopper::matrix_map(
            &kernel,
            weight,
            weight.dim(0),
            weight.dim(1),
        )?)
        .output(output)?
        .input(bias)?
        .int(sizes.tokens())
        .int(sizes.dim)
        .int(sizes.inputs())
        .int(sizes.patch_row() / step as usize)
        .int(columns);
    let grid = [linear_hopper::blocks(device, &kernel, sizes.tokens(), sizes.dim), 1, 1];
    // SAFETY: the arguments are those of `linear_patches`, of the shapes and types checked at the door; the sizes suit its copies; the
    // blocks share the tiles whatever their number.
    unsafe { kernel.launch(device, grid, args) }
}
