//! Parameters on the CPU and on CUDA equal what the files hold.

use half::{bf16, f16};
use l2p_engine::checkpoint::Checkpoint;
use l2p_engine::layers::{MemoryParams, ParamSource};
use l2p_engine::{Device, Tensor};
use l2p_tests::{Outcome, Suite};
use libtest_mimic::Failed;
use safetensors::Dtype;

use super::model::{self, Stored, Tensors};

pub fn register(suite: &mut Suite) {
    suite.cpu("checkpoint::params::values_equal_the_file", values_equal_the_file);
    suite.cpu("checkpoint::params::faults_are_named", faults_are_named);
    suite.cpu(
        "checkpoint::params::text_encoders_lose_their_prefix",
        text_encoders_lose_their_prefix,
    );
    suite.cuda("checkpoint::params::cuda_equals_cpu", cuda_equals_cpu);
}

/// The elements as f32.
fn values(tensor: &Stored) -> Vec<f32> {
    let pairs = || tensor.bytes.as_chunks::<2>().0.iter();
    match tensor.dtype {
        Dtype::BF16 => pairs().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
        Dtype::F16 => pairs().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
        _ => tensor
            .bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|bytes| f32::from_le_bytes(*bytes))
            .collect(),
    }
}

/// Tensors of all types and orders: larger than a conversion's task, and of odd sizes.
fn assorted() -> Tensors {
    let mut tensors = Tensors::new();
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        for (name, shape) in [
            ("matrix", vec![301, 517]),
            ("rows", vec![7, 517]),
            ("bias", vec![3]),
            ("conv", vec![5, 7, 3, 3]),
            ("wide", vec![33, 65, 3, 3]),
            ("point", vec![11, 13, 1, 1]),
        ] {
            let name = format!("{name}.{dtype}");
            tensors.insert(name.clone(), model::stored(&name, dtype, &shape));
        }
    }
    tensors
}

/// The same in memory.
fn in_memory(tensors: &Tensors) -> MemoryParams {
    let mut params = MemoryParams::default();
    for (name, tensor) in tensors {
        params.insert(name, &tensor.shape, values(tensor));
    }
    params
}

/// Loads everything in each way; what it is called, and the tensor.
fn load_all(params: &dyn ParamSource, device: &Device, tensors: &Tensors) -> Result<Vec<(String, Tensor)>, Failed> {
    let mut loaded = Vec::new();
    for (name, tensor) in tensors {
        assert_eq!(params.shape(name).as_ref(), Some(&tensor.shape));
        loaded.push((name.clone(), params.load(device, name, &tensor.shape)?));
        if tensor.shape.len() == 4 {
            loaded.push((format!("{name} as convolution"), params.load_conv(device, name)?));
        }
    }
    // Parts of three types in one stack.
    let names = ["matrix.F32", "rows.BF16", "matrix.F16", "rows.F32"];
    loaded.push(("stack".into(), params.load_stacked(device, &names, &[616, 517])?));
    let names = ["bias.F16", "bias.F32"];
    loaded.push(("stacked biases".into(), params.load_stacked(device, &names, &[6])?));
    Ok(loaded)
}

fn values_equal_the_file() -> Outcome {
    let folder = tempfile::tempdir()?;
    let tensors = assorted();
    let path = model::save(&folder.path().join("assorted.safetensors"), &tensors)?;
    let found = load_all(&Checkpoint::open_plain(&path)?, &Device::Cpu, &tensors)?;
    let expected = load_all(&in_memory(&tensors), &Device::Cpu, &tensors)?;
    for ((name, found), (_, expected)) in found.iter().zip(&expected) {
        assert_eq!(found.shape(), expected.shape(), "{name}");
        assert!(found.as_slice::<f32>()? == expected.as_slice::<f32>()?, "{name}");
    }
    // One element of each kind by hand, so that both sides cannot be wrong together.
    let conv = Checkpoint::open_plain(&path)?.load_conv(&Device::Cpu, "conv.F32")?;
    let stored = values(&tensors["conv.F32"]);
    let (output, input, y, x) = (3, 4, 2, 1);
    let on_device = conv.as_slice::<f32>()?[output * 63 + (y * 3 + x) * 7 + input];
    assert_eq!(on_device, stored[((output * 7 + input) * 3 + y) * 3 + x]);
    Ok(())
}

fn faults_are_named() -> Outcome {
    let folder = tempfile::tempdir()?;
    let mut tensors = model::packed(&model::prefixed(&model::pixel(Dtype::BF16), ""));
    tensors.insert(
        "layers.0.ffn_norm1.weight".into(),
        Stored {
            dtype: Dtype::I64,
            shape: vec![2],
            bytes: vec![0; 16],
        },
    );
    let path = model::save(
        &folder.path().join("m.safetensors"),
        &model::prefixed(&tensors, "pipe.dit."),
    )?;
    let checkpoint = Checkpoint::open_transformer(&path)?;
    let file = path.display();
    let load = |name: &str, shape: &[usize]| checkpoint.load(&Device::Cpu, name, shape).unwrap_err().to_string();
    assert_eq!(
        load("layers.7.x", &[3]),
        format!("{file}: tensor `layers.7.x` is missing")
    );
    assert_eq!(
        load("layers.0.attention.to_k.weight", &[128, 64]),
        format!(
            "{file}: tensor `layers.0.attention.to_k.weight` (from `pipe.dit.layers.0.attention.qkv.weight`) has shape \
             [128, 128], expected [128, 64]"
        )
    );
    assert_eq!(
        load("layers.0.ffn_norm1.weight", &[2]),
        format!(
            "{file}: tensor `pipe.dit.layers.0.ffn_norm1.weight` holds I64, which cannot be read; BF16, F16 and F32 can"
        )
    );
    let stack = |names: &[&str], shape: &[usize]| {
        checkpoint
            .load_stacked(&Device::Cpu, names, shape)
            .unwrap_err()
            .to_string()
    };
    let names = ["layers.0.feed_forward.w1.weight", "layers.0.feed_forward.w2.weight"];
    assert_eq!(
        stack(&names, &[2 * model::FFN, model::DIM]),
        format!(
            "{file}: tensor `layers.0.feed_forward.w2.weight` (from `pipe.dit.layers.0.feed_forward.w2.weight`) has shape \
             [128, 96], expected [rows, 128]"
        )
    );
    assert_eq!(
        stack(&names[..1], &[2 * model::FFN, model::DIM]),
        format!("{file}: tensors `layers.0.feed_forward.w1.weight` have 96 rows, expected a stack of shape [192, 128]")
    );
    let conv = checkpoint
        .load_conv(&Device::Cpu, "x_pad_token")
        .unwrap_err()
        .to_string();
    assert_eq!(
        conv,
        format!(
            "{file}: tensor `x_pad_token` (from `pipe.dit.x_pad_token`) has shape [1, 128], expected [outputs, inputs, \
             height, width]"
        )
    );
    Ok(())
}

fn text_encoders_lose_their_prefix() -> Outcome {
    let folder = tempfile::tempdir()?;
    for prefix in ["", "model."] {
        let name = format!("{prefix}layers.0.self_attn.q_proj.weight");
        let path = folder.path().join("text.safetensors");
        model::save(&path, &[(name, model::stored("q", Dtype::BF16, &[4, 4]))].into())?;
        let text = Checkpoint::open_text_encoder(&path)?;
        assert_eq!(text.shape("layers.0.self_attn.q_proj.weight"), Some(vec![4, 4]));
    }
    Ok(())
}

fn cuda_equals_cpu(device: &Device) -> Outcome {
    let folder = tempfile::tempdir()?;
    let mut tensors = assorted();
    // More than one staging buffer, and the seam not at a row's end.
    tensors.insert("large".into(), model::stored("large", Dtype::F32, &[4099, 4133]));
    let path = model::save(&folder.path().join("assorted.safetensors"), &tensors)?;
    let checkpoint = Checkpoint::open_plain(&path)?;
    let expected = load_all(&checkpoint, &Device::Cpu, &tensors)?;
    for ((name, found), (_, expected)) in load_all(&checkpoint, device, &tensors)?.iter().zip(&expected) {
        assert_eq!(found.shape(), expected.shape(), "{name}");
        let rounded: Vec<bf16> = expected
            .as_slice::<f32>()?
            .iter()
            .map(|value| bf16::from_f32(*value))
            .collect();
        assert!(found.to_vec::<bf16>()? == rounded, "{name}");
    }
    Ok(())
}
