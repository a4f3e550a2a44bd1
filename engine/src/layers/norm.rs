//! Parameters of normalisations, and those that are no layer.

use super::{Described, Group, Kind, Loaded, Module, NamedParameter, Place, PlaceMut, Transform};
use crate::error::Result;
use crate::ops::group_norm;
use crate::tensor::Tensor;

/// A parameter by itself: a pad token, a table of embeddings.
pub struct Bare<K: Kind = Loaded>(pub K::Dense);

impl<K: Kind> Module for Bare<K> {
    type Kind = K;
    type As<B: Kind> = Bare<B>;

    fn transform<B: Kind>(&self, transform: &mut impl Transform<K, B>) -> Result<Bare<B>> {
        transform.dense(&self.0).map(Bare)
    }

    fn visit<'a>(&'a self, visit: &mut dyn FnMut(Place<'a, K>)) {
        visit(Place::Dense(&self.0));
    }

    fn visit_mut<'a>(&'a mut self, visit: &mut dyn FnMut(PlaceMut<'a, K>)) {
        visit(PlaceMut::Dense(&mut self.0));
    }
}

/// The factors `[size]` of an RMS normalisation.
pub type Norm<K = Loaded> = Bare<K>;

impl Bare<Described> {
    /// The parameter `{name}` of this shape.
    pub fn new(group: Group, name: impl Into<String>, shape: &[usize]) -> Self {
        Bare(NamedParameter::one(group, name, shape))
    }

    /// The token `{name}`, stored as `[1, dim]`, a vector `[dim]` in the engine.
    pub fn token(group: Group, name: &str, dim: usize) -> Self {
        let mut meta = NamedParameter::one(group, name, &[1, dim]);
        meta.flat = true;
        Bare(meta)
    }

    /// The factors `{name}.weight` of a normalisation.
    pub fn norm(group: Group, name: &str, size: usize) -> Self {
        Bare::new(group, format!("{name}.weight"), &[size])
    }
}

/// A group normalisation's factors and summands.
pub struct GroupNorm<K: Kind = Loaded> {
    /// `[channels]`
    pub weight: K::Dense,
    /// `[channels]`
    pub bias: K::Dense,
    /// Groups of channels that are normalised together.
    pub groups: usize,
    /// Added to the variance.
    pub epsilon: f32,
}

impl<K: Kind> Module for GroupNorm<K> {
    type Kind = K;
    type As<B: Kind> = GroupNorm<B>;

    fn transform<B: Kind>(&self, transform: &mut impl Transform<K, B>) -> Result<GroupNorm<B>> {
        Ok(GroupNorm {
            weight: transform.dense(&self.weight)?,
            bias: transform.dense(&self.bias)?,
            groups: self.groups,
            epsilon: self.epsilon,
        })
    }

    fn visit<'a>(&'a self, visit: &mut dyn FnMut(Place<'a, K>)) {
        visit(Place::Dense(&self.weight));
        visit(Place::Dense(&self.bias));
    }

    fn visit_mut<'a>(&'a mut self, visit: &mut dyn FnMut(PlaceMut<'a, K>)) {
        visit(PlaceMut::Dense(&mut self.weight));
        visit(PlaceMut::Dense(&mut self.bias));
    }
}

impl GroupNorm<Described> {
    /// The normalisation `{name}.weight`, `{name}.bias`.
    pub fn new(group: Group, name: &str, channels: usize, groups: usize, epsilon: f32) -> Self {
        GroupNorm {
            weight: NamedParameter::one(group, format!("{name}.weight"), &[channels]),
            bias: NamedParameter::one(group, format!("{name}.bias"), &[channels]),
            groups,
            epsilon,
        }
    }
}

impl GroupNorm {
    /// The operation's view of it.
    pub fn op(&self) -> group_norm::GroupNorm {
        group_norm::GroupNorm {
            weight: self.weight.clone(),
            bias: self.bias.clone(),
            groups: self.groups,
            epsilon: self.epsilon,
        }
    }
}

impl Bare<Loaded> {
    /// The tensor.
    pub fn tensor(&self) -> &Tensor {
        &self.0
    }
}
