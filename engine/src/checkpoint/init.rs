//! A pixel model from a source model: what has the same name and shape is copied, the new ends start random.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::audit::Transformer;
use super::elements::Float;
use super::random::UniformInit;
use super::set::Checkpoint;
use super::write::{Content, Fetch, OutputFile, OutputTensor};
use crate::error::{Error, Result};
use crate::layers::{Group, Published};
use crate::model::Spec;

/// The pixel model to make.
#[derive(Clone, Debug)]
pub struct InitOptions {
    /// Side of a patch in pixels: 16, 64, 128 or 160.
    pub patch: usize,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Widths of the head's stages from the image inwards; by default as [`Spec::pixel_model`] chooses.
    pub head_widths: Option<Vec<usize>>,
    /// Width of the head's bottleneck.
    pub head_bottleneck: Option<usize>,
}

/// A pixel model to be written.
#[derive(Debug)]
pub struct InitPlan<'a> {
    /// Its tensors.
    pub output: OutputFile<'a>,
    /// What it is.
    pub spec: Arc<dyn Spec>,
    /// How many tensors come from the source.
    pub copied: usize,
    /// Names of those that start random.
    pub random: Vec<String>,
}

/// Plans a pixel model from `source`, a latent model or a pixel model of another patch size. Input and output may start random; all
/// else must come from the source.
///
/// # Errors
/// When no head is known for the patch size, or the widths do not fit it.
pub fn init<'a>(source: &'a Transformer, options: &InitOptions) -> Result<InitPlan<'a>> {
    let spec = made(source, options)?;
    let maker = Maker::new(source, &*spec, options.seed);
    let (mut tensors, mut random) = (Vec::new(), Vec::new());
    for meta in spec.metas() {
        for Published { name, shape } in meta.parts {
            let stored = source.checkpoint.tensors().get(&name);
            tensors.push(match stored.filter(|stored| stored.shape() == shape) {
                Some(stored) => OutputTensor::of(name, stored),
                None if matches!(meta.group, Group::Input | Group::Output) => {
                    random.push(name.clone());
                    maker.random(name, shape)
                }
                None => {
                    return Err(Error::file(
                        source.checkpoint.path(),
                        format!("tensor `{name}` is missing"),
                    ));
                }
            });
        }
    }
    Ok(InitPlan {
        copied: tensors.len() - random.len(),
        output: maker.output(tensors),
        spec,
        random,
    })
}

/// The pixel model of `options` from `source`.
fn made(source: &Transformer, options: &InitOptions) -> Result<Arc<dyn Spec>> {
    let InitOptions {
        patch,
        head_widths,
        head_bottleneck,
        ..
    } = options;
    source
        .spec
        .pixel_model(*patch, head_widths.as_deref(), *head_bottleneck)
}

/// Plans a model of the sizes of `source`, or of a pixel model from it, of which every tensor starts random: as the new parts
/// in [`init`], and the factors of normalisations at 1.
///
/// # Errors
/// When no head is known for the patch size, or the widths do not fit it.
pub fn scratch<'a>(source: &'a Transformer, options: Option<&InitOptions>, seed: u64) -> Result<OutputFile<'a>> {
    let spec = options.map_or_else(|| Ok(source.spec.clone()), |options| made(source, options))?;
    let maker = Maker::new(source, &*spec, seed);
    let tensors = spec.tensors().into_iter().map(|(name, shape)| match shape[..] {
        [size] if name.ends_with(".weight") => OutputTensor {
            dtype: maker.float.dtype(),
            content: Content::Fetched(Fetch::new(move || Ok(vec![1.0; size])), maker.float),
            name,
            shape,
        },
        _ => maker.random(name, shape),
    });
    Ok(maker.output(tensors.collect()))
}

/// Makes tensors that start random.
struct Maker {
    seed: u64,
    shapes: BTreeMap<String, Vec<usize>>,
    float: Float,
}

impl Maker {
    /// For a model made from `source`, in the type that most of it is in.
    fn new(source: &Transformer, spec: &dyn Spec, seed: u64) -> Self {
        Maker {
            seed,
            shapes: spec.tensors().into_iter().collect(),
            float: most_common_type(&source.checkpoint),
        }
    }

    fn random<'a>(&self, name: String, shape: Vec<usize>) -> OutputTensor<'a> {
        let numbers = UniformInit::new(self.seed, &name, fan_in(&name, &self.shapes));
        OutputTensor {
            dtype: self.float.dtype(),
            content: Content::Random(numbers, self.float),
            name,
            shape,
        }
    }

    fn output<'a>(&self, tensors: Vec<OutputTensor<'a>>) -> OutputFile<'a> {
        OutputFile::new(tensors, [("l2p.init_seed".into(), self.seed.to_string())].into())
    }
}

/// Inputs of one output: those of the weight, also for the bias that goes with it.
fn fan_in(name: &str, shapes: &BTreeMap<String, Vec<usize>>) -> usize {
    let weight = match name.strip_suffix(".bias") {
        Some(layer) => format!("{layer}.weight"),
        None => name.to_owned(),
    };
    shapes.get(&weight).map_or(1, |shape| shape[1..].iter().product())
}

/// The type that most bytes of the source are in.
fn most_common_type(source: &Checkpoint) -> Float {
    let mut bytes = [0; 3];
    const TYPES: [Float; 3] = [Float::Bf16, Float::F16, Float::F32];
    for tensor in source.tensors().values() {
        if let Some(index) = TYPES.iter().position(|float| float.dtype() == tensor.dtype()) {
            bytes[index] += tensor.byte_count();
        }
    }
    let (index, _) = bytes
        .iter()
        .enumerate()
        .rev()
        .max_by_key(|(_, bytes)| **bytes)
        .unwrap_or((0, &0));
    TYPES[index]
}
