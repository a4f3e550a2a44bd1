//! From tokens back to an image, and from an image to tokens.
//!
//! [`unpatchify`]: `tokens` `[batch, n, patch·patch·channels]` in the device's compute type become an f32 image `[batch, height,
//! width, channels]`, every value times `sign`. Tokens are the patches in row-major order; inside a token the order is (row,
//! column, channel), channel fastest. `n` may exceed the number of patches: what follows them is padding and is ignored.
//!
//! [`patchify`] is the reverse, from an image in f32 or the compute type, with zeros in what follows the patches; of a gradient
//! of an image, with the factor `sign`, it makes the gradient of the tokens. On
//! CUDA `patch·channels` is a multiple of 8.

use rayon::prelude::*;

use super::{TokenSizes, grid};
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The image that `tokens` hold, times `sign`; see the module's head comment.
///
/// # Errors
/// When height or width are no multiples of `patch`, there are too few tokens, or their shape or type does not fit.
pub fn unpatchify(
    tokens: &Tensor,
    height: usize,
    width: usize,
    patch: usize,
    channels: usize,
    sign: f32,
) -> Result<Tensor> {
    const OP: &str = "unpatchify";
    let sizes = TokenSizes::of(OP, "tokens", tokens)?;
    if patch == 0 || !height.is_multiple_of(patch) || !width.is_multiple_of(patch) {
        return Err(Error::invalid(format!(
            "{OP}: an image of {height}x{width} cannot be divided into patches of {patch}"
        )));
    }
    let patches = height / patch * (width / patch);
    if sizes.dim != patch * patch * channels || sizes.tokens < patches {
        return Err(Error::Shape {
            op: OP,
            tensor: "tokens".into(),
            expected: format!("[batch, {patches} or more, {}]", patch * patch * channels),
            found: tokens.shape(),
        });
    }
    let image = Image {
        height,
        width,
        patch,
        channels,
    };
    let shape = [sizes.batch, height, width, channels];
    let mut output = Tensor::empty(&tokens.device(), shape, DType::F32)?;
    let _op = crate::profile::op(OP, tokens, 0, tokens.bytes() + output.bytes());
    match tokens.cuda() {
        None => cpu_unpatchify(tokens, sizes, image, sign, &mut output)?,
        Some(device) => {
            let sizes = (sizes.batch, sizes.tokens);
            launch(
                OP,
                device,
                OP,
                |args| args.input(tokens)?.output(&mut output),
                sizes,
                image,
                sign,
            )?;
        }
    }
    Ok(output)
}

/// The patches of `image` `[batch, height, width, channels]`, times `factor`, as `[batch, tokens, patch·patch·channels]`; see the
/// module's head comment.
///
/// # Errors
/// When height or width are no multiples of `patch`, `tokens` is less than there are patches, or the type does not fit.
pub fn patchify(image: &Tensor, patch: usize, tokens: usize, factor: f32) -> Result<Tensor> {
    const OP: &str = "patchify";
    image.ensure_rank(OP, "image", 4, "[batch, height, width, channels]")?;
    if image.dtype() != DType::F32 {
        image.ensure_dtype(OP, "image", image.device().compute_dtype())?;
    }
    let (height, width, channels) = (image.dim(1), image.dim(2), image.dim(3));
    if patch == 0 || !height.is_multiple_of(patch) || !width.is_multiple_of(patch) {
        return Err(Error::invalid(format!(
            "{OP}: an image of {height}x{width} cannot be divided into patches of {patch}"
        )));
    }
    let patches = height / patch * (width / patch);
    if tokens < patches {
        return Err(Error::invalid(format!(
            "{OP}: {patches} patches do not fit {tokens} tokens"
        )));
    }
    let sizes = TokenSizes {
        batch: image.dim(0),
        tokens,
        dim: patch * patch * channels,
    };
    let (shape, device) = ([sizes.batch, tokens, sizes.dim], image.device());
    let mut output = match tokens == patches {
        true => Tensor::empty_compute(&device, shape)?,
        false => Tensor::zeros(&device, shape, device.compute_dtype())?,
    };
    let extents = Image {
        height,
        width,
        patch,
        channels,
    };
    match image.cuda() {
        None => cpu_patchify(image, sizes, extents, factor, &mut output)?,
        Some(device) => {
            let name = match image.dtype() {
                DType::F32 => "patchify_f32",
                _ => "patchify_bf16",
            };
            let sizes = (sizes.batch, sizes.tokens);
            launch(
                OP,
                device,
                name,
                |args| args.input(image)?.output(&mut output),
                sizes,
                extents,
                factor,
            )?;
        }
    }
    Ok(output)
}

/// The sizes of the image.
#[derive(Clone, Copy)]
struct Image {
    height: usize,
    width: usize,
    patch: usize,
    channels: usize,
}

fn cpu_unpatchify(tokens: &Tensor, sizes: TokenSizes, image: Image, sign: f32, output: &mut Tensor) -> Result<()> {
    let Image {
        height,
        width,
        patch,
        channels,
    } = image;
    let values = tokens.as_slice::<f32>()?;
    let segment = patch * channels;
    if width * channels == 0 {
        return Ok(());
    }
    let rows = output
        .as_mut_slice::<f32>()?
        .par_chunks_mut(width * channels)
        .enumerate();
    rows.for_each(|(row, output)| {
        let (item, y) = (row / height, row % height);
        for (column, output) in output.chunks_mut(segment).enumerate() {
            let token = item * sizes.tokens + y / patch * (width / patch) + column;
            let start = token * sizes.dim + y % patch * segment;
            for (output, value) in output.iter_mut().zip(&values[start..start + segment]) {
                *output = value * sign;
            }
        }
    });
    Ok(())
}

fn cpu_patchify(image: &Tensor, sizes: TokenSizes, extents: Image, factor: f32, output: &mut Tensor) -> Result<()> {
    let Image {
        height,
        width,
        patch,
        channels,
    } = extents;
    let values = image.as_slice::<f32>()?;
    let segment = patch * channels;
    if sizes.dim == 0 {
        return Ok(());
    }
    let (rows, columns) = (height / patch, width / patch);
    let tokens = output.as_mut_slice::<f32>()?.par_chunks_mut(sizes.dim).enumerate();
    tokens.for_each(|(token, output)| {
        let (item, index) = (token / sizes.tokens, token % sizes.tokens);
        if index >= rows * columns {
            return;
        }
        for (row, output) in output.chunks_mut(segment).enumerate() {
            let y = item * height + index / columns * patch + row;
            let start = (y * width + index % columns * patch) * channels;
            for (output, value) in output.iter_mut().zip(&values[start..start + segment]) {
                *output = value * factor;
            }
        }
    });
    Ok(())
}

/// Launches the kernel `name`, which takes what `tensors` adds to its arguments, a source and a target.
fn launch(
    op: &'static str,
    device: &CudaDevice,
    name: &'static str,
    tensors: impl FnOnce(Args) -> Result<Args>,
    (batch, tokens): (usize, usize),
    image: Image,
    factor: f32,
) -> Result<()> {
    let segment = image.patch * image.channels;
    if !segment.is_multiple_of(8) {
        return Err(Error::invalid(format!(
            "{op}: patch·channels is {segment}, not a multiple of 8, which the CUDA kernel needs"
        )));
    }
    let kernel = device.kernel("unpatchify", name)?;
    let args = tensors(Args::new())?
        .int(tokens)
        .int(image.height)
        .int(image.width / image.patch)
        .int(image.patch)
        .int(segment / 8)
        .float(factor);
    let blocks = grid(op, batch * image.height)?;
    // SAFETY: the arguments are those of the kernels of `unpatchify.cu`, of the shapes and types checked at the door; one
    // block per image row.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}
