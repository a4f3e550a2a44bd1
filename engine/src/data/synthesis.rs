//! A data set drawn by a model: many prompts to a folder that training reads.
//!
//! The folder gets `metadata.jsonl` with a line for each picture (`file_name`, `prompt`, `seed`) in the order of the jobs, the
//! pictures in folders of a thousand, and `synthesis.json`, which says what they were drawn with. A line is added when its
//! picture is on the disk, so that a run that was interrupted, however it ended, goes on after the last line; pictures that are
//! damaged or gone by then are drawn again. The folder is held meanwhile: a second run in it is refused.
//!
//! While the device draws a batch, the pictures of the one before are encoded by all processors. Several ranks draw batches in turn; the
//! first one keeps the metadata.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::captions::encode_captions_among;
use super::features::{FeatureStore, hex};
use crate::dist::World;
use crate::error::{Error, Result};
use crate::files::{self, FolderLock};
use crate::flow::noise_source::NoiseSource;
use crate::flow::sampler::StepReport;
use crate::image_io::{RgbImage, WriteOptions, read_image, write_image};
use crate::limits::Budget;
use crate::pipeline::{Captions, Pipeline, PromptFiles, Settings};
use crate::shown_name;
use crate::tensor::Tensor;

const METADATA: &str = "metadata.jsonl";
const SETTINGS: &str = "synthesis.json";

/// Pictures in a folder.
const PER_FOLDER: usize = 1000;

/// Pictures that are looked at between two looks at whether to go on.
const CHUNK: usize = 256;

/// What guidance moves away from.
const EMPTY: &str = "";

/// A picture to be drawn.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SynthesisJob {
    /// What it shows.
    pub prompt: String,
    /// The seed of its noise.
    pub seed: u64,
}

/// How to draw.
#[derive(Clone, Debug)]
pub struct SynthesisOptions {
    /// Size, steps, shift and guidance.
    pub settings: Settings,
    /// The generator of the noise.
    pub rng: NoiseSource,
    /// Pictures drawn at once.
    pub batch: usize,
    /// `png`, `webp` or `jpg`.
    pub extension: String,
    /// Where the features of the prompts are kept, for training too.
    pub cache: PathBuf,
}

/// What [`synthesize`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SynthesisReport {
    /// Pictures that were there.
    pub found: usize,
    /// Pictures that were drawn.
    pub drawn: usize,
    /// Those of them that had been there, but were damaged or gone.
    pub redrawn: usize,
    /// Prompts that were encoded; the features of all others were in the cache.
    pub encoded: usize,
    /// Whether the folder could be held against other runs; some file systems know no locks.
    pub held: bool,
}

/// A line of the metadata.
#[derive(PartialEq, Serialize, Deserialize)]
struct Line {
    file_name: String,
    prompt: String,
    seed: u64,
}

impl Line {
    /// The line of a job's picture.
    fn of(number: usize, job: &SynthesisJob, extension: &str) -> Self {
        Line {
            file_name: format!("{:03}/{number:06}.{extension}", number / PER_FOLDER),
            prompt: job.prompt.clone(),
            seed: job.seed,
        }
    }
}

/// Told what is done, how much of it, and how much there is; an error ends the work.
type Progress<'a> = dyn FnMut(&'static str, usize, usize) -> Result<()> + 'a;

/// Draws the pictures of `jobs` that `folder` does not hold yet, as one of the ranks of `world`, which all see the same folder.
/// `progress(what, done, total)` is called between parts of the work; an error from it ends the work, and what was drawn so far stays.
///
/// # Errors
/// When another run holds the folder, or it holds pictures of other jobs or settings; when a prompt cannot be encoded, a picture
/// holds numbers that are not finite, the device has no room, the disk does not take a picture, or `progress` says so. A batch
/// with a fault leaves nothing behind. On all ranks, when it happens on one.
pub fn synthesize(
    pipeline: &mut Pipeline,
    folder: &Path,
    jobs: &[SynthesisJob],
    options: &SynthesisOptions,
    world: &World,
    progress: &mut dyn FnMut(&'static str, usize, usize) -> Result<()>,
) -> Result<SynthesisReport> {
    let mut progress = |what: &'static str, done: usize, total: usize| {
        world.work();
        progress(what, done, total)
    };
    let lock = world.on_first("folder", || {
        fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
        FolderLock::acquire(folder, "l2p-data")
    })?;
    let (lines, damaged) = world.first_decides("pictures that are there", || {
        clear_up(folder);
        ensure_settings(folder, pipeline, options)?;
        let lines = lines_so_far(folder, jobs, &options.extension)?;
        let damaged = damaged_pictures(folder, &jobs[..lines], options, &mut progress)?;
        Ok((lines, damaged))
    })?;
    let mut report = SynthesisReport {
        found: lines - damaged.len(),
        redrawn: damaged.len(),
        held: lock.as_ref().is_none_or(FolderLock::is_held),
        ..SynthesisReport::default()
    };
    let missing: Vec<usize> = damaged.into_iter().chain(lines..jobs.len()).collect();
    if missing.is_empty() {
        return Ok(report);
    }
    let store = encode(pipeline, jobs, &missing, options, world, &mut report, &mut progress)?;
    let loaded = pipeline.load(&mut |done, total| progress("loading the model", done, total));
    world.together("model", loaded)?;
    let metadata = match world.is_first() {
        true => Some(Metadata::open(folder, lines)?),
        false => None,
    };
    let drawing = Drawing {
        folder,
        jobs,
        missing: &missing,
        options,
        world,
        store: &store,
    };
    drawing.run(pipeline, metadata, &mut progress)?;
    report.drawn = missing.len();
    Ok(report)
}

/// Pictures, row by row, with the numbers of their jobs.
type Batch = (Vec<usize>, Vec<Vec<u8>>);

/// Pictures to be drawn, by ranks in turn.
struct Drawing<'a> {
    folder: &'a Path,
    jobs: &'a [SynthesisJob],
    /// Those without a whole picture, in the order of their lines.
    missing: &'a [usize],
    options: &'a SynthesisOptions,
    world: &'a World,
    store: &'a FeatureStore,
}

impl Drawing<'_> {
    /// Draws this rank's, and writes them on a thread of its own; `metadata` is the first rank's.
    fn run(&self, pipeline: &mut Pipeline, metadata: Option<Metadata>, progress: &mut Progress<'_>) -> Result<()> {
        let pictures = Pictures {
            folder: self.folder,
            jobs: self.jobs,
            settings: self.options.settings,
            extension: &self.options.extension,
        };
        let (drawn, batches) = sync_channel::<Batch>(1);
        let (told, written) = channel::<Vec<usize>>();
        std::thread::scope(|scope| {
            let writing = scope.spawn(|| pictures.write_all(batches, &told));
            let mut turn = Turn {
                drawing: self,
                pictures: &pictures,
                written: &written,
                metadata,
            };
            let drawing = self.draw_all(pipeline, drawn, &mut turn, progress);
            let written = writing.join();
            let written =
                written.unwrap_or_else(|_| Err(Error::invalid("the thread that writes pictures stopped unexpectedly")));
            // A disk that is full explains more than what followed from it.
            let outcome = written.and(drawing);
            if matches!(outcome, Err(Error::PeerLost { .. })) {
                return outcome;
            }
            // What was written before a fault is there.
            let outcome = self.world.together("pictures", outcome);
            turn.note().and(outcome)
        })
    }

    fn draw_all(
        &self,
        pipeline: &mut Pipeline,
        drawn: SyncSender<Batch>,
        turn: &mut Turn<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let (options, ranks) = (self.options, self.world.size());
        let mut step = Steps {
            done: 0,
            total: self.missing.len().div_ceil(ranks) * options.settings.steps,
            progress,
        };
        let batches: Vec<&[usize]> = self.missing.chunks(options.batch.max(1)).collect();
        for round in batches.chunks(ranks) {
            let mut draw_own = || -> Result<()> {
                step.tell(0)?;
                let Some(numbers) = round.get(self.world.rank()) else {
                    return Ok(());
                };
                let part: Vec<&SynthesisJob> = numbers.iter().map(|&number| &self.jobs[number]).collect();
                let pictures = draw(pipeline, self.store, &part, options, &mut |steps| {
                    step.tell(steps * part.len())
                })?;
                step.done += options.settings.steps * part.len();
                // Where the writer has ended with an error, that is the one to tell.
                let sent = drawn.send((numbers.to_vec(), pictures));
                sent.map_err(|_| Error::invalid("pictures cannot be written"))
            };
            self.world.together("drawing", draw_own())?;
            turn.note()?;
        }
        step.tell(0)
    }
}

/// Where ranks tell each other what is on the disk.
struct Turn<'a> {
    drawing: &'a Drawing<'a>,
    pictures: &'a Pictures<'a>,
    written: &'a Receiver<Vec<usize>>,
    /// On the first rank.
    metadata: Option<Metadata>,
}

impl Turn<'_> {
    /// Adds to the metadata what all ranks have written since the last time.
    fn note(&mut self) -> Result<()> {
        let own: Vec<usize> = self.written.try_iter().flatten().collect();
        let all = self.drawing.world.share("written pictures", own)?;
        match &mut self.metadata {
            Some(metadata) => {
                metadata.waiting.extend(all.into_iter().flatten());
                metadata.add(self.drawing.missing, self.pictures)
            }
            None => Ok(()),
        }
    }
}

/// Deletes what a run that was killed had begun to write, in the folder and in those of its pictures.
fn clear_up(folder: &Path) {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| {
        let name = entry.file_name();
        name.as_encoded_bytes().iter().all(u8::is_ascii_digit)
    });
    for of_pictures in folders {
        files::remove_leftovers(&of_pictures.path(), None);
    }
    files::remove_leftovers(folder, None);
}

/// Tells how far the drawing is, in denoising steps of one picture.
struct Steps<'a, 'b> {
    /// Those of the batches before.
    done: usize,
    total: usize,
    progress: &'a mut Progress<'b>,
}

impl Steps<'_, '_> {
    fn tell(&mut self, more: usize) -> Result<()> {
        (self.progress)("drawing, in steps of a picture", self.done + more, self.total)
    }
}

/// Refuses a folder whose pictures were drawn otherwise, and notes in a new one how they are.
fn ensure_settings(folder: &Path, pipeline: &Pipeline, options: &SynthesisOptions) -> Result<()> {
    let path = folder.join(SETTINGS);
    let drawn_with = json!({
        "format": 1,
        "model": hex(&pipeline.transformer().checkpoint.identity()?),
        "settings": options.settings,
        "rng": options.rng.to_string(),
        "compute": pipeline.device().compute_dtype().to_string(),
        "extension": options.extension,
    });
    let Some(bytes) = files::read_if_there(&path, Budget::CONFIG)? else {
        let text = format!("{drawn_with:#}\n");
        return files::replace(&path, text.as_bytes());
    };
    let found: Value = files::from_json(&bytes).map_err(|reason| Error::file(&path, reason))?;
    // Through text, as the file went: a number of f32 reads as another of f64.
    let expected: Value = serde_json::from_str(&drawn_with.to_string()).unwrap_or_default();
    let differing = expected.as_object().into_iter().flatten();
    let differing: Vec<&str> = differing
        .filter(|(key, value)| found.get(*key) != Some(value))
        .map(|(key, _)| key.as_str())
        .collect();
    match differing.is_empty() {
        true => Ok(()),
        false => Err(Error::file(
            path,
            format!(
                "says that the pictures here were drawn with another {}: use the same again, or another folder",
                differing.join(" and ")
            ),
        )),
    }
}

/// How many lines at the metadata's beginning are those of the jobs, in their order. What follows them, such as a line of which a
/// crash left a part, is cut off.
fn lines_so_far(folder: &Path, jobs: &[SynthesisJob], extension: &str) -> Result<usize> {
    let path = folder.join(METADATA);
    let Some(bytes) = files::read_if_there(&path, Budget::METADATA)? else {
        return Ok(0);
    };
    let (mut lines, mut kept) = (0, 0);
    for text in bytes.split_inclusive(|&byte| byte == b'\n') {
        let Ok(line) = serde_json::from_slice::<Line>(text) else {
            break;
        };
        let Some(job) = jobs.get(lines).filter(|_| text.ends_with(b"\n")) else {
            break;
        };
        let expected = Line::of(lines, job, extension);
        if line != expected {
            return Err(Error::file(
                &path,
                format!(
                    "line {} is {} of \"{}\" with seed {}, the prompts call for {} of \"{}\" with seed {}: use the same prompts \
                     and seed again, or another folder",
                    lines + 1,
                    shown_name(&line.file_name),
                    shown_name(&line.prompt),
                    line.seed,
                    expected.file_name,
                    shown_name(&expected.prompt),
                    expected.seed
                ),
            ));
        }
        lines += 1;
        kept += text.len();
    }
    // Lines beyond the jobs are a larger set, which stays as it is.
    if lines < jobs.len() && kept < bytes.len() {
        files::replace(&path, &bytes[..kept])?;
    }
    Ok(lines)
}

/// The numbers of those of the jobs whose pictures are not whole, or of another size. Every one of them is decoded, since the
/// length of a file says nothing of what a crash or a copy left of it.
fn damaged_pictures(
    folder: &Path,
    jobs: &[SynthesisJob],
    options: &SynthesisOptions,
    progress: &mut dyn FnMut(&'static str, usize, usize) -> Result<()>,
) -> Result<Vec<usize>> {
    let size = (options.settings.width, options.settings.height);
    let is_damaged = |number: usize| {
        let name = Line::of(number, &jobs[number], &options.extension).file_name;
        match read_image(&folder.join(name)) {
            Ok(image) => Ok((image.width(), image.height()) != size),
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(true),
            Err(error @ Error::Io { .. }) => Err(error),
            Err(_) => Ok(true),
        }
    };
    let mut damaged = Vec::new();
    for first in (0..jobs.len()).step_by(CHUNK) {
        progress("checking the pictures that are there", first, jobs.len())?;
        let numbers = (first..jobs.len().min(first + CHUNK)).into_par_iter();
        let found: Vec<Option<usize>> = numbers
            .map(|number| Ok(is_damaged(number)?.then_some(number)))
            .collect::<Result<_>>()?;
        damaged.extend(found.into_iter().flatten());
    }
    Ok(damaged)
}

/// The store of all features that the jobs need.
fn encode(
    pipeline: &Pipeline,
    jobs: &[SynthesisJob],
    numbers: &[usize],
    options: &SynthesisOptions,
    world: &World,
    report: &mut SynthesisReport,
    progress: &mut dyn FnMut(&'static str, usize, usize) -> Result<()>,
) -> Result<FeatureStore> {
    let device = pipeline.device();
    let spec = pipeline.spec();
    let files = PromptFiles::open(pipeline.paths(), device, spec.caption_width(), spec.readout())?;
    let store = FeatureStore::open(&options.cache.join("captions"), &files.identity(device)?)?;
    let mut texts: BTreeSet<&str> = numbers.iter().map(|&number| jobs[number].prompt.as_str()).collect();
    if options.settings.cfg != 1.0 {
        texts.insert(EMPTY);
    }
    let what = "encoding the prompts";
    let captions = encode_captions_among(world, &store, &files, device, &texts, &mut |done, total| {
        progress(what, done, total)
    })?;
    if let Some((text, reason)) = captions.refused.first() {
        return Err(Error::invalid(format!(
            "the prompt \"{}\" cannot be used: {reason}",
            shown_name(text)
        )));
    }
    report.encoded = captions.encoded;
    Ok(store)
}

/// The pictures of some jobs as bytes, row by row.
fn draw(
    pipeline: &mut Pipeline,
    store: &FeatureStore,
    jobs: &[&SynthesisJob],
    options: &SynthesisOptions,
    go_on: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Vec<Vec<u8>>> {
    let device = pipeline.device().clone();
    let feature = |text: &str| -> Result<Tensor> {
        let features = store.read(&store.key(&[text.as_bytes()]));
        let features = features.ok_or_else(|| {
            Error::invalid(format!(
                "the features of \"{}\" in the cache are damaged",
                shown_name(text)
            ))
        })?;
        features.to_tensor(&device)
    };
    let prompts: Vec<Tensor> = jobs.iter().map(|job| feature(&job.prompt)).collect::<Result<_>>()?;
    let negatives = match options.settings.cfg != 1.0 {
        true => vec![feature(EMPTY)?; jobs.len()],
        false => Vec::new(),
    };
    let seeds: Vec<u64> = jobs.iter().map(|job| job.seed).collect();
    let noise = pipeline.noise(options.rng, &seeds, &options.settings)?;
    let captions = Captions { prompts, negatives };
    let drawn = pipeline.denoise(&captions, noise, &options.settings, &mut |step: StepReport| {
        go_on(step.done)
    })?;
    pipeline.pictures(&drawn)
}

/// Where pictures go.
struct Pictures<'a> {
    folder: &'a Path,
    jobs: &'a [SynthesisJob],
    settings: Settings,
    extension: &'a str,
}

impl Pictures<'_> {
    /// Writes batches until there are no more; each comes with the numbers of its jobs, which are told once they are on the disk.
    fn write_all(&self, batches: Receiver<Batch>, told: &Sender<Vec<usize>>) -> Result<()> {
        for (numbers, pictures) in batches {
            let numbered: Vec<(usize, Vec<u8>)> = numbers.into_iter().zip(pictures).collect();
            let paths = numbered
                .into_par_iter()
                .map(|(number, pixels)| Ok((number, self.write(number, pixels)?)));
            let paths: Vec<(usize, PathBuf)> = paths.collect::<Result<_>>()?;
            self.sync_folders(&paths);
            // Nobody listens any more once another rank is lost.
            let _ = told.send(paths.into_iter().map(|(number, _)| number).collect());
        }
        Ok(())
    }

    fn line(&self, number: usize) -> Line {
        Line::of(number, &self.jobs[number], self.extension)
    }

    /// Writes one picture, and returns where.
    fn write(&self, number: usize, pixels: Vec<u8>) -> Result<PathBuf> {
        let path = self.folder.join(self.line(number).file_name);
        let folder = files::folder_of(&path);
        fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, error))?;
        let image = RgbImage::new(self.settings.width, self.settings.height, pixels)?;
        let options = WriteOptions {
            durable: true,
            ..WriteOptions::default()
        };
        write_image(&path, &image, &options)?;
        Ok(path)
    }

    /// Brings the names of these pictures onto the disk.
    fn sync_folders(&self, paths: &[(usize, PathBuf)]) {
        let folders: BTreeSet<PathBuf> = paths.iter().map(|(_, path)| files::folder_of(path)).collect();
        folders.iter().for_each(|folder| files::sync_folder(folder));
        // A folder of a thousand may be new.
        files::sync_folder(self.folder);
    }
}

/// The lines of pictures that are on the disk.
struct Metadata {
    path: PathBuf,
    file: File,
    /// Pictures that had a line before.
    lines: usize,
    /// How many of the missing ones are noted.
    noted: usize,
    /// On the disk, but one before them is not yet.
    waiting: BTreeSet<usize>,
}

impl Metadata {
    fn open(folder: &Path, lines: usize) -> Result<Self> {
        let path = folder.join(METADATA);
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.map_err(|error| Error::io(&path, error))?;
        files::sync_folder(folder);
        Ok(Metadata {
            path,
            file,
            lines,
            noted: 0,
            waiting: BTreeSet::new(),
        })
    }

    /// Adds lines of pictures that are on the disk now, as soon as all before them have theirs, and brings them onto the disk.
    fn add(&mut self, missing: &[usize], pictures: &Pictures<'_>) -> Result<()> {
        let mut text = Vec::new();
        while let Some(&number) = missing.get(self.noted).filter(|number| self.waiting.remove(number)) {
            self.noted += 1;
            // One that is drawn again has its line.
            if number >= self.lines {
                let line = pictures.line(number);
                serde_json::to_writer(&mut text, &line).map_err(|error| Error::invalid(error.to_string()))?;
                text.push(b'\n');
            }
        }
        let written = self.file.write_all(&text).and_then(|()| self.file.sync_data());
        written.map_err(|error| Error::io(&self.path, error))
    }
}
