//! Where modulation vectors stand in a table, and the normalisations and gates that read them.

use crate::dtype::DType;
use crate::error::Result;
use crate::ops::gated_add::{gated_add, gated_add_backward, item_sums};
use crate::ops::layer_norm::{layer_norm_modulate_backward, layer_norm_shift};
use crate::ops::{Modulation, VectorGradient};
use crate::tensor::Tensor;

/// Vectors of a sublayer: shift, scale and gate.
pub(super) const SUBLAYER: usize = 3;

/// Vectors of a stream of a double-stream block, for attention and for the feed-forward network; the text stream's follow the image
/// stream's.
pub(super) const STREAM: usize = 2 * SUBLAYER;

/// The text stream's first vector.
pub(super) const TEXT: usize = STREAM;

/// The single-stream blocks' first vector.
pub(super) const SINGLE: usize = 2 * STREAM;

/// The last normalisation's scale, which its shift follows.
pub(super) const LAST: usize = SINGLE + SUBLAYER;

/// A sublayer's vectors in a table: the index of its shift, which scale and gate follow.
#[derive(Clone, Copy)]
pub(super) struct Vectors<'a> {
    pub table: &'a Tensor,
    pub first: usize,
    pub epsilon: f32,
}

/// Gradients of a part's vectors, f32 `[batch, vectors, dim]`; nothing where nobody needs them.
pub(super) struct VectorGradients(Option<Tensor>);

impl<'a> Vectors<'a> {
    /// The vectors of the next sublayer.
    pub fn next(self) -> Self {
        Vectors {
            first: self.first + SUBLAYER,
            ..self
        }
    }

    fn at(&self, index: usize) -> Result<Modulation<'a>> {
        Modulation::new(self.table, self.first + index)
    }

    /// A sublayer's input: `LN(x) · (1 + scale) + shift`.
    pub fn normalise(&self, x: &Tensor) -> Result<Tensor> {
        layer_norm_shift(x, self.at(1)?, self.at(0)?, self.epsilon)
    }

    /// The gradient of `x` in [`Vectors::normalise`]; `place` is the sublayer's number among those of `gradients`.
    pub fn normalise_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        gradients: &mut VectorGradients,
        place: usize,
    ) -> Result<Tensor> {
        if let Some(shift) = gradients.of(place, 0) {
            item_sums(dy, shift)?;
        }
        layer_norm_modulate_backward(dy, x, Some(self.at(1)?), self.epsilon, gradients.of(place, 1))
    }

    /// The stream after the sublayer: `x + gate · y`.
    pub fn add(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        gated_add(x, y, self.at(2)?)
    }

    /// The gradient of `y` in [`Vectors::add`].
    pub fn add_backward(
        &self,
        d_sum: &Tensor,
        y: &Tensor,
        gradients: &mut VectorGradients,
        place: usize,
    ) -> Result<Tensor> {
        gated_add_backward(d_sum, y, self.at(2)?, gradients.of(place, 2))
    }
}

impl VectorGradients {
    /// Places for so many sublayers of the items of `x`, if they are `wanted`.
    pub fn new(wanted: bool, sublayers: usize, x: &Tensor) -> Result<Self> {
        let shape = [x.dim(0), sublayers * SUBLAYER, x.dim(2)];
        let places = wanted.then(|| Tensor::zeros(&x.device(), shape, DType::F32));
        places.transpose().map(VectorGradients)
    }

    fn of(&mut self, place: usize, vector: usize) -> Option<VectorGradient<'_>> {
        let index = place * SUBLAYER + vector;
        self.0.as_mut().map(|table| VectorGradient { table, index })
    }

    /// The gradients `[batch, vectors · dim]`.
    pub fn rows(self) -> Result<Option<Tensor>> {
        let flat = |table: Tensor| {
            let shape = [table.dim(0), table.dim(1) * table.dim(2)];
            table.into_shape(shape)
        };
        self.0.map(flat).transpose()
    }
}
