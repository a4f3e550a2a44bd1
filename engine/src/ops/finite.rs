//! Whether a tensor's values are finite: neither NaN nor an infinity.
//!
//! [`count_not_finite`] counts those that are not, of a tensor of f32 or bf16, and leaves the number on the device, so that many
//! tensors are counted before any number is waited for; [`ensure_finite`] reads one. Features of captions and weights are looked at so;
//! of a finished picture [`to_rgb8`](super::to_rgb8) counts by the way.

use half::bf16;
use rayon::prelude::*;

use super::grid;
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

const OP: &str = "count_not_finite";

/// Values that a thread counts at a time on the CPU.
const CHUNK: usize = 1 << 16;

/// How many values of `x` are NaN or infinite: i32 `[1]` on the device of `x`.
///
/// # Errors
/// When `x` is neither f32 nor bf16, or has more values than an i32 can count.
pub fn count_not_finite(x: &Tensor) -> Result<Tensor> {
    if !matches!(x.dtype(), DType::F32 | DType::Bf16) {
        return Err(Error::invalid(format!(
            "{OP}: x is {}, expected f32 or bf16",
            x.dtype()
        )));
    }
    if i32::try_from(x.elements()).is_err() {
        return Err(Error::invalid(format!(
            "{OP}: x has {} values, more than can be counted at once",
            x.elements()
        )));
    }
    let mut count = Tensor::zeros(&x.device(), [1], DType::I32)?;
    let _op = crate::profile::op(OP, x, 0, x.bytes());
    match (x.cuda(), x.dtype()) {
        (Some(device), _) => cuda_count(device, x, &mut count)?,
        (None, DType::F32) => {
            count.as_mut_slice::<i32>()?[0] = cpu_count(x.as_slice::<f32>()?, |value| value.is_finite());
        }
        (None, _) => {
            count.as_mut_slice::<i32>()?[0] = cpu_count(x.as_slice::<bf16>()?, |value| value.is_finite());
        }
    }
    Ok(count)
}

/// Fails where `x` holds a value that is not finite. Waits for the device.
///
/// # Errors
/// [`Error::NotFinite`] with `what` and the number of such values; those of [`count_not_finite`].
pub fn ensure_finite(what: &str, x: &Tensor) -> Result<()> {
    match count_not_finite(x)?.to_vec::<i32>()?[0] {
        0 => Ok(()),
        count => Err(Error::not_finite(format!(
            "{what} ({count} of {} values)",
            x.elements()
        ))),
    }
}

/// The number of values that are not finite.
pub(super) fn cpu_count<T: Sync>(values: &[T], is_finite: impl Fn(&T) -> bool + Sync) -> i32 {
    let counts = values.par_chunks(CHUNK).map(|values| {
        let bad = values.iter().filter(|value| !is_finite(value));
        bad.count() as i32
    });
    counts.sum()
}

fn cuda_count(device: &CudaDevice, x: &Tensor, count: &mut Tensor) -> Result<()> {
    let name = match x.dtype() {
        DType::F32 => "count_not_finite_f32",
        _ => "count_not_finite_bf16",
    };
    let kernel = device.kernel("finite", name)?;
    let blocks = grid(OP, x.elements().div_ceil(kernel.info().tile[0].max(1) as usize))?;
    let args = Args::new().input(x)?.output(count)?.long(x.elements() as u64);
    // SAFETY: the arguments are those of both kernels, which read as many values of `x` as they are told and add to one number.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}
