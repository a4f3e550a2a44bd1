//! Checkpoints of a run: `checkpoints/step-00000100/` in its folder, with
//!
//! * `delta.safetensors`: the trained tensors under their canonical names, to be laid over the model that training began from
//! * `ema.safetensors`: the same of the averaged weights, where an average is kept
//! * `state.safetensors`: the optimizer's state in f32 and, in its metadata, everything else that a run continues from; where several
//!   ranks divide the state among them, the first one's part, and `state-00001-of-00004.safetensors` and so on beside it the others'
//! * `checksums.json`: the files' lengths and checksums
//!
//! Only weights that are finite and give a finite loss are saved, and the state says so (`finite`); [`Checkpoint::verify`] and
//! [`Checkpoint::restore`] find out where that is no longer so. What a run cannot go on from is set aside as `refused-step-00000100`
//! when it goes on from an older one; nothing of it is deleted.
//!
//! A checkpoint is written under another name, brought onto the disk and renamed; it is whole or it is not there. Old ones
//! are renamed before they are deleted, so that what has a checkpoint's name always is one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::checksums::{Checked, Checksums};
use super::guard::{Guard, StepOutcome};
use super::slices::{self, Parts, STATE};
use crate::checkpoint::{
    Content, Fetch, Float, OutputFile, OutputTensor, SafetensorsFile, StoredTensor, WriteObserver,
};
use crate::data::Position;
use crate::error::{Error, Result};
use crate::files::{self, sync_folder};
use crate::model::objective::Trained;
use crate::train::{StatePart, StateSource, TrainableModel};

/// The folder of checkpoints in a run's folder.
pub const CHECKPOINTS: &str = "checkpoints";

/// The trained tensors in a checkpoint's folder.
pub const DELTA: &str = "delta.safetensors";
/// Their averages.
pub const EMA: &str = "ema.safetensors";

/// The key of [`RunState`] in the state's metadata.
const METADATA: &str = "l2p.run";

/// The version of [`RunState`] that this build reads and writes.
const FORMAT: u32 = 1;

const PREFIX: &str = "step-";

/// What folders under construction or deletion begin with.
const HIDDEN: &str = ".step-";

/// What the names of checkpoints begin with that were set aside.
const REFUSED: &str = "refused-";

/// What a run continues from, beside the optimizer's state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// The version of this structure.
    pub format: u32,
    /// Optimizer steps done.
    pub step: u64,
    /// Whether gradients, weights and loss were found finite before it was saved; earlier versions did not say.
    #[serde(default)]
    pub finite: Option<bool>,
    /// What was due at this step and is still to be done.
    #[serde(default)]
    pub due: Due,
    /// Pictures seen; noise levels and fresh noise are drawn by this number.
    pub pictures: u64,
    /// The next batch.
    pub position: Position,
    /// A hash of all that decides which pictures are in which batch.
    pub data: String,
    /// A hash of the model that training began from.
    pub model: String,
    /// What the guard knows of the loss.
    pub guard: Guard,
    /// The steps since the last line of the log.
    pub outcomes: Vec<StepOutcome>,
    /// Seconds of training.
    pub elapsed_seconds: f64,
    /// The configuration of the run that wrote it.
    pub config: serde_json::Value,
    /// What that run trained for.
    #[serde(default)]
    pub objective: Trained,
    /// The ranks of that run.
    #[serde(default = "one")]
    pub ranks: usize,
}

fn one() -> usize {
    1
}

/// Work between two steps that was interrupted, or is done when the run goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Due {
    /// The validation loss.
    pub validation: bool,
    /// A sheet of samples.
    pub samples: bool,
}

impl RunState {
    /// The state of a run that begins.
    pub fn new(data: String, model: String, config: serde_json::Value) -> Self {
        RunState {
            format: FORMAT,
            step: 0,
            finite: None,
            due: Due::default(),
            pictures: 0,
            position: Position::default(),
            data,
            model,
            guard: Guard::default(),
            outcomes: Vec::new(),
            elapsed_seconds: 0.0,
            config,
            objective: Trained::FLOW,
            ranks: 1,
        }
    }
}

/// A checkpoint on disk, its state's header checked.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    file: SafetensorsFile,
    /// Where ranks have divided the state among them.
    parts: Option<Parts>,
    /// What the run continues from.
    pub state: RunState,
}

/// How a checkpoint is written.
#[derive(Clone, Copy, Debug)]
pub struct SaveOptions {
    /// The element type of the trained tensors; the state is in f32 in any case.
    pub dtype: Float,
    /// Whether an average is kept.
    pub average: bool,
}

/// A checkpoint that was written.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Saved {
    /// Its folder.
    pub folder: PathBuf,
    /// Bytes of its files.
    pub bytes: u64,
}

impl Checkpoint {
    /// Opens the checkpoint in `folder`.
    ///
    /// # Errors
    /// When it is not whole, or of another version.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(STATE);
        let file = SafetensorsFile::open(&path)?;
        let text = file.metadata().get(METADATA);
        let text = text.ok_or_else(|| Error::file(&path, "is no state of a training run"))?;
        let state: RunState = files::from_json(text.as_bytes())
            .map_err(|reason| Error::file(&path, format!("holds a state of a run that {reason}")))?;
        if state.format != FORMAT {
            return Err(Error::file(
                path,
                format!("is of format {}; this program continues format {FORMAT}", state.format),
            ));
        }
        Ok(Checkpoint {
            folder: folder.into(),
            parts: Parts::open(&file)?,
            file,
            state,
        })
    }

    /// The newest checkpoint of the run in `run` that can be opened; of those that are newer, why they cannot.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn newest(run: &Path) -> Result<(Option<Self>, Vec<String>)> {
        let mut refused = Vec::new();
        for (_, folder) in list(run)?.into_iter().rev() {
            match Self::open(&folder) {
                Ok(checkpoint) => return Ok((Some(checkpoint), refused)),
                Err(error) => refused.push(error.to_string()),
            }
        }
        Ok((None, refused))
    }

    /// Checks the files against their checksums, and what the state says of itself. Returns what is damaged and does not keep the
    /// run from going on: the files of trained tensors, which the state holds too.
    ///
    /// # Errors
    /// When a run must not go on from it; those of `checked`.
    pub fn verify(&self, checked: &mut Checked<'_>) -> Result<Vec<PathBuf>> {
        let state = self.file.path();
        let untold = self.state.finite.is_none() && self.state.guard.trouble(&self.state.outcomes).is_some();
        if self.state.finite == Some(false) || untold {
            return Err(Error::file(
                state,
                "was saved while gradients or weights were not finite",
            ));
        }
        let Some(sums) = Checksums::read(&self.folder)? else {
            return Ok(Vec::new());
        };
        let parts = self.parts.as_ref().map_or_else(|| vec![state.to_owned()], Parts::paths);
        for part in parts {
            if sums.is_sound(&part, checked)? == Some(false) {
                return Err(Error::file(
                    part,
                    "is damaged on the disk: it is not what was written (checksum)",
                ));
            }
        }
        let mut damaged = Vec::new();
        for file in [DELTA, EMA] {
            let path = self.folder.join(file);
            let sound = match sums.is_sound(&path, checked) {
                // Not there any more: no run needs it.
                Err(Error::Io { .. } | Error::File { .. }) => Some(false),
                outcome => outcome?,
            };
            if sound == Some(false) {
                damaged.push(path);
            }
        }
        Ok(damaged)
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Puts the optimizer's state, and with it the trained weights, into `model`. Returns the name of the first tensor of the state
    /// that holds a number which is not finite, if there is one.
    ///
    /// # Errors
    /// When the state is that of other tensors.
    pub fn restore(&self, model: &mut TrainableModel) -> Result<Option<String>> {
        if let Some(parts) = &self.parts {
            return self.restore_parts(parts, model);
        }
        let path = self.file.path();
        let expected = model.state_tensors().len();
        let found = self.file.tensors().len();
        if found != expected {
            return Err(Error::file(
                path,
                format!(
                    "holds {found} tensors, this configuration keeps {expected}: it was written with another policy or \
                     with another choice about ema"
                ),
            ));
        }
        let mut not_finite = None;
        model.restore_state(self.state.step, &mut |name, shape| {
            let tensor = self.file.tensors().get(name);
            let tensor = tensor.ok_or_else(|| {
                Error::file(
                    path,
                    format!("lacks tensor `{name}`: it was written with another policy"),
                )
            })?;
            if tensor.dtype != Dtype::F32 || tensor.shape != shape {
                return Err(Error::file(
                    path,
                    format!(
                        "tensor `{name}` is {:?} {:?}, expected F32 {shape:?}",
                        tensor.dtype, tensor.shape
                    ),
                ));
            }
            let (values, finite) = f32_values(&self.file, tensor)?;
            if !finite && not_finite.is_none() {
                not_finite = Some(name.to_owned());
            }
            Ok(values)
        })?;
        Ok(not_finite)
    }
}

impl Checkpoint {
    /// As [`Checkpoint::restore`], where ranks have divided the state among them.
    fn restore_parts(&self, parts: &Parts, model: &mut TrainableModel) -> Result<Option<String>> {
        let names = model.state_names();
        let found: BTreeSet<&str> = parts.names().collect();
        if let Some(other) = found.iter().find(|name| !names.contains(**name)) {
            return Err(Error::file(
                self.file.path(),
                format!(
                    "holds `{other}`, which this configuration does not keep: it was written with another policy or with another \
                     choice about ema"
                ),
            ));
        }
        let mut not_finite = None;
        model.restore_slices(self.state.step, &mut |name, elements| {
            let values = parts.read(name, elements)?;
            if not_finite.is_none() && !values.iter().all(|value| value.is_finite()) {
                not_finite = Some(name.to_owned());
            }
            Ok(values)
        })?;
        Ok(not_finite)
    }
}

/// The values of an f32 tensor, read by all threads, and whether they are all finite.
fn f32_values(file: &SafetensorsFile, tensor: &StoredTensor) -> Result<(Vec<f32>, bool)> {
    /// Values that a thread reads at a time: 8 MiB.
    const PIECE: usize = 2 << 20;
    let mut values = vec![0f32; tensor.range.len() / Float::F32.size()];
    let pieces = values.par_chunks_mut(PIECE).enumerate();
    let finite = pieces.map(|(index, piece)| -> Result<bool> {
        let start = tensor.range.start + index * PIECE * Float::F32.size();
        file.read_at(start, bytemuck::cast_slice_mut(piece))?;
        for value in piece.iter_mut() {
            *value = f32::from_bits(u32::from_le(value.to_bits()));
        }
        Ok(piece.iter().all(|value| value.is_finite()))
    });
    let finite = finite.try_reduce(|| true, |one, other| Ok(one && other))?;
    Ok((values, finite))
}

/// The checkpoints of the run in `run`, oldest first.
///
/// # Errors
/// When the folder is there and cannot be read.
pub fn list(run: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let folder = run.join(CHECKPOINTS);
    let entries = match fs::read_dir(&folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| Error::io(&folder, error))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| Error::io(&folder, error))?.path();
        if let Some(step) = step_of(&path) {
            found.push((step, path));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// The step that a checkpoint's name says.
pub(super) fn step_of(folder: &Path) -> Option<u64> {
    let name = folder.file_name()?.to_str()?;
    name.strip_prefix(PREFIX)?.parse().ok()
}

/// Deletes what a run that was killed left half-written or half-deleted.
pub fn remove_leftovers(run: &Path) {
    let entries = fs::read_dir(run.join(CHECKPOINTS)).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(HIDDEN)) {
        // What cannot be deleted does no harm.
        let _ = fs::remove_dir_all(entry.path());
    }
}

/// Adds files of its own to the folder of a checkpoint that is being written.
pub type Complete<'a> = dyn Fn(&Path) -> Result<()> + 'a;

/// What a rank writes of a checkpoint.
#[derive(Clone, Debug, Default)]
pub struct Share {
    /// The rank, and how many there are; 0 of 0 for one that is alone.
    pub rank: usize,
    /// See `rank`.
    pub ranks: usize,
    /// The averages of all trained tensors by name, on the first of ranks that divide them.
    pub averages: Option<HashMap<String, Vec<f32>>>,
}

/// A new folder in which a checkpoint of the run in `run` is made; deleted when dropped.
///
/// # Errors
/// When the disk does not take it.
pub fn begin(run: &Path) -> Result<TempDir> {
    let folder = run.join(CHECKPOINTS);
    fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, error))?;
    hidden(&folder)
}

/// Writes a rank's share of a checkpoint of what `source` holds into `place`; `observer` watches each file's bytes.
///
/// # Errors
/// When the disk does not take it, or the observer stops.
pub fn write_share(
    (run, place): (&Path, &Path),
    source: &dyn StateSource,
    state: &RunState,
    options: SaveOptions,
    share: &Share,
    observer: &mut dyn WriteObserver,
) -> Result<Checksums> {
    let mut sums = Checksums::default();
    let mut write = |name: &str, output: &OutputFile<'_>| -> Result<()> {
        let written = sums.write_file(&place.join(name), output, false, observer);
        written
            .map(drop)
            .map_err(|error| at(&run.join(CHECKPOINTS), &name_of(state.step), error))
    };
    let part = slices::own_part(source, share.rank, share.ranks)?;
    if share.rank > 0 {
        if let Some(part) = part {
            write(&slices::file_name(share.rank, share.ranks), &part)?;
        }
        return Ok(sums);
    }
    let facts = BTreeMap::from([("l2p.step".to_owned(), state.step.to_string())]);
    write(
        DELTA,
        &trained(source, StatePart::Weight, options.dtype, None, facts.clone()),
    )?;
    if options.average {
        let averages = share.averages.as_ref();
        write(EMA, &trained(source, StatePart::Ema, options.dtype, averages, facts))?;
    }
    let json = serde_json::to_string(state).map_err(|error| Error::invalid(error.to_string()))?;
    let mut file = match part {
        Some(part) => part,
        None => whole_state(source),
    };
    file.set_metadata(METADATA, &json);
    write(STATE, &file)?;
    Ok(sums)
}

/// Makes a checkpoint of step `step` of what all ranks have written into `place`, whose sums are `sums`. One of the same step is replaced.
/// `complete` adds files of its own to the folder it is given, which is renamed afterwards.
///
/// # Errors
/// When the disk does not take it; then nothing has changed.
pub fn complete(run: &Path, place: TempDir, step: u64, sums: &Checksums, complete: &Complete<'_>) -> Result<Saved> {
    let folder = run.join(CHECKPOINTS);
    let name = name_of(step);
    sums.write(place.path())
        .and_then(|()| complete(place.path()))
        .map_err(|error| at(&folder, &name, error))?;
    sync_folder(place.path());
    let target = folder.join(&name);
    let replaced = match target.exists() {
        true => Some(set_aside(&folder, &target)?),
        false => None,
    };
    fs::rename(place.path(), &target).map_err(|error| Error::io(&folder, error))?;
    // It has another name now, so there is nothing left to delete.
    let _ = place.keep();
    sync_folder(&folder);
    drop(replaced);
    Ok(Saved {
        folder: target,
        bytes: sums.files.values().map(|sum| sum.bytes).sum(),
    })
}

/// Writes a checkpoint of what `source`, which no other ranks complete, holds into the run's folder `run`; see [`complete`].
///
/// # Errors
/// When the disk does not take it, or the observer stops; then nothing has changed.
pub fn save(
    run: &Path,
    source: &dyn StateSource,
    state: &RunState,
    options: SaveOptions,
    add: &Complete<'_>,
    observer: &mut dyn WriteObserver,
) -> Result<Saved> {
    let place = begin(run)?;
    let sums = write_share((run, place.path()), source, state, options, &Share::default(), observer)?;
    complete(run, place, state.step, &sums, add)
}

fn name_of(step: u64) -> String {
    format!("{PREFIX}{step:08}")
}

/// Bytes of the tensors that [`save`] writes.
pub fn bytes_of(source: &dyn StateSource, options: SaveOptions) -> u64 {
    let elements = |shape: &[usize]| shape.iter().product::<usize>() as u64;
    let trained: u64 = source.trained().iter().map(|tensor| elements(&tensor.shape)).sum();
    let state: u64 = source
        .state_tensors()
        .iter()
        .map(|tensor| elements(&tensor.shape))
        .sum();
    let copies = if options.average { 2 } else { 1 };
    trained * copies * options.dtype.size() as u64 + state * Float::F32.size() as u64
}

/// Deletes the checkpoints that are neither among the newest `last` nor at a multiple of `every` steps (0: no such), but never the
/// newest one that later steps have proven: one from before step `calm`, at which the last good interval ended, or from before the
/// newest one, since nothing is saved unless the last step was good.
///
/// # Errors
/// When one cannot be deleted.
pub fn prune(run: &Path, last: usize, every: u64, calm: u64) -> Result<()> {
    let all = list(run)?;
    let old = all.len().saturating_sub(last.max(1));
    let before = |step: u64| all.iter().rev().find(|(found, _)| *found < step);
    let newest = all.last().map_or(0, |(step, _)| *step);
    let proven = before(calm).or_else(|| before(newest)).map(|(step, _)| *step);
    let multiple = |step: u64| every != 0 && step.is_multiple_of(every);
    for (step, folder) in &all[..old] {
        if !multiple(*step) && proven != Some(*step) {
            let aside = set_aside(&run.join(CHECKPOINTS), folder)?;
            aside.close().map_err(|error| Error::io(folder, error))?;
        }
    }
    Ok(())
}

/// Gives a checkpoint that no run should go on from another name, and returns it.
///
/// # Errors
/// When it cannot be renamed.
pub fn refuse(checkpoint: &Path) -> Result<PathBuf> {
    let name = checkpoint
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let taken = |path: &PathBuf| path.symlink_metadata().is_ok();
    let plain = checkpoint.with_file_name(format!("{REFUSED}{name}"));
    let numbered = (2..).map(|number| checkpoint.with_file_name(format!("{REFUSED}{name}-{number}")));
    let target = std::iter::once(plain).chain(numbered).find(|path| !taken(path));
    let target = target.unwrap_or_default();
    fs::rename(checkpoint, &target).map_err(|error| Error::io(checkpoint, error))?;
    Ok(target)
}

/// A new folder that nobody takes for a checkpoint.
fn hidden(folder: &Path) -> Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(HIDDEN).suffix(".tmp");
    // As any new folder; the default for temporary ones is readable by their owner alone.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    builder.tempdir_in(folder).map_err(|error| Error::io(folder, error))
}

/// Moves a checkpoint into a folder that is deleted when dropped.
fn set_aside(folder: &Path, checkpoint: &Path) -> Result<TempDir> {
    let aside = hidden(folder)?;
    fs::rename(checkpoint, aside.path().join("old")).map_err(|error| Error::io(checkpoint, error))?;
    Ok(aside)
}

/// An error about a file under construction, told of the checkpoint that it was to be part of.
fn at(folder: &Path, name: &str, error: Error) -> Error {
    let path = |file: &Path| folder.join(name).join(file.file_name().unwrap_or_default());
    match error {
        Error::File { path: file, reason } => Error::file(path(&file), reason),
        Error::Io { path: file, source } => Error::io(path(&file), source),
        other => other,
    }
}

/// The optimizer's state as a file.
fn whole_state(source: &dyn StateSource) -> OutputFile<'_> {
    let tensors = source.state_tensors().into_iter().map(|tensor| OutputTensor {
        name: tensor.name.clone(),
        dtype: Dtype::F32,
        shape: tensor.shape.clone(),
        content: Content::Fetched(Fetch::new(move || tensor.read()), Float::F32),
    });
    OutputFile::new(tensors.collect(), BTreeMap::new())
}

/// The trained tensors as a file; `part` is one that is kept of each, and `gathered` has what other ranks keep of it.
fn trained<'a>(
    source: &'a dyn StateSource,
    part: StatePart,
    dtype: Float,
    gathered: Option<&'a HashMap<String, Vec<f32>>>,
    metadata: BTreeMap<String, String>,
) -> OutputFile<'a> {
    let tensors = source.trained().into_iter().map(|tensor| OutputTensor {
        name: tensor.name.clone(),
        dtype: dtype.dtype(),
        shape: tensor.shape.clone(),
        content: Content::Fetched(
            Fetch::new(move || {
                let values = match gathered {
                    Some(gathered) => gathered.get(&tensor.name).cloned(),
                    None => tensor.read(part)?,
                };
                values.ok_or_else(|| Error::invalid(format!("no average of `{}` is kept", tensor.name)))
            }),
            dtype,
        ),
    });
    OutputFile::new(tensors.collect(), metadata)
}
