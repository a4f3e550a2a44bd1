//! Writing a model with weights of eight bits: the matrices of the main blocks' attention and feed-forward networks; all else stays as
//! it is, which costs little room and is where rounding shows.
//!
//! | | I8 | F8_E4M3 |
//! | --- | --- | --- |
//! | `NAME.weight` | rows divided by their scale, rounded to nearest, −127 to 127 | all divided by the scale, rounded to nearest |
//! | `NAME.weight_scale` | F32 `[rows, 1]`, largest magnitude / 127 | F32 `[]`, largest magnitude / 448 |
//! | `NAME.comfy_quant` | `{"format": "int8_tensorwise"}`, with `"convrot": true, "convrot_groupsize": 256` where rows are whole groups of 256 inputs, which are rotated before | `{"format": "float8_e4m3fn"}` |
//!
//! The scale of nothing but zeros is 1. Everything is made in two passes over the source, piece by piece: scales, which stand first in
//! the file, then codes.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use rayon::prelude::*;
use safetensors::Dtype;
use serde::Serialize;
use serde_json::json;

use super::rotation::{GROUP, is_group, rotate};
use crate::checkpoint::audit::Transformer;
use crate::checkpoint::elements::Float;
use crate::checkpoint::export::{ExportOptions, grouped, metadata, output};
use crate::checkpoint::stored::CheckpointTensor;
use crate::checkpoint::write::{Content, Fetch, Make, OutputFile, OutputTensor, Put, WriteObserver};
use crate::codes::{Code, E4M3_LARGEST, to_e4m3, to_int8};
use crate::error::{Error, Result};
use crate::layers::Group;
use crate::patterns;
use crate::printable::shown_name;

/// Elements that are worked on at a time, in whole rows.
const PIECE_ELEMENTS: usize = 2 << 20;

/// The largest magnitude of I8 that is used, so that both signs reach as far.
const INT8_LARGEST: f32 = 127.0;

/// What modulates a block by the time: outliers of its outputs scale whole channels.
const MODULATION: &str = "modulation";

/// A way of writing weights in eight bits; see the module's head comment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EightBitFormat {
    /// I8, a scale for each row, rotated.
    Int8,
    /// F8_E4M3, a scale for each tensor.
    Fp8,
}

impl EightBitFormat {
    fn code(self) -> Code {
        match self {
            EightBitFormat::Int8 => Code::Int8,
            EightBitFormat::Fp8 => Code::E4m3,
        }
    }
}

/// How a model is to be quantised.
#[derive(Clone, Debug)]
pub struct QuantiseOptions {
    /// The type of the chosen weights.
    pub format: EightBitFormat,
    /// Patterns of the canonical names of matrices that stay as they are besides those that always do.
    pub keep: Vec<String>,
    /// Names and stacking, and the prefix; the type is of no account here.
    pub layout: ExportOptions,
}

/// What rounding did to a weight.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerError {
    /// The name in the file.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Inputs that are rotated together, where they are.
    pub rotation: Option<usize>,
    /// ‖W − Ŵ‖ / ‖W‖, Ŵ being what a reader gets in f32; 0 of nothing but zeros.
    pub error: f64,
}

/// A quantised model to be written.
#[derive(Debug)]
pub struct QuantisePlan<'a> {
    /// Its tensors.
    pub output: OutputFile<'a>,
    /// How many matrices of the main blocks stay as they are because a pattern says so.
    pub kept: usize,
    errors: Rc<RefCell<Vec<LayerError>>>,
}

impl QuantisePlan<'_> {
    /// What rounding did, in the order of writing; measured while that is done.
    pub fn errors(&self) -> Vec<LayerError> {
        self.errors.borrow().clone()
    }
}

/// Plans the file that holds `transformer` with weights of eight bits, and finds their scales: `observer` sees all of them read.
///
/// # Errors
/// When a pattern fits no matrix that would be quantised, patterns leave none, a weight is NaN or infinite, or a file cannot be read.
pub fn quantise<'a>(
    transformer: &'a Transformer,
    options: &QuantiseOptions,
    observer: &mut dyn WriteObserver,
) -> Result<QuantisePlan<'a>> {
    let checkpoint = &transformer.checkpoint;
    let matrices = matrices(transformer);
    let names: Vec<_> = matrices.iter().map(String::as_str).collect();
    if let Some(unused) = patterns::unused(&options.keep, &names).first() {
        return Err(Error::invalid(format!(
            "the pattern `{unused}` fits no matrix that would be quantised; these have names such as `{}`",
            names.first().unwrap_or(&"none")
        )));
    }
    let stays = |name: &str| {
        let mut keep = options.keep.iter();
        !matrices.contains(name) || keep.any(|pattern| patterns::fits(pattern, name))
    };
    // A stack of which a part is to stay stays as a whole.
    let groups = grouped(checkpoint, options.layout.layout)?;
    let (others, chosen): (Vec<_>, Vec<_>) = groups
        .into_iter()
        .partition(|(_, members)| members.iter().any(|(name, _)| stays(name)));
    if chosen.is_empty() {
        return Err(Error::invalid("the patterns to keep leave nothing to be quantised"));
    }
    let prefix = options.layout.prefix.as_str();
    let kept = names.len() - chosen.iter().map(|(_, members)| members.len()).sum::<usize>();
    let mut tensors = others
        .into_iter()
        .map(|(name, members)| output(checkpoint, format!("{prefix}{name}"), &members, None))
        .collect::<Result<Vec<_>>>()?;
    let errors = Rc::new(RefCell::new(Vec::new()));
    let chosen: Vec<_> = chosen
        .into_iter()
        .map(|(name, members)| {
            let members = members.into_iter().map(|(_, tensor)| tensor).collect();
            Matrix::new(format!("{prefix}{name}"), members, options.format)
        })
        .collect();
    observer.begin(chosen.iter().map(|matrix| matrix.bytes()).sum());
    for matrix in chosen {
        tensors.extend(matrix.into_tensors(&errors, observer)?);
    }
    Ok(QuantisePlan {
        output: OutputFile::new(tensors, metadata(checkpoint)),
        kept,
        errors,
    })
}

/// The canonical names of what may be quantised.
fn matrices(transformer: &Transformer) -> BTreeSet<String> {
    let metas = transformer.spec.metas().into_iter();
    let blocks = metas.filter(|meta| matches!(meta.group, Group::Block { .. }));
    blocks
        .flat_map(|meta| meta.parts)
        .filter(|part| part.shape.len() == 2 && part.name.ends_with(".weight") && !part.name.contains(MODULATION))
        .map(|part| part.name)
        .collect()
}

/// A weight to be written in eight bits: the rows of these tensors, one after the other.
struct Matrix<'a> {
    name: String,
    members: Vec<&'a CheckpointTensor>,
    format: EightBitFormat,
    rows: usize,
    /// Elements of a row.
    row: usize,
    rotation: Option<usize>,
}

impl<'a> Matrix<'a> {
    fn new(name: String, members: Vec<&'a CheckpointTensor>, format: EightBitFormat) -> Self {
        let row = members[0].shape()[1];
        let rotates = format == EightBitFormat::Int8 && is_group(GROUP, row);
        Matrix {
            name,
            rows: members.iter().map(|member| member.shape()[0]).sum(),
            members,
            format,
            row,
            rotation: rotates.then_some(GROUP),
        }
    }

    /// Bytes that reading it once hands over.
    fn bytes(&self) -> u64 {
        (self.rows * self.row * Float::F32.size()) as u64
    }

    /// Hands over some rows at a time in f32, rotated: the first one's number, and their numbers.
    fn for_each_rows(&self, take: &mut dyn FnMut(usize, &[f32]) -> Result<()>) -> Result<()> {
        let rows = (PIECE_ELEMENTS / self.row).max(1);
        let mut values = Vec::new();
        let mut first = 0;
        for member in &self.members {
            let float = member.float()?;
            member.for_each_numbers(rows * self.row * float.size(), &mut |piece| {
                values.resize(piece.len() / float.size(), 0.0);
                let bytes = piece.par_chunks(self.row * float.size());
                values.par_chunks_mut(self.row).zip(bytes).for_each(|(values, bytes)| {
                    for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(float.size())) {
                        *value = float.read(bytes);
                    }
                    if let Some(group) = self.rotation {
                        rotate(values, group);
                    }
                });
                take(first, &values)?;
                first += values.len() / self.row;
                Ok(())
            })?;
        }
        Ok(())
    }

    /// The scales: one for each row, or one for all.
    fn scales(&self, observer: &mut dyn WriteObserver) -> Result<Vec<f32>> {
        let mut largest = Vec::with_capacity(self.rows);
        self.for_each_rows(&mut |_, values| {
            largest.par_extend(values.par_chunks(self.row).map(largest_magnitude));
            observer.advance(size_of_val(values) as u64)
        })?;
        if largest.iter().any(|largest| !largest.is_finite()) {
            let tensor = self.members[0];
            let name = shown_name(tensor.stored_name());
            let reason =
                format!("tensor `{name}` holds NaN or infinity, or numbers near the largest: it cannot be quantised");
            return Err(Error::file(tensor.path(), reason));
        }
        Ok(match self.format {
            EightBitFormat::Int8 => largest
                .into_iter()
                .map(|largest| scale(largest, INT8_LARGEST))
                .collect(),
            EightBitFormat::Fp8 => vec![scale(largest.into_iter().fold(0.0, f32::max), E4M3_LARGEST)],
        })
    }

    /// The tensors of the file that it becomes; what rounding does to it is added to `errors` when they are written.
    fn into_tensors(
        self,
        errors: &Rc<RefCell<Vec<LayerError>>>,
        observer: &mut dyn WriteObserver,
    ) -> Result<[OutputTensor<'a>; 3]> {
        let scales = Rc::new(self.scales(observer)?);
        let layer = self.name.strip_suffix(".weight").unwrap_or(&self.name);
        let note = match (self.format, self.rotation) {
            (EightBitFormat::Int8, Some(group)) => {
                json!({ "format": "int8_tensorwise", "convrot": true, "convrot_groupsize": group })
            }
            (EightBitFormat::Int8, None) => json!({ "format": "int8_tensorwise" }),
            (EightBitFormat::Fp8, _) => json!({ "format": "float8_e4m3fn" }),
        };
        let note = note.to_string().into_bytes();
        let note = OutputTensor {
            name: format!("{layer}.comfy_quant"),
            dtype: Dtype::U8,
            shape: vec![note.len()],
            content: Content::Made(Make::new(move |put| put(&note))),
        };
        let beside = OutputTensor {
            name: format!("{layer}.weight_scale"),
            dtype: Dtype::F32,
            shape: match self.format {
                EightBitFormat::Int8 => vec![self.rows, 1],
                EightBitFormat::Fp8 => Vec::new(),
            },
            content: {
                let scales = scales.clone();
                Content::Fetched(Fetch::new(move || Ok(scales.to_vec())), Float::F32)
            },
        };
        let errors = errors.clone();
        let weight = OutputTensor {
            name: self.name.clone(),
            dtype: self.format.code().dtype(),
            shape: vec![self.rows, self.row],
            content: Content::Made(Make::new(move |put| {
                let error = self.write(&scales, put)?;
                errors.borrow_mut().push(error);
                Ok(())
            })),
        };
        Ok([weight, beside, note])
    }

    /// Hands its codes over, and says what rounding did.
    fn write(&self, scales: &[f32], put: Put<'_>) -> Result<LayerError> {
        let numbers = self.format.code().numbers();
        let (mut lost, mut all) = (0.0, 0.0);
        let mut codes = Vec::new();
        self.for_each_rows(&mut |first, values| {
            codes.resize(values.len(), 0);
            let rows = codes
                .par_chunks_mut(self.row)
                .zip(values.par_chunks(self.row))
                .enumerate();
            let sums: Vec<(f64, f64)> = rows
                .map(|(row, (codes, values))| {
                    let scale = scales[if scales.len() == 1 { 0 } else { first + row }];
                    let (mut lost, mut all) = (0.0, 0.0);
                    for (code, value) in codes.iter_mut().zip(values) {
                        *code = match self.format {
                            EightBitFormat::Int8 => to_int8(value / scale),
                            EightBitFormat::Fp8 => to_e4m3(value / scale),
                        };
                        let off = f64::from(value - numbers[usize::from(*code)] * scale);
                        lost += off * off;
                        all += f64::from(*value) * f64::from(*value);
                    }
                    (lost, all)
                })
                .collect();
            for (row_lost, row_all) in sums {
                lost += row_lost;
                all += row_all;
            }
            put(&codes)
        })?;
        Ok(LayerError {
            name: self.name.clone(),
            shape: vec![self.rows, self.row],
            rotation: self.rotation,
            error: if all > 0.0 { (lost / all).sqrt() } else { 0.0 },
        })
    }
}

/// The largest magnitude; NaN or infinity where one of the values is.
fn largest_magnitude(values: &[f32]) -> f32 {
    let magnitudes = values.iter().map(|value| value.abs());
    // NaN is carried along, which `f32::max` would drop: nothing is larger.
    magnitudes.fold(0.0, |largest: f32, value| {
        if largest >= value || largest.is_nan() {
            largest
        } else {
            value
        }
    })
}

/// The scale at which the largest magnitude becomes the largest code: never 0, which would make NaN of zeros, nor subnormal.
fn scale(largest: f32, code: f32) -> f32 {
    match largest > 0.0 {
        true => (largest / code).max(f32::MIN_POSITIVE),
        false => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_never_zero() {
        assert_eq!((scale(0.0, 127.0), scale(127.0, 127.0)), (1.0, 1.0));
        assert_eq!(scale(f32::from_bits(1), 127.0), f32::MIN_POSITIVE);
        assert_eq!(largest_magnitude(&[0.0, -3.0, 2.0]), 3.0);
        assert!(largest_magnitude(&[f32::NAN, 1.0]).is_nan() && largest_magnitude(&[1.0, f32::NAN]).is_nan());
        assert_eq!(largest_magnitude(&[1.0, f32::NEG_INFINITY]), f32::INFINITY);
    }
}
