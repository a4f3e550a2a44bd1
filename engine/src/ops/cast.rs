//! Conversion between f32 and bf16.
//!
//! [`cast`] rounds to nearest even towards bf16 and is exact towards f32; a NaN stays a NaN. Operations compute in one type
//! per device, so this stands only where a model's image or features change hands. On the CPU bf16 is a type for storage alone.

use half::bf16;
use rayon::prelude::*;

use super::grid;
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// `x` as `dtype`; `x` itself, sharing its buffer, where it has that type.
///
/// # Errors
/// When either type is neither f32 nor bf16.
pub fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    const OP: &str = "cast";
    for (name, dtype) in [("x", x.dtype()), ("the result", dtype)] {
        if !matches!(dtype, DType::F32 | DType::Bf16) {
            return Err(Error::invalid(format!("{OP}: {name} is {dtype}, expected f32 or bf16")));
        }
    }
    if x.dtype() == dtype {
        return Ok(x.clone());
    }
    let mut output = Tensor::empty(&x.device(), x.shape(), dtype)?;
    let _op = crate::profile::op(OP, x, 0, x.bytes() + output.bytes());
    match x.cuda() {
        None => cpu_cast(x, &mut output)?,
        Some(device) => cuda_cast(OP, device, x, &mut output)?,
    }
    Ok(output)
}

fn cpu_cast(x: &Tensor, output: &mut Tensor) -> Result<()> {
    match x.dtype() {
        DType::F32 => {
            let outputs = output.as_mut_slice::<bf16>()?.par_iter_mut();
            outputs
                .zip(x.as_slice::<f32>()?)
                .for_each(|(output, x)| *output = bf16::from_f32(*x));
        }
        _ => {
            let outputs = output.as_mut_slice::<f32>()?.par_iter_mut();
            outputs
                .zip(x.as_slice::<bf16>()?)
                .for_each(|(output, x)| *output = x.to_f32());
        }
    }
    Ok(())
}

fn cuda_cast(op: &'static str, device: &CudaDevice, x: &Tensor, output: &mut Tensor) -> Result<()> {
    let name = match x.dtype() {
        DType::F32 => "cast_f32_to_bf16",
        _ => "cast_bf16_to_f32",
    };
    let kernel = device.kernel("cast", name)?;
    let elements = x.elements();
    let blocks = grid(op, elements.div_ceil(kernel.info().tile[0] as usize))?;
    let args = Args::new().input(x)?.output(output)?.long(elements as u64);
    // SAFETY: the arguments are those of both kernels, the output has as many elements as `x`; the blocks cover them all.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}
