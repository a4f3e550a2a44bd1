//! Files whose tensors are no weights as they stand: quantised models, and low-rank changes to models (LoRA). Neither is read;
//! this file knows how they look, so that each is called by its name wherever it is met.
//!
//! | found | kind |
//! | --- | --- |
//! | `NAME.lora_A`, `lora_B`, `lora_down`, `lora_up`, `lora.down`, `lora.up`, `lora_unet_…`, `lora_te…`, `lokr_…`, `hada_…`, `dora_scale` | LoRA and its relatives |
//! | weights of F8_E4M3 or F8_E5M2, no scales | plain 8-bit floats |
//! | the same with `NAME.scale_weight` or `NAME.weight_scale`, maybe `scale_input`, `input_scale`, a tensor `scaled_fp8` | scaled 8-bit floats |
//! | weights of I8 with `NAME.weight_scale`; rotated where `NAME.comfy_quant` says `convrot` | scaled 8-bit integers |
//! | `NAME.comfy_quant`, or `_quantization_metadata` in the header | the format that they name |
//! | weights of U8 with scales, or `weight_scale_2`, `absmax`, `quant_map`, `qweight`, `qzeros`, `wscales` | packed 4-bit numbers |

use std::collections::BTreeMap;
use std::fmt;

use safetensors::Dtype;
use serde::Deserialize;

use super::stored::CheckpointTensor;
use crate::error::Result;
use crate::printable::shown_name;

/// The header's entry by which programs tell how tensors are quantised.
pub(super) const QUANTIZATION_METADATA: &str = "_quantization_metadata";

/// Bytes of a `comfy_quant` tensor that are read.
const LONGEST_NOTE: usize = 4096;

/// Bytes of the header's entry about quantisation that are read.
const LONGEST_METADATA: usize = 4 << 20;

/// Parts of names that only low-rank changes have.
const LOW_RANK: [&str; 10] = [
    ".lora_A",
    ".lora_B",
    ".lora_down.",
    ".lora_up.",
    ".lora.down.",
    ".lora.up.",
    ".lora_linear_layer.",
    ".dora_scale",
    ".lokr_",
    ".hada_w",
];

/// Beginnings of names that only low-rank changes have.
const LOW_RANK_STARTS: [&str; 3] = ["lora_unet_", "lora_te", "lora_transformer_"];

/// Ends of the names of scales of 8-bit weights and of their inputs.
const SCALES: [&str; 4] = [".scale_weight", ".weight_scale", ".scale_input", ".input_scale"];

/// Ends of names that come with weights of 4 bits.
const FOUR_BIT: [&str; 8] = [
    ".weight_scale_2",
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".qweight",
    ".qzeros",
    ".wscales",
    ".codebook",
];

/// Whether the name is that of a low-rank change.
pub(super) fn is_low_rank(name: &str) -> bool {
    LOW_RANK.iter().any(|part| name.contains(part)) || LOW_RANK_STARTS.iter().any(|start| name.starts_with(start))
}

/// What is said of a file of low-rank changes, of which this is a tensor.
pub(super) fn low_rank(name: &str) -> String {
    format!(
        "is a LoRA (it holds `{}`): changes to a model, no model by itself, and this program does not apply them; merge it \
         into its model with the program that made it",
        shown_name(name)
    )
}

/// How the weights of a model are quantised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Quantised {
    how: How,
    /// A tensor that shows it, or the header's entry.
    evidence: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum How {
    PlainFloat8(Dtype),
    ScaledFloat8,
    ScaledInteger8 { rotated: bool },
    FourBit,
    Named(String),
}

/// What a `comfy_quant` tensor holds, in JSON.
#[derive(Deserialize)]
struct Note {
    #[serde(default)]
    format: String,
    #[serde(default)]
    convrot: bool,
}

impl Quantised {
    /// How the model of these tensors (by canonical name) is quantised, if it is. `marker` is a tensor `scaled_fp8` of it,
    /// `metadata` what the header says of quantisation.
    ///
    /// # Errors
    /// When a tensor that tells it cannot be read.
    pub fn find(
        tensors: &BTreeMap<String, CheckpointTensor>,
        marker: Option<&str>,
        metadata: Option<&str>,
    ) -> Result<Option<Self>> {
        let ends_with = |ends: &[&str]| {
            let mut names = tensors.keys();
            names.find(|name| ends.iter().any(|end| name.ends_with(end)))
        };
        let of_type = |dtypes: &[Dtype]| {
            let is_weight = |name: &str| name.ends_with("weight") || name.ends_with("_token");
            let mut tensors = tensors.iter();
            tensors.find(|(name, tensor)| is_weight(name) && dtypes.contains(&tensor.dtype()))
        };
        let quantised = |how, evidence: &str| {
            let evidence = evidence.into();
            Ok(Some(Quantised { how, evidence }))
        };
        let note = tensors.iter().find(|(name, _)| name.ends_with(".comfy_quant"));
        let integers = of_type(&[Dtype::I8, Dtype::U8]);
        let floats = of_type(&[Dtype::F8_E4M3, Dtype::F8_E5M2]);
        let scale = ends_with(&SCALES);
        if let Some(name) = ends_with(&FOUR_BIT) {
            return quantised(How::FourBit, name);
        }
        if let Some((name, tensor)) = note {
            let read = read_note(tensor)?;
            let how = match (integers, floats) {
                (Some((_, weight)), _) if weight.dtype() == Dtype::I8 => How::ScaledInteger8 {
                    rotated: read.as_ref().is_some_and(|note| note.convrot),
                },
                (None, Some(_)) => How::ScaledFloat8,
                _ => How::Named(read.map(|note| note.format).unwrap_or_default()),
            };
            return quantised(how, name);
        }
        match (floats, integers, scale.map(String::as_str).or(marker)) {
            (Some(_), _, Some(name)) => quantised(How::ScaledFloat8, name),
            (None, Some((_, weight)), Some(name)) if weight.dtype() == Dtype::I8 => {
                quantised(How::ScaledInteger8 { rotated: false }, name)
            }
            (None, Some(_), Some(name)) => quantised(How::FourBit, name),
            (None, None, Some(name)) => quantised(How::ScaledFloat8, name),
            (Some((name, tensor)), _, None) if metadata.is_none() => quantised(How::PlainFloat8(tensor.dtype()), name),
            _ => match metadata {
                Some(text) => quantised(How::Named(named_formats(text)), QUANTIZATION_METADATA),
                None => Ok(None),
            },
        }
    }
}

impl fmt::Display for Quantised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match &self.how {
            How::PlainFloat8(dtype) => format!("to 8-bit floats without scales ({dtype})"),
            How::ScaledFloat8 => "to 8-bit floats with scales beside them".into(),
            How::ScaledInteger8 { rotated: false } => "to 8-bit integers with scales beside them".into(),
            How::ScaledInteger8 { rotated: true } => {
                "to 8-bit integers with scales beside them, its inputs rotated (ConvRot)".into()
            }
            How::FourBit => "to 4 bits".into(),
            How::Named(format) if format.is_empty() => "in a way that only its header tells".into(),
            How::Named(format) => format!("as `{}`", shown_name(format)),
        };
        write!(
            f,
            "is quantised {how} (it holds `{}`), which this program does not read; use the model's BF16, F16 or F32 file",
            shown_name(&self.evidence)
        )
    }
}

fn read_note(tensor: &CheckpointTensor) -> Result<Option<Note>> {
    if tensor.byte_count() > LONGEST_NOTE {
        return Ok(None);
    }
    Ok(serde_json::from_slice(&tensor.bytes()?).ok())
}

/// The formats that the header's JSON names for layers.
fn named_formats(text: &str) -> String {
    #[derive(Deserialize)]
    struct Metadata {
        #[serde(default)]
        layers: BTreeMap<String, Layer>,
    }
    #[derive(Deserialize)]
    struct Layer {
        #[serde(default)]
        format: String,
    }
    if text.len() > LONGEST_METADATA {
        return String::new();
    }
    let layers = serde_json::from_str::<Metadata>(text).map(|metadata| metadata.layers);
    let mut formats: Vec<String> = layers
        .unwrap_or_default()
        .into_values()
        .map(|layer| layer.format)
        .collect();
    formats.sort();
    formats.dedup();
    formats.join(", ")
}
