//! A checkpoint: named tensors of one or many files under their canonical names.
//!
//! Opening reads headers only. Each canonical tensor is a place in a file, possibly some rows of a stacked tensor there;
//! its bytes are read when it is loaded or written elsewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::elements::Float;
use super::file::{SafetensorsFile, StoredTensor};
use super::names::{self, Meaning};
use super::shards;
use crate::error::{Error, Result};

/// How tensors of a transformer are named and stacked in their files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// diffusers' names, one tensor for each of q, k and v.
    Plain,
    /// q, k and v stacked in `attention.qkv.weight`, and the names that go with it.
    Packed,
}

/// One tensor of a checkpoint.
#[derive(Clone, Debug)]
pub struct CheckpointTensor {
    /// Its place in the file; the shape is that of the canonical tensor.
    stored: StoredTensor,
    /// The name in the file.
    stored_name: String,
    file: Arc<SafetensorsFile>,
}

impl CheckpointTensor {
    /// The extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.stored.shape
    }

    /// The element type in the file.
    pub fn dtype(&self) -> Dtype {
        self.stored.dtype
    }

    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.stored.shape.iter().product()
    }

    /// The bytes as the file holds them.
    pub fn bytes(&self) -> &[u8] {
        self.file.bytes(&self.stored)
    }

    /// The size of [`CheckpointTensor::bytes`], without reading them.
    pub fn byte_count(&self) -> usize {
        self.stored.range.len()
    }

    /// The file that holds it.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The name in the file.
    pub fn stored_name(&self) -> &str {
        &self.stored_name
    }

    /// The element type, where it is one that can be computed with.
    ///
    /// # Errors
    /// Naming file, tensor and type where it is not.
    pub fn float(&self) -> Result<Float> {
        Float::stored(self.stored.dtype).ok_or_else(|| {
            let reason = format!(
                "tensor `{}` holds {}, which cannot be read; BF16, F16 and F32 can",
                self.stored_name, self.stored.dtype
            );
            Error::file(self.path(), reason)
        })
    }

    /// Asks the system to start reading the bytes from the disk.
    pub(super) fn read_ahead(&self) {
        self.file.read_ahead(&self.stored.range);
    }

    /// Tells the system that the bytes are not needed soon.
    pub(super) fn release(&self) {
        self.file.release(&self.stored.range);
    }

    /// The `part`-th of `parts` equal groups of rows.
    fn rows(&self, part: usize, parts: usize) -> Option<Self> {
        let (&rows, rest) = self.stored.shape.split_first()?;
        let bytes = self.stored.range.len();
        if !rows.is_multiple_of(parts) || !bytes.is_multiple_of(parts) {
            return None;
        }
        let start = self.stored.range.start + bytes / parts * part;
        let mut shape = vec![rows / parts];
        shape.extend(rest);
        Some(CheckpointTensor {
            stored: StoredTensor {
                dtype: self.stored.dtype,
                shape,
                range: start..start + bytes / parts,
            },
            ..self.clone()
        })
    }
}

/// A set of named tensors; see the module's head comment.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// What was opened, for messages.
    path: PathBuf,
    tensors: BTreeMap<String, CheckpointTensor>,
    /// Names of tensors that are no part of the model, as found.
    foreign: Vec<String>,
    layout: Layout,
    /// The prefixes that were stripped.
    prefixes: BTreeSet<String>,
    files: Vec<Arc<SafetensorsFile>>,
}

impl Checkpoint {
    /// Opens a transformer in any of the known layouts: a safetensors file, an index, or a folder of shards.
    ///
    /// # Errors
    /// When a file is missing or damaged, shards do not belong together, two tensors have the same meaning, or nothing in
    /// it is part of a transformer.
    pub fn open_transformer(path: &Path) -> Result<Self> {
        Self::transformer(path, shards::open(path)?)
    }

    /// Opens a transformer that is spread over the given files.
    ///
    /// # Errors
    /// As [`Checkpoint::open_transformer`].
    pub fn open_transformer_files(paths: &[PathBuf]) -> Result<Self> {
        match paths {
            [] => Err(Error::invalid("no file of the transformer is named")),
            [path] => Self::open_transformer(path),
            [first, ..] => Self::transformer(first, shards::open_files(paths)?),
        }
    }

    /// Opens a text encoder, with or without the `model.` before its names.
    ///
    /// # Errors
    /// As [`Checkpoint::open_plain`].
    pub fn open_text_encoder(path: &Path) -> Result<Self> {
        Self::renamed(path, names::text_encoder)
    }

    /// Opens files whose names stand as they are: a VAE, inputs and outputs of a check.
    ///
    /// # Errors
    /// When a file is missing or damaged, or shards do not belong together.
    pub fn open_plain(path: &Path) -> Result<Self> {
        Self::renamed(path, |name| name)
    }

    fn renamed(path: &Path, canonical: fn(&str) -> &str) -> Result<Self> {
        let mut checkpoint = Self::empty(path, shards::open(path)?);
        for (name, tensor) in checkpoint.stored() {
            checkpoint.insert(canonical(&name).to_owned(), tensor)?;
        }
        Ok(checkpoint)
    }

    fn transformer(path: &Path, files: Vec<Arc<SafetensorsFile>>) -> Result<Self> {
        let mut checkpoint = Self::empty(path, files);
        let stored = checkpoint.stored();
        let patch = packed_patch(&stored);
        for (name, tensor) in stored {
            let (prefix, bare) = names::split_prefix(&name);
            match names::meaning(bare, patch) {
                Meaning::Foreign => {
                    checkpoint.foreign.push(name);
                    continue;
                }
                Meaning::One { canonical, packed } => {
                    checkpoint.note_layout(packed);
                    checkpoint.insert(canonical, tensor)?;
                }
                Meaning::Qkv { block } => {
                    checkpoint.note_layout(true);
                    for (part, end) in names::QKV.iter().enumerate() {
                        let rows = tensor.rows(part, names::QKV.len()).ok_or_else(|| {
                            let reason = format!(
                                "tensor `{name}` has shape {:?}, expected three equal groups of rows",
                                tensor.shape()
                            );
                            Error::file(tensor.path(), reason)
                        })?;
                        checkpoint.insert(format!("{block}{end}"), rows)?;
                    }
                }
            }
            if !prefix.is_empty() {
                checkpoint.prefixes.insert(prefix.into());
            }
        }
        checkpoint.expect_transformer()?;
        Ok(checkpoint)
    }

    fn empty(path: &Path, files: Vec<Arc<SafetensorsFile>>) -> Self {
        Checkpoint {
            path: path.into(),
            tensors: BTreeMap::new(),
            foreign: Vec::new(),
            layout: Layout::Plain,
            prefixes: BTreeSet::new(),
            files,
        }
    }

    /// The tensors of all files under the names they have there.
    fn stored(&self) -> Vec<(String, CheckpointTensor)> {
        let all = |file: &Arc<SafetensorsFile>| {
            let file = file.clone();
            let tensors: Vec<_> = file.tensors().clone().into_iter().collect();
            tensors.into_iter().map(move |(name, stored)| {
                let tensor = CheckpointTensor {
                    stored,
                    stored_name: name.clone(),
                    file: file.clone(),
                };
                (name, tensor)
            })
        };
        self.files.iter().flat_map(all).collect()
    }

    fn note_layout(&mut self, packed: bool) {
        if packed {
            self.layout = Layout::Packed;
        }
    }

    fn insert(&mut self, canonical: String, tensor: CheckpointTensor) -> Result<()> {
        if let Some(other) = self.tensors.get(&canonical) {
            let reason = format!(
                "tensors `{}` and `{}` both stand for `{canonical}`",
                other.stored_name, tensor.stored_name
            );
            return Err(Error::file(tensor.path(), reason));
        }
        self.tensors.insert(canonical, tensor);
        Ok(())
    }

    /// Something must be part of a transformer, and it must not be a set of low-rank updates to one.
    fn expect_transformer(&self) -> Result<()> {
        let is_update = |name: &String| name.contains("lora_") || name.contains(".lora.");
        if let Some(name) = self.tensors.keys().find(|name| is_update(name)) {
            let reason = format!("tensor `{name}` is part of a LoRA, which is not supported");
            return Err(Error::file(&self.path, reason));
        }
        if !self.tensors.is_empty() {
            return Ok(());
        }
        let found = match &self.foreign[..] {
            [] => "it holds no tensor".to_owned(),
            [first, rest @ ..] => format!("its tensors are `{first}` and {} others", rest.len()),
        };
        Err(Error::file(
            &self.path,
            format!("no tensor is part of a Z-Image transformer; {found}"),
        ))
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that hold it.
    pub fn files(&self) -> &[Arc<SafetensorsFile>] {
        &self.files
    }

    /// The tensors by canonical name.
    pub fn tensors(&self) -> &BTreeMap<String, CheckpointTensor> {
        &self.tensors
    }

    /// Names, as found, of tensors that are no part of the model (a VAE in the same file, say).
    pub fn foreign(&self) -> &[String] {
        &self.foreign
    }

    /// How the files name and stack the tensors.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The prefixes found before names.
    pub fn prefixes(&self) -> impl Iterator<Item = &str> {
        self.prefixes.iter().map(String::as_str)
    }

    /// The tensor with this canonical name.
    ///
    /// # Errors
    /// Naming the file and the tensor when there is none.
    pub fn tensor(&self, name: &str) -> Result<&CheckpointTensor> {
        self.tensors
            .get(name)
            .ok_or_else(|| Error::file(&self.path, format!("tensor `{name}` is missing")))
    }

    /// A SHA-256 of every tensor's name, shape, type and of the first and last bytes of its data: copies of one model share
    /// it, models of which one was trained further do not. Reads little of the files.
    pub fn identity(&self) -> [u8; 32] {
        const ENDS: usize = 4096;
        let mut hash = Sha256::new();
        for (name, tensor) in &self.tensors {
            let bytes = tensor.bytes();
            hash.update(format!("{name} {:?} {:?};", tensor.shape(), tensor.dtype()));
            hash.update(&bytes[..bytes.len().min(ENDS)]);
            hash.update(&bytes[bytes.len().saturating_sub(ENDS)..]);
        }
        hash.finalize().into()
    }

    /// The same tensors without those for which `keep` says no.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(&str, &CheckpointTensor) -> bool) {
        self.tensors.retain(|name, tensor| keep(name, tensor));
    }

    /// Adds the tensors of `other` that are not here yet.
    pub(super) fn fill_from(&mut self, other: Checkpoint) {
        for (name, tensor) in other.tensors {
            self.tensors.entry(name).or_insert(tensor);
        }
        self.files.extend(other.files);
        self.foreign.extend(other.foreign);
    }
}

/// The patch size of the packed layout, which does not name it: from either projection between patches and tokens.
fn packed_patch(stored: &[(String, CheckpointTensor)]) -> Option<usize> {
    stored.iter().find_map(|(name, tensor)| {
        let shape = tensor.shape();
        match names::split_prefix(name).1 {
            "x_embedder.weight" => names::patch_of(*shape.get(1)?),
            "final_layer.linear.weight" => names::patch_of(*shape.first()?),
            _ => None,
        }
    })
}
