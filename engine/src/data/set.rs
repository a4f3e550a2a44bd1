//! A data set: the pictures of a metadata file with the size at which each is used.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;

use super::damage::{Damage, DamageLog};
use super::metadata::{Metadata, Record};
use super::notes::{Notes, unnamed_pictures};
use super::random::{Draws, Purpose};
use super::sizing::{PictureSize, Sizing};
use crate::error::{Error, Result};
use crate::image_io::read_header;

/// Pictures whose sizes are read between two looks at whether to go on.
const CHUNK: usize = 4096;

/// Pictures with captions, each with the size at which it is used.
#[derive(Debug)]
pub struct DataSet {
    records: Vec<Record>,
    sizes: Vec<PictureSize>,
    /// Of a set that was split, of both parts.
    damages: Arc<DamageLog>,
    notes: Vec<String>,
}

impl DataSet {
    /// Reads the metadata at `path` and the size of every picture. What cannot be used is noted and left out.
    /// `progress(done, total)` is called now and then; an error from it ends the work.
    ///
    /// # Errors
    /// When there is no metadata, more than a share of `tolerance` is damaged, or `progress` says so.
    pub fn open(
        path: &Path,
        sizing: &Sizing,
        multiple: usize,
        tolerance: f64,
        progress: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<Self> {
        sizing.check(multiple)?;
        let metadata = Metadata::read(path)?;
        let damages = Arc::new(DamageLog::new(metadata.entries(), tolerance));
        metadata.damaged.iter().for_each(|damage| damages.note(damage.clone()));
        let mut set = DataSet {
            records: Vec::with_capacity(metadata.records.len()),
            sizes: Vec::with_capacity(metadata.records.len()),
            damages,
            notes: unnamed_pictures(&metadata).into_iter().collect(),
        };
        let size_of = |record: &Record| {
            let header = read_header(&record.path)?;
            let found = PictureSize {
                width: header.width,
                height: header.height,
            };
            Ok((header.colours, found, sizing.size_for(found, multiple)?))
        };
        let mut notes = Notes::default();
        let total = metadata.records.len();
        let mut records = metadata.records.into_iter();
        for first in (0..total).step_by(CHUNK) {
            progress(first, total)?;
            let chunk: Vec<Record> = records.by_ref().take(CHUNK).collect();
            let sizes: Vec<Result<_>> = chunk.par_iter().map(size_of).collect();
            for (record, size) in chunk.into_iter().zip(sizes) {
                match size {
                    Ok((colours, found, size)) => {
                        notes.add(&record.name, colours, found, size);
                        set.records.push(record);
                        set.sizes.push(size);
                    }
                    Err(error) => set.damages.note(damage_of(&record, &error)),
                }
            }
        }
        set.damages.check()?;
        set.notes.extend(notes.told(set.records.len()));
        match set.records.is_empty() {
            true => Err(Error::file(path, "lists no picture that can be used")),
            false => Ok(set),
        }
    }

    /// Notes the pictures with one of these captions as damaged, and leaves them out.
    ///
    /// # Errors
    /// When too much is damaged then.
    pub fn refuse_captions(&mut self, refused: &[(String, String)]) -> Result<()> {
        let reasons: BTreeMap<&str, &str> = refused.iter().map(|(text, reason)| (&**text, &**reason)).collect();
        let all = std::mem::take(&mut self.records)
            .into_iter()
            .zip(std::mem::take(&mut self.sizes));
        for (record, size) in all {
            match reasons.get(&*record.caption) {
                None => {
                    self.records.push(record);
                    self.sizes.push(size);
                }
                Some(reason) => self.damages.note(Damage {
                    what: record.name,
                    reason: format!("its caption cannot be used: {reason}"),
                }),
            }
        }
        self.damages.check()
    }

    /// Splits off `count` pictures, chosen by the seed, as a set of their own.
    ///
    /// # Errors
    /// When that would leave none.
    pub fn hold_out(mut self, count: usize, seed: u64) -> Result<(Self, Self)> {
        let total = self.records.len();
        if count >= total {
            return Err(Error::invalid(format!(
                "{count} of {total} pictures cannot be held out: none would be left to train on"
            )));
        }
        let mut indices: Vec<usize> = (0..total).collect();
        Draws::new(seed, Purpose::HeldOut).shuffle(&mut indices);
        let held: BTreeSet<usize> = indices.into_iter().take(count).collect();
        let mut held_out = DataSet {
            records: Vec::with_capacity(count),
            sizes: Vec::with_capacity(count),
            damages: self.damages.clone(),
            notes: Vec::new(),
        };
        let all = std::mem::take(&mut self.records)
            .into_iter()
            .zip(std::mem::take(&mut self.sizes));
        for (index, (record, size)) in all.enumerate() {
            let set = if held.contains(&index) {
                &mut held_out
            } else {
                &mut self
            };
            set.records.push(record);
            set.sizes.push(size);
        }
        Ok((self, held_out))
    }

    /// The pictures that can be used, in the order of the metadata.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The size at which each of them is used.
    pub fn sizes(&self) -> &[PictureSize] {
        &self.sizes
    }

    /// What stops nothing, but is not what one would expect of a data set; a sentence each. Of a set that was split, the larger
    /// part has them.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What cannot be used.
    pub fn damages(&self) -> &DamageLog {
        &self.damages
    }
}

/// A picture's damage, without its path said twice.
pub(crate) fn damage_of(record: &Record, error: &Error) -> Damage {
    let reason = match error {
        Error::File { reason, .. } => reason.clone(),
        Error::Io { source, .. } => source.to_string(),
        other => other.to_string(),
    };
    Damage {
        what: record.name.clone(),
        reason,
    }
}
