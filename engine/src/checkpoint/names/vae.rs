//! Names of a VAE: those of the original autoencoders, as single files hold them, to those of diffusers.
//!
//! With B the number of resolutions of a decoder, which counts them from the image inwards in the original names and from the
//! latent outwards in diffusers':
//!
//! | in files | canonical |
//! | --- | --- |
//! | `encoder.down.N.block.M.…` | `encoder.down_blocks.N.resnets.M.…` |
//! | `encoder.down.N.downsample.conv.…` | `encoder.down_blocks.N.downsamplers.0.conv.…` |
//! | `decoder.up.N.block.M.…` | `decoder.up_blocks.{B−1−N}.resnets.M.…` |
//! | `decoder.up.N.upsample.conv.…` | `decoder.up_blocks.{B−1−N}.upsamplers.0.conv.…` |
//! | `….mid.block_1.…`, `….mid.block_2.…` | `….mid_block.resnets.0.…`, `….mid_block.resnets.1.…` |
//! | `….mid.attn_1.norm.…` | `….mid_block.attentions.0.group_norm.…` |
//! | `….mid.attn_1.q.…`, `k`, `v`, `proj_out` | `….mid_block.attentions.0.to_q.…`, `to_k`, `to_v`, `to_out.0` |
//! | `….attentions.0.query.…`, `key`, `value`, `proj_attn` (older diffusers) | as above |
//! | `….nin_shortcut.…` | `….conv_shortcut.…` |
//! | `….norm_out.…` | `….conv_norm_out.…` |
//!
//! The projections of the attention are 1×1 convolutions in the original, matrices in diffusers. Source: diffusers,
//! `loaders/single_file_utils.py`.

/// Ends of the attention's layers: original, older diffusers', canonical.
const ATTENTION: [(&str, &str, &str); 5] = [
    ("norm", "group_norm", "group_norm"),
    ("q", "query", "to_q"),
    ("k", "key", "to_k"),
    ("v", "value", "to_v"),
    ("proj_out", "proj_attn", "to_out.0"),
];

/// The number of resolutions in the original names of a decoder, of which these are all; 0 in others.
pub(in super::super) fn up_blocks<'a>(names: impl Iterator<Item = &'a str>) -> usize {
    let index = |name: &str| {
        let rest = name.strip_prefix("decoder.up.")?;
        rest.split('.').next()?.parse::<usize>().ok()
    };
    names.filter_map(index).max().map_or(0, |last| last.saturating_add(1))
}

/// The canonical name of the tensor with this name without wrappers, in a file whose decoder has `up_blocks` resolutions by its
/// original names.
pub(in super::super) fn canonical(bare: &str, up_blocks: usize) -> String {
    let Some((half, rest)) = bare
        .split_once('.')
        .filter(|(half, _)| ["encoder", "decoder"].contains(half))
    else {
        return bare.into();
    };
    let renamed = match rest.split_once('.') {
        Some(("down", rest)) => down(rest),
        Some(("up", rest)) => up(rest, up_blocks),
        Some(("mid", rest)) => middle(rest),
        Some(("mid_block", rest)) => older_attention(rest),
        Some(("norm_out", rest)) => Some(format!("conv_norm_out.{rest}")),
        _ => None,
    };
    match renamed {
        Some(renamed) => format!("{half}.{}", renamed.replace(".nin_shortcut.", ".conv_shortcut.")),
        None => bare.into(),
    }
}

/// Whether the canonical name is that of a matrix which the original has as a 1×1 convolution.
pub(in super::super) fn is_matrix(canonical: &str) -> bool {
    canonical.contains(".mid_block.attentions.0.to_") && canonical.ends_with(".weight")
}

fn down(rest: &str) -> Option<String> {
    let (index, rest) = rest.split_once('.')?;
    match rest.split_once('.')? {
        ("block", rest) => Some(format!("down_blocks.{index}.resnets.{rest}")),
        ("downsample", rest) => Some(format!("down_blocks.{index}.downsamplers.0.{rest}")),
        _ => None,
    }
}

fn up(rest: &str, up_blocks: usize) -> Option<String> {
    let (index, rest) = rest.split_once('.')?;
    let index = up_blocks.checked_sub(1)?.checked_sub(index.parse().ok()?)?;
    match rest.split_once('.')? {
        ("block", rest) => Some(format!("up_blocks.{index}.resnets.{rest}")),
        ("upsample", rest) => Some(format!("up_blocks.{index}.upsamplers.0.{rest}")),
        _ => None,
    }
}

fn middle(rest: &str) -> Option<String> {
    match rest.split_once('.')? {
        ("block_1", rest) => Some(format!("mid_block.resnets.0.{rest}")),
        ("block_2", rest) => Some(format!("mid_block.resnets.1.{rest}")),
        ("attn_1", rest) => attention(rest, |names| names.0),
        _ => None,
    }
}

fn older_attention(rest: &str) -> Option<String> {
    attention(rest.strip_prefix("attentions.0.")?, |names| names.1)
}

fn attention(rest: &str, found: fn(&(&'static str, &'static str, &'static str)) -> &'static str) -> Option<String> {
    let (layer, end) = rest.split_once('.')?;
    let names = ATTENTION.iter().find(|names| found(names) == layer)?;
    Some(format!("mid_block.attentions.0.{}.{end}", names.2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn original_names_become_those_of_diffusers() {
        for (found, expected) in [
            ("encoder.conv_in.weight", "encoder.conv_in.weight"),
            (
                "encoder.down.2.block.1.norm1.bias",
                "encoder.down_blocks.2.resnets.1.norm1.bias",
            ),
            (
                "encoder.down.1.block.0.nin_shortcut.weight",
                "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
            ),
            (
                "encoder.down.0.downsample.conv.bias",
                "encoder.down_blocks.0.downsamplers.0.conv.bias",
            ),
            ("encoder.norm_out.weight", "encoder.conv_norm_out.weight"),
            (
                "decoder.up.3.block.2.conv1.weight",
                "decoder.up_blocks.0.resnets.2.conv1.weight",
            ),
            (
                "decoder.up.0.block.0.conv2.bias",
                "decoder.up_blocks.3.resnets.0.conv2.bias",
            ),
            (
                "decoder.up.1.upsample.conv.weight",
                "decoder.up_blocks.2.upsamplers.0.conv.weight",
            ),
            (
                "decoder.mid.block_2.norm2.weight",
                "decoder.mid_block.resnets.1.norm2.weight",
            ),
            (
                "decoder.mid.attn_1.norm.bias",
                "decoder.mid_block.attentions.0.group_norm.bias",
            ),
            (
                "decoder.mid.attn_1.q.weight",
                "decoder.mid_block.attentions.0.to_q.weight",
            ),
            (
                "decoder.mid.attn_1.proj_out.weight",
                "decoder.mid_block.attentions.0.to_out.0.weight",
            ),
            (
                "decoder.mid_block.attentions.0.proj_attn.bias",
                "decoder.mid_block.attentions.0.to_out.0.bias",
            ),
            (
                "decoder.mid_block.attentions.0.to_q.bias",
                "decoder.mid_block.attentions.0.to_q.bias",
            ),
            (
                "decoder.up_blocks.0.resnets.0.conv1.bias",
                "decoder.up_blocks.0.resnets.0.conv1.bias",
            ),
            ("post_quant_conv.weight", "post_quant_conv.weight"),
            // Beyond the resolutions that there are: left as it is, for a message to name.
            ("decoder.up.4.block.0.conv1.bias", "decoder.up.4.block.0.conv1.bias"),
            ("decoder.up.x.block.0.conv1.bias", "decoder.up.x.block.0.conv1.bias"),
        ] {
            assert_eq!(canonical(found, 4), expected);
        }
    }

    #[test]
    fn resolutions_are_counted() {
        let names = [
            "decoder.up.0.block.0.conv1.bias",
            "decoder.up.3.x",
            "decoder.up.x",
            "encoder.down.9.x",
        ];
        assert_eq!(up_blocks(names.into_iter()), 4);
        assert_eq!(up_blocks(["decoder.up_blocks.7.x"].into_iter()), 0);
        assert_eq!(up_blocks(["decoder.up.18446744073709551615.x"].into_iter()), usize::MAX);
    }
}
