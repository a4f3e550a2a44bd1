//! The noisy image of training, and the loss of what a model predicts of it.
//!
//! * [`noisy_image`]: `mix[0] · image + mix[1] · noise`, in f32, rounded to the device's compute type; with flow matching the mix is
//!   (1 − σ, σ)
//! * [`flow_loss`]: with `error = prediction − (target[0] · image + target[1] · noise)` the loss `mean(error²)`, and its gradient times
//!   `weight`, `weight · 2 · error / n` over all n elements; with flow matching the target is (−1, 1), the velocity
//!
//! Shapes: image, noise and prediction f32 `[batch, …]`, mixes and targets f32 `[batch, 2]`, the loss f32 `[1]` on the device, its
//! gradient in the compute type. Sums are f32 in a fixed order. Source: Lipman et al., "Flow Matching for Generative Modeling" (2023).

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
pub fn noisy_image(image: &Tensor, noise: &Tensor, mixes: &Tensor) -> Result<Tensor> {
    const OP: &str = "noisy_image";
    image.ensure_dtype(OP, "image", DType::F32)?;
    ensure_like(OP, "noise", noise, image)?;
    let batch = image.shape().first().copied().unwrap_or(0);
    ensure_shares(OP, "mixes", mixes, image)?;
    let mut noisy = Tensor::empty_compute(&image.device(), image.shape())?;
    let item_elements = image.elements() / batch.max(1);
    if item_elements == 0 {
        return Ok(noisy);
    }
    let Some(device) = image.cuda() else {
        let (image, noise) = (image.as_slice::<f32>()?, noise.as_slice::<f32>()?);
        let mixes = mixes.as_slice::<f32>()?.as_chunks::<2>().0;
        let items = noisy.as_mut_slice::<f32>()?.chunks_mut(item_elements).zip(mixes);
        for (item, (noisy, mix)) in items.enumerate() {
            let range = item * item_elements..(item + 1) * item_elements;
            let sources = image[range.clone()].par_iter().zip(&noise[range]);
            noisy
                .par_iter_mut()
                .zip(sources)
                .for_each(|(noisy, (image, noise))| *noisy = mix[0] * image + mix[1] * noise);
        }
        return Ok(noisy);
    };
    let kernel = device.kernel("flow_loss", "flow_noisy_image")?;
    let blocks = item_elements.div_ceil(kernel.info().tile[0] as usize);
    let args = Args::new()
        .input(image)?
        .input(noise)?
        .input(mixes)?
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
    prediction: &Tensor,
    image: &Tensor,
    noise: &Tensor,
    targets: &Tensor,
    weight: Option<f32>,
) -> Result<(Tensor, Option<Tensor>)> {
    const OP: &str = "flow_loss";
    prediction.ensure_dtype(OP, "prediction", DType::F32)?;
    ensure_like(OP, "image", image, prediction)?;
    ensure_like(OP, "noise", noise, prediction)?;
    ensure_shares(OP, "targets", targets, prediction)?;
    let elements = prediction.elements();
    if elements == 0 || prediction.shape().is_empty() {
        return Err(crate::Error::invalid(format!("{OP}: the mean of no elements")));
    }
    let mut gradient = weight
        .map(|_| Tensor::empty_compute(&prediction.device(), prediction.shape()))
        .transpose()?;
    let scale = 2.0 * weight.unwrap_or(0.0) / elements as f32;
    let operands = [prediction, image, noise, targets];
    let loss = match prediction.cuda() {
        None => cpu_flow_loss(operands, gradient.as_mut(), scale)?,
        Some(device) => cuda_flow_loss(OP, device, operands, gradient.as_mut(), scale)?,
    };
    Ok((loss, gradient))
}

fn cpu_flow_loss(operands: [&Tensor; 4], gradient: Option<&mut Tensor>, scale: f32) -> Result<Tensor> {
    /// Elements that are summed one after the other.
    const RUN: usize = 1024;
    let item_elements = operands[0].elements() / operands[0].dim(0);
    let [prediction, image, noise, targets] = operands.map(|operand| operand.as_slice::<f32>());
    let (prediction, image, noise) = (prediction?, image?, noise?);
    let targets = targets?.as_chunks::<2>().0;
    let error = |index: usize| {
        let target = targets[index / item_elements];
        prediction[index] - (target[0] * image[index] + target[1] * noise[index])
    };
    let elements = prediction.len();
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
    [prediction, image, noise, targets]: [&Tensor; 4],
    gradient: Option<&mut Tensor>,
    scale: f32,
) -> Result<Tensor> {
    let kernel = device.kernel("flow_loss", op)?;
    let elements = prediction.elements();
    let blocks = grid(op, elements.div_ceil(kernel.info().tile[0] as usize))?;
    let mut partial = Tensor::empty(&prediction.device(), [blocks as usize], DType::F32)?;
    let args = Args::new()
        .input(prediction)?
        .input(image)?
        .input(noise)?
        .input(targets)?
        .optional_output(gradient)?
        .output(&mut partial)?
        .long(elements as u64)
        .long((elements / prediction.dim(0)) as u64)
        .float(scale);
    // SAFETY: the arguments are those of `flow_loss`, of the shapes and types checked at the door; the blocks cover every
    // element, and each has a partial sum.
    unsafe { kernel.launch(device, [blocks, 1, 1], args)? };
    let mut loss = Tensor::empty(&prediction.device(), [1], DType::F32)?;
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

/// Checks two numbers for each item of `like`.
fn ensure_shares(op: &'static str, name: &str, shares: &Tensor, like: &Tensor) -> Result<()> {
    shares.ensure_shape(op, name, [like.shape().first().copied().unwrap_or(0), 2])?;
    shares.ensure_dtype(op, name, DType::F32)?;
    shares.ensure_device(op, name, &like.device())
}

fn ensure_like(op: &'static str, name: &str, tensor: &Tensor, like: &Tensor) -> Result<()> {
    tensor.ensure_shape(op, name, like.shape())?;
    tensor.ensure_dtype(op, name, DType::F32)?;
    tensor.ensure_device(op, name, &like.device())
}
