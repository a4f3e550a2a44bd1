//! Convolutions.

use std::ops::{Deref, DerefMut};

use super::{
    Described, Gradients, Group, Kind, Loaded, Module, NamedParameter, Place, PlaceMut, Slot, Transform, WeightAndBias,
};
use crate::error::Result;
use crate::ops::conv::{Conv, ConvGrads, Input};
use crate::tensor::Tensor;

/// A convolution with bias. When loaded it is an [`ops::conv::Conv`](Conv), which may keep its weights once more as kernels want
/// them.
pub struct ConvLayer<K: Kind = Loaded>(pub K::Conv);

impl<K: Kind> Module for ConvLayer<K> {
    type Kind = K;
    type As<B: Kind> = ConvLayer<B>;

    fn transform<B: Kind>(&self, transform: &mut impl Transform<K, B>) -> Result<ConvLayer<B>> {
        transform.conv(&self.0).map(ConvLayer)
    }

    fn visit<'a>(&'a self, visit: &mut dyn FnMut(Place<'a, K>)) {
        self.0.parts().into_iter().for_each(|part| visit(Place::Dense(part)));
    }

    fn visit_mut<'a>(&'a mut self, visit: &mut dyn FnMut(PlaceMut<'a, K>)) {
        self.0
            .parts_mut()
            .into_iter()
            .for_each(|part| visit(PlaceMut::Dense(part)));
    }
}

impl Deref for ConvLayer {
    type Target = Conv;

    fn deref(&self) -> &Conv {
        &self.0
    }
}

impl DerefMut for ConvLayer {
    fn deref_mut(&mut self) -> &mut Conv {
        &mut self.0
    }
}

/// What is known of a convolution before it is read.
#[derive(Clone, Debug)]
pub struct ConvMeta {
    /// `[outputs, inputs, kernel, kernel]` in checkpoints.
    pub weight: NamedParameter,
    /// `[outputs]`
    pub bias: NamedParameter,
    /// Height and width of the kernel.
    pub kernel: usize,
    /// Channels of its one or two sources.
    pub channels: Vec<usize>,
    /// How it sees its input, which decides how its weights are arranged for kernels; `None` leaves them as they are.
    pub arranged: Option<Input>,
}

impl WeightAndBias<NamedParameter> for ConvMeta {
    fn parts(&self) -> [&NamedParameter; 2] {
        [&self.weight, &self.bias]
    }

    fn parts_mut(&mut self) -> [&mut NamedParameter; 2] {
        [&mut self.weight, &mut self.bias]
    }
}

impl ConvLayer<Described> {
    /// The convolution `{name}.weight`, `{name}.bias` of one or two sources.
    pub fn new(
        group: Group,
        name: &str,
        kernel: usize,
        channels: &[usize],
        outputs: usize,
        arranged: Option<Input>,
    ) -> Self {
        let inputs = channels.iter().sum();
        ConvLayer(ConvMeta {
            weight: NamedParameter::one(group, format!("{name}.weight"), &[outputs, inputs, kernel, kernel]),
            bias: NamedParameter::one(group, format!("{name}.bias"), &[outputs]),
            kernel,
            channels: channels.to_vec(),
            arranged,
        })
    }
}

/// Places for the gradients of a convolution.
#[derive(Debug, Default)]
pub struct ConvSlots {
    /// `[outputs, taps · inputs]`
    pub weight: Slot,
    /// `[outputs]`
    pub bias: Slot,
}

impl WeightAndBias<Slot> for ConvSlots {
    fn parts(&self) -> [&Slot; 2] {
        [&self.weight, &self.bias]
    }

    fn parts_mut(&mut self) -> [&mut Slot; 2] {
        [&mut self.weight, &mut self.bias]
    }
}

impl ConvLayer<Gradients> {
    /// Whether there is a place for any gradient.
    pub fn wants_any(&self) -> bool {
        self.0.weight.is_some() || self.0.bias.is_some()
    }

    /// Runs `backward` with the places of the gradients of `conv`; where one of the two is frozen, with a place to forget it in.
    ///
    /// # Errors
    /// Those of `backward`, and when the device has no room.
    pub fn with_places<T>(
        &mut self,
        conv: &Conv,
        backward: impl FnOnce(Option<ConvGrads<'_>>) -> Result<T>,
    ) -> Result<T> {
        let ConvSlots { weight, bias } = &mut self.0;
        if weight.is_none() && bias.is_none() {
            return backward(None);
        }
        let spare = |slot: &Slot, like: &Tensor| {
            let make = || Tensor::zeros(&like.device(), like.shape(), like.dtype());
            slot.is_none().then(make).transpose()
        };
        let [like_weight, like_bias] = conv.parameters();
        let (mut no_weight, mut no_bias) = (spare(weight, like_weight)?, spare(bias, like_bias)?);
        let (Some(weight), Some(bias)) = (
            weight.as_mut().or(no_weight.as_mut()),
            bias.as_mut().or(no_bias.as_mut()),
        ) else {
            unreachable!("what has no slot got a spare one");
        };
        backward(Some(ConvGrads { weight, bias }))
    }
}
