//! A data set drawn by a model: many prompts to a folder that training reads.
//!
//! The folder gets `metadata.jsonl` with a line for each picture (`file_name`, `prompt`, `seed`) in the order of the jobs, the
//! pictures in folders of a thousand, and `synthesis.json`, which says what they were drawn with. A line is added when its
//! picture is whole, so that a run that was interrupted, however it ended, goes on after the last line.
//!
//! While the device draws a batch, the pictures of the one before are encoded by all processors.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::captions::encode_captions;
use super::features::{FeatureStore, hex};
use crate::error::{Error, Result};
use crate::files;
use crate::flow::noise_source::NoiseSource;
use crate::image_io::{RgbImage, WriteOptions, write_image};
use crate::pipeline::{Captions, Pipeline, PromptFiles, Settings};
use crate::tensor::Tensor;

const METADATA: &str = "metadata.jsonl";
const SETTINGS: &str = "synthesis.json";

/// Pictures in a folder.
const PER_FOLDER: usize = 1000;

/// What guidance moves away from.
const EMPTY: &str = "";

/// A picture to be drawn.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Prompts that were encoded; the features of all others were in the cache.
    pub encoded: usize,
}

/// A line of the metadata.
#[derive(Serialize, Deserialize)]
struct Line {
    file_name: String,
    prompt: String,
    seed: u64,
}

/// Draws the pictures of `jobs` that `folder` does not hold yet. `progress(what, done, total)` is called between parts of the
/// work; an error from it ends the work, and what was drawn so far stays.
///
/// # Errors
/// When the folder holds pictures of other jobs or settings, a prompt cannot be encoded, the device has no room, the disk does
/// not take a picture, or `progress` says so.
pub fn synthesize(
    pipeline: &mut Pipeline,
    folder: &Path,
    jobs: &[SynthesisJob],
    options: &SynthesisOptions,
    progress: &mut dyn FnMut(&'static str, usize, usize) -> Result<()>,
) -> Result<SynthesisReport> {
    fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
    expect_settings(folder, pipeline, options)?;
    let found = drawn_so_far(folder, jobs)?;
    let mut report = SynthesisReport {
        found,
        ..SynthesisReport::default()
    };
    if found == jobs.len() {
        return Ok(report);
    }
    let store = encode(pipeline, &jobs[found..], options, &mut report, progress)?;
    pipeline.load(&mut |done, total| progress("loading the model", done, total))?;
    let writer = Writer {
        folder,
        jobs,
        settings: options.settings,
        extension: &options.extension,
    };
    let metadata = folder.join(METADATA);
    let file = OpenOptions::new().create(true).append(true).open(&metadata);
    let file = file.map_err(|error| Error::io(&metadata, error))?;
    let (drawn, batches) = sync_channel::<(usize, Vec<Vec<u8>>)>(1);
    let outcome = std::thread::scope(|scope| {
        let writing = scope.spawn(|| writer.write_all(batches, file));
        let drawing = || -> Result<()> {
            // Moved in, so that the writer learns of the end.
            let drawn = drawn;
            for first in (found..jobs.len()).step_by(options.batch.max(1)) {
                progress("drawing", first, jobs.len())?;
                let part = &jobs[first..jobs.len().min(first + options.batch.max(1))];
                let pictures = draw(pipeline, &store, part, options, &mut || {
                    progress("drawing", first, jobs.len())
                })?;
                if drawn.send((first, pictures)).is_err() {
                    // The writer has ended with an error, which is the one to tell.
                    break;
                }
            }
            Ok(())
        };
        let drawing = drawing();
        let written = writing.join();
        let written =
            written.unwrap_or_else(|_| Err(Error::invalid("the thread that writes pictures stopped unexpectedly")));
        // A disk that is full explains more than what followed from it.
        written.and_then(|count| drawing.map(|()| count))
    });
    report.drawn = outcome?;
    progress("drawing", jobs.len(), jobs.len())?;
    Ok(report)
}

/// Refuses a folder whose pictures were drawn otherwise, and notes in a new one how they are.
fn expect_settings(folder: &Path, pipeline: &Pipeline, options: &SynthesisOptions) -> Result<()> {
    let path = folder.join(SETTINGS);
    let drawn_with = json!({
        "format": 1,
        "model": hex(&pipeline.transformer().checkpoint.identity()),
        "settings": options.settings,
        "rng": options.rng.to_string(),
        "compute": pipeline.device().compute_dtype().to_string(),
        "extension": options.extension,
    });
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let text = format!("{drawn_with:#}\n");
            return files::replace(&path, text.as_bytes());
        }
        Err(error) => return Err(Error::io(&path, error)),
    };
    let found: Value =
        serde_json::from_slice(&bytes).map_err(|error| Error::file(&path, format!("is not JSON: {error}")))?;
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

/// How many of the jobs are done: lines at the metadata's beginning that belong to them and whose pictures are there. What
/// follows is cut off.
fn drawn_so_far(folder: &Path, jobs: &[SynthesisJob]) -> Result<usize> {
    let path = folder.join(METADATA);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(Error::io(&path, error)),
    };
    let (mut done, mut kept) = (0, 0);
    for text in bytes.split_inclusive(|&byte| byte == b'\n') {
        let Ok(line) = serde_json::from_slice::<Line>(text) else {
            break;
        };
        let there = folder.join(&line.file_name).metadata().is_ok_and(|file| file.len() > 0);
        if !text.ends_with(b"\n") || !there {
            break;
        }
        match jobs.get(done) {
            None => break,
            Some(job) if job.prompt == line.prompt && job.seed == line.seed => {}
            Some(job) => {
                return Err(Error::file(
                    &path,
                    format!(
                        "line {} is \"{}\" with seed {}, the prompts call for \"{}\" with seed {}: use the same prompts and \
                         seed again, or another folder",
                        done + 1,
                        line.prompt,
                        line.seed,
                        job.prompt,
                        job.seed
                    ),
                ));
            }
        }
        done += 1;
        kept += text.len();
    }
    // Lines beyond the jobs are a larger set, which stays as it is.
    if done < jobs.len() && kept < bytes.len() {
        files::replace(&path, &bytes[..kept])?;
    }
    Ok(done)
}

/// The store of all features that the jobs need.
fn encode(
    pipeline: &Pipeline,
    jobs: &[SynthesisJob],
    options: &SynthesisOptions,
    report: &mut SynthesisReport,
    progress: &mut dyn FnMut(&'static str, usize, usize) -> Result<()>,
) -> Result<FeatureStore> {
    let device = pipeline.device();
    let files = PromptFiles::open(pipeline.paths(), device, pipeline.config().caption_width)?;
    let store = FeatureStore::open(&options.cache.join("captions"), &files.identity(device)?)?;
    let mut texts: BTreeSet<&str> = jobs.iter().map(|job| job.prompt.as_str()).collect();
    if options.settings.cfg != 1.0 {
        texts.insert(EMPTY);
    }
    let what = "encoding the prompts";
    let captions = encode_captions(&store, &files, device, &texts, &mut |done, total| {
        progress(what, done, total)
    })?;
    if let Some((text, reason)) = captions.refused.first() {
        return Err(Error::invalid(format!(
            "the prompt \"{text}\" cannot be used: {reason}"
        )));
    }
    report.encoded = captions.encoded;
    Ok(store)
}

/// The pictures of some jobs as bytes, row by row.
fn draw(
    pipeline: &mut Pipeline,
    store: &FeatureStore,
    jobs: &[SynthesisJob],
    options: &SynthesisOptions,
    go_on: &mut dyn FnMut() -> Result<()>,
) -> Result<Vec<Vec<u8>>> {
    let device = pipeline.device().clone();
    let feature = |text: &str| -> Result<Tensor> {
        let features = store.read(&store.key(&[text.as_bytes()]));
        let features =
            features.ok_or_else(|| Error::invalid(format!("the features of \"{text}\" in the cache are damaged")))?;
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
    let drawn = pipeline.denoise(&captions, noise, &options.settings, &mut |_| go_on())?;
    pipeline.pictures(&drawn)
}

/// Writes pictures and their lines.
struct Writer<'a> {
    folder: &'a Path,
    jobs: &'a [SynthesisJob],
    settings: Settings,
    extension: &'a str,
}

impl Writer<'_> {
    /// Writes batches until there are no more; each comes with the number of its first job. Returns the number of pictures.
    fn write_all(&self, batches: Receiver<(usize, Vec<Vec<u8>>)>, mut metadata: File) -> Result<usize> {
        let failed = |error| Error::io(self.folder.join(METADATA), error);
        let mut count = 0;
        for (first, pictures) in batches {
            let numbered: Vec<(usize, Vec<u8>)> = (first..).zip(pictures).collect();
            count += numbered.len();
            let lines = numbered
                .into_par_iter()
                .map(|(number, pixels)| self.write(number, pixels));
            let lines: Vec<Vec<u8>> = lines.collect::<Result<_>>()?;
            metadata.write_all(&lines.concat()).map_err(failed)?;
            metadata.sync_data().map_err(failed)?;
        }
        Ok(count)
    }

    /// Writes one picture, and returns its line.
    fn write(&self, number: usize, pixels: Vec<u8>) -> Result<Vec<u8>> {
        let job = &self.jobs[number];
        let file_name = format!("{:03}/{number:06}.{}", number / PER_FOLDER, self.extension);
        let path = self.folder.join(&file_name);
        let folder = files::folder_of(&path);
        fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, error))?;
        let image = RgbImage::new(self.settings.width, self.settings.height, pixels)?;
        write_image(&path, &image, &WriteOptions::default())?;
        let line = Line {
            file_name,
            prompt: job.prompt.clone(),
            seed: job.seed,
        };
        let mut line = serde_json::to_vec(&line).map_err(|error| Error::invalid(error.to_string()))?;
        line.push(b'\n');
        Ok(line)
    }
}
