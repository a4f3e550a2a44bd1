//! Numbers from and for files: noise, caption features, raw images.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use l2p_engine::checkpoint::{Values, ensure_writable, read_chosen_values, write_values};
use l2p_engine::limits::CaptionTokens;
use l2p_engine::pipeline::{ModelFiles, Settings};
use l2p_engine::serve::{self, Caption};
use l2p_engine::{Error, HostTensor, Result, shown_name};

/// What pictures are to follow.
#[derive(Default)]
pub struct Captions {
    /// One per picture.
    pub prompts: Vec<Caption>,
    /// What to move away from, for each picture; empty without guidance.
    pub negatives: Vec<Caption>,
}

/// The noise of `path`, f32 `[1, height, width, channels]`, of the size that the settings need.
pub fn read_noise(path: &Path, files: &ModelFiles, settings: &Settings) -> Result<HostTensor> {
    let [height, width, channels] = files.canvas(settings);
    let mut values = read_chosen_values(path, &mut |name, shape| {
        if name != "noise" {
            return Ok(false);
        }
        let planes = shape.strip_prefix(&[1]).filter(|planes| planes.len() == 3);
        match *planes.unwrap_or(shape) == [channels, height, width] {
            true => Ok(true),
            false => Err(Error::invalid(format!(
                "tensor `noise` has shape {shape:?}, expected [{channels}, {height}, {width}]"
            ))),
        }
    })?;
    let noise = values
        .remove("noise")
        .ok_or_else(|| Error::file(path, "holds no tensor `noise`"))?;
    let values = transpose(&noise.values, channels, height * width);
    Ok(HostTensor::from_f32(&values, &[1, height, width, channels]))
}

/// The caption features `cap.0`, … of `path` (and `neg.0`, … with guidance), one per picture or one for all.
pub fn read_embeds(path: &Path, files: &ModelFiles, pictures: usize, guided: bool) -> Result<Captions> {
    let width = files.spec().caption_width();
    let values = read_chosen_values(path, &mut |name, shape| {
        if !(is_one("cap", name) || guided && is_one("neg", name)) {
            return Ok(false);
        }
        let name = shown_name(name);
        match *shape {
            [tokens, found] if found == width => match CaptionTokens::checked(tokens) {
                Ok(_) => Ok(true),
                Err(reason) => Err(Error::invalid(format!("tensor `{name}` has {tokens} tokens: {reason}"))),
            },
            _ => Err(Error::invalid(format!(
                "tensor `{name}` has shape {shape:?}, expected [tokens, {width}]"
            ))),
        }
    })?;
    let list = |prefix: &str| {
        read_list(&values, prefix, pictures).map_err(|error| match error {
            Error::Invalid(reason) => Error::file(path, reason),
            error => error,
        })
    };
    Ok(Captions {
        prompts: list("cap")?,
        negatives: if guided { list("neg")? } else { Vec::new() },
    })
}

/// Whether a tensor is one of a list.
fn is_one(prefix: &str, name: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('.'))
}

/// The tensors `{prefix}.0`, … , as many as there are pictures.
fn read_list(values: &BTreeMap<String, Values>, prefix: &str, pictures: usize) -> Result<Vec<Caption>> {
    let found = values.keys().filter(|name| is_one(prefix, name)).count();
    if found > 1 && found != pictures {
        return Err(Error::invalid(format!(
            "holds {found} tensors `{prefix}.N` for {}; one each or one for all are needed",
            super::count(pictures, "picture")
        )));
    }
    let read = |index: usize| {
        let name = format!("{prefix}.{index}");
        match values.get(&name) {
            None if index == 0 && prefix == "neg" => Err(Error::invalid(
                "holds no tensor `neg.0`, which guidance needs: add it, or draw with --cfg 1",
            )),
            None => Err(Error::invalid(format!("holds no tensor `{name}`"))),
            Some(Values { shape, values }) => {
                let features = HostTensor::from_f32(values, &[1, shape[0], shape[1]]);
                Ok(Caption::Features(Arc::new(features)))
            }
        }
    };
    let captions: Vec<Caption> = (0..found.max(1)).map(read).collect::<Result<_>>()?;
    Ok((0..pictures)
        .map(|picture| captions[picture.min(captions.len() - 1)].clone())
        .collect())
}

/// The numbers behind the pictures, collected while they are drawn.
pub struct RawImages {
    path: PathBuf,
    images: Values,
    /// Of a latent model.
    latents: Option<Values>,
}

impl RawImages {
    /// Nothing yet.
    ///
    /// # Errors
    /// When no file can be written there.
    pub fn new(path: &Path) -> Result<Self> {
        ensure_writable(path)?;
        Ok(RawImages {
            path: path.into(),
            images: Values::default(),
            latents: None,
        })
    }

    /// Adds a batch.
    pub fn add(&mut self, raw: &serve::RawImages) {
        append(&mut self.images, to_planes(&raw.images));
        if let Some(latents) = &raw.latents {
            append(self.latents.get_or_insert_default(), to_planes(latents));
        }
    }

    /// Writes the file: `image`, and `latent` where the model has one, as `[pictures, channels, height, width]`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(self) -> Result<()> {
        let mut tensors = vec![("image".to_owned(), self.images)];
        tensors.extend(self.latents.map(|latents| ("latent".to_owned(), latents)));
        write_values(&self.path, &tensors)
    }
}

/// Appends a batch to a batch.
fn append(all: &mut Values, mut more: Values) {
    if all.shape.is_empty() {
        *all = more;
        return;
    }
    all.shape[0] += more.shape[0];
    all.values.append(&mut more.values);
}

/// `[batch, height, width, channels]` as `[batch, channels, height, width]`.
fn to_planes(images: &HostTensor) -> Values {
    let &[batch, height, width, channels] = images.shape() else {
        return Values::default();
    };
    let values = images.to_f32();
    let planes = values
        .chunks(height * width * channels)
        .flat_map(|item| transpose(item, height * width, channels));
    Values {
        shape: vec![batch, channels, height, width],
        values: planes.collect(),
    }
}

/// A row-major `[rows, columns]` matrix as `[columns, rows]`.
fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..values.len())
        .map(|index| values[index % rows * columns + index / rows])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::transpose;

    #[test]
    fn planes_become_channels() {
        assert_eq!(
            transpose(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, 3),
            [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]
        );
    }
}
