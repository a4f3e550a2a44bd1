//! Small models on disk, written with the safetensors crate alone.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use l2p_tests::hash_uniform;
use libtest_mimic::Failed;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

pub const DIM: usize = 128;
pub const FFN: usize = 96;
pub const CAPTION: usize = 48;
pub const LAYERS: usize = 4;
pub const WIDTHS: [usize; 4] = [4, 6, 8, 10];
pub const BOTTLENECK: usize = 12;

/// A tensor as a file holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

pub type Tensors = BTreeMap<String, Stored>;

/// A tensor of deterministic values, which its name decides.
pub fn stored(name: &str, dtype: Dtype, shape: &[usize]) -> Stored {
    let values = hash_uniform(name, shape.iter().product());
    let bytes = values
        .iter()
        .flat_map(|&value| match dtype {
            Dtype::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
            _ => value.to_le_bytes().to_vec(),
        })
        .collect();
    Stored {
        dtype,
        shape: shape.to_vec(),
        bytes,
    }
}

fn trunk() -> Vec<(String, Vec<usize>)> {
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("t_embedder.mlp.0.weight".into(), vec![64, 32]),
        ("t_embedder.mlp.0.bias".into(), vec![64]),
        ("t_embedder.mlp.2.weight".into(), vec![DIM, 64]),
        ("t_embedder.mlp.2.bias".into(), vec![DIM]),
        ("cap_embedder.0.weight".into(), vec![CAPTION]),
        ("cap_embedder.1.weight".into(), vec![DIM, CAPTION]),
        ("cap_embedder.1.bias".into(), vec![DIM]),
        ("x_pad_token".into(), vec![1, DIM]),
        ("cap_pad_token".into(), vec![1, DIM]),
    ];
    let mut block = |name: String, modulated: bool| {
        let mut add = |end: &str, shape: &[usize]| shapes.push((format!("{name}.{end}"), shape.to_vec()));
        for end in ["to_q", "to_k", "to_v", "to_out.0"] {
            add(&format!("attention.{end}.weight"), &[DIM, DIM]);
        }
        for end in ["norm_q", "norm_k"] {
            add(&format!("attention.{end}.weight"), &[128]);
        }
        for end in ["attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"] {
            add(&format!("{end}.weight"), &[DIM]);
        }
        add("feed_forward.w1.weight", &[FFN, DIM]);
        add("feed_forward.w2.weight", &[DIM, FFN]);
        add("feed_forward.w3.weight", &[FFN, DIM]);
        if modulated {
            add("adaLN_modulation.0.weight", &[4 * DIM, DIM]);
            add("adaLN_modulation.0.bias", &[4 * DIM]);
        }
    };
    block("noise_refiner.0".into(), true);
    block("context_refiner.0".into(), false);
    for index in 0..LAYERS {
        block(format!("layers.{index}"), true);
    }
    shapes
}

/// Makes the tensors of these shapes; their values depend on `salt` too.
fn tensors(shapes: Vec<(String, Vec<usize>)>, dtype: Dtype, salt: &str) -> Tensors {
    let make = |(name, shape): (String, Vec<usize>)| {
        let tensor = stored(&format!("{salt}{name}"), dtype, &shape);
        (name, tensor)
    };
    shapes.into_iter().map(make).collect()
}

/// A latent model: 16 channels, patch 2.
pub fn latent(dtype: Dtype) -> Tensors {
    let mut shapes = trunk();
    for (name, shape) in [
        ("all_x_embedder.2-1.weight", vec![DIM, 64]),
        ("all_x_embedder.2-1.bias", vec![DIM]),
        ("all_final_layer.2-1.linear.weight", vec![64, DIM]),
        ("all_final_layer.2-1.linear.bias", vec![64]),
        ("all_final_layer.2-1.adaLN_modulation.1.weight", vec![DIM, DIM]),
        ("all_final_layer.2-1.adaLN_modulation.1.bias", vec![DIM]),
    ] {
        shapes.push((name.into(), shape));
    }
    tensors(shapes, dtype, "")
}

/// The published names and shapes of the input projection and head of a pixel model of patch 16.
pub fn pixel_ends(dim: usize, widths: [usize; 4], bottleneck: usize) -> Vec<(String, Vec<usize>)> {
    let [w1, w2, w3, w4] = widths;
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("all_x_embedder.16-1.weight".into(), vec![dim, 768]),
        ("all_x_embedder.16-1.bias".into(), vec![dim]),
    ];
    for (name, outputs, inputs, side) in [
        ("enc1.0", w1, 3, 3),
        ("enc2.0", w2, w1, 3),
        ("enc3.0", w3, w2, 3),
        ("enc4.0", w4, w3, 3),
        ("bottleneck.0", bottleneck, w4 + dim, 1),
        ("up4.1", w4, bottleneck, 3),
        ("dec4.0", w3, 2 * w4, 3),
        ("up3.1", w3, w3, 3),
        ("dec3.0", w2, 2 * w3, 3),
        ("up2.1", w2, w2, 3),
        ("dec2.0", w1, 2 * w2, 3),
        ("up1.1", w1, w1, 3),
        ("dec1.0", w1, 2 * w1, 3),
        ("out_conv", 3, w1, 1),
    ] {
        shapes.push((
            format!("local_decoder.{name}.weight"),
            vec![outputs, inputs, side, side],
        ));
        shapes.push((format!("local_decoder.{name}.bias"), vec![outputs]));
    }
    shapes
}

/// A pixel model: patch 16, a head of four stages.
pub fn pixel(dtype: Dtype) -> Tensors {
    tensors(
        trunk().into_iter().chain(pixel_ends(DIM, WIDTHS, BOTTLENECK)).collect(),
        dtype,
        "",
    )
}

/// What training by the paper's recipe changes of [`pixel`] with one block at either end: a delta with other values.
pub fn delta(dtype: Dtype) -> Tensors {
    let is_trained = |(name, _): &(String, Vec<usize>)| name.starts_with("layers.0.") || name.starts_with("layers.3.");
    let ends = pixel_ends(DIM, WIDTHS, BOTTLENECK);
    let shapes = trunk().into_iter().filter(is_trained).chain(ends).collect();
    tensors(shapes, dtype, "trained ")
}

/// The same model with packed names.
pub fn packed(plain: &Tensors) -> Tensors {
    let mut packed = Tensors::new();
    for (name, tensor) in plain {
        if name.ends_with("attention.to_k.weight") || name.ends_with("attention.to_v.weight") {
            continue;
        }
        if let Some(block) = name.strip_suffix("to_q.weight") {
            let parts = ["to_q", "to_k", "to_v"].map(|part| &plain[&format!("{block}{part}.weight")]);
            let stacked = Stored {
                dtype: tensor.dtype,
                shape: vec![3 * tensor.shape[0], tensor.shape[1]],
                bytes: parts.iter().flat_map(|part| part.bytes.clone()).collect(),
            };
            packed.insert(format!("{block}qkv.weight"), stacked);
            continue;
        }
        let name = name
            .replace("attention.to_out.0.", "attention.out.")
            .replace("attention.norm_q.", "attention.q_norm.")
            .replace("attention.norm_k.", "attention.k_norm.")
            .replace("all_x_embedder.16-1.", "x_embedder.")
            .replace("all_x_embedder.2-1.", "x_embedder.")
            .replace("all_final_layer.2-1.", "final_layer.");
        packed.insert(name, tensor.clone());
    }
    packed
}

/// The same tensors with `prefix` before their names.
pub fn prefixed(tensors: &Tensors, prefix: &str) -> Tensors {
    tensors
        .iter()
        .map(|(name, tensor)| (format!("{prefix}{name}"), tensor.clone()))
        .collect()
}

/// Writes a safetensors file.
pub fn save(path: &Path, tensors: &Tensors) -> Result<PathBuf, Failed> {
    let mut views = Vec::new();
    for (name, tensor) in tensors {
        views.push((
            name,
            TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes)?,
        ));
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(metadata), path)?;
    Ok(path.into())
}

/// Reads a safetensors file back.
pub fn read(path: &Path) -> Result<Tensors, Failed> {
    let bytes = std::fs::read(path)?;
    let file = safetensors::SafeTensors::deserialize(&bytes)?;
    let tensor = |view: TensorView<'_>| Stored {
        dtype: view.dtype(),
        shape: view.shape().to_vec(),
        bytes: view.data().to_vec(),
    };
    Ok(file
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, tensor(view)))
        .collect())
}

/// Writes the tensors as `count` shards with their index, in diffusers' manner.
pub fn save_shards(folder: &Path, tensors: &Tensors, count: usize) -> Result<(), Failed> {
    std::fs::create_dir_all(folder)?;
    let mut weight_map = BTreeMap::new();
    let names: Vec<_> = tensors.keys().collect();
    for (number, names) in names.chunks(names.len().div_ceil(count)).enumerate() {
        let file = shard_name(number + 1, count);
        let shard = names
            .iter()
            .map(|name| ((*name).clone(), tensors[*name].clone()))
            .collect();
        save(&folder.join(&file), &shard)?;
        weight_map.extend(names.iter().map(|name| ((*name).clone(), file.clone())));
    }
    let index = json!({ "metadata": { "total_size": 0 }, "weight_map": weight_map });
    std::fs::write(
        folder.join("diffusion_pytorch_model.safetensors.index.json"),
        index.to_string(),
    )?;
    Ok(())
}

pub fn shard_name(number: usize, count: usize) -> String {
    format!("diffusion_pytorch_model-{number:05}-of-{count:05}.safetensors")
}

/// The `config.json` of the latent model's transformer.
pub fn latent_config() -> serde_json::Value {
    json!({
        "_class_name": "ZImageTransformer2DModel", "all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 16,
        "dim": DIM, "n_layers": LAYERS, "n_refiner_layers": 1, "n_heads": 1, "n_kv_heads": 1, "norm_eps": 1e-5,
        "qk_norm": true, "cap_feat_dim": CAPTION, "rope_theta": 256.0, "t_scale": 1000.0,
        "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
    })
}

/// A diffusers folder of the latent model with stand-ins for the other parts.
pub fn save_diffusers(folder: &Path, shards: usize) -> Result<(), Failed> {
    let transformer = folder.join("transformer");
    if shards > 1 {
        save_shards(&transformer, &latent(Dtype::BF16), shards)?;
    } else {
        std::fs::create_dir_all(&transformer)?;
        save(
            &transformer.join("diffusion_pytorch_model.safetensors"),
            &latent(Dtype::BF16),
        )?;
    }
    let write = |path: &str, content: serde_json::Value| {
        let path = folder.join(path);
        std::fs::create_dir_all(path.parent().unwrap())?;
        std::fs::write(path, content.to_string())
    };
    write("model_index.json", json!({ "_class_name": "ZImagePipeline" }))?;
    write("transformer/config.json", latent_config())?;
    write("scheduler/scheduler_config.json", json!({ "shift": 3.0 }))?;
    write("tokenizer/tokenizer.json", json!({}))?;
    write(
        "text_encoder/config.json",
        json!({
            "model_type": "qwen3", "vocab_size": 64, "hidden_size": CAPTION, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 80, "rms_norm_eps": 1e-6,
            "rope_parameters": { "rope_theta": 1e6, "rope_type": "default" }, "tie_word_embeddings": true,
        }),
    )?;
    let embeddings = (
        "model.embed_tokens.weight".to_owned(),
        stored("embed", Dtype::BF16, &[64, CAPTION]),
    );
    save(&folder.join("text_encoder/model.safetensors"), &[embeddings].into())?;
    write(
        "vae/config.json",
        json!({
            "latent_channels": 16, "out_channels": 3, "block_out_channels": [8, 8, 16, 16], "layers_per_block": 1,
            "norm_num_groups": 4, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_post_quant_conv": false,
        }),
    )?;
    let conv = (
        "decoder.conv_in.weight".to_owned(),
        stored("conv", Dtype::BF16, &[16, 16, 3, 3]),
    );
    save(&folder.join("vae/diffusion_pytorch_model.safetensors"), &[conv].into())?;
    Ok(())
}
