//! Training steps of a whole transformer on given inputs: loss and gradients against a reference, and what the steps that follow do.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::bf16;
use l2p_engine::checkpoint::{
    Content, Fetch, Float, ModelPaths, OutputFile, OutputTensor, PathOverrides, read_values, write_file,
};
use l2p_engine::model::Precision;
use l2p_engine::model::objective::Objective;
use l2p_engine::train::{AdamWOptions, Batch, Policy, Recompute, StatePart, TrainOptions, TrainableModel};
use l2p_engine::{DType, Device, Error, Result, Tensor};
use rayon::prelude::*;

use super::{Comparison, Io, Outcome};
use crate::timing::samples;

/// What is trained, and how.
#[derive(Clone, Debug)]
pub struct Training {
    /// Which tensors are trained.
    pub policy: Policy,
    /// Which blocks are computed twice.
    pub recompute: Recompute,
    /// How the weights of main blocks that are not trained are kept.
    pub trunk: Precision,
    /// Optimizer steps on the same batch after the comparison.
    pub steps: usize,
    /// Their learning rate; the optimizer's other settings are the published ones.
    pub learning_rate: f32,
    /// Where loss and gradients are to be written.
    pub write: Option<PathBuf>,
}

/// What the optimizer steps did.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Steps {
    /// The loss before each of them.
    pub losses: Vec<f32>,
    /// The norm of each one's gradients.
    pub norms: Vec<f32>,
    /// Tensors that the policy freezes.
    pub frozen_tensors: usize,
    /// Those of them that have other bits after the steps; none, or something is wrong.
    pub frozen_changed: Vec<String>,
}

/// Loads the transformer from `model` and trains it on the batch of `io`: `x`, `t`, captions, and `target`, what the velocity
/// should be. Compares `loss` and `grad.NAME` for each trained tensor NAME where the file holds them.
///
/// # Errors
/// When a file is missing or damaged, holds nothing to compare with though nothing is to be written, or the device has no room.
pub fn check_gradients(
    model: &Path,
    io: &Path,
    device: &Device,
    training: &Training,
    repeats: usize,
) -> Result<(Outcome, Steps)> {
    let mut io = Io {
        path: io,
        values: read_values(io)?,
    };
    let expects = io.values.keys().any(|name| name == "loss" || name.starts_with("grad."));
    if !expects && training.write.is_none() {
        return Err(Error::file(
            io.path,
            "holds no `loss` and no `grad.NAME` to compare with, and no file to write them to was named",
        ));
    }
    let transformer = ModelPaths::resolve(model, &PathOverrides::default())?.open_transformer()?;
    let options = TrainOptions {
        policy: training.policy.clone(),
        recompute: training.recompute,
        adamw: AdamWOptions::default(),
        clip_norm: None,
        ema_decay: None,
        trunk: training.trunk.clone(),
    };
    let mut model = TrainableModel::load(
        &*transformer.spec,
        &transformer.checkpoint,
        device,
        &options,
        &mut |_, _| Ok(()),
    )?;
    let inputs = Inputs::take(&mut io, device, model.objective())?;

    device.synchronize()?;
    device.reset_memory_peaks();
    let resident = device.memory_report().total.current;
    let loss = inputs.accumulate(&mut model)?;
    device.synchronize()?;
    let peak = device.memory_report().total.peak;
    let outputs = match expects {
        true => compare(&mut io, loss, &model)?,
        false => Vec::new(),
    };
    if let Some(path) = &training.write {
        write(path, loss, &model)?;
    }
    let steps = take_steps(&mut model, &inputs, training, loss)?;
    let samples_ms = samples(device, usize::from(repeats > 0), repeats, || {
        inputs.batch(|batch| model.accumulate(batch, 1.0)).map(drop)
    })?;
    let outcome = Outcome {
        outputs,
        samples_ms,
        peak_bytes: peak,
        peak_bytes_above_resident: peak - resident,
    };
    Ok((outcome, steps))
}

/// A batch.
struct Inputs {
    images: Tensor,
    noise: Tensor,
    sigmas: Vec<f32>,
    captions: Vec<Tensor>,
}

impl Inputs {
    /// The images and the noise whose mixture at each item's sigma is `x`, and whose difference is `target`: image = x − sigma · target,
    /// noise = x + (1 − sigma) · target. A flow's time is an affine function of sigma, given by what the model is told at 0 and at 1.
    fn take(io: &mut Io<'_>, device: &Device, objective: &dyn Objective) -> Result<Self> {
        let x = io.image("x", &Device::Cpu, true)?;
        let target = io.image("target", &Device::Cpu, true)?;
        if target.shape() != x.shape() {
            let found = format!("`target` of shape {}, expected {} as of `x`", target.shape(), x.shape());
            return Err(Error::file(io.path, format!("holds a {found}")));
        }
        let (times, captions) = io.conditions(x.dim(0), device)?;
        let [at_picture, at_noise] = [0.0, 1.0].map(|level| objective.time(level));
        let sigma = |t: &f32| (t - at_picture) / (at_noise - at_picture);
        let sigmas: Vec<f32> = times.iter().map(sigma).collect();
        let item = x.elements() / sigmas.len();
        let (x_values, target_values) = (x.as_slice::<f32>()?, target.as_slice::<f32>()?);
        let moved = |by: &dyn Fn(f32) -> f32| {
            let pairs = x_values.iter().zip(target_values).enumerate();
            let values: Vec<f32> = pairs
                .map(|(index, (x, target))| x + by(sigmas[index / item]) * target)
                .collect();
            Tensor::from_slice(device, &values, x.shape())
        };
        Ok(Inputs {
            images: moved(&|sigma| -sigma)?,
            noise: moved(&|sigma| 1.0 - sigma)?,
            sigmas,
            captions,
        })
    }

    fn batch<T>(&self, with: impl FnOnce(&Batch<'_>) -> T) -> T {
        let captions: Vec<&Tensor> = self.captions.iter().collect();
        with(&Batch {
            images: &self.images,
            noise: &self.noise,
            sigmas: &self.sigmas,
            captions: &captions,
        })
    }

    /// Adds the batch's gradients; its loss.
    fn accumulate(&self, model: &mut TrainableModel) -> Result<f32> {
        let loss = self.batch(|batch| model.accumulate(batch, 1.0))?;
        Ok(loss.to_vec::<f32>()?[0])
    }
}

fn compare(io: &mut Io<'_>, loss: f32, model: &TrainableModel) -> Result<Vec<Comparison>> {
    let mut outputs = vec![io.compare("loss", vec![loss], vec![1])?];
    for tensor in model.trained() {
        let gradient = tensor.read(StatePart::Gradient)?.unwrap_or_default();
        outputs.push(io.compare(&format!("grad.{}", tensor.name), gradient, tensor.shape.clone())?);
    }
    Ok(outputs)
}

/// Writes `loss` (f32) and `grad.NAME` (in the compute type, in which gradients are kept).
fn write(path: &Path, loss: f32, model: &TrainableModel) -> Result<()> {
    let float = match model.denoiser().device().compute_dtype() {
        DType::Bf16 => Float::Bf16,
        _ => Float::F32,
    };
    let loss = [loss];
    let trained = model.trained();
    let gradients = trained.iter().map(|tensor| OutputTensor {
        name: format!("grad.{}", tensor.name),
        dtype: float.dtype(),
        shape: tensor.shape.clone(),
        content: Content::Fetched(
            Fetch::new(|| Ok(tensor.read(StatePart::Gradient)?.unwrap_or_default())),
            float,
        ),
    });
    let loss = OutputTensor {
        name: "loss".into(),
        dtype: Float::F32.dtype(),
        shape: vec![1],
        content: Content::Values(&loss),
    };
    let all = gradients.chain([loss]).collect();
    write_file(path, &OutputFile::new(all, BTreeMap::new()), true, &mut ())?;
    Ok(())
}

/// Steps of the optimizer, the first one by the gradients that are there.
fn take_steps(model: &mut TrainableModel, inputs: &Inputs, training: &Training, first_loss: f32) -> Result<Steps> {
    let mut steps = Steps {
        losses: Vec::new(),
        norms: Vec::new(),
        frozen_tensors: model.frozen().len(),
        frozen_changed: Vec::new(),
    };
    if training.steps == 0 {
        return Ok(steps);
    }
    let before = digests(model)?;
    for step in 0..training.steps {
        let loss = match step {
            0 => first_loss,
            _ => inputs.accumulate(model)?,
        };
        steps.losses.push(loss);
        steps.norms.push(model.step(training.learning_rate)?.read()?.0);
    }
    let pairs = before.into_iter().zip(digests(model)?);
    let changed = pairs.filter(|(before, after)| before != after);
    steps.frozen_changed = changed.map(|((name, _), _)| name).collect();
    Ok(steps)
}

/// A number for the bits of each frozen tensor.
fn digests(model: &TrainableModel) -> Result<Vec<(String, u64)>> {
    let tensors = model.frozen().into_iter();
    tensors
        .map(|(name, tensor)| {
            let digest = match tensor.dtype() {
                DType::Bf16 => digest(&tensor.to_vec::<bf16>()?, |value| value.to_bits().into()),
                // Codes of eight bits.
                DType::U8 => digest(&tensor.to_vec::<u8>()?, |value| u64::from(*value)),
                _ => digest(&tensor.to_vec::<f32>()?, |value| value.to_bits().into()),
            };
            Ok((name, digest))
        })
        .collect()
}

/// FNV-1a, by element: of runs, and of their results. Each step is a bijection, so that one changed element always shows.
fn digest<T: Sync>(values: &[T], bits: impl Fn(&T) -> u64 + Sync) -> u64 {
    const RUN: usize = 1 << 16;
    let fold = |hash: u64, bits: u64| (hash ^ bits).wrapping_mul(0x0000_0100_0000_01b3);
    let runs = values.par_chunks(RUN);
    let hashes: Vec<u64> = runs
        .map(|run| {
            run.iter()
                .fold(0xcbf2_9ce4_8422_2325, |hash, value| fold(hash, bits(value)))
        })
        .collect();
    hashes.into_iter().fold(0xcbf2_9ce4_8422_2325, fold)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_changed_bit_changes_the_digest() {
        let values: Vec<f32> = (0..200_000).map(|index| index as f32).collect();
        let of = |values: &[f32]| digest(values, |value| value.to_bits().into());
        let mut other = values.clone();
        for index in [0, 65_535, 65_536, 199_999] {
            other[index] = f32::from_bits(other[index].to_bits() ^ 1);
            assert_ne!(of(&values), of(&other), "{index}");
            other[index] = values[index];
        }
        assert_eq!(of(&values), of(&other));
    }
}
