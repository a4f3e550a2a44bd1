//! Text encoder and VAE: what their configuration says and what their files hold must agree; the places and names they come with.

use std::path::Path;

use l2p_engine::checkpoint::{Checkpoint, ModelPaths, PathOverrides, open_text_encoder, open_vae};
use l2p_engine::layers::ParamSource;
use l2p_engine::model::config::{TextConfig, VaeConfig};
use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;
use safetensors::Dtype;
use serde_json::{Value, json};

use super::demo::{copy, edit, expect_refused, replace, with_entry};
use super::layouts::expect_tensors;
use super::model::{self, Tensors};

pub fn register(suite: &mut Suite) {
    suite.cpu("checkpoint::parts::every_size_must_agree", every_size_must_agree);
    suite.cpu("checkpoint::parts::nothing_may_be_left_over", nothing_may_be_left_over);
    suite.cpu(
        "checkpoint::parts::original_vae_names_are_read",
        original_vae_names_are_read,
    );
    suite.cpu("checkpoint::parts::wrappers_are_left_out", wrappers_are_left_out);
    suite.cpu("checkpoint::parts::files_stand_for_folders", files_stand_for_folders);
    suite.cpu(
        "checkpoint::parts::plain_names_win_over_variants",
        plain_names_win_over_variants,
    );
    suite.cpu(
        "checkpoint::parts::the_hub_cache_is_understood",
        the_hub_cache_is_understood,
    );
}

const TEXT: &str = "text_encoder/model.safetensors";
const VAE: &str = "vae/diffusion_pytorch_model.safetensors";

/// A size of a configuration that is not that of the tensors is named, before anything is drawn.
fn every_size_must_agree() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = copy(folder.path())?;
    let text = "text_encoder/config.json";
    let vae = "vae/config.json";
    let layers = |count: usize| vec![json!("full_attention"); count];
    let cases: Vec<(&str, &str, Value, String)> = vec![
        (text, "num_hidden_layers", json!(2), "says num_hidden_layers = 2, but lists 3 layer_types".into()),
        (text, "vocab_size", json!(4095), said("vocab_size", 4095, 4096)),
        (text, "head_dim", json!(64), said("head_dim", 64, 128)),
        (text, "num_attention_heads", json!(4), said("num_attention_heads", 4, 2)),
        (text, "num_key_value_heads", json!(2), said("num_key_value_heads", 2, 1)),
        (text, "intermediate_size", json!(256), said("intermediate_size", 256, 384)),
        (text, "hidden_size", json!(128), said("hidden_size", 128, 256)),
        (vae, "latent_channels", json!(4), said("latent_channels", 4, 16)),
        (vae, "out_channels", json!(4), said("out_channels", 4, 3)),
        (vae, "layers_per_block", json!(2), said("layers_per_block", 2, 1)),
        (
            vae,
            "block_out_channels",
            json!([64, 64, 64, 64]),
            said("the last of block_out_channels", 64, 128),
        ),
        (
            vae,
            "block_out_channels",
            json!([32, 64, 64, 128]),
            said("an entry of block_out_channels", 32, 64),
        ),
        (
            vae,
            "mid_block_add_attention",
            json!(false),
            "holds tensor `decoder.mid_block.attentions.0.group_norm.bias`, for which a VAE of its configuration has no place"
                .into(),
        ),
    ];
    for (file, key, value, message) in cases {
        let path = source.join(file);
        let kept = std::fs::read(&path)?;
        replace(&path, &with_entry(&path, key, Some(value))?)?;
        expect_refused(folder.path(), "source", &[], &message).map_err(|error| format!("{key}: {error:?}"))?;
        replace(&path, &kept)?;
    }
    // Older files do not list the kinds of their layers.
    let path = source.join(text);
    let kept = std::fs::read(&path)?;
    for count in [2, 4] {
        replace(&path, &with_entry(&path, "layer_types", None)?)?;
        replace(&path, &with_entry(&path, "num_hidden_layers", Some(json!(count)))?)?;
        expect_refused(folder.path(), "source", &[], &said("num_hidden_layers", count, 3))?;
        replace(&path, &with_entry(&path, "layer_types", Some(json!(layers(count))))?)?;
        expect_refused(folder.path(), "source", &[], &said("num_hidden_layers", count, 3))?;
    }
    replace(&path, &kept)?;
    // Fewer resolutions, with the kinds of blocks to match.
    let path = source.join(vae);
    let three = with_entry(&path, "block_out_channels", Some(json!([64, 64, 128])))?;
    replace(&path, &three)?;
    replace(&path, &with_entry(&path, "up_block_types", None)?)?;
    expect_refused(
        folder.path(),
        "source",
        &[],
        &said("the length of block_out_channels", 3, 4),
    )
}

fn said(entry: &str, said: usize, found: usize) -> String {
    format!("its config.json says {entry} = {said}, but the tensors have {found}")
}

fn nothing_may_be_left_over() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = copy(folder.path())?;
    for (file, name, part) in [
        (TEXT, "model.layers.0.self_attn.q_proj.bias", "text encoder"),
        (TEXT, "model.layers.3.input_layernorm.bias", "text encoder"),
        (TEXT, "visual.blocks.0.norm1.weight", "text encoder"),
        (VAE, "post_quant_conv.weight", "VAE"),
        (VAE, "decoder.up_blocks.0.resnets.2.norm1.weight", "VAE"),
        (VAE, "decoder.up_blocks.0.attentions.0.to_q.weight", "VAE"),
        (VAE, "decoder.time_conv_out.weight", "VAE"),
    ] {
        let path = source.join(file);
        let kept = std::fs::read(&path)?;
        edit(&path, |tensors| {
            drop(tensors.insert(name.into(), model::stored(name, Dtype::BF16, &[4])))
        })?;
        let shown = name.strip_prefix("model.").unwrap_or(name);
        let message = format!("holds tensor `{shown}`, for which a {part} of its configuration has no place");
        expect_refused(folder.path(), "source", &[], &message)?;
        replace(&path, &kept)?;
    }
    // What changes nothing may stay.
    edit(&source.join(TEXT), |tensors| {
        for name in ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"] {
            tensors.insert(name.into(), model::stored(name, Dtype::F32, &[4]));
        }
    })?;
    edit(&source.join(VAE), |tensors| {
        for name in ["quant_conv.weight", "loss.logvar"] {
            tensors.insert(name.into(), model::stored(name, Dtype::F32, &[4]));
        }
    })?;
    open_text_encoder(&source.join("text_encoder"))?;
    open_vae(&source.join("vae"))?;
    Ok(())
}

/// The demo's VAE under the names of the original autoencoders, its attention's matrices as 1×1 convolutions; written down as one
/// reads them in such a file, not by the engine's table.
fn original(tensors: &Tensors) -> Tensors {
    let mut renamed = Tensors::new();
    for (name, tensor) in tensors {
        let mut tensor = tensor.clone();
        let mut name = name
            .replace("conv_norm_out", "norm_out")
            .replace("conv_shortcut", "nin_shortcut");
        for (block, level) in [(0, 3), (1, 2), (2, 1), (3, 0)] {
            name = name
                .replace(&format!("up_blocks.{block}.resnets"), &format!("up.{level}.block"))
                .replace(
                    &format!("up_blocks.{block}.upsamplers.0"),
                    &format!("up.{level}.upsample"),
                )
                .replace(&format!("down_blocks.{block}.resnets"), &format!("down.{block}.block"))
                .replace(
                    &format!("down_blocks.{block}.downsamplers.0"),
                    &format!("down.{block}.downsample"),
                );
        }
        name = name
            .replace("mid_block.resnets.0", "mid.block_1")
            .replace("mid_block.resnets.1", "mid.block_2");
        if name.contains("mid_block.attentions.0") {
            name = name
                .replace("mid_block.attentions.0", "mid.attn_1")
                .replace("group_norm", "norm")
                .replace("to_out.0", "proj_out")
                .replace("to_", "");
            if tensor.shape.len() == 2 {
                tensor.shape.extend([1, 1]);
            }
        }
        renamed.insert(name, tensor);
    }
    renamed
}

fn original_vae_names_are_read() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = copy(folder.path())?;
    let expected = model::read(&source.join(VAE))?;
    let all = original(&expected);
    assert!(
        all.contains_key("decoder.up.3.block.1.conv2.weight"),
        "{:?}",
        all.keys()
    );
    assert!(all.contains_key("decoder.mid.attn_1.q.weight") && all.contains_key("encoder.down.2.downsample.conv.bias"));
    for prefix in ["", "first_stage_model.", "vae.", "model.", "module."] {
        edit(&source.join(VAE), |tensors| *tensors = model::prefixed(&all, prefix))?;
        let (config, checkpoint) = open_vae(&source.join("vae"))?;
        assert_eq!(config.block_out_channels, [64, 64, 64, 128]);
        expect_tensors(prefix, &checkpoint, &expected)?;
    }
    // The picture is the same, bit by bit.
    let pictures = [demo_picture(folder.path(), "source")?, {
        edit(&source.join(VAE), |tensors| *tensors = expected.clone())?;
        demo_picture(folder.path(), "source")?
    }];
    assert!(pictures[0] == pictures[1]);
    Ok(())
}

fn demo_picture(folder: &Path, model: &str) -> Result<Vec<u8>, Failed> {
    super::demo::draw(folder, model, &[])?.success()?;
    let bytes = std::fs::read(folder.join("o.png"))?;
    std::fs::remove_file(folder.join("o.png"))?;
    Ok(bytes)
}

fn wrappers_are_left_out() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = copy(folder.path())?;
    let text = model::read(&source.join(TEXT))?;
    let bare: Tensors = text
        .iter()
        .map(|(name, tensor)| (name.trim_start_matches("model.").to_owned(), tensor.clone()))
        .collect();
    for prefix in [
        "",
        "model.",
        "text_encoder.",
        "module.model.",
        "model.language_model.",
        "text_encoders.qwen3_4b.transformer.model.",
        "_orig_mod.model.",
    ] {
        edit(&source.join(TEXT), |tensors| *tensors = model::prefixed(&bare, prefix))?;
        let (config, checkpoint) = open_text_encoder(&source.join("text_encoder"))?;
        assert_eq!(config.layers, 3);
        expect_tensors(prefix, &checkpoint, &bare)?;
    }
    Ok(())
}

/// `--vae` and `--text-encoder` take a file, with its configuration beside it or of the published sizes.
fn files_stand_for_folders() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = copy(folder.path())?;
    // Which names its parts.
    std::fs::remove_file(source.join("l2p.json"))?;
    let expected = demo_picture(folder.path(), "source")?;
    let at = |name: &str| folder.path().join(name);
    std::fs::rename(source.join("vae"), at("other"))?;
    std::fs::rename(source.join("text_encoder"), at("text"))?;
    std::fs::rename(
        at("other/diffusion_pytorch_model.safetensors"),
        at("other/ae.safetensors"),
    )?;
    let files = [
        "--vae",
        "other/ae.safetensors",
        "--text-encoder",
        "text/model.safetensors",
    ];
    super::demo::draw(folder.path(), "source", &files)?.success()?;
    assert!(std::fs::read(at("o.png"))? == expected);
    std::fs::remove_file(at("o.png"))?;
    // A part of a whole model that is named by the model's folder.
    let whole = at("whole");
    std::fs::create_dir(&whole)?;
    std::fs::write(whole.join("model_index.json"), "{}")?;
    std::fs::rename(at("other"), whole.join("vae"))?;
    std::fs::rename(whole.join("vae/ae.safetensors"), whole.join("vae/m.safetensors"))?;
    let parts = ["--vae", "whole", "--text-encoder", "text/model.safetensors"];
    super::demo::draw(folder.path(), "source", &parts)?.success()?;
    std::fs::remove_file(at("o.png"))?;
    // Without a configuration, sizes other than the published ones need one.
    std::fs::remove_file(whole.join("vae/config.json"))?;
    std::fs::remove_file(at("text/config.json"))?;
    let parts = [
        "--vae",
        "whole/vae/m.safetensors",
        "--text-encoder",
        "text/model.safetensors",
    ];
    let message = "m.safetensors: has no config.json of its own beside it, and is not the published VAE: the last of block_out_channels is \
                   128 instead of 512; put its config.json beside it";
    expect_refused(folder.path(), "source", &parts, message)?;
    let message = open_text_encoder(&at("text/model.safetensors"))
        .err()
        .ok_or("accepted")?
        .to_string();
    assert!(
        message.ends_with(
            "is not the published text encoder: vocab_size is 4096 instead of 151936; put its config.json beside it"
        ),
        "{message}"
    );
    // Another part's configuration beside a file is not its own; in its folder it is wrong.
    std::fs::write(
        whole.join("vae/config.json"),
        json!({ "_class_name": "ZImageTransformer2DModel" }).to_string(),
    )?;
    assert_eq!(VaeConfig::find(&whole.join("vae/m.safetensors"))?, None);
    assert_eq!(
        VaeConfig::read(&whole.join("vae/m.safetensors"))?,
        VaeConfig::published()
    );
    let message = VaeConfig::read(&whole.join("vae")).err().ok_or("accepted")?.to_string();
    assert!(
        message.ends_with("describes a ZImageTransformer2DModel, expected an AutoencoderKL"),
        "{message}"
    );
    std::fs::write(at("text/config.json"), json!({ "model_type": "t5" }).to_string())?;
    assert_eq!(
        TextConfig::read(&at("text/model.safetensors"))?,
        TextConfig::published()
    );
    Ok(())
}

fn plain_names_win_over_variants() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = copy(folder.path())?;
    let vae = model::read(&source.join(VAE))?;
    let other: Tensors = vae
        .keys()
        .map(|name| (name.clone(), model::stored(name, Dtype::F16, &vae[name].shape)))
        .collect();
    for variant in ["fp16", "bf16", "non_ema"] {
        model::save(
            &source.join(format!("vae/diffusion_pytorch_model.{variant}.safetensors")),
            &other,
        )?;
    }
    expect_tensors("plain", &Checkpoint::open_vae(&source.join("vae"))?, &vae)?;
    demo_picture(folder.path(), "source")?;
    // Shards of a variant beside one plain file, and the other way round.
    let transformer = folder.path().join("transformer");
    let plain = model::latent(Dtype::BF16);
    let half = model::latent(Dtype::F16);
    model::save_shards(&transformer, &half, 2)?;
    std::fs::remove_file(transformer.join("diffusion_pytorch_model.safetensors.index.json"))?;
    for number in [1, 2] {
        let name = model::shard_name(number, 2);
        std::fs::rename(
            transformer.join(&name),
            transformer.join(name.replace("model-", "model.fp16-")),
        )?;
    }
    expect_tensors("only a variant", &Checkpoint::open_transformer(&transformer)?, &half)?;
    model::save(&transformer.join("diffusion_pytorch_model.safetensors"), &plain)?;
    expect_tensors("one file", &Checkpoint::open_transformer(&transformer)?, &plain)?;
    // Two variants and nothing plain, or names that tell of no variant: which is meant is for the user to say.
    let two = folder.path().join("two");
    std::fs::create_dir(&two)?;
    model::save(&two.join("m.fp16.safetensors"), &plain)?;
    model::save(&two.join("m.bf16.safetensors"), &plain)?;
    let message = Checkpoint::open_transformer(&two).err().ok_or("accepted")?.to_string();
    assert!(message.contains("these are two models; name one file"), "{message}");
    std::fs::rename(two.join("m.bf16.safetensors"), two.join("m.safetensors"))?;
    std::fs::rename(two.join("m.fp16.safetensors"), two.join("m.more.safetensors"))?;
    let message = Checkpoint::open_transformer(&two).err().ok_or("accepted")?.to_string();
    assert!(message.contains("these are two models; name one file"), "{message}");
    Ok(())
}

fn the_hub_cache_is_understood() -> Outcome {
    let folder = tempfile::tempdir()?;
    let cache = |name: &str| folder.path().join(format!("models--org--{name}"));
    for (name, snapshot) in [("model", "aaaa"), ("parts", "bbbb")] {
        std::fs::create_dir_all(cache(name).join("snapshots"))?;
        std::fs::create_dir_all(cache(name).join("refs"))?;
        std::fs::create_dir_all(cache(name).join("blobs"))?;
        std::fs::write(cache(name).join("refs/main"), snapshot)?;
        let source = copy(folder.path())?;
        std::fs::rename(source, cache(name).join("snapshots").join(snapshot))?;
    }
    let paths = ModelPaths::resolve(&cache("model"), &PathOverrides::default())?;
    assert_eq!(
        paths.text_encoder()?,
        cache("model").join("snapshots/aaaa/text_encoder")
    );
    paths.open_transformer()?;
    let named = PathOverrides {
        base: None,
        text_encoder: Some(cache("parts")),
        tokenizer: Some(cache("parts")),
        vae: Some(cache("parts")),
    };
    let paths = ModelPaths::resolve(&cache("model"), &named)?;
    for (found, part) in [
        (paths.text_encoder()?, "text_encoder"),
        (paths.tokenizer()?, "tokenizer"),
        (paths.vae()?, "vae"),
    ] {
        assert_eq!(found, cache("parts").join("snapshots/bbbb").join(part));
    }
    assert!(open_vae(paths.vae()?)?.1.shape("decoder.conv_in.weight").is_some());
    demo_picture(folder.path(), "models--org--model").map(drop)
}
