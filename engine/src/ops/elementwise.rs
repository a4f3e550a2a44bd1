//! Element by element: `silu`.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// `x · sigmoid(x)` for an f32 tensor on the CPU; on CUDA it is always part of a neighbour.
///
/// # Errors
/// When the tensor is on a GPU or not f32.
pub(crate) fn silu(x: &Tensor) -> Result<Tensor> {
    if x.cuda().is_some() {
        return Err(Error::invalid("silu: on CUDA this is fused into its neighbours"));
    }
    let mut y = Tensor::empty(&x.device(), x.shape(), x.dtype())?;
    y.as_mut_slice::<f32>()?
        .par_iter_mut()
        .zip(x.as_slice::<f32>()?)
        .for_each(|(y, &x)| *y = silu_scalar(x));
    Ok(y)
}

/// `x · sigmoid(x)`.
pub(crate) fn silu_scalar(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// The derivative of `x · sigmoid(x)`.
pub(crate) fn silu_slope(x: f32) -> f32 {
    let sigmoid = 1.0 / (1.0 + (-x).exp());
    sigmoid * (1.0 + x * (1.0 - sigmoid))
}
