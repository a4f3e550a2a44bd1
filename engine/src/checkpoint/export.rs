//! A checkpoint in another layout, under another prefix, in another type.

use std::collections::BTreeMap;
use std::path::Path;

use super::elements::Float;
use super::encoded::QUANTIZATION_METADATA;
use super::names::Prefix;
use super::set::{Checkpoint, Layout};
use super::stored::CheckpointTensor;
use super::write::{Content, OutputFile, OutputTensor};
use crate::error::{Error, Result};
use crate::model::family::{Family, Meaning};
use crate::printable::shown_name;

/// How a checkpoint is to be written.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// Names and stacking.
    pub layout: Layout,
    /// Put before every name.
    pub prefix: Prefix,
    /// The element type of all tensors; as they are by default, those of eight bits in BF16.
    pub float: Option<Float>,
}

impl Default for ExportOptions {
    fn default() -> Self {
        ExportOptions {
            layout: Layout::Plain,
            prefix: Prefix::default(),
            float: None,
        }
    }
}

/// Fails unless the loader finds exactly these tensors, by canonical name, in the file or folder at `path`.
///
/// # Errors
/// Naming a tensor that it does not find, or what keeps it from reading what is there.
pub fn ensure_found_again(path: &Path, expected: &BTreeMap<String, Vec<usize>>) -> Result<()> {
    let found = Checkpoint::open_transformer(path)?.shapes();
    let lost = expected.iter().find(|(name, shape)| found.get(*name) != Some(*shape));
    let more = found.keys().find(|name| !expected.contains_key(*name));
    match lost.map(|(name, _)| name).or(more) {
        None => Ok(()),
        Some(name) => Err(Error::file(
            path,
            format!(
                "would not be read as it was meant: tensor `{}` is not found again; it was not written",
                shown_name(name)
            ),
        )),
    }
}

/// Plans the file that holds `checkpoint`, all of it, as `options` say.
///
/// # Errors
/// When two tensors would get one name, or projections to be stacked are missing or do not fit together.
pub fn export<'a>(checkpoint: &'a Checkpoint, options: &ExportOptions) -> Result<OutputFile<'a>> {
    let tensors = grouped(checkpoint, options.layout)?
        .into_iter()
        .map(|(name, members)| {
            let name = format!("{}{name}", options.prefix.as_str());
            output(checkpoint, name, &members, options.float)
        })
        .collect::<Result<_>>()?;
    Ok(OutputFile::new(tensors, metadata(checkpoint)))
}

/// What the files say beside their tensors, but for how these are quantised, which holds of no others.
pub(super) fn metadata(checkpoint: &Checkpoint) -> BTreeMap<String, String> {
    let all = checkpoint.files().iter().flat_map(|file| file.metadata().clone());
    all.filter(|(key, _)| key != QUANTIZATION_METADATA).collect()
}

/// Tensors that become one: its name in the layout, without a prefix, and theirs.
pub(super) type Members<'a> = (String, Vec<(&'a str, &'a CheckpointTensor)>);

/// The tensors of a layout, and what each is made of.
///
/// # Errors
/// When two would get one name, or projections to be stacked are missing.
pub(super) fn grouped(checkpoint: &Checkpoint, layout: Layout) -> Result<Vec<Members<'_>>> {
    let family = checkpoint.family();
    let mut groups: BTreeMap<String, Vec<(&str, &CheckpointTensor)>> = BTreeMap::new();
    for (name, tensor) in checkpoint.tensors() {
        let written = match layout {
            Layout::Plain => name.clone(),
            Layout::Packed => family.packed(name),
        };
        groups.entry(written).or_default().push((name, tensor));
    }
    let mut ordered = Vec::with_capacity(groups.len());
    for (name, members) in groups {
        let members = match layout {
            Layout::Packed => in_stacking_order(family, &name, &members),
            Layout::Plain => Some(members),
        };
        let members = members.ok_or_else(|| does_not_pack(checkpoint, &name))?;
        ordered.push((name, members));
    }
    Ok(ordered)
}

/// The tensors of a stack, each once; of any other tensor, itself.
fn in_stacking_order<'a, 'b>(
    family: &dyn Family,
    name: &str,
    members: &[(&'b str, &'a CheckpointTensor)],
) -> Option<Vec<(&'b str, &'a CheckpointTensor)>> {
    let find = |part: &String| members.iter().find(|(name, _)| name == part).copied();
    match family.meaning(name, None) {
        Meaning::Stack(parts) => parts.iter().map(find).collect(),
        _ => (members.len() == 1).then(|| members.to_vec()),
    }
}

fn does_not_pack(checkpoint: &Checkpoint, name: &str) -> Error {
    let shown = shown_name(name);
    let reason = match checkpoint.family().meaning(name, None) {
        Meaning::Stack(parts) => {
            let parts: Vec<_> = parts.iter().map(|part| format!("`{}`", shown_name(part))).collect();
            format!("cannot be packed: `{shown}` needs all of {}", parts.join(", "))
        }
        _ => format!("cannot be packed: several tensors would be called `{shown}`"),
    };
    Error::file(checkpoint.path(), reason)
}

/// The tensor of this name that `members` become, in the type `float` or as they are.
///
/// # Errors
/// When they do not fit together.
pub(super) fn output<'a>(
    checkpoint: &Checkpoint,
    name: String,
    members: &[(&str, &'a CheckpointTensor)],
    float: Option<Float>,
) -> Result<OutputTensor<'a>> {
    let tensors: Vec<_> = members.iter().map(|(_, tensor)| *tensor).collect();
    let first = tensors[0];
    // Their scales would stand beside them under names of their own.
    let is_eight_bit = tensors.iter().any(|tensor| tensor.decoding().is_some());
    let float = float.or(is_eight_bit.then_some(Float::Bf16));
    let fits = |tensor: &&CheckpointTensor| {
        (float.is_some() || tensor.dtype() == first.dtype()) && tensor.shape().get(1..) == first.shape().get(1..)
    };
    if !tensors.iter().all(fits) {
        let shown = shown_name(&name);
        let reason =
            format!("cannot be packed: the parts of `{shown}` differ in type or width; choose a type with --dtype");
        return Err(Error::file(checkpoint.path(), reason));
    }
    let mut shape = first.shape().to_vec();
    if tensors.len() > 1 {
        shape[0] = tensors.iter().map(|tensor| tensor.shape()[0]).sum();
    }
    let mut same = true;
    if let Some(float) = float {
        for tensor in &tensors {
            same &= tensor.float()? == float && tensor.decoding().is_none();
        }
    }
    Ok(OutputTensor {
        name,
        dtype: float.map_or(first.dtype(), Float::dtype),
        shape,
        content: match float {
            Some(float) if !same => Content::Converted(tensors, float),
            _ => Content::Copied(tensors),
        },
    })
}
