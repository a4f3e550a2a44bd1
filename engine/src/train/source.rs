//! What training keeps of the trained tensors, tensor by tensor as it stands in checkpoints, wherever it is read from: the model
//! itself, or a copy of what it was.

use std::ops::Range;

use super::adamw::{Place, StateArray};
use crate::error::{Error, Result};
use crate::layers::NamedParameter;

/// What is kept of a trained tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatePart {
    /// The weight that the model computes with.
    Weight,
    /// The f32 weight that the optimizer changes; on the CPU the weight itself.
    Master,
    /// The running mean of the gradient.
    FirstMoment,
    /// The running mean of the gradient's square.
    SecondMoment,
    /// The running average of the weight.
    Ema,
    /// The gradient gathered since the last step.
    Gradient,
}

impl StatePart {
    /// The array of the optimizer's state that holds it.
    pub(super) fn array(self) -> Option<StateArray> {
        match self {
            StatePart::Weight | StatePart::Gradient => None,
            StatePart::Master => Some(StateArray::Master),
            StatePart::FirstMoment => Some(StateArray::FirstMoment),
            StatePart::SecondMoment => Some(StateArray::SecondMoment),
            StatePart::Ema => Some(StateArray::Average),
        }
    }
}

/// The parts that are a run's state, in the order of [`StateArray::ALL`], and what their names begin with.
pub(super) const STATE: [(StatePart, &str); 4] = [
    (StatePart::Master, "master"),
    (StatePart::FirstMoment, "first_moment"),
    (StatePart::SecondMoment, "second_moment"),
    (StatePart::Ema, "ema"),
];

/// Where the values of trained tensors are read from.
pub trait StateSource {
    /// The trained parameters, in the model's order.
    fn metas(&self) -> Vec<&NamedParameter>;

    /// Whether averages are kept.
    fn keeps_average(&self) -> bool;

    /// What this rank keeps of the trained parameters' state, where ranks divide it among them; `None` where it is whole.
    fn share(&self) -> Option<&[Place]>;

    /// A range of the elements of trained parameter `trained`, in the engine's order of axes; `None` for what is not kept. Waits for
    /// what has to be done before.
    ///
    /// # Errors
    /// When that failed.
    fn values(&self, part: StatePart, trained: usize, elements: Range<usize>) -> Result<Option<Vec<f32>>>;
}

impl dyn StateSource + '_ {
    /// The trained tensors under their canonical names, in the model's order.
    pub fn trained(&self) -> Vec<TrainedTensor<'_>> {
        let metas = self.metas().into_iter().enumerate();
        let tensors = metas.flat_map(|(trained, meta)| {
            let parts = meta.parts.iter().enumerate();
            parts.map(move |(part, published)| TrainedTensor {
                name: published.name.clone(),
                shape: published.shape.clone(),
                source: self,
                meta,
                trained,
                part,
            })
        });
        tensors.collect()
    }

    /// What this rank keeps of the state, where ranks divide it among them; `None` where it is whole.
    pub fn state_slices(&self) -> Option<Vec<StateSlice<'_>>> {
        let places = self.share()?;
        let metas = self.metas();
        let kept = STATE
            .into_iter()
            .filter(|(part, _)| *part != StatePart::Ema || self.keeps_average());
        let slices = kept.flat_map(|(part, prefix)| {
            let metas = &metas;
            places.iter().map(move |place| StateSlice {
                name: format!("{prefix}.{}", metas[place.tensor].name()),
                elements: place.elements.clone(),
                source: self,
                trained: place.tensor,
                part,
            })
        });
        Some(slices.collect())
    }

    /// All that a run continues from but the number of steps.
    pub fn state_tensors(&self) -> Vec<StateTensor<'_>> {
        let kept = STATE
            .into_iter()
            .filter(|(part, _)| *part != StatePart::Ema || self.keeps_average());
        let tensors = kept.flat_map(|(part, prefix)| {
            self.trained().into_iter().map(move |tensor| StateTensor {
                name: format!("{prefix}.{}", tensor.name),
                shape: tensor.shape.clone(),
                tensor,
                part,
            })
        });
        tensors.collect()
    }
}

/// Elements of one array of the optimizer's state that this rank keeps: `master.…` and so on of the first canonical name of a
/// parameter, in the engine's order of axes.
pub struct StateSlice<'a> {
    /// The name in the state.
    pub name: String,
    /// Which of the parameter's elements.
    pub elements: Range<usize>,
    source: &'a dyn StateSource,
    trained: usize,
    part: StatePart,
}

impl StateSlice<'_> {
    /// The values on the host. Waits for the device.
    ///
    /// # Errors
    /// When the work so far failed.
    pub fn read(&self) -> Result<Vec<f32>> {
        let values = self.source.values(self.part, self.trained, self.elements.clone())?;
        values.ok_or_else(|| Error::invalid(format!("`{}` is not kept", self.name)))
    }
}

/// A trained tensor as it stands in checkpoints: stacked projections are taken apart.
pub struct TrainedTensor<'a> {
    /// The canonical name.
    pub name: String,
    /// The shape in checkpoints.
    pub shape: Vec<usize>,
    source: &'a dyn StateSource,
    meta: &'a NamedParameter,
    /// Its place in the list of trained parameters, and which part of that parameter it is.
    trained: usize,
    part: usize,
}

impl TrainedTensor<'_> {
    /// The values on the host, in the checkpoint's order of axes; `None` for an average that is not kept. Waits for the
    /// device.
    ///
    /// # Errors
    /// When the work so far failed, or a copy of the model does not hold this part.
    pub fn read(&self, part: StatePart) -> Result<Option<Vec<f32>>> {
        let values = self.source.values(part, self.trained, self.meta.range(self.part))?;
        Ok(values.map(|values| self.meta.to_published(self.part, values)))
    }
}

/// One tensor of the optimizer's state: `master.…`, `first_moment.…`, `second_moment.…`, `ema.…` of a canonical name.
pub struct StateTensor<'a> {
    /// The name in the state.
    pub name: String,
    /// The shape.
    pub shape: Vec<usize>,
    tensor: TrainedTensor<'a>,
    part: StatePart,
}

impl StateTensor<'_> {
    /// The values on the host. Waits for the device.
    ///
    /// # Errors
    /// When the work so far failed.
    pub fn read(&self) -> Result<Vec<f32>> {
        let values = self.tensor.read(self.part)?;
        values.ok_or_else(|| Error::invalid(format!("`{}` is not kept", self.name)))
    }
}
