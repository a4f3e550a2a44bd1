//! A model with what training adds to it.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use super::adamw::{AdamW, Place, StateArray};
use super::copying::Copying;
use super::exchange::{Exchange, Ranks, take_part};
use super::read_ahead::read_ahead;
use super::source::{STATE, StatePart, StateSlice, StateSource, StateTensor, TrainedTensor};
use super::{Policy, Recompute, TrainOptions};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::layers::{NamedParameter, ParamSource, Slot};
use crate::model::denoiser::{Noisy, TrainingChoice};
use crate::model::objective::{Discrete, Objective};
use crate::model::{Denoiser, Precision, Spec, Trainable};
use crate::ops::cast::cast;
use crate::ops::finite::count_not_finite;
use crate::ops::flow_loss::{flow_loss, noisy_image};
use crate::tensor::Tensor;

/// Reads a named array of a checkpoint's state of the given shape, on another thread than the one that takes it up.
pub type ReadState<'a> = dyn FnMut(&str, &[usize]) -> Result<Vec<f32>> + Send + 'a;

/// Reads elements of a named array of a checkpoint's state.
pub type ReadSlice<'a> = dyn FnMut(&str, Range<usize>) -> Result<Vec<f32>> + 'a;

/// One micro-batch.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Pictures in [−1, 1], or normalised latents: f32 `[batch, height, width, channels]` on the model's device.
    pub images: &'a Tensor,
    /// Standard normal noise, f32, of the same shape.
    pub noise: &'a Tensor,
    /// The noise level of each item, 0 (image) to 1 (noise).
    pub sigmas: &'a [f32],
    /// The caption features of each item, `[1, tokens, width]` in the device's compute type, real tokens only.
    pub captions: &'a [&'a Tensor],
}

impl Batch<'_> {
    /// The noisy images, and the model's times.
    fn noisy(&self, objective: &dyn Objective) -> Result<(Tensor, Vec<f32>)> {
        if let Some(sigma) = self.sigmas.iter().find(|sigma| !(0.0..=1.0).contains(*sigma)) {
            return Err(Error::invalid(format!(
                "a noise level of {sigma} is not between 0 and 1"
            )));
        }
        let noisy = noisy_image(self.images, self.noise, &self.per_item(|sigma| objective.mix(sigma))?)?;
        Ok((noisy, self.sigmas.iter().map(|sigma| objective.time(*sigma)).collect()))
    }

    /// The loss of a prediction, and with `weight` the gradient of `weight` · loss.
    fn loss(
        &self,
        objective: &dyn Objective,
        prediction: &Tensor,
        weight: Option<f32>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let targets = self.per_item(|sigma| objective.target(sigma))?;
        flow_loss(prediction, self.images, self.noise, &targets, weight)
    }

    /// Two numbers for each item, on the images' device.
    fn per_item(&self, of: impl Fn(f32) -> [f32; 2]) -> Result<Tensor> {
        let pairs: Vec<f32> = self.sigmas.iter().flat_map(|sigma| of(*sigma)).collect();
        Tensor::from_slice(&self.images.device(), &pairs, [self.sigmas.len(), 2])
    }
}

/// What [`TrainableModel::step`] did, still on the device.
#[derive(Clone, Debug)]
pub struct StepNorm {
    /// f32 `[2]`: the norm of all gradients before clipping, and 1 where the step was skipped because it is not finite.
    pub values: Tensor,
}

impl StepNorm {
    /// The norm, and whether the step was skipped. Waits for the device.
    ///
    /// # Errors
    /// When the work so far failed.
    pub fn read(&self) -> Result<(f32, bool)> {
        let values = self.values.to_vec::<f32>()?;
        Ok((values[0], values[1] != 0.0))
    }
}

/// A model, the gradients of its trained tensors, and the optimizer's state.
pub struct TrainableModel {
    /// Before what is copied, which must not be given back meanwhile.
    pub(super) copying: Copying,
    model: Box<dyn Trainable>,
    parameters: Vec<NamedParameter>,
    /// The trained ones among the parameters.
    trained: Vec<usize>,
    pub(super) optimizer: AdamW,
    keeps_ema: bool,
    /// The objective, where it is not the model's own.
    discrete: Option<Arc<Discrete>>,
    /// Where several ranks share the work.
    exchange: Option<Exchange>,
    /// Which of the trained ones each parameter is.
    number: Vec<Option<usize>>,
}

impl StateSource for TrainableModel {
    fn metas(&self) -> Vec<&NamedParameter> {
        self.trained.iter().map(|&index| &self.parameters[index]).collect()
    }

    fn keeps_average(&self) -> bool {
        self.keeps_ema
    }

    fn share(&self) -> Option<&[Place]> {
        let exchange = self.exchange.as_ref().filter(|exchange| exchange.shards());
        exchange.map(|_| self.optimizer.places())
    }

    fn values(&self, part: StatePart, trained: usize, elements: Range<usize>) -> Result<Option<Vec<f32>>> {
        let index = self.trained[trained];
        let weight = || self.model.weights()[index].clone();
        let array = match part {
            StatePart::Weight | StatePart::Gradient => None,
            StatePart::Master => Some(StateArray::Master),
            StatePart::FirstMoment => Some(StateArray::FirstMoment),
            StatePart::SecondMoment => Some(StateArray::SecondMoment),
            StatePart::Ema => Some(StateArray::Average),
        };
        let kept = array
            .map(|array| self.optimizer.state(array, trained))
            .transpose()?
            .flatten();
        let (whole, first) = match (kept, part) {
            (Some(kept), _) => (
                kept,
                self.optimizer.place(trained).map_or(0, |place| place.elements.start),
            ),
            (None, StatePart::Weight | StatePart::Master) => (weight(), 0),
            (None, StatePart::Gradient) => match self.model.slots()[index].clone() {
                Some(gradient) => (gradient, 0),
                None => return Ok(None),
            },
            (None, _) => return Ok(None),
        };
        let flat = whole.reshape([whole.elements()])?;
        let start = elements.start.checked_sub(first);
        let start = start.ok_or_else(|| Error::invalid("another rank keeps the start of this tensor"))?;
        flat.narrow(start, elements.len())?.to_vec_f32().map(Some)
    }
}

impl TrainableModel {
    /// Reads a model's parameters, and makes room for gradients and state.
    ///
    /// # Errors
    /// As for [`Spec::load`]; when the policy trains nothing, or only a part of projections that are stacked.
    pub fn load(
        spec: &dyn Spec,
        params: &dyn ParamSource,
        device: &Device,
        options: &TrainOptions,
        loaded: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<Self> {
        Self::load_among(spec, params, device, options, &Ranks::solo(), loaded)
    }

    /// As [`TrainableModel::load`], as one of several ranks, which all load the same and take the same steps: each on micro-batches of
    /// its own, whose gradients are summed over ranks.
    ///
    /// # Errors
    /// As for [`TrainableModel::load`].
    pub fn load_among(
        spec: &dyn Spec,
        params: &dyn ParamSource,
        device: &Device,
        options: &TrainOptions,
        ranks: &Ranks,
        loaded: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<Self> {
        let parameters = spec.metas();
        let trained = choose(&parameters, &options.policy)?;
        let mut number = vec![None; parameters.len()];
        trained
            .iter()
            .enumerate()
            .for_each(|(place, &parameter)| number[parameter] = Some(place));
        let trunk = options.trunk_of(&parameters)?;
        let params = trunk.over(params);
        let mut model = options.with_choice(|choice| spec.load_trainable(&params, device, choice, loaded))?;
        let exchange = match ranks.world.is_solo() {
            true => None,
            false => {
                let sizes: Vec<usize> = trained.iter().map(|&index| parameters[index].elements()).collect();
                let finished: Vec<usize> = model.finish_order().iter().filter_map(|&index| number[index]).collect();
                Some(Exchange::new(ranks.clone(), device, &sizes, &finished)?)
            }
        };
        let (mut weights, mut slots) = pick(&mut *model);
        let optimizer = match &exchange {
            None => AdamW::new(device, &mut weights, &mut slots, options)?,
            Some(exchange) => {
                let (places, elements) = exchange.state_places();
                AdamW::of_places(device, &weights, places, elements, options)?
            }
        };
        Ok(TrainableModel {
            copying: Copying::default(),
            keeps_ema: options.ema_decay.is_some(),
            discrete: None,
            model,
            parameters,
            trained,
            optimizer,
            exchange,
            number,
        })
    }

    /// The model's own objective, whatever it is trained for.
    pub fn objective(&self) -> &'static dyn Objective {
        self.model.denoiser().objective()
    }

    /// Trains for this objective from now on; `None` for the model's own, flow matching.
    pub fn train_for(&mut self, discrete: Option<Arc<Discrete>>) {
        self.discrete = discrete;
    }

    /// Adds the gradients of `weight` · loss of a micro-batch; `weight` is 1 / micro-batches of a step, those of all ranks counted.
    /// Returns the loss itself, f32 `[1]` on the device.
    ///
    /// # Errors
    /// When shapes do not fit or the device has no room.
    pub fn accumulate(&mut self, batch: &Batch<'_>, weight: f32) -> Result<Tensor> {
        self.accumulate_telling(batch, weight, false)
    }

    /// As [`TrainableModel::accumulate`], for the last micro-batch of a step: where there are several ranks, gradients are sent to the
    /// others while the backward pass goes on.
    ///
    /// # Errors
    /// As for [`TrainableModel::accumulate`], and when a rank was lost.
    pub fn accumulate_last(&mut self, batch: &Batch<'_>, weight: f32) -> Result<Tensor> {
        self.accumulate_telling(batch, weight, true)
    }

    fn accumulate_telling(&mut self, batch: &Batch<'_>, weight: f32, last: bool) -> Result<Tensor> {
        let (own, discrete) = (self.model.denoiser().objective(), self.discrete.clone());
        let told = discrete.as_deref().map(|discrete| discrete.of_family(own));
        let objective = told.as_ref().map_or(own, |told| told as &dyn Objective);
        let (image, times) = batch.noisy(objective)?;
        let noisy = Noisy {
            image: &image,
            captions: batch.captions,
            times: &times,
        };
        let mut found = None;
        let mut loss = |prediction: &Tensor| {
            let (loss, gradient) = batch.loss(objective, prediction, Some(weight))?;
            found = Some(loss);
            gradient.ok_or_else(|| Error::invalid("the loss has no gradient"))
        };
        let (exchange, number) = (self.exchange.as_mut().filter(|_| last), &self.number);
        match exchange {
            None => self.model.accumulate(noisy, &mut loss, &mut |_, _| Ok(()))?,
            Some(exchange) => self.model.accumulate(noisy, &mut loss, &mut |first, slots| {
                take_part(exchange, number, first, slots)
            })?,
        }
        found.ok_or_else(|| Error::invalid("the model did not ask for its loss"))
    }

    /// The loss of a batch, f32 `[1]` on the device, without gradients.
    ///
    /// # Errors
    /// As for [`TrainableModel::accumulate`].
    pub fn evaluate(&self, batch: &Batch<'_>) -> Result<Tensor> {
        let own = self.model.denoiser().objective();
        let told = self.discrete.as_deref().map(|discrete| discrete.of_family(own));
        let objective = told.as_ref().map_or(own, |told| told as &dyn Objective);
        let (image, times) = batch.noisy(objective)?;
        let prediction = self.model.predict(Noisy {
            image: &image,
            captions: batch.captions,
            times: &times,
        })?;
        Ok(batch.loss(objective, &prediction, None)?.0)
    }

    /// Changes the trained weights by the gradients gathered since the last step, and sets the gradients to zero.
    ///
    /// # Errors
    /// When the learning rate is not a number, or the device refuses the work.
    pub fn step(&mut self, learning_rate: f32) -> Result<StepNorm> {
        self.copying.hold_device()?;
        let (mut weights, mut slots) = pick(&mut *self.model);
        let values = match &mut self.exchange {
            None => self.optimizer.step(&mut weights, &mut slots, learning_rate)?,
            Some(exchange) => {
                let (sums, squares) = exchange.finish(&mut slots)?;
                let optimizer = &mut self.optimizer;
                let update = optimizer.begin_sums(&mut weights, &sums, &squares, learning_rate)?;
                exchange.renew_weights(&mut weights, &mut |weights, state| {
                    optimizer.change_by_sums(&update, state, weights, &sums)
                })?;
                update.values().clone()
            }
        };
        self.model.rearrange()?;
        Ok(StepNorm { values })
    }

    /// The model, for sampling.
    pub fn denoiser(&self) -> &dyn Denoiser {
        self.model.denoiser()
    }

    /// The trained tensors under their canonical names, in the model's order.
    pub fn trained(&self) -> Vec<TrainedTensor<'_>> {
        (self as &dyn StateSource).trained()
    }

    /// The trained weights as the model computes with them, in the model's order; none where the first rank saves them and this one keeps
    /// masters of its own.
    pub(super) fn saved_weights(&self) -> Vec<&Tensor> {
        let first = self
            .exchange
            .as_ref()
            .is_none_or(|exchange| exchange.world().is_first());
        if !first && self.optimizer.array(StateArray::Master).is_some() {
            return Vec::new();
        }
        let weights = self.model.weights();
        self.trained.iter().map(|&index| weights[index]).collect()
    }

    /// The name of the first trained tensor whose f32 weight holds a number that is not finite. Waits for the device.
    ///
    /// # Errors
    /// When the work so far failed.
    pub fn first_not_finite(&self) -> Result<Option<String>> {
        let weights = self.model.weights();
        let count = |(trained, &index): (usize, &usize)| {
            let master = self.optimizer.state(StateArray::Master, trained)?;
            Ok((index, count_not_finite(master.as_ref().unwrap_or(weights[index]))?))
        };
        let kept = |(trained, _): &(usize, &usize)| self.optimizer.place(*trained).is_some();
        let all = self.trained.iter().enumerate().filter(kept);
        let counts: Vec<(usize, Tensor)> = all.map(count).collect::<Result<_>>()?;
        for (index, count) in counts {
            if count.to_vec::<i32>()?[0] > 0 {
                return Ok(Some(self.parameters[index].name().to_owned()));
            }
        }
        Ok(None)
    }

    /// Every parameter's values on the host under its canonical name, in the checkpoint's order of axes: for comparing small models.
    /// Waits for the device.
    ///
    /// # Errors
    /// When the work so far failed.
    pub fn parameter_values(&self) -> Result<Vec<(String, Vec<f32>)>> {
        let mut all = Vec::new();
        for (meta, tensor) in self.parameters.iter().zip(self.model.weights()) {
            let values = tensor.to_vec_f32()?;
            for (index, part) in meta.parts.iter().enumerate() {
                let own = values[meta.range(index)].to_vec();
                all.push((part.name.clone(), meta.to_published(index, own)));
            }
        }
        Ok(all)
    }

    /// The tensors that no step changes, as they lie on the device, each under the canonical name of the first that it is made of.
    pub fn frozen(&self) -> Vec<(String, Tensor)> {
        let places = self.model.weights().into_iter().zip(self.model.slots());
        let frozen = self
            .parameters
            .iter()
            .zip(places)
            .filter(|(_, (_, slot))| slot.is_none());
        frozen
            .map(|(meta, (weight, _))| (meta.name().to_owned(), weight.clone()))
            .collect()
    }

    /// The elements of all trained tensors.
    pub fn trained_parameters(&self) -> u64 {
        self.trained
            .iter()
            .map(|&index| self.parameters[index].elements() as u64)
            .sum()
    }

    /// All that [`TrainableModel::restore_state`] needs but the number of steps; gradients not yet used by a step are no part of it.
    pub fn state_tensors(&self) -> Vec<StateTensor<'_>> {
        (self as &dyn StateSource).state_tensors()
    }

    /// Puts back what [`TrainableModel::state_tensors`] gave: `read(name, shape)` gives the values of each, and `steps` is the
    /// number of steps they were made by. Weights follow from their masters. Continues bit for bit.
    ///
    /// # Errors
    /// Those of `read`, and when it gives another number of values.
    pub fn restore_state(&mut self, steps: u64, read: &mut ReadState<'_>) -> Result<()> {
        self.copying.hold_device()?;
        let kept = STATE
            .into_iter()
            .zip(StateArray::ALL)
            .filter(|((part, _), _)| *part != StatePart::Ema || self.keeps_ema);
        let metas: Vec<NamedParameter> = self.metas().into_iter().cloned().collect();
        // An array of the state, a trained parameter, and a part of that.
        let jobs = kept.flat_map(|((_, prefix), array)| {
            let tensors = metas.iter().enumerate();
            tensors
                .flat_map(move |(trained, meta)| (0..meta.parts.len()).map(move |part| (prefix, array, trained, part)))
        });
        // Every rank needs all weights, and of the rest what it keeps.
        let needed = |(_, array, trained, _): &(&str, StateArray, usize, usize)| {
            *array == StateArray::Master || self.optimizer.place(*trained).is_some()
        };
        let jobs: Vec<_> = jobs.filter(needed).collect();
        let mut values_of = |&(prefix, _, trained, part): &(&str, StateArray, usize, usize)| {
            let published = &metas[trained].parts[part];
            let name = format!("{prefix}.{}", published.name);
            let values = read(&name, &published.shape)?;
            match values.len() == published.elements() {
                true => Ok(metas[trained].to_engine(part, values)),
                false => Err(Error::invalid(format!(
                    "`{name}` has {} values, expected {:?}",
                    values.len(),
                    published.shape
                ))),
            }
        };
        read_ahead(
            jobs,
            &mut values_of,
            &mut |(_, array, trained, part), values: Vec<f32>| {
                let first = metas[trained].range(part).start;
                self.optimizer.set_state(array, trained, first, &values)?;
                match array {
                    StateArray::Master => self.set_weight(self.trained[trained], first, &values),
                    _ => Ok(()),
                }
            },
        )?;
        self.optimizer.set_steps(steps);
        self.model.rearrange()
    }

    /// The names of all tensors of [`TrainableModel::state_slices`] on all ranks.
    pub fn state_names(&self) -> HashSet<String> {
        let kept = STATE
            .into_iter()
            .filter(|(part, _)| *part != StatePart::Ema || self.keeps_ema);
        kept.flat_map(|(_, prefix)| {
            let names = self.trained.iter().map(|&index| self.parameters[index].name());
            names.map(move |name| format!("{prefix}.{name}"))
        })
        .collect()
    }

    /// What this rank keeps of the optimizer's state, where ranks divide it among them; `None` where it is whole.
    pub fn state_slices(&self) -> Option<Vec<StateSlice<'_>>> {
        (self as &dyn StateSource).state_slices()
    }

    /// Puts back what [`TrainableModel::state_slices`] gave on all ranks of a run: `read(name, elements)` gives these elements. Any number
    /// of ranks may do so.
    ///
    /// # Errors
    /// As for [`TrainableModel::restore_state`].
    pub fn restore_slices(&mut self, steps: u64, read: &mut ReadSlice<'_>) -> Result<()> {
        for ((part, prefix), array) in STATE.into_iter().zip(StateArray::ALL) {
            if part == StatePart::Ema && !self.keeps_ema {
                continue;
            }
            for trained in 0..self.trained.len() {
                let meta = &self.parameters[self.trained[trained]];
                let name = format!("{prefix}.{}", meta.name());
                // Every rank needs all weights, which follow from the masters.
                let elements = match (part, self.optimizer.place(trained)) {
                    (StatePart::Master, _) => 0..meta.elements(),
                    (_, Some(place)) => place.elements.clone(),
                    (_, None) => continue,
                };
                let (first, count) = (elements.start, elements.len());
                let values = read(&name, elements)?;
                if values.len() != count {
                    return Err(Error::invalid(format!(
                        "`{name}` has {} values, expected {count}",
                        values.len()
                    )));
                }
                self.optimizer.set_state(array, trained, first, &values)?;
                if array == StateArray::Master {
                    self.set_weight(self.trained[trained], first, &values)?;
                }
            }
        }
        self.optimizer.set_steps(steps);
        self.model.rearrange()
    }

    /// The running averages of all trained tensors as they stand in checkpoints, by name, on the first of several ranks, which divide
    /// them among them; `None` where [`TrainedTensor::read`] gives them. All ranks call it together.
    ///
    /// # Errors
    /// When a rank was lost.
    pub fn gather_averages(&self) -> Result<Option<HashMap<String, Vec<f32>>>> {
        let exchange = self.exchange.as_ref().filter(|exchange| exchange.shards());
        let (Some(exchange), Some(array)) = (exchange, self.optimizer.array(StateArray::Average)) else {
            return Ok(None);
        };
        let mut all = HashMap::new();
        for (trained, values) in exchange.gather_state(array)?.into_iter().enumerate() {
            let meta = &self.parameters[self.trained[trained]];
            if values.len() == meta.elements() {
                for (index, part) in meta.parts.iter().enumerate() {
                    let own = values[meta.range(index)].to_vec();
                    all.insert(part.name.clone(), meta.to_published(index, own));
                }
            }
        }
        Ok(Some(all))
    }

    /// Overwrites elements of a parameter, rounded to the compute type.
    fn set_weight(&mut self, index: usize, first: usize, values: &[f32]) -> Result<()> {
        let device = self.model.denoiser().device().clone();
        let values = Tensor::from_slice(&device, values, [values.len()])?;
        let weight = self.model.weights_and_slots_mut().0.swap_remove(index);
        let values = cast(&values, weight.dtype())?;
        weight.copy_elements_from(first, &values)
    }

    /// Calls of [`TrainableModel::step`] so far, skipped steps included.
    pub fn steps(&self) -> u64 {
        self.optimizer.steps()
    }
}

/// Which of the parameters a policy trains.
///
/// # Errors
/// When it trains none, only a part of some, or a pattern fits no tensor.
pub(super) fn choose(parameters: &[NamedParameter], policy: &Policy) -> Result<Vec<usize>> {
    let names: Vec<&str> = parameters
        .iter()
        .flat_map(|meta| meta.parts.iter().map(|part| part.name.as_str()))
        .collect();
    if let Some(unused) = policy.unused_patterns(&names).first() {
        return Err(Error::invalid(format!(
            "the pattern `{unused}` of the freeze policy fits no tensor of this model; its tensors have names such as `{}`",
            names.first().copied().unwrap_or_default()
        )));
    }
    let mut chosen = Vec::new();
    for (index, meta) in parameters.iter().enumerate() {
        if policy.trains(meta)? {
            chosen.push(index);
        }
    }
    match chosen.is_empty() {
        false => Ok(chosen),
        true => Err(Error::invalid(format!(
            "the freeze policy `{policy}` trains nothing of this model"
        ))),
    }
}

/// The trained weights and their gradients.
fn pick(model: &mut dyn Trainable) -> (Vec<&mut Tensor>, Vec<&mut Tensor>) {
    let (weights, slots) = model.weights_and_slots_mut();
    let pairs = weights.into_iter().zip(slots);
    pairs
        .filter_map(|(weight, slot): (_, &mut Slot)| slot.as_mut().map(|gradient| (weight, gradient)))
        .unzip()
}

impl TrainOptions {
    /// How the weights of a model with these parameters are kept: as [`TrainOptions::trunk`] says, but for those that are trained.
    ///
    /// # Errors
    /// When all that could be in eight bits is trained.
    pub(super) fn trunk_of(&self, parameters: &[NamedParameter]) -> Result<Precision> {
        let mut trunk = self.trunk.clone();
        for index in choose(parameters, &self.policy)? {
            let names = parameters[index].parts.iter().map(|part| part.name.clone());
            trunk.keep.extend(names);
        }
        match trunk.coding.is_none() || parameters.iter().any(|meta| trunk.of(meta).is_some()) {
            true => Ok(trunk),
            false => Err(Error::invalid(format!(
                "trunk = \"{trunk}\" is about the weights of main blocks that are not trained, but the policy `{}` trains all of them: \
                 leave it out, or train fewer",
                self.policy
            ))),
        }
    }

    /// Runs `work` with what a model has to know of these options.
    pub(super) fn with_choice<T>(&self, work: impl FnOnce(&TrainingChoice<'_>) -> T) -> T {
        work(&TrainingChoice {
            trains: &|meta| self.policy.trains(meta),
            recomputes: &|trained| self.recompute.applies_to(trained),
            keep_sums: self.recompute != Recompute::All,
        })
    }
}
