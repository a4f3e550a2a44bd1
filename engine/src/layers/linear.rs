//! Linear layers: `y = x · weightᵀ + bias`, and everything else that their weights take part in.

use std::borrow::Cow;

use super::{
    Balance, Described, Gradients, Group, Kind, Loaded, Module, NamedParameter, Place, PlaceMut, Slot, Transform,
};
use crate::error::Result;
use crate::ops::linear::{
    InputActivation, LinearGradients, linear, linear_backward_input, linear_backward_weight, linear_vectors,
    linear_vectors_backward,
};
use crate::ops::linear_quantised::{linear_quantised, linear_quantised_swiglu};
use crate::ops::linear_swiglu::linear_swiglu;
use crate::ops::quantise::{Activation, Coding, Input, Quantised, Scaling, dequantise, quantise, restore};
use crate::tensor::Tensor;

/// How a linear layer holds its weight.
#[derive(Debug)]
pub enum Weight {
    /// In the compute type on the device, `[out, in]`.
    Dense(Tensor),
    /// In eight bits on the device, `[out, in]`, with a scale per row. Such a layer is frozen.
    Quantised(Quantised),
}

impl Weight {
    /// `values` `[out, in]`, in eight bits if a coding is given.
    ///
    /// # Errors
    /// When the width is not one for eight bits, or the device has no room.
    pub fn of(values: Tensor, coding: Option<Coding>) -> Result<Self> {
        match coding {
            None => Ok(Weight::Dense(values)),
            Some(coding) => quantise(&values, coding, Scaling::Rows).map(Weight::Quantised),
        }
    }

    /// The same with every tensor as `change` makes it.
    ///
    /// # Errors
    /// Those of `change`.
    pub(super) fn map(self, mut change: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        match self {
            Weight::Dense(values) => change(&values).map(Weight::Dense),
            Weight::Quantised(quantised) => quantised.map(change).map(Weight::Quantised),
        }
    }

    /// The values, or the codes of those in eight bits.
    pub(super) fn tensor(&self) -> &Tensor {
        match self {
            Weight::Dense(values) => values,
            Weight::Quantised(quantised) => quantised.codes(),
        }
    }

    /// The same, to be changed.
    pub(super) fn tensor_mut(&mut self) -> &mut Tensor {
        match self {
            Weight::Dense(values) => values,
            Weight::Quantised(quantised) => quantised.codes_mut(),
        }
    }

    /// In the compute type: as it stands, or made for this call.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn values(&self) -> Result<Tensor> {
        match self {
            Weight::Dense(values) => Ok(values.clone()),
            Weight::Quantised(quantised) => restore(quantised),
        }
    }
}

/// A linear layer. Nothing outside this file knows how its weight is held.
pub struct Linear<K: Kind = Loaded> {
    /// `[out, in]`
    pub weight: K::Matrix,
    /// `[out]`
    pub bias: Option<K::Dense>,
}

impl<K: Kind> Module for Linear<K> {
    type Kind = K;
    type As<B: Kind> = Linear<B>;

    fn transform<B: Kind>(&self, transform: &mut impl Transform<K, B>) -> Result<Linear<B>> {
        Ok(Linear {
            weight: transform.matrix(&self.weight)?,
            bias: self.bias.as_ref().map(|bias| transform.dense(bias)).transpose()?,
        })
    }

    fn visit<'a>(&'a self, visit: &mut dyn FnMut(Place<'a, K>)) {
        visit(Place::Matrix(&self.weight));
        self.bias.iter().for_each(|bias| visit(Place::Dense(bias)));
    }

    fn visit_mut<'a>(&'a mut self, visit: &mut dyn FnMut(PlaceMut<'a, K>)) {
        visit(PlaceMut::Matrix(&mut self.weight));
        self.bias.iter_mut().for_each(|bias| visit(PlaceMut::Dense(bias)));
    }
}

impl Linear<Described> {
    /// The layer `{name}.weight` without bias.
    pub fn new(group: Group, name: &str, outputs: usize, inputs: usize) -> Self {
        Self::stacked(group, &[name], outputs, inputs)
    }

    /// Layers without bias, of `outputs` rows each, stacked.
    pub fn stacked(group: Group, names: &[&str], outputs: usize, inputs: usize) -> Self {
        Self::of_rows(
            group,
            &names.iter().map(|name| (*name, outputs)).collect::<Vec<_>>(),
            inputs,
        )
    }

    /// Layers without bias, each with its own number of rows, stacked.
    pub fn of_rows(group: Group, layers: &[(&str, usize)], inputs: usize) -> Self {
        let shapes: Vec<_> = layers
            .iter()
            .map(|(name, rows)| (format!("{name}.weight"), [*rows, inputs]))
            .collect();
        Linear {
            weight: NamedParameter::stacked(group, shapes.iter().map(|(name, shape)| (name.clone(), &shape[..]))),
            bias: None,
        }
    }

    /// Says of this layer and the next that part `part` of its outputs, multiplied by something, are the next one's inputs.
    pub fn feeds(mut self, part: usize, mut next: Self) -> (Self, Self) {
        let (rows, columns) = (Box::new(self.weight.clone()), Box::new(next.weight.clone()));
        self.weight.balance = Some(Balance::Rows { part, of: columns });
        next.weight.balance = Some(Balance::Columns { of: rows });
        (self, next)
    }

    /// The same layer, whose weight stays in the compute type where others are kept in eight bits.
    pub fn precise(mut self) -> Self {
        self.weight.precise = true;
        self
    }

    /// The same layer, or layers, with their biases `{name}.bias`.
    pub fn with_bias(mut self) -> Self {
        let parts: Vec<_> = self
            .weight
            .parts
            .iter()
            .map(|part| {
                let layer = part.name.strip_suffix(".weight").unwrap_or(&part.name);
                (format!("{layer}.bias"), [part.shape[0]])
            })
            .collect();
        let parts = parts.iter().map(|(name, shape)| (name.clone(), &shape[..]));
        self.bias = Some(NamedParameter::stacked(self.weight.group, parts));
        self
    }
}

impl Linear {
    /// The layer of `count` of its outputs from `start` on, without bias; a view, nothing is copied.
    ///
    /// # Errors
    /// When they reach past the end.
    pub fn outputs(&self, start: usize, count: usize) -> Result<Linear> {
        let part = |tensor: &Tensor| tensor.narrow(start, count);
        Ok(Linear {
            weight: match &self.weight {
                Weight::Dense(values) => Weight::Dense(part(values)?),
                Weight::Quantised(quantised) => Weight::Quantised(quantised.clone().map(part)?),
            },
            bias: None,
        })
    }

    /// In which coding the layer takes its input best; `None` for values in the compute type.
    pub fn coding(&self) -> Option<Coding> {
        match &self.weight {
            Weight::Dense(_) => None,
            Weight::Quantised(weight) => Some(weight.coding()),
        }
    }

    /// `x · weightᵀ + bias` for tokens `[.., in]` in the compute type, or as [`Linear::coding`] says; the result is in the compute
    /// type. A layer in eight bits quantises values itself, with a scale per group, which is a pass of its own.
    ///
    /// # Errors
    /// When shapes, types or devices do not fit.
    pub fn forward<'a>(&self, x: impl Into<Input<'a>>) -> Result<Tensor> {
        match (&self.weight, x.into()) {
            (Weight::Dense(weight), Input::Values(x)) => linear(x, weight, self.bias.as_ref()),
            (Weight::Dense(weight), Input::Codes(x)) => linear(&restore(x)?, weight, self.bias.as_ref()),
            (Weight::Quantised(weight), x) => {
                let x = coded(x, weight)?;
                match &self.bias {
                    None => linear_quantised(&x, weight),
                    bias => linear(&dequantise(&x)?, &dequantise(weight)?, bias.as_ref()),
                }
            }
        }
    }

    /// `silu(gate) · up` where the layer's first half of rows gives the gate and its second half the other factor; see
    /// [`crate::ops::linear_swiglu`]. `then` is how the next layer takes it.
    ///
    /// # Errors
    /// When shapes, types or devices do not fit.
    pub fn forward_swiglu<'a>(&self, x: impl Into<Input<'a>>, then: Option<Coding>) -> Result<Activation> {
        match (&self.weight, x.into()) {
            (Weight::Dense(weight), Input::Values(x)) => {
                Activation::of(linear_swiglu(x, weight)?, then, Scaling::Groups)
            }
            (Weight::Dense(weight), Input::Codes(x)) => {
                Activation::of(linear_swiglu(&restore(x)?, weight)?, then, Scaling::Groups)
            }
            (Weight::Quantised(weight), x) => linear_quantised_swiglu(&*coded(x, weight)?, weight, then),
        }
    }

    /// `activation(x) · weightᵀ + bias` for a few vectors `[vectors, in]` in f32.
    ///
    /// # Errors
    /// When shapes, types or devices do not fit.
    pub fn forward_vectors(&self, x: &Tensor, activation: InputActivation) -> Result<Tensor> {
        linear_vectors(x, activation, &self.weight.values()?, self.bias.as_ref())
    }

    /// dX: the gradient of the input of [`Linear::forward`] for that of its result.
    ///
    /// # Errors
    /// When shapes, types or devices do not fit.
    pub fn backward_input(&self, dy: &Tensor) -> Result<Tensor> {
        linear_backward_input(dy, &self.weight.values()?)
    }

    /// dX of [`Linear::forward_vectors`], added to `dx`, and dW and the bias' gradient, added to `gradients`.
    ///
    /// # Errors
    /// When shapes, types or devices do not fit.
    pub fn backward_vectors(
        &self,
        dy: &Tensor,
        x: &Tensor,
        activation: InputActivation,
        gradients: &mut Linear<Gradients>,
        dx: Option<&mut Tensor>,
    ) -> Result<()> {
        linear_vectors_backward(dy, x, activation, &self.weight.values()?, gradients.places(), dx)
    }

    /// The weight in the compute type, for operations that gather their input by themselves (patches).
    ///
    /// # Errors
    /// When it is in eight bits and the device has no room for its values.
    pub fn dense_weight(&self) -> Result<Tensor> {
        self.weight.values()
    }

    /// Outputs and inputs.
    pub fn extents(&self) -> [usize; 2] {
        let weight = self.weight.tensor();
        [weight.dim(0), weight.dim(1)]
    }
}

/// `x` in the coding of `weight`.
fn coded<'a>(x: Input<'a>, weight: &Quantised) -> Result<Cow<'a, Quantised>> {
    match x {
        Input::Codes(x) => Ok(Cow::Borrowed(x)),
        Input::Values(x) => quantise(x, weight.coding(), Scaling::Groups).map(Cow::Owned),
    }
}

impl Linear<Gradients> {
    /// Whether there is a place for the weight's gradient.
    pub fn wants_weight(&self) -> bool {
        self.weight.is_some()
    }

    /// Whether there is a place for any gradient.
    pub fn wants_any(&self) -> bool {
        self.weight.is_some() || self.bias.as_ref().is_some_and(Slot::is_some)
    }

    /// Where its gradients go.
    pub fn places(&mut self) -> LinearGradients<'_> {
        LinearGradients {
            weight: self.weight.as_mut(),
            bias: self.bias.as_mut().and_then(Slot::as_mut),
        }
    }

    /// Adds dW = `dyᵀ · x` and the bias' gradient, as far as there are places for them.
    ///
    /// # Errors
    /// When shapes, types or devices do not fit.
    pub fn add(&mut self, dy: &Tensor, x: &Tensor) -> Result<()> {
        linear_backward_weight(dy, x, self.places())
    }
}
