//! Checksums of the large files that a run writes, so that a bit that flipped on the disk is found before a run goes on from it.
//!
//! `checksums.json` beside the files holds length and CRC-32 of each. Sums are made of the bytes on their way to the disk. They are
//! checked by several threads, which read what the disk gives.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{OutputFile, WriteObserver, write_file};
use crate::error::{Error, Result};
use crate::files;
use crate::limits::Budget;

/// The file's name.
pub const CHECKSUMS: &str = "checksums.json";

/// Bytes that one thread reads at a time.
const PIECE: u64 = 8 << 20;

/// Pieces between two reports of progress.
const PIECES_AT_ONCE: usize = 32;

/// Length and CRC-32 of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sum {
    /// Bytes.
    pub bytes: u64,
    /// The CRC-32 of IEEE 802.3, as in zip and PNG files.
    pub crc32: u32,
}

/// The sums of the files of a folder, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checksums {
    /// By name.
    pub files: BTreeMap<String, Sum>,
}

/// Told how many bytes of how many are checked; an error ends the work.
pub type Checked<'a> = dyn FnMut(u64, u64) -> Result<()> + 'a;

impl Checksums {
    /// The sums beside the files of `folder`; `None` where there are none, as in folders of earlier versions.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(CHECKSUMS);
        match path.symlink_metadata() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            _ => files::read_json(&path, Budget::CONFIG).map(Some),
        }
    }

    /// Writes the sums beside the files of `folder`.
    ///
    /// # Errors
    /// When the disk does not take them.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let json = serde_json::to_vec_pretty(self).map_err(|error| Error::invalid(error.to_string()))?;
        files::replace(&folder.join(CHECKSUMS), &json)
    }

    /// Writes a file as [`write_file`] does and notes its sum. Returns its length.
    ///
    /// # Errors
    /// Those of [`write_file`].
    pub fn write_file(
        &mut self,
        path: &Path,
        output: &OutputFile<'_>,
        replace: bool,
        observer: &mut dyn WriteObserver,
    ) -> Result<u64> {
        let mut summing = Summing {
            hasher: crc32fast::Hasher::new(),
            observer,
        };
        let bytes = write_file(path, output, replace, &mut summing)?.bytes;
        let crc32 = summing.hasher.finalize();
        self.files.insert(name(path), Sum { bytes, crc32 });
        Ok(bytes)
    }

    /// Whether the file at `path` is as it was written; `None` where its sum is not known.
    ///
    /// # Errors
    /// When it cannot be read, or `checked` says so.
    pub fn is_sound(&self, path: &Path, checked: &mut Checked<'_>) -> Result<Option<bool>> {
        match self.files.get(&name(path)) {
            Some(expected) => sum_of(path, checked).map(|found| Some(found == *expected)),
            None => Ok(None),
        }
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Sums up what is written.
struct Summing<'a> {
    hasher: crc32fast::Hasher,
    observer: &'a mut dyn WriteObserver,
}

impl WriteObserver for Summing<'_> {
    fn begin(&mut self, bytes: u64) {
        self.observer.begin(bytes);
    }

    fn advance(&mut self, bytes: u64) -> Result<()> {
        self.observer.advance(bytes)
    }

    fn next_bytes(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
    }
}

/// The sum of a file on the disk.
///
/// # Errors
/// When it cannot be read, or `checked` says so.
pub fn sum_of(path: &Path, checked: &mut Checked<'_>) -> Result<Sum> {
    let failed = |error| Error::io(path, error);
    let bytes = files::open_regular(path)?.metadata().map_err(failed)?.len();
    let starts: Vec<u64> = (0..bytes.div_ceil(PIECE)).map(|piece| piece * PIECE).collect();
    let mut hasher = crc32fast::Hasher::new();
    for starts in starts.chunks(PIECES_AT_ONCE) {
        let pieces = starts
            .par_iter()
            .map(|start| piece(path, *start, PIECE.min(bytes - start)));
        for piece in pieces.collect::<std::io::Result<Vec<_>>>().map_err(failed)? {
            hasher.combine(&piece);
        }
        let done = starts.last().map_or(0, |start| (start + PIECE).min(bytes));
        checked(done, bytes)?;
    }
    Ok(Sum {
        bytes,
        crc32: hasher.finalize(),
    })
}

fn piece(path: &Path, start: u64, count: u64) -> std::io::Result<crc32fast::Hasher> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(start))?;
    let mut content = vec![0; count as usize];
    file.read_exact(&mut content)?;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&content);
    Ok(hasher)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Content, OutputTensor};

    #[test]
    fn sums_of_written_files_are_those_found_on_the_disk_and_a_flipped_bit_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        // More than one piece, and no multiple of one.
        let values: Vec<f32> = (0..2_500_003).map(|value| value as f32).collect();
        let tensor = OutputTensor {
            name: "a".into(),
            dtype: safetensors::Dtype::F32,
            shape: vec![values.len()],
            content: Content::Values(&values),
        };
        let mut sums = Checksums::default();
        let output = OutputFile::new(vec![tensor], BTreeMap::new());
        let bytes = sums.write_file(&path, &output, false, &mut ()).unwrap();
        assert_eq!(bytes, path.metadata().unwrap().len());
        sums.write(folder.path()).unwrap();
        let sums = Checksums::read(folder.path()).unwrap().unwrap();
        let mut told = Vec::new();
        let sound = sums.is_sound(&path, &mut |done, total| {
            told.push((done, total));
            Ok(())
        });
        assert_eq!((sound.unwrap(), told.last()), (Some(true), Some(&(bytes, bytes))));
        let content = std::fs::read(&path).unwrap();
        assert_eq!(sums.files["state.safetensors"].crc32, crc32fast::hash(&content));
        for place in [9, 1 << 23, content.len() - 1] {
            let mut damaged = content.clone();
            damaged[place] ^= 0x10;
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(sums.is_sound(&path, &mut |_, _| Ok(())).unwrap(), Some(false));
        }
        assert_eq!(
            sums.is_sound(&folder.path().join("other"), &mut |_, _| Ok(())).unwrap(),
            None
        );
        let stopped = sums.is_sound(&path, &mut |_, _| Err(Error::Interrupted));
        assert!(matches!(stopped, Err(Error::Interrupted)));
        assert!(Checksums::read(&folder.path().join("nowhere")).unwrap().is_none());
    }
}
