//! The pixel model with weights of eight bits, each layer in another spelling.

use std::collections::HashMap;
use std::path::Path;

use l2p_tests::hash_uniform;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// A tensor as the file holds it.
struct Stored {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn floats(name: String, shape: &[usize], value: impl Fn(f32) -> f32) -> Stored {
    let values = hash_uniform(&name, shape.iter().product());
    Stored {
        dtype: Dtype::F32,
        shape: shape.to_vec(),
        bytes: values
            .into_iter()
            .flat_map(|uniform| value(uniform).to_le_bytes())
            .collect(),
        name,
    }
}

/// Any codes but those that are no numbers.
fn codes(name: String, dtype: Dtype, shape: &[usize]) -> Stored {
    let values = hash_uniform(&name, shape.iter().product());
    Stored {
        dtype,
        shape: shape.to_vec(),
        bytes: values
            .into_iter()
            .map(|uniform| (uniform * 127.0) as i8 as u8 & 0xb7)
            .collect(),
        name,
    }
}

fn note(layer: &str, text: &str) -> Stored {
    Stored {
        name: format!("{layer}.comfy_quant"),
        dtype: Dtype::U8,
        shape: vec![text.len()],
        bytes: text.into(),
    }
}

/// What a weight becomes: itself and what stands beside it.
fn spelled(layer: &str, shape: &[usize]) -> Vec<Stored> {
    let weight = |dtype| codes(format!("{layer}.weight"), dtype, shape);
    let scale = |end: &str, shape: &[usize]| floats(format!("{layer}.{end}"), shape, |uniform| 0.02 + 0.01 * uniform);
    let rows = shape[0];
    match layer.rsplit('.').next() {
        Some("w1") => vec![
            weight(Dtype::F8_E4M3),
            scale("scale_weight", &[]),
            scale("scale_input", &[1]),
        ],
        Some("w2") => vec![
            weight(Dtype::I8),
            scale("weight_scale", &[rows, 1]),
            note(
                layer,
                r#"{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 4}"#,
            ),
        ],
        Some("w3") => vec![
            weight(Dtype::F8_E5M2),
            scale("weight_scale", &[rows]),
            scale("input_scale", &[]),
        ],
        _ => vec![weight(Dtype::F8_E4M3), scale("weight_scale", &[1])],
    }
}

/// Writes a model of these tensors.
///
/// # Errors
/// When the disk refuses it.
pub fn write(path: &Path, tensors: Vec<(String, Vec<usize>)>) -> anyhow::Result<()> {
    let mut stored = Vec::new();
    let mut layers = serde_json::Map::new();
    for (name, shape) in tensors {
        let layer = name
            .strip_suffix(".weight")
            .filter(|_| name.starts_with("layers.") && shape.len() == 2);
        match layer {
            Some(layer) => {
                if layer.contains(".attention.") {
                    layers.insert(layer.into(), serde_json::json!({ "format": "float8_e4m3fn" }));
                }
                stored.extend(spelled(layer, &shape));
            }
            None => stored.push(floats(name, &shape, |uniform| 0.2 * uniform)),
        }
    }
    stored.push(codes("scaled_fp8".into(), Dtype::F8_E4M3, &[2]));
    let mut views = Vec::new();
    for tensor in &stored {
        views.push((
            &tensor.name,
            TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes)?,
        ));
    }
    let header = serde_json::json!({ "format_version": "1.0", "layers": layers }).to_string();
    std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    let metadata = HashMap::from([("_quantization_metadata".to_owned(), header)]);
    Ok(safetensors::serialize_to_file(views, Some(metadata), path)?)
}
