//! The residual sum of a block that a vector per item gates.
//!
//! * [`gated_add`]: `x + gate · y`
//! * [`gated_add_backward`], for the gradient of the sum, which is also that of `x`: `dy = gate · d_sum`, and `d gate = Σ d_sum · y` over an
//!   item's rows
//! * [`item_sums`]: `Σ dy` over an item's rows, the gradient of a vector that is added to every row
//!
//! Shapes: activations `[batch, tokens, dim]`, vectors as [`Modulation`] in f32. On CUDA `dim` is a multiple of 8, for gradients of vectors
//! at most 8192. Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023), whose adaLN-Zero this is.

use rayon::prelude::*;

use super::modulation::ensure_gradient_table;
use super::rms_norm::{NormGradients, finish_sums};
use super::sum_rows::cpu_row_sums;
use super::{Modulation, TokenSizes, VectorGradient, grid, threads_per_row};
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// `x + gate · y`; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn gated_add(x: &Tensor, y: &Tensor, gate: Modulation<'_>) -> Result<Tensor> {
    gated("gated_add", Some(x), y, gate)
}

/// The gradient of `y` in [`gated_add`] for that of the sum; that of the gate overwrites `gate_gradient`.
///
/// # Errors
/// When shapes, types or devices do not fit, or a gradient of a gate is asked for that is not one per item.
pub fn gated_add_backward(
    d_sum: &Tensor,
    y: &Tensor,
    gate: Modulation<'_>,
    gate_gradient: Option<VectorGradient<'_>>,
) -> Result<Tensor> {
    const OP: &str = "gated_add_backward";
    if let Some(place) = gate_gradient {
        sums(OP, d_sum, Some(y), place)?;
    }
    gated(OP, None, d_sum, gate)
}

/// The sums of an item's rows of `dy`, which overwrite `place`; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn item_sums(dy: &Tensor, place: VectorGradient<'_>) -> Result<()> {
    sums("item_sums", dy, None, place)
}

fn ensure_like(op: &'static str, name: &str, tensor: &Tensor, like: &Tensor) -> Result<()> {
    tensor.ensure_shape(op, name, like.shape())?;
    tensor.ensure_dtype(op, name, like.dtype())?;
    tensor.ensure_device(op, name, &like.device())
}

fn gated(op: &'static str, x: Option<&Tensor>, y: &Tensor, gate: Modulation<'_>) -> Result<Tensor> {
    let sizes = TokenSizes::of(op, "y", y)?;
    x.map_or(Ok(()), |x| ensure_like(op, "x", x, y))?;
    gate.expect(op, "gate", sizes.batch, sizes.dim, y)?;
    let mut sum = Tensor::empty(&y.device(), y.shape(), y.dtype())?;
    let _op = crate::profile::op(op, y, 0, (2 + usize::from(x.is_some())) * y.bytes());
    if sizes.rows() * sizes.dim == 0 {
        return Ok(sum);
    }
    match y.cuda() {
        None => cpu_gated(x, y, gate, sizes, &mut sum)?,
        Some(device) => cuda_gated(op, device, x, y, gate, sizes, &mut sum)?,
    }
    Ok(sum)
}

fn cpu_gated(x: Option<&Tensor>, y: &Tensor, gate: Modulation<'_>, sizes: TokenSizes, sum: &mut Tensor) -> Result<()> {
    let gates: Vec<&[f32]> = (0..sizes.batch).map(|item| gate.row(item)).collect::<Result<_>>()?;
    let x = x.map(Tensor::as_slice::<f32>).transpose()?;
    let rows = sum.as_mut_slice::<f32>()?.par_chunks_mut(sizes.dim);
    let rows = rows.zip(y.as_slice::<f32>()?.par_chunks(sizes.dim)).enumerate();
    rows.for_each(|(row, (sum, y))| {
        let branch = y.iter().zip(gates[row / sizes.tokens]).map(|(y, gate)| gate * y);
        match x {
            Some(x) => {
                let x = &x[row * sizes.dim..(row + 1) * sizes.dim];
                sum.iter_mut()
                    .zip(x.iter().zip(branch))
                    .for_each(|(sum, (x, y))| *sum = x + y);
            }
            None => sum.iter_mut().zip(branch).for_each(|(sum, y)| *sum = y),
        }
    });
    Ok(())
}

fn cuda_gated(
    op: &'static str,
    device: &CudaDevice,
    x: Option<&Tensor>,
    y: &Tensor,
    gate: Modulation<'_>,
    sizes: TokenSizes,
    sum: &mut Tensor,
) -> Result<()> {
    sizes.ensure_vectors(op)?;
    let kernel = device.kernel("gated_add", "gated_add")?;
    let vectors = sizes.rows() * sizes.dim / 8;
    let blocks = vectors.div_ceil(kernel.info().tile[0] as usize);
    let args = Args::new()
        .optional(x)?
        .input(y)?
        .long(gate.device_ptr()?)
        .output(sum)?
        .long(vectors as u64)
        .int(sizes.dim / 8)
        .int(sizes.tokens)
        .int(gate.stride());
    // SAFETY: the arguments are those of `gated_add`, of the shapes and types checked at the door; the blocks cover every vector.
    unsafe { kernel.launch(device, [grid(op, blocks)?, 1, 1], args) }
}

/// Sums over an item's rows of `a · b`, or of `a`.
fn sums(op: &'static str, a: &Tensor, b: Option<&Tensor>, place: VectorGradient<'_>) -> Result<()> {
    let sizes = TokenSizes::of(op, "gradient", a)?;
    b.map_or(Ok(()), |b| ensure_like(op, "y", b, a))?;
    ensure_gradient_table(op, place.table, &[place.index], [sizes.batch, sizes.dim], a)?;
    if let Some(device) = a.cuda() {
        return cuda_sums(op, device, a, b, sizes, place);
    }
    let VectorGradient { table, index } = place;
    let (a, b) = (a.as_slice::<f32>()?, b.map(Tensor::as_slice::<f32>).transpose()?);
    for item in 0..sizes.batch {
        let rows = item * sizes.tokens..(item + 1) * sizes.tokens;
        let found = cpu_row_sums(rows, sizes.dim, |row, sums| {
            let range = row * sizes.dim..(row + 1) * sizes.dim;
            let values = sums.iter_mut().zip(&a[range.clone()]);
            match b {
                Some(b) => values.zip(&b[range]).for_each(|((sum, a), b)| *sum += a * b),
                None => values.for_each(|(sum, a)| *sum += a),
            }
        });
        let start = (item * table.dim(1) + index) * sizes.dim;
        table.as_mut_slice::<f32>()?[start..start + sizes.dim].copy_from_slice(&found);
    }
    Ok(())
}

fn cuda_sums(
    op: &'static str,
    device: &CudaDevice,
    a: &Tensor,
    b: Option<&Tensor>,
    sizes: TokenSizes,
    place: VectorGradient<'_>,
) -> Result<()> {
    /// Blocks per multiprocessor.
    const BLOCKS: usize = 2;
    sizes.ensure_vectors(op)?;
    let kernel = device.kernel("gated_add", "item_sums")?;
    let threads = threads_per_row(op, sizes.dim, kernel.info().tile[0])?;
    if threads > kernel.info().threads {
        return Err(Error::invalid(format!(
            "{op}: rows of {} elements are longer than the CUDA kernel's {}",
            sizes.dim,
            kernel.info().threads * kernel.info().tile[0]
        )));
    }
    let rows_per_block = sizes.rows().div_ceil(BLOCKS * device.multiprocessors() as usize).max(1);
    let blocks = sizes.tokens.div_ceil(rows_per_block);
    let mut partial = Tensor::empty(&a.device(), [sizes.batch, blocks, sizes.dim], DType::F32)?;
    let args = Args::new()
        .input(a)?
        .optional(b)?
        .output(&mut partial)?
        .int(sizes.dim)
        .int(sizes.tokens);
    // SAFETY: the arguments are those of `item_sums`, of the shapes and types checked at the door; there are at most as many blocks
    // per item as tokens.
    unsafe { kernel.launch_with(device, [grid(op, blocks)?, grid(op, sizes.batch)?, 1], threads, args)? };
    let gradients = NormGradients {
        weight: None,
        vector: Some(place),
    };
    finish_sums(op, device, &partial, None, None, false, gradients)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    fn tensor(values: &[f32], shape: [usize; 3]) -> Tensor {
        Tensor::from_slice(&Device::Cpu, values, shape).unwrap()
    }

    #[test]
    fn gates_are_per_item_and_their_gradients_too() {
        let (x, y) = (
            tensor(&[1.0, 2.0, 3.0, 4.0], [2, 1, 2]),
            tensor(&[5.0, 6.0, 7.0, 8.0], [2, 1, 2]),
        );
        let table = tensor(&[9.0, 9.0, 2.0, 3.0, 9.0, 9.0, -1.0, 0.5], [2, 2, 2]);
        let gate = Modulation::new(&table, 1).unwrap();
        let sum = gated_add(&x, &y, gate).unwrap();
        assert_eq!(sum.to_vec::<f32>().unwrap(), [11.0, 20.0, -4.0, 8.0]);
        let mut gradients = tensor(&[7.0; 8], [2, 2, 2]);
        let place = VectorGradient {
            table: &mut gradients,
            index: 1,
        };
        let dy = gated_add_backward(&x, &y, gate, Some(place)).unwrap();
        assert_eq!(dy.to_vec::<f32>().unwrap(), [2.0, 6.0, -3.0, 2.0]);
        let expected = [7.0, 7.0, 5.0, 12.0, 7.0, 7.0, 21.0, 32.0];
        assert_eq!(gradients.to_vec::<f32>().unwrap(), expected);
        let rows = tensor(&[1.0, 2.0, 3.0, 5.0], [1, 2, 2]);
        let mut sums = tensor(&[0.0; 2], [1, 1, 2]);
        let place = VectorGradient {
            table: &mut sums,
            index: 0,
        };
        item_sums(&rows, place).unwrap();
        assert_eq!(sums.to_vec::<f32>().unwrap(), [4.0, 7.0]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (x, y) = (tensor(&[1.0; 4], [1, 2, 2]), tensor(&[1.0; 2], [1, 1, 2]));
        let table = tensor(&[0.0; 6], [3, 1, 2]);
        let message = gated_add(&x, &y, Modulation::new(&table, 0).unwrap())
            .unwrap_err()
            .to_string();
        assert!(message.contains("`x`") || message.contains("x has"), "{message}");
        assert!(gated_add(&x, &x, Modulation::new(&table, 0).unwrap()).is_err());
    }
}
