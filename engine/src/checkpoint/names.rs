//! Tensor names: from those met in files to the canonical ones (diffusers'), and back to the packed layout's.
//!
//! Programs save a model inside of others, or wrapped; [`COMMON`], [`TRANSFORMER`], [`TEXT_ENCODER`], [`VAE`] and [`INNER`] are the
//! only list of what they put before names, and it is left out in any combination.
//!
//! | a transformer's, in files | canonical |
//! | --- | --- |
//! | `….attention.qkv.weight` (rows of q, k, v stacked) | `….attention.to_q.weight`, `to_k`, `to_v` |
//! | `….attention.out.weight` | `….attention.to_out.0.weight` |
//! | `….attention.q_norm.weight`, `k_norm` | `….attention.norm_q.weight`, `norm_k` |
//! | `x_embedder.…` | `all_x_embedder.{P}-1.…` |
//! | `final_layer.…` | `all_final_layer.{P}-1.…` |

pub(super) mod vae;

use std::borrow::Cow;
use std::str::FromStr;

use crate::printable::shown_name;

/// Wrappers of any part.
const COMMON: [&str; 4] = ["model.", "module.", "base_model.", "state_dict."];

/// Wrappers that may stand before the name of any module.
const INNER: [&str; 3] = ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."];

/// Wrappers of a transformer.
const TRANSFORMER: [&str; 6] = ["diffusion_model.", "pipe.", "dit.", "transformer.", "denoiser.", "net."];

/// Wrappers of a text encoder.
const TEXT_ENCODER: [&str; 4] = [
    "text_encoder.",
    "text_encoders.qwen3_4b.",
    "transformer.",
    "language_model.",
];

/// Wrappers of a VAE.
const VAE: [&str; 3] = ["vae.", "first_stage_model.", "autoencoder."];

/// How the names of transformer tensors begin, after any prefix; what begins otherwise belongs to something else.
const TRANSFORMER_PARTS: [&str; 12] = [
    "layers.",
    "noise_refiner.",
    "context_refiner.",
    "t_embedder.",
    "cap_embedder.",
    "all_x_embedder.",
    "all_final_layer.",
    "local_decoder.",
    "x_embedder.",
    "final_layer.",
    "x_pad_token",
    "cap_pad_token",
];

/// Parts whose members are transformer blocks.
const BLOCK_PARTS: [&str; 3] = ["layers.", "noise_refiner.", "context_refiner."];

/// What the layers of a language model hold.
const TEXT_MEMBERS: [&str; 4] = ["self_attn.", "mlp.", "input_layernorm.", "post_attention_layernorm."];

/// Packed and canonical ends of block tensors that differ in name alone.
const RENAMED: [(&str, &str); 3] = [
    (".attention.out.weight", ".attention.to_out.0.weight"),
    (".attention.q_norm.weight", ".attention.norm_q.weight"),
    (".attention.k_norm.weight", ".attention.norm_k.weight"),
];

/// The packed end of the stacked projections.
pub(super) const PACKED_QKV: &str = ".attention.qkv.weight";

/// The canonical ends of the projections, in the order of stacking.
pub(super) const QKV: [&str; 3] = [
    ".attention.to_q.weight",
    ".attention.to_k.weight",
    ".attention.to_v.weight",
];

/// Packed and canonical beginnings of the parts whose canonical name holds the patch size.
const PER_PATCH: [(&str, &str); 2] = [("x_embedder.", "all_x_embedder."), ("final_layer.", "all_final_layer.")];

/// Splits a name as found into the wrappers before it, possibly none, and the rest.
fn unwrapped<'a>(name: &'a str, own: &[&str]) -> (&'a str, &'a str) {
    let mut bare = name;
    let known = || own.iter().chain(&COMMON).chain(&INNER);
    while let Some(rest) = known().find_map(|wrapper| bare.strip_prefix(wrapper)) {
        bare = rest;
    }
    name.split_at(name.len() - bare.len())
}

/// Splits the name of a transformer's tensor into the wrappers before it, possibly none, and the rest.
pub(super) fn split_prefix(name: &str) -> (&str, &str) {
    unwrapped(name, &TRANSFORMER)
}

/// The name without wrappers of modules within it.
pub(super) fn without_inner(bare: &str) -> Cow<'_, str> {
    let mut name = Cow::Borrowed(bare);
    for wrapper in INNER {
        if name.contains(wrapper) {
            name = Cow::Owned(name.replace(wrapper, ""));
        }
    }
    name
}

/// What is written before every name of a transformer, so that this program and others find it again: nothing, or wrappers of
/// the list that is read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prefix(String);

impl Prefix {
    /// The prefix, which ends with a dot unless there is none.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let dotted = match text {
            "" => String::new(),
            text => format!("{}.", text.strip_suffix('.').unwrap_or(text)),
        };
        match split_prefix(&dotted).1 {
            "" => Ok(Prefix(dotted)),
            unknown => Err(format!(
                "`{}` is no prefix under which a transformer is found again; use words of {}, such as model.diffusion_model.",
                shown_name(unknown),
                known_prefixes()
            )),
        }
    }
}

/// The wrappers of a transformer, for messages.
pub(super) fn known_prefixes() -> String {
    let all = TRANSFORMER.iter().chain(&COMMON).chain(&INNER);
    all.copied().collect::<Vec<_>>().join(" ")
}

/// The unknown part before a name that would otherwise be a transformer's.
pub(super) fn unknown_prefix(name: &str) -> Option<&str> {
    let starts = name.match_indices('.').map(|(at, _)| at + 1);
    starts
        .map(|at| name.split_at(at))
        .find(|(_, rest)| is_transformers(rest) && is_block_tensor(rest))
        .map(|(before, _)| before)
}

/// What a name without prefix stands for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// A tensor with this canonical name, the same or of the packed layout.
    One { canonical: String, packed: bool },
    /// The stacked projections of the block with this name.
    Qkv { block: String },
    /// Not part of a transformer.
    Foreign,
}

/// Reads a name without prefix; `patch` is that of the packed layout's `x_embedder`.
pub(super) fn meaning(bare: &str, patch: Option<usize>) -> Meaning {
    let one = |canonical: String, packed| Meaning::One { canonical, packed };
    if !is_transformers(bare) {
        return Meaning::Foreign;
    }
    if BLOCK_PARTS.iter().any(|part| bare.starts_with(part)) {
        if let Some(block) = bare.strip_suffix(PACKED_QKV) {
            return Meaning::Qkv { block: block.into() };
        }
        for (packed, canonical) in RENAMED {
            if let Some(block) = bare.strip_suffix(packed) {
                return one(format!("{block}{canonical}"), true);
            }
        }
    }
    for (packed, canonical) in PER_PATCH {
        if let (Some(rest), Some(patch)) = (bare.strip_prefix(packed), patch) {
            return one(format!("{canonical}{patch}-1.{rest}"), true);
        }
    }
    one(bare.into(), false)
}

/// Whether a name without wrappers is that of a transformer's tensor. Language models have `layers` too.
fn is_transformers(bare: &str) -> bool {
    let member = BLOCK_PARTS.iter().find_map(|part| bare.strip_prefix(part));
    let member = member.and_then(|rest| Some(rest.split_once('.')?.1));
    let is_text = member.is_some_and(|member| TEXT_MEMBERS.iter().any(|text| member.starts_with(text)));
    !is_text && TRANSFORMER_PARTS.iter().any(|part| bare.starts_with(part))
}

/// Whether the name is that of a tensor in a block, of whatever layout.
fn is_block_tensor(bare: &str) -> bool {
    let rest = BLOCK_PARTS.iter().find_map(|part| bare.strip_prefix(part));
    let member = rest.and_then(|rest| rest.split_once('.')).map(|(_, member)| member);
    member.is_some_and(|member| member.starts_with("attention") || member.starts_with("feed_forward."))
}

/// The packed layout's name for a canonical one; the stacked projections' for each of q, k and v.
pub(super) fn packed(canonical: &str) -> String {
    if BLOCK_PARTS.iter().any(|part| canonical.starts_with(part)) {
        if let Some(block) = QKV.iter().find_map(|end| canonical.strip_suffix(end)) {
            return format!("{block}{PACKED_QKV}");
        }
        for (packed, plain) in RENAMED {
            if let Some(block) = canonical.strip_suffix(plain) {
                return format!("{block}{packed}");
            }
        }
    }
    for (packed, plain) in PER_PATCH {
        if let Some((_patch, rest)) = canonical.strip_prefix(plain).and_then(|rest| rest.split_once('.')) {
            return format!("{packed}{rest}");
        }
    }
    canonical.into()
}

/// Channels of the image, and of the published latent space.
const CHANNELS: [usize; 2] = [3, 16];

/// The patch size of an input or output projection with `features` = patch² · channels, for 3 or 16 channels (no number is
/// a square times both).
pub(super) fn patch_of(features: usize) -> Option<usize> {
    CHANNELS.iter().find_map(|channels| {
        let patch = (features / channels).isqrt();
        (patch > 0 && patch * patch * channels == features).then_some(patch)
    })
}

/// The canonical name of a text encoder's tensor.
pub(super) fn text_encoder(name: &str) -> String {
    without_inner(unwrapped(name, &TEXT_ENCODER).1).into_owned()
}

/// The name of a VAE's tensor without wrappers.
pub(super) fn vae_bare(name: &str) -> Cow<'_, str> {
    without_inner(unwrapped(name, &VAE).1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_stripped_in_any_combination() {
        for prefix in [
            "",
            "diffusion_model.",
            "model.diffusion_model.",
            "pipe.dit.",
            "pipe.dit.model.diffusion_model.",
            "base_model.model.",
            "module._orig_mod.",
            "transformer.",
            "model.",
        ] {
            let name = format!("{prefix}layers.0.ffn_norm1.weight");
            assert_eq!(split_prefix(&name), (prefix, "layers.0.ffn_norm1.weight"));
        }
    }

    #[test]
    fn wrappers_within_names_are_left_out() {
        let found = "layers.0._checkpoint_wrapped_module.attention._orig_mod.to_q.weight";
        assert_eq!(without_inner(found), "layers.0.attention.to_q.weight");
    }

    #[test]
    fn prefixes_to_be_written_are_those_that_are_read() {
        for (text, prefix) in [
            ("", ""),
            ("pipe.dit", "pipe.dit."),
            ("pipe.dit.", "pipe.dit."),
            ("model.diffusion_model.", "model.diffusion_model."),
            ("transformer", "transformer."),
        ] {
            assert_eq!(text.parse::<Prefix>().unwrap().as_str(), prefix);
        }
        for text in ["mine.", "pipe.dot", ".", "pipe..dit", "layers.", "pipe.dit\u{1b}"] {
            let message = text.parse::<Prefix>().unwrap_err();
            assert!(
                message.contains("is no prefix") && !message.contains('\u{1b}'),
                "{message}"
            );
        }
    }

    #[test]
    fn the_layers_of_a_language_model_are_none_of_a_transformer() {
        for name in ["layers.0.self_attn.q_proj.weight", "layers.7.mlp.up_proj.weight"] {
            assert_eq!(meaning(name, None), Meaning::Foreign);
        }
        assert_eq!(
            text_encoder("model.language_model.layers.0.mlp.up_proj.weight"),
            "layers.0.mlp.up_proj.weight"
        );
        assert_eq!(
            unknown_prefix("mine.ema.layers.0.attention.qkv.weight"),
            Some("mine.ema.")
        );
        assert_eq!(unknown_prefix("text.layers.0.self_attn.q_proj.weight"), None);
    }

    #[test]
    fn packed_names_go_there_and_back() {
        let one = |canonical: &str| Meaning::One {
            canonical: canonical.into(),
            packed: true,
        };
        for (found, canonical) in [
            ("layers.3.attention.out.weight", "layers.3.attention.to_out.0.weight"),
            (
                "noise_refiner.0.attention.q_norm.weight",
                "noise_refiner.0.attention.norm_q.weight",
            ),
            ("x_embedder.bias", "all_x_embedder.16-1.bias"),
            (
                "final_layer.adaLN_modulation.1.bias",
                "all_final_layer.16-1.adaLN_modulation.1.bias",
            ),
        ] {
            assert_eq!(meaning(found, Some(16)), one(canonical));
            assert_eq!(packed(canonical), found);
        }
        let block = Meaning::Qkv {
            block: "layers.3".into(),
        };
        assert_eq!(meaning("layers.3.attention.qkv.weight", None), block);
        assert_eq!(
            packed("layers.3.attention.to_k.weight"),
            "layers.3.attention.qkv.weight"
        );
        assert_eq!(packed("local_decoder.enc1.0.weight"), "local_decoder.enc1.0.weight");
        assert_eq!(meaning("vae.decoder.conv_in.weight", None), Meaning::Foreign);
    }

    #[test]
    fn patches_follow_from_the_projection() {
        for (features, patch) in [(64, 2), (768, 16), (12288, 64), (49152, 128), (76800, 160)] {
            assert_eq!(patch_of(features), Some(patch));
        }
        assert_eq!(patch_of(100), None);
        assert_eq!(patch_of(0), None);
    }
}
