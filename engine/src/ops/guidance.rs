//! Classifier-free guidance and the Euler step, in one pass over the image.
//!
//! [`guided_euler_step`]: `x += v · Δσ` in place, in f32, where `v` is
//!
//! * with `cfg` = 1: `velocity`, of the shape of `x`
//! * otherwise: `v_neg + cfg · (v_pos − v_neg)`; `velocity` has twice as many items as `x`, first all conditional ones
//!   (`v_pos`), then all unconditional ones (`v_neg`)
//!
//! Source: Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022).

use rayon::prelude::*;

use super::grid;
use crate::device::{Args, CudaDevice};
use crate::error::{Error, Result};
use crate::tensor::{DType, Shape, Tensor};

/// Moves `x` along the guided velocity by `delta_sigma`; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit, or `x` shares its buffer.
pub fn guided_euler_step(x: &mut Tensor, velocity: &Tensor, cfg: f32, delta_sigma: f32) -> Result<()> {
    const OP: &str = "guided_euler_step";
    x.expect_dtype(OP, "x", DType::F32)?;
    velocity.expect_dtype(OP, "velocity", DType::F32)?;
    velocity.expect_device(OP, "velocity", &x.device())?;
    let guided = cfg != 1.0;
    velocity.expect_shape(OP, "velocity", velocity_shape(OP, x, guided)?)?;
    match x.cuda().cloned() {
        None => cpu_step(x, velocity, guided.then_some(cfg), delta_sigma),
        Some(device) => cuda_step(OP, &device, x, velocity, guided.then_some(cfg), delta_sigma),
    }
}

/// The shape of `x`, with twice as many items when `guided`.
fn velocity_shape(op: &'static str, x: &Tensor, guided: bool) -> Result<Shape> {
    let mut extents = x.shape().to_vec();
    match extents.first_mut() {
        Some(batch) => *batch *= if guided { 2 } else { 1 },
        None => return Err(Error::invalid(format!("{op}: x has no batch dimension"))),
    }
    Ok(Shape::new(&extents))
}

fn cpu_step(x: &mut Tensor, velocity: &Tensor, cfg: Option<f32>, delta_sigma: f32) -> Result<()> {
    let velocity = velocity.as_slice::<f32>()?;
    let (positive, negative) = velocity.split_at(x.elements());
    let x = x.as_mut_slice::<f32>()?.par_iter_mut();
    match cfg {
        None => x.zip(positive).for_each(|(x, v)| *x += v * delta_sigma),
        Some(cfg) => x.zip(positive).zip(negative).for_each(|((x, positive), negative)| {
            *x += (negative + cfg * (positive - negative)) * delta_sigma;
        }),
    }
    Ok(())
}

fn cuda_step(
    op: &'static str,
    device: &CudaDevice,
    x: &mut Tensor,
    velocity: &Tensor,
    cfg: Option<f32>,
    delta_sigma: f32,
) -> Result<()> {
    let kernel = device.kernel("guidance", op)?;
    let elements = x.elements();
    let blocks = grid(op, elements.div_ceil(kernel.info().tile[0] as usize))?;
    // The unconditional items follow the conditional ones, of which there are as many elements as x has.
    let positive = velocity.device_ptr()?;
    let negative = cfg.map_or(0, |_| positive + x.bytes() as u64);
    let args = Args::new()
        .output(x)?
        .long(positive)
        .long(negative)
        .long(elements as u64)
        .float(cfg.unwrap_or(1.0))
        .float(delta_sigma);
    // SAFETY: the arguments are those of `guided_euler_step`, of the shapes and types checked at the door; the blocks cover
    // every element; a null pointer stands for the absent half.
    unsafe { kernel.launch(device, [blocks, 1, 1], args) }
}
