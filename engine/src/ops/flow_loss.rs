//! Flow matching in training: the noisy image, and the loss of the velocity that a model gives for it.
//!
//! * [`noisy_image`]: `(1 − sigma) · image + sigma · noise`, in f32, rounded to the device's compute type
//! * [`flow_loss`]: `mean((velocity − (noise − image))²)`, and the loss's gradient times `weight`,
//!   `weight · 2 · (velocity − (noise − image)) / n` over all n elements
//!
//! Shapes: image, noise and velocity f32 `[batch, …]`, sigmas f32 `[batch]`, the loss f32 `[1]` on the device, its gradient in
//! the compute type. Sums are f32 in a fixed order. Source: Lipman et al., "Flow Matching for Generative Modeling" (2023).

use rayon::prelude::*;

use super::grid;
use super::sum_rows::cpu_row_sums;
use crate::device::{Args, CudaDevice};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;

/// The image between `image` and `noise`; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit.
pub fn noisy_image(image: &Tensor, noise: &Tensor, sigmas: &Tensor) -> Result<Tensor> {
    const OP: &str = "noisy_image";
    image.expect_dtype(OP, "image", DType::F32)?;
    expect_like(OP, "noise", noise, image)?;
    let batch = image.shape().first().copied().unwrap_or(0);
    sigmas.expect_shape(OP, "sigmas", [batch])?;
    sigmas.expect_dtype(OP, "sigmas", DType::F32)?;
    sigmas.expect_device(OP, "sigmas", &image.device())?;
    let mut noisy = Tensor::empty_compute(&image.device(), image.shape())?;
    let item_elements = image.elements() / batch.max(1);
    if item_elements == 0 {
        return Ok(noisy);
    }
    let Some(device) = image.cuda() else {
        let (image, noise, sigmas) = (
            image.as_slice::<f32>()?,
            noise.as_slice::<f32>()?,
            sigmas.as_slice::<f32>()?,
        );
        let items = noisy.as_mut_slice::<f32>()?.chunks_mut(item_elements).zip(sigmas);
        for (item, (noisy, sigma)) in items.enumerate() {
            let range = item * item_elements..(item + 1) * item_elements;
            let sources = image[range.clone()].par_iter().zip(&noise[range]);
            noisy
                .par_iter_mut()
                .zip(sources)
                .for_each(|(noisy, (image, noise))| *noisy = (1.0 - sigma) * image + sigma * noise);
        }
        return Ok(noisy);
    };
    let kernel = device.kernel("flow_loss", "flow_noisy_image")?;
    let blocks = item_elements.div_ceil(kernel.info().tile[0] as usize);
    let args = Args::new()
        .input(image)?
        .input(noise)?
        .input(sigmas)?
        .output(&mut noisy)?
        .long(item_elements as u64);
    // SAFETY: the arguments are those of `flow_noisy_image`, of the shapes and types checked above; the blocks cover every
    // element of every item.
    unsafe { kernel.launch(device, [grid(OP, blocks)?, grid(OP, batch)?, 1], args)? };
    Ok(noisy)
}

/// The loss, and with `weight` the gradient of `weight` · loss; see the module's head comment.
///
/// # Errors
/// When shapes, types or devices do not fit, or there is no element.
pub fn flow_loss(
    velocity: &Tensor,
    image: &Tensor,
    noise: &Tensor,
    weight: Option<f32>,
) -> Result<(Tensor, Option<Tensor>)> {
    const OP: &str = "flow_loss";
    velocity.expect_dtype(OP, "velocity", DType::F32)?;
    expect_like(OP, "image", image, velocity)?;
    expect_like(OP, "noise", noise, velocity)?;
    let elements = velocity.elements();
    if elements == 0 {
        return Err(crate::Error::invalid(format!("{OP}: the mean of no elements")));
    }
    let mut gradient = weight
        .map(|_| Tensor::empty_compute(&velocity.device(), velocity.shape()))
        .transpose()?;
    let scale = 2.0 * weight.unwrap_or(0.0) / elements as f32;
    let loss = match velocity.cuda() {
        None => cpu_flow_loss([velocity, image, noise], gradient.as_mut(), scale)?,
        Some(device) => cuda_flow_loss(OP, device, [velocity, image, noise], gradient.as_mut(), scale)?,
    };
    Ok((loss, gradient))
}

fn cpu_flow_loss([velocity, image, noise]: [&Tensor; 3], gradient: Option<&mut Tensor>, scale: f32) -> Result<Tensor> {
    /// Elements that are summed one after the other.
    const RUN: usize = 1024;
    let (velocity, image, noise) = (
        velocity.as_slice::<f32>()?,
        image.as_slice::<f32>()?,
        noise.as_slice::<f32>()?,
    );
    let error = |index: usize| velocity[index] - (noise[index] - image[index]);
    let elements = velocity.len();
    let sums = cpu_row_sums(0..elements.div_ceil(RUN), 1, |run, sum| {
        let range = run * RUN..elements.min((run + 1) * RUN);
        sum[0] += range.map(|index| error(index) * error(index)).sum::<f32>();
    });
    if let Some(gradient) = gradient {
        let targets = gradient.as_mut_slice::<f32>()?.par_iter_mut().enumerate();
        targets.for_each(|(index, target)| *target = scale * error(index));
    }
    Tensor::from_slice(&crate::Device::Cpu, &[sums[0] / elements as f32], [1])
}

fn cuda_flow_loss(
    op: &'static str,
    device: &CudaDevice,
    [velocity, image, noise]: [&Tensor; 3],
    gradient: Option<&mut Tensor>,
    scale: f32,
) -> Result<Tensor> {
    let kernel = device.kernel("flow_loss", op)?;
    let elements = velocity.elements();
    let blocks = grid(op, elements.div_ceil(kernel.info().tile[0] as usize))?;
    let mut partial = Tensor::empty(&velocity.device(), [blocks as usize], DType::F32)?;
    let args = Args::new()
        .input(velocity)?
        .input(image)?
        .input(noise)?
        .optional_output(gradient)?
        .output(&mut partial)?
        .long(elements as u64)
        .float(scale);
    // SAFETY: the arguments are those of `flow_loss`, of the shapes and types checked at the door; the blocks cover every
    // element, and each has a partial sum.
    unsafe { kernel.launch(device, [blocks, 1, 1], args)? };
    let mut loss = Tensor::empty(&velocity.device(), [1], DType::F32)?;
    let args = Args::new()
        .input(&partial)?
        .output(&mut loss)?
        .int(blocks as usize)
        .float(1.0 / elements as f32);
    let kernel = device.kernel("flow_loss", "flow_loss_mean")?;
    // SAFETY: the arguments are those of `flow_loss_mean`; one block adds up all partial sums.
    unsafe { kernel.launch(device, [1, 1, 1], args)? };
    Ok(loss)
}

fn expect_like(op: &'static str, name: &str, tensor: &Tensor, like: &Tensor) -> Result<()> {
    tensor.expect_shape(op, name, like.shape())?;
    tensor.expect_dtype(op, name, DType::F32)?;
    tensor.expect_device(op, name, &like.device())
}
