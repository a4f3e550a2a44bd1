//! A checkpoint: named tensors of one or many files under their canonical names.
//!
//! Opening reads headers only. Each canonical tensor is a place in a file, possibly some rows of a stacked tensor there;
//! its bytes are read when it is loaded or written elsewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::eight_bit::{self, EightBit, Named};
use super::encoded::{self, Quantised};
use super::file::SafetensorsFile;
use super::names;
use super::shards;
use super::stored::CheckpointTensor;
use crate::error::{Error, Result};
use crate::model::families::{before_telling_name, family_of, known};
use crate::model::family::{Family, Meaning};
use crate::printable::shown_name;

/// How tensors of a transformer are named and stacked in their files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// diffusers' names, one tensor for each of q, k and v.
    Plain,
    /// q, k and v stacked in `attention.qkv.weight`, and the names that go with it.
    Packed,
}

/// A tensor of this canonical name in the shape that it has here.
type Reshape<'a> = &'a dyn Fn(&str, CheckpointTensor) -> CheckpointTensor;

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
    /// How its weights are quantised, where they are in a way that is not read.
    quantised: Option<Quantised>,
    /// What besides scales marks weights of eight bits.
    marks: BTreeSet<&'static str>,
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

    /// Opens a text encoder; what programs put before its names is left out.
    ///
    /// # Errors
    /// When a file is missing, damaged or a LoRA, or shards do not belong together.
    pub fn open_text_encoder(path: &Path) -> Result<Self> {
        Self::part(
            path,
            shards::open(path)?,
            &|name| names::text_encoder(name),
            &|_, tensor| tensor,
        )
    }

    /// Opens a VAE with the names of diffusers or those of the original autoencoders.
    ///
    /// # Errors
    /// As [`Checkpoint::open_text_encoder`].
    pub fn open_vae(path: &Path) -> Result<Self> {
        let files = shards::open(path)?;
        let all = files.iter().flat_map(|file| file.tensors().keys());
        let bare: Vec<_> = all.map(|name| names::vae_bare(name)).collect();
        let up_blocks = names::vae::up_blocks(bare.iter().map(|name| name.as_ref()));
        drop(bare);
        let canonical = |name: &str| names::vae::canonical(&names::vae_bare(name), up_blocks);
        Self::part(
            path,
            files,
            &canonical,
            &|canonical, tensor| match names::vae::is_matrix(canonical) {
                true => tensor.without_trailing_ones(),
                false => tensor,
            },
        )
    }

    /// Opens files whose names stand as they are: inputs and outputs of a check.
    ///
    /// # Errors
    /// When a file is missing or damaged, or shards do not belong together.
    pub fn open_plain(path: &Path) -> Result<Self> {
        let mut checkpoint = Self::empty(path, shards::open(path)?);
        for (name, tensor) in checkpoint.stored() {
            checkpoint.insert(name, tensor)?;
        }
        Ok(checkpoint)
    }

    /// Opens a part beside the transformer: `canonical` gives names, `reshaped` a tensor of that name the shape that it has here.
    fn part(
        path: &Path,
        files: Vec<Arc<SafetensorsFile>>,
        canonical: &dyn Fn(&str) -> String,
        reshaped: Reshape<'_>,
    ) -> Result<Self> {
        let mut checkpoint = Self::empty(path, files);
        let named = checkpoint.stored().into_iter();
        let named = named.map(|(name, tensor)| {
            let canonical = canonical(&name);
            let tensor = reshaped(&canonical, tensor);
            (canonical, name, tensor)
        });
        for (canonical, _, tensor) in checkpoint.attach(named.collect(), &|_| true, canonical)? {
            checkpoint.insert(canonical, tensor)?;
        }
        checkpoint.ensure_weights()?;
        Ok(checkpoint)
    }

    /// Brings weights of eight bits together with their scales, and notes how weights are quantised.
    fn attach(
        &mut self,
        named: Vec<Named>,
        owns: &dyn Fn(&str) -> bool,
        bare: &dyn Fn(&str) -> String,
    ) -> Result<Vec<Named>> {
        let files = self.files.iter();
        let metadata = files.filter_map(|file| file.metadata().get(encoded::QUANTIZATION_METADATA));
        let source = eight_bit::Source {
            owns,
            bare,
            metadata: metadata.map(String::as_str).collect(),
        };
        let attached = eight_bit::attach(named, &source)?;
        self.marks = attached.marks;
        self.quantised = attached.unread;
        Ok(attached.tensors)
    }

    fn transformer(path: &Path, files: Vec<Arc<SafetensorsFile>>) -> Result<Self> {
        let mut checkpoint = Self::empty(path, files);
        let bare_name = |name: &str| names::without_inner(names::split_prefix(name).1).into_owned();
        let named = checkpoint.stored().into_iter();
        let stored: Vec<_> = named.map(|(name, tensor)| (bare_name(&name), name, tensor)).collect();
        let family = family_of(stored.iter().map(|(bare, ..)| bare.as_str()));
        let patch = |(bare, _, tensor): &(String, String, CheckpointTensor)| family.packed_patch(bare, tensor.shape());
        let patch = stored.iter().find_map(patch);
        let owns = |bare: &str| family.meaning(bare, patch) != Meaning::Foreign;
        for (bare, name, tensor) in checkpoint.attach(stored, &owns, &bare_name)? {
            let prefix = names::split_prefix(&name).0;
            match family.meaning(&bare, patch) {
                Meaning::Foreign => {
                    checkpoint.foreign.push(name);
                    continue;
                }
                Meaning::One { canonical, packed } => {
                    checkpoint.note_layout(packed);
                    checkpoint.insert(canonical, tensor)?;
                }
                Meaning::Swapped(canonical) => {
                    checkpoint.note_layout(true);
                    let swapped = tensor.with_halves_swapped().ok_or_else(|| {
                        let reason = format!(
                            "tensor `{}` has shape {:?} and no scales of its own, expected two equal halves of rows of numbers",
                            shown_name(&name),
                            tensor.shape()
                        );
                        Error::file(tensor.path(), reason)
                    })?;
                    checkpoint.insert(canonical, swapped)?;
                }
                Meaning::Stack(parts) => {
                    checkpoint.note_layout(true);
                    for (part, canonical) in parts.iter().enumerate() {
                        let rows = tensor.rows(part, parts.len()).ok_or_else(|| {
                            let reason = format!(
                                "tensor `{}` has shape {:?}, expected {} equal groups of rows",
                                shown_name(&name),
                                tensor.shape(),
                                parts.len()
                            );
                            Error::file(tensor.path(), reason)
                        })?;
                        checkpoint.insert(canonical.clone(), rows)?;
                    }
                }
            }
            if !prefix.is_empty() {
                checkpoint.prefixes.insert(prefix.into());
            }
        }
        checkpoint.ensure_weights()?;
        checkpoint.ensure_transformer()?;
        Ok(checkpoint)
    }

    fn empty(path: &Path, files: Vec<Arc<SafetensorsFile>>) -> Self {
        Checkpoint {
            path: path.into(),
            tensors: BTreeMap::new(),
            foreign: Vec::new(),
            layout: Layout::Plain,
            prefixes: BTreeSet::new(),
            quantised: None,
            marks: BTreeSet::new(),
            files,
        }
    }

    /// The tensors of all files under the names they have there.
    fn stored(&self) -> Vec<(String, CheckpointTensor)> {
        let all = |file: &Arc<SafetensorsFile>| {
            let file = file.clone();
            let tensors: Vec<_> = file.tensors().clone().into_iter().collect();
            tensors.into_iter().map(move |(name, stored)| {
                let tensor = CheckpointTensor::new(stored, name.clone(), file.clone());
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
                "tensors `{}` and `{}` both stand for `{}`",
                shown_name(other.stored_name()),
                shown_name(tensor.stored_name()),
                shown_name(&canonical)
            );
            return Err(Error::file(tensor.path(), reason));
        }
        self.tensors.insert(canonical, tensor);
        Ok(())
    }

    /// Refuses changes to a model.
    fn ensure_weights(&self) -> Result<()> {
        let own = self.tensors.values().map(|tensor| tensor.stored_name());
        let others = self.foreign.iter().map(String::as_str);
        let others = others.filter(|_| self.tensors.is_empty());
        match own.chain(others).find(|name| encoded::is_low_rank(name)) {
            None => Ok(()),
            Some(name) => Err(Error::file(&self.path, encoded::low_rank(name))),
        }
    }

    /// Something must be part of a transformer.
    fn ensure_transformer(&self) -> Result<()> {
        if !self.tensors.is_empty() {
            return Ok(());
        }
        let unknown = self.foreign.iter().find_map(|name| before_telling_name(name));
        let found = match (unknown, &self.foreign[..]) {
            (Some(prefix), _) => format!(
                "its names begin with `{}`, which is none of the prefixes that are understood ({})",
                shown_name(prefix),
                names::known_prefixes()
            ),
            (None, []) => "it holds no tensor".to_owned(),
            (None, [first, rest @ ..]) => {
                format!("its tensors are `{}` and {} others", shown_name(first), rest.len())
            }
        };
        Err(Error::file(
            &self.path,
            format!("no tensor is part of a {} transformer; {found}", known()),
        ))
    }

    /// Refuses weights that are quantised in a way that is not read, by its name.
    ///
    /// # Errors
    /// When they are.
    pub fn ensure_readable_weights(&self) -> Result<()> {
        match self.quantisation() {
            Some(reason) => Err(Error::file(&self.path, reason)),
            None => Ok(()),
        }
    }

    /// What is to be known of weights of eight bits; `None` where there are none.
    pub fn eight_bit(&self) -> Option<EightBit> {
        EightBit::of(self.tensors.values(), &self.marks)
    }

    /// A sentence on how the weights are quantised, which begins with its verb; `None` where it is not in a way that cannot be read.
    pub fn quantisation(&self) -> Option<String> {
        self.quantised.as_ref().map(ToString::to_string)
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

    /// The family that the tensors are of.
    pub fn family(&self) -> &'static dyn Family {
        family_of(self.tensors.keys().map(String::as_str))
    }

    /// The tensors' shapes by canonical name.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let tensors = self.tensors.iter();
        tensors
            .map(|(name, tensor)| (name.clone(), tensor.shape().to_vec()))
            .collect()
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
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn identity(&self) -> Result<[u8; 32]> {
        const ENDS: usize = 4096;
        let mut hash = Sha256::new();
        for (name, tensor) in &self.tensors {
            let mut end = [0; ENDS];
            let end = &mut end[..tensor.byte_count().min(ENDS)];
            hash.update(format!("{name} {:?} {:?};", tensor.shape(), tensor.dtype()));
            for first in [0, tensor.byte_count() - end.len()] {
                tensor.read_at(first, end)?;
                hash.update(&*end);
            }
            for scale in tensor.decoding().into_iter().flat_map(|decoding| &decoding.scales) {
                hash.update(scale.to_le_bytes());
            }
        }
        Ok(hash.finalize().into())
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
        self.quantised = self.quantised.take().or(other.quantised);
        self.marks.extend(other.marks);
        self.files.extend(other.files);
        self.foreign.extend(other.foreign);
    }
}
