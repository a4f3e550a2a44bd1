//! The demo's pixel model in eight bits, in every spelling: made from the definitions of the formats, without the engine.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use libtest_mimic::Failed;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::checkpoint::model::{Stored, Tensors};

/// How one file is written.
#[derive(Clone, Copy)]
pub struct Spelling {
    pub name: &'static str,
    pub dtype: Dtype,
    /// The end of scales' names and their type, if there are some.
    pub scale: Option<(&'static str, Dtype)>,
    /// Their shape with 0 for the number of rows.
    pub shape: &'static [usize],
    pub input_scale: Option<&'static str>,
    /// Inputs that are rotated together.
    pub rotation: Option<usize>,
    /// What `comfy_quant` says of each.
    pub note: Option<&'static str>,
    /// What the header says of each.
    pub header: Option<&'static str>,
    /// Whether there is a tensor `scaled_fp8`.
    pub marker: bool,
}

pub const PLAIN: Spelling = Spelling {
    name: "plain-e4m3",
    dtype: Dtype::F8_E4M3,
    scale: None,
    shape: &[],
    input_scale: None,
    rotation: None,
    note: None,
    header: None,
    marker: false,
};

/// Every spelling.
pub fn all() -> Vec<Spelling> {
    let scaled = |name, scale, dtype, shape| Spelling {
        name,
        scale: Some((scale, dtype)),
        shape,
        ..PLAIN
    };
    let int8 = |name, shape| Spelling {
        dtype: Dtype::I8,
        ..scaled(name, "weight_scale", Dtype::F32, shape)
    };
    vec![
        PLAIN,
        Spelling {
            name: "plain-e5m2",
            dtype: Dtype::F8_E5M2,
            ..PLAIN
        },
        Spelling {
            marker: true,
            ..scaled("scale-weight", "scale_weight", Dtype::F32, &[])
        },
        Spelling {
            marker: true,
            input_scale: Some("scale_input"),
            ..scaled("scale-input", "scale_weight", Dtype::BF16, &[1])
        },
        Spelling {
            note: Some(r#"{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}"#),
            ..scaled("weight-scale", "weight_scale", Dtype::F32, &[])
        },
        Spelling {
            input_scale: Some("input_scale"),
            ..scaled("input-scale", "weight_scale", Dtype::F16, &[0])
        },
        Spelling {
            header: Some(r#"{"format": "float8_e4m3fn"}"#),
            ..scaled("header", "weight_scale", Dtype::F32, &[0, 1])
        },
        Spelling {
            dtype: Dtype::F8_E5M2,
            header: Some(r#"{"format": "float8_e5m2"}"#),
            note: Some(r#"{"format": "float8_e5m2"}"#),
            ..scaled("e5m2", "weight_scale", Dtype::F32, &[0, 1])
        },
        int8("int8-rows", &[0]),
        int8("int8-tensor", &[]),
        Spelling {
            rotation: Some(64),
            note: Some(r#"{"format": "int8_tensorwise", "params": {"convrot": true, "convrot_groupsize": 64}}"#),
            ..int8("convrot-64", &[0])
        },
        Spelling {
            rotation: Some(128 * 2),
            note: Some(r#"{"format": "int8_tensorwise", "convrot": true}"#),
            ..int8("convrot-256", &[0, 1])
        },
    ]
}

/// The number that a code stands for, by the formats' definition.
pub fn number(dtype: Dtype, code: u8) -> f64 {
    let (mantissa, bias) = match dtype {
        Dtype::I8 => return f64::from(code as i8),
        Dtype::F8_E4M3 => (3, 7),
        _ => (2, 15),
    };
    let sign = if code >= 128 { -1.0 } else { 1.0 };
    let exponent = i32::from(code & 0x7f) >> mantissa;
    let fraction = f64::from(code & ((1 << mantissa) - 1)) / f64::from(1 << mantissa);
    match exponent {
        0 => sign * fraction * 2f64.powi(1 - bias),
        _ => sign * (1.0 + fraction) * 2f64.powi(exponent - bias),
    }
}

/// Largest number of a type, and the codes of its numbers from 0 upwards.
fn codes(dtype: Dtype) -> Vec<f64> {
    let last = match dtype {
        Dtype::I8 => 0x7f,
        Dtype::F8_E4M3 => 0x7e,
        _ => 0x7b,
    };
    (0..=last).map(|code| number(dtype, code)).collect()
}

/// The code nearest to a value.
fn nearest(dtype: Dtype, codes: &[f64], value: f64) -> u8 {
    let above = codes
        .partition_point(|code| *code < value.abs())
        .clamp(1, codes.len() - 1);
    let is_above = codes[above] - value.abs() < value.abs() - codes[above - 1];
    let code = if is_above { above } else { above - 1 } as u8;
    match (dtype, value < 0.0) {
        (_, false) => code,
        (Dtype::I8, true) => (code as i8).wrapping_neg() as u8,
        (_, true) => code | 0x80,
    }
}

/// A group of numbers times the regular Hadamard matrix, entry by entry.
fn rotated(values: &[f64]) -> Vec<f64> {
    let entry = |mut row: usize, mut column: usize| {
        let (mut sign, mut rest) = (1.0, values.len());
        while rest > 1 {
            sign *= if row % 4 + column % 4 == 3 { -1.0 } else { 1.0 };
            (row, column, rest) = (row / 4, column / 4, rest / 4);
        }
        sign / (values.len() as f64).sqrt()
    };
    let sum = |column: usize| {
        values
            .iter()
            .enumerate()
            .map(|(row, value)| value * entry(row, column))
            .sum()
    };
    (0..values.len()).map(sum).collect()
}

/// A file's tensors, its metadata, and the numbers that its weights of eight bits stand for, by name.
pub struct File {
    pub tensors: Tensors,
    pub metadata: HashMap<String, String>,
    pub numbers: HashMap<String, Vec<f64>>,
}

impl File {
    pub fn save(&self, path: &Path) -> Result<PathBuf, Failed> {
        let mut views = Vec::new();
        for (name, tensor) in &self.tensors {
            views.push((
                name,
                TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes)?,
            ));
        }
        safetensors::serialize_to_file(views, Some(self.metadata.clone()), path)?;
        Ok(path.into())
    }
}

/// Whether the tensor is a matrix of a main block's attention or feed-forward network, in either layout.
pub fn is_matrix(name: &str) -> bool {
    let within = name.contains("layers.") && (name.contains(".attention.") || name.contains(".feed_forward."));
    within && name.ends_with(".weight") && !name.contains("norm")
}

fn bytes_of(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let bytes = values.iter().flat_map(|&value| match dtype {
        Dtype::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    });
    bytes.collect()
}

/// The model of these BF16 tensors in eight bits.
pub fn written(plain: &Tensors, spelling: &Spelling) -> File {
    let mut file = File {
        tensors: plain.clone(),
        metadata: HashMap::from([("kept".into(), "yes".into())]),
        numbers: HashMap::new(),
    };
    let mut layers = serde_json::Map::new();
    for (name, tensor) in plain.iter().filter(|(name, _)| is_matrix(name)) {
        let row = tensor.shape[1];
        let rotation = spelling.rotation.filter(|group| row % group == 0);
        if spelling.rotation.is_some() && rotation.is_none() {
            continue;
        }
        let layer = name.trim_end_matches(".weight");
        let (weight, scales, numbers) = narrow(tensor, spelling, rotation);
        let mut add = |end: &str, dtype, shape, bytes| {
            let tensor = Stored { dtype, shape, bytes };
            file.tensors.insert(format!("{layer}.{end}"), tensor);
        };
        if let Some((end, dtype)) = spelling.scale {
            let rows = |extent: &usize| if *extent == 0 { tensor.shape[0] } else { *extent };
            let shape = spelling.shape.iter().map(rows).collect();
            add(end, dtype, shape, bytes_of(dtype, &scales));
        }
        if let Some(end) = spelling.input_scale {
            add(end, Dtype::F32, Vec::new(), bytes_of(Dtype::F32, &[0.25]));
        }
        if let Some(note) = spelling.note {
            add("comfy_quant", Dtype::U8, vec![note.len()], note.as_bytes().to_vec());
        }
        if let Some(note) = spelling.header {
            layers.insert(layer.into(), serde_json::from_str(note).expect("JSON"));
        }
        file.tensors.insert(name.clone(), weight);
        file.numbers.insert(name.clone(), numbers);
    }
    if !layers.is_empty() {
        let header = serde_json::json!({ "format_version": "1.0", "layers": layers });
        file.metadata
            .insert("_quantization_metadata".into(), header.to_string());
    }
    if spelling.marker {
        let marker = Stored {
            dtype: Dtype::F8_E4M3,
            shape: vec![0],
            bytes: Vec::new(),
        };
        file.tensors.insert("scaled_fp8".into(), marker);
    }
    file
}

/// A weight's codes, its scales as the file can hold them, and what both stand for.
fn narrow(tensor: &Stored, spelling: &Spelling, rotation: Option<usize>) -> (Stored, Vec<f32>, Vec<f64>) {
    let row = tensor.shape[1];
    let values = tensor
        .bytes
        .chunks_exact(2)
        .map(|bytes| bf16::from_le_bytes([bytes[0], bytes[1]]).to_f64());
    let mut values: Vec<f64> = values.collect();
    let rotate = |values: &mut Vec<f64>| {
        if let Some(group) = rotation {
            *values = values.chunks_exact(group).flat_map(rotated).collect();
        }
    };
    rotate(&mut values);
    let codes = codes(spelling.dtype);
    let largest = |values: &[f64]| values.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
    let by_row = spelling.shape.first() == Some(&0);
    let run = if by_row { row } else { values.len() };
    let (mut bytes, mut scales) = (Vec::new(), Vec::new());
    for values in values.chunks_mut(run) {
        let scale = match spelling.scale {
            None => 1.0,
            // Rounded to the type that the file holds it in.
            Some((_, dtype)) => {
                let scale = (largest(values) / codes.last().expect("codes")) as f32;
                match dtype {
                    Dtype::BF16 => bf16::from_f32(scale).to_f32(),
                    Dtype::F16 => f16::from_f32(scale).to_f32(),
                    _ => scale,
                }
            }
        };
        scales.push(scale);
        for value in values {
            let code = nearest(spelling.dtype, &codes, *value / f64::from(scale));
            bytes.push(code);
            *value = number(spelling.dtype, code) * f64::from(scale);
        }
    }
    rotate(&mut values);
    let weight = Stored {
        dtype: spelling.dtype,
        shape: tensor.shape.clone(),
        bytes,
    };
    (weight, scales, values)
}
