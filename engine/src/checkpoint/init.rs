//! A pixel model from a source model: what has the same name and shape is copied, the new ends start random.

use std::collections::BTreeMap;

use super::audit::Transformer;
use super::elements::Float;
use super::head::HeadLayout;
use super::random::UniformInit;
use super::set::Checkpoint;
use super::write::{Content, Fetch, OutputFile, OutputTensor};
use crate::error::{Error, Result};
use crate::model::config::{DitConfig, ModelKind};

/// Parts that may start random; all others must come from the source.
const NEW_PARTS: [&str; 2] = ["all_x_embedder.", "local_decoder."];

/// The pixel model to make.
#[derive(Clone, Debug)]
pub struct InitOptions {
    /// Side of a patch in pixels: 16, 64, 128 or 160.
    pub patch: usize,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Widths of the head's stages from the image inwards; by default as [`HeadLayout::for_patch`] chooses.
    pub head_widths: Option<Vec<usize>>,
    /// Width of the head's bottleneck.
    pub head_bottleneck: Option<usize>,
}

/// A pixel model to be written.
#[derive(Debug)]
pub struct InitPlan<'a> {
    /// Its tensors.
    pub output: OutputFile<'a>,
    /// Its sizes.
    pub config: DitConfig,
    /// Its head.
    pub head: HeadLayout,
    /// How many tensors come from the source.
    pub copied: usize,
    /// Names of those that start random.
    pub random: Vec<String>,
}

/// Plans a pixel model from `source`, a latent model or a pixel model of another patch size.
///
/// # Errors
/// When no head is known for the patch size, or the widths do not fit it.
pub fn init<'a>(source: &'a Transformer, options: &InitOptions) -> Result<InitPlan<'a>> {
    let (config, head) = sizes(source, options)?;
    let wanted: Vec<_> = config.tensors().into_iter().chain(head.tensors()).collect();
    let shapes: BTreeMap<String, Vec<usize>> = wanted.iter().cloned().collect();
    let float = most_common_type(&source.checkpoint);
    let mut tensors = Vec::with_capacity(wanted.len());
    let mut random = Vec::new();
    for (name, shape) in wanted {
        let stored = source.checkpoint.tensors().get(&name);
        let tensor = match stored.filter(|stored| stored.shape() == shape) {
            Some(stored) => OutputTensor {
                dtype: stored.dtype(),
                content: Content::Copied(vec![stored]),
                name,
                shape,
            },
            None if NEW_PARTS.iter().any(|part| name.starts_with(part)) => {
                random.push(name.clone());
                OutputTensor {
                    dtype: float.dtype(),
                    content: Content::Random(UniformInit::new(options.seed, &name, fan_in(&name, &shapes)), float),
                    name,
                    shape,
                }
            }
            None => {
                return Err(Error::file(
                    source.checkpoint.path(),
                    format!("tensor `{name}` is missing"),
                ));
            }
        };
        tensors.push(tensor);
    }
    let metadata = [("l2p.init_seed".into(), options.seed.to_string())];
    Ok(InitPlan {
        copied: tensors.len() - random.len(),
        output: OutputFile::new(tensors, metadata.into()),
        config,
        head,
        random,
    })
}

/// The sizes of a pixel model of `options` from `source`.
fn sizes(source: &Transformer, options: &InitOptions) -> Result<(DitConfig, HeadLayout)> {
    let config = DitConfig {
        kind: ModelKind::Pixel,
        patch: options.patch,
        in_channels: 3,
        ..source.config.clone()
    };
    let head = HeadLayout::for_patch(
        options.patch,
        options.head_widths.as_deref(),
        options.head_bottleneck,
        config.dim,
    )?;
    Ok((config, head))
}

/// Plans a model of the sizes of `source`, or of a pixel model from it, of which every tensor starts random: as the new parts
/// in [`init`], and the factors of normalisations at 1.
///
/// # Errors
/// When no head is known for the patch size, or the widths do not fit it.
pub fn scratch<'a>(source: &'a Transformer, options: Option<&InitOptions>, seed: u64) -> Result<OutputFile<'a>> {
    let mut wanted = match options {
        Some(options) => {
            let (config, head) = sizes(source, options)?;
            [config.tensors(), head.tensors()].concat()
        }
        None => source.config.tensors(),
    };
    if let (None, Some(head)) = (options, &source.head) {
        wanted.extend(head.tensors());
    }
    let shapes: BTreeMap<String, Vec<usize>> = wanted.iter().cloned().collect();
    let float = most_common_type(&source.checkpoint);
    let tensors = wanted.into_iter().map(|(name, shape)| {
        let content = match shape[..] {
            [size] if name.ends_with(".weight") => Content::Fetched(Fetch::new(move || Ok(vec![1.0; size])), float),
            _ => Content::Random(UniformInit::new(seed, &name, fan_in(&name, &shapes)), float),
        };
        OutputTensor {
            dtype: float.dtype(),
            content,
            name,
            shape,
        }
    });
    let tensors = tensors.collect();
    Ok(OutputFile::new(
        tensors,
        [("l2p.init_seed".into(), seed.to_string())].into(),
    ))
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
