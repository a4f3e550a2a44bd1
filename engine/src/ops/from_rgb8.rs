//! Bytes to images of floats.
//!
//! [`from_rgb8`]: u8 `[batch, height, width, 3]` to f32 in [−1, 1]: `x / 127.5 − 1`, both operations rounded to f32. CPU and CUDA
//! agree in every bit.

use rayon::prelude::*;

use super::grid;
use crate::device::Args;
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;

/// Half of the largest byte.
const HALF: f32 = 127.5;

/// Values that a thread converts at a time on the CPU.
const CHUNK: usize = 1 << 14;

/// The picture of the bytes `x`; see the module's head comment.
///
/// # Errors
/// When `x` holds something else than bytes of an image.
pub fn from_rgb8(x: &Tensor) -> Result<Tensor> {
    const OP: &str = "from_rgb8";
    x.ensure_rank(OP, "x", 4, "[batch, height, width, 3]")?;
    x.ensure_dtype(OP, "x", DType::U8)?;
    let mut y = Tensor::empty(&x.device(), x.shape(), DType::F32)?;
    let Some(device) = x.cuda() else {
        let sources = x.as_slice::<u8>()?.par_chunks(CHUNK);
        let outputs = y.as_mut_slice::<f32>()?.par_chunks_mut(CHUNK);
        outputs.zip(sources).for_each(|(output, source)| {
            for (value, &byte) in output.iter_mut().zip(source) {
                *value = f32::from(byte) / HALF - 1.0;
            }
        });
        return Ok(y);
    };
    let kernel = device.kernel("from_rgb8", OP)?;
    let blocks = x.elements().div_ceil(kernel.info().tile[0].max(1) as usize);
    let args = Args::new().input(x)?.output(&mut y)?.long(x.elements() as u64);
    // SAFETY: the arguments are those of `from_rgb8`, two arrays of as many values as it is told; the grid covers them.
    unsafe { kernel.launch(device, [grid(OP, blocks)?, 1, 1], args)? };
    Ok(y)
}
