//! Gradients of linear layers; the formulas are in the parent's head comment.

use super::{InputActivation, Matrix, cpu_matmul, ensure_linear, with_last};
use crate::device::{Args, CudaDevice, Matmul, MatmulOperands};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::elementwise::{silu, silu_slope};
use crate::ops::sum_rows::add_row_sum;
use crate::ops::{ensure_parameter, grid};
use crate::tensor::Tensor;

/// Where the gradients of a layer's parameters go, in the device's compute type, added to; `None` for frozen ones.
#[derive(Debug, Default)]
pub struct LinearGradients<'a> {
    /// `[out, in]`
    pub weight: Option<&'a mut Tensor>,
    /// `[out]`
    pub bias: Option<&'a mut Tensor>,
}

impl LinearGradients<'_> {
    fn expect(&self, op: &'static str, outputs: usize, inputs: usize, x: &Tensor) -> Result<()> {
        if let Some(weight) = &self.weight {
            ensure_parameter(op, "weight gradient", weight, &[outputs, inputs], x)?;
        }
        match &self.bias {
            Some(bias) => ensure_parameter(op, "bias gradient", bias, &[outputs], x),
            None => Ok(()),
        }
    }
}

/// The gradient `[.., in]` of `x` in [`super::linear`] for the gradient `dy` `[.., out]` of its result.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn linear_backward_input(dy: &Tensor, weight: &Tensor) -> Result<Tensor> {
    const OP: &str = "linear_backward_input";
    dy.ensure_dtype(OP, "dy", dy.device().compute_dtype())?;
    weight.ensure_rank(OP, "weight", 2, "[out, in]")?;
    let (outputs, inputs) = (weight.dim(0), weight.dim(1));
    ensure_parameter(OP, "weight", weight, &[outputs, inputs], dy)?;
    if dy.shape().last() != outputs {
        return Err(Error::Shape {
            op: OP,
            tensor: "dy".into(),
            expected: format!("[.., {outputs}]"),
            found: dy.shape(),
        });
    }
    let rows = dy.shape().rows();
    let mut dx = Tensor::empty(&dy.device(), with_last(dy.shape(), inputs), dy.dtype())?;
    let Some(device) = dy.cuda() else {
        let gradient = row_major(dy.as_slice()?, outputs);
        let weight = row_major(weight.as_slice()?, inputs);
        cpu_matmul([rows, outputs, inputs], gradient, weight, false, dx.as_mut_slice()?);
        return Ok(dx);
    };
    let product = Matmul {
        m: rows,
        n: inputs,
        k: outputs,
        transpose_a: false,
        transpose_b: false,
        output: DType::Bf16,
        bias: false,
        accumulate: false,
    };
    let operands = MatmulOperands {
        a: dy.device_ptr()?,
        b: weight.device_ptr()?,
        bias: 0,
        d: dx.device_ptr_mut()?,
    };
    // SAFETY: all operands are bf16 matrices of the product's extents on this device, checked above.
    unsafe { device.blas()?.matmul(device, product, operands)? };
    Ok(dx)
}

/// Adds the gradients of weight and bias of [`super::linear`] for the gradient `dy` `[.., out]` of its result to `gradients`.
///
/// # Errors
/// When shapes, types or devices do not fit, or a gradient shares its buffer.
pub fn linear_backward_weight(dy: &Tensor, x: &Tensor, gradients: LinearGradients<'_>) -> Result<()> {
    const OP: &str = "linear_backward_weight";
    let (outputs, inputs, rows) = (dy.shape().last(), x.shape().last(), x.shape().rows());
    for (name, tensor) in [("dy", dy), ("x", x)] {
        tensor.ensure_dtype(OP, name, x.device().compute_dtype())?;
    }
    dy.ensure_shape(OP, "dy", with_last(x.shape(), outputs))?;
    dy.ensure_device(OP, "dy", &x.device())?;
    gradients.expect(OP, outputs, inputs, x)?;
    if let Some(bias) = gradients.bias {
        add_row_sum(dy, bias)?;
    }
    let Some(target) = gradients.weight else { return Ok(()) };
    if rows == 0 {
        return Ok(());
    }
    let Some(device) = x.cuda() else {
        let gradient = row_major(dy.as_slice()?, outputs).transposed();
        let x = row_major(x.as_slice()?, inputs);
        cpu_matmul([outputs, rows, inputs], gradient, x, true, target.as_mut_slice()?);
        return Ok(());
    };
    let product = Matmul {
        m: outputs,
        n: inputs,
        k: rows,
        transpose_a: true,
        transpose_b: false,
        output: DType::Bf16,
        bias: false,
        accumulate: true,
    };
    let operands = MatmulOperands {
        a: dy.device_ptr()?,
        b: x.device_ptr()?,
        bias: 0,
        d: target.device_ptr_mut()?,
    };
    // SAFETY: all operands are bf16 matrices of the product's extents on this device, checked above; the target is not shared.
    unsafe { device.blas()?.matmul(device, product, operands) }
}

fn row_major(values: &[f32], columns: usize) -> Matrix<'_> {
    Matrix {
        values,
        row_stride: columns,
        column_stride: 1,
    }
}

/// The gradients of [`super::linear_vectors`] for the gradient `dy` `[vectors, out]` of its result: those of the parameters are
/// added to `gradients`, that of `x` to `dx`, f32 `[vectors, in]`.
///
/// # Errors
/// When shapes, types or devices do not fit, or something to be written shares its buffer.
pub fn linear_vectors_backward(
    dy: &Tensor,
    x: &Tensor,
    activation: InputActivation,
    weight: &Tensor,
    gradients: LinearGradients<'_>,
    dx: Option<&mut Tensor>,
) -> Result<()> {
    const OP: &str = "linear_vectors_backward";
    x.ensure_rank(OP, "x", 2, "[vectors, in]")?;
    let (vectors, inputs, outputs) = ensure_linear(OP, x, weight, None)?;
    for (name, tensor, width) in [("x", x, inputs), ("dy", dy, outputs)]
        .into_iter()
        .chain(dx.as_deref().map(|dx| ("dx", dx, inputs)))
    {
        tensor.ensure_shape(OP, name, [vectors, width])?;
        tensor.ensure_dtype(OP, name, DType::F32)?;
        tensor.ensure_device(OP, name, &x.device())?;
    }
    gradients.expect(OP, outputs, inputs, x)?;
    match x.cuda() {
        None => cpu_vectors(dy, x, activation, weight, gradients, dx),
        Some(device) => {
            if !inputs.is_multiple_of(8) {
                return Err(Error::invalid(format!(
                    "{OP}: {inputs} inputs are not a multiple of 8, which the CUDA kernels need"
                )));
            }
            let silu_input = usize::from(activation == InputActivation::Silu);
            cuda_vectors_weight(OP, device, [dy, x], silu_input, gradients)?;
            match dx {
                Some(dx) => cuda_vectors_input(OP, device, [dy, x, weight], silu_input, dx),
                None => Ok(()),
            }
        }
    }
}

fn cpu_vectors(
    dy: &Tensor,
    x: &Tensor,
    activation: InputActivation,
    weight: &Tensor,
    gradients: LinearGradients<'_>,
    dx: Option<&mut Tensor>,
) -> Result<()> {
    let activated = match activation {
        InputActivation::None => x.clone(),
        InputActivation::Silu => silu(x)?,
    };
    linear_backward_weight(dy, &activated, gradients)?;
    let Some(dx) = dx else { return Ok(()) };
    let through = linear_backward_input(dy, weight)?;
    let terms = through.as_slice::<f32>()?.iter().zip(x.as_slice::<f32>()?);
    for (dx, (through, &x)) in dx.as_mut_slice::<f32>()?.iter_mut().zip(terms) {
        *dx += match activation {
            InputActivation::None => *through,
            InputActivation::Silu => through * silu_slope(x),
        };
    }
    Ok(())
}

fn cuda_vectors_weight(
    op: &'static str,
    device: &CudaDevice,
    [dy, x]: [&Tensor; 2],
    silu_input: usize,
    gradients: LinearGradients<'_>,
) -> Result<()> {
    if gradients.weight.is_none() && gradients.bias.is_none() {
        return Ok(());
    }
    let kernel = device.kernel("linear", "linear_vectors_weight_gradient")?;
    let (vectors, inputs, outputs) = (x.dim(0), x.dim(1), dy.dim(1));
    let args = Args::new()
        .input(dy)?
        .input(x)?
        .optional_output(gradients.weight)?
        .optional_output(gradients.bias)?
        .int(vectors)
        .int(inputs)
        .int(outputs)
        .int(silu_input);
    let blocks = grid(op, outputs.div_ceil(kernel.info().tile[0] as usize))?;
    // SAFETY: the arguments are those of `linear_vectors_weight_gradient`, of the shapes and types checked at the door; the
    // blocks cover every output.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}

fn cuda_vectors_input(
    op: &'static str,
    device: &CudaDevice,
    [dy, x, weight]: [&Tensor; 3],
    silu_input: usize,
    dx: &mut Tensor,
) -> Result<()> {
    let (vectors, inputs, outputs) = (x.dim(0), x.dim(1), dy.dim(1));
    let kernel = device.kernel("linear", "linear_vectors_input_gradient")?;
    let [columns, lanes, ..] = kernel.info().tile.map(|extent| extent as usize);
    let tiles = inputs.div_ceil(columns);
    let most = (device.multiprocessors() as usize).div_ceil(tiles * vectors.max(1));
    let groups = outputs.div_ceil(lanes).min(most);
    let mut partial = Tensor::empty(&x.device(), [groups, vectors, inputs], DType::F32)?;
    let args = Args::new()
        .input(dy)?
        .input(weight)?
        .output(&mut partial)?
        .int(inputs)
        .int(outputs);
    let blocks = [grid(op, tiles)?, grid(op, groups)?, grid(op, vectors)?];
    // SAFETY: the arguments are those of `linear_vectors_input_gradient`, of the shapes and types checked at the door; the
    // blocks cover every input and vector, and every group has its part of `partial`.
    unsafe { kernel.launch(device, blocks, args)? };
    let kernel = device.kernel("linear", "linear_vectors_add_input_gradient")?;
    let elements = vectors * inputs;
    let args = Args::new()
        .input(&partial)?
        .input(x)?
        .output(dx)?
        .int(groups)
        .int(elements)
        .int(silu_input);
    let blocks = grid(op, elements.div_ceil(kernel.info().tile[0] as usize))?;
    // SAFETY: the arguments are those of `linear_vectors_add_input_gradient`, of the shapes and types checked at the door; the
    // blocks cover every element.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}
