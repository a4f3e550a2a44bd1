//! The header of a safetensors file: read entry by entry into a few bytes each, so that no header takes much more memory than its
//! own length, and checked against the file.
//!
//! The format: eight bytes with the header's length, a JSON object `{name: {dtype, shape, data_offsets}}`, then the data,
//! every byte of which belongs to exactly one tensor.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::value::StrDeserializer;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use crate::error::Error;
use crate::files::read_exact_at;
use crate::limits;
use crate::printable::shown_name;

/// Bytes before the header that give its length.
const LENGTH_BYTES: usize = 8;

/// Bytes at a file's beginning by which other formats are recognised.
const MAGIC_BYTES: usize = 32;

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

/// What a header says.
pub(super) struct Header {
    /// The tensors by name.
    pub tensors: BTreeMap<String, StoredTensor>,
    /// The entries of `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

/// Why there is none.
pub(super) enum Fault {
    /// The file cannot be read.
    Io(std::io::Error),
    /// It is not what it should be.
    Content(String),
}

impl Fault {
    /// The error of the file at `path`.
    pub fn of(self, path: &Path) -> Error {
        match self {
            Fault::Io(error) => Error::io(path, error),
            Fault::Content(reason) => Error::file(path, reason),
        }
    }
}

impl From<String> for Fault {
    fn from(reason: String) -> Self {
        Fault::Content(reason)
    }
}

/// The header of `file`, which has this many bytes.
pub(super) fn read(file: &File, file_bytes: u64) -> Result<Header, Fault> {
    let mut start = vec![0; MAGIC_BYTES.min(file_bytes as usize)];
    read_exact_at(file, &mut start, 0).map_err(Fault::Io)?;
    let Some((length, rest)) = start.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(format!("not a safetensors file: it has only {file_bytes} bytes").into());
    };
    let length = u64::from_le_bytes(*length);
    let starts_like_one = rest.is_empty() || rest[0] == b'{';
    if !(2..=limits::header::BYTES).contains(&length) || !starts_like_one {
        return Err(format!("not a safetensors file{}", what_it_looks_like(&start)).into());
    }
    let after = file_bytes - LENGTH_BYTES as u64;
    if length > after {
        let reason =
            format!("the header claims {length} bytes but only {after} follow: the file is truncated or damaged");
        return Err(reason.into());
    }
    let mut text = vec![0; length as usize];
    read_exact_at(file, &mut text, LENGTH_BYTES as u64).map_err(Fault::Io)?;
    let data_start = LENGTH_BYTES + text.len();
    let header = parse(&text, data_start)?;
    drop(text);
    let file_bytes = usize::try_from(file_bytes).map_err(|_| "is larger than this system can address".to_owned())?;
    ensure_cover(&header.tensors, data_start, file_bytes)?;
    Ok(header)
}

/// A guess at what else the file is, to be appended to a message.
fn what_it_looks_like(start: &[u8]) -> &'static str {
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
        .find(|(magic, _)| start.starts_with(magic))
        .map_or("", |(_, description)| description)
}

/// Reads the header's text.
fn parse(text: &[u8], data_start: usize) -> Result<Header, String> {
    let mut header = Header {
        tensors: BTreeMap::new(),
        metadata: BTreeMap::new(),
    };
    let (mut fault, mut current) = (None, String::new());
    let entries = Entries {
        header: &mut header,
        fault: &mut fault,
        current: &mut current,
        data_start,
    };
    let mut json = serde_json::Deserializer::from_slice(text);
    let outcome = entries.deserialize(&mut json).and_then(|()| json.end());
    match (fault, outcome) {
        (Some(reason), _) => Err(reason),
        (None, Err(error)) if error.is_data() && !current.is_empty() => {
            let reason = error.to_string();
            // The position within a header of one line helps nobody.
            let reason = reason.split(" at line ").next().unwrap_or_default();
            Err(format!(
                "tensor `{}` has a malformed entry: {reason}",
                shown_name(&current)
            ))
        }
        (None, Err(error)) => Err(format!("the header is not valid: {error}")),
        (None, Ok(())) => Ok(header),
    }
}

/// Takes the entries one by one.
struct Entries<'a> {
    header: &'a mut Header,
    /// What is wrong with an entry, said better than the parser can.
    fault: &'a mut Option<String>,
    /// The name of the tensor whose entry is read.
    current: &'a mut String,
    data_start: usize,
}

impl<'de> DeserializeSeed<'de> for Entries<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                self.header.metadata = map.next_value::<FewStrings<{ limits::header::METADATA }>>()?.0;
                continue;
            }
            *self.current = name;
            let entry = map.next_value::<Entry>()?;
            let name = std::mem::take(self.current);
            if let Err(reason) = self.header.add(name, entry, self.data_start) {
                *self.fault = Some(reason);
                return Err(A::Error::custom("a wrong entry"));
            }
        }
        Ok(())
    }
}

impl Header {
    fn add(&mut self, name: String, entry: Entry, data_start: usize) -> Result<(), String> {
        if name.len() > limits::header::NAME {
            return Err(format!(
                "tensor `{}` has a name of more than {} bytes",
                shown_name(&name),
                limits::header::NAME
            ));
        }
        if self.tensors.len() == limits::header::TENSORS {
            return Err(format!(
                "holds more than {} tensors, the most that a file may have",
                limits::header::TENSORS
            ));
        }
        let tensor = entry
            .checked(data_start)
            .map_err(|reason| format!("tensor `{}` {reason}", shown_name(&name)))?;
        let shown = shown_name(&name).into_owned();
        match self.tensors.insert(name, tensor) {
            None => Ok(()),
            Some(_) => Err(format!("tensor `{shown}` is in the header twice")),
        }
    }
}

/// An object of at most `MOST` strings.
pub(super) struct FewStrings<const MOST: usize>(pub BTreeMap<String, String>);

impl<'de, const MOST: usize> Deserialize<'de> for FewStrings<MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Strings<const MOST: usize>;
        impl<'de, const MOST: usize> Visitor<'de> for Strings<MOST> {
            type Value = FewStrings<MOST>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "an object of at most {MOST} strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut strings = BTreeMap::new();
                while let Some((key, value)) = map.next_entry()? {
                    if strings.len() == MOST {
                        return Err(A::Error::invalid_length(MOST + 1, &self));
                    }
                    strings.insert(key, value);
                }
                Ok(FewStrings(strings))
            }
        }
        deserializer.deserialize_map(Strings)
    }
}

/// A tensor's entry as the header has it.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Extents,
    data_offsets: (usize, usize),
}

impl Entry {
    /// The tensor, or what is wrong with it by itself.
    fn checked(self, data_start: usize) -> Result<StoredTensor, String> {
        let Entry {
            dtype,
            shape: Extents(shape),
            data_offsets: (start, end),
        } = self;
        let dtype: Dtype = Dtype::deserialize(StrDeserializer::<serde::de::value::Error>::new(&dtype))
            .map_err(|_| format!("has the unknown element type `{}`", shown_name(&dtype)))?;
        // Extents of zero are left out here, so that no product of the others can overflow later.
        let largest = shape
            .iter()
            .try_fold(dtype.bitsize(), |bits, &extent| bits.checked_mul(extent.max(1)))
            .filter(|bits| bits / 8 <= limits::header::TENSOR_BYTES);
        let largest = largest.ok_or_else(|| format!("has the impossible shape {shape:?}"))?;
        let bytes = if shape.contains(&0) { 0 } else { largest / 8 };
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
}

/// The extents of a tensor.
struct Extents(Vec<usize>);

impl<'de> Deserialize<'de> for Extents {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Few;
        impl<'de> Visitor<'de> for Few {
            type Value = Extents;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {} extents", limits::header::RANK)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Extents, A::Error> {
                let mut extents = Vec::new();
                while let Some(extent) = sequence.next_element()? {
                    if extents.len() == limits::header::RANK {
                        return Err(A::Error::invalid_length(limits::header::RANK + 1, &self));
                    }
                    extents.push(extent);
                }
                extents.shrink_to_fit();
                Ok(Extents(extents))
            }
        }
        deserializer.deserialize_seq(Few)
    }
}

/// Checks that the tensors together cover the data exactly.
fn ensure_cover(tensors: &BTreeMap<String, StoredTensor>, data_start: usize, file_bytes: usize) -> Result<(), String> {
    let data_bytes = file_bytes - data_start;
    let mut by_offset: Vec<_> = tensors.iter().collect();
    by_offset.sort_by_key(|(_, tensor)| (tensor.range.start, tensor.range.end));
    let mut covered = data_start;
    let mut previous = "";
    for (name, StoredTensor { range, .. }) in by_offset {
        let shown = || shown_name(name);
        if range.start < covered {
            return Err(format!(
                "tensors `{}` and `{}` overlap: the header's offsets are wrong",
                shown_name(previous),
                shown()
            ));
        }
        if range.start > covered {
            let (start, gap) = (range.start - data_start, range.start - covered);
            return Err(if range.start > file_bytes {
                format!(
                    "tensor `{}` starts at byte {start} of {data_bytes} bytes of data: the header's offsets are wrong",
                    shown()
                )
            } else {
                format!(
                    "{gap} bytes before tensor `{}` belong to none: the header's offsets are wrong",
                    shown()
                )
            });
        }
        if range.end > file_bytes {
            let end = range.end - data_start;
            return Err(format!(
                "tensor `{}` ends at byte {end} of the data, of which there are only {data_bytes}: the file is truncated",
                shown()
            ));
        }
        covered = range.end;
        previous = name;
    }
    match file_bytes - covered {
        0 => Ok(()),
        rest => Err(format!(
            "{rest} bytes at the end belong to no tensor: the file is damaged"
        )),
    }
}
