//! Matrix products: `y = x · weightᵀ + bias`.
//!
//! [`linear`] is the layer of a transformer: `x` `[.., in]`, `weight` `[out, in]`, `bias` `[out]`, result `[.., out]`, all in
//! the device's compute type; on CUDA through cuBLASLt. [`linear_vectors`] is the same for a handful of f32 vectors (timestep
//! embeddings and modulation tables): reading the weights once is all it costs, so it has a kernel of its own and stays in f32.
//!
//! Backward: `dx = dy · weight` ([`linear_backward_input`]), `d weight += dyᵀ · x` and `d bias += Σ rows of dy`
//! ([`linear_backward_weight`]); [`linear_vectors_backward`] does both for vectors.

mod backward;

use gemm::Parallelism;

use super::{ensure_parameter, grid};
use crate::device::{Args, Matmul, MatmulOperands};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::shape::Shape;
use crate::tensor::Tensor;

pub use backward::{LinearGradients, linear_backward_input, linear_backward_weight, linear_vectors_backward};

/// `x · weightᵀ + bias`; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    const OP: &str = "linear";
    let (rows, inputs, outputs) = ensure_linear(OP, x, weight, bias)?;
    x.ensure_dtype(OP, "x", x.device().compute_dtype())?;
    let mut y = Tensor::empty(&x.device(), with_last(x.shape(), outputs), x.dtype())?;
    let _op = crate::profile::op(
        OP,
        x,
        2 * rows * inputs * outputs,
        x.bytes() + weight.bytes() + y.bytes(),
    );
    match x.cuda() {
        None => cpu_linear(x, weight, bias, [rows, inputs, outputs], &mut y)?,
        Some(device) => {
            let product = Matmul {
                m: rows,
                n: outputs,
                k: inputs,
                transpose_a: false,
                transpose_b: true,
                output: DType::Bf16,
                bias: bias.is_some(),
                accumulate: false,
            };
            let operands = MatmulOperands {
                a: x.device_ptr()?,
                b: weight.device_ptr()?,
                bias: bias.map_or(Ok(0), Tensor::device_ptr)?,
                d: y.device_ptr_mut()?,
            };
            // SAFETY: all operands are bf16 matrices of the product's extents on this device, checked above.
            unsafe { device.blas()?.matmul(device, product, operands)? };
        }
    }
    Ok(y)
}

/// What a [`linear_vectors`] layer does to its input before the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputActivation {
    /// Nothing.
    None,
    /// `x · sigmoid(x)`.
    Silu,
}

/// `activation(x) · weightᵀ + bias` for a few vectors: `x` `[vectors, in]` and the result `[vectors, out]` in f32, `weight` and
/// `bias` in the device's compute type. On CUDA `in` is a multiple of 8.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn linear_vectors(
    x: &Tensor,
    activation: InputActivation,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    const OP: &str = "linear_vectors";
    x.ensure_rank(OP, "x", 2, "[vectors, in]")?;
    x.ensure_dtype(OP, "x", DType::F32)?;
    let (vectors, inputs, outputs) = ensure_linear(OP, x, weight, bias)?;
    let mut y = Tensor::empty(&x.device(), [vectors, outputs], DType::F32)?;
    let _op = crate::profile::op(OP, x, 2 * vectors * inputs * outputs, weight.bytes() + y.bytes());
    let Some(device) = x.cuda() else {
        let activated = match activation {
            InputActivation::None => x.clone(),
            InputActivation::Silu => super::elementwise::silu(x)?,
        };
        cpu_linear(&activated, weight, bias, [vectors, inputs, outputs], &mut y)?;
        return Ok(y);
    };
    if !inputs.is_multiple_of(8) {
        return Err(Error::invalid(format!(
            "{OP}: {inputs} inputs are not a multiple of 8, which the CUDA kernel needs"
        )));
    }
    let kernel = device.kernel("linear", OP)?;
    let rows_per_block = kernel.info().tile[0] as usize;
    let args = Args::new()
        .input(x)?
        .input(weight)?
        .optional(bias)?
        .output(&mut y)?
        .int(inputs)
        .int(outputs)
        .int(usize::from(activation == InputActivation::Silu));
    let blocks = [grid(OP, outputs.div_ceil(rows_per_block))?, grid(OP, vectors)?, 1];
    // SAFETY: the arguments are those of `linear_vectors`, of the shapes and types checked above.
    unsafe { kernel.launch(device, blocks, args)? };
    Ok(y)
}

/// Checks a layer's parameters; returns rows, inputs and outputs.
fn ensure_linear(
    op: &'static str,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<(usize, usize, usize)> {
    weight.ensure_rank(op, "weight", 2, "[out, in]")?;
    let (outputs, inputs) = (weight.dim(0), weight.dim(1));
    ensure_parameter(op, "weight", weight, &[outputs, inputs], x)?;
    if x.shape().last() != inputs {
        return Err(Error::Shape {
            op,
            tensor: "x".into(),
            expected: format!("[.., {inputs}]"),
            found: x.shape(),
        });
    }
    if let Some(bias) = bias {
        ensure_parameter(op, "bias", bias, &[outputs], x)?;
    }
    Ok((x.shape().rows(), inputs, outputs))
}

/// The shape with another innermost extent.
pub(super) fn with_last(shape: Shape, last: usize) -> Shape {
    let mut extents = shape.to_vec();
    if let Some(extent) = extents.last_mut() {
        *extent = last;
    }
    Shape::new(&extents)
}

fn cpu_linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, [m, k, n]: [usize; 3], y: &mut Tensor) -> Result<()> {
    let y = y.as_mut_slice::<f32>()?;
    if let Some(bias) = bias {
        let bias = bias.as_slice::<f32>()?;
        // A layer without outputs has no rows to fill.
        y.chunks_mut(n.max(1)).for_each(|row| row.copy_from_slice(bias));
    }
    let weight = Matrix {
        values: weight.as_slice()?,
        row_stride: 1,
        column_stride: k,
    };
    let x = Matrix {
        values: x.as_slice()?,
        row_stride: k,
        column_stride: 1,
    };
    cpu_matmul([m, k, n], x, weight, bias.is_some(), y);
    Ok(())
}

/// A matrix in host memory: element (r, c) is at `r · row_stride + c · column_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub values: &'a [f32],
    pub row_stride: usize,
    pub column_stride: usize,
}

impl Matrix<'_> {
    /// The same elements with rows and columns exchanged.
    pub fn transposed(self) -> Self {
        Matrix {
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    fn expect_extents(&self, rows: usize, columns: usize) {
        let last = (rows - 1) * self.row_stride + (columns - 1) * self.column_stride;
        assert!(
            last < self.values.len(),
            "a {rows}x{columns} matrix reaches past its {} values",
            self.values.len()
        );
    }
}

/// `d = a · b`, or `d += a · b` when `accumulate` is set, for `a` `[m, k]`, `b` `[k, n]` and a row-major `d` `[m, n]`.
pub(crate) fn cpu_matmul(extents: [usize; 3], a: Matrix<'_>, b: Matrix<'_>, accumulate: bool, d: &mut [f32]) {
    matmul(extents, a, b, accumulate, d, Parallelism::Rayon(0));
}

/// `d = a · b` as by [`cpu_matmul`], on the calling thread alone: for callers that are one of many tasks.
pub(crate) fn cpu_matmul_in_thread(extents: [usize; 3], a: Matrix<'_>, b: Matrix<'_>, d: &mut [f32]) {
    matmul(extents, a, b, false, d, Parallelism::None);
}

fn matmul(
    [m, k, n]: [usize; 3],
    a: Matrix<'_>,
    b: Matrix<'_>,
    accumulate: bool,
    d: &mut [f32],
    parallelism: Parallelism,
) {
    assert_eq!(d.len(), m * n);
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !accumulate {
            d.fill(0.0);
        }
        return;
    }
    a.expect_extents(m, k);
    b.expect_extents(k, n);
    // SAFETY: every element that the extents and strides name lies in its slice, checked above; `d` is borrowed mutably.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            d.as_mut_ptr(),
            1,
            n as isize,
            accumulate,
            a.values.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three rows of four columns need twelve values, whichever of them lie side by side.
    #[test]
    fn matrices_lie_within_their_values() {
        for (count, fits) in [(12, true), (11, false)] {
            let values = vec![0.0; count];
            let by_rows = Matrix {
                values: &values,
                row_stride: 4,
                column_stride: 1,
            };
            for (matrix, [rows, columns]) in [(by_rows, [3, 4]), (by_rows.transposed(), [4, 3])] {
                let looked_at = std::panic::catch_unwind(|| matrix.expect_extents(rows, columns));
                assert_eq!(looked_at.is_ok(), fits, "{rows}x{columns} in {count}");
            }
        }
    }
}
