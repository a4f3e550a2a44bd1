//! Latents as the autoencoder's decoder takes them.
//!
//! [`denormalize_latent`]: `latent / scaling_factor + shift_factor`, from f32 to the device's compute type, any shape. Source:
//! the latent diffusion pipelines, which train on normalised latents.

use rayon::prelude::*;

use super::grid;
use crate::device::Args;
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;

/// `latent / scaling_factor + shift_factor`; see the module's head comment.
///
/// # Errors
/// When the latent is not f32, or the device has no room.
pub fn denormalize_latent(latent: &Tensor, scaling_factor: f32, shift_factor: f32) -> Result<Tensor> {
    const OP: &str = "denormalize_latent";
    latent.ensure_dtype(OP, "latent", DType::F32)?;
    let mut y = Tensor::empty_compute(&latent.device(), latent.shape())?;
    let _op = crate::profile::op(OP, latent, 0, latent.bytes() + y.bytes());
    let Some(device) = latent.cuda() else {
        y.as_mut_slice::<f32>()?
            .par_iter_mut()
            .zip(latent.as_slice::<f32>()?)
            .for_each(|(y, x)| *y = x / scaling_factor + shift_factor);
        return Ok(y);
    };
    let kernel = device.kernel("latent", OP)?;
    let blocks = latent.elements().div_ceil(kernel.info().tile[0].max(1) as usize);
    let args = Args::new()
        .input(latent)?
        .output(&mut y)?
        .long(latent.elements() as u64)
        .float(scaling_factor)
        .float(shift_factor);
    // SAFETY: the arguments are those of `denormalize_latent`, two arrays of as many elements as it is told; the grid covers
    // them.
    unsafe { kernel.launch(device, [grid(OP, blocks)?, 1, 1], args)? };
    Ok(y)
}
