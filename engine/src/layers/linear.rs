//! Linear layers: `y = x · weightᵀ + bias`, and everything else that their weights take part in.

use super::{Described, Gradients, Group, Kind, Loaded, Module, NamedParameter, Place, PlaceMut, Slot, Transform};
use crate::error::Result;
use crate::ops::linear::{
    InputActivation, LinearGradients, linear, linear_backward_input, linear_backward_weight, linear_vectors,
    linear_vectors_backward,
};
use crate::ops::linear_swiglu::linear_swiglu;
use crate::tensor::Tensor;

/// How a linear layer holds its weight.
#[derive(Debug)]
pub enum Weight {
    /// In the compute type on the device, `[out, in]`.
    Dense(Tensor),
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
    /// `x · weightᵀ + bias` for tokens `[.., in]` in the compute type.
    ///
    /// # Errors
    /// When shapes, types or devices do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let Weight::Dense(weight) = &self.weight;
        linear(x, weight, self.bias.as_ref())
    }

    /// `silu(gate) · up` where the layer's first half of rows gives the gate and its second half the other factor; see
    /// [`crate::ops::linear_swiglu`].
    ///
    /// # Errors
    /// When shapes, types or devices do not fit.
    pub fn forward_swiglu(&self, x: &Tensor) -> Result<Tensor> {
        let Weight::Dense(weight) = &self.weight;
        linear_swiglu(x, weight)
    }

    /// `activation(x) · weightᵀ + bias` for a few vectors `[vectors, in]` in f32.
    ///
    /// # Errors
    /// When shapes, types or devices do not fit.
    pub fn forward_vectors(&self, x: &Tensor, activation: InputActivation) -> Result<Tensor> {
        let Weight::Dense(weight) = &self.weight;
        linear_vectors(x, activation, weight, self.bias.as_ref())
    }

    /// dX: the gradient of the input of [`Linear::forward`] for that of its result.
    ///
    /// # Errors
    /// When shapes, types or devices do not fit.
    pub fn backward_input(&self, dy: &Tensor) -> Result<Tensor> {
        let Weight::Dense(weight) = &self.weight;
        linear_backward_input(dy, weight)
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
        let Weight::Dense(weight) = &self.weight;
        linear_vectors_backward(dy, x, activation, weight, gradients.places(), dx)
    }

    /// The weight in the compute type, for operations that gather their input by themselves (patches).
    pub fn dense_weight(&self) -> &Tensor {
        let Weight::Dense(weight) = &self.weight;
        weight
    }

    /// Outputs and inputs.
    pub fn extents(&self) -> [usize; 2] {
        let Weight::Dense(weight) = &self.weight;
        [weight.dim(0), weight.dim(1)]
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
