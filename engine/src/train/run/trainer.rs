//! The loop.

mod between;
mod saving;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tempfile::TempDir;

use super::checkpoint::{Due, RunState};
use super::config::TrainConfig;
use super::feeder::{DeviceBatch, Feeder};
use super::forecast::Work;
use super::history::SAMPLES;
use super::journal::Journal;
use super::learning_rate::LearningRate;
use super::log::{Record, StartRecord};
use super::progress::Progress;
use super::ranks::RankObserver;
use super::resume::{Candidates, Resume, continued, find_candidates, still_due};
use super::saver::Saver;
use super::setup::Setup;
use super::speed::Interval;
use super::start::INIT;
use super::{Event, Observer, checkpoint, write_report};
use crate::data::{Item, Loader, LoaderOptions, PictureSize, Turn};
use crate::device::Device;
use crate::dist::World;
use crate::error::{Error, Result};
use crate::files::{FolderLock, remove_leftovers};
use crate::profile::{self, PartTimes};
use crate::tensor::Tensor;
use crate::train::{Ranks, StepNorm, TrainableModel};

/// Bytes of decoded pictures that may wait for the device.
const PREFETCH: usize = 2 << 30;

/// What came of a run.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Summary {
    /// Steps done.
    pub steps: u64,
    /// The mean loss of the last interval.
    pub loss: Option<f64>,
    /// The last validation loss.
    pub validation_loss: Option<f64>,
    /// The newest checkpoint.
    pub checkpoint: PathBuf,
    /// The report.
    pub report: PathBuf,
    /// The model over which the checkpoint's delta is merged.
    pub base: PathBuf,
}

/// A step that was submitted.
struct Submitted {
    losses: Vec<Tensor>,
    norm: StepNorm,
}

struct Trainer<'a> {
    config: &'a TrainConfig,
    run: &'a Path,
    device: &'a Device,
    ranks: &'a Ranks,
    observer: &'a mut dyn Observer,
    setup: &'a Setup,
    model: TrainableModel,
    loader: Loader,
    /// As of the last whole step.
    state: RunState,
    submitted: Vec<Submitted>,
    interval: Interval,
    rate: LearningRate,
    feeder: Feeder<'a>,
    /// On the first rank.
    journal: Option<Journal>,
    /// Times of the parts of steps, where they are asked for.
    profile: Option<PartTimes>,
    /// Operations of the model for a micro-batch, by height, width and longest caption.
    operations: HashMap<([usize; 2], usize), f64>,
    /// Writes checkpoints while training goes on.
    saver: Saver,
    /// Where ranks write their shares of one, on the first.
    place: Option<TempDir>,
    /// The step of the newest checkpoint.
    saved: Option<(u64, PathBuf)>,
    /// Whether a checkpoint was due when there was none to make, and why.
    owed: Option<String>,
    loss: Option<f64>,
    validation_loss: Option<f64>,
}

/// Trains by `config` in the folder `run` until its last step, as one of `ranks`: each takes micro-batches of its own, and all reach the
/// same weights. All of them see the same folder.
///
/// # Errors
/// When something is missing, damaged or does not fit, or another run writes to the folder, before the first step; when the loss
/// diverges, too much data is damaged, or what was trained is not finite at the end; when a rank is lost; [`Error::Interrupted`] when the
/// observer of any rank asks to stop, after saving.
pub fn train(
    config: &TrainConfig,
    run: &Path,
    device: &Device,
    resume: &Resume,
    ranks: &Ranks,
    observer: &mut dyn Observer,
) -> Result<Summary> {
    let world = &*ranks.world;
    let mut observer = RankObserver::new(ranks.world.clone(), observer);
    match train_among(config, run, device, resume, ranks, &mut observer) {
        Ok(summary) => world.leave().map(|()| summary),
        // All ranks have come to this.
        Err(Error::Interrupted) => world.leave().and(Err(Error::Interrupted)),
        Err(error) => {
            world.give_up(&error);
            Err(error)
        }
    }
}

fn train_among(
    config: &TrainConfig,
    run: &Path,
    device: &Device,
    resume: &Resume,
    ranks: &Ranks,
    observer: &mut dyn Observer,
) -> Result<Summary> {
    let _range = profile::range(c"run");
    let world = &*ranks.world;
    let mut progress = Progress { observer };
    let lock = world.on_first("lock of the folder", || {
        config.ensure_named(true)?;
        std::fs::create_dir_all(run).map_err(|error| Error::io(run, error))?;
        let lock = FolderLock::acquire(run, "l2p-train")?;
        checkpoint::remove_leftovers(run);
        remove_leftovers(run, Some(INIT));
        remove_leftovers(&run.join(SAMPLES), None);
        Ok(lock)
    })?;
    if lock.as_ref().is_some_and(|lock| !lock.is_held()) {
        progress.notice("this file system knows no locks: see to it that no other run writes to the same folder");
    }
    let candidates = world.together("checkpoints", find_candidates(run, resume))?;
    world.agree("configuration", format!("{:#}", all_keys(config)?).as_bytes())?;
    let setup = Setup::new(config, run, device, ranks, &mut progress)?;
    let mut trainer = Trainer::new(config, run, device, ranks, &setup, candidates, progress.observer)?;
    let outcome = trainer.run();
    trainer.finish(outcome)
}

/// A configuration with what it does not say.
fn all_keys(config: &TrainConfig) -> Result<Value> {
    serde_json::to_value(config).map_err(|error| Error::invalid(error.to_string()))
}

impl<'a> Trainer<'a> {
    /// Brings the model onto the device and everything to where it was.
    fn new(
        config: &'a TrainConfig,
        run: &'a Path,
        device: &'a Device,
        ranks: &'a Ranks,
        setup: &'a Setup,
        candidates: Candidates,
        observer: &'a mut dyn Observer,
    ) -> Result<Self> {
        let mut progress = Progress { observer };
        let world = &*ranks.world;
        let transformer = setup.transformer();
        let json = all_keys(config)?;
        world.agree("model", setup.model_identity.as_bytes())?;
        world.agree("data", setup.data_identity.as_bytes())?;
        let model = TrainableModel::load_among(
            &*transformer.spec,
            &transformer.checkpoint,
            device,
            &config.train_options(),
            ranks,
            &mut |done, total| progress.report("loading the model", done, total),
        );
        let mut model = world.together("model", model)?;
        model.train_for(setup.discrete.clone());
        let mut state = RunState::new(setup.data_identity.clone(), setup.model_identity.clone(), json.clone());
        state.objective = setup.trained.clone();
        let mut feeder = Feeder::new(config, device, setup.seeded, setup.discrete.clone());
        let mut probe = |model: &TrainableModel| setup.probe(model, &mut feeder);
        let resumed = candidates.restore(&mut model, &mut probe, world, &mut progress)?;
        if let Some(resumed) = &resumed {
            state = continued(resumed, config, state, &mut progress)?;
            state.due = world.decide("what is due", || Ok(still_due(run, state.step, state.due)))?;
        }
        state.ranks = world.size();
        tell_large_steps(config, world.size(), setup, &mut progress);
        let mut trainer = Trainer {
            loader: Loader::start(setup.set.clone(), loading(config, setup, world), state.position),
            rate: LearningRate::new(config),
            feeder,
            journal: world.on_first("log", || Journal::open(run, state.step))?,
            profile: config.profile.then(|| PartTimes::new(device)),
            operations: HashMap::new(),
            saver: Saver::new(),
            place: None,
            saved: resumed
                .as_ref()
                .map(|resumed| (state.step, resumed.folder().to_owned())),
            interval: Interval::begin(),
            submitted: Vec::new(),
            owed: None,
            loss: None,
            validation_loss: None,
            observer: progress.observer,
            config,
            run,
            device,
            ranks,
            setup,
            model,
            state,
        };
        trainer.observer.event(&Event::Begins {
            step: trainer.state.step,
            steps: config.steps,
            resumed: resumed.map(|resumed| resumed.folder().to_owned()),
        });
        let start = trainer.start_record(json);
        trainer.record(Record::Start(Box::new(start)));
        Ok(trainer)
    }

    /// What the log says of the part of the run that begins; `config` are all its keys.
    fn start_record(&self, config: Value) -> StartRecord {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let validation = self.setup.validation.as_ref();
        let all = self.setup.transformer().checkpoint.tensors().values();
        StartRecord {
            step: self.state.step,
            time: since_1970.as_secs_f64(),
            device: match self.device {
                Device::Cpu => "cpu".into(),
                Device::Cuda(cuda) => format!("{} {}", self.device, cuda.name()),
            },
            config,
            pictures: self.setup.set.records().len(),
            held_out: validation.map_or(0, |validation| validation.pictures()),
            noise: if self.setup.seeded { "seed" } else { "fresh" }.into(),
            trained_parameters: self.model.trained_parameters(),
            parameters: all.map(|tensor| tensor.elements() as u64).sum(),
        }
    }

    /// Steps, with everything between them that is due.
    fn run(&mut self) -> Result<()> {
        let due = |step: u64, every: u64| every > 0 && step.is_multiple_of(every);
        self.state.due.validation |= self.state.step == 0;
        self.do_due()?;
        self.prepare_to_save()?;
        self.interval = Interval::begin();
        let mut out_of_time = self.out_of_time()?;
        while self.state.step < self.config.steps && !out_of_time {
            let mut profile = self.profile.take();
            let outcome = match &mut profile {
                Some(profile) => profile.record(|| self.step()),
                None => self.step(),
            };
            self.profile = profile;
            outcome?;
            self.note_saved()?;
            let step = self.state.step;
            out_of_time = self.out_of_time()?;
            let last = step == self.config.steps || out_of_time;
            if due(step, self.config.log_every) || last {
                self.report_interval()?;
            }
            self.state.due = Due {
                validation: due(step, self.config.validate_every) || last,
                samples: due(step, self.config.sample_every) || last,
            };
            if self.state.due != Due::default() {
                self.paused(Self::do_due)?;
            }
            if (due(step, self.config.save_every) || self.owed.is_some()) && !last {
                self.paused(Self::save_when_good)?;
            }
        }
        if self.state.step < self.config.steps {
            let text = format!("the time is up (max_minutes) after {} steps", self.state.step);
            let step = self.state.step;
            self.record(Record::Notice { step, text });
        }
        Ok(())
    }

    /// Whether training has taken as long as it may, by the first rank's clock.
    fn out_of_time(&self) -> Result<bool> {
        let Some(minutes) = self.config.max_minutes else {
            return Ok(false);
        };
        let taken = || self.state.elapsed_seconds + self.interval.seconds();
        self.world().decide("time", || Ok(taken() >= minutes * 60.0))
    }

    fn world(&self) -> &'a World {
        &self.ranks.world
    }

    /// One optimizer step: batches forward and backward, then the update. Asked to stop before any of its batches, it leaves everything
    /// as the last whole step did.
    fn step(&mut self) -> Result<()> {
        let _range = profile::range(c"step");
        let (rank, ranks) = (self.world().rank() as u64, self.world().size() as u64);
        let mut pictures = self.state.pictures;
        let mut losses = Vec::with_capacity(self.config.accumulate);
        let batches = self.config.accumulate;
        for done in 0..batches {
            if done > 0 {
                self.observer.event(&Event::Batch { done, total: batches });
            }
            let items = self.next_batch()?;
            let count = items.len() as u64;
            let batch = {
                let _range = profile::range(c"feed");
                let first = pictures + rank * count;
                self.feeder.training(&self.setup.set, &items, first)?
            };
            pictures += count * ranks;
            self.interval.operations += self.operations_of(&batch)?;
            let weight = 1.0 / (batches as f32 * ranks as f32);
            losses.push(batch.with(|batch| match done + 1 == batches {
                true => self.model.accumulate_last(batch, weight),
                false => self.model.accumulate(batch, weight),
            })?);
        }
        let norm = {
            let _range = profile::range(c"optimizer");
            self.model.step(self.rate.at(self.state.step) as f32)?
        };
        self.submitted.push(Submitted { losses, norm });
        self.interval.steps += 1;
        self.interval.pictures += pictures - self.state.pictures;
        self.state.step += 1;
        self.state.pictures = pictures;
        self.state.position = self.loader.position();
        self.observer.event(&Event::Step { step: self.state.step });
        Ok(())
    }

    /// The items of this rank's next micro-batch, where all ranks have theirs and nobody wants to stop.
    fn next_batch(&mut self) -> Result<Vec<Item>> {
        let items = match self.observer.stop_requested() {
            true => Err(Error::Interrupted),
            false => {
                let _range = profile::range(c"data");
                self.loader.next_batch()
            }
        };
        match self.world().together("data", items) {
            // The data are at fault, not what was trained so far.
            Err(error) if !matches!(error, Error::Interrupted | Error::PeerLost { .. }) => {
                self.report_damages()?;
                self.save_when_good()?;
                Err(error)
            }
            outcome => outcome,
        }
    }

    /// Operations that the model needs for a micro-batch, those that recomputing repeats not counted.
    fn operations_of(&mut self, batch: &DeviceBatch) -> Result<f64> {
        let (size, caption_tokens) = batch.extent();
        if let Some(known) = self.operations.get(&(size, caption_tokens)) {
            return Ok(*known);
        }
        let cell = self.setup.sizes.cell();
        let work = Work {
            size: PictureSize {
                width: size[1] * cell,
                height: size[0] * cell,
            },
            caption_tokens,
            batch: self.config.batch,
            cuda: matches!(self.device, Device::Cuda(_)),
            division: self.ranks.division(),
        };
        let plan = self.setup.sizes.plan(&self.config.train_options(), &work)?;
        let parts = plan.arithmetic.iter();
        let operations = parts.map(|part| part.forward + part.inputs + part.weights).sum();
        self.operations.insert((size, caption_tokens), operations);
        Ok(operations)
    }

    /// Saves what should be saved, writes the report, and says how the run ended.
    fn finish(mut self, outcome: Result<()>) -> Result<Summary> {
        // A rank that failed alone, or whom others have left, takes part in nothing more; what others have written of a checkpoint
        // comes to nothing then.
        let together = matches!(outcome, Ok(()) | Err(Error::Interrupted)) || self.world().is_solo();
        if together {
            self.report_damages()?;
        }
        let step = self.state.step;
        // What is being written is written to its end, whatever happened.
        let written = if together { self.wait_for_save() } else { Ok(()) };
        let outcome = match outcome {
            Ok(()) | Err(Error::Interrupted) => written.and(outcome),
            Err(error) => {
                if let Err(lost) = written {
                    let text = format!("no checkpoint: {lost}");
                    self.record(Record::Notice { step, text });
                }
                Err(error)
            }
        };
        let outcome = match outcome {
            Ok(()) => self.save_at_end(),
            // What the last whole step left is on the device.
            Err(error @ Error::Interrupted) => self.save_at_break().and(Err(error)),
            Err(error) => Err(error),
        };
        let outcome = match outcome {
            Ok(()) | Err(Error::Interrupted) => self.record_profile().and(outcome),
            Err(error) => Err(error),
        };
        let text = match &outcome {
            Ok(()) => "done".to_owned(),
            Err(Error::Interrupted) => "stopped".to_owned(),
            Err(error) => error.to_string(),
        };
        self.record(Record::End { step, outcome: text });
        let report = match self.world().is_first() {
            true => write_report(self.run),
            false => Ok(PathBuf::new()),
        };
        outcome?;
        Ok(Summary {
            steps: step,
            loss: self.loss,
            validation_loss: self.validation_loss,
            checkpoint: self.saved.map(|(_, folder)| folder).unwrap_or_default(),
            report: report?,
            base: self.setup.paths().path.clone(),
        })
    }
}

/// How this rank loads its batches.
fn loading(config: &TrainConfig, setup: &Setup, world: &World) -> LoaderOptions {
    LoaderOptions {
        workers: setup.workers,
        memory: PREFETCH,
        batch: config.batch,
        seed: config.seed,
        caption_dropout: config.caption_dropout,
        source: setup.source.clone(),
        turn: Turn {
            rank: world.rank(),
            ranks: world.size(),
        },
    }
}

/// Says so when a step takes a picture more than once.
fn tell_large_steps(config: &TrainConfig, ranks: usize, setup: &Setup, progress: &mut Progress<'_>) {
    let (taken, pictures) = (config.pictures_per_step() * ranks as u64, setup.set.records().len());
    if taken > pictures as u64 {
        let ranks = if ranks > 1 {
            format!(" x ranks {ranks}")
        } else {
            String::new()
        };
        progress.notice(&format!(
            "a step takes {taken} pictures (batch {} x accumulate {}{ranks}) and the data set has {pictures}: each step takes them about \
             {} times",
            config.batch,
            config.accumulate,
            taken / pictures.max(1) as u64
        ));
    }
}
