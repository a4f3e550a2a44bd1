//! Images of floats to bytes.
//!
//! [`to_rgb8`]: f32 `[batch, height, width, 3]` in [−1, 1] to u8: `round(clamp(x / 2 + 0.5, 0, 1) · 255)`, all in f32. Ties go
//! to the even byte, as in PyTorch and NumPy; NaN becomes 0. CPU and CUDA agree in every bit.

use rayon::prelude::*;

use super::grid;
use crate::device::Args;
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;

/// Channels of a picture.
const CHANNELS: usize = 3;

/// Values that a thread converts at a time on the CPU.
const CHUNK: usize = 1 << 14;

/// The bytes of the picture `x`; see the module's head comment.
///
/// # Errors
/// When `x` is no f32 image of three channels.
pub fn to_rgb8(x: &Tensor) -> Result<Tensor> {
    const OP: &str = "to_rgb8";
    x.expect_rank(OP, "x", 4, "[batch, height, width, 3]")?;
    x.expect_shape(OP, "x", [x.dim(0), x.dim(1), x.dim(2), CHANNELS])?;
    x.expect_dtype(OP, "x", DType::F32)?;
    let mut y = Tensor::empty(&x.device(), x.shape(), DType::U8)?;
    let _op = crate::profile::op(OP, x, 0, x.bytes() + y.bytes());
    let Some(device) = x.cuda() else {
        let sources = x.as_slice::<f32>()?.par_chunks(CHUNK);
        let outputs = y.as_mut_slice::<u8>()?.par_chunks_mut(CHUNK);
        outputs.zip(sources).for_each(|(output, source)| {
            for (byte, &value) in output.iter_mut().zip(source) {
                *byte = to_byte(value);
            }
        });
        return Ok(y);
    };
    let kernel = device.kernel("to_rgb8", OP)?;
    let blocks = x.elements().div_ceil(kernel.info().tile[0].max(1) as usize);
    let args = Args::new().input(x)?.output(&mut y)?.long(x.elements() as u64);
    // SAFETY: the arguments are those of `to_rgb8`, two arrays of as many values as it is told; the grid covers them.
    unsafe { kernel.launch(device, [grid(OP, blocks)?, 1, 1], args)? };
    Ok(y)
}

fn to_byte(value: f32) -> u8 {
    // A NaN passes through `clamp` and is cast to 0.
    ((value * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8
}
