//! One safetensors file, mapped into memory, its header checked before anything is read.
//!
//! The format: eight bytes with the header's length, a JSON object `{name: {dtype, shape, data_offsets}}`, then the data,
//! every byte of which belongs to exactly one tensor.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::error::{Error, Result};

/// Bytes before the header that give its length.
const LENGTH_BYTES: usize = 8;

/// No real header comes near it; a larger length means that the file is something else.
const LONGEST_HEADER: u64 = 100_000_000;

/// A tensor as a file holds it.
#[derive(Clone, Debug)]
pub struct StoredTensor {
    /// The element type.
    pub dtype: Dtype,
    /// The extents, outermost first.
    pub shape: Vec<usize>,
    /// Where its bytes lie, counted from the start of the file.
    pub(crate) range: Range<usize>,
}

/// A safetensors file; see the module's head comment.
pub struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    tensors: BTreeMap<String, StoredTensor>,
    metadata: BTreeMap<String, String>,
}

impl fmt::Debug for SafetensorsFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "SafetensorsFile({}, {} tensors)",
            self.path.display(),
            self.tensors.len()
        )
    }
}

impl SafetensorsFile {
    /// Maps the file and checks its header.
    ///
    /// # Errors
    /// When it cannot be opened, is no safetensors file, is truncated, or has a header that contradicts itself or the
    /// file's size; the message names the file, the tensor and the way out.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |error| Error::io(path, error);
        // Before opening: a pipe would wait for its writer.
        if !path.metadata().map_err(failed)?.is_file() {
            return Err(Error::file(path, "is no plain file, expected a safetensors file"));
        }
        let file = File::open(path).map_err(failed)?;
        let information = file.metadata().map_err(failed)?;
        if information.len() < LENGTH_BYTES as u64 {
            let reason = format!("not a safetensors file: it has only {} bytes", information.len());
            return Err(Error::file(path, reason));
        }
        // SAFETY: the mapping is read-only. Should another process shrink the file meanwhile, reads fault; files of
        // weights are replaced by renaming (here too), never rewritten in place.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        let (header, data_start) = parse_header(&map).map_err(|reason| Error::file(path, reason))?;
        let tensors = check(header.entries, data_start, map.len()).map_err(|reason| Error::file(path, reason))?;
        Ok(SafetensorsFile {
            path: path.to_path_buf(),
            map,
            tensors,
            metadata: header.metadata,
        })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, StoredTensor> {
        &self.tensors
    }

    /// What the header's `__metadata__` says.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The bytes of `tensor`, which must be one of this file's or a part of one.
    pub fn bytes(&self, tensor: &StoredTensor) -> &[u8] {
        &self.map[tensor.range.clone()]
    }

    /// Asks the system to start reading these bytes from the disk.
    pub(crate) fn read_ahead(&self, range: &Range<usize>) {
        #[cfg(unix)]
        if !range.is_empty() {
            // A hint: a system that does not take it reads on demand.
            let _ = self
                .map
                .advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Tells the system that these bytes are not needed soon, so that they no longer count as memory of this process.
    pub(crate) fn release(&self, range: &Range<usize>) {
        #[cfg(unix)]
        if !range.is_empty() {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the mapping is read-only and of a file: whoever reads these bytes again gets them from the file.
            let _ = unsafe { self.map.unchecked_advise_range(advice, range.start, range.len()) };
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// The header's entries in the order of the file, repeated names included.
struct Header {
    metadata: BTreeMap<String, String>,
    entries: Vec<(String, Value)>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let mut header = Header {
                    metadata: BTreeMap::new(),
                    entries: Vec::new(),
                };
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        header.metadata = map.next_value()?;
                    } else {
                        header.entries.push((name, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// The header and where the data starts; otherwise what is wrong.
fn parse_header(map: &[u8]) -> std::result::Result<(Header, usize), String> {
    let (length, rest) = map.split_first_chunk::<LENGTH_BYTES>().expect("checked by the caller");
    let length = u64::from_le_bytes(*length);
    let starts_like_one = rest.is_empty() || rest[0] == b'{';
    if !(2..=LONGEST_HEADER).contains(&length) || !starts_like_one {
        return Err(format!("not a safetensors file{}", what_it_looks_like(map)));
    }
    let Some(text) = rest.get(..length as usize) else {
        return Err(format!(
            "the header claims {length} bytes but only {} follow: the file is truncated or damaged",
            rest.len()
        ));
    };
    let header = serde_json::from_slice(text).map_err(|error| format!("the header is not valid: {error}"))?;
    Ok((header, LENGTH_BYTES + text.len()))
}

/// A guess at what else the file is, to be appended to a message.
fn what_it_looks_like(map: &[u8]) -> &'static str {
    const KINDS: [(&[u8], &str); 5] = [
        (
            b"PK\x03\x04",
            ": it looks like a PyTorch or zip archive; convert it with the safetensors package first",
        ),
        (
            b"\x80\x02",
            ": it looks like a Python pickle; convert it with the safetensors package first",
        ),
        (b"GGUF", ": it looks like a GGUF file, which is not supported"),
        (
            b"version https://git-lfs",
            ": it is a Git LFS pointer; fetch the file itself with `git lfs pull`",
        ),
        (b"<", ": it looks like a web page, perhaps a failed download"),
    ];
    KINDS
        .iter()
        .find(|(magic, _)| map.starts_with(magic))
        .map_or("", |(_, description)| description)
}

/// A tensor's entry as the header has it.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// Checks each tensor by itself, then that together they cover the data exactly.
fn check(
    entries: Vec<(String, Value)>,
    data_start: usize,
    file_bytes: usize,
) -> std::result::Result<BTreeMap<String, StoredTensor>, String> {
    let data_bytes = file_bytes - data_start;
    let mut tensors = BTreeMap::new();
    for (name, value) in entries {
        let tensor = check_entry(value, data_start).map_err(|reason| format!("tensor `{name}` {reason}"))?;
        if tensors.insert(name.clone(), tensor).is_some() {
            return Err(format!("tensor `{name}` is in the header twice"));
        }
    }
    let mut by_offset: Vec<_> = tensors.iter().collect();
    by_offset.sort_by_key(|(_, tensor)| (tensor.range.start, tensor.range.end));
    let mut covered = data_start;
    let mut previous = "";
    for (name, StoredTensor { range, .. }) in by_offset {
        if range.start < covered {
            return Err(format!(
                "tensors `{previous}` and `{name}` overlap: the header's offsets are wrong"
            ));
        }
        if range.start > covered {
            let (start, gap) = (range.start - data_start, range.start - covered);
            return Err(if range.start > file_bytes {
                format!(
                    "tensor `{name}` starts at byte {start} of {data_bytes} bytes of data: the header's offsets are wrong"
                )
            } else {
                format!("{gap} bytes before tensor `{name}` belong to none: the header's offsets are wrong")
            });
        }
        if range.end > file_bytes {
            let end = range.end - data_start;
            return Err(format!(
                "tensor `{name}` ends at byte {end} of the data, of which there are only {data_bytes}: the file is truncated"
            ));
        }
        covered = range.end;
        previous = name;
    }
    if covered < file_bytes {
        let rest = file_bytes - covered;
        return Err(format!(
            "{rest} bytes at the end belong to no tensor: the file is damaged"
        ));
    }
    Ok(tensors)
}

fn check_entry(value: Value, data_start: usize) -> std::result::Result<StoredTensor, String> {
    let entry: Entry = serde_json::from_value(value).map_err(|error| format!("has a malformed entry: {error}"))?;
    let dtype: Dtype = serde_json::from_value(Value::String(entry.dtype.clone()))
        .map_err(|_| format!("has the unknown element type `{}`", entry.dtype))?;
    let shape = entry.shape;
    // Extents of zero are left out here, so that no product of the others can overflow later.
    let largest = shape
        .iter()
        .try_fold(dtype.bitsize(), |bits, &extent| bits.checked_mul(extent.max(1)));
    let largest = largest.ok_or_else(|| format!("has the impossible shape {shape:?}"))?;
    let bytes = if shape.contains(&0) { 0 } else { largest / 8 };
    let (start, end) = entry.data_offsets;
    let found = end
        .checked_sub(start)
        .ok_or_else(|| format!("ends at byte {end} before it starts at byte {start}"))?;
    if found != bytes {
        return Err(format!(
            "has {found} bytes, but {dtype} {shape:?} takes {bytes}: the header is wrong"
        ));
    }
    let range = data_start.checked_add(start).zip(data_start.checked_add(end));
    let (start, end) = range.ok_or_else(|| format!("lies at the impossible offsets {start} to {end}"))?;
    Ok(StoredTensor {
        dtype,
        shape,
        range: start..end,
    })
}
