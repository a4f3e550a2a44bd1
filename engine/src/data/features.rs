//! A store on disk of what a model made of texts or pictures, so that it is made once: caption features, latents.
//!
//! An entry is a safetensors file with one tensor, `features`, and the CRC-32 of its bytes, named by a SHA-256 of what it was
//! made from and by what. Entries are written beside and renamed into place. They are not waited for: one that a crash left
//! incomplete fails its checksum, counts as missing and is made again.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use sha2::{Digest, Sha256};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::files;
use crate::limits::Budget;
use crate::tensor::HostTensor as Features;

/// The tensor's name in its file, and that of its checksum.
const TENSOR: &str = "features";
const CHECKSUM: &str = "crc32";

/// Temporary files of this age were left behind by a run that was killed.
const ABANDONED: Duration = Duration::from_secs(3600);

/// The name of an entry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StoreKey(String);

/// A store of features made by one model; see the module's head comment.
#[derive(Clone, Debug)]
pub struct FeatureStore {
    folder: PathBuf,
    /// What every entry was made by.
    maker: Vec<u8>,
}

impl FeatureStore {
    /// The store in `folder` of what the model with this identity made. Makes the folder.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn open(folder: &Path, maker: &[u8]) -> Result<Self> {
        fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
        remove_abandoned(folder);
        Ok(FeatureStore {
            folder: folder.into(),
            maker: maker.into(),
        })
    }

    /// The name of what was made from these parts.
    pub fn key(&self, parts: &[&[u8]]) -> StoreKey {
        let mut hash = Sha256::new();
        for part in [self.maker.as_slice()].iter().chain(parts) {
            // The length tells apart parts that together are the same bytes.
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        StoreKey(hex(&hash.finalize()))
    }

    /// The entry of this name; `None` when there is none or it is damaged.
    pub fn read(&self, key: &StoreKey) -> Option<Features> {
        let bytes = files::read(&self.path(key), Budget::FEATURES).ok()?;
        let (_, header) = SafeTensors::read_metadata(&bytes).ok()?;
        let checksum = header.metadata().as_ref()?.get(CHECKSUM)?.clone();
        let file = SafeTensors::deserialize(&bytes).ok()?;
        let tensor = file.tensor(TENSOR).ok()?;
        let dtype = match tensor.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::Bf16,
            _ => return None,
        };
        match checksum_of(tensor.data()) == checksum {
            true => Features::from_bytes(tensor.data(), tensor.shape(), dtype).ok(),
            false => None,
        }
    }

    /// Writes an entry, or replaces it.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn write(&self, key: &StoreKey, features: &Features) -> Result<()> {
        let path = self.path(key);
        let failed = |error: std::io::Error| Error::io(&path, error);
        let folder = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder).map_err(failed)?;
        let dtype = match features.dtype() {
            DType::Bf16 => Dtype::BF16,
            _ => Dtype::F32,
        };
        let damaged = |error: safetensors::SafeTensorError| Error::file(&path, error.to_string());
        let view = TensorView::new(dtype, features.shape().to_vec(), features.bytes()).map_err(damaged)?;
        let metadata = HashMap::from([(CHECKSUM.to_owned(), checksum_of(features.bytes()))]);
        let bytes = safetensors::serialize([(TENSOR, view)], Some(metadata)).map_err(damaged)?;
        let mut file = tempfile::Builder::new()
            .prefix(".entry-")
            .suffix(".tmp")
            .tempfile_in(folder)
            .map_err(failed)?;
        file.write_all(&bytes).map_err(failed)?;
        file.persist(&path).map_err(|error| failed(error.error))?;
        Ok(())
    }

    /// Where an entry is; 256 folders keep each of them small.
    fn path(&self, key: &StoreKey) -> PathBuf {
        let (folder, name) = key.0.split_at(2);
        self.folder.join(folder).join(format!("{name}.safetensors"))
    }
}

fn checksum_of(bytes: &[u8]) -> String {
    format!("{:08x}", crc32fast::hash(bytes))
}

/// Bytes as lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Deletes temporary files that nobody will rename any more. What cannot be deleted does no harm.
fn remove_abandoned(folder: &Path) {
    let entries = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    let is_abandoned = |entry: &fs::DirEntry| {
        let modified = entry.metadata().and_then(|metadata| metadata.modified());
        let age = modified
            .ok()
            .and_then(|modified| SystemTime::now().duration_since(modified).ok());
        entry.file_name().to_string_lossy().ends_with(".tmp") && age.is_some_and(|age| age > ABANDONED)
    };
    for file in entries(folder)
        .flat_map(|folder| entries(&folder.path()))
        .filter(is_abandoned)
    {
        let _ = fs::remove_file(file.path());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    fn features() -> Features {
        Features::from_f32(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[1, 2, 3])
    }

    #[test]
    fn entries_come_back_and_damaged_ones_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let store = FeatureStore::open(folder.path(), b"encoder").unwrap();
        let key = store.key(&[b"a fox"]);
        assert_eq!(store.read(&key), None);
        store.write(&key, &features()).unwrap();
        assert_eq!(store.read(&key), Some(features()));
        assert_eq!(features().to_tensor(&Device::Cpu).unwrap().shape().to_vec(), [1, 2, 3]);

        let path = store.path(&key);
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        for damaged in [&flipped[..], &whole[..whole.len() - 1], &whole[..20], &[]] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(store.read(&key), None);
        }
        store.write(&key, &features()).unwrap();
        assert_eq!(store.read(&key), Some(features()));
    }

    #[test]
    fn keys_tell_apart_makers_and_parts() {
        let folder = tempfile::tempdir().unwrap();
        let [one, other] = [&b"one"[..], b"other"].map(|maker| FeatureStore::open(folder.path(), maker).unwrap());
        assert_ne!(one.key(&[b"a"]), other.key(&[b"a"]));
        assert_ne!(one.key(&[b"ab", b"c"]), one.key(&[b"a", b"bc"]));
        assert_eq!(one.key(&[b"ab", b"c"]), one.key(&[b"ab", b"c"]));
    }

    #[test]
    fn what_is_not_finite_is_seen() {
        assert!(features().is_finite());
        assert!(!Features::from_f32(&[1.0, f32::NAN], &[2]).is_finite());
    }
}
