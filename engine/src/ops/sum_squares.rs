//! The sum of the squares of all elements.
//!
//! * [`sum_squares`]: `Σ x²`, of f32 of any shape
//!
//! A device's sums have an order that the number of elements alone decides: 4096 (CPU) or 8192 (CUDA) elements at a time in f32, and
//! these sums in f64.

use rayon::prelude::*;

use super::grid;
use crate::device::{Args, CudaDevice, Device};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;

const OP: &str = "sum_squares";

/// Elements that one task of the CPU sums.
const CHUNK: usize = 4096;

/// The sum of the squares of `x` (f32), f32 `[1]` on its device.
///
/// # Errors
/// When `x` is of another type, or the device has no room.
pub fn sum_squares(x: &Tensor) -> Result<Tensor> {
    x.ensure_dtype(OP, "x", DType::F32)?;
    let _op = crate::profile::op(OP, x, 2 * x.elements(), x.bytes());
    match x.cuda() {
        Some(device) => cuda(device, x),
        None => {
            let chunks = x.as_slice::<f32>()?.par_chunks(CHUNK);
            let sums: Vec<f32> = chunks
                .map(|chunk| chunk.iter().map(|value| value * value).sum())
                .collect();
            let sum: f64 = sums.into_iter().map(f64::from).sum();
            Tensor::from_slice(&Device::Cpu, &[sum as f32], [1])
        }
    }
}

fn cuda(device: &CudaDevice, x: &Tensor) -> Result<Tensor> {
    let owner = x.device();
    let kernel = device.kernel(OP, OP)?;
    let chunks = x.elements().div_ceil(kernel.info().tile[0] as usize);
    let mut partial = Tensor::empty(&owner, [chunks], DType::F32)?;
    if chunks > 0 {
        let args = Args::new().input(x)?.output(&mut partial)?.long(x.elements() as u64);
        // SAFETY: the arguments are those of `sum_squares`; the blocks cover every element, with a place for each block's sum.
        unsafe { kernel.launch(device, [grid(OP, chunks)?, 1, 1], args)? };
    }
    let mut sum = Tensor::empty(&owner, [1], DType::F32)?;
    let args = Args::new().input(&partial)?.output(&mut sum)?.int(chunks);
    let kernel = device.kernel(OP, "sum_squares_finish")?;
    // SAFETY: the arguments are those of `sum_squares_finish`; one block.
    unsafe { kernel.launch(device, [1, 1, 1], args)? };
    Ok(sum)
}
