//! One tensor of a checkpoint: a place in a file, possibly some rows of a stacked tensor there.

use std::path::Path;
use std::sync::Arc;

use safetensors::Dtype;

use super::eight_bit::{Code, Decoding};
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
    /// How its bytes become numbers, where they are none as they stand.
    decoding: Option<Arc<Decoding>>,
    /// Whether the second half of its bytes comes before the first.
    swapped: bool,
}

impl CheckpointTensor {
    /// The tensor `stored` of `file`, which has this name there.
    pub(super) fn new(stored: StoredTensor, stored_name: String, file: Arc<SafetensorsFile>) -> Self {
        CheckpointTensor {
            stored,
            stored_name,
            file,
            decoding: None,
            swapped: false,
        }
    }

    /// The same tensor, whose bytes become numbers in this way.
    pub(super) fn decoded(mut self, decoding: Decoding) -> Self {
        self.decoding = Some(Arc::new(decoding));
        self
    }

    /// How its bytes become numbers, where they are none as they stand.
    pub(super) fn decoding(&self) -> Option<&Decoding> {
        self.decoding.as_deref()
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
        match self.swapped {
            false => self.file.bytes(&self.stored),
            true => {
                let mut bytes = vec![0; self.byte_count()];
                self.read_at(0, &mut bytes)?;
                Ok(bytes)
            }
        }
    }

    /// Fills `target` with the bytes from `first` on, as the file holds them.
    ///
    /// # Errors
    /// When they cannot be read.
    pub(super) fn read_at(&self, first: usize, target: &mut [u8]) -> Result<()> {
        debug_assert!(first + target.len() <= self.byte_count());
        let start = self.stored.range.start;
        if !self.swapped {
            return self.file.read_at(start + first, target);
        }
        let half = self.byte_count() / 2;
        let in_first = half.saturating_sub(first).min(target.len());
        let (own_first, own_second) = target.split_at_mut(in_first);
        if !own_first.is_empty() {
            self.file.read_at(start + half + first, own_first)?;
        }
        match own_second.is_empty() {
            true => Ok(()),
            false => self.file.read_at(start + (first + in_first - half), own_second),
        }
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

    /// The type of its numbers: the file's element type, or F32 where those of eight bits are decoded.
    ///
    /// # Errors
    /// Naming file, tensor and type where it is none that can be computed with.
    pub fn float(&self) -> Result<Float> {
        if self.decoding.is_some() {
            return Ok(Float::F32);
        }
        Float::stored(self.stored.dtype).ok_or_else(|| {
            let way_out = match Code::of(self.stored.dtype) {
                Some(_) => "which is not decoded here; BF16, F16 and F32 are read",
                None => "which cannot be read; BF16, F16 and F32 can",
            };
            let reason = format!(
                "tensor `{}` holds {}, {way_out}",
                shown_name(&self.stored_name),
                self.stored.dtype
            );
            Error::file(self.path(), reason)
        })
    }

    /// Fills `target` with its numbers in the type of [`CheckpointTensor::float`], from the byte `first` on, counted in that type.
    ///
    /// # Errors
    /// When they cannot be read.
    pub(super) fn read_numbers(&self, first: usize, target: &mut [u8]) -> Result<()> {
        let Some(decoding) = &self.decoding else {
            return self.read_at(first, target);
        };
        let size = Float::F32.size();
        debug_assert!(first.is_multiple_of(size) && target.len().is_multiple_of(size));
        decoding.read(first / size, target, &|first, bytes| self.read_at(first, bytes))
    }

    /// Asks the system to start reading the bytes from the disk.
    pub(super) fn read_ahead(&self) {
        self.file.read_ahead(&self.stored.range);
    }

    /// All its numbers in the type of [`CheckpointTensor::float`].
    ///
    /// # Errors
    /// When they cannot be read.
    pub(super) fn numbers(&self) -> Result<Vec<u8>> {
        let mut numbers = vec![0; self.elements() * self.float()?.size()];
        self.read_numbers(0, &mut numbers)?;
        Ok(numbers)
    }

    /// Hands the bytes over one after the other, in pieces of at most `most`.
    ///
    /// # Errors
    /// When they cannot be read, or `take` says so.
    pub(super) fn for_each_piece(&self, most: usize, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.in_pieces(
            self.byte_count(),
            most,
            &|first, piece| self.read_at(first, piece),
            take,
        )
    }

    /// Hands its numbers over one after the other, in the type of [`CheckpointTensor::float`] and in pieces of at most `most` bytes of it.
    ///
    /// # Errors
    /// When they cannot be read, or `take` says so.
    pub(super) fn for_each_numbers(&self, most: usize, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let bytes = self.elements() * self.float()?.size();
        self.in_pieces(bytes, most, &|first, piece| self.read_numbers(first, piece), take)
    }

    fn in_pieces(
        &self,
        bytes: usize,
        most: usize,
        read: &dyn Fn(usize, &mut [u8]) -> Result<()>,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        self.read_ahead();
        let mut piece = vec![0; bytes.min(most)];
        for first in (0..bytes).step_by(most) {
            let piece = &mut piece[..(bytes - first).min(most)];
            read(first, piece)?;
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

    /// The same tensor whose second half of rows comes first; `None` where its rows are odd in number or have scales of their own.
    pub(super) fn with_halves_swapped(&self) -> Option<Self> {
        let even = self.stored.shape.first().is_some_and(|rows| rows.is_multiple_of(2));
        let fits = even && self.byte_count().is_multiple_of(2) && self.decoding.is_none();
        fits.then(|| CheckpointTensor {
            swapped: !self.swapped,
            ..self.clone()
        })
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
            decoding: self.decoding.as_ref().map(|decoding| {
                let rows = rows / parts;
                Arc::new(decoding.rows(rows * part..rows * (part + 1)))
            }),
            ..self.clone()
        })
    }
}
