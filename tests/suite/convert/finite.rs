//! Weights that are NaN or infinite: `inspect` tells of them, and what is computed from them is refused.

use half::{bf16, f16};
use l2p_engine::checkpoint::Checkpoint;
use l2p_tests::{Outcome, Suite};
use safetensors::Dtype;
use serde_json::json;

use super::{json, run};
use crate::checkpoint::{demo, model};

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "convert::finite::inspect_tells_of_every_part",
        inspect_tells_of_every_part,
    );
    suite.cpu("convert::finite::every_type_is_looked_at", every_type_is_looked_at);
    suite.cpu(
        "convert::finite::features_of_a_text_encoder",
        features_of_a_text_encoder,
    );
}

/// Puts a value in place of an element.
fn set(tensor: &mut model::Stored, index: usize, value: f32) {
    let bytes = match tensor.dtype {
        Dtype::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    };
    let start = index * bytes.len();
    tensor.bytes[start..start + bytes.len()].copy_from_slice(&bytes);
}

fn inspect_tells_of_every_part() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = demo::copy(folder.path())?;
    let found = json(folder.path(), "inspect source")?;
    assert_eq!(
        (&found["values_checked"], &found["not_finite"]),
        (&json!(true), &json!([]))
    );
    let shard = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors";
    let transformer = model::read(&source.join(shard))?;
    let mut names = transformer.keys().filter(|name| name.ends_with(".weight"));
    let (first, second) = (names.next().ok_or("no weight")?, names.next().ok_or("no weight")?);
    for (file, tensor, more) in [
        (shard, first.as_str(), vec![second.as_str()]),
        (
            "text_encoder/model.safetensors",
            "model.layers.2.mlp.down_proj.weight",
            vec![],
        ),
        (
            "vae/diffusion_pytorch_model.safetensors",
            "decoder.conv_out.bias",
            vec![],
        ),
    ] {
        let path = source.join(file);
        let kept = std::fs::read(&path)?;
        demo::edit(&path, |tensors| {
            let bad = tensors.get_mut(tensor).expect("a tensor of the demo");
            set(bad, 0, f32::NAN);
            set(bad, 2, f32::NEG_INFINITY);
            for name in &more {
                set(tensors.get_mut(*name).expect("a tensor of the demo"), 1, f32::INFINITY);
            }
        })?;
        let found = json(folder.path(), "inspect source")?;
        let bad = &found["not_finite"][0];
        assert_eq!(bad["tensor"], json!(tensor), "{found:#}");
        assert_eq!(bad["path"], json!(format!("source/{file}")));
        assert_eq!((&bad["elements"], &bad["tensors"]), (&json!(2), &json!(1 + more.len())));
        assert_eq!(bad["total"], json!(2 + more.len()));
        let text = run(folder.path(), "inspect source")?.success()?.stdout;
        let line = format!("  not finite   source/{file}: tensor `{tensor}` holds NaN or infinity in 2 of ");
        assert!(text.contains(&line), "{text}");
        assert_eq!(text.contains("and so does another tensor"), !more.is_empty(), "{text}");
        assert_eq!(text.contains("NOT usable"), file == shard, "{text}");
        let quick = run(folder.path(), "inspect source --quick")?.success()?.stdout;
        assert!(
            !quick.contains("not finite") && quick.contains("not looked at (--quick)"),
            "{quick}"
        );
        demo::replace(&path, &kept)?;
    }
    Ok(())
}

/// In every type, at both ends and within, in tensors larger than what one task reads.
fn every_type_is_looked_at() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("m.safetensors");
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        let whole = model::stored("w", dtype, &[1501, 1009]);
        let last = 1501 * 1009 - 1;
        for index in [None, Some(0), Some(524_287), Some(524_288), Some(last)] {
            let mut tensor = whole.clone();
            if let Some(index) = index {
                set(&mut tensor, index, f32::NAN);
            }
            let small = ("small".to_owned(), model::stored("s", dtype, &[3]));
            model::save(&path, &[("large".to_owned(), tensor), small].into())?;
            let found = Checkpoint::open_plain(&path)?.first_not_finite(&mut ())?;
            let found = found.map(|found| (found.tensor, found.elements, found.of));
            assert_eq!(
                found,
                index.map(|_| ("large".to_owned(), 1, 1501 * 1009)),
                "{dtype:?} {index:?}"
            );
        }
    }
    Ok(())
}

/// A text encoder whose features are no numbers ends the work, naming the weight to blame.
fn features_of_a_text_encoder() -> Outcome {
    let folder = tempfile::tempdir()?;
    let source = demo::copy(folder.path())?;
    let path = source.join("text_encoder/model.safetensors");
    let name = "model.layers.0.mlp.down_proj.weight";
    demo::edit(&path, |tensors| {
        set(tensors.get_mut(name).expect("a tensor of the demo"), 7, f32::NAN)
    })?;
    let message = format!(
        "(source/text_encoder/model.safetensors: tensor `{name}` holds NaN or infinity in 1 of 98304 elements): not finite"
    );
    demo::expect_refused(folder.path(), "source", &[], &message)?;
    // Weights that are numbers, and too large.
    demo::edit(&path, |tensors| {
        let tensor = tensors.get_mut(name).expect("a tensor of the demo");
        (0..98304).for_each(|index| set(tensor, index, 3e38));
    })?;
    demo::expect_refused(
        folder.path(),
        "source",
        &[],
        "all weights are finite, so some are too large",
    )
}
