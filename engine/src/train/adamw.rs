//! AdamW over all trained tensors together.
//!
//! With g the gradients gathered since the last step, N their norm over all tensors, and c the norm to clip to:
//!
//! ```text
//! g ← g · min(1, c / (N + 1e-6))
//! w ← w · (1 − lr · weight_decay)
//! m ← β₁ · m + (1 − β₁) · g;    v ← β₂ · v + (1 − β₂) · g²
//! w ← w − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
//! average ← d · average + (1 − d) · w
//! ```
//!
//! t counts steps from 1, skipped ones included. A step whose N is not finite is skipped: nothing changes but that the
//! gradients are zero afterwards, as after every step. On CUDA w is a master copy in f32, which the bf16 weight follows, and all
//! decisions are taken on the device; on the CPU w is the weight itself. Sums have a fixed order. A decay stands for the decimal
//! that it was written as: 1 − 0.999 is 0.001, where the f32 nearest to 0.999 would leave 1.3e-5 less of it. Sources: Loshchilov and
//! Hutter, "Decoupled Weight Decay Regularization" (2019); formulas as in PyTorch's `AdamW` and `clip_grad_norm_`.

use std::sync::Arc;

use rayon::prelude::*;

use super::AdamWOptions;
use crate::device::{Args, CudaDevice, Device, MemoryTag};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::cast::cast;
use crate::ops::sum_rows::cpu_row_sums;
use crate::tensor::Tensor;

/// Added to a norm before it is divided by, when gradients are clipped.
const CLIP_EPSILON: f32 = 1e-6;

/// Elements to whose multiples a tensor's place in the state is aligned; kernels move eight at a time.
const ALIGNMENT: usize = 8;

/// The state of AdamW for a list of tensors, in arrays in which the tensors lie one behind the other.
pub struct AdamW {
    options: AdamWOptions,
    clip_norm: Option<f32>,
    ema_decay: Option<f32>,
    /// Where each tensor begins, and its elements.
    places: Vec<(usize, usize)>,
    /// f32; `None` on the CPU.
    master: Option<Tensor>,
    first_moment: Tensor,
    second_moment: Tensor,
    average: Option<Tensor>,
    /// The kernels' tables; `None` on the CPU.
    table: Option<Table>,
    steps: u64,
}

/// What the kernels know of the tensors.
struct Table {
    /// One [`Segment`] per tensor: where it was when it was stepped last.
    known: Vec<Segment>,
    /// The same on the device.
    segments: Tensor,
    /// i32, the tensor of each chunk.
    segment_of_chunk: Tensor,
    chunks: usize,
}

/// As in `adamw.cu`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
struct Segment {
    weight: u64,
    gradient: u64,
    offset: u64,
    elements: u64,
    first_chunk: u64,
}

/// The arrays of the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateArray {
    /// The f32 weights; not kept on the CPU.
    Master,
    /// The running means of the gradients.
    FirstMoment,
    /// The running means of their squares.
    SecondMoment,
    /// The running averages of the weights; kept where a decay was given.
    Average,
}

impl AdamW {
    /// The state before the first step of these weights and gradients.
    ///
    /// # Errors
    /// When the device has no room, a decay is out of range, the tensors do not fit each other, or one shares its buffer.
    pub fn new(
        device: &Device,
        weights: &mut [&mut Tensor],
        gradients: &mut [&mut Tensor],
        options: &super::TrainOptions,
    ) -> Result<Self> {
        check(options)?;
        expect_pairs(device, weights, gradients)?;
        let _tag = MemoryTag::Optimizer.scope();
        let mut places = Vec::with_capacity(weights.len());
        let mut end = 0;
        for weight in weights.iter() {
            places.push((end, weight.elements()));
            end = (end + weight.elements()).next_multiple_of(ALIGNMENT);
        }
        let zeros = || Tensor::zeros(device, [end], DType::F32);
        let copy = || -> Result<Tensor> {
            let mut copy = zeros()?;
            for (weight, &(start, _)) in weights.iter().zip(&places) {
                copy.copy_elements_from(start, &cast(weight, DType::F32)?)?;
            }
            Ok(copy)
        };
        let on_gpu = matches!(device, Device::Cuda(_));
        Ok(AdamW {
            options: options.adamw,
            clip_norm: options.clip_norm,
            ema_decay: options.ema_decay,
            master: on_gpu.then(copy).transpose()?,
            first_moment: zeros()?,
            second_moment: zeros()?,
            average: options.ema_decay.map(|_| copy()).transpose()?,
            table: match device {
                Device::Cpu => None,
                Device::Cuda(cuda) => Some(Table::new(device, cuda, weights, gradients, &places)?),
            },
            places,
            steps: 0,
        })
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Sets the number of steps that the state was made by.
    pub(super) fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// The part of a state array that belongs to tensor `index`, flat; `None` for an array that is not kept.
    ///
    /// # Errors
    /// When there is no such tensor.
    pub fn state(&self, array: StateArray, index: usize) -> Result<Option<Tensor>> {
        let place = self.places.get(index);
        let &(start, count) = place.ok_or_else(|| Error::invalid(format!("adamw: there is no tensor {index}")))?;
        let array = self.array(array);
        array.map(|array| array.narrow(start, count)).transpose()
    }

    /// A whole state array, f32 and flat; `None` for one that is not kept.
    pub(super) fn array(&self, array: StateArray) -> Option<&Tensor> {
        match array {
            StateArray::Master => self.master.as_ref(),
            StateArray::FirstMoment => Some(&self.first_moment),
            StateArray::SecondMoment => Some(&self.second_moment),
            StateArray::Average => self.average.as_ref(),
        }
    }

    /// Where each tensor begins in the arrays, and its elements.
    pub(super) fn places(&self) -> &[(usize, usize)] {
        &self.places
    }

    /// Overwrites part of a state array: the values of tensor `index` from its element `first` on.
    pub(super) fn set_state(&mut self, array: StateArray, index: usize, first: usize, values: &[f32]) -> Result<()> {
        let start = self.places[index].0 + first;
        let array = match array {
            StateArray::Master => self.master.as_mut(),
            StateArray::FirstMoment => Some(&mut self.first_moment),
            StateArray::SecondMoment => Some(&mut self.second_moment),
            StateArray::Average => self.average.as_mut(),
        };
        match array {
            Some(array) => array.copy_elements_from_slice(start, values),
            None => Ok(()),
        }
    }

    /// One step of these weights, which are in the order and of the sizes that the state was made for, with the learning rate `rate`.
    /// Returns f32 `[2]` on the device: the norm of the gradients before clipping, and 1 where it is not finite and the step was
    /// skipped.
    ///
    /// # Errors
    /// When the learning rate is not a number, the tensors are others than the state was made for, or the device refuses the work.
    pub fn step(&mut self, weights: &mut [&mut Tensor], gradients: &mut [&mut Tensor], rate: f32) -> Result<Tensor> {
        if !rate.is_finite() || rate < 0.0 {
            return Err(Error::invalid(format!("a learning rate of {rate} makes no sense")));
        }
        let device = self.first_moment.device();
        expect_pairs(&device, weights, gradients)?;
        let sizes = weights.iter().map(|weight| weight.elements());
        if !sizes.eq(self.places.iter().map(|place| place.1)) {
            return Err(Error::invalid(
                "adamw: the weights are not of the number and sizes that the state was made for",
            ));
        }
        self.steps += 1;
        let AdamWOptions {
            beta1,
            beta2,
            weight_decay,
            ..
        } = self.options;
        let correction = |beta: f32| 1.0 - decimal(beta).powf(self.steps as f64);
        let scalars = Scalars {
            keep: (1.0 - decimal(rate) * decimal(weight_decay)) as f32,
            first: Decay::new(beta1),
            second: Decay::new(beta2),
            rate: (decimal(rate) / correction(beta1)) as f32,
            second_scale: (1.0 / correction(beta2).sqrt()) as f32,
            average: Decay::new(self.ema_decay.unwrap_or(0.0)),
        };
        match device {
            Device::Cpu => self.cpu_step(weights, gradients, &scalars),
            Device::Cuda(device) => {
                if let Some(table) = &mut self.table {
                    table.find(weights, gradients)?;
                }
                self.cuda_step(&device, &scalars)
            }
        }
    }

    fn cpu_step(
        &mut self,
        weights: &mut [&mut Tensor],
        gradients: &mut [&mut Tensor],
        scalars: &Scalars,
    ) -> Result<Tensor> {
        /// Elements that one task handles.
        const RUN: usize = 4096;
        let mut squares = 0.0;
        for gradient in gradients.iter() {
            let values = gradient.as_slice::<f32>()?;
            let sum = cpu_row_sums(0..values.len().div_ceil(RUN), 1, |run, sum| {
                let run = &values[run * RUN..values.len().min((run + 1) * RUN)];
                sum[0] += run.iter().map(|value| value * value).sum::<f32>();
            });
            squares += f64::from(sum[0]);
        }
        let norm = squares.sqrt() as f32;
        let factor = match self.clip_norm {
            Some(largest) => (largest / (norm + CLIP_EPSILON)).min(1.0),
            None => 1.0,
        };
        let skip = !norm.is_finite();
        let epsilon = self.options.epsilon;
        let tensors = weights.iter_mut().zip(gradients.iter_mut()).zip(&self.places);
        for ((weight, gradient), &(start, count)) in tensors {
            let gradient = gradient.as_mut_slice::<f32>()?;
            if !skip {
                let range = start..start + count;
                let moments = self.first_moment.as_mut_slice::<f32>()?[range.clone()]
                    .par_iter_mut()
                    .zip(&mut self.second_moment.as_mut_slice::<f32>()?[range.clone()]);
                let weights = weight.as_mut_slice::<f32>()?.par_iter_mut().zip(&*gradient);
                weights.zip(moments).for_each(|((weight, gradient), (first, second))| {
                    let gradient = gradient * factor;
                    *weight *= scalars.keep;
                    *first = scalars.first.mix(*first, gradient);
                    *second = scalars.second.mix(*second, gradient * gradient);
                    *weight -= scalars.rate * *first / (second.sqrt() * scalars.second_scale + epsilon);
                });
                if let Some(average) = &mut self.average {
                    let average = average.as_mut_slice::<f32>()?[range].par_iter_mut();
                    average
                        .zip(weight.as_slice::<f32>()?)
                        .for_each(|(average, weight)| *average = scalars.average.mix(*average, *weight));
                }
            }
            gradient.fill(0.0);
        }
        Tensor::from_slice(&Device::Cpu, &[norm, f32::from(u8::from(skip))], [2])
    }

    fn cuda_step(&mut self, device: &Arc<CudaDevice>, scalars: &Scalars) -> Result<Tensor> {
        let (Some(table), Some(master)) = (&self.table, &mut self.master) else {
            return Err(Error::invalid("the optimizer was made for the CPU"));
        };
        let owner = Device::Cuda(device.clone());
        let chunks = crate::ops::grid("adamw", table.chunks)?;
        let mut partial = Tensor::empty(&owner, [table.chunks], DType::F32)?;
        let args = Args::new()
            .input(&table.segments)?
            .input(&table.segment_of_chunk)?
            .output(&mut partial)?;
        let kernel = device.kernel("adamw", "gradient_squares")?;
        // SAFETY: the arguments are those of `gradient_squares`; the table says where this step's tensors are, which are of the sizes
        // in it (both checked by `step`); one block per chunk.
        unsafe { kernel.launch(device, [chunks, 1, 1], args)? };
        let mut control = Tensor::empty(&owner, [3], DType::F32)?;
        let args = Args::new()
            .input(&partial)?
            .output(&mut control)?
            .int(table.chunks)
            .float(self.clip_norm.unwrap_or(f32::INFINITY));
        let kernel = device.kernel("adamw", "gradient_norm")?;
        // SAFETY: the arguments are those of `gradient_norm`; one block.
        unsafe { kernel.launch(device, [1, 1, 1], args)? };
        let args = Args::new()
            .input(&table.segments)?
            .input(&table.segment_of_chunk)?
            .input(&control)?
            .output(master)?
            .output(&mut self.first_moment)?
            .output(&mut self.second_moment)?
            .optional_output(self.average.as_mut())?
            .float(scalars.keep)
            .float(scalars.first.keep)
            .float(scalars.first.take)
            .float(scalars.second.keep)
            .float(scalars.second.take)
            .float(scalars.rate)
            .float(scalars.second_scale)
            .float(self.options.epsilon)
            .float(scalars.average.keep)
            .float(scalars.average.take);
        let kernel = device.kernel("adamw", "adamw_step")?;
        // SAFETY: the arguments are those of `adamw_step`; the state holds every segment at its offset, and the weights and
        // gradients of the table are this step's, which nobody shares.
        unsafe { kernel.launch(device, [chunks, 1, 1], args)? };
        control.narrow(0, 2)
    }
}

/// The scalars of a step's formulas.
struct Scalars {
    /// Of the weight, after weight decay.
    keep: f32,
    first: Decay,
    second: Decay,
    /// lr / (1 − β₁ᵗ)
    rate: f32,
    /// 1 / √(1 − β₂ᵗ)
    second_scale: f32,
    average: Decay,
}

/// A running mean's decay d, and 1 − d.
struct Decay {
    keep: f32,
    take: f32,
}

impl Decay {
    fn new(decay: f32) -> Self {
        Decay {
            keep: decay,
            take: (1.0 - decimal(decay)) as f32,
        }
    }

    fn mix(&self, mean: f32, value: f32) -> f32 {
        self.keep * mean + self.take * value
    }
}

/// The shortest decimal that has `value` as its nearest f32, to the precision of f64: what the setting was written as.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

impl Table {
    fn new(
        device: &Device,
        cuda: &Arc<CudaDevice>,
        weights: &mut [&mut Tensor],
        gradients: &mut [&mut Tensor],
        places: &[(usize, usize)],
    ) -> Result<Self> {
        let chunk = cuda.kernel("adamw", "adamw_step")?.info().tile[0] as usize;
        let mut known = Vec::with_capacity(places.len());
        let mut segment_of_chunk = Vec::new();
        for (index, &(offset, elements)) in places.iter().enumerate() {
            known.push(Segment {
                weight: 0,
                gradient: 0,
                offset: offset as u64,
                elements: elements as u64,
                first_chunk: segment_of_chunk.len() as u64,
            });
            segment_of_chunk.extend(std::iter::repeat_n(index as i32, elements.div_ceil(chunk)));
        }
        let bytes: &[u8] = bytemuck::cast_slice(&known);
        let mut table = Table {
            segments: Tensor::from_slice(device, bytes, [bytes.len()])?,
            chunks: segment_of_chunk.len(),
            segment_of_chunk: Tensor::from_slice(device, &segment_of_chunk, [segment_of_chunk.len()])?,
            known,
        };
        table.find(weights, gradients)?;
        Ok(table)
    }

    /// Notes where the tensors of a step are; they are of the sizes in the table.
    fn find(&mut self, weights: &mut [&mut Tensor], gradients: &mut [&mut Tensor]) -> Result<()> {
        let mut found = self.known.clone();
        let tensors = weights.iter_mut().zip(gradients.iter_mut());
        for (segment, (weight, gradient)) in found.iter_mut().zip(tensors) {
            segment.weight = weight.device_ptr_mut()?;
            segment.gradient = gradient.device_ptr_mut()?;
        }
        if found != self.known {
            self.segments.copy_from_slice::<u8>(bytemuck::cast_slice(&found))?;
            self.known = found;
        }
        Ok(())
    }
}

/// Checks that every weight has a gradient of its shape, both in the compute type of `device` and on it.
fn expect_pairs(device: &Device, weights: &[&mut Tensor], gradients: &[&mut Tensor]) -> Result<()> {
    if weights.len() != gradients.len() {
        return Err(Error::invalid(format!(
            "adamw: {} weights have {} gradients",
            weights.len(),
            gradients.len()
        )));
    }
    for (weight, gradient) in weights.iter().zip(gradients) {
        gradient.expect_shape("adamw", "gradient", weight.shape())?;
        for tensor in [&**weight, &**gradient] {
            tensor.expect_dtype("adamw", "weight or gradient", device.compute_dtype())?;
            tensor.expect_device("adamw", "weight or gradient", device)?;
        }
    }
    Ok(())
}

fn check(options: &super::TrainOptions) -> Result<()> {
    let AdamWOptions {
        beta1,
        beta2,
        epsilon,
        weight_decay,
    } = options.adamw;
    let decays = [
        ("beta1", Some(beta1)),
        ("beta2", Some(beta2)),
        ("ema_decay", options.ema_decay),
    ];
    for (name, decay) in decays {
        if decay.is_some_and(|decay| !(0.0..1.0).contains(&decay)) {
            return Err(Error::invalid(format!("{name} must be at least 0 and less than 1")));
        }
    }
    let amounts = [
        ("epsilon", Some(epsilon)),
        ("weight_decay", Some(weight_decay)),
        ("clip_norm", options.clip_norm),
    ];
    for (name, amount) in amounts {
        if amount.is_some_and(|amount| !amount.is_finite() || amount < 0.0) {
            return Err(Error::invalid(format!("{name} must be a number that is not negative")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decays_are_the_decimals_that_they_were_written_as() {
        for (value, expected) in [
            (0.999f32, 0.999),
            (0.9, 0.9),
            (5e-5, 5e-5),
            (0.9999, 0.9999),
            (0.0, 0.0),
            (1e-8, 1e-8),
        ] {
            assert_eq!(decimal(value), expected);
        }
        assert_eq!(Decay::new(0.999).take, 1e-3);
        assert_ne!(1.0 - 0.999f32, 1e-3);
    }
}
