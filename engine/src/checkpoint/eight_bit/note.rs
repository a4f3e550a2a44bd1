//! What files say in JSON of how a layer is quantised: in a tensor `NAME.comfy_quant`, or for all layers in the header's
//! `_quantization_metadata`.
//!
//! ```text
//! NAME.comfy_quant        {"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}
//! _quantization_metadata  {"format_version": "1.0", "layers": {"NAME": {"format": "float8_e4m3fn"}, …}}
//! ```
//!
//! | entry | meaning |
//! | --- | --- |
//! | `format` | `float8_e4m3fn`, `float8_e4m3fn_rowwise`, `float8_e5m2`, `int8_tensorwise`; the shape of the scale tells how many there are |
//! | `convrot`, `convrot_groupsize` | inputs are rotated by groups of so many, 256 by default |
//! | `params` | an object of the same entries |
//! | `full_precision_matrix_mult`, `orig_dtype`, `orig_shape` | how to compute, and what was quantised: nothing that reading needs |
//!
//! Whatever else they say may change what the numbers mean, and is refused by name.
//!
//! Source: ComfyUI, `QUANTIZATION.md` and the loader of quantised layers in `comfy/ops.py`.

use serde_json::{Map, Value};

use super::rotation::GROUP;
use crate::codes::Code;

/// What is said of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Note {
    /// The type of its weight's elements.
    pub code: Code,
    /// Inputs that are rotated together.
    pub rotation: Option<usize>,
}

/// What is not understood of a note.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unknown {
    /// No JSON of the kind.
    Form,
    /// The format of this name.
    Format(String),
    /// An entry, or a value of one.
    Entry(String),
}

/// A layer's name, and its note or what is not understood of it.
pub type LayerNote = (String, Result<Note, Unknown>);

/// Entries that reading does not need.
const NOT_NEEDED: [&str; 3] = ["full_precision_matrix_mult", "orig_dtype", "orig_shape"];

/// Reads a layer's note.
///
/// # Errors
/// What is not understood of it.
pub fn read(text: &[u8]) -> Result<Note, Unknown> {
    of(&serde_json::from_slice(text).map_err(|_| Unknown::Form)?)
}

/// Reads the header's notes: by the layers' names as the file has them.
///
/// # Errors
/// What is not understood of the header's entry itself; each layer has an error of its own.
pub fn read_all(text: &str) -> Result<Vec<LayerNote>, Unknown> {
    let Ok(Value::Object(mut entries)) = serde_json::from_str(text) else {
        return Err(Unknown::Form);
    };
    let layers = match entries.remove("layers") {
        Some(Value::Object(layers)) => layers,
        _ => return Err(Unknown::Form),
    };
    match entries.remove("format_version") {
        None => {}
        Some(Value::String(version)) if version == "1.0" => {}
        Some(version) => return Err(Unknown::Entry(format!("format_version: {version}"))),
    }
    match entries.keys().next() {
        Some(entry) => Err(Unknown::Entry(entry.clone())),
        None => Ok(layers.into_iter().map(|(layer, note)| (layer, of(&note))).collect()),
    }
}

fn of(note: &Value) -> Result<Note, Unknown> {
    let Value::Object(entries) = note else {
        return Err(Unknown::Form);
    };
    let mut entries = entries.clone();
    match entries.remove("params") {
        None => {}
        // What stands outside counts first.
        Some(Value::Object(params)) => params.into_iter().for_each(|(key, value)| {
            entries.entry(key).or_insert(value);
        }),
        Some(value) => return Err(Unknown::Entry(format!("params: {value}"))),
    }
    let code = match entries.remove("format") {
        Some(Value::String(format)) => match format.as_str() {
            "float8_e4m3fn" | "float8_e4m3fn_rowwise" => Code::E4m3,
            "float8_e5m2" => Code::E5m2,
            "int8_tensorwise" => Code::Int8,
            _ => return Err(Unknown::Format(format)),
        },
        _ => return Err(Unknown::Form),
    };
    let rotation = take_rotation(&mut entries)?;
    if let Some(entry) = entries.keys().find(|key| !NOT_NEEDED.contains(&key.as_str())) {
        return Err(Unknown::Entry(entry.clone()));
    }
    match rotation {
        // Only integers are known to be stored rotated.
        Some(_) if code != Code::Int8 => Err(Unknown::Entry("convrot".into())),
        rotation => Ok(Note { code, rotation }),
    }
}

fn take_rotation(entries: &mut Map<String, Value>) -> Result<Option<usize>, Unknown> {
    let unknown = |name: &str, value: &Value| Unknown::Entry(format!("{name}: {value}"));
    let size = match entries.remove("convrot_groupsize") {
        None => GROUP,
        Some(value) => match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
            Some(size) => size,
            None => return Err(unknown("convrot_groupsize", &value)),
        },
    };
    match entries.remove("convrot") {
        None | Some(Value::Bool(false)) => Ok(None),
        Some(Value::Bool(true)) => Ok(Some(size)),
        Some(value) => Err(unknown("convrot", &value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_tell_type_and_rotation() {
        let note = |code, rotation| Ok(Note { code, rotation });
        let entry = |text: &str| Err(Unknown::Entry(text.into()));
        for (text, expected) in [
            (r#"{"format": "float8_e4m3fn"}"#, note(Code::E4m3, None)),
            (
                r#"{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}"#,
                note(Code::E4m3, None),
            ),
            (r#"{"format": "float8_e5m2"}"#, note(Code::E5m2, None)),
            (r#"{"format": "int8_tensorwise"}"#, note(Code::Int8, None)),
            (
                r#"{"format": "int8_tensorwise", "convrot": true}"#,
                note(Code::Int8, Some(256)),
            ),
            (
                r#"{"format": "int8_tensorwise", "convrot": false, "convrot_groupsize": 64}"#,
                note(Code::Int8, None),
            ),
            (
                r#"{"format": "int8_tensorwise", "params": {"convrot": true, "convrot_groupsize": 64}}"#,
                note(Code::Int8, Some(64)),
            ),
            (r#"{"format": "nvfp4"}"#, Err(Unknown::Format("nvfp4".into()))),
            (
                r#"{"format": "int8_tensorwise", "group_size": 128}"#,
                entry("group_size"),
            ),
            (r#"{"format": "int8_tensorwise", "convrot": 1}"#, entry("convrot: 1")),
            (
                r#"{"format": "int8_tensorwise", "convrot_groupsize": -4}"#,
                entry("convrot_groupsize: -4"),
            ),
            (r#"{"format": "float8_e5m2", "convrot": true}"#, entry("convrot")),
            (r#"{"format": 8}"#, Err(Unknown::Form)),
            (r#"{}"#, Err(Unknown::Form)),
            (r#"["int8_tensorwise"]"#, Err(Unknown::Form)),
            ("int8_tensorwise", Err(Unknown::Form)),
        ] {
            assert_eq!(read(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn a_header_names_layers() {
        let text = r#"{"format_version": "1.0", "layers": {"a.b": {"format": "float8_e5m2"}, "c": {"format": "x"}}}"#;
        let layers = read_all(text).unwrap();
        let note = Note {
            code: Code::E5m2,
            rotation: None,
        };
        assert_eq!(layers[0], ("a.b".into(), Ok(note)));
        assert_eq!(layers[1], ("c".into(), Err(Unknown::Format("x".into()))));
        for (text, unknown) in [
            ("{", Unknown::Form),
            ("{}", Unknown::Form),
            (r#"{"layers": []}"#, Unknown::Form),
            (
                r#"{"layers": {}, "format_version": "2.0"}"#,
                Unknown::Entry("format_version: \"2.0\"".into()),
            ),
            (
                r#"{"layers": {}, "rotation": "all"}"#,
                Unknown::Entry("rotation".into()),
            ),
        ] {
            assert_eq!(read_all(text).unwrap_err(), unknown, "{text}");
        }
    }
}
