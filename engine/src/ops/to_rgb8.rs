//! Images of floats to bytes, and whether they are pictures at all.
//!
//! [`to_rgb8`]: f32 `[batch, height, width, 3]` in [−1, 1] to u8: `round(clamp(x / 2 + 0.5, 0, 1) · 255)`, all in f32. Ties go
//! to the even byte, as in PyTorch and NumPy; NaN becomes 0. CPU and CUDA agree in every bit.
//!
//! This is the one place where a result is found finite: whatever went wrong before it, in weights, settings or inputs, has come to
//! NaN or an infinity by here, and each value is read once anyway. The counts come back with the bytes.

use rayon::prelude::*;

use super::finite::cpu_count;
use super::grid;
use crate::device::Args;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Channels of a picture.
const CHANNELS: usize = 3;

/// Values that a thread converts at a time on the CPU.
const CHUNK: usize = 1 << 14;

/// Pictures as bytes.
#[derive(Debug)]
pub struct Rgb8 {
    /// u8 `[batch, height, width, 3]`.
    pub bytes: Tensor,
    /// How many of each picture's values were NaN or infinite: i32 `[batch]`. Such a picture's bytes mean nothing.
    pub not_finite: Tensor,
}

impl Rgb8 {
    /// The pictures on the host, one buffer of `height · width · 3` bytes each. They are numbers `first` to `first + batch − 1` of
    /// `of`, counted from 0, for messages.
    ///
    /// # Errors
    /// [`Error::NotFinite`] naming the first picture that is not finite; when the copy from the device fails.
    pub fn into_pictures(self, first: usize, of: usize) -> Result<Vec<Vec<u8>>> {
        let items = self.bytes.dim(0);
        let values = self.bytes.elements() / items.max(1);
        for (index, count) in self.not_finite.to_vec::<i32>()?.into_iter().enumerate() {
            if count != 0 {
                let name = match of {
                    1 => "the picture".to_string(),
                    _ => format!("picture {} of {of}", first + index + 1),
                };
                return Err(Error::not_finite(format!("{name} ({count} of {values} values)")));
            }
        }
        // Each into the buffer that it stays in: at 4K a copy within the host takes longer than the one from the device.
        (0..items).map(|item| self.bytes.narrow(item, 1)?.to_vec()).collect()
    }
}

/// The bytes of the picture `x`; see the module's head comment.
///
/// # Errors
/// When `x` is no f32 image of three channels.
pub fn to_rgb8(x: &Tensor) -> Result<Rgb8> {
    const OP: &str = "to_rgb8";
    x.ensure_rank(OP, "x", 4, "[batch, height, width, 3]")?;
    x.ensure_shape(OP, "x", [x.dim(0), x.dim(1), x.dim(2), CHANNELS])?;
    x.ensure_dtype(OP, "x", DType::F32)?;
    let (items, values) = (x.dim(0), x.dim(1) * x.dim(2) * CHANNELS);
    let mut bytes = Tensor::empty(&x.device(), x.shape(), DType::U8)?;
    let mut not_finite = Tensor::zeros(&x.device(), [items], DType::I32)?;
    let _op = crate::profile::op(OP, x, 0, x.bytes() + bytes.bytes());
    let Some(device) = x.cuda() else {
        let source = x.as_slice::<f32>()?;
        let outputs = bytes.as_mut_slice::<u8>()?.par_chunks_mut(CHUNK);
        outputs.zip(source.par_chunks(CHUNK)).for_each(|(output, source)| {
            for (byte, &value) in output.iter_mut().zip(source) {
                *byte = to_byte(value);
            }
        });
        let counts = not_finite.as_mut_slice::<i32>()?.iter_mut();
        for (count, picture) in counts.zip(source.chunks(values.max(1))) {
            *count = cpu_count(picture, |value| value.is_finite());
        }
        return Ok(Rgb8 { bytes, not_finite });
    };
    let kernel = device.kernel("to_rgb8", OP)?;
    let blocks = values.div_ceil(kernel.info().tile[0].max(1) as usize);
    let args = Args::new().input(x)?.output(&mut bytes)?.output(&mut not_finite)?;
    let args = args.long(values as u64);
    // SAFETY: the arguments are those of `to_rgb8`: `items` pictures of as many values as it is told, and a number for each; the grid
    // has a row of blocks for each picture, which cover it.
    unsafe { kernel.launch(device, [grid(OP, blocks)?, grid(OP, items)?, 1], args)? };
    Ok(Rgb8 { bytes, not_finite })
}

fn to_byte(value: f32) -> u8 {
    // A NaN passes through `clamp` and is cast to 0.
    ((value * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8
}
