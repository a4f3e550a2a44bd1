//! Writing safetensors: streamed tensor by tensor, into a temporary file beside the target, which takes the target's place
//! only when everything is on the disk. Whatever goes wrong before, what was there stays and nothing half-written is left.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use safetensors::Dtype;
use serde_json::{Map, Value, json};
use tempfile::{Builder, NamedTempFile, TempDir};

use super::elements::{Float, convert, encode, first_overflow};
use super::init::UniformInit;
use super::set::CheckpointTensor;
use super::shards::INDEX_SUFFIX;
use crate::device::format_bytes;
use crate::error::{Error, Result};
use crate::files::sync_folder;

/// Bytes between two reports of progress, and of the buffer for converted elements.
const CHUNK_BYTES: usize = 8 << 20;

/// Watches the progress of writing, and may stop it.
pub trait WriteObserver {
    /// Writing begins; this many bytes will follow.
    fn begin(&mut self, bytes: u64);

    /// So many more bytes are written.
    ///
    /// # Errors
    /// To stop: nothing is left behind, and the error is passed on.
    fn advance(&mut self, bytes: u64) -> Result<()>;
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

impl OutputTensor<'_> {
    fn bytes(&self) -> u64 {
        let elements: usize = self.shape.iter().product();
        (elements * self.dtype.bitsize() / 8) as u64
    }

    fn write(&self, file: &mut File, path: &Path, observer: &mut dyn WriteObserver) -> Result<()> {
        let mut put = |bytes: &[u8]| {
            file.write_all(bytes).map_err(|error| Error::io(path, error))?;
            observer.advance(bytes.len() as u64)
        };
        match &self.content {
            Content::Copied(sources) => {
                for source in sources {
                    source.read_ahead();
                    source.bytes().chunks(CHUNK_BYTES).try_for_each(&mut put)?;
                    source.release();
                }
            }
            Content::Converted(sources, to) => {
                let mut buffer = Vec::new();
                for source in sources {
                    source.read_ahead();
                    let from = source.float()?;
                    for piece in source.bytes().chunks(CHUNK_BYTES) {
                        self.expect_to_fit(piece, from, *to, source)?;
                        buffer.resize(piece.len() / from.size() * to.size(), 0);
                        convert(piece, from, &mut buffer, *to);
                        put(&buffer)?;
                    }
                    source.release();
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

    fn expect_to_fit(&self, piece: &[u8], from: Float, to: Float, source: &CheckpointTensor) -> Result<()> {
        match first_overflow(piece, from, to) {
            None => Ok(()),
            Some(value) => Err(Error::file(
                source.path(),
                format!(
                    "tensor `{}` holds {value}, which is beyond {}",
                    source.stored_name(),
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

/// What was written.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Written {
    /// The file or folder.
    pub path: PathBuf,
    /// Safetensors files in it.
    pub files: usize,
    /// Tensors in these.
    pub tensors: usize,
    /// Bytes of these.
    pub bytes: u64,
}

/// Writes one file; see the module's head comment.
///
/// # Errors
/// When the target exists and may not be replaced, cannot be written, or the observer stops; then nothing has changed.
pub fn write_file(
    path: &Path,
    output: &OutputFile<'_>,
    replace: bool,
    observer: &mut dyn WriteObserver,
) -> Result<Written> {
    expect_free(path, replace)?;
    let failed = |error| Error::io(path, error);
    let (folder, prefix) = beside(path);
    let mut builder = Builder::new();
    builder.prefix(&prefix).suffix(".tmp");
    let mut temporary: NamedTempFile = for_all(&mut builder, 0o666)
        .tempfile_in(folder)
        .map_err(|error| not_created(path, &error))?;
    observer.begin(output.header().len() as u64 + output.data_bytes());
    let bytes = output.write(temporary.as_file_mut(), path, observer)?;
    let renamed = if replace {
        temporary.persist(path)
    } else {
        temporary.persist_noclobber(path)
    };
    renamed.map_err(|error| failed(error.error))?;
    sync_folder(folder);
    Ok(Written {
        path: path.into(),
        files: 1,
        tensors: output.tensor_count(),
        bytes,
    })
}

/// Writes a folder of shards with their index, or of one file without, and a `config.json` if given; see the module's head
/// comment.
///
/// # Errors
/// As [`write_file`]; an existing folder is replaced only if it holds nothing but a transformer's files.
pub fn write_folder(
    path: &Path,
    shards: &[OutputFile<'_>],
    config: Option<&Value>,
    replace: bool,
    observer: &mut dyn WriteObserver,
) -> Result<Written> {
    const STEM: &str = "diffusion_pytorch_model";
    expect_replaceable_folder(path, replace)?;
    let failed = |error| Error::io(path, error);
    let (parent, prefix) = beside(path);
    let mut builder = Builder::new();
    builder.prefix(&prefix).suffix(".tmp");
    let temporary = for_all(&mut builder, 0o777)
        .tempdir_in(parent)
        .map_err(|error| not_created(path, &error))?;
    observer.begin(
        shards
            .iter()
            .map(|shard| shard.header().len() as u64 + shard.data_bytes())
            .sum(),
    );
    let mut bytes = 0;
    let mut weight_map = BTreeMap::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => format!("{STEM}.safetensors"),
            count => format!("{STEM}-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let mut file = File::create(temporary.path().join(&name)).map_err(failed)?;
        bytes += shard.write(&mut file, path, observer)?;
        weight_map.extend(shard.tensors.iter().map(|tensor| (tensor.name.clone(), name.clone())));
    }
    if shards.len() > 1 {
        let total: u64 = shards.iter().map(OutputFile::data_bytes).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        write_json(&temporary.path().join(format!("{STEM}{INDEX_SUFFIX}")), &index).map_err(failed)?;
    }
    if let Some(config) = config {
        write_json(&temporary.path().join("config.json"), config).map_err(failed)?;
    }
    sync_folder(temporary.path());
    put_in_place(temporary, path, &mut builder).map_err(failed)?;
    sync_folder(parent);
    Ok(Written {
        path: path.into(),
        files: shards.len(),
        tensors: weight_map.len(),
        bytes,
    })
}

/// Moves the finished folder to `path`; what was there is moved aside first and deleted last.
fn put_in_place(temporary: TempDir, path: &Path, builder: &mut Builder<'_, '_>) -> std::io::Result<()> {
    if !path.exists() {
        std::fs::rename(temporary.path(), path)?;
    } else {
        let aside = builder.tempdir_in(beside(path).0)?;
        let old = aside.path().join("old");
        std::fs::rename(path, &old)?;
        if let Err(error) = std::fs::rename(temporary.path(), path) {
            std::fs::rename(&old, path)?;
            return Err(error);
        }
    }
    // It has another name now, so there is nothing left to delete.
    let _ = temporary.keep();
    Ok(())
}

fn write_json(path: &Path, value: &Value) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(format!("{value:#}\n").as_bytes())?;
    file.sync_all()
}

/// The folder of a target, and a hidden name's beginning for the temporary file in it.
fn beside(path: &Path) -> (&Path, String) {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    (folder.unwrap_or(Path::new(".")), format!(".{name}."))
}

/// The permissions of any new file, instead of a temporary file's owner-only ones.
fn for_all<'a, 'b, 'c>(builder: &'a mut Builder<'b, 'c>, mode: u32) -> &'a mut Builder<'b, 'c> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(mode));
    }
    #[cfg(not(unix))]
    let _ = mode;
    builder
}

/// The reason why no temporary file could be made, without its name, which means nothing to the user.
fn not_created(path: &Path, error: &std::io::Error) -> Error {
    let text = error.to_string();
    Error::file(path, text.split(" at path ").next().unwrap_or_default())
}

/// Checks before any work that the target can be a new file.
///
/// # Errors
/// When it is there and may not be replaced, or is no plain file.
pub fn expect_free(path: &Path, replace: bool) -> Result<()> {
    match path.symlink_metadata() {
        Err(_) => Ok(()),
        Ok(found) if found.is_dir() => Err(Error::file(path, "is a folder, expected the name of a file to write")),
        Ok(found) if !found.is_file() && !found.is_symlink() => {
            Err(Error::file(path, "is no plain file; choose another"))
        }
        Ok(_) if replace => Ok(()),
        Ok(_) => Err(Error::file(path, "is already there; replace it with --force")),
    }
}

/// Checks before any work that a file can be written to `path`, replacing what is there.
///
/// # Errors
/// When it is no plain file, or its folder does not take a file.
pub fn expect_writable(path: &Path) -> Result<()> {
    expect_free(path, true)?;
    let (folder, prefix) = beside(path);
    Builder::new()
        .prefix(&prefix)
        .suffix(".tmp")
        .tempfile_in(folder)
        .map(|_| ())
        .map_err(|error| not_created(path, &error))
}

fn expect_replaceable_folder(path: &Path, replace: bool) -> Result<()> {
    let Ok(found) = path.symlink_metadata() else {
        return Ok(());
    };
    if !found.is_dir() {
        return Err(Error::file(path, "is already there and no folder; choose another"));
    }
    let mut is_empty = true;
    for entry in path.read_dir().map_err(|error| Error::io(path, error))? {
        is_empty = false;
        let name = entry.map_err(|error| Error::io(path, error))?.file_name();
        let name = name.to_string_lossy();
        let replaceable = name.ends_with(".safetensors") || name.ends_with(INDEX_SUFFIX) || name == "config.json";
        if !replaceable {
            let reason = format!("holds `{name}`, which is no part of a transformer; choose another folder");
            return Err(Error::file(path, reason));
        }
    }
    if is_empty || replace {
        return Ok(());
    }
    Err(Error::file(path, "is already there; replace it with --force"))
}
