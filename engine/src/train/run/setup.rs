//! What stands before the first step: model, data, captions, latents, all checked and on their places.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::choices::Noise;
use super::config::TrainConfig;
use super::feeder::Feeder;
use super::forecast::{ModelSizes, Work, ensure_room};
use super::progress::Progress;
use super::samples::Sheet;
use super::start::starting_model;
use super::validation::Validation;
use crate::checkpoint::{ModelPaths, Transformer};
use crate::data::{
    DataSet, FeatureStore, ItemSource, Latents, PictureSize, Room, encode_captions_among, encode_latents, hex,
};
use crate::device::{Device, MemoryTag};
use crate::dist::World;
use crate::error::{Error, Result};
use crate::flow::noise_source::NoiseSource;
use crate::flow::schedule::Schedule;
use crate::flow::solver::Solver;
use crate::model::objective::{Discrete, Trained};
use crate::model::vae::VaeEncoder;
use crate::pipeline::{Pipeline, PromptFiles, Settings};
use crate::train::{Division, Ranks, TrainableModel};

/// The most decoding threads where the configuration does not say.
const MOST_WORKERS: usize = 16;

/// The share of free host memory that keeps what was loaded, where the configuration does not say.
const HOST_CACHE_SHARE: f64 = 0.25;

/// The caption of a picture whose own is left out, and what guidance moves away from.
const EMPTY: &str = "";

/// Everything that a run needs but the model on its device.
pub struct Setup {
    /// The model that training begins from.
    pub pipeline: Pipeline,
    /// The pictures to train on.
    pub set: Arc<DataSet>,
    /// Where their items come from.
    pub source: ItemSource,
    /// Decoding threads.
    pub workers: usize,
    /// Whether a picture's noise is that of its own seed.
    pub seeded: bool,
    /// The pictures that are held out.
    pub validation: Option<Validation>,
    /// What the model is trained for.
    pub trained: Trained,
    /// The same where it is not flow matching.
    pub discrete: Option<Arc<Discrete>>,
    /// The sheet of samples.
    pub sheet: Option<Sheet>,
    /// A hash of all that decides which pictures are in which batch.
    pub data_identity: String,
    /// A hash of the model that training begins from.
    pub model_identity: String,
    /// The model's sizes.
    pub(super) sizes: ModelSizes,
}

impl Setup {
    /// Opens and checks everything for one of the ranks. Captions and latents that are not in the cache are encoded, by each rank a share.
    ///
    /// # Errors
    /// Whatever is missing, damaged or does not fit; when the user asks to stop, on all ranks.
    pub fn new(
        config: &TrainConfig,
        run: &Path,
        device: &Device,
        ranks: &Ranks,
        progress: &mut Progress<'_>,
    ) -> Result<Self> {
        let world = &*ranks.world;
        let (pipeline, (train, held_out)) = world.first_then_others("preparation", || {
            let paths = starting_model(config, run, progress)?;
            let pipeline = Pipeline::open(paths, device.clone(), false)?;
            tell_rounding(config, &pipeline, progress)?;
            let data = open_data(config, &pipeline, progress)?;
            Ok((pipeline, data))
        })?;
        // Shares are parts of the same whole.
        world.agree("data", data_identity(config, &train).as_bytes())?;
        let seeded = is_seeded(config, &train)?;
        let settings = sample_settings(config, &pipeline)?;
        let (trained, discrete) = objective(config, pipeline.trained(), progress)?;
        pipeline.notes()?.iter().for_each(|note| progress.notice(note));
        let mut data = Data {
            config,
            device,
            pipeline: &pipeline,
            world,
            cache: config.cache.clone().unwrap_or_else(|| run.join("cache")),
            train,
            held_out,
        };
        let guided = settings.cfg != 1.0;
        let (captions, longest) = data.encode_captions(guided, progress)?;
        let sizes = ModelSizes::of(pipeline.transformer(), pipeline.paths().vae.as_deref())?;
        ensure_room(&sizes, config, &data.largest_batch(longest, ranks.division()), device)?;
        let [latents, held_out_latents] = data.encode_latents(progress)?;
        let Data { train, held_out, .. } = data;
        let room = Room::new(host_cache(config)?);
        let torch_noise = seeded && config.rng == NoiseSource::Torch;
        let source = ItemSource::new(captions.clone(), latents, torch_noise, &room);
        let held_out = held_out.map(|set| {
            let source = ItemSource::new(captions.clone(), held_out_latents, false, &room);
            Validation::new(set, source, config.batch)
        });
        let feature = |text: &str| {
            let features = captions.read(&captions.key(&[text.as_bytes()]));
            features.ok_or_else(|| Error::invalid(format!("the features of \"{text}\" in the cache are damaged")))
        };
        let sheet = match config.sample_prompts.is_empty() {
            true => None,
            false => Some(Sheet {
                settings,
                trained: trained.clone(),
                rng: config.rng,
                seed: config.sample_seed,
                captions: config
                    .sample_prompts
                    .iter()
                    .map(|text| feature(text))
                    .collect::<Result<_>>()?,
                negative: guided.then(|| feature(EMPTY)).transpose()?,
                vae: pipeline
                    .vae_files()
                    .map(|(config, checkpoint)| (config.clone(), checkpoint.clone())),
            }),
        };
        Ok(Setup {
            data_identity: data_identity(config, &train),
            model_identity: hex(&pipeline.transformer().checkpoint.identity()?),
            set: Arc::new(train),
            source,
            workers: config.workers.unwrap_or_else(default_workers),
            seeded,
            trained,
            discrete,
            validation: held_out.transpose()?,
            sheet,
            sizes,
            pipeline,
        })
    }

    /// The loss of `model` on a picture of the training set, with noise that is always the same; `None` where none of the first
    /// pictures can be loaded.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn probe(&self, model: &TrainableModel, feeder: &mut Feeder<'_>) -> Result<Option<f32>> {
        /// Pictures that are tried; more than these are damaged in no set that a run accepts.
        const TRIED: usize = 16;
        let records = self.set.records().iter().enumerate().take(TRIED);
        let mut items =
            records.filter_map(|(picture, record)| self.source.load(&self.set, picture, &record.caption).ok());
        let Some(item) = items.next() else { return Ok(None) };
        let batch = feeder.validation(&[item], 0, 1)?;
        let loss = batch.with(|batch| model.evaluate(batch))?.to_vec::<f32>()?;
        Ok(loss.first().copied())
    }

    /// The transformer that training begins from.
    pub fn transformer(&self) -> &Transformer {
        self.pipeline.transformer()
    }

    /// Where the model's parts are.
    pub fn paths(&self) -> &ModelPaths {
        self.pipeline.paths()
    }
}

/// Bytes of host memory for what was loaded.
fn host_cache(config: &TrainConfig) -> Result<usize> {
    let bytes = match config.host_cache_gb {
        Some(gigabytes) => gigabytes * 1e9,
        None => Device::Cpu.available_memory()? as f64 * HOST_CACHE_SHARE,
    };
    Ok(bytes as usize)
}

/// All processors but the one that drives the device.
fn default_workers() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    processors.saturating_sub(1).clamp(1, MOST_WORKERS)
}

/// Says so when the model's own size is rounded up to one that it takes.
fn tell_rounding(config: &TrainConfig, pipeline: &Pipeline, progress: &mut Progress<'_>) -> Result<()> {
    let (defaults, multiple) = (pipeline.defaults()?, pipeline.size_multiple());
    let sides = [defaults.width, defaults.height];
    let rounded = sides.map(|side| side.next_multiple_of(multiple));
    let given = config.size.is_some() || config.max_pixels.is_some() || !config.buckets.is_empty();
    if !given && sides != rounded {
        progress.notice(&format!(
            "the model's own size, {}x{}, is no multiple of {multiple}: pictures and samples are of {}x{}",
            sides[0], sides[1], rounded[0], rounded[1]
        ));
    }
    Ok(())
}

/// What the model is trained for; says so when it is another objective than it was.
fn objective(
    config: &TrainConfig,
    source: &Trained,
    progress: &mut Progress<'_>,
) -> Result<(Trained, Option<Arc<Discrete>>)> {
    let trained = config.trained(source)?;
    if trained != *source {
        progress.notice(&format!(
            "the model was trained for {source} and is trained for {trained} from now on"
        ));
    }
    let discrete = Discrete::of(&trained, config.shift)?.map(Arc::new);
    Ok((trained, discrete))
}

/// The size and settings of samples. The size is that of the training pictures where they have only one.
///
/// # Errors
/// When the model's defaults cannot be read, or a setting makes no sense.
pub(super) fn sample_settings(config: &TrainConfig, pipeline: &Pipeline) -> Result<Settings> {
    let trained = config.trained(pipeline.trained())?;
    let defaults = pipeline.defaults()?;
    let multiple = pipeline.size_multiple();
    let size = config.size.unwrap_or(PictureSize {
        width: defaults.width.next_multiple_of(multiple),
        height: defaults.height.next_multiple_of(multiple),
    });
    let settings = Settings {
        width: size.width,
        height: size.height,
        steps: config.sample_steps.unwrap_or(defaults.steps),
        shift: config.shift as f32,
        cfg: config.sample_cfg.unwrap_or(defaults.cfg),
        solver: match config.sample_solver {
            Some(solver) => solver,
            // The model's own choice, where that is one for what it is trained for.
            None if defaults.solver.ensure_for(&trained).is_ok() => defaults.solver,
            None => Solver::default_of(&trained),
        },
    };
    settings.check()?;
    Schedule::of(&trained, settings.solver, settings.steps, config.shift)?;
    Ok(settings)
}

/// The pictures to train on and those that are held out.
fn open_data(
    config: &TrainConfig,
    pipeline: &Pipeline,
    progress: &mut Progress<'_>,
) -> Result<(DataSet, Option<DataSet>)> {
    let multiple = pipeline.size_multiple();
    let defaults = pipeline.defaults()?;
    let sizing = config.sizing(PictureSize {
        width: defaults.width.next_multiple_of(multiple),
        height: defaults.height.next_multiple_of(multiple),
    });
    let mut open = |path: &Path| {
        DataSet::open(path, &sizing, multiple, config.max_damaged, &mut |done, total| {
            progress.report("reading the pictures' sizes", done, total)
        })
    };
    let all = open(&config.data)?;
    let (train, held_out) = match &config.validation {
        Some(path) => (all, Some(open(path)?)),
        None if config.held_out > 0 => {
            let (train, held_out) = all.hold_out(config.held_out, config.seed)?;
            (train, Some(held_out))
        }
        None => (all, None),
    };
    // One sentence is enough where both are of the same pictures.
    let mut notes: Vec<&String> = train.notes().iter().collect();
    for note in held_out.iter().flat_map(DataSet::notes) {
        if !notes.contains(&note) {
            notes.push(note);
        }
    }
    notes.into_iter().for_each(|note| progress.notice(note));
    Ok((train, held_out))
}

/// Whether a picture's noise is that of its own seed.
fn is_seeded(config: &TrainConfig, set: &DataSet) -> Result<bool> {
    let without = set.records().iter().find(|record| record.seed.is_none());
    match (config.noise, without) {
        (Noise::Fresh, _) | (Noise::Auto, Some(_)) => Ok(false),
        (Noise::Auto | Noise::Seed, None) => Ok(true),
        (Noise::Seed, Some(record)) => Err(Error::invalid(format!(
            "noise = \"seed\", but {} has no seed in the metadata; use \"fresh\" or \"auto\"",
            record.name
        ))),
    }
}

/// Data on their way through the encoders.
struct Data<'a> {
    config: &'a TrainConfig,
    device: &'a Device,
    pipeline: &'a Pipeline,
    world: &'a World,
    cache: PathBuf,
    train: DataSet,
    held_out: Option<DataSet>,
}

impl Data<'_> {
    /// The store of all captions that the run will need, and the tokens of the longest.
    fn encode_captions(&mut self, guided: bool, progress: &mut Progress<'_>) -> Result<(FeatureStore, usize)> {
        let spec = self.pipeline.spec();
        let files = PromptFiles::open(self.pipeline.paths(), self.device, spec.caption_width(), spec.readout())?;
        let store = FeatureStore::open(&self.cache.join("captions"), &files.identity(self.device)?)?;
        let sets = [Some(&self.train), self.held_out.as_ref()];
        let records = sets.into_iter().flatten().flat_map(DataSet::records);
        let mut texts: BTreeSet<&str> = records.map(|record| record.caption.as_str()).collect();
        texts.extend(self.config.sample_prompts.iter().map(String::as_str));
        if self.config.caption_dropout > 0.0 || guided {
            texts.insert(EMPTY);
        }
        let what = "encoding the captions";
        let report = encode_captions_among(self.world, &store, &files, self.device, &texts, &mut |done, total| {
            progress.report(what, done, total)
        })?;
        if report.cut > 0 {
            progress.notice(&format!(
                "{} of {} captions are longer than the text encoder reads; their ends are cut off",
                report.cut,
                texts.len()
            ));
        }
        drop(texts);
        self.train.refuse_captions(&report.refused)?;
        if let Some(held_out) = &mut self.held_out {
            held_out.refuse_captions(&report.refused)?;
        }
        Ok((store, report.longest))
    }

    /// The micro-batch that takes most memory.
    fn largest_batch(&self, caption_tokens: usize, division: Division) -> Work {
        let sizes = [Some(&self.train), self.held_out.as_ref()];
        let sizes = sizes.into_iter().flatten().flat_map(DataSet::sizes).copied();
        let multiple = self.pipeline.size_multiple();
        Work {
            size: sizes.max_by_key(|size| size.pixels()).unwrap_or(PictureSize {
                width: multiple,
                height: multiple,
            }),
            caption_tokens,
            batch: self.config.batch,
            cuda: matches!(self.device, Device::Cuda(_)),
            division,
        }
    }

    /// The latents of both sets, for a latent model.
    fn encode_latents(&self, progress: &mut Progress<'_>) -> Result<[Option<Latents>; 2]> {
        let Some((vae, checkpoint)) = self.pipeline.vae_files() else {
            return Ok([None, None]);
        };
        let mut maker = Sha256::new();
        maker.update(format!("{vae:?} {}", self.device.compute_dtype()));
        maker.update(checkpoint.identity()?);
        let store = FeatureStore::open(&self.cache.join("latents"), &maker.finalize())?;
        let load = || {
            let _tag = MemoryTag::Weights.scope();
            VaeEncoder::load(checkpoint, self.device, vae).map_err(|error| match error {
                Error::Invalid(reason) => Error::file(checkpoint.path(), reason),
                error => error,
            })
        };
        let mut encode = |set: &DataSet| {
            let what = "encoding the pictures";
            let keys = encode_latents(self.world, &store, set, self.device, &load, &mut |done, total| {
                progress.report(what, done, total)
            })?;
            Ok::<_, Error>(Some((store.clone(), keys)))
        };
        let train = encode(&self.train)?;
        let held_out = match &self.held_out {
            Some(set) => encode(set)?,
            None => None,
        };
        Ok([train, held_out])
    }
}

/// A hash of all that decides which pictures are in which batch.
fn data_identity(config: &TrainConfig, set: &DataSet) -> String {
    let mut hash = Sha256::new();
    hash.update(format!("{} {} {};", config.seed, config.batch, config.caption_dropout));
    for (record, size) in set.records().iter().zip(set.sizes()) {
        hash.update(format!(
            "{:?} {:?} {:?} {size};",
            record.name, record.caption, record.seed
        ));
    }
    hex(&hash.finalize())
}
