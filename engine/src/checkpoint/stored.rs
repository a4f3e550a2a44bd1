//! One tensor of a checkpoint: a place in a file, possibly some rows of a stacked tensor there.

use std::path::Path;
use std::sync::Arc;

use safetensors::Dtype;

use super::elements::Float;
use super::file::SafetensorsFile;
use super::header::StoredTensor;
use crate::error::{Error, Result};
use crate::printable::shown_name;

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
    /// The tensor `stored` of `file`, which has this name there.
    pub(super) fn new(stored: StoredTensor, stored_name: String, file: Arc<SafetensorsFile>) -> Self {
        CheckpointTensor {
            stored,
            stored_name,
            file,
        }
    }

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
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        self.file.bytes(&self.stored)
    }

    /// Fills `target` with the bytes from `first` on, as the file holds them.
    ///
    /// # Errors
    /// When they cannot be read.
    pub(super) fn read_at(&self, first: usize, target: &mut [u8]) -> Result<()> {
        debug_assert!(first + target.len() <= self.byte_count());
        self.file.read_at(self.stored.range.start + first, target)
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
                shown_name(&self.stored_name),
                self.stored.dtype
            );
            Error::file(self.path(), reason)
        })
    }

    /// Asks the system to start reading the bytes from the disk.
    pub(super) fn read_ahead(&self) {
        self.file.read_ahead(&self.stored.range);
    }

    /// Hands the bytes over one after the other, in pieces of at most `most`.
    ///
    /// # Errors
    /// When they cannot be read, or `take` says so.
    pub(super) fn for_each_piece(&self, most: usize, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.read_ahead();
        let mut piece = vec![0; self.byte_count().min(most)];
        for first in (0..self.byte_count()).step_by(most) {
            let piece = &mut piece[..(self.byte_count() - first).min(most)];
            self.read_at(first, piece)?;
            take(piece)?;
        }
        Ok(())
    }

    /// The same elements without extents of one at the end of the shape beyond the second.
    pub(super) fn without_trailing_ones(mut self) -> Self {
        while self.stored.shape.len() > 2 && self.stored.shape.last() == Some(&1) {
            self.stored.shape.pop();
        }
        self
    }

    /// The `part`-th of `parts` equal groups of rows.
    pub(super) fn rows(&self, part: usize, parts: usize) -> Option<Self> {
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
