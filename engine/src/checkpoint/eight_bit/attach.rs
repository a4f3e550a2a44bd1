//! Brings weights of eight bits together with their scales and notes, which stand beside them under names of their own.

use std::collections::{BTreeMap, BTreeSet};

use super::decoding::{Decoding, ScaleName};
use super::note::{self, Note, Unknown};
use super::rotation::is_group;
use crate::checkpoint::elements::Float;
use crate::checkpoint::encoded::{QUANTIZATION_METADATA, Quantised};
use crate::checkpoint::stored::CheckpointTensor;
use crate::codes::Code;
use crate::error::{Error, Result};
use crate::printable::shown_name;

/// The tensor by which some files of scaled weights are marked.
const MARKER: &str = "scaled_fp8";

/// The end of a note's name.
const NOTE: &str = "comfy_quant";

/// Ends of names of scales of a layer's inputs.
const INPUT_SCALES: [&str; 2] = ["input_scale", "scale_input"];

/// Tables of which rows are looked up: no products, so that programs scale them or not, whatever they do with the rest.
const TABLES: [&str; 1] = ["embed_tokens"];

/// Bytes of a note that are read.
const LONGEST_NOTE: usize = 4096;

/// Bytes of the header's notes that are read.
const LONGEST_METADATA: usize = 4 << 20;

/// A tensor: its name without wrappers, the name in the file, itself.
pub type Named = (String, String, CheckpointTensor);

/// Where tensors come from.
pub struct Source<'a> {
    /// Whether a name without wrappers belongs to the model.
    pub owns: &'a dyn Fn(&str) -> bool,
    /// The name without wrappers.
    pub bare: &'a dyn Fn(&str) -> String,
    /// What the headers say of quantisation.
    pub metadata: Vec<&'a str>,
}

/// Tensors whose scales and notes are part of them.
pub struct Attached {
    /// All that were there, without scales, notes and markers of the model.
    pub tensors: Vec<Named>,
    /// Markers that were found.
    pub marks: BTreeSet<&'static str>,
    /// How the weights are quantised, where it is a way that is not read; then the tensors are as they were.
    pub unread: Option<Quantised>,
}

/// What stands beside the weights, by layer.
#[derive(Default)]
struct Beside {
    scales: BTreeMap<String, (ScaleName, CheckpointTensor)>,
    inputs: BTreeMap<String, (&'static str, CheckpointTensor)>,
    /// Each with the tensor or entry that says it.
    notes: BTreeMap<String, (Note, String)>,
    /// Notes that are tensors: those must have a weight.
    note_tensors: BTreeMap<String, CheckpointTensor>,
    marks: BTreeSet<&'static str>,
}

/// Brings tensors together with what stands beside them.
///
/// # Errors
/// When a scale is missing, has no weight, is of a wrong length or type, or is no finite number above zero; or when a note contradicts
/// its weight. The message names the tensors.
pub fn attach(tensors: Vec<Named>, source: &Source<'_>) -> Result<Attached> {
    let own = || {
        tensors
            .iter()
            .filter(|(bare, ..)| (source.owns)(bare) || bare == MARKER)
    };
    let unread = |quantised| Attached {
        tensors: tensors.clone(),
        marks: BTreeSet::new(),
        unread: Some(quantised),
    };
    if let Some(quantised) = Quantised::by_names(own().map(|(bare, name, tensor)| (&**bare, &**name, tensor.dtype()))) {
        return Ok(unread(quantised));
    }
    let mut beside = Beside::default();
    for (bare, name, tensor) in own() {
        match beside.take(bare, tensor)? {
            Ok(()) => {}
            Err(unknown) => return Ok(unread(Quantised::unknown(unknown, name))),
        }
    }
    if let Some(unknown) = beside.take_metadata(source) {
        return Ok(unread(Quantised::unknown(unknown, QUANTIZATION_METADATA)));
    }
    let is_scaled = !beside.scales.is_empty() || !beside.notes.is_empty() || !beside.marks.is_empty();
    let marks = std::mem::take(&mut beside.marks);
    let mut kept = Vec::with_capacity(tensors.len());
    for (bare, name, tensor) in tensors {
        let tensor = match (source.owns)(&bare) {
            true if is_beside(&bare) => continue,
            true => beside.decode(&bare, tensor, is_scaled)?,
            false if bare == MARKER => continue,
            false => tensor,
        };
        kept.push((bare, name, tensor));
    }
    beside.ensure_used()?;
    Ok(Attached {
        tensors: kept,
        marks,
        unread: None,
    })
}

/// Whether the name is that of a scale or a note.
fn is_beside(bare: &str) -> bool {
    let end = bare.rsplit_once('.').map_or("", |(_, end)| end);
    end == NOTE || INPUT_SCALES.contains(&end) || scale_name(end).is_some()
}

fn scale_name(end: &str) -> Option<ScaleName> {
    let names = [ScaleName::WeightScale, ScaleName::ScaleWeight];
    names.into_iter().find(|name| name.end() == end)
}

impl Beside {
    /// Keeps the tensor if it is a scale, a note or a marker; the inner error is what is not understood of a note.
    fn take(&mut self, bare: &str, tensor: &CheckpointTensor) -> Result<std::result::Result<(), Unknown>> {
        if bare == MARKER {
            self.marks.insert(MARKER);
            return Ok(Ok(()));
        }
        let Some((layer, end)) = bare.rsplit_once('.') else {
            return Ok(Ok(()));
        };
        let layer = layer.to_owned();
        let former = if let Some(name) = scale_name(end) {
            let former = self.scales.insert(layer, (name, tensor.clone()));
            former.map(|(_, tensor)| tensor)
        } else if let Some(name) = INPUT_SCALES.into_iter().find(|name| *name == end) {
            let former = self.inputs.insert(layer, (name, tensor.clone()));
            former.map(|(_, tensor)| tensor)
        } else if end == NOTE {
            self.marks.insert(NOTE);
            let text = match tensor.byte_count() {
                ..=LONGEST_NOTE => tensor.bytes()?,
                _ => return Ok(Err(Unknown::Form)),
            };
            match note::read(&text) {
                Ok(note) => self.notes.insert(layer.clone(), (note, tensor.stored_name().into())),
                Err(unknown) => return Ok(Err(unknown)),
            };
            self.note_tensors.insert(layer, tensor.clone())
        } else {
            None
        };
        match former {
            None => Ok(Ok(())),
            Some(other) => {
                let reason = format!(
                    "tensors `{}` and `{}` say the same of one layer: which of them holds is not to be known",
                    shown_name(other.stored_name()),
                    shown_name(tensor.stored_name())
                );
                Err(Error::file(tensor.path(), reason))
            }
        }
    }

    /// Adds what the headers say; gives back what is not understood of it.
    fn take_metadata(&mut self, source: &Source<'_>) -> Option<Unknown> {
        for text in &source.metadata {
            if text.len() > LONGEST_METADATA {
                return Some(Unknown::Form);
            }
            let layers = match note::read_all(text) {
                Ok(layers) => layers,
                Err(unknown) => return Some(unknown),
            };
            for (layer, note) in layers {
                let bare = (source.bare)(&format!("{layer}.weight"));
                let Some(layer) = bare.strip_suffix(".weight").filter(|_| (source.owns)(&bare)) else {
                    continue;
                };
                let note = match note {
                    Ok(note) => note,
                    Err(unknown) => return Some(unknown),
                };
                self.marks.insert(QUANTIZATION_METADATA);
                let said = (note, QUANTIZATION_METADATA.to_owned());
                let (other, _) = self.notes.entry(layer.into()).or_insert(said);
                if *other != note {
                    return Some(Unknown::Entry(format!("{layer}, of which {NOTE} says otherwise")));
                }
            }
        }
        None
    }

    /// The tensor with what stands beside it; `is_scaled` says that matrices of eight bits have scales in this file.
    fn decode(&mut self, bare: &str, tensor: CheckpointTensor, is_scaled: bool) -> Result<CheckpointTensor> {
        let layer = bare.strip_suffix(".weight").unwrap_or("");
        let note = self.notes.remove(layer);
        let input_scale = self.inputs.remove(layer).map(|(name, _)| name);
        self.note_tensors.remove(layer);
        if let Some((note, says)) = &note
            && Code::of(tensor.dtype()) != Some(note.code)
        {
            let (name, says) = (shown_name(tensor.stored_name()), shown_name(says));
            let reason = format!(
                "tensor `{name}` holds {}, but `{says}` says {}: the file is damaged",
                tensor.dtype(),
                note.code.dtype()
            );
            return Err(Error::file(tensor.path(), reason));
        }
        // A scale that stays is found to have no use.
        let Some(code) = Code::of(tensor.dtype()) else {
            return Ok(tensor);
        };
        let rows = tensor.shape().first().copied().unwrap_or(1);
        let row = (tensor.elements() / rows.max(1)).max(1);
        let mut decoding = Decoding::plain(code, row);
        decoding.input_scale = input_scale;
        decoding.rotation = note.as_ref().and_then(|(note, _)| note.rotation);
        if let Some(group) = decoding.rotation.filter(|group| !is_group(*group, row)) {
            let reason = format!(
                "tensor `{}` is said to be rotated by groups of {group}, which is no power of 4 that divides its rows of {row}",
                shown_name(tensor.stored_name())
            );
            return Err(Error::file(tensor.path(), reason));
        }
        if let Some((name, scale)) = self.scales.remove(layer) {
            decoding.scales = read_scales(&scale, &tensor, rows)?;
            decoding.scale = Some(name);
            return Ok(tensor.decoded(decoding));
        }
        let is_table = TABLES.iter().any(|table| layer.ends_with(table));
        let is_matrix = tensor.shape().len() > 1 && !layer.is_empty() && !is_table;
        match code == Code::Int8 || note.is_some() || is_scaled && is_matrix {
            false => Ok(tensor.decoded(decoding)),
            true => Err(Error::file(
                tensor.path(),
                format!(
                    "tensor `{}` holds {} without its scale (`{}_scale`, or `scale_weight` in its place): the file is damaged",
                    shown_name(tensor.stored_name()),
                    tensor.dtype(),
                    shown_name(tensor.stored_name())
                ),
            )),
        }
    }

    /// Everything that stood beside weights must have belonged to one.
    fn ensure_used(&self) -> Result<()> {
        let scales = self.scales.values().map(|(_, tensor)| tensor);
        let inputs = self.inputs.values().map(|(_, tensor)| tensor);
        match scales.chain(inputs).chain(self.note_tensors.values()).next() {
            None => Ok(()),
            Some(tensor) => Err(Error::file(
                tensor.path(),
                format!(
                    "tensor `{}` stands beside no weight of eight bits: it would change nothing, so the file is damaged",
                    shown_name(tensor.stored_name())
                ),
            )),
        }
    }
}

/// The scales of `weight`, one or one for each row.
fn read_scales(scale: &CheckpointTensor, weight: &CheckpointTensor, rows: usize) -> Result<Vec<f32>> {
    let (name, of) = (shown_name(scale.stored_name()), shown_name(weight.stored_name()));
    let refuse = |reason: String| Err(Error::file(scale.path(), format!("tensor `{name}` {reason}")));
    let shape = scale.shape();
    let ends_in_ones = shape.iter().skip(1).all(|extent| *extent == 1);
    let is_for_rows = ends_in_ones && shape.first() == Some(&rows);
    if scale.elements() != 1 && !is_for_rows {
        return refuse(format!(
            "has shape {shape:?}, expected one number, or one for each of the {rows} rows of `{of}`"
        ));
    }
    let Some(float) = Float::stored(scale.dtype()) else {
        return refuse(format!("holds {}, expected scales of F32, BF16 or F16", scale.dtype()));
    };
    let bytes = scale.bytes()?;
    let scales: Vec<f32> = bytes
        .chunks_exact(float.size())
        .map(|bytes| float.read(bytes))
        .collect();
    match scales.iter().position(|scale| !(scale.is_finite() && *scale > 0.0)) {
        None => Ok(scales),
        Some(index) => refuse(format!(
            "holds {} at element {index}: no scale of `{of}`, the file is damaged",
            scales[index]
        )),
    }
}
