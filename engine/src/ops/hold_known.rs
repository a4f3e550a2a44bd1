//! What is known of a picture, held while the rest of it is drawn.
//!
//! [`hold_known`] moves `x` in place, in f32: `x = k + w · (x − k)` with `k = a · known + b · noise`, where `w = mask / 255` is how much of a
//! place may change. Where the mask is 255, `x` keeps its bits; where it is 0, `x` becomes `k`, and with a = 1 and b = 0 the known picture,
//! bit for bit. CPU and CUDA agree in every bit.
//!
//! Source: Lugmayr et al., "RePaint" (2022), without its walks back; Avrahami et al., "Blended Latent Diffusion" (2023).

use rayon::prelude::*;

use super::grid;
use crate::device::Args;
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;

/// Moves `x` f32 `[batch, height, width, channels]` to what is known of it; `noise` is of its shape, `known` is f32
/// `[1, height, width, channels]` and the `mask` u8 `[1, height, width, 1]`, both the same for all items. `mix` is how much of the known
/// picture and of the noise there is; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit, or `x` shares its buffer.
pub fn hold_known(x: &mut Tensor, known: &Tensor, noise: &Tensor, mask: &Tensor, mix: [f32; 2]) -> Result<()> {
    const OP: &str = "hold_known";
    x.ensure_rank(OP, "x", 4, "[batch, height, width, channels]")?;
    x.ensure_dtype(OP, "x", DType::F32)?;
    let [height, width, channels] = [x.dim(1), x.dim(2), x.dim(3)];
    for (name, tensor, dtype) in [
        ("known", known, DType::F32),
        ("noise", noise, DType::F32),
        ("mask", mask, DType::U8),
    ] {
        tensor.ensure_dtype(OP, name, dtype)?;
        tensor.ensure_device(OP, name, &x.device())?;
    }
    known.ensure_shape(OP, "known", [1, height, width, channels])?;
    noise.ensure_shape(OP, "noise", x.shape())?;
    mask.ensure_shape(OP, "mask", [1, height, width, 1])?;
    let item = height * width * channels;
    if x.elements() == 0 {
        return Ok(());
    }
    let _op = crate::profile::op(OP, x, 0, 3 * x.bytes() + known.bytes() + mask.bytes());
    let [a, b] = mix;
    let Some(device) = x.cuda().cloned() else {
        let (known, noise, mask) = (
            known.as_slice::<f32>()?,
            noise.as_slice::<f32>()?,
            mask.as_slice::<u8>()?,
        );
        let rows = x.as_mut_slice::<f32>()?.par_chunks_mut(width * channels).enumerate();
        rows.for_each(|(row, x)| {
            let (first, in_item) = (row * width * channels, row % height * width);
            for (index, x) in x.iter_mut().enumerate() {
                let place = mask[in_item + index / channels];
                if place == u8::MAX {
                    continue;
                }
                let known = known[in_item * channels + index];
                let held = a.mul_add(known, b * noise[first + index]);
                *x = (f32::from(place) / 255.0).mul_add(*x - held, held);
            }
        });
        return Ok(());
    };
    let kernel = device.kernel("hold_known", OP)?;
    let blocks = grid(OP, x.elements().div_ceil(kernel.info().tile[0].max(1) as usize))?;
    let elements = x.elements();
    let args = Args::new()
        .output(x)?
        .input(known)?
        .input(noise)?
        .input(mask)?
        .long(elements as u64)
        .long(item as u64)
        .int(channels)
        .float(a)
        .float(b);
    // SAFETY: the arguments are those of `hold_known`, of the shapes and types checked at the door; the blocks cover every element.
    unsafe { kernel.launch(&device, [blocks, 1, 1], args) }
}
