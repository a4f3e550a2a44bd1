//! Writing safetensors: streamed tensor by tensor, into a temporary file beside the target, which takes the target's place
//! only when everything is on the disk. Whatever goes wrong before, what was there stays and nothing half-written is left.

mod place;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::rc::Rc;

use safetensors::Dtype;
use serde_json::{Map, Value, json};

pub use self::place::{Written, ensure_free, ensure_writable, write_file, write_folder};

use super::elements::{Float, convert, encode, first_overflow};
use super::random::UniformInit;
use super::stored::CheckpointTensor;
use crate::device::format_bytes;
use crate::error::{Error, Result};
use crate::printable::shown_name;

/// Bytes between two reports of progress, and of the buffer for converted elements.
const CHUNK_BYTES: usize = 8 << 20;

/// Watches the progress of writing, or of reading as much, and may stop it.
pub trait WriteObserver {
    /// It begins; this many bytes will follow.
    fn begin(&mut self, bytes: u64);

    /// So many more bytes are done.
    ///
    /// # Errors
    /// To stop: nothing is left behind, and the error is passed on.
    fn advance(&mut self, bytes: u64) -> Result<()>;

    /// Everything is on the disk, in a file or folder at `path` that takes its place next; what is there now can be looked over.
    ///
    /// # Errors
    /// To stop, as above.
    fn written(&mut self, path: &Path) -> Result<()> {
        let _ = path;
        Ok(())
    }

    /// These bytes of the file come next; for those who sum them up.
    fn next_bytes(&mut self, _bytes: &[u8]) {}
}

/// Watches nothing.
impl WriteObserver for () {
    fn begin(&mut self, _bytes: u64) {}
    fn advance(&mut self, _bytes: u64) -> Result<()> {
        Ok(())
    }
}

/// Where a written tensor's elements come from.
#[derive(Clone, Debug)]
pub enum Content<'a> {
    /// The rows of these tensors, one after the other, bit by bit.
    Copied(Vec<&'a CheckpointTensor>),
    /// The same, converted to another type.
    Converted(Vec<&'a CheckpointTensor>, Float),
    /// Random numbers.
    Random(UniformInit, Float),
    /// These f32 numbers.
    Values(&'a [f32]),
    /// f32 numbers that are fetched when their turn comes, converted to another type.
    Fetched(Fetch<'a>, Float),
    /// Bytes that are made when their turn comes.
    Made(Make<'a>),
}

/// Takes bytes, piece by piece.
pub type Put<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

/// Makes the bytes of a tensor.
#[derive(Clone)]
pub struct Make<'a>(Rc<dyn Fn(Put<'_>) -> Result<()> + 'a>);

impl<'a> Make<'a> {
    /// Bytes that `make` hands over one after the other: those of the whole tensor.
    pub fn new(make: impl Fn(Put<'_>) -> Result<()> + 'a) -> Self {
        Make(Rc::new(make))
    }
}

impl fmt::Debug for Make<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Make")
    }
}

/// Gets numbers from somewhere, such as a device.
#[derive(Clone)]
pub struct Fetch<'a>(Rc<dyn Fn() -> Result<Vec<f32>> + 'a>);

impl<'a> Fetch<'a> {
    /// Numbers that `get` returns.
    pub fn new(get: impl Fn() -> Result<Vec<f32>> + 'a) -> Self {
        Fetch(Rc::new(get))
    }
}

impl fmt::Debug for Fetch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fetch")
    }
}

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct OutputTensor<'a> {
    /// The name in the file.
    pub name: String,
    /// The element type in the file.
    pub dtype: Dtype,
    /// The extents, outermost first.
    pub shape: Vec<usize>,
    /// Its elements.
    pub content: Content<'a>,
}

impl<'a> OutputTensor<'a> {
    /// A tensor of a checkpoint as it is; one of eight bits, whose scales stand beside it, as BF16.
    pub fn of(name: String, tensor: &'a CheckpointTensor) -> Self {
        let (dtype, content) = match tensor.decoding() {
            None => (tensor.dtype(), Content::Copied(vec![tensor])),
            Some(_) => (Dtype::BF16, Content::Converted(vec![tensor], Float::Bf16)),
        };
        OutputTensor {
            name,
            dtype,
            shape: tensor.shape().to_vec(),
            content,
        }
    }
}

impl OutputTensor<'_> {
    fn bytes(&self) -> u64 {
        let elements: usize = self.shape.iter().product();
        (elements * self.dtype.bitsize() / 8) as u64
    }

    fn write(&self, file: &mut File, path: &Path, observer: &mut dyn WriteObserver) -> Result<()> {
        let mut put = |bytes: &[u8]| {
            file.write_all(bytes).map_err(|error| Error::io(path, error))?;
            observer.next_bytes(bytes);
            observer.advance(bytes.len() as u64)
        };
        match &self.content {
            Content::Copied(sources) => {
                for source in sources {
                    source.for_each_piece(CHUNK_BYTES, &mut put)?;
                }
            }
            Content::Converted(sources, to) => {
                let mut buffer = Vec::new();
                for source in sources {
                    let from = source.float()?;
                    source.for_each_numbers(CHUNK_BYTES, &mut |piece| {
                        self.ensure_to_fit(piece, from, *to, source)?;
                        buffer.resize(piece.len() / from.size() * to.size(), 0);
                        convert(piece, from, &mut buffer, *to);
                        put(&buffer)
                    })?;
                }
            }
            Content::Values(values) => {
                for piece in values.chunks(CHUNK_BYTES / Float::F32.size()) {
                    let bytes: Vec<u8> = piece.iter().flat_map(|value| value.to_le_bytes()).collect();
                    put(&bytes)?;
                }
            }
            Content::Fetched(fetch, to) => {
                let values = (fetch.0)()?;
                let expected: usize = self.shape.iter().product();
                if values.len() != expected {
                    return Err(Error::invalid(format!(
                        "tensor `{}` has {} elements, expected {expected}",
                        self.name,
                        values.len()
                    )));
                }
                let mut buffer = Vec::new();
                for piece in values.chunks(CHUNK_BYTES / Float::F32.size()) {
                    buffer.resize(piece.len() * to.size(), 0);
                    encode(piece, &mut buffer, *to);
                    put(&buffer)?;
                }
            }
            Content::Made(make) => (make.0)(&mut put)?,
            Content::Random(init, to) => {
                let elements: usize = self.shape.iter().product();
                let per_chunk = CHUNK_BYTES / to.size();
                let mut buffer = vec![0; elements.min(per_chunk) * to.size()];
                for first in (0..elements).step_by(per_chunk) {
                    let piece = &mut buffer[..(elements - first).min(per_chunk) * to.size()];
                    init.fill(first, piece, *to);
                    put(piece)?;
                }
            }
        }
        Ok(())
    }

    fn ensure_to_fit(&self, piece: &[u8], from: Float, to: Float, source: &CheckpointTensor) -> Result<()> {
        match first_overflow(piece, from, to) {
            None => Ok(()),
            Some(value) => Err(Error::file(
                source.path(),
                format!(
                    "tensor `{}` holds {value}, which is beyond {}",
                    shown_name(source.stored_name()),
                    to.dtype()
                ),
            )),
        }
    }
}

/// A safetensors file to be written.
#[derive(Clone, Debug, Default)]
pub struct OutputFile<'a> {
    tensors: Vec<OutputTensor<'a>>,
    metadata: BTreeMap<String, String>,
}

impl<'a> OutputFile<'a> {
    /// A file of these tensors and this metadata. Wider types come first, so that all data are aligned, then names.
    pub fn new(mut tensors: Vec<OutputTensor<'a>>, metadata: BTreeMap<String, String>) -> Self {
        tensors.sort_by(|a, b| {
            b.dtype
                .bitsize()
                .cmp(&a.dtype.bitsize())
                .then_with(|| a.name.cmp(&b.name))
        });
        let mut metadata = metadata;
        // Without it, transformers refuses the file.
        metadata.insert("format".into(), "pt".into());
        OutputFile { tensors, metadata }
    }

    /// Adds an entry to the metadata, or replaces it.
    pub fn set_metadata(&mut self, key: &str, value: &str) {
        self.metadata.insert(key.into(), value.into());
    }

    /// The tensors' shapes by name.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let tensors = self.tensors.iter();
        tensors
            .map(|tensor| (tensor.name.clone(), tensor.shape.clone()))
            .collect()
    }

    /// The number of tensors.
    pub fn tensor_count(&self) -> usize {
        self.tensors.len()
    }

    /// Bytes of all tensors, without the header.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.iter().map(OutputTensor::bytes).sum()
    }

    /// Splits the tensors, in order, into files of at most `most` bytes of data each (a larger tensor stands alone).
    pub fn split(self, most: u64) -> Vec<Self> {
        let mut files: Vec<Self> = Vec::new();
        let mut room = 0;
        for tensor in self.tensors {
            let bytes = tensor.bytes();
            if files.is_empty() || bytes > room {
                files.push(OutputFile {
                    tensors: Vec::new(),
                    metadata: self.metadata.clone(),
                });
                room = most;
            }
            room = room.saturating_sub(bytes);
            files.last_mut().expect("pushed above").tensors.push(tensor);
        }
        files
    }

    /// The length and the header, padded so that the data is aligned.
    fn header(&self) -> Vec<u8> {
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!(self.metadata));
        let mut offset = 0;
        for tensor in &self.tensors {
            let end = offset + tensor.bytes();
            let entry = json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end] });
            header.insert(tensor.name.clone(), entry);
            offset = end;
        }
        let mut text = Value::Object(header).to_string();
        text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.into_bytes());
        bytes
    }

    /// Writes everything to `file` and waits until it is on the disk; errors name `path`.
    fn write(&self, file: &mut File, path: &Path, observer: &mut dyn WriteObserver) -> Result<u64> {
        let failed = |error| Error::io(path, error);
        let header = self.header();
        let bytes = header.len() as u64 + self.data_bytes();
        reserve(file, bytes)
            .map_err(|error| Error::file(path, format!("no room for {}: {error}", format_bytes(bytes))))?;
        file.write_all(&header).map_err(failed)?;
        observer.next_bytes(&header);
        observer.advance(header.len() as u64)?;
        for tensor in &self.tensors {
            tensor.write(file, path, observer)?;
        }
        file.sync_all().map_err(failed)?;
        Ok(bytes)
    }
}

/// Reserves room, so that a full disk is noticed before the work and not at its end.
#[cfg(target_os = "linux")]
fn reserve(file: &File, bytes: u64) -> std::io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    use rustix::io::Errno;
    match fallocate(file, FallocateFlags::empty(), 0, bytes) {
        // File systems that cannot reserve room find out while writing.
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Reserves room, where the system has a way to.
#[cfg(not(target_os = "linux"))]
fn reserve(_file: &File, _bytes: u64) -> std::io::Result<()> {
    Ok(())
}
