//! Names of the family's tensors: diffusers', which are the canonical ones, and the packed layout's.
//!
//! | in files | canonical |
//! | --- | --- |
//! | `….attention.qkv.weight` (rows of q, k, v stacked) | `….attention.to_q.weight`, `to_k`, `to_v` |
//! | `….attention.out.weight` | `….attention.to_out.0.weight` |
//! | `….attention.q_norm.weight`, `k_norm` | `….attention.norm_q.weight`, `norm_k` |
//! | `x_embedder.…` | `all_x_embedder.{P}-1.…` |
//! | `final_layer.…` | `all_final_layer.{P}-1.…` |

use crate::model::family::Meaning;

/// How the names of tensors begin; what begins otherwise belongs to something else.
const PARTS: [&str; 12] = [
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
const PACKED_QKV: &str = ".attention.qkv.weight";

/// The canonical ends of the projections, in the order of stacking.
const QKV: [&str; 3] = [
    ".attention.to_q.weight",
    ".attention.to_k.weight",
    ".attention.to_v.weight",
];

/// Packed and canonical beginnings of the parts whose canonical name holds the patch size.
const PER_PATCH: [(&str, &str); 2] = [("x_embedder.", "all_x_embedder."), ("final_layer.", "all_final_layer.")];

/// Channels of the image, and of the published latent space.
const CHANNELS: [usize; 2] = [3, 16];

/// Reads a name without prefix; `patch` is that of the packed layout's `x_embedder`.
pub(super) fn meaning(bare: &str, patch: Option<usize>) -> Meaning {
    let one = |canonical: String, packed| Meaning::One { canonical, packed };
    if !is_of_the_family(bare) {
        return Meaning::Foreign;
    }
    if BLOCK_PARTS.iter().any(|part| bare.starts_with(part)) {
        if let Some(block) = bare.strip_suffix(PACKED_QKV) {
            return Meaning::Stack(QKV.map(|end| format!("{block}{end}")).to_vec());
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

/// Whether a name without wrappers is that of a tensor of the family. Language models have `layers` too.
pub(super) fn is_of_the_family(bare: &str) -> bool {
    let member = BLOCK_PARTS.iter().find_map(|part| bare.strip_prefix(part));
    let member = member.and_then(|rest| Some(rest.split_once('.')?.1));
    let is_text = member.is_some_and(|member| TEXT_MEMBERS.iter().any(|text| member.starts_with(text)));
    !is_text && PARTS.iter().any(|part| bare.starts_with(part))
}

/// Whether the name is that of a tensor in a block, of whatever layout.
pub(super) fn is_block_tensor(bare: &str) -> bool {
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

/// The patch size of the packed layout, which does not name it: from either projection between patches and tokens.
pub(super) fn packed_patch(bare: &str, shape: &[usize]) -> Option<usize> {
    match bare {
        "x_embedder.weight" => patch_of(*shape.get(1)?),
        "final_layer.linear.weight" => patch_of(*shape.first()?),
        _ => None,
    }
}

/// The patch size of an input or output projection with `features` = patch² · channels, for 3 or 16 channels (no number is
/// a square times both).
fn patch_of(features: usize) -> Option<usize> {
    CHANNELS.iter().find_map(|channels| {
        let patch = (features / channels).isqrt();
        (patch > 0 && patch * patch * channels == features).then_some(patch)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layers_of_a_language_model_are_none_of_a_transformer() {
        for name in ["layers.0.self_attn.q_proj.weight", "layers.7.mlp.up_proj.weight"] {
            assert_eq!(meaning(name, None), Meaning::Foreign);
        }
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
        let stack = ["to_q", "to_k", "to_v"].map(|end| format!("layers.3.attention.{end}.weight"));
        assert_eq!(
            meaning("layers.3.attention.qkv.weight", None),
            Meaning::Stack(stack.to_vec())
        );
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
