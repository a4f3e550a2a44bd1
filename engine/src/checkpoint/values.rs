//! Small safetensors files of plain numbers: noise, caption features, raw images, reference inputs and outputs.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;

use super::elements::Float;
use super::file::SafetensorsFile;
use super::write::{Content, OutputFile, OutputTensor, write_file};
use crate::error::{Error, Result};
use crate::printable::shown_name;

/// A tensor's shape and elements, row-major, in host memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Values {
    /// The extents, outermost first.
    pub shape: Vec<usize>,
    /// The elements.
    pub values: Vec<f32>,
}

/// Reads every tensor of a safetensors file as f32. Integers (i32, i64) are read too; they are exact up to 2²⁴.
///
/// # Errors
/// When the file is damaged, or holds another type or a number that is not finite.
pub fn read_values(path: &Path) -> Result<BTreeMap<String, Values>> {
    read_chosen_values(path, &mut |_, _| Ok(true))
}

/// Reads some tensors of a safetensors file as [`read_values`] does: those of which `chosen` says by name and shape that they are
/// wanted. Nothing is read before it has been asked about all.
///
/// # Errors
/// When the file is damaged, a tensor holds another type, or `chosen` says so; an [`Error::Invalid`] gets the file's name.
pub fn read_chosen_values(
    path: &Path,
    chosen: &mut dyn FnMut(&str, &[usize]) -> Result<bool>,
) -> Result<BTreeMap<String, Values>> {
    let file = SafetensorsFile::open(path)?;
    let mut tensors = Vec::new();
    for (name, tensor) in file.tensors() {
        match chosen(name, &tensor.shape) {
            Ok(true) => tensors.push((name, tensor)),
            Ok(false) => (),
            Err(Error::Invalid(reason)) => return Err(Error::file(path, reason)),
            Err(error) => return Err(error),
        }
    }
    tensors
        .into_iter()
        .map(|(name, tensor)| {
            let bytes = file.bytes(tensor)?;
            let values: Vec<f32> = match (tensor.dtype, Float::stored(tensor.dtype)) {
                (_, Some(float)) => bytes
                    .chunks_exact(float.size())
                    .map(|bytes| float.read(bytes))
                    .collect(),
                (Dtype::I32, _) => words(&bytes).map(|word| i32::from_le_bytes(word) as f32).collect(),
                (Dtype::I64, _) => words(&bytes).map(|word| i64::from_le_bytes(word) as f32).collect(),
                (other, _) => {
                    let reason = format!(
                        "tensor `{}` holds {other:?}, expected floating-point numbers or i32, i64",
                        shown_name(name)
                    );
                    return Err(Error::file(path, reason));
                }
            };
            if let Some(index) = values.iter().position(|value| !value.is_finite()) {
                let (name, value) = (shown_name(name), values[index]);
                let reason = format!("tensor `{name}` holds {value} at element {index}: no number to compute with");
                return Err(Error::file(path, reason));
            }
            Ok((
                name.clone(),
                Values {
                    shape: tensor.shape.clone(),
                    values,
                },
            ))
        })
        .collect()
}

fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.chunks_exact(N).map(|bytes| {
        let mut word = [0; N];
        word.copy_from_slice(bytes);
        word
    })
}

/// Writes tensors as f32, beside and renamed into place; what was there is replaced.
///
/// # Errors
/// When the file cannot be written; then what was there stays.
pub fn write_values(path: &Path, tensors: &[(String, Values)]) -> Result<()> {
    let outputs = tensors.iter().map(|(name, tensor)| OutputTensor {
        name: name.clone(),
        dtype: Dtype::F32,
        shape: tensor.shape.clone(),
        content: Content::Values(&tensor.values),
    });
    write_file(
        path,
        &OutputFile::new(outputs.collect(), BTreeMap::new()),
        true,
        &mut (),
    )?;
    Ok(())
}
