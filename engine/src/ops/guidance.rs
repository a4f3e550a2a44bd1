//! Classifier-free guidance and a step of the sampler, in one pass over the image.
//!
//! [`guided_euler_step`]: `x = keep · x + add · v` in place, in f32, where `v` is the prediction itself or, with [`Guidance`],
//! `v_negative + cfg · (prediction − v_negative)`; all of one shape. With flow matching the prediction is a velocity and the step
//! Euler's: keep is 1, which rounds nothing, and add is Δσ. Both are read on the device, so that a recorded step can be replayed with
//! others.
//!
//! Source: Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022).

use rayon::prelude::*;

use super::grid;
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;

/// What the prediction is moved away from.
#[derive(Clone, Copy, Debug)]
pub struct Guidance<'a> {
    /// The prediction for the negative captions, f32, of the shape of the other.
    pub negative: &'a Tensor,
    /// The strength; 1 leaves the prediction as it is.
    pub cfg: f32,
}

/// Takes a step with `factors`, keep and add, f32 `[2]`; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit, or `x` shares its buffer.
pub fn guided_euler_step(
    x: &mut Tensor,
    velocity: &Tensor,
    guidance: Option<Guidance<'_>>,
    factors: &Tensor,
) -> Result<()> {
    const OP: &str = "guided_euler_step";
    x.ensure_dtype(OP, "x", DType::F32)?;
    let negative = guidance.map(|guidance| ("negative", guidance.negative));
    for (name, tensor) in [("velocity", velocity)].into_iter().chain(negative) {
        tensor.ensure_dtype(OP, name, DType::F32)?;
        tensor.ensure_device(OP, name, &x.device())?;
        tensor.ensure_shape(OP, name, x.shape())?;
    }
    ensure_factors(OP, factors, x)?;
    let _op = crate::profile::op(OP, x, 0, (3 + usize::from(guidance.is_some())) * x.bytes());
    match x.cuda().cloned() {
        None => cpu_step(x, velocity, guidance, factors),
        Some(device) => cuda_step(OP, &device, x, velocity, guidance, factors),
    }
}

/// Checks the factors of a step: f32 `[2]`, beside `input`.
pub(super) fn ensure_factors(op: &'static str, factors: &Tensor, input: &Tensor) -> Result<()> {
    factors.ensure_shape(op, "factors", [2])?;
    factors.ensure_dtype(op, "factors", DType::F32)?;
    factors.ensure_device(op, "factors", &input.device())
}

fn cpu_step(x: &mut Tensor, velocity: &Tensor, guidance: Option<Guidance<'_>>, factors: &Tensor) -> Result<()> {
    let &[keep, add] = factors.as_slice::<f32>()? else {
        unreachable!("it was checked to be two numbers");
    };
    let steps = x.as_mut_slice::<f32>()?.par_iter_mut().zip(velocity.as_slice::<f32>()?);
    match guidance {
        None => steps.for_each(|(x, v)| *x = keep * *x + v * add),
        Some(Guidance { negative, cfg }) => {
            steps
                .zip(negative.as_slice::<f32>()?)
                .for_each(|((x, velocity), negative)| {
                    *x = keep * *x + (negative + cfg * (velocity - negative)) * add;
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
    factors: &Tensor,
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
        .input(factors)?;
    // SAFETY: the arguments are those of `guided_euler_step`, of the shapes and types checked at the door; the blocks cover
    // every element; a null pointer stands for absent guidance.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}
