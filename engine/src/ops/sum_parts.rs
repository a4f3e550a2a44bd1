//! The sum of one tensor per rank, in the order of ranks.
//!
//! * [`sum_parts`]: `target[first + i] = (parts[0, i] + parts[1, i] + …) · factor`, `parts` `[ranks, n]` of bf16 or f32, `target`
//!   f32 of at least `first + n` elements
//!
//! Sums are f32, one addition after the other; neither the number of threads nor how the parts came here changes a bit, and CPU
//! and CUDA agree in all of them.

use half::bf16;
use rayon::prelude::*;

use super::grid;
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

const OP: &str = "sum_parts";

/// Elements that one task of the CPU sums.
const CHUNK: usize = 4096;

/// Writes the sum of the rows of `parts` to `target`, from its element `first` on; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit, there is no part, or `target` shares its buffer.
pub fn sum_parts(parts: &Tensor, factor: f32, target: &mut Tensor, first: usize) -> Result<()> {
    parts.ensure_rank(OP, "parts", 2, "[ranks, elements]")?;
    if !matches!(parts.dtype(), DType::F32 | DType::Bf16) {
        return Err(Error::invalid(format!(
            "{OP}: the parts are {}, expected f32 or bf16",
            parts.dtype()
        )));
    }
    if parts.dim(0) == 0 {
        return Err(Error::invalid(format!("{OP}: there is no part")));
    }
    target.ensure_dtype(OP, "target", DType::F32)?;
    target.ensure_device(OP, "target", &parts.device())?;
    let elements = parts.dim(1);
    match first.checked_add(elements) {
        Some(end) if end <= target.elements() => {}
        _ => {
            return Err(Error::Shape {
                op: OP,
                tensor: "target".into(),
                expected: format!("at least {} elements", first.saturating_add(elements)),
                found: target.shape(),
            });
        }
    }
    let _op = crate::profile::op(OP, parts, 0, parts.bytes() + elements * DType::F32.size());
    match parts.cuda() {
        Some(device) => cuda_sum(device, parts, factor, target, first),
        None => {
            let target = &mut target.as_mut_slice::<f32>()?[first..first + elements];
            match parts.dtype() {
                DType::F32 => cpu_sum(parts.as_slice::<f32>()?, |value| value, factor, target),
                _ => cpu_sum(parts.as_slice::<bf16>()?, bf16::to_f32, factor, target),
            }
            Ok(())
        }
    }
}

fn cpu_sum<T: Copy + Sync>(parts: &[T], widen: impl Fn(T) -> f32 + Sync, factor: f32, target: &mut [f32]) {
    let elements = target.len();
    if elements == 0 {
        return;
    }
    let chunks = target.par_chunks_mut(CHUNK).enumerate();
    chunks.for_each(|(index, sums)| {
        let chunk = index * CHUNK..index * CHUNK + sums.len();
        let mut rows = parts.chunks_exact(elements).map(|row| &row[chunk.clone()]);
        // The first part begins the sum: 0 + −0 would be +0.
        let first = rows.next().into_iter().flatten();
        sums.iter_mut().zip(first).for_each(|(sum, value)| *sum = widen(*value));
        for row in rows {
            sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += widen(*value));
        }
        sums.iter_mut().for_each(|sum| *sum *= factor);
    });
}

fn cuda_sum(device: &CudaDevice, parts: &Tensor, factor: f32, target: &mut Tensor, first: usize) -> Result<()> {
    let name = match parts.dtype() {
        DType::F32 => "sum_parts_f32",
        _ => "sum_parts_bf16",
    };
    let kernel = device.kernel("sum_parts", name)?;
    let elements = parts.dim(1);
    let blocks = grid(OP, elements.div_ceil(kernel.info().tile[0] as usize))?;
    let args = Args::new()
        .input(parts)?
        .output(target)?
        .long(first as u64)
        .int(parts.dim(0))
        .long(elements as u64)
        .float(factor);
    // SAFETY: the arguments are those of both kernels, of the shapes and types checked at the door; the blocks cover every element,
    // and the target has that many from `first` on.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}
