//! What is to be known of a checkpoint's weights of eight bits.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::decoding::ScaleName;
use crate::checkpoint::stored::CheckpointTensor;

/// Weights of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EightBitKind {
    /// Their element type.
    pub dtype: String,
    /// What their scales are called, where they have some.
    pub scale: Option<ScaleName>,
    /// Whether each row has a scale, rather than each tensor.
    pub by_row: bool,
    /// Inputs that are rotated together, where they are.
    pub rotation: Option<usize>,
    /// How many tensors.
    pub tensors: usize,
    /// Their bytes, without scales.
    pub bytes: u64,
}

/// A checkpoint's weights of eight bits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EightBit {
    /// By kind.
    pub kinds: Vec<EightBitKind>,
    /// Scales of layers' inputs, which are read by name only: how many of each name.
    pub input_scales: BTreeMap<&'static str, usize>,
    /// What else marks them: `comfy_quant`, `_quantization_metadata`, `scaled_fp8`.
    pub marks: BTreeSet<&'static str>,
}

impl EightBit {
    /// Those of `tensors`, `None` without any; `marks` are what marks them.
    pub fn of<'a>(tensors: impl Iterator<Item = &'a CheckpointTensor>, marks: &BTreeSet<&'static str>) -> Option<Self> {
        let mut kinds: BTreeMap<_, (usize, u64)> = BTreeMap::new();
        let mut input_scales: BTreeMap<&'static str, usize> = BTreeMap::new();
        for tensor in tensors {
            let Some(decoding) = tensor.decoding() else {
                continue;
            };
            let dtype = tensor.dtype().to_string();
            let kind = (dtype, decoding.scale, decoding.is_by_row(), decoding.rotation);
            let (count, bytes) = kinds.entry(kind).or_default();
            *count += 1;
            *bytes += tensor.byte_count() as u64;
            if let Some(name) = decoding.input_scale {
                *input_scales.entry(name).or_default() += 1;
            }
        }
        let kind = |((dtype, scale, by_row, rotation), (tensors, bytes))| EightBitKind {
            dtype,
            scale,
            by_row,
            rotation,
            tensors,
            bytes,
        };
        let kinds: Vec<_> = kinds.into_iter().map(kind).collect();
        (!kinds.is_empty()).then(|| EightBit {
            kinds,
            input_scales,
            marks: marks.clone(),
        })
    }
}
