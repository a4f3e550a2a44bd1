//! One safetensors file, its header checked before anything else is read.
//!
//! Nothing is mapped into memory: a mapped file that somebody shortens meanwhile ends the process that touches it, while a read
//! fails with a message. Reading costs no more than a mapping: one copy by the system instead of a fault for every few pages.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::header::{self, Header, StoredTensor};
use crate::error::{Error, Result};
use crate::files;

/// A safetensors file; see the module's head comment.
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    header: Header,
}

impl fmt::Debug for SafetensorsFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "SafetensorsFile({}, {} tensors)",
            self.path.display(),
            self.header.tensors.len()
        )
    }
}

impl SafetensorsFile {
    /// Opens the file and checks its header.
    ///
    /// # Errors
    /// When it cannot be opened, is no safetensors file, is truncated, or has a header that contradicts itself, the file's size
    /// or [the limits](crate::limits::header); the message names the file, the tensor and the way out.
    pub fn open(path: &Path) -> Result<Self> {
        let file = files::open_regular(path)?;
        let bytes = file.metadata().map_err(|error| Error::io(path, error))?.len();
        let header = header::read(&file, bytes).map_err(|fault| fault.of(path))?;
        Ok(SafetensorsFile {
            path: path.to_path_buf(),
            file,
            header,
        })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, StoredTensor> {
        &self.header.tensors
    }

    /// What the header's `__metadata__` says.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// The bytes of `tensor`, which must be one of this file's or a part of one.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn bytes(&self, tensor: &StoredTensor) -> Result<Vec<u8>> {
        let mut bytes = vec![0; tensor.range.len()];
        self.read_at(tensor.range.start, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `target` with the file's bytes from `offset` on.
    ///
    /// # Errors
    /// When they cannot be read, or the file has become shorter than it was.
    pub(crate) fn read_at(&self, offset: usize, target: &mut [u8]) -> Result<()> {
        files::read_exact_at(&self.file, target, offset as u64).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => {
                let reason = "ends before the data that its header lists: it was changed while it was read";
                Error::file(&self.path, reason)
            }
            _ => Error::io(&self.path, error),
        })
    }

    /// Asks the system to start reading these bytes from the disk.
    pub(crate) fn read_ahead(&self, range: &Range<usize>) {
        #[cfg(target_os = "linux")]
        if let Some(bytes) = std::num::NonZeroU64::new(range.len() as u64) {
            // A hint: a system that does not take it reads on demand.
            let _ = rustix::fs::fadvise(
                &self.file,
                range.start as u64,
                Some(bytes),
                rustix::fs::Advice::WillNeed,
            );
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }
}
