//! The files that cases begin from: whole, small and sound, made by the engine itself where it writes such files.
//!
//! | folder | holds |
//! | --- | --- |
//! | `latent/` | a latent model as diffusers lays it out, its transformer in two shards |
//! | `pixel/` | a pixel model behind an `l2p.json`, its text encoder and tokenizer those of `latent/` |
//! | `eight-bit/` | the same with a transformer of eight bits, in all spellings |
//! | `flux2/` | FLUX.2's transformer, in a single file and in a folder, and its autoencoder |
//! | `tokenizers/` | tokenizer folders of each kind of vocabulary |
//! | `templates/` | chat templates |
//! | `data/` | a data set: pictures of each format, metadata of each kind |
//! | `inputs/` | prompts, noise, caption features, a picture that carries settings |
//! | `sets/` | prompts of scorers: GenEval's lines, a folder of captions |
//! | `requests/` | bodies of requests to the server, in its dialects |
//! | `scores/` | features and results as other programs write them |
//! | `factory/` | a taxonomy, answers of language models, prompts with verdicts |
//! | `run/` | a training run of two steps, its configuration beside it |
//! | `tree/` | records of benchmarks, where the source tree has them |

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Parser;
use l2p_engine::checkpoint::{Values, write_values};
use l2p_engine::image_io::{RgbImage, Settings, StartSettings, WeightSettings, WriteOptions, write_image};
use l2p_engine::layers::metas;
use l2p_engine::model::Spec;
use l2p_engine::model::config::{ModelKind, VaeConfig};
use l2p_engine::model::detailer::DetailerLayout;
use l2p_engine::model::flux2::{Flux2, Flux2Config};
use l2p_engine::model::vae::{VaeDecoder, VaeEncoder};
use l2p_engine::model::zimage::{DitConfig, ZImage};
use l2p_tests::hash_uniform;
use serde_json::{Value, json};

use crate::{eight_bit, vocabulary};

/// Files by their path within the base.
#[derive(Default)]
pub struct Base(pub BTreeMap<String, Vec<u8>>);

impl Base {
    /// The files below `folder`.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn load(folder: &Path) -> anyhow::Result<Self> {
        let mut base = Base::default();
        base.add(folder, folder)?;
        Ok(base)
    }

    fn add(&mut self, root: &Path, folder: &Path) -> anyhow::Result<()> {
        for entry in folder.read_dir()? {
            let path = entry?.path();
            if path.is_dir() {
                self.add(root, &path)?;
            } else {
                let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
                self.0.insert(name, std::fs::read(&path)?);
            }
        }
        Ok(())
    }

    /// The paths that begin with `prefix`.
    pub fn under(&self, prefix: &str) -> Vec<&str> {
        let names = self.0.keys().map(String::as_str);
        names.filter(|name| name.starts_with(prefix)).collect()
    }
}

/// Makes the base in an empty folder.
///
/// # Errors
/// When the engine refuses what it should take, or the disk does.
pub fn make(folder: &Path) -> anyhow::Result<()> {
    latent(&folder.join("latent"))?;
    pixel(&folder.join("pixel"), &|path, tensors| write_tensors(path, tensors))?;
    pixel(&folder.join("eight-bit"), &|path, tensors| {
        eight_bit::write(path, tensors)
    })?;
    flux2(&folder.join("flux2"))?;
    vocabulary::write_tokenizers(&folder.join("tokenizers"))?;
    write(&folder.join("templates/qwen.jinja"), vocabulary::TEMPLATE.as_bytes())?;
    write(
        &folder.join("templates/branches.jinja"),
        vocabulary::BRANCHES.as_bytes(),
    )?;
    data(&folder.join("data"))?;
    inputs(&folder.join("inputs"))?;
    sets(&folder.join("sets"))?;
    requests(&folder.join("requests"))?;
    scores(&folder.join("scores"))?;
    factory(&folder.join("factory"))?;
    run(folder)?;
    records(&folder.join("tree"))
}

fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    std::fs::write(path, bytes).with_context(|| path.display().to_string())
}

fn write_json(path: &Path, value: &Value) -> anyhow::Result<()> {
    write(path, format!("{value:#}\n").as_bytes())
}

/// Tensors of these names and shapes, with small numbers that depend on the name.
fn values(tensors: Vec<(String, Vec<usize>)>) -> Vec<(String, Values)> {
    let mut all: Vec<(String, Values)> = tensors
        .into_iter()
        .map(|(name, shape)| {
            let scale = if name.contains("norm") { 1.0 } else { 0.2 };
            let values = hash_uniform(&name, shape.iter().product());
            let values = values.into_iter().map(|value| value * scale).collect();
            (name, Values { shape, values })
        })
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn write_tensors(path: &Path, tensors: Vec<(String, Vec<usize>)>) -> anyhow::Result<()> {
    std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    Ok(write_values(path, &values(tensors))?)
}

/// Features of a caption, and the text encoder's width.
const WIDTH: usize = 16;

fn transformer(kind: ModelKind) -> DitConfig {
    let (patch, in_channels) = match kind {
        ModelKind::Latent => (2, 4),
        ModelKind::Pixel => (16, 3),
    };
    DitConfig {
        kind,
        dim: 16,
        heads: 2,
        head_dim: 8,
        layers: 1,
        refiner_layers: 1,
        ffn_hidden: 24,
        caption_width: WIDTH,
        patch,
        in_channels,
        rope_theta: 256.0,
        axes_dims: [4, 2, 2],
        norm_eps: 1e-5,
        t_scale: 1000.0,
        t_frequencies: 16,
        t_hidden: 16,
        adaln_width: 8,
    }
}

fn latent(folder: &Path) -> anyhow::Result<()> {
    let index = json!({
        "_class_name": "ZImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    });
    write_json(&folder.join("model_index.json"), &index)?;
    let scheduler = json!({
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0, "shift_terminal": null,
        "use_dynamic_shifting": false, "use_karras_sigmas": false, "base_shift": 0.5, "max_shift": 1.15,
    });
    write_json(&folder.join("scheduler/scheduler_config.json"), &scheduler)?;
    let config = transformer(ModelKind::Latent);
    write_json(&folder.join("transformer/config.json"), &config.to_transformer_json())?;
    let tensors = ZImage {
        config: config.clone(),
        head: None,
    };
    let tensors = tensors.tensors();
    let half = tensors.len() / 2;
    let mut map = serde_json::Map::new();
    for (number, part) in [&tensors[..half], &tensors[half..]].into_iter().enumerate() {
        let name = format!("diffusion_pytorch_model-{:05}-of-00002.safetensors", number + 1);
        map.extend(part.iter().map(|(tensor, _)| (tensor.clone(), name.as_str().into())));
        write_tensors(&folder.join("transformer").join(name), part.to_vec())?;
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    write_json(
        &folder.join("transformer/diffusion_pytorch_model.safetensors.index.json"),
        &index,
    )?;
    text_encoder(&folder.join("text_encoder"))?;
    vocabulary::write_byte_pairs(&folder.join("tokenizer"))?;
    vae(&folder.join("vae"))
}

/// A latent model of the second family with its autoencoder.
fn flux2(folder: &Path) -> anyhow::Result<()> {
    let model = Flux2 {
        config: Flux2Config {
            kind: ModelKind::Latent,
            dim: 16,
            heads: 2,
            head_dim: 8,
            double_blocks: 1,
            single_blocks: 1,
            ffn_hidden: 24,
            caption_width: 3 * WIDTH,
            patch: 1,
            in_channels: 16,
            rope_theta: 2000.0,
            axes_dims: [2; 4],
            norm_eps: 1e-6,
            t_frequencies: 16,
        },
        head: None,
    };
    write_json(
        &folder.join("model_index.json"),
        &json!({"_class_name": "Flux2KleinPipeline"}),
    )?;
    let scheduler = json!({
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": true,
    });
    write_json(&folder.join("scheduler/scheduler_config.json"), &scheduler)?;
    write_json(&folder.join("transformer/config.json"), &model.config_json())?;
    write_tensors(
        &folder.join("transformer/diffusion_pytorch_model.safetensors"),
        model.tensors(),
    )?;
    // The names of the original files, as far as these are enough to be told by.
    let single = model.tensors().into_iter().map(|(name, shape)| {
        let name = name.replace("norm_out.linear", "final_layer.adaLN_modulation.1");
        (name.replace("x_embedder", "img_in"), shape)
    });
    write_tensors(&folder.join("single.safetensors"), single.collect())?;
    let config = json!({
        "_class_name": "AutoencoderKLFlux2", "latent_channels": 4, "block_out_channels": [8, 8], "layers_per_block": 1,
        "norm_num_groups": 4, "batch_norm_eps": 1e-4, "patch_size": [2, 2], "use_quant_conv": true, "use_post_quant_conv": true,
    });
    write_json(&folder.join("vae/config.json"), &config)?;
    let config = VaeConfig::from_json(&config.to_string())?;
    let (decoder, encoder) = (VaeDecoder::describe(&config), VaeEncoder::describe(&config));
    let described = [metas(&decoder), metas(&encoder)].concat();
    let parts = described.into_iter().flat_map(|meta| meta.parts.clone());
    let mut tensors: Vec<_> = parts.map(|part| (part.name, part.shape)).collect();
    tensors.sort();
    tensors.dedup();
    let mut tensors = values(tensors);
    let variances = tensors.iter_mut().filter(|(name, _)| name == "bn.running_var");
    variances.for_each(|(_, own)| own.values.iter_mut().for_each(|value| *value = value.abs()));
    Ok(write_values(
        &folder.join("vae/diffusion_pytorch_model.safetensors"),
        &tensors,
    )?)
}

/// A small taxonomy, prompts that were written over it and checked, and answers as language models give them.
fn factory(folder: &Path) -> anyhow::Result<()> {
    let taxonomy = json!({"version": 1, "classes": [
        {"name": "nature", "sub_classes": [{"name": "animals", "categories": {"fox": "狐狸", "owl": null, "newt": "蝾螈"}}]},
        {"name": "synthetic", "sub_classes": [{"name": "signs", "renders_text": true, "categories": ["door plate", "trail sign"]}]},
    ]});
    write_json(&folder.join("taxonomy.json"), &taxonomy)?;
    for (name, answer) in [
        ("list.txt", "Sure:\n```json\n[\"a \\\"b\\\"\", \"c\",]\n```"),
        (
            "object.txt",
            "<think>[]</think>{\"prompts\": [{\"prompt\": \"a\"}, \"b, [c]\"]}",
        ),
        ("verdict.txt", "{\"is_valid\": false, \"reason\": \"too short\"}"),
    ] {
        write(&folder.join("answers").join(name), answer.as_bytes())?;
    }
    let path = |name: &str| folder.join(name).display().to_string();
    let (set, own) = (path("set"), path("taxonomy.json"));
    for arguments in [
        &["prompts", "--count", "6", "--taxonomy", &own, "--out", &set][..],
        &["check", "--out", &set],
    ] {
        let arguments = ["l2p-data"].iter().chain(arguments);
        l2p_bins::data::data(l2p_bins::data::Arguments::try_parse_from(arguments)?)?;
    }
    Ok(())
}

fn text_encoder(folder: &Path) -> anyhow::Result<()> {
    let (heads, kv_heads, head_dim, hidden, layers) = (2, 1, 8, 24, 3);
    let config = json!({
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "head_dim": head_dim, "hidden_act": "silu",
        "hidden_size": WIDTH, "intermediate_size": hidden, "model_type": "qwen3", "num_attention_heads": heads,
        "num_hidden_layers": layers, "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "tie_word_embeddings": true,
        "vocab_size": vocabulary::TOKENS, "max_position_embeddings": 512,
    });
    write_json(&folder.join("config.json"), &config)?;
    let generation = json!({"eos_token_id": [vocabulary::TOKENS - 1], "top_k": 20, "top_p": 0.8});
    write_json(&folder.join("generation_config.json"), &generation)?;
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![vocabulary::TOKENS, WIDTH])];
    tensors.push(("model.norm.weight".into(), vec![WIDTH]));
    for layer in 0..layers {
        for (name, shape) in [
            ("input_layernorm.weight", vec![WIDTH]),
            ("post_attention_layernorm.weight", vec![WIDTH]),
            ("self_attn.q_proj.weight", vec![heads * head_dim, WIDTH]),
            ("self_attn.k_proj.weight", vec![kv_heads * head_dim, WIDTH]),
            ("self_attn.v_proj.weight", vec![kv_heads * head_dim, WIDTH]),
            ("self_attn.o_proj.weight", vec![WIDTH, heads * head_dim]),
            ("self_attn.q_norm.weight", vec![head_dim]),
            ("self_attn.k_norm.weight", vec![head_dim]),
            ("mlp.gate_proj.weight", vec![hidden, WIDTH]),
            ("mlp.up_proj.weight", vec![hidden, WIDTH]),
            ("mlp.down_proj.weight", vec![WIDTH, hidden]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}"), shape));
        }
    }
    write_tensors(&folder.join("model.safetensors"), tensors)
}

fn vae(folder: &Path) -> anyhow::Result<()> {
    const CHANNELS: usize = 4;
    let config = json!({
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [CHANNELS, CHANNELS],
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"], "in_channels": 3, "latent_channels": CHANNELS,
        "layers_per_block": 1, "mid_block_add_attention": true, "norm_num_groups": 2, "out_channels": 3,
        "scaling_factor": 0.9, "shift_factor": 0.1, "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
        "use_post_quant_conv": false, "use_quant_conv": false,
    });
    write_json(&folder.join("config.json"), &config)?;
    let mut tensors = Vec::new();
    let mut layer = |name: &str, shape: Vec<usize>| {
        tensors.push((format!("decoder.{name}.bias"), vec![shape[0]]));
        tensors.push((format!("decoder.{name}.weight"), shape));
    };
    let conv = |outputs: usize| vec![outputs, CHANNELS, 3, 3];
    layer("conv_in", conv(CHANNELS));
    layer("conv_norm_out", vec![CHANNELS]);
    layer("conv_out", conv(3));
    layer("up_blocks.0.upsamplers.0.conv", conv(CHANNELS));
    layer("mid_block.attentions.0.group_norm", vec![CHANNELS]);
    for name in ["to_q", "to_k", "to_v", "to_out.0"] {
        layer(&format!("mid_block.attentions.0.{name}"), vec![CHANNELS, CHANNELS]);
    }
    for block in ["mid_block", "up_blocks.0", "up_blocks.1"] {
        for resnet in 0..2 {
            for number in 1..=2 {
                layer(&format!("{block}.resnets.{resnet}.norm{number}"), vec![CHANNELS]);
                layer(&format!("{block}.resnets.{resnet}.conv{number}"), conv(CHANNELS));
            }
        }
    }
    write_tensors(&folder.join("diffusion_pytorch_model.safetensors"), tensors)
}

/// Writes tensors of these names and shapes.
type Write<'a> = &'a dyn Fn(&Path, Vec<(String, Vec<usize>)>) -> anyhow::Result<()>;

fn pixel(folder: &Path, write: Write<'_>) -> anyhow::Result<()> {
    let config = transformer(ModelKind::Pixel);
    let head = DetailerLayout::for_patch(config.patch, Some(&[2, 2, 4, 4]), Some(4), config.dim)?;
    let spec = ZImage {
        config,
        head: Some(head),
    };
    let tensors = spec.tensors();
    write_json(&folder.join("transformer/config.json"), &spec.config_json())?;
    write(&folder.join("transformer/diffusion_pytorch_model.safetensors"), tensors)?;
    let scheduler = json!({
        "_class_name": "DPMSolverMultistepScheduler", "num_train_timesteps": 100, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "beta_end": 0.012, "prediction_type": "v_prediction", "rescale_betas_zero_snr": true, "timestep_spacing": "leading",
        "steps_offset": 1, "thresholding": false, "solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint",
        "final_sigmas_type": "zero", "trained_betas": null, "variance_type": null, "use_flow_sigmas": false, "flow_shift": 1.0,
    });
    write_json(&folder.join("scheduler/scheduler_config.json"), &scheduler)?;
    let schedule = json!({
        "beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 50,
        "rescale_betas_zero_snr": false, "timestep_spacing": "trailing", "steps_offset": 0, "set_alpha_to_one": true,
    });
    let manifest = json!({
        "format": 1, "kind": "pixel", "transformer": "transformer", "text_encoder": "../latent/text_encoder",
        "tokenizer": "../latent/tokenizer", "scheduler": "scheduler", "objective": {"prediction": "epsilon", "schedule": schedule},
        "defaults": {"width": 16, "height": 16, "steps": 1, "shift": 3.0, "cfg": 1.0, "solver": "dpm++2m"},
    });
    write_json(&folder.join("l2p.json"), &manifest)
}

/// A gradient in a colour that depends on the number.
fn picture(side: usize, number: usize) -> anyhow::Result<RgbImage> {
    let pixels =
        (0..side * side).flat_map(|pixel| [pixel % side * 8, pixel / side * 8, number * 40].map(|value| value as u8));
    Ok(RgbImage::new(side, side, pixels.collect())?)
}

fn data(folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    let (mut lines, mut list, mut table) = (String::new(), Vec::new(), "file_name,text,seed\n".to_owned());
    for (number, extension) in ["png", "jpg", "webp", "png"].into_iter().enumerate() {
        let name = format!("{number}.{extension}");
        write_image(
            &folder.join(&name),
            &picture(16 + 4 * number, number)?,
            &WriteOptions::default(),
        )?;
        let caption = ["fox", "red apple, green leaf", "", "a \"house\""][number];
        let entry = json!({"file_name": name, "prompt": caption, "seed": number});
        lines += &format!("{entry}\n");
        list.push(entry);
        table += &format!("{name},\"{}\",{number}\n", caption.replace('"', "\"\""));
    }
    // Palettes, grey and deep pixels are read too.
    let grey = image::GrayAlphaImage::from_fn(5, 4, |x, y| image::LumaA([(x * 50) as u8, (y * 60) as u8]));
    grey.save(folder.join("grey.png"))?;
    let deep = image::ImageBuffer::<image::Rgb<u16>, _>::from_fn(4, 5, |x, y| {
        image::Rgb([(x * 9999) as u16, (y * 9999) as u16, 7])
    });
    deep.save(folder.join("deep.png"))?;
    write(&folder.join("metadata.jsonl"), lines.as_bytes())?;
    write_json(&folder.join("list/metadata.json"), &list.into())?;
    write(&folder.join("table/metadata.csv"), table.as_bytes())
}

fn inputs(folder: &Path) -> anyhow::Result<()> {
    let prompts =
        "{\"prompt\": \"a fox\", \"negative\": \"blur\", \"seed\": 3, \"out\": \"fox.png\"}\n{\"prompt\": \"cat\"}\n";
    write(&folder.join("prompts.jsonl"), prompts.as_bytes())?;
    write(
        &folder.join("data.jsonl"),
        b"{\"prompt\": \"a fox\", \"seed\": 3}\n{\"text\": \"cat\"}\n",
    )?;
    let noise = vec![("noise".to_owned(), vec![3, 16, 16])];
    write_tensors(&folder.join("noise.safetensors"), noise)?;
    let embeds = vec![
        ("cap.0".to_owned(), vec![5, WIDTH]),
        ("neg.0".to_owned(), vec![3, WIDTH]),
    ];
    write_tensors(&folder.join("embeds.safetensors"), embeds)?;
    let settings = Settings {
        prompt: "a fox".into(),
        negative: "blur".into(),
        seed: 3,
        steps: 1,
        cfg: 1.5,
        solver: Some("dpm++2m".into()),
        shift: 3.0,
        width: 16,
        height: 16,
        model: "pixel".into(),
        rng: "philox".into(),
        weights: Some(WeightSettings {
            trunk: "int8".into(),
            trunk_keep: vec!["layers.0.*".into()],
            text: "fp8".into(),
        }),
        start: Some(StartSettings {
            picture_sha256: "00ff".into(),
            strength: 0.6,
            mask_sha256: Some("ff00".into()),
        }),
    };
    let options = WriteOptions {
        settings: Some(&settings),
        ..WriteOptions::default()
    };
    Ok(write_image(&folder.join("like.png"), &picture(16, 1)?, &options)?)
}

/// Bodies of requests to the server, each named after its dialect.
fn requests(folder: &Path) -> anyhow::Result<()> {
    let draw = r#"{"prompt": "a fox", "negative": "blur", "width": 64, "height": 64, "steps": 3, "cfg": 1.5, "shift": 3, "seed": 7, "count": 2,
                   "format": "webp", "image": "data:image/png;base64,UE5H", "strength": 0.5, "mask": "UE5H", "feather": 3}"#;
    let generations = r#"{"model": "pixel", "prompt": "a fox", "n": 2, "size": "64x64", "response_format": "b64_json", "output_format": "jpeg",
                          "output_compression": 80, "quality": "high", "stream": true, "partial_images": 2, "seed": 7, "steps": 3, "cfg": 1.5}"#;
    let txt2img = r#"{"prompt": "a fox", "negative_prompt": "", "seed": -1, "steps": 3, "cfg_scale": 1.5, "width": 64, "height": 64,
                      "batch_size": 2, "n_iter": 2, "sampler_name": "Euler a", "override_settings": {"a": [1, null]}}"#;
    let img2img = r#"{"prompt": "a fox", "init_images": ["UE5H"], "mask": "UE5H", "denoising_strength": 0.5, "mask_blur": 4,
                      "inpainting_mask_invert": 1, "width": 64}"#;
    for (name, text) in [
        ("draw", draw),
        ("generations", generations),
        ("txt2img", txt2img),
        ("img2img", img2img),
    ] {
        write(&folder.join(format!("{name}.json")), text.as_bytes())?;
    }
    let part = |name: &str, head: &str, body: &str| {
        format!("--xx\r\ncontent-disposition: form-data; name=\"{name}\"{head}\r\n\r\n{body}\r\n")
    };
    let form = [
        part("prompt", "", "a fox"),
        part("image", "; filename=\"a.png\"\r\ncontent-type: image/png", "PNG"),
        part("mask", "; filename=\"m.png\"\r\ncontent-type: image/png", "PNG"),
        part("n", "", "2"),
        part("extend", "", "1,2,3,4"),
        "--xx--\r\n".to_owned(),
    ];
    write(&folder.join("edits.form"), form.concat().as_bytes())
}

fn sets(folder: &Path) -> anyhow::Result<()> {
    let lines = "{\"tag\": \"counting\", \"include\": [{\"class\": \"fox\", \"count\": 2}], \"prompt\": \"two foxes\"}\n\
                 {\"tag\": \"colors\", \"include\": [], \"exclude\": [], \"prompt\": \"a red fox\"}\n";
    write(&folder.join("geneval.jsonl"), lines.as_bytes())?;
    write(&folder.join("captions/partiprompts1.txt"), b"a fox\n")?;
    write(&folder.join("captions/b.txt"), "a café\n".as_bytes())
}

fn scores(folder: &Path) -> anyhow::Result<()> {
    write(
        &folder.join("second.npz"),
        include_bytes!("../fixtures/data/scores/second.npz"),
    )?;
    write(
        &folder.join("moments.npz"),
        include_bytes!("../fixtures/data/scores/second-moments.npz"),
    )?;
    write(
        &folder.join("first.npy"),
        include_bytes!("../fixtures/data/scores/first.npy"),
    )?;
    let line = "{\"filename\":\"0/0.png\",\"tag\":\"colors\",\"prompt\":\"p\",\"correct\":true,\"reason\":\"\",\"metadata\":\"{}\"}\n";
    write(
        &folder.join("geneval.jsonl"),
        [line, &line.replace("0/0", "0/1")].concat().as_bytes(),
    )?;
    let dpg = "out/a.png, 1.0, 0.5, 0.75, 0.75, 0.75\nModel: out\nL1 category scores:\n\tentity: 60.0\nL2 category scores:\n\
               \tentity - whole: 60.0\nImage path: out\nDPG-Bench score: 75.0\n";
    write(&folder.join("dpg.txt"), dpg.as_bytes())
}

const TRAIN: &str = "\
model = \"pixel\"
data = \"data\"
cache = \"run/cache\"
size = \"16x16\"
policy = \"paper:1\"
held_out = 1
steps = 2
batch = 1
accumulate = 1
lr = 1e-3
weight_decay = 0.01
clip_norm = 1.0
ema = 0.9
schedule = \"cosine\"
objective = \"epsilon\"
betas = \"linear\"
zero_snr = false
shift = 1.5
sample_solver = \"ddim\"
warmup = 1
log_every = 1
validate_every = 1
save_every = 1
keep_last = 2
sample_every = 0
workers = 1
seed = 7
caption_dropout = 0.1
max_damaged = 1.0
";

/// Trains the pixel model for two steps, as a user does.
fn run(folder: &Path) -> anyhow::Result<()> {
    write(&folder.join("train.toml"), TRAIN.as_bytes())?;
    let path = |name: &str| folder.join(name).display().to_string();
    let arguments = [
        "l2p-train",
        "--device",
        "cpu",
        "--config",
        &path("train.toml"),
        "--out",
        &path("run"),
    ];
    l2p_bins::train::train(l2p_bins::train::Arguments::try_parse_from(arguments)?)?;
    // The numbers that depend on the hour and the machine.
    let log = folder.join("run/log.jsonl");
    let text = std::fs::read_to_string(&log)?;
    let fixed = text.lines().map(|line| {
        let mut record: Value = serde_json::from_str(line)?;
        for (name, value) in record.as_object_mut().into_iter().flatten() {
            let measured =
                name.contains("second") || matches!(name.as_str(), "time" | "data_wait" | "mfu" | "peak_memory_bytes");
            if measured && value.is_number() {
                *value = 1.into();
            }
        }
        Ok(format!("{record}\n"))
    });
    let fixed: anyhow::Result<String> = fixed.collect();
    write(&log, fixed?.as_bytes())?;
    for name in ["report.html", "events"] {
        let path = folder.join("run").join(name);
        let _ = std::fs::remove_file(&path).or_else(|_| std::fs::remove_dir_all(&path));
    }
    Ok(())
}

/// Records that come with the source tree, cut to a few rows.
fn records(folder: &Path) -> anyhow::Result<()> {
    let source = match std::env::var_os("L2P_SOURCE") {
        Some(source) => source.into(),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".."),
    };
    let results = source.join("bench/results/h200");
    for name in ["parity.json", "step.json", "train.json", "4k.json"] {
        let text = std::fs::read(results.join(name)).with_context(|| name.to_owned())?;
        let mut record: Value = serde_json::from_slice(&text)?;
        shorten(&mut record);
        write_json(&folder.join("bench/results/gpu").join(name), &record)?;
    }
    let sections =
        ["parity", "4k", "train", "plots"].map(|name| format!("<!-- bench:{name} -->\n<!-- /bench:{name} -->\n"));
    write(&folder.join("README.md"), sections.concat().as_bytes())
}

/// Lists of more than two entries lose the rest.
fn shorten(value: &mut Value) {
    match value {
        Value::Array(items) => {
            items.truncate(2);
            items.iter_mut().for_each(shorten);
        }
        Value::Object(entries) => entries.values_mut().for_each(shorten),
        _ => {}
    }
}
