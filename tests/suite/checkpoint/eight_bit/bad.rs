//! Scales and notes that are none: each is refused by the names of its tensors.

use std::path::Path;

use l2p_tests::{Outcome, Suite};
use safetensors::Dtype;

use super::files::{self, File, is_matrix};
use super::{convert, draw, spelling, whole};
use crate::checkpoint::model::{self, Stored, Tensors};

pub fn register(suite: &mut Suite) {
    suite.cpu(
        "checkpoint::eight_bit::bad_scales_are_refused_by_name",
        bad_scales_are_refused_by_name,
    );
    suite.cpu(
        "checkpoint::eight_bit::bad_notes_are_refused_by_name",
        bad_notes_are_refused_by_name,
    );
    suite.cpu("checkpoint::eight_bit::codes_of_nan_are_found", codes_of_nan_are_found);
}

/// The layer that is made bad.
const LAYER: &str = "layers.2.feed_forward.w2";

fn numbers(shape: &[usize], values: &[f32]) -> Stored {
    Stored {
        dtype: Dtype::F32,
        shape: shape.to_vec(),
        bytes: values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

fn note(text: &str) -> Stored {
    Stored {
        dtype: Dtype::U8,
        shape: vec![text.len()],
        bytes: text.as_bytes().to_vec(),
    }
}

/// Fails unless the file is refused with these words wherever a model is named; `everywhere` says to try more than one such place.
fn expect_refused(folder: &Path, file: &File, what: &str, words: &[&str], everywhere: bool) -> Outcome {
    file.save(&folder.join("bad.safetensors"))?;
    let mut all = vec![convert(folder, "inspect bad.safetensors --quick")?];
    if everywhere {
        all.push(convert(
            folder,
            "export --in bad.safetensors --out o.safetensors --layout plain",
        )?);
        all.push(draw(folder, "bad.safetensors", "o.png")?);
    }
    for finished in all {
        let says = words.iter().all(|word| finished.stderr.contains(word));
        let names = finished.stderr.contains("bad.safetensors: tensor");
        assert!(
            finished.code == 1 && says && names,
            "{what}: {} {}",
            finished.code,
            finished.stderr
        );
    }
    assert!(!folder.join("o.png").exists() && !folder.join("o.safetensors").exists());
    Ok(())
}

type Change = Box<dyn Fn(&mut Tensors)>;

fn set(end: &'static str, tensor: Stored) -> Change {
    Box::new(move |tensors| drop(tensors.insert(format!("{LAYER}.{end}"), tensor.clone())))
}

fn without(end: &'static str) -> Change {
    Box::new(move |tensors| drop(tensors.remove(&format!("{LAYER}.{end}"))))
}

/// What is done to the scale `end` of the layer with this weight, and what is said of it.
fn bad_scales(name: &str, end: &'static str, weight: &Stored) -> Vec<(String, Change, &'static str)> {
    let (rows, width) = (weight.shape[0], weight.shape[1]);
    let mut cases: Vec<(String, Change, &'static str)> = Vec::new();
    for (value, shown) in [
        (f32::NAN, "holds NaN at element"),
        (f32::INFINITY, "holds inf at element"),
        (0.0, "holds 0 at element"),
        (-0.5, "holds -0.5 at element"),
    ] {
        let mut values = vec![0.01; rows];
        values[rows - 1] = value;
        cases.push((format!("row {value}"), set(end, numbers(&[rows, 1], &values)), shown));
        cases.push((format!("one {value}"), set(end, numbers(&[], &[value])), shown));
    }
    for shape in [vec![rows - 1], vec![1, rows], vec![rows, 2], vec![width], vec![0]] {
        let values = vec![0.01; shape.iter().product()];
        let shown = "expected one number, or one for each of the";
        cases.push((format!("{shape:?}"), set(end, numbers(&shape, &values)), shown));
    }
    let mut narrow = numbers(&[], &[0.01]);
    (narrow.dtype, narrow.shape) = (Dtype::F8_E4M3, vec![4]);
    cases.push((
        "of another type, four".into(),
        set(end, narrow.clone()),
        "expected one number",
    ));
    (narrow.dtype, narrow.shape, narrow.bytes) = (Dtype::U8, vec![1], vec![1]);
    cases.push((
        "of another type".into(),
        set(end, narrow),
        "expected scales of F32, BF16 or F16",
    ));
    cases.push(("missing".into(), without(end), "without its scale"));
    cases.push((
        "without its weight".into(),
        without("weight"),
        "stands beside no weight of eight bits",
    ));
    if name != "header" {
        let wide = set("weight", weight.clone());
        cases.push(("of a wide weight".into(), wide, "stands beside no weight of eight bits"));
    }
    let other = if end == "weight_scale" {
        "scale_weight"
    } else {
        "weight_scale"
    };
    cases.push((
        "two".into(),
        set(other, numbers(&[], &[1.0])),
        "say the same of one layer",
    ));
    cases
}

fn bad_scales_are_refused_by_name() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let plain = whole(folder)?;
    let weight = &plain[&format!("{LAYER}.weight")];
    for (name, end) in [
        ("int8-rows", "weight_scale"),
        ("header", "weight_scale"),
        ("scale-weight", "scale_weight"),
    ] {
        let sound = files::written(&plain, &spelling(name));
        for (what, change, shown) in bad_scales(name, end, weight) {
            let mut file = File {
                tensors: sound.tensors.clone(),
                metadata: sound.metadata.clone(),
                numbers: Default::default(),
            };
            change(&mut file.tensors);
            expect_refused(
                folder,
                &file,
                &format!("{name}, {what}"),
                &[LAYER, shown],
                what == "missing",
            )?;
        }
    }
    Ok(())
}

fn bad_notes_are_refused_by_name() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let plain = whole(folder)?;
    let sound = files::written(&plain, &spelling("int8-rows"));
    let changed = |change: Change| {
        let mut file = File {
            tensors: sound.tensors.clone(),
            metadata: sound.metadata.clone(),
            numbers: Default::default(),
        };
        change(&mut file.tensors);
        file
    };
    for (text, shown) in [
        (
            r#"{"format": "float8_e4m3fn"}"#,
            "holds I8, but `layers.2.feed_forward.w2.comfy_quant` says F8_E4M3",
        ),
        (
            r#"{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 128}"#,
            "rotated by groups of 128, which is no power of 4 that divides its rows of 1024",
        ),
        (
            r#"{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 4096}"#,
            "groups of 4096",
        ),
        (
            r#"{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 0}"#,
            "groups of 0",
        ),
    ] {
        expect_refused(
            folder,
            &changed(set("comfy_quant", note(text))),
            text,
            &[LAYER, shown],
            false,
        )?;
    }
    let stray: Change = Box::new(|tensors| {
        tensors.insert(
            "layers.2.attention_norm1.comfy_quant".into(),
            note(r#"{"format": "int8_tensorwise"}"#),
        );
    });
    expect_refused(
        folder,
        &changed(stray),
        "stray",
        &["layers.2.attention_norm1.weight", "says I8"],
        true,
    )?;

    // What is said in a way that is not understood is called by its name, and the rest of the file is told.
    for (text, shown) in [
        (
            r#"{"format": "int8_blockwise", "group_size": 128}"#,
            "is quantised as `int8_blockwise`",
        ),
        (
            r#"{"format": "int8_tensorwise", "group_size": 128}"#,
            "is quantised with the setting `group_size`",
        ),
        (
            r#"{"format": "int8_tensorwise", "rotation": "left"}"#,
            "is quantised with the setting `rotation`",
        ),
        ("{", "in a form that is known"),
    ] {
        changed(set("comfy_quant", note(text))).save(&folder.join("unread.safetensors"))?;
        let told = convert(folder, "inspect unread.safetensors --quick")?.success()?.stdout;
        assert!(
            told.contains("QUANTISED, which is not read") && told.contains(shown),
            "{text}: {told}"
        );
        let finished = draw(folder, "unread.safetensors", "o.png")?;
        assert!(
            finished.code == 1 && finished.stderr.contains(shown),
            "{text}: {}",
            finished.stderr
        );
    }
    Ok(())
}

fn codes_of_nan_are_found() -> Outcome {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let plain = whole(folder)?;
    let mut file = files::written(&plain, &spelling("scale-weight"));
    let name = file
        .tensors
        .keys()
        .find(|name| is_matrix(name))
        .cloned()
        .ok_or("no matrix")?;
    for at in [0, 77] {
        file.tensors.get_mut(&name).ok_or("no tensor")?.bytes[at] = 0xff;
    }
    file.save(&folder.join("nan.safetensors"))?;
    let told = convert(folder, "inspect nan.safetensors")?.success()?.stdout;
    let expected = format!("tensor `{name}` holds NaN or infinity in 2 of ");
    assert!(told.contains(&expected), "{told}");
    let finished = draw(folder, "nan.safetensors", "o.png")?;
    assert!(
        finished.code == 1 && finished.stderr.contains(&expected),
        "{}",
        finished.stderr
    );
    assert!(!folder.join("o.png").exists());
    model::save(&folder.join("sound.safetensors"), &plain)?;
    let told = convert(folder, "inspect sound.safetensors")?.success()?.stdout;
    assert!(!told.contains("NaN"), "{told}");
    Ok(())
}
