//! Files that are not read: models that are quantised in another way than to eight bits with scales (see [`super::eight_bit`]), and
//! low-rank changes to models (LoRA). This file knows how they look, so that each is called by its name wherever it is met.
//!
//! | found | kind |
//! | --- | --- |
//! | `NAME.lora_A`, `lora_B`, `lora_down`, `lora_up`, `lora.down`, `lora.up`, `lora_unet_…`, `lora_te…`, `lokr_…`, `hada_…`, `dora_scale` | LoRA and its relatives |
//! | weights of U8 with scales, or `weight_scale_2`, `absmax`, `quant_map`, `qweight`, `qzeros`, `wscales` | packed 4-bit numbers |
//! | `NAME.comfy_quant`, or `_quantization_metadata` in the header, that says what is not understood | the format or the setting that it names |

use std::fmt;

use safetensors::Dtype;

use super::eight_bit::Unknown;
use crate::printable::shown_name;

/// The header's entry by which programs tell how tensors are quantised.
pub(super) const QUANTIZATION_METADATA: &str = "_quantization_metadata";

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

/// Ends of names of scales, which beside weights of U8 are those of 4 bits.
const SCALES: [&str; 2] = [".scale_weight", ".weight_scale"];

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

/// A way of quantising weights that is not read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Quantised {
    how: How,
    /// A tensor that shows it, or the header's entry.
    evidence: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum How {
    FourBit,
    Unknown(Unknown),
}

impl Quantised {
    /// How a model of these tensors (their names without wrappers and in the file, their types) is quantised, as far as names and types
    /// alone tell that it is not read.
    pub fn by_names<'a>(tensors: impl Iterator<Item = (&'a str, &'a str, Dtype)>) -> Option<Self> {
        let four_bit = |evidence: &str| Quantised {
            how: How::FourBit,
            evidence: evidence.into(),
        };
        let (mut has_bytes, mut scale) = (false, None);
        for (bare, name, dtype) in tensors {
            if FOUR_BIT.iter().any(|end| bare.ends_with(end)) {
                return Some(four_bit(name));
            }
            has_bytes |= dtype == Dtype::U8 && (bare.ends_with(".weight") || bare.ends_with("_token"));
            if SCALES.iter().any(|end| bare.ends_with(end)) {
                scale = scale.or(Some(name));
            }
        }
        scale.filter(|_| has_bytes).map(four_bit)
    }

    /// A way of which `evidence` says something that is not understood.
    pub fn unknown(unknown: Unknown, evidence: &str) -> Self {
        Quantised {
            how: How::Unknown(unknown),
            evidence: evidence.into(),
        }
    }
}

impl fmt::Display for Quantised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match &self.how {
            How::FourBit => "to 4 bits".into(),
            How::Unknown(Unknown::Form) => "in a way that it does not tell in a form that is known".into(),
            How::Unknown(Unknown::Format(format)) => format!("as `{}`", shown_name(format)),
            How::Unknown(Unknown::Entry(entry)) => format!("with the setting `{}`", shown_name(entry)),
        };
        write!(
            f,
            "is quantised {how} (it holds `{}`), which this program does not read; use the model's BF16, F16 or F32 file, or one \
             of 8 bits with scales",
            shown_name(&self.evidence)
        )
    }
}
