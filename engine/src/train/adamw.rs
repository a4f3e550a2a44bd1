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
//! gradients are zero afterwards, as after every step. Where gradients are sums over ranks ([`AdamW::begin_sums`]), a state may be kept of
//! some elements of the tensors alone ([`Place`]), N comes of the squares that all ranks bring, and weights may be changed part by part. On
//! CUDA w is a master copy in f32, which the bf16 weight follows, and all decisions are taken on the device; on the CPU w is the weight
//! itself. Sums have a fixed order. A decay stands for the decimal
//! that it was written as: 1 − 0.999 is 0.001, where the f32 nearest to 0.999 would leave 1.3e-5 less of it. Sources: Loshchilov and
//! Hutter, "Decoupled Weight Decay Regularization" (2019); formulas as in PyTorch's `AdamW` and `clip_grad_norm_`.

mod table;
mod update;

use std::ops::Range;

use super::AdamWOptions;
use crate::device::{Device, MemoryTag};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::cast::cast;
use crate::tensor::Tensor;
use table::Table;
use update::Source;
pub use update::Update;

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
        if !places.is_sorted_by_key(|place| place.offset) {
            return Err(Error::invalid("adamw: places must be in the order of the state"));
        }
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
        let mut gradients = Source::Slots(gradients);
        let update = self.begin(weights, &mut gradients, None, rate)?;
        self.change(&update, self.all(), weights, &mut gradients)?;
        Ok(update.values().clone())
    }

    /// Begins a step by gradients that were summed over ranks: `sums` (f32) holds the gradient of every element of the state at its place,
    /// and `squares` (f32 `[ranks]`) what each rank adds to the square of the norm. Nothing changes before [`AdamW::change_by_sums`].
    ///
    /// # Errors
    /// As for [`AdamW::step`].
    pub fn begin_sums(
        &mut self,
        weights: &mut [&mut Tensor],
        sums: &Tensor,
        squares: &Tensor,
        rate: f32,
    ) -> Result<Update> {
        sums.ensure_shape("adamw", "sums", self.first_moment.shape())?;
        squares.ensure_rank("adamw", "squares", 1, "[ranks]")?;
        for tensor in [sums, squares] {
            tensor.ensure_dtype("adamw", "sums or squares", DType::F32)?;
            tensor.ensure_device("adamw", "sums or squares", &self.first_moment.device())?;
        }
        ensure_weights(&self.first_moment.device(), weights)?;
        self.begin(weights, &mut Source::Sums(sums), Some(squares), rate)
    }

    /// Changes the weights whose state begins in `state` of the arrays, by the sums with which the step was begun, so that they can be sent
    /// while others are changed. Of weights that have no state here nothing changes.
    ///
    /// # Errors
    /// When the device refuses the work.
    pub fn change_by_sums(
        &mut self,
        update: &Update,
        state: Range<usize>,
        weights: &mut [&mut Tensor],
        sums: &Tensor,
    ) -> Result<()> {
        self.change(update, state, weights, &mut Source::Sums(sums))
    }

    /// All elements of the arrays.
    pub fn all(&self) -> Range<usize> {
        0..self.first_moment.elements()
    }
}

/// Elements of a tensor, as a view.
fn flat_part(tensor: &Tensor, elements: &Range<usize>) -> Result<Tensor> {
    tensor
        .reshape([tensor.elements()])?
        .narrow(elements.start, elements.len())
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
