//! `l2p-convert quantize`: what it writes is read by every rule, draws the same picture, and says what rounding did.

use l2p_tests::{Outcome, Suite};
use safetensors::Dtype;
use serde_json::{Value, json};

use super::files::{is_matrix, number};
use super::{convert, picture, psnr, whole};
use crate::checkpoint::model::{self, Stored, Tensors};

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "checkpoint::eight_bit::what_quantize_writes_draws_the_same",
        what_quantize_writes_draws_the_same,
    );
    suite.cpu(
        "checkpoint::eight_bit::quantize_keeps_what_it_is_told_to",
        quantize_keeps_what_it_is_told_to,
    );
    suite.cpu(
        "checkpoint::eight_bit::quantize_refuses_what_it_cannot_do",
        quantize_refuses_what_it_cannot_do,
    );
}

fn f32s(tensor: &Stored) -> Vec<f64> {
    match tensor.dtype {
        Dtype::BF16 => tensor
            .bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| half::bf16::from_le_bytes(*b).to_f64())
            .collect(),
        _ => tensor
            .bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f64::from(f32::from_le_bytes(*b)))
            .collect(),
    }
}

/// ‖a − b‖ / ‖a‖.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    let off: f64 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum();
    (off / a.iter().map(|a| a * a).sum::<f64>()).sqrt()
}

fn what_quantize_writes_draws_the_same() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let mut plain = whole(folder)?;
    // A row of zeros, as pad tokens can make them.
    let zeros = "layers.1.attention.to_v.weight";
    plain.get_mut(zeros).ok_or("no tensor")?.bytes[..2 * 384].fill(0);
    model::save(&folder.join("whole.safetensors"), &plain)?;
    let expected = picture(folder, "whole.safetensors")?;
    for (to, dtype, layout, least, most) in [
        ("int8", Dtype::I8, "", 0.004, 0.012),
        ("fp8", Dtype::F8_E4M3, "", 0.02, 0.03),
        (
            "int8",
            Dtype::I8,
            " --layout packed --prefix model.diffusion_model",
            0.004,
            0.012,
        ),
    ] {
        let arguments = format!("quantize whole.safetensors --to {to} --out q.safetensors --force --json{layout}");
        let said: Value = serde_json::from_str(&convert(folder, &arguments)?.success()?.stdout)?;
        let written = model::read(&folder.join("q.safetensors"))?;
        let layers = said["layers"].as_array().ok_or("no layers")?;
        assert_eq!(
            layers.len(),
            written.values().filter(|tensor| tensor.dtype == dtype).count()
        );
        let arguments = "export --in q.safetensors --out f32.safetensors --layout plain --dtype f32 --force";
        convert(folder, arguments)?.success()?;
        let read = model::read(&folder.join("f32.safetensors"))?;
        let untouched = plain.iter().filter(|(name, _)| !is_matrix(name));
        for (name, tensor) in untouched {
            assert_eq!(f32s(&read[name]), f32s(tensor), "{name}");
        }
        for layer in layers {
            let (name, error) = (
                layer["name"].as_str().ok_or("no name")?,
                layer["error"].as_f64().ok_or("no error")?,
            );
            assert!((least..most).contains(&error), "{name}: {error}");
            expect_form(&written, name, to)?;
            if let Some(original) = plain.get(name) {
                let found = distance(&f32s(original), &f32s(&read[name]));
                assert!((found - error).abs() < 1e-4 * error, "{name}: {found} {error}");
            }
        }
        if layout.is_empty() && to == "int8" {
            let scales = f32s(&written["layers.1.attention.to_v.weight_scale"]);
            assert!(scales[0] == 1.0 && scales[1] < 0.1);
        }
        let quality = psnr(&picture(folder, "q.safetensors")?, &expected);
        assert!(quality >= 30.0, "{to}{layout}: {quality} dB");
    }
    Ok(())
}

/// The form that other programs read: scale, note and codes.
fn expect_form(written: &Tensors, name: &str, to: &str) -> Outcome {
    let layer = name.trim_end_matches(".weight");
    let (weight, scale) = (&written[name], &written[&format!("{layer}.weight_scale")]);
    let note: Value = serde_json::from_slice(&written[&format!("{layer}.comfy_quant")].bytes)?;
    let rotates = weight.shape[1] % 256 == 0;
    let (shape, expected) = match (to, rotates) {
        ("int8", true) => (
            vec![weight.shape[0], 1],
            json!({ "format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256 }),
        ),
        ("int8", false) => (vec![weight.shape[0], 1], json!({ "format": "int8_tensorwise" })),
        _ => (vec![], json!({ "format": "float8_e4m3fn" })),
    };
    assert_eq!(
        (scale.dtype, &scale.shape, &note),
        (Dtype::F32, &shape, &expected),
        "{name}"
    );
    let largest = weight
        .bytes
        .iter()
        .map(|code| number(weight.dtype, *code).abs())
        .fold(0.0, f64::max);
    assert_eq!(largest, if to == "int8" { 127.0 } else { 448.0 }, "{name}");
    Ok(())
}

fn quantize_keeps_what_it_is_told_to() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let plain = whole(folder)?;
    let arguments = "quantize whole.safetensors --to int8 --keep layers.0.*,*.w2.weight --output q.safetensors";
    let told = convert(folder, arguments)?.success()?.stdout;
    assert!(
        told.contains("24 weights of eight bits, 11 matrices kept") && told.contains("|W - W8| / |W|"),
        "{told}"
    );
    let line = told
        .lines()
        .find(|line| line.starts_with("layers.1.attention.to_q.weight"))
        .ok_or("no line")?;
    assert!(line.ends_with(" %") && line.contains("384 x 384"), "{line}");
    let written = model::read(&folder.join("q.safetensors"))?;
    for (name, tensor) in &plain {
        let is_kept = !is_matrix(name) || name.starts_with("layers.0.") || name.ends_with(".w2.weight");
        match is_kept {
            true => assert_eq!(&written[name], tensor, "{name}"),
            false => assert_eq!(written[name].dtype, Dtype::I8, "{name}"),
        }
    }
    // Of a stack all stays where a part does.
    let arguments =
        "quantize whole.safetensors --to fp8 --keep *.3.attention.to_k.* --layout packed --out p.safetensors";
    convert(folder, arguments)?.success()?;
    let written = model::read(&folder.join("p.safetensors"))?;
    assert_eq!(written["layers.3.attention.qkv.weight"].dtype, Dtype::BF16);
    assert_eq!(written["layers.2.attention.qkv.weight"].dtype, Dtype::F8_E4M3);
    // Eight bits again, from eight bits.
    let arguments = "quantize q.safetensors --to fp8 --out again.safetensors --json";
    let said: Value = serde_json::from_str(&convert(folder, arguments)?.success()?.stdout)?;
    assert_eq!(said["layers"].as_array().map(Vec::len), Some(35));
    let header = std::fs::read(folder.join("again.safetensors"))?;
    assert!(!String::from_utf8_lossy(&header[..1 << 14]).contains("_quantization_metadata"));
    Ok(())
}

fn quantize_refuses_what_it_cannot_do() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let mut plain = whole(folder)?;
    std::fs::write(folder.join("there.safetensors"), "there")?;
    for (arguments, code, message) in [
        (
            "whole.safetensors --to int4 --out o.safetensors",
            2,
            "invalid value 'int4'",
        ),
        ("whole.safetensors --to int8", 2, "--out"),
        (
            "whole.safetensors --to int8 --out there.safetensors",
            1,
            "is already there; replace it with --force",
        ),
        (
            "whole.safetensors --to int8 --out whole.safetensors --force",
            1,
            "is the model that is to be read; choose another name",
        ),
        (
            "whole.safetensors --to int8 --keep lazers.* --out o.safetensors",
            1,
            "the pattern `lazers.*` fits no matrix that would be quantised; these have names such as `layers.0.",
        ),
        (
            "whole.safetensors --to int8 --keep * --out o.safetensors",
            1,
            "leave nothing to be quantised",
        ),
        (
            "whole.safetensors --to int8 --out no/o.safetensors",
            1,
            "no/o.safetensors: ",
        ),
        (
            "missing.safetensors --to int8 --out o.safetensors",
            1,
            "missing.safetensors",
        ),
    ] {
        let finished = convert(folder, &format!("quantize {arguments}"))?;
        let says = finished.code == code && finished.stderr.contains(message);
        assert!(says, "{arguments}: {} {}", finished.code, finished.stderr);
    }
    assert_eq!(std::fs::read_to_string(folder.join("there.safetensors"))?, "there");
    let name = "layers.4.feed_forward.w1.weight";
    plain.get_mut(name).ok_or("no tensor")?.bytes[..2].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    model::save(&folder.join("nan.safetensors"), &plain)?;
    let finished = convert(folder, "quantize nan.safetensors --to fp8 --out o.safetensors")?;
    let message = format!("nan.safetensors: tensor `{name}` holds NaN or infinity");
    assert!(
        finished.code == 1 && finished.stderr.contains(&message),
        "{}",
        finished.stderr
    );
    assert!(!folder.join("o.safetensors").exists());
    Ok(())
}
