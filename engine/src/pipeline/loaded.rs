//! A model on its device. Nothing of it changes after it is loaded, so that recorded steps may hold the addresses of its weights.

use super::blame::{self, of_file};
use super::files::ModelFiles;
use crate::checkpoint::Checkpoint;
use crate::device::MemoryTag;
use crate::error::{Error, Result};
use crate::model::Denoiser;
use crate::model::vae::VaeDecoder;
use crate::ops::to_rgb8::to_rgb8;
use crate::tensor::Tensor;

/// Pixels that [`LoadedModel::pictures`] decodes together.
const DECODED_PIXELS: usize = 1 << 20;

/// A transformer, and a latent model's VAE decoder.
pub struct LoadedModel {
    denoiser: Box<dyn Denoiser>,
    vae: Option<VaeDecoder>,
    /// The files of both, to look for what is to blame.
    checkpoints: Vec<Checkpoint>,
    /// Pixels along the side of a latent cell; 1 of a pixel model.
    cell: usize,
}

impl LoadedModel {
    /// Brings the model onto its device. `loaded(done, total)` is told of each tensor; an error from it ends the loading.
    ///
    /// # Errors
    /// When a tensor cannot be read, the device has no room, or `loaded` says so.
    pub fn load(files: &ModelFiles, loaded: &mut dyn FnMut(usize, usize) -> Result<()>) -> Result<Self> {
        // First what takes no time, so that its faults show before gigabytes are read.
        let vae = match files.vae_files() {
            Some((config, checkpoint)) => {
                let _tag = MemoryTag::Weights.scope();
                let vae = VaeDecoder::load(checkpoint, files.device(), config);
                Some(vae.map_err(|error| of_file(checkpoint, error))?)
            }
            None => None,
        };
        let transformer = files.transformer();
        let params = files
            .trunk()
            .over_blocks(&transformer.checkpoint, &transformer.spec.metas(), files.device())?;
        let denoiser = transformer.spec.load(&params, files.device(), loaded)?;
        let vae_checkpoint = files.vae_files().map(|(_, checkpoint)| checkpoint);
        let checkpoints = [&transformer.checkpoint].into_iter().chain(vae_checkpoint);
        Ok(LoadedModel {
            denoiser,
            vae,
            checkpoints: checkpoints.cloned().collect(),
            cell: files.cell(),
        })
    }

    /// The transformer.
    pub fn denoiser(&self) -> &dyn Denoiser {
        &*self.denoiser
    }

    /// Whether there is a VAE, so that what the transformer draws is a latent.
    pub fn is_latent(&self) -> bool {
        self.vae.is_some()
    }

    /// The images of what the transformer drew: latents through the VAE decoder, images as they are. f32
    /// `[batch, height, width, 3]`, about −1 to 1.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn decode(&self, drawn: &Tensor) -> Result<Tensor> {
        let Some(vae) = &self.vae else {
            return Ok(drawn.clone());
        };
        // One picture at a time: the decoder's maps are the largest tensors of a latent model.
        let one = |item| vae.decode(&drawn.narrow(item, 1)?);
        let first = one(0)?;
        let count = drawn.dim(0);
        if count == 1 {
            return Ok(first);
        }
        let mut extents = first.shape().to_vec();
        extents[0] = count;
        let mut images = Tensor::empty(&drawn.device(), extents.as_slice(), first.dtype())?;
        let elements = first.elements();
        images.copy_elements_from(0, &first)?;
        drop(first);
        for item in 1..count {
            images.copy_elements_from(item * elements, &one(item)?)?;
        }
        Ok(images)
    }

    /// The pictures of what the transformer drew as bytes on the host, one buffer of `height · width · 3` per item:
    /// [`LoadedModel::decode`] and [`LoadedModel::to_bytes`] for many small pictures, several at a time.
    ///
    /// # Errors
    /// When the device has no room, and [`Error::NotFinite`] naming the first picture that holds NaN or an infinity and the first
    /// weight that does.
    pub fn pictures(&self, drawn: &Tensor) -> Result<Vec<Vec<u8>>> {
        let pixels = drawn.dim(1) * drawn.dim(2) * self.cell * self.cell;
        let at_once = (DECODED_PIXELS / pixels.max(1)).max(1);
        let count = drawn.dim(0);
        let mut pictures = Vec::with_capacity(count);
        for first in (0..count).step_by(at_once) {
            let part = drawn.narrow(first, at_once.min(count - first))?;
            let images = match &self.vae {
                Some(vae) => vae.decode(&part)?,
                None => part,
            };
            let drawn = to_rgb8(&images)?.into_pictures(first, count);
            pictures.extend(drawn.map_err(|error| self.blame(error))?);
        }
        Ok(pictures)
    }

    /// The pictures of `images` as bytes on the host, one buffer of `height · width · 3` per item.
    ///
    /// # Errors
    /// [`Error::NotFinite`] naming the first picture that holds NaN or an infinity and the first weight that does; when the copy from
    /// the device fails.
    pub fn to_bytes(&self, images: &Tensor) -> Result<Vec<Vec<u8>>> {
        let pictures = to_rgb8(images)?.into_pictures(0, images.dim(0));
        pictures.map_err(|error| self.blame(error))
    }

    /// The error, and of a picture that is not finite the weight to blame.
    fn blame(&self, error: Error) -> Error {
        blame::blame(error, &self.checkpoints)
    }
}
