//! The parts beside the transformer, opened with their configuration: what a `config.json` says and what the tensors are must agree
//! in every size, and no tensor may be left over, for one that nobody asked for would change the result where it was trained.

use std::path::Path;

use super::set::Checkpoint;
use crate::error::{Error, Result};
use crate::layers::ParamSource;
use crate::model::config::{TextConfig, VaeConfig};
use crate::printable::shown_name;

/// Layers and blocks are looked for up to this index.
const MOST_LAYERS: usize = 513;

/// The members of a decoder layer.
const LAYER: [&str; 11] = [
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
];

/// What a text encoder has besides its layers; the last three are not used.
const OUTSIDE_LAYERS: [&str; 4] = [
    "embed_tokens.weight",
    "norm.weight",
    "lm_head.weight",
    "rotary_emb.inv_freq",
];

/// Opens the text encoder in the folder or file at `path`.
///
/// # Errors
/// When its configuration or its files cannot be read, are quantised, or contradict each other.
pub fn open_text_encoder(path: &Path) -> Result<(TextConfig, Checkpoint)> {
    let stated = TextConfig::find(path)?;
    let checkpoint = Checkpoint::open_text_encoder(path)?;
    let is_stated = stated.is_some();
    let config = stated.unwrap_or_else(TextConfig::published);
    ensure_agreement(
        &checkpoint,
        "text encoder",
        is_stated,
        &text_sizes(&config, &checkpoint),
        &|name| is_text_tensor(name, &config),
    )?;
    Ok((config, checkpoint))
}

/// Opens the VAE in the folder or file at `path`.
///
/// # Errors
/// As [`open_text_encoder`].
pub fn open_vae(path: &Path) -> Result<(VaeConfig, Checkpoint)> {
    let stated = VaeConfig::find(path)?;
    let checkpoint = Checkpoint::open_vae(path)?;
    let is_stated = stated.is_some();
    let config = stated.unwrap_or_else(VaeConfig::published);
    ensure_agreement(
        &checkpoint,
        "VAE",
        is_stated,
        &vae_sizes(&config, &checkpoint),
        &|name| is_vae_tensor(name, &config),
    )?;
    Ok((config, checkpoint))
}

/// A size by its name in the `config.json`: as that says it, and as the tensors have it, where they tell.
type Size = (&'static str, usize, Option<usize>);

fn ensure_agreement(
    checkpoint: &Checkpoint,
    part: &str,
    is_stated: bool,
    sizes: &[Size],
    is_known: &dyn Fn(&str) -> bool,
) -> Result<()> {
    checkpoint.ensure_readable_weights()?;
    let refuse = |reason: String| Err(Error::file(checkpoint.path(), reason));
    for (entry, said, found) in sizes {
        match found {
            Some(found) if found != said && is_stated => {
                return refuse(format!(
                    "its config.json says {entry} = {said}, but the tensors have {found}"
                ));
            }
            Some(found) if found != said => {
                return refuse(format!(
                    "has no config.json of its own beside it, and is not the published {part}: {entry} is {found} instead of \
                     {said}; put its config.json beside it"
                ));
            }
            _ => {}
        }
    }
    match checkpoint.tensors().keys().find(|name| !is_known(name)) {
        None => Ok(()),
        Some(name) => refuse(format!(
            "holds tensor `{}`, for which a {part} of its configuration has no place",
            shown_name(name)
        )),
    }
}

/// How many of `{before}0{after}`, `{before}1{after}`, … there are, whatever is missing between; `None` without any.
fn count(checkpoint: &Checkpoint, before: &str, after: &str) -> Option<usize> {
    let is_there = |index: &usize| checkpoint.shape(&format!("{before}{index}{after}")).is_some();
    (0..MOST_LAYERS).rfind(is_there).map(|last| last + 1)
}

fn extent(checkpoint: &Checkpoint, name: &str, index: usize) -> Option<usize> {
    checkpoint.shape(name)?.get(index).copied()
}

fn text_sizes(config: &TextConfig, checkpoint: &Checkpoint) -> Vec<Size> {
    let of = |name: &str, index| extent(checkpoint, name, index);
    let in_layer = |name: &str, index| extent(checkpoint, &format!("layers.0.{name}"), index);
    let head_dim = in_layer("self_attn.q_norm.weight", 0);
    let heads = |name: &str| {
        let (rows, width) = in_layer(name, 0).zip(head_dim.filter(|width| *width > 0))?;
        Some(rows / width)
    };
    vec![
        ("vocab_size", config.vocabulary, of("embed_tokens.weight", 0)),
        ("hidden_size", config.dim, of("embed_tokens.weight", 1)),
        (
            "num_hidden_layers",
            config.layers,
            count(checkpoint, "layers.", ".input_layernorm.weight"),
        ),
        ("head_dim", config.head_dim, head_dim),
        ("num_attention_heads", config.heads, heads("self_attn.q_proj.weight")),
        ("num_key_value_heads", config.kv_heads, heads("self_attn.k_proj.weight")),
        (
            "intermediate_size",
            config.ffn_hidden,
            in_layer("mlp.gate_proj.weight", 0),
        ),
    ]
}

fn is_text_tensor(name: &str, config: &TextConfig) -> bool {
    let in_layer = || {
        let (index, member) = name.strip_prefix("layers.")?.split_once('.')?;
        let is_layer = index.parse::<usize>().is_ok_and(|index| index < config.layers);
        // Frequencies follow from the configuration; older files keep them beside it.
        Some(is_layer && (LAYER.contains(&member) || member == "self_attn.rotary_emb.inv_freq"))
    };
    OUTSIDE_LAYERS.contains(&name) || in_layer().unwrap_or(false)
}

fn vae_sizes(config: &VaeConfig, checkpoint: &Checkpoint) -> Vec<Size> {
    let of = |name: &str, index| extent(checkpoint, name, index);
    let widths = &config.block_out_channels;
    let deepest = widths.last().copied().unwrap_or(0);
    let blocks = widths.len();
    let mut sizes: Vec<Size> = vec![
        (
            "latent_channels",
            config.latent_channels,
            of("decoder.conv_in.weight", 1),
        ),
        ("out_channels", config.out_channels, of("decoder.conv_out.weight", 0)),
        (
            "the last of block_out_channels",
            deepest,
            of("decoder.conv_in.weight", 0),
        ),
        (
            "the length of block_out_channels",
            blocks,
            count(checkpoint, "decoder.up_blocks.", ".resnets.0.conv1.weight"),
        ),
        (
            "the length of block_out_channels",
            blocks,
            count(checkpoint, "encoder.down_blocks.", ".resnets.0.conv1.weight"),
        ),
        (
            "layers_per_block",
            config.layers_per_block,
            count(checkpoint, "decoder.up_blocks.0.resnets.", ".conv1.weight").map(|layers| layers.saturating_sub(1)),
        ),
        (
            "layers_per_block",
            config.layers_per_block,
            count(checkpoint, "encoder.down_blocks.0.resnets.", ".conv1.weight"),
        ),
    ];
    for (index, width) in widths.iter().enumerate() {
        let up = format!("decoder.up_blocks.{}.resnets.0.conv1.weight", blocks - 1 - index);
        let down = format!("encoder.down_blocks.{index}.resnets.0.conv1.weight");
        sizes.extend([&up, &down].map(|name| ("an entry of block_out_channels", *width, of(name, 0))));
    }
    sizes
}

/// Whether the tensor is one of the decoder or the encoder. `quant_conv` stands before the latent, where the encoder looks for it.
fn is_vae_tensor(name: &str, config: &VaeConfig) -> bool {
    let blocks = config.block_out_channels.len();
    let layers = config.layers_per_block;
    let below = |index: &str, most: usize| index.parse::<usize>().is_ok_and(|index| index < most);
    let Some((half, rest)) = name.split_once('.') else {
        return false;
    };
    if half == "loss" {
        // What a training run of the original left beside.
        return true;
    }
    let resnets = if half == "decoder" { layers + 1 } else { layers };
    let words: Vec<&str> = rest.split('.').collect();
    let is_member = match (half, &words[..]) {
        ("quant_conv", ["weight" | "bias"]) => return true,
        ("post_quant_conv", ["weight" | "bias"]) => return config.use_post_quant_conv,
        ("bn", ["running_mean" | "running_var" | "num_batches_tracked"]) => return config.batch_norm_eps.is_some(),
        ("decoder" | "encoder", ["conv_in" | "conv_out" | "conv_norm_out", _]) => true,
        ("decoder", ["up_blocks", block, rest @ ..]) | ("encoder", ["down_blocks", block, rest @ ..]) => {
            below(block, blocks)
                && match rest {
                    ["resnets", index, layer, _] => below(index, resnets) && is_resnet_layer(layer),
                    ["upsamplers", "0", "conv", _] => half == "decoder",
                    ["downsamplers", "0", "conv", _] => half == "encoder",
                    _ => false,
                }
        }
        ("decoder" | "encoder", ["mid_block", "resnets", "0" | "1", layer, _]) => is_resnet_layer(layer),
        ("decoder" | "encoder", ["mid_block", "attentions", "0", layer @ .., _]) => {
            let layer = layer.join(".");
            config.mid_block_add_attention
                && ["group_norm", "to_q", "to_k", "to_v", "to_out.0"].contains(&layer.as_str())
        }
        _ => false,
    };
    is_member && matches!(words.last(), Some(&("weight" | "bias")))
}

fn is_resnet_layer(name: &str) -> bool {
    ["norm1", "conv1", "norm2", "conv2", "conv_shortcut"].contains(&name)
}
