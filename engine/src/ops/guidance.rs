//! Classifier-free guidance and the Euler step, in one pass over the image.
//!
//! [`guided_euler_step`]: `x += v · Δσ` in place, in f32, where `v` is the velocity itself or, with [`Guidance`],
//! `v_negative + cfg · (velocity − v_negative)`; all of one shape. Δσ is read on the device, so that a recorded step can be
//! replayed with another.
//!
//! Source: Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022).

use rayon::prelude::*;

use super::grid;
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;

/// What the velocity is moved away from.
#[derive(Clone, Copy, Debug)]
pub struct Guidance<'a> {
    /// The velocity for the negative captions, f32, of the shape of the other.
    pub negative: &'a Tensor,
    /// The strength; 1 leaves the velocity as it is.
    pub cfg: f32,
}

/// Moves `x` along the velocity by `delta_sigma`, f32 `[1]`; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit, or `x` shares its buffer.
pub fn guided_euler_step(
    x: &mut Tensor,
    velocity: &Tensor,
    guidance: Option<Guidance<'_>>,
    delta_sigma: &Tensor,
) -> Result<()> {
    const OP: &str = "guided_euler_step";
    x.expect_dtype(OP, "x", DType::F32)?;
    let negative = guidance.map(|guidance| ("negative", guidance.negative));
    for (name, tensor) in [("velocity", velocity)].into_iter().chain(negative) {
        tensor.expect_dtype(OP, name, DType::F32)?;
        tensor.expect_device(OP, name, &x.device())?;
        tensor.expect_shape(OP, name, x.shape())?;
    }
    delta_sigma.expect_shape(OP, "delta_sigma", [1])?;
    delta_sigma.expect_dtype(OP, "delta_sigma", DType::F32)?;
    delta_sigma.expect_device(OP, "delta_sigma", &x.device())?;
    let _op = crate::profile::op(OP, x, 0, (3 + usize::from(guidance.is_some())) * x.bytes());
    match x.cuda().cloned() {
        None => cpu_step(x, velocity, guidance, delta_sigma),
        Some(device) => cuda_step(OP, &device, x, velocity, guidance, delta_sigma),
    }
}

fn cpu_step(x: &mut Tensor, velocity: &Tensor, guidance: Option<Guidance<'_>>, delta_sigma: &Tensor) -> Result<()> {
    let delta_sigma = delta_sigma.as_slice::<f32>()?[0];
    let steps = x.as_mut_slice::<f32>()?.par_iter_mut().zip(velocity.as_slice::<f32>()?);
    match guidance {
        None => steps.for_each(|(x, v)| *x += v * delta_sigma),
        Some(Guidance { negative, cfg }) => {
            steps
                .zip(negative.as_slice::<f32>()?)
                .for_each(|((x, velocity), negative)| {
                    *x += (negative + cfg * (velocity - negative)) * delta_sigma;
                });
        }
    }
    Ok(())
}

fn cuda_step(
    op: &'static str,
    device: &CudaDevice,
    x: &mut Tensor,
    velocity: &Tensor,
    guidance: Option<Guidance<'_>>,
    delta_sigma: &Tensor,
) -> Result<()> {
    let kernel = device.kernel("guidance", op)?;
    let elements = x.elements();
    let blocks = grid(op, elements.div_ceil(kernel.info().tile[0] as usize))?;
    let args = Args::new()
        .output(x)?
        .input(velocity)?
        .optional(guidance.map(|guidance| guidance.negative))?
        .long(elements as u64)
        .float(guidance.map_or(1.0, |guidance| guidance.cfg))
        .input(delta_sigma)?;
    // SAFETY: the arguments are those of `guided_euler_step`, of the shapes and types checked at the door; the blocks cover
    // every element; a null pointer stands for absent guidance.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}
