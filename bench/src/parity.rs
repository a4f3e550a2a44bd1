//! One component of a model, run on given inputs and compared with a reference.

mod gradient;

use std::collections::BTreeMap;
use std::path::Path;

use l2p_engine::checkpoint::{Checkpoint, ModelPaths, PathOverrides, Values, read_values};
use l2p_engine::device::MemoryTag;
use l2p_engine::model::Precision;
use l2p_engine::model::config::{TextConfig, VaeConfig};
use l2p_engine::model::detailer::Detailer;
use l2p_engine::model::text::TextEncoder;
use l2p_engine::model::vae::VaeDecoder;
use l2p_engine::{Device, Error, Result, Tensor};
use serde::Serialize;

pub use self::gradient::{Steps, Training, check_gradients};
use crate::timing::samples;

/// What can be checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Component {
    /// A whole transformer: `x` [B, C, H, W], `t` [B] = 1 − sigma, `cap.0`, `cap.1`, … [tokens, width]; gives `v`, the velocity.
    Dit,
    /// A Detailer Head: `x` [B, 3, H, W], `c` [B, dim, h, w]; gives `v`.
    Head,
    /// A text encoder: `input_ids` [L]; gives `hidden` [L, width].
    Text,
    /// A VAE decoder: `latent` [B, C, h, w]; gives `image` [B, 3, 8h, 8w].
    Vae,
}

/// How one output compares.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// The output's name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// ‖found − reference‖ / ‖reference‖
    pub error: f64,
    /// The largest absolute difference.
    pub max_abs: f64,
}

/// What a check found.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// By output.
    pub outputs: Vec<Comparison>,
    /// Device time of each timed run, in milliseconds.
    pub samples_ms: Vec<f64>,
    /// The most device memory held at once during a run.
    pub peak_bytes: u64,
    /// The same above what weights and inputs hold.
    pub peak_bytes_above_resident: u64,
}

/// The inputs and expected outputs of a file.
struct Io<'a> {
    path: &'a Path,
    values: BTreeMap<String, Values>,
}

impl Io<'_> {
    fn take(&mut self, name: &str, rank: usize) -> Result<Values> {
        let values = self
            .values
            .remove(name)
            .ok_or_else(|| Error::file(self.path, format!("holds no tensor `{name}`")))?;
        if values.shape.len() != rank {
            return Err(Error::file(
                self.path,
                format!("tensor `{name}` has shape {:?}, expected {rank} extents", values.shape),
            ));
        }
        Ok(values)
    }

    /// Planes `[B, C, H, W]` as an image tensor `[B, H, W, C]`, in the compute type or in f32.
    fn image(&mut self, name: &str, device: &Device, f32: bool) -> Result<Tensor> {
        let planes = self.take(name, 4)?;
        let [batch, channels, height, width] = [planes.shape[0], planes.shape[1], planes.shape[2], planes.shape[3]];
        let cells = height * width;
        let values: Vec<f32> = planes
            .values
            .chunks(cells * channels)
            .flat_map(|item| transpose(item, channels, cells))
            .collect();
        let shape = [batch, height, width, channels];
        match f32 {
            true => Tensor::from_slice(device, &values, shape),
            false => Tensor::from_f32(device, &values, shape),
        }
    }

    /// The times `t` and the captions `cap.0`, `cap.1`, … `[1, tokens, width]` in the compute type, for `batch` images.
    fn conditions(&mut self, batch: usize, device: &Device) -> Result<(Vec<f32>, Vec<Tensor>)> {
        let times = self.take("t", 1)?.values;
        let mut captions = Vec::new();
        while self.values.contains_key(&format!("cap.{}", captions.len())) {
            let caption = self.take(&format!("cap.{}", captions.len()), 2)?;
            let shape = [1, caption.shape[0], caption.shape[1]];
            captions.push(Tensor::from_f32(device, &caption.values, shape)?);
        }
        if captions.len() != batch || times.len() != batch {
            let found = format!(
                "{} captions and {} times for {batch} images",
                captions.len(),
                times.len()
            );
            return Err(Error::file(self.path, format!("holds {found}")));
        }
        Ok((times, captions))
    }

    /// Compares a found image `[B, H, W, C]` with expected planes.
    fn compare_image(&mut self, name: &str, found: &Tensor) -> Result<Comparison> {
        let [batch, height, width, channels] = [found.dim(0), found.dim(1), found.dim(2), found.dim(3)];
        let values = found.to_vec_f32()?;
        let planes = values
            .chunks(height * width * channels)
            .flat_map(|item| transpose(item, height * width, channels));
        self.compare(name, planes.collect(), vec![batch, channels, height, width])
    }

    fn compare(&mut self, name: &str, found: Vec<f32>, shape: Vec<usize>) -> Result<Comparison> {
        let expected = self.take(name, shape.len())?;
        if expected.shape != shape {
            return Err(Error::file(
                self.path,
                format!(
                    "tensor `{name}` has shape {:?}, the model gives {shape:?}",
                    expected.shape
                ),
            ));
        }
        let (mut squares, mut norm, mut max_abs) = (0.0f64, 0.0f64, 0.0f64);
        for (found, expected) in found.iter().zip(&expected.values) {
            let (found, expected) = (f64::from(*found), f64::from(*expected));
            // A value that is no number must not pass: `max` would drop it.
            let difference = if found.is_finite() {
                (found - expected).abs()
            } else {
                f64::INFINITY
            };
            squares += difference * difference;
            norm += expected * expected;
            max_abs = max_abs.max(difference);
        }
        Ok(Comparison {
            name: name.into(),
            shape,
            error: squares.sqrt() / norm.sqrt().max(f64::MIN_POSITIVE),
            max_abs,
        })
    }
}

fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..values.len())
        .map(|index| values[index % rows * columns + index / rows])
        .collect()
}

/// Loads the component from `model`, its blocks' weights (of dit and text) kept as `precision` says, runs it on the inputs of `io`, compares, and times `repeats` further runs.
///
/// # Errors
/// When a file is missing or damaged, the component does not fit the inputs, or the device has no room.
pub fn check(
    component: Component,
    model: &Path,
    precision: &Precision,
    io: &Path,
    device: &Device,
    repeats: usize,
) -> Result<Outcome> {
    let mut io = Io {
        path: io,
        values: read_values(io)?,
    };
    match component {
        Component::Dit => check_dit(model, precision, &mut io, device, repeats),
        Component::Head => check_head(model, &mut io, device, repeats),
        Component::Text => check_text(model, precision, &mut io, device, repeats),
        Component::Vae => check_vae(model, &mut io, device, repeats),
    }
}

fn check_dit(model: &Path, precision: &Precision, io: &mut Io<'_>, device: &Device, repeats: usize) -> Result<Outcome> {
    let transformer = ModelPaths::resolve(model, &PathOverrides::default())?.open_transformer()?;
    let dit = transformer
        .spec
        .load(&precision.over(&transformer.checkpoint), device, &mut |_, _| Ok(()))?;
    let x = io.image("x", device, false)?;
    let (times, captions) = io.conditions(x.dim(0), device)?;
    let captions: Vec<&Tensor> = captions.iter().collect();
    let run = || {
        let prepared = dit.prepare(&captions, [x.dim(1), x.dim(2)])?;
        dit.forward(&x, &prepared, &dit.modulate(&times, None)?)
    };
    finish(device, repeats, run, |found| io.compare_image("v", found))
}

fn check_head(model: &Path, io: &mut Io<'_>, device: &Device, repeats: usize) -> Result<Outcome> {
    let checkpoint = Checkpoint::open_transformer(model)?;
    let head = {
        let _tag = MemoryTag::Weights.scope();
        Detailer::load(&checkpoint, device, "local_decoder")?
    };
    let (x, c) = (io.image("x", device, false)?, io.image("c", device, false)?);
    finish(
        device,
        repeats,
        || head.forward(&x, &c),
        |found| io.compare_image("v", found),
    )
}

fn check_text(
    model: &Path,
    precision: &Precision,
    io: &mut Io<'_>,
    device: &Device,
    repeats: usize,
) -> Result<Outcome> {
    let folder = Some(model.join("text_encoder"))
        .filter(|folder| folder.is_dir())
        .unwrap_or(model.into());
    let config = TextConfig::read(&folder)?;
    let encoder = {
        let _tag = MemoryTag::Weights.scope();
        TextEncoder::load(
            &precision.over(&Checkpoint::open_text_encoder(&folder)?),
            device,
            &config,
        )?
    };
    let ids: Vec<u32> = io
        .take("input_ids", 1)?
        .values
        .into_iter()
        .map(|id| id as u32)
        .collect();
    finish(
        device,
        repeats,
        || encoder.encode(&ids),
        |found| io.compare("hidden", found.to_vec_f32()?, vec![found.dim(1), found.dim(2)]),
    )
}

fn check_vae(model: &Path, io: &mut Io<'_>, device: &Device, repeats: usize) -> Result<Outcome> {
    let folder = Some(model.join("vae"))
        .filter(|folder| folder.is_dir())
        .unwrap_or(model.into());
    let decoder = {
        let _tag = MemoryTag::Weights.scope();
        VaeDecoder::load(&Checkpoint::open_vae(&folder)?, device, &VaeConfig::read(&folder)?)?
    };
    let latent = io.image("latent", device, true)?;
    finish(
        device,
        repeats,
        || decoder.decode(&latent),
        |found| io.compare_image("image", found),
    )
}

/// Runs once to compare, with the peak of memory, and then for time.
fn finish(
    device: &Device,
    repeats: usize,
    run: impl Fn() -> Result<Tensor>,
    compare: impl FnOnce(&Tensor) -> Result<Comparison>,
) -> Result<Outcome> {
    // The first run loads kernels and makes the library's workspace; it counts for nothing.
    drop(run()?);
    device.synchronize()?;
    device.reset_memory_peaks();
    let resident = device.memory_report().total.current;
    let found = run()?;
    device.synchronize()?;
    let peak = device.memory_report().total.peak;
    let outputs = vec![compare(&found)?];
    drop(found);
    let samples_ms = samples(device, usize::from(repeats > 0), repeats, || run().map(drop))?;
    Ok(Outcome {
        outputs,
        samples_ms,
        peak_bytes: peak,
        peak_bytes_above_resident: peak - resident,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_number_passes_no_comparison() {
        let expected = Values {
            shape: vec![2],
            values: vec![1.0, 2.0],
        };
        let mut io = Io {
            path: Path::new("io"),
            values: [("v".to_owned(), expected)].into(),
        };
        let comparison = io.compare("v", vec![1.0, f32::NAN], vec![2]).unwrap();
        assert!(comparison.error.is_infinite() && comparison.max_abs.is_infinite());
    }
}
