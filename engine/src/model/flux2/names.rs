//! Names of the family's tensors: diffusers', which are the canonical ones, and those of the original single files.
//!
//! | in single files | canonical |
//! | --- | --- |
//! | `img_in`, `txt_in` | `x_embedder`, `context_embedder` |
//! | `time_in.in_layer`, `out_layer` | `time_guidance_embed.timestep_embedder.linear_1`, `linear_2` |
//! | `double_stream_modulation_img.lin`, … | `double_stream_modulation_img.linear`, … |
//! | `double_blocks.N.img_attn.qkv` (rows of q, k, v stacked) | `transformer_blocks.N.attn.to_q`, `to_k`, `to_v` |
//! | `double_blocks.N.txt_attn.qkv` | `transformer_blocks.N.attn.add_q_proj`, … |
//! | `….img_attn.norm.query_norm.scale`, … | `….attn.norm_q.weight`, … |
//! | `single_blocks.N.linear1`, `linear2` | `single_transformer_blocks.N.attn.to_qkv_mlp_proj`, `to_out` |
//! | `final_layer.linear` | `proj_out` |
//! | `final_layer.adaLN_modulation.1` (rows of shift, scale) | `norm_out.linear` (rows of scale, shift) |

use crate::model::family::Meaning;

/// How canonical names begin.
const PARTS: [&str; 11] = [
    "x_embedder.",
    "context_embedder.",
    "time_guidance_embed.",
    "double_stream_modulation_img.",
    "double_stream_modulation_txt.",
    "single_stream_modulation.",
    "transformer_blocks.",
    "single_transformer_blocks.",
    "norm_out.",
    "proj_out.",
    "local_decoder.",
];

/// Layers outside of blocks whose names differ, without their `.weight`.
const RENAMED: [(&str, &str); 10] = [
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
    ("guidance_in.in_layer", "time_guidance_embed.guidance_embedder.linear_1"),
    (
        "guidance_in.out_layer",
        "time_guidance_embed.guidance_embedder.linear_2",
    ),
    (
        "double_stream_modulation_img.lin",
        "double_stream_modulation_img.linear",
    ),
    (
        "double_stream_modulation_txt.lin",
        "double_stream_modulation_txt.linear",
    ),
    ("single_stream_modulation.lin", "single_stream_modulation.linear"),
    ("final_layer.linear", "proj_out"),
];

/// The last normalisation's layer, whose halves change places.
const SWAPPED: [&str; 2] = ["final_layer.adaLN_modulation.1", "norm_out.linear"];

/// Members of a double-stream block.
const DOUBLE: [(&str, &str); 10] = [
    ("img_attn.norm.query_norm", "attn.norm_q"),
    ("img_attn.norm.key_norm", "attn.norm_k"),
    ("img_attn.proj", "attn.to_out.0"),
    ("img_mlp.0", "ff.linear_in"),
    ("img_mlp.2", "ff.linear_out"),
    ("txt_attn.norm.query_norm", "attn.norm_added_q"),
    ("txt_attn.norm.key_norm", "attn.norm_added_k"),
    ("txt_attn.proj", "attn.to_add_out"),
    ("txt_mlp.0", "ff_context.linear_in"),
    ("txt_mlp.2", "ff_context.linear_out"),
];

/// Stacked projections of a double-stream block.
const STACKED: [(&str, [&str; 3]); 2] = [
    ("img_attn.qkv", ["to_q", "to_k", "to_v"]),
    ("txt_attn.qkv", ["add_q_proj", "add_k_proj", "add_v_proj"]),
];

/// Members of a single-stream block.
const SINGLE: [(&str, &str); 4] = [
    ("linear1", "attn.to_qkv_mlp_proj"),
    ("linear2", "attn.to_out"),
    ("norm.query_norm", "attn.norm_q"),
    ("norm.key_norm", "attn.norm_k"),
];

/// What a name without wrappers stands for.
pub(super) fn meaning(bare: &str) -> Meaning {
    if let Some(meaning) = in_single_file(bare) {
        return meaning;
    }
    match PARTS.iter().any(|part| bare.starts_with(part)) {
        true => Meaning::One {
            canonical: bare.into(),
            packed: false,
        },
        false => Meaning::Foreign,
    }
}

/// Whether the name can only be that of one of these models' tensors.
pub(super) fn is_telling(bare: &str) -> bool {
    let blocks = ["single_transformer_blocks.", "double_blocks.", "single_blocks."];
    blocks.iter().any(|part| bare.starts_with(part)) && meaning(bare) != Meaning::Foreign
        || bare.starts_with("double_stream_modulation_")
}

fn in_single_file(bare: &str) -> Option<Meaning> {
    let (layer, kind) = bare.rsplit_once('.')?;
    let kind = match kind {
        "weight" | "scale" => "weight",
        "bias" => "bias",
        _ => return None,
    };
    let one = |layer: String| Meaning::One {
        canonical: format!("{layer}.{kind}"),
        packed: true,
    };
    if layer == SWAPPED[0] {
        return Some(Meaning::Swapped(format!("{}.{kind}", SWAPPED[1])));
    }
    if let Some((_, canonical)) = RENAMED.iter().find(|(found, _)| *found == layer) {
        return Some(one((*canonical).into()));
    }
    if let Some((index, member)) = layer
        .strip_prefix("double_blocks.")
        .and_then(|rest| rest.split_once('.'))
    {
        let block = format!("transformer_blocks.{index}");
        if let Some((_, parts)) = STACKED.iter().find(|(found, _)| *found == member) {
            let parts = parts.map(|part| format!("{block}.attn.{part}.{kind}"));
            return Some(Meaning::Stack(parts.to_vec()));
        }
        let (_, canonical) = DOUBLE.iter().find(|(found, _)| *found == member)?;
        return Some(one(format!("{block}.{canonical}")));
    }
    let (index, member) = layer.strip_prefix("single_blocks.")?.split_once('.')?;
    let (_, canonical) = SINGLE.iter().find(|(found, _)| *found == member)?;
    Some(one(format!("single_transformer_blocks.{index}.{canonical}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_single_files_are_understood() {
        for (found, canonical) in [
            ("img_in.weight", "x_embedder.weight"),
            (
                "double_blocks.4.img_attn.norm.query_norm.scale",
                "transformer_blocks.4.attn.norm_q.weight",
            ),
            (
                "double_blocks.0.txt_mlp.2.weight",
                "transformer_blocks.0.ff_context.linear_out.weight",
            ),
            (
                "single_blocks.19.linear1.weight",
                "single_transformer_blocks.19.attn.to_qkv_mlp_proj.weight",
            ),
            (
                "single_stream_modulation.lin.weight",
                "single_stream_modulation.linear.weight",
            ),
        ] {
            let expected = Meaning::One {
                canonical: canonical.into(),
                packed: true,
            };
            assert_eq!(meaning(found), expected, "{found}");
        }
        let stack = ["add_q_proj", "add_k_proj", "add_v_proj"];
        let stack = stack.map(|part| format!("transformer_blocks.1.attn.{part}.weight"));
        assert_eq!(
            meaning("double_blocks.1.txt_attn.qkv.weight"),
            Meaning::Stack(stack.to_vec())
        );
        let swapped = Meaning::Swapped("norm_out.linear.weight".into());
        assert_eq!(meaning("final_layer.adaLN_modulation.1.weight"), swapped);
        for name in [
            "double_blocks.0.img_attn.what.weight",
            "layers.0.mlp.up_proj.weight",
            "img_in",
            "single_blocks.",
        ] {
            assert_eq!(meaning(name), Meaning::Foreign, "{name}");
        }
    }
}
