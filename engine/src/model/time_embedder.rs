//! The timestep embedding that families share: sinusoids and a two-layer perceptron.

use crate::device::Device;
use crate::dtype::DType;
use crate::error::Result;
use crate::layers::{Described, Gradients, Group, Linear, module};
use crate::ops::linear::InputActivation;
use crate::ops::timestep::timestep_embedding;
use crate::tensor::Tensor;

module! {
    /// Sinusoid and a two-layer perceptron.
    pub struct TimeEmbedder<K> {
        /// `[hidden, frequencies]`, with bias unless described without.
        pub first: Linear<K>,
        /// `[width, hidden]`, likewise.
        pub second: Linear<K>,
        ;
        frequencies: usize,
        /// What times are multiplied by before they are embedded, in thousands; 1 but for unusual configurations.
        scale: f32,
    }
}

impl TimeEmbedder<Described> {
    /// The embedder whose layers are `{names[0]}` and `{names[1]}`, of these widths: frequencies, hidden, embedding.
    pub(super) fn describe(names: [&str; 2], [frequencies, hidden, width]: [usize; 3], scale: f32) -> Self {
        TimeEmbedder {
            first: Linear::new(Group::Embedder, names[0], hidden, frequencies).with_bias(),
            second: Linear::new(Group::Embedder, names[1], width, hidden).with_bias(),
            frequencies,
            scale,
        }
    }

    /// The same embedder, whose layers have no biases.
    pub(super) fn without_bias(mut self) -> Self {
        (self.first.bias, self.second.bias) = (None, None);
        self
    }
}

impl TimeEmbedder {
    /// The sinusoids of the times, what the first layer makes of them, and the embeddings; f32.
    pub(super) fn layers(&self, device: &Device, times: &[f32]) -> Result<[Tensor; 3]> {
        const MAX_PERIOD: f32 = 10_000.0;
        let scaled: Vec<f32> = times.iter().map(|time| time * self.scale).collect();
        let sinusoids = timestep_embedding(&scaled, self.frequencies, MAX_PERIOD);
        let sinusoids = Tensor::from_slice(device, &sinusoids, [times.len(), self.frequencies])?;
        let hidden = self.first.forward_vectors(&sinusoids, InputActivation::None)?;
        let embeddings = self.second.forward_vectors(&hidden, InputActivation::Silu)?;
        Ok([sinusoids, hidden, embeddings])
    }

    /// Adds the layers' gradients for that of the embeddings.
    pub(super) fn backward(
        &self,
        dc: &Tensor,
        [sinusoids, hidden]: [&Tensor; 2],
        gradients: &mut TimeEmbedder<Gradients>,
    ) -> Result<()> {
        let mut d_hidden = Tensor::zeros(&dc.device(), hidden.shape(), DType::F32)?;
        let (silu, none) = (InputActivation::Silu, InputActivation::None);
        self.second
            .backward_vectors(dc, hidden, silu, &mut gradients.second, Some(&mut d_hidden))?;
        self.first
            .backward_vectors(&d_hidden, sinusoids, none, &mut gradients.first, None)
    }
}
