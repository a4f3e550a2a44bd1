//! From tokens back to an image.
//!
//! [`unpatchify`]: `tokens` `[batch, n, patch·patch·channels]` in the device's compute type become an f32 image `[batch, height,
//! width, channels]`, every value times `sign`. Tokens are the patches in row-major order; inside a token the order is (row,
//! column, channel), channel fastest. `n` may exceed the number of patches: what follows them is padding and is ignored. On
//! CUDA `patch·channels` is a multiple of 8.

use rayon::prelude::*;

use super::{TokenSizes, grid};
use crate::device::{Args, CudaDevice};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

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
        Some(device) => cuda_unpatchify(OP, device, tokens, sizes, image, sign, &mut output)?,
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

fn cuda_unpatchify(
    op: &'static str,
    device: &CudaDevice,
    tokens: &Tensor,
    sizes: TokenSizes,
    image: Image,
    sign: f32,
    output: &mut Tensor,
) -> Result<()> {
    let segment = image.patch * image.channels;
    if !segment.is_multiple_of(8) {
        return Err(Error::invalid(format!(
            "{op}: patch·channels is {segment}, not a multiple of 8, which the CUDA kernel needs"
        )));
    }
    let kernel = device.kernel("unpatchify", op)?;
    let args = Args::new()
        .input(tokens)?
        .output(output)?
        .int(sizes.tokens)
        .int(image.height)
        .int(image.width / image.patch)
        .int(image.patch)
        .int(segment / 8)
        .float(sign);
    let blocks = grid(op, sizes.batch * image.height)?;
    // SAFETY: the arguments are those of `unpatchify`, of the shapes and types checked at the door; one block per image row.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}
