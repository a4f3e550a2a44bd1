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
//! gradients are zero afterwards, as after every step. Where gradients are sums over ranks ([`AdamW::step_sums`]), a state may be kept of
//! some elements of the tensors alone ([`Place`]), and N comes of the squares that all ranks bring. On CUDA w is a master copy in f32, which the bf16 weight follows, and all
//! decisions are taken on the device; on the CPU w is the weight itself. Sums have a fixed order. A decay stands for the decimal
//! that it was written as: 1 − 0.999 is 0.001, where the f32 nearest to 0.999 would leave 1.3e-5 less of it. Sources: Loshchilov and
//! Hutter, "Decoupled Weight Decay Regularization" (2019); formulas as in PyTorch's `AdamW` and `clip_grad_norm_`.

use std::ops::Range;
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

/// Elements of a tensor, and where their state lies in the arrays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The tensor's number in the list.
    pub tensor: usize,
    /// Which of its elements.
    pub elements: Range<usize>,
    /// Where the first of them lies.
    pub offset: usize,
}

impl Place {
    /// That of tensor `tensor`, if it has one.
    pub(super) fn of(places: &[Place], tensor: usize) -> Option<&Place> {
        match places.get(tensor) {
            Some(place) if place.tensor == tensor => Some(place),
            _ => places.iter().find(|place| place.tensor == tensor),
        }
    }

    /// Where the elements lie in the arrays.
    pub fn in_state(&self) -> Range<usize> {
        self.offset..self.offset + self.elements.len()
    }
}

/// The state of AdamW for a list of tensors or parts of them, in arrays in which these lie one behind the other.
pub struct AdamW {
    options: AdamWOptions,
    clip_norm: Option<f32>,
    ema_decay: Option<f32>,
    /// The elements of each tensor.
    sizes: Vec<usize>,
    /// What of them has its state here; a tensor has one place at most.
    places: Vec<Place>,
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
    /// One [`Segment`] per place: where it was when it was stepped last.
    known: Vec<Segment>,
    /// The same on the device.
    segments: Tensor,
    /// i32, the segment of each chunk.
    segment_of_chunk: Tensor,
    chunks: usize,
}

/// Where the gradients of a step are.
enum Source<'a, 'b> {
    /// A tensor of the compute type for each weight; set to zero.
    Slots(&'a mut [&'b mut Tensor]),
    /// f32, the gradient of every element of the state at its place.
    Sums(&'a Tensor),
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

impl StateArray {
    /// All of them.
    pub(super) const ALL: [StateArray; 4] = [
        StateArray::Master,
        StateArray::FirstMoment,
        StateArray::SecondMoment,
        StateArray::Average,
    ];
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
        ensure_pairs(device, weights, gradients)?;
        let mut places = Vec::with_capacity(weights.len());
        let mut end = 0;
        for (tensor, weight) in weights.iter().enumerate() {
            places.push(Place {
                tensor,
                elements: 0..weight.elements(),
                offset: end,
            });
            end = (end + weight.elements()).next_multiple_of(ALIGNMENT);
        }
        let mut optimizer = Self::of_places(device, weights, places, end, options)?;
        if let Some(table) = &mut optimizer.table {
            table.find(&optimizer.places, weights, &mut Source::Slots(gradients))?;
        }
        Ok(optimizer)
    }

    /// The state, in arrays of `elements` elements, of what `places` say of these weights, before the first step.
    ///
    /// # Errors
    /// When a place reaches past its tensor's or the arrays' end, or is not aligned for kernels; and as for [`AdamW::new`].
    pub fn of_places(
        device: &Device,
        weights: &[&mut Tensor],
        places: Vec<Place>,
        elements: usize,
        options: &super::TrainOptions,
    ) -> Result<Self> {
        check(options)?;
        for place in &places {
            let within = weights
                .get(place.tensor)
                .is_some_and(|weight| place.elements.end <= weight.elements());
            let aligned = (place.elements.start | place.offset).is_multiple_of(ALIGNMENT);
            if !within || !aligned || place.in_state().end > elements {
                return Err(Error::invalid(format!("adamw: there is no {place:?}")));
            }
        }
        let _tag = MemoryTag::Optimizer.scope();
        let zeros = || Tensor::zeros(device, [elements], DType::F32);
        let copy = || -> Result<Tensor> {
            let mut copy = zeros()?;
            for place in &places {
                let weight = flat_part(weights[place.tensor], &place.elements)?;
                copy.copy_elements_from(place.offset, &cast(&weight, DType::F32)?)?;
            }
            Ok(copy)
        };
        let on_gpu = matches!(device, Device::Cuda(_));
        Ok(AdamW {
            options: options.adamw,
            clip_norm: options.clip_norm,
            ema_decay: options.ema_decay,
            sizes: weights.iter().map(|weight| weight.elements()).collect(),
            master: on_gpu.then(copy).transpose()?,
            first_moment: zeros()?,
            second_moment: zeros()?,
            average: options.ema_decay.map(|_| copy()).transpose()?,
            table: match device {
                Device::Cpu => None,
                Device::Cuda(cuda) => Some(Table::new(device, cuda, &places)?),
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

    /// What has its state here.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// What of tensor `index` has its state here.
    pub(super) fn place(&self, index: usize) -> Option<&Place> {
        Place::of(&self.places, index)
    }

    /// A whole array of the state; `None` for one that is not kept.
    pub(super) fn array(&self, array: StateArray) -> Option<&Tensor> {
        match array {
            StateArray::Master => self.master.as_ref(),
            StateArray::FirstMoment => Some(&self.first_moment),
            StateArray::SecondMoment => Some(&self.second_moment),
            StateArray::Average => self.average.as_ref(),
        }
    }

    /// What a state array holds of tensor `index`, flat: the elements of its [`Place`]. `None` for an array that is not kept.
    ///
    /// # Errors
    /// When nothing of that tensor has its state here.
    pub fn state(&self, array: StateArray, index: usize) -> Result<Option<Tensor>> {
        let place = self.place(index);
        let place = place.ok_or_else(|| Error::invalid(format!("adamw: there is no tensor {index}")))?;
        let (start, count) = (place.offset, place.elements.len());
        self.array(array).map(|array| array.narrow(start, count)).transpose()
    }

    /// Overwrites part of a state array: the values of tensor `index` from its element `first` on, as far as their state is here.
    pub(super) fn set_state(&mut self, array: StateArray, index: usize, first: usize, values: &[f32]) -> Result<()> {
        let Some(place) = self.place(index).cloned() else {
            return Ok(());
        };
        let (start, end) = (
            first.max(place.elements.start),
            (first + values.len()).min(place.elements.end),
        );
        let array = match array {
            StateArray::Master => self.master.as_mut(),
            StateArray::FirstMoment => Some(&mut self.first_moment),
            StateArray::SecondMoment => Some(&mut self.second_moment),
            StateArray::Average => self.average.as_mut(),
        };
        match array {
            Some(array) if start < end => {
                let offset = place.offset + start - place.elements.start;
                array.copy_elements_from_slice(offset, &values[start - first..end - first])
            }
            _ => Ok(()),
        }
    }

    /// One step of these weights, which are in the order and of the sizes that the state was made for, with the learning rate `rate`.
    /// Returns f32 `[2]` on the device: the norm of the gradients before clipping, and 1 where it is not finite and the step was
    /// skipped.
    ///
    /// # Errors
    /// When the learning rate is not a number, the tensors are others than the state was made for, or the device refuses the work.
    pub fn step(&mut self, weights: &mut [&mut Tensor], gradients: &mut [&mut Tensor], rate: f32) -> Result<Tensor> {
        ensure_pairs(&self.first_moment.device(), weights, gradients)?;
        self.step_from(weights, Source::Slots(gradients), None, rate)
    }

    /// As [`AdamW::step`], for gradients that were summed over ranks: `sums` (f32) holds the gradient of every element of the state at
    /// its place, and `squares` (f32 `[ranks]`) what each rank adds to the square of the norm. Of weights that have no state here nothing
    /// changes.
    ///
    /// # Errors
    /// As for [`AdamW::step`].
    pub fn step_sums(
        &mut self,
        weights: &mut [&mut Tensor],
        sums: &Tensor,
        squares: &Tensor,
        rate: f32,
    ) -> Result<Tensor> {
        sums.ensure_shape("adamw", "sums", self.first_moment.shape())?;
        squares.ensure_rank("adamw", "squares", 1, "[ranks]")?;
        for tensor in [sums, squares] {
            tensor.ensure_dtype("adamw", "sums or squares", DType::F32)?;
            tensor.ensure_device("adamw", "sums or squares", &self.first_moment.device())?;
        }
        ensure_weights(&self.first_moment.device(), weights)?;
        self.step_from(weights, Source::Sums(sums), Some(squares), rate)
    }

    fn step_from(
        &mut self,
        weights: &mut [&mut Tensor],
        mut gradients: Source<'_, '_>,
        squares: Option<&Tensor>,
        rate: f32,
    ) -> Result<Tensor> {
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
        match self.first_moment.device() {
            Device::Cpu => self.cpu_step(weights, gradients, squares, &scalars),
            Device::Cuda(device) => {
                if let Some(table) = &mut self.table {
                    table.find(&self.places, weights, &mut gradients)?;
                }
                self.cuda_step(&device, squares, &scalars)
            }
        }
    }

    fn cpu_step(
        &mut self,
        weights: &mut [&mut Tensor],
        mut gradients: Source<'_, '_>,
        squares: Option<&Tensor>,
        scalars: &Scalars,
    ) -> Result<Tensor> {
        let squares: f64 = match (squares, &gradients) {
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
        let epsilon = self.options.epsilon;
        for place in self.places.iter().filter(|_| !skip) {
            let range = place.in_state();
            let gradient = match &gradients {
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
        if let Source::Slots(gradients) = &mut gradients {
            for gradient in gradients.iter_mut() {
                gradient.as_mut_slice::<f32>()?.fill(0.0);
            }
        }
        Tensor::from_slice(&Device::Cpu, &[norm, f32::from(u8::from(skip))], [2])
    }

    fn cuda_step(&mut self, device: &Arc<CudaDevice>, squares: Option<&Tensor>, scalars: &Scalars) -> Result<Tensor> {
        let (Some(table), Some(master)) = (&self.table, &mut self.master) else {
            return Err(Error::invalid("the optimizer was made for the CPU"));
        };
        let owner = Device::Cuda(device.clone());
        let chunks = crate::ops::grid("adamw", table.chunks)?;
        let partial = match squares {
            Some(squares) => squares.clone(),
            None => {
                let mut partial = Tensor::empty(&owner, [table.chunks], DType::F32)?;
                let args = Args::new()
                    .input(&table.segments)?
                    .input(&table.segment_of_chunk)?
                    .output(&mut partial)?;
                let kernel = device.kernel("adamw", "gradient_squares")?;
                // SAFETY: the arguments are those of `gradient_squares`; the table says where this step's tensors are, which are of the
                // sizes in it (both checked by `step`); one block per chunk.
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
        if table.chunks == 0 {
            return control.narrow(0, 2);
        }
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
        let kernel = device.kernel(
            "adamw",
            if squares.is_some() {
                "adamw_step_sums"
            } else {
                "adamw_step"
            },
        )?;
        // SAFETY: the arguments are those of both kernels; the state holds every segment at its offset, and the weights and gradients
        // of the table are this step's, which nobody shares, of the type that the kernel takes (`find`).
        unsafe { kernel.launch(device, [chunks, 1, 1], args)? };
        control.narrow(0, 2)
    }
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

/// Elements of a tensor, as a view.
fn flat_part(tensor: &Tensor, elements: &Range<usize>) -> Result<Tensor> {
    tensor
        .reshape([tensor.elements()])?
        .narrow(elements.start, elements.len())
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
    fn new(device: &Device, cuda: &Arc<CudaDevice>, places: &[Place]) -> Result<Self> {
        let chunk = cuda.kernel("adamw", "adamw_step")?.info().tile[0] as usize;
        let mut known = Vec::with_capacity(places.len());
        let mut segment_of_chunk = Vec::new();
        for (index, place) in places.iter().enumerate() {
            let elements = place.elements.len();
            known.push(Segment {
                weight: 0,
                gradient: 0,
                offset: place.offset as u64,
                elements: elements as u64,
                first_chunk: segment_of_chunk.len() as u64,
            });
            segment_of_chunk.extend(std::iter::repeat_n(index as i32, elements.div_ceil(chunk)));
        }
        let bytes: &[u8] = bytemuck::cast_slice(&known);
        Ok(Table {
            segments: Tensor::from_slice(device, bytes, [bytes.len()])?,
            chunks: segment_of_chunk.len(),
            segment_of_chunk: Tensor::from_slice(device, &segment_of_chunk, [segment_of_chunk.len()])?,
            known,
        })
    }

    /// Notes where the tensors of a step are; they are of the sizes in the table.
    fn find(&mut self, places: &[Place], weights: &mut [&mut Tensor], gradients: &mut Source<'_, '_>) -> Result<()> {
        let mut found = self.known.clone();
        for (segment, place) in found.iter_mut().zip(places) {
            let weight = &mut weights[place.tensor];
            segment.weight = weight.device_ptr_mut()? + (place.elements.start * weight.dtype().size()) as u64;
            segment.gradient = match gradients {
                Source::Slots(gradients) => {
                    let gradient = &mut gradients[place.tensor];
                    gradient.device_ptr_mut()? + (place.elements.start * gradient.dtype().size()) as u64
                }
                Source::Sums(sums) => sums.device_ptr()? + (place.offset * sums.dtype().size()) as u64,
            };
        }
        if found != self.known {
            self.segments.copy_from_slice::<u8>(bytemuck::cast_slice(&found))?;
            self.known = found;
        }
        Ok(())
    }
}

/// Checks that every weight has a gradient of its shape, both in the compute type of `device` and on it.
fn ensure_pairs(device: &Device, weights: &[&mut Tensor], gradients: &[&mut Tensor]) -> Result<()> {
    if weights.len() != gradients.len() {
        return Err(Error::invalid(format!(
            "adamw: {} weights have {} gradients",
            weights.len(),
            gradients.len()
        )));
    }
    for (weight, gradient) in weights.iter().zip(gradients) {
        gradient.ensure_shape("adamw", "gradient", weight.shape())?;
    }
    ensure_weights(device, weights)?;
    ensure_weights(device, gradients)
}

/// Checks that weights or gradients are in the compute type of `device` and on it.
fn ensure_weights(device: &Device, tensors: &[&mut Tensor]) -> Result<()> {
    for tensor in tensors {
        tensor.ensure_dtype("adamw", "weight or gradient", device.compute_dtype())?;
        tensor.ensure_device("adamw", "weight or gradient", device)?;
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
