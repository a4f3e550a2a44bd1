//! The pictures of a data set as latents, made once.

use std::sync::mpsc::sync_channel;
use std::time::UNIX_EPOCH;

use rayon::prelude::*;

use super::features::{FeatureStore, StoreKey};
use super::metadata::Record;
use super::set::{DataSet, damage_of};
use super::sizing::PictureSize;
use crate::device::Device;
use crate::dist::World;
use crate::error::{Error, Result};
use crate::image_io::{Filter, RgbImage, read_cover};
use crate::model::vae::VaeEncoder;
use crate::ops::from_rgb8::from_rgb8;
use crate::tensor::{HostTensor as Features, Tensor};

/// Pictures that are decoded together.
const CHUNK: usize = 16;

/// Brings the latents of all pictures of `set` into `store`, and returns their keys. `load` brings the autoencoder onto the device when
/// some are missing; it is freed before this returns. Pictures that cannot be decoded are noted as damaged. Each rank encodes a share;
/// then every rank sees to it that all are there: those of ranks that do not share the folder are not, and are encoded once more.
/// `progress(done, missing)` is called after each picture of this rank; an error from it ends the work, and what was made so far stays.
///
/// # Errors
/// When the autoencoder cannot be loaded or makes latents that are not finite, too much is damaged, the disk does not take the
/// latents, or `progress` says so: on all ranks, when it happens on one.
pub fn encode_latents(
    world: &World,
    store: &FeatureStore,
    set: &DataSet,
    device: &Device,
    load: &dyn Fn() -> Result<VaeEncoder>,
    progress: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Vec<StoreKey>> {
    let (rank, ranks) = (world.rank(), world.size());
    let own = encode_wanted(store, set, device, load, &|index| index % ranks == rank, progress);
    let keys = world.together("latents", own)?;
    if world.is_solo() {
        return Ok(keys);
    }
    let all = encode_wanted(store, set, device, load, &|_| true, progress);
    world.together("all latents", all)
}

/// The latents of those pictures whose numbers `is_wanted`; the keys of all.
fn encode_wanted(
    store: &FeatureStore,
    set: &DataSet,
    device: &Device,
    load: &dyn Fn() -> Result<VaeEncoder>,
    is_wanted: &(dyn Fn(usize) -> bool + Sync),
    progress: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Vec<StoreKey>> {
    let pictures: Vec<(&Record, PictureSize)> = set.records().iter().zip(set.sizes().iter().copied()).collect();
    let keys: Vec<StoreKey> = pictures
        .iter()
        .map(|(record, size)| key(store, record, *size))
        .collect();
    let missing: Vec<usize> = (0..keys.len())
        .into_par_iter()
        .filter(|&index| is_wanted(index) && store.read(&keys[index]).is_none())
        .collect();
    if missing.is_empty() {
        return Ok(keys);
    }
    // Loaded for the first picture that can be decoded.
    let mut encoder = None;
    let (decoded, pictures_in_order) = sync_channel::<(usize, Result<RgbImage>)>(CHUNK);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Moved in, so that the receiver learns of the end.
            let decoded = decoded;
            for chunk in missing.chunks(CHUNK) {
                let decode = |&index: &usize| (index, decode(pictures[index].0, pictures[index].1));
                let images: Vec<_> = chunk.par_iter().map(decode).collect();
                // When nobody receives any more, the work has ended with an error.
                if images.into_iter().any(|image| decoded.send(image).is_err()) {
                    return;
                }
            }
        });
        let pictures_in_order = pictures_in_order;
        for (done, (index, image)) in pictures_in_order.iter().enumerate() {
            match image {
                Ok(image) => {
                    let encoder = match &encoder {
                        Some(encoder) => encoder,
                        None => encoder.insert(load()?),
                    };
                    let latent = encode(encoder, device, &image)?;
                    // Every picture is finite, so this is the autoencoder's fault, and that of all pictures.
                    if !latent.is_finite() {
                        let name = &pictures[index].0.name;
                        return Err(Error::not_finite(format!(
                            "the latent of {name}, so that the VAE's weights are damaged"
                        )));
                    }
                    store.write(&keys[index], &latent)?;
                }
                Err(error) => {
                    set.damages().note(damage_of(pictures[index].0, &error));
                    set.damages().check()?;
                }
            }
            progress(done + 1, missing.len())?;
        }
        Ok::<(), Error>(())
    })?;
    Ok(keys)
}

/// The entry of a picture as it lies on disk now, at a size.
fn key(store: &FeatureStore, record: &Record, size: PictureSize) -> StoreKey {
    let file = record.path.metadata().ok();
    let changed = file.as_ref().and_then(|file| file.modified().ok());
    let changed = changed.and_then(|changed| changed.duration_since(UNIX_EPOCH).ok());
    let path = record.path.canonicalize().unwrap_or_else(|_| record.path.clone());
    store.key(&[
        path.as_os_str().as_encoded_bytes(),
        &file.map_or(0, |file| file.len()).to_le_bytes(),
        &changed.unwrap_or_default().as_nanos().to_le_bytes(),
        size.to_string().as_bytes(),
    ])
}

fn decode(record: &Record, size: PictureSize) -> Result<RgbImage> {
    read_cover(&record.path, size.width, size.height, Filter::default())
}

fn encode(encoder: &VaeEncoder, device: &Device, image: &RgbImage) -> Result<Features> {
    let bytes = Tensor::from_slice(device, image.pixels(), [1, image.height(), image.width(), 3])?;
    let (latent, shape) = encoder.latent(&from_rgb8(&bytes)?)?;
    Ok(Features::from_f32(&latent, &shape))
}
