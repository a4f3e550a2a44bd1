//! A step: what of it is the same for all elements, and the change of those of a part of the state.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::{AdamW, AdamWOptions};
use crate::device::{Args, CudaDevice, Device};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::sum_rows::cpu_row_sums;
use crate::tensor::Tensor;

/// Added to a norm before it is divided by, when gradients are clipped.
const CLIP_EPSILON: f32 = 1e-6;

/// Where the gradients of a step are.
pub(super) enum Source<'a, 'b> {
    /// A tensor of the compute type for each weight; set to zero.
    Slots(&'a mut [&'b mut Tensor]),
    /// f32, the gradient of every element of the state at its place.
    Sums(&'a Tensor),
}

/// A step that has begun: the norm is known, and parts of the weights may be changed already.
pub struct Update {
    scalars: Scalars,
    clipping: Clipping,
    /// f32 `[2]`
    values: Tensor,
}

/// What gradients are multiplied by, and whether the step is skipped.
enum Clipping {
    Cpu {
        factor: f32,
        skip: bool,
    },
    /// f32 `[3]`: the norm, 1 where the step is skipped, and the factor.
    Cuda(Tensor),
}

impl Update {
    /// f32 `[2]` on the device: the norm of the gradients before clipping, and 1 where it is not finite and the step is skipped.
    pub fn values(&self) -> &Tensor {
        &self.values
    }
}

impl AdamW {
    /// Begins a step of these weights with the learning rate `rate`.
    pub(super) fn begin(
        &mut self,
        weights: &mut [&mut Tensor],
        gradients: &mut Source<'_, '_>,
        squares: Option<&Tensor>,
        rate: f32,
    ) -> Result<Update> {
        if !rate.is_finite() || rate < 0.0 {
            return Err(Error::invalid(format!("a learning rate of {rate} makes no sense")));
        }
        if !weights
            .iter()
            .map(|weight| weight.elements())
            .eq(self.sizes.iter().copied())
        {
            return Err(Error::invalid(
                "adamw: the weights are not of the number and sizes that the state was made for",
            ));
        }
        self.steps += 1;
        let scalars = self.scalars(rate);
        match self.first_moment.device() {
            Device::Cpu => {
                let squares: f64 = match (squares, &*gradients) {
                    (Some(squares), _) => squares.as_slice::<f32>()?.iter().copied().map(f64::from).sum(),
                    (None, Source::Slots(gradients)) => cpu_squares(gradients)?,
                    (None, Source::Sums(_)) => return Err(Error::invalid("adamw: sums without their squares")),
                };
                let norm = squares.sqrt() as f32;
                let factor = match self.clip_norm {
                    Some(largest) => (largest / (norm + CLIP_EPSILON)).min(1.0),
                    None => 1.0,
                };
                let skip = !norm.is_finite();
                Ok(Update {
                    scalars,
                    clipping: Clipping::Cpu { factor, skip },
                    values: Tensor::from_slice(&Device::Cpu, &[norm, f32::from(u8::from(skip))], [2])?,
                })
            }
            Device::Cuda(device) => {
                if let Some(table) = &mut self.table {
                    table.find(&self.places, weights, gradients)?;
                }
                let control = self.cuda_norm(&device, squares)?;
                Ok(Update {
                    scalars,
                    values: control.narrow(0, 2)?,
                    clipping: Clipping::Cuda(control),
                })
            }
        }
    }

    /// Changes the weights whose state lies in this part of the arrays, by the gradients with which the step was begun.
    pub(super) fn change(
        &mut self,
        update: &Update,
        state: Range<usize>,
        weights: &mut [&mut Tensor],
        gradients: &mut Source<'_, '_>,
    ) -> Result<()> {
        let first = self.places.partition_point(|place| place.offset < state.start);
        let end = self.places.partition_point(|place| place.offset < state.end);
        match (&update.clipping, self.first_moment.device()) {
            (&Clipping::Cpu { factor, skip }, _) => {
                self.cpu_change(&update.scalars, (factor, skip), first..end, weights, gradients)
            }
            (Clipping::Cuda(control), Device::Cuda(device)) => {
                let sums = matches!(gradients, Source::Sums(_));
                self.cuda_change(&device, &update.scalars, control, first..end, sums)
            }
            (Clipping::Cuda(_), Device::Cpu) => Err(Error::invalid("the step was begun on another device")),
        }
    }

    fn scalars(&self, rate: f32) -> Scalars {
        let AdamWOptions {
            beta1,
            beta2,
            weight_decay,
            ..
        } = self.options;
        let correction = |beta: f32| 1.0 - decimal(beta).powf(self.steps as f64);
        Scalars {
            keep: (1.0 - decimal(rate) * decimal(weight_decay)) as f32,
            first: Decay::new(beta1),
            second: Decay::new(beta2),
            rate: (decimal(rate) / correction(beta1)) as f32,
            second_scale: (1.0 / correction(beta2).sqrt()) as f32,
            average: Decay::new(self.ema_decay.unwrap_or(0.0)),
        }
    }

    fn cpu_change(
        &mut self,
        scalars: &Scalars,
        (factor, skip): (f32, bool),
        places: Range<usize>,
        weights: &mut [&mut Tensor],
        gradients: &mut Source<'_, '_>,
    ) -> Result<()> {
        let epsilon = self.options.epsilon;
        for place in &self.places[places] {
            let range = place.in_state();
            if !skip {
                let gradient = match &*gradients {
                    Source::Slots(gradients) => &gradients[place.tensor].as_slice::<f32>()?[place.elements.clone()],
                    Source::Sums(sums) => &sums.as_slice::<f32>()?[range.clone()],
                };
                let weight = &mut weights[place.tensor].as_mut_slice::<f32>()?[place.elements.clone()];
                let moments = self.first_moment.as_mut_slice::<f32>()?[range.clone()]
                    .par_iter_mut()
                    .zip(&mut self.second_moment.as_mut_slice::<f32>()?[range.clone()]);
                let weights = weight.par_iter_mut().zip(gradient);
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
                        .zip(&*weight)
                        .for_each(|(average, weight)| *average = scalars.average.mix(*average, *weight));
                }
            }
            if let Source::Slots(gradients) = gradients {
                gradients[place.tensor].as_mut_slice::<f32>()?[place.elements.clone()].fill(0.0);
            }
        }
        Ok(())
    }

    /// f32 `[3]`: the norm of all gradients, 1 where it is not finite, and what gradients are multiplied by.
    fn cuda_norm(&self, device: &Arc<CudaDevice>, squares: Option<&Tensor>) -> Result<Tensor> {
        let table = self.table.as_ref().ok_or_else(made_for_the_cpu)?;
        let owner = Device::Cuda(device.clone());
        let partial = match squares {
            Some(squares) => squares.clone(),
            None => {
                let mut partial = Tensor::empty(&owner, [table.chunks], DType::F32)?;
                let args = Args::new()
                    .input(&table.segments)?
                    .input(&table.segment_of_chunk)?
                    .output(&mut partial)?;
                let chunks = crate::ops::grid("adamw", table.chunks)?;
                let kernel = device.kernel("adamw", "gradient_squares")?;
                // SAFETY: the arguments are those of `gradient_squares`; the table says where this step's tensors are, which are of the
                // sizes in it (both checked by `begin`); one block per chunk.
                unsafe { kernel.launch(device, [chunks, 1, 1], args)? };
                partial
            }
        };
        let mut control = Tensor::empty(&owner, [3], DType::F32)?;
        let args = Args::new()
            .input(&partial)?
            .output(&mut control)?
            .int(partial.elements())
            .float(self.clip_norm.unwrap_or(f32::INFINITY));
        let kernel = device.kernel("adamw", "gradient_norm")?;
        // SAFETY: the arguments are those of `gradient_norm`; one block.
        unsafe { kernel.launch(device, [1, 1, 1], args)? };
        Ok(control)
    }

    fn cuda_change(
        &mut self,
        device: &Arc<CudaDevice>,
        scalars: &Scalars,
        control: &Tensor,
        places: Range<usize>,
        sums: bool,
    ) -> Result<()> {
        let (Some(table), Some(master)) = (&self.table, &mut self.master) else {
            return Err(made_for_the_cpu());
        };
        let chunks = table.chunks_of(&places);
        if chunks.is_empty() {
            return Ok(());
        }
        let args = Args::new()
            .input(&table.segments)?
            .input(&table.segment_of_chunk)?
            .int(chunks.start)
            .input(control)?
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
        let kernel = device.kernel("adamw", if sums { "adamw_step_sums" } else { "adamw_step" })?;
        let grid = crate::ops::grid("adamw", chunks.len())?;
        // SAFETY: the arguments are those of both kernels; the state holds every segment at its offset, and the weights and gradients
        // of the table are this step's, which nobody shares, of the type that the kernel takes (`find`); the chunks are the table's.
        unsafe { kernel.launch(device, [grid, 1, 1], args) }
    }
}

fn made_for_the_cpu() -> Error {
    Error::invalid("the optimizer was made for the CPU")
}

/// The sum of the squares of all gradients.
fn cpu_squares(gradients: &[&mut Tensor]) -> Result<f64> {
    /// Elements that one task handles.
    const RUN: usize = 4096;
    let mut squares = 0.0;
    for gradient in gradients {
        let values = gradient.as_slice::<f32>()?;
        let sum = cpu_row_sums(0..values.len().div_ceil(RUN), 1, |run, sum| {
            let run = &values[run * RUN..values.len().min((run + 1) * RUN)];
            sum[0] += run.iter().map(|value| value * value).sum::<f32>();
        });
        squares += f64::from(sum[0]);
    }
    Ok(squares)
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
