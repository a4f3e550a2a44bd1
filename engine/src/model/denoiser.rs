//! What sampling and training know of a model: [`Denoiser`] and [`Trainable`]. Each family implements them; nothing outside `model`
//! names a family.

use std::any::Any;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::layers::{NamedParameter, Slot};
use crate::model::config::ModelKind;
use crate::model::objective::{FlowMatching, Objective};
use crate::ops::conv::Canvas;
use crate::tensor::Tensor;

/// A batch of conditions, ready for any number of steps at one image size. What is in it is its family's own business.
pub struct Prepared {
    batch: usize,
    tokens: usize,
    inner: Box<dyn Any + Send + Sync>,
}

impl Prepared {
    /// What a family has prepared for `batch` items of `tokens` tokens each.
    pub(super) fn new(batch: usize, tokens: usize, inner: impl Any + Send + Sync) -> Self {
        Prepared {
            batch,
            tokens,
            inner: Box::new(inner),
        }
    }

    /// The number of items in the batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens of the longest sequence of an item, pads included.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// What the family has put in.
    pub(super) fn inner<T: 'static>(&self) -> Result<&T> {
        self.inner.downcast_ref().ok_or_else(of_another_family)
    }

    /// The same, to be changed.
    pub(super) fn inner_mut<T: 'static>(&mut self) -> Result<&mut T> {
        self.inner.downcast_mut().ok_or_else(of_another_family)
    }
}

fn of_another_family() -> Error {
    Error::invalid("these conditions were prepared for another kind of model")
}

/// The modulation vectors of all of a model's layers for a list of times, in one table; a family knows their order.
pub struct Modulations {
    /// f32 `[times, vectors, dim]`
    pub(super) table: Tensor,
}

impl Modulations {
    /// The vectors of `count` times from `start` on; a view, nothing is copied.
    ///
    /// # Errors
    /// When there are fewer times.
    pub fn narrow(&self, start: usize, count: usize) -> Result<Self> {
        Ok(Modulations {
            table: self.table.narrow(start, count)?,
        })
    }

    /// Overwrites the vectors with those of `source`, keeping their address.
    ///
    /// # Errors
    /// When the numbers of times differ, or the table is shared.
    pub fn copy_from(&mut self, source: &Modulations) -> Result<()> {
        self.table.copy_from(&source.table)
    }

    /// A copy with a table of its own.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn duplicate(&self) -> Result<Self> {
        Ok(Modulations {
            table: self.table.clone().into_unshared()?,
        })
    }
}

/// What a model takes and gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Latents or images.
    pub kind: ModelKind,
    /// Side of a patch, in pixels (latent model: latent cells).
    pub patch: usize,
    /// Channels of the image or latent.
    pub channels: usize,
}

/// Latent models draw this many pixels a side where nobody says; pixel models, a grid of [`DEFAULT_GRID`] patches.
const DEFAULT_LATENT_SIDE: usize = 1024;
const DEFAULT_GRID: usize = 64;

impl Geometry {
    /// Pixels of the side that the published models of such a patch were made for.
    pub fn published_side(&self) -> usize {
        match self.kind {
            ModelKind::Latent => DEFAULT_LATENT_SIDE,
            ModelKind::Pixel => DEFAULT_GRID.saturating_mul(self.patch),
        }
    }

    /// Image tokens of a picture of this height and width, pads not counted.
    pub fn image_tokens(&self, [height, width]: [usize; 2]) -> usize {
        let patch = self.patch.max(1);
        (height / patch) * (width / patch)
    }
}

/// A model that tells of a noisy picture where it should go.
///
/// A forward pass is split by what its parts depend on, so that nothing is computed twice while sampling: [`Denoiser::prepare`] once
/// per prompt and size, [`Denoiser::modulate`] once per schedule, [`Denoiser::forward`] or [`Denoiser::paint`] once per step.
pub trait Denoiser: Send + Sync {
    /// The device it lives on.
    fn device(&self) -> &Device;

    /// What it takes and gives.
    fn geometry(&self) -> Geometry;

    /// What a model of its family predicts where its files name no discrete schedule, and how the network is told a noise level. One that was
    /// trained for another objective is told that one's levels in the same way, see [`Discrete::of_family`].
    ///
    /// [`Discrete::of_family`]: crate::model::objective::Discrete::of_family
    fn objective(&self) -> &'static dyn Objective {
        &FlowMatching
    }

    /// What depends on captions and size alone. `captions` holds one `[1, tokens, caption_width]` tensor of features in the compute type per
    /// item, real tokens only; `size` is height and width in pixels (latent model: latent cells).
    ///
    /// # Errors
    /// When the size is no multiple of the patch, a caption is empty or has another width, or the device has no room.
    fn prepare(&self, captions: &[&Tensor], size: [usize; 2]) -> Result<Prepared>;

    /// Overwrites prepared conditions with those of other captions, keeping every address, so that recorded steps go on to read
    /// them. The captions must have as many tokens, item by item, as those before.
    ///
    /// # Errors
    /// When they have not, or as [`Denoiser::prepare`].
    fn prepare_into(&self, captions: &[&Tensor], prepared: &mut Prepared) -> Result<()>;

    /// The modulation vectors for model times, one entry per time; `pooled` `[items, width]` are conditions that join the times, for
    /// families that have such.
    ///
    /// # Errors
    /// When the family takes no pooled conditions, or the device has no room.
    fn modulate(&self, times: &[f32], pooled: Option<&Tensor>) -> Result<Modulations>;

    /// What the model predicts (with flow matching the velocity noise − image) for `image` `[batch, height, width, channels]` in the
    /// compute type, as f32 of the same shape. `modulations` holds one time for all items, or one per item.
    ///
    /// # Errors
    /// When shapes do not fit what was prepared, or the device has no room.
    fn forward(&self, image: &Tensor, prepared: &Prepared, modulations: &Modulations) -> Result<Tensor>;

    /// Whether [`Denoiser::paint`] can do without a prediction of the picture's size, which makes it the better way to take a step.
    fn paints(&self) -> bool {
        false
    }

    /// The prediction of [`Denoiser::forward`], as the result that goes onto `canvas`. The canvas may be the picture that `image` was
    /// converted from.
    ///
    /// # Errors
    /// As [`Denoiser::forward`], and for a model that does not paint.
    fn paint(
        &self,
        _image: &Tensor,
        _prepared: &Prepared,
        _modulations: &Modulations,
        _canvas: Canvas<'_>,
    ) -> Result<()> {
        Err(Error::invalid("this model does not paint onto a canvas"))
    }
}

/// Noisy pictures in training.
#[derive(Clone, Copy, Debug)]
pub struct Noisy<'a> {
    /// `[batch, height, width, channels]` in the compute type.
    pub image: &'a Tensor,
    /// The caption features of each item, `[1, tokens, width]` in the compute type, real tokens only.
    pub captions: &'a [&'a Tensor],
    /// The model's time of each item.
    pub times: &'a [f32],
}

/// Makes of a prediction (f32) the gradient of the loss, in the compute type.
pub type LossGradient<'a> = dyn FnMut(&Tensor) -> Result<Tensor> + 'a;

/// Told that a backward pass adds nothing more to the gradients of a part of the model: the number of the part's first parameter in
/// the model's description, and the places of all of its parameters.
pub type Finished<'a> = dyn FnMut(usize, Vec<&mut Slot>) -> Result<()> + 'a;

/// A model with places for the gradients of those of its parameters that are trained. All lists have the order of the model's
/// description.
pub trait Trainable: Send + Sync {
    /// The model, for sampling.
    fn denoiser(&self) -> &dyn Denoiser;

    /// Every parameter.
    fn weights(&self) -> Vec<&Tensor>;

    /// A place for every parameter's gradient.
    fn slots(&self) -> Vec<&Slot>;

    /// Both, to be changed; [`Trainable::rearrange`] after the weights.
    fn weights_and_slots_mut(&mut self) -> (Vec<&mut Tensor>, Vec<&mut Slot>);

    /// Brings what kernels keep of the weights in forms of their own up to date, after parameters have changed.
    ///
    /// # Errors
    /// When the device refuses.
    fn rearrange(&mut self) -> Result<()>;

    /// What the model predicts, as f32, one time per item.
    ///
    /// # Errors
    /// When shapes do not fit or the device has no room.
    fn predict(&self, noisy: Noisy<'_>) -> Result<Tensor>;

    /// Predicts as [`Trainable::predict`], asks `loss` for the gradient of the prediction, and adds every trained parameter's gradient
    /// to its place. `finished` is told of parts that are finished, in the order of [`Trainable::finish_order`]; parts that the
    /// backward pass does not reach may be left out.
    ///
    /// # Errors
    /// Those of `loss` and `finished`; when shapes do not fit or the device has no room.
    fn accumulate(&mut self, noisy: Noisy<'_>, loss: &mut LossGradient<'_>, finished: &mut Finished<'_>) -> Result<()>;

    /// The numbers of all parameters in the model's description, in the order in which a backward pass finishes their gradients; any
    /// order for a family that does not tell when they are.
    fn finish_order(&self) -> Vec<usize> {
        (0..self.slots().len()).collect()
    }
}

/// What is trained, and how gradients are made.
pub struct TrainingChoice<'a> {
    /// Whether a parameter is trained.
    pub trains: &'a dyn Fn(&NamedParameter) -> Result<bool>,
    /// Whether a block keeps its input alone and is run again in the backward pass, given whether it is trained.
    pub recomputes: &'a dyn Fn(bool) -> bool,
    /// Whether the output part keeps what its activations read.
    pub keep_sums: bool,
}
