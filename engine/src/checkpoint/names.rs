//! Tensor names: from those met in files to the canonical ones (diffusers'), and back to the packed layout's.
//!
//! | in files | canonical |
//! | --- | --- |
//! | prefixes `model.diffusion_model.`, `diffusion_model.`, `pipe.dit.`, in any combination | none |
//! | `….attention.qkv.weight` (rows of q, k, v stacked) | `….attention.to_q.weight`, `to_k`, `to_v` |
//! | `….attention.out.weight` | `….attention.to_out.0.weight` |
//! | `….attention.q_norm.weight`, `k_norm` | `….attention.norm_q.weight`, `norm_k` |
//! | `x_embedder.…` | `all_x_embedder.{P}-1.…` |
//! | `final_layer.…` | `all_final_layer.{P}-1.…` |

/// Prefixes under which programs save the transformer.
const PREFIXES: [&str; 3] = ["model.diffusion_model.", "diffusion_model.", "pipe.dit."];

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

/// Splits a name as found into its prefix, possibly empty, and the rest.
pub(super) fn split_prefix(name: &str) -> (&str, &str) {
    let mut bare = name;
    while let Some(rest) = PREFIXES.iter().find_map(|prefix| bare.strip_prefix(prefix)) {
        bare = rest;
    }
    name.split_at(name.len() - bare.len())
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
    if !TRANSFORMER_PARTS.iter().any(|part| bare.starts_with(part)) {
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

/// The canonical name of a text encoder's tensor: without the `model.` under which language models are saved.
pub(super) fn text_encoder(name: &str) -> &str {
    name.strip_prefix("model.").unwrap_or(name)
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
        ] {
            let name = format!("{prefix}layers.0.ffn_norm1.weight");
            assert_eq!(split_prefix(&name), (prefix, "layers.0.ffn_norm1.weight"));
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
