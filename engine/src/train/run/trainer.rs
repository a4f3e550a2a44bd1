//! The loop.

use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::checkpoint::{self, Checkpoint, RunState, SaveOptions, Saved};
use super::config::{SaveType, TrainConfig};
use super::feeder::Feeder;
use super::guard::{StepOutcome, Verdict};
use super::learning_rate::LearningRate;
use super::log::{Record, RunLog, StartRecord, TrainRecord};
use super::setup::{Progress, Setup, sample_settings};
use super::speed::{Interval, peak_rate};
use super::tensorboard::{EventFile, Shown};
use super::{Event, Observer, write_report};
use crate::checkpoint::Float;
use crate::data::{Loader, LoaderOptions, Position};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::image_io::{WriteOptions, write_image};
use crate::profile;
use crate::tensor::Tensor;
use crate::train::{StepNorm, TrainableDit};

/// Bytes of decoded pictures that may wait for the device.
const PREFETCH: usize = 2 << 30;

/// Folders in the run's folder.
const EVENTS: &str = "events";
const SAMPLES: &str = "samples";

/// From where a run goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// From its newest checkpoint, if it has one.
    #[default]
    Auto,
    /// From nowhere; the run's folder must hold no checkpoint.
    Fresh,
    /// From this checkpoint's folder.
    From(PathBuf),
}

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
    observer: &'a mut dyn Observer,
    setup: &'a Setup,
    model: TrainableDit,
    loader: Loader,
    /// As of the last whole step.
    state: RunState,
    submitted: Vec<Submitted>,
    interval: Interval,
    rate: LearningRate,
    log: RunLog,
    events: EventFile,
    /// Whether it was said that the log cannot be written.
    log_failed: bool,
    /// The step of the newest checkpoint.
    saved: Option<(u64, PathBuf)>,
    loss: Option<f64>,
    validation_loss: Option<f64>,
}

/// Trains by `config` in the folder `run` until its last step.
///
/// # Errors
/// When something is missing, damaged or does not fit, before the first step; when the loss diverges or too much data is
/// damaged; [`Error::Interrupted`] when the observer asks to stop, after saving.
pub fn train(
    config: &TrainConfig,
    run: &Path,
    device: &Device,
    resume: &Resume,
    observer: &mut dyn Observer,
) -> Result<Summary> {
    let _range = profile::range(c"run");
    std::fs::create_dir_all(run).map_err(|error| Error::io(run, error))?;
    let mut progress = Progress { observer };
    let resumed = find_checkpoint(run, resume, &mut progress)?;
    let setup = Setup::new(config, run, device, &mut progress)?;
    let mut trainer = Trainer::new(config, run, device, &setup, resumed, progress.observer)?;
    let outcome = trainer.run();
    trainer.finish(outcome)
}

/// The checkpoint that the run goes on from.
fn find_checkpoint(run: &Path, resume: &Resume, progress: &mut Progress<'_>) -> Result<Option<Checkpoint>> {
    checkpoint::remove_leftovers(run);
    match resume {
        Resume::From(folder) => Checkpoint::open(folder).map(Some),
        Resume::Auto => {
            let (newest, refused) = Checkpoint::newest(run)?;
            for reason in refused {
                progress.notice(&format!("a checkpoint cannot be used: {reason}"));
            }
            Ok(newest)
        }
        Resume::Fresh => match checkpoint::list(run)?.last() {
            None => Ok(None),
            Some((_, folder)) => Err(Error::file(
                folder,
                "is a checkpoint of an earlier run: continue it (--resume auto), or choose another --out",
            )),
        },
    }
}

impl<'a> Trainer<'a> {
    /// Brings the model onto the device and everything to where it was.
    fn new(
        config: &'a TrainConfig,
        run: &'a Path,
        device: &'a Device,
        setup: &'a Setup,
        resumed: Option<Checkpoint>,
        observer: &'a mut dyn Observer,
    ) -> Result<Self> {
        let mut progress = Progress { observer };
        let transformer = setup.transformer();
        let mut model = TrainableDit::load(
            &transformer.checkpoint,
            device,
            &transformer.config,
            &config.train_options(),
            &mut |done, total| progress.report("loading the model", done, total),
        )?;
        let json = serde_json::to_value(config).map_err(|error| Error::invalid(error.to_string()))?;
        let mut state = RunState::new(setup.data_identity.clone(), setup.model_identity.clone(), json.clone());
        if let Some(resumed) = &resumed {
            resumed.restore(&mut model)?;
            state = continued(resumed, state, &mut progress)?;
        }
        let options = LoaderOptions {
            workers: setup.workers,
            memory: PREFETCH,
            batch: config.batch,
            seed: config.seed,
            caption_dropout: config.caption_dropout,
            source: setup.source.clone(),
        };
        let trained = model.trained().iter().map(|tensor| elements(&tensor.shape)).sum();
        let mut trainer = Trainer {
            loader: Loader::start(setup.set.clone(), options, state.position),
            rate: LearningRate::new(config),
            log: RunLog::open(run, state.step)?,
            events: EventFile::create(&run.join(EVENTS), if state.step == 0 { 0 } else { state.step + 1 })?,
            saved: resumed
                .as_ref()
                .map(|resumed| (state.step, resumed.folder().to_owned())),
            interval: Interval::begin(),
            submitted: Vec::new(),
            log_failed: false,
            loss: None,
            validation_loss: None,
            observer: progress.observer,
            config,
            run,
            device,
            setup,
            model,
            state,
        };
        trainer.observer.event(&Event::Begins {
            step: trainer.state.step,
            steps: config.steps,
            resumed: resumed.map(|resumed| resumed.folder().to_owned()),
        });
        trainer.record(Record::Start(Box::new(StartRecord {
            step: trainer.state.step,
            time: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs_f64(),
            device: match device {
                Device::Cpu => "cpu".into(),
                Device::Cuda(cuda) => format!("{device} {}", cuda.name()),
            },
            config: json,
            pictures: setup.set.records().len(),
            held_out: setup.validation.as_ref().map_or(0, |(_, pictures)| *pictures),
            noise: if setup.seeded { "seed" } else { "fresh" }.into(),
            trained_parameters: trained,
            parameters: transformer
                .checkpoint
                .tensors()
                .values()
                .map(|tensor| tensor.elements() as u64)
                .sum(),
        })));
        Ok(trainer)
    }

    /// Steps, with everything between them that is due.
    fn run(&mut self) -> Result<()> {
        let due = |step: u64, every: u64| every > 0 && step.is_multiple_of(every);
        if self.state.step == 0 {
            self.validate()?;
            self.draw_samples()?;
            self.interval = Interval::begin();
        }
        while self.state.step < self.config.steps {
            if self.observer.stop_requested() {
                return Err(Error::Interrupted);
            }
            self.step()?;
            let step = self.state.step;
            let last = step == self.config.steps;
            if due(step, self.config.log_every) || last {
                self.report_interval()?;
            }
            if due(step, self.config.validate_every) || last {
                self.paused(Self::validate)?;
            }
            if due(step, self.config.sample_every) || last {
                self.paused(Self::draw_samples)?;
            }
            if due(step, self.config.save_every) && !last {
                self.paused(Self::save_or_say)?;
            }
        }
        Ok(())
    }

    /// One optimizer step: batches forward and backward, then the update.
    fn step(&mut self) -> Result<()> {
        let _range = profile::range(c"step");
        let feeder = Feeder::new(self.config, self.device, self.setup.seeded);
        let mut pictures = self.state.pictures;
        let mut losses = Vec::with_capacity(self.config.accumulate);
        for _ in 0..self.config.accumulate {
            let items = {
                let _range = profile::range(c"data");
                self.loader.next_batch()
            };
            let items = match items {
                Ok(items) => items,
                // The data are at fault, not what was trained so far.
                Err(error) => {
                    self.report_damages();
                    self.save_or_say()?;
                    return Err(error);
                }
            };
            let batch = feeder.training(&self.setup.set, &items, pictures)?;
            pictures += items.len() as u64;
            let weight = 1.0 / self.config.accumulate as f32;
            losses.push(batch.with(|batch| self.model.accumulate(batch, weight))?);
        }
        let norm = self.model.step(self.rate.at(self.state.step) as f32)?;
        self.submitted.push(Submitted { losses, norm });
        self.interval.steps += 1;
        self.interval.pictures += pictures - self.state.pictures;
        self.state.step += 1;
        self.state.pictures = pictures;
        self.state.position = self.loader.position();
        self.observer.event(&Event::Step { step: self.state.step });
        Ok(())
    }

    /// Waits for the submitted steps and notes what came of them.
    fn collect(&mut self) -> Result<()> {
        for step in std::mem::take(&mut self.submitted) {
            let mut loss = 0.0;
            for part in &step.losses {
                loss += part.to_vec::<f32>()?[0] / step.losses.len() as f32;
            }
            let (norm, skipped) = step.norm.read()?;
            self.state.outcomes.push(StepOutcome { loss, norm, skipped });
        }
        Ok(())
    }

    /// A line of the log, and the guard's look at it.
    fn report_interval(&mut self) -> Result<()> {
        self.collect()?;
        let seconds = self.interval.seconds();
        let interval = std::mem::replace(&mut self.interval, Interval::begin());
        let outcomes = std::mem::take(&mut self.state.outcomes);
        let step = self.state.step;
        self.state.elapsed_seconds += seconds;
        let verdict = self.state.guard.look(self.config, step, &outcomes);
        let good = || outcomes.iter().filter(|outcome| !outcome.skipped);
        let mean = |value: fn(&StepOutcome) -> f32| match good().count() {
            0 => None,
            count => Some(good().map(|outcome| f64::from(value(outcome))).sum::<f64>() / count as f64),
        };
        let steps = interval.steps.max(1) as f64;
        let peak = peak_rate(self.device);
        let record = TrainRecord {
            step,
            pictures: self.state.pictures,
            epoch: self.state.position.epoch,
            loss: mean(|outcome| outcome.loss),
            grad_norm: mean(|outcome| outcome.norm),
            lr: self.rate.at(step - 1),
            skipped: self.state.guard.skipped(),
            seconds_per_step: seconds / steps,
            pictures_per_second: interval.pictures as f64 / seconds,
            mfu: peak.map(|peak| interval.operations / seconds / peak),
            peak_memory_bytes: self.device.memory_report().total.peak,
            data_wait: self.loader.take_waited().as_secs_f64() / seconds,
            elapsed_seconds: self.state.elapsed_seconds,
            eta_seconds: (self.config.steps - step) as f64 * seconds / steps,
        };
        self.device.reset_memory_peaks();
        self.loss = record.loss;
        self.report_damages();
        self.record(Record::Train(record));
        match verdict {
            Verdict::Fine => Ok(()),
            Verdict::Notice(text) => {
                self.record(Record::Notice { step, text });
                Ok(())
            }
            Verdict::Stop { reason, sound } => {
                if sound {
                    self.save_or_say()?;
                }
                Err(Error::invalid(reason))
            }
        }
    }

    fn report_damages(&mut self) {
        for damage in self.setup.set.damages().take_fresh() {
            self.record(Record::Damaged {
                step: self.state.step,
                what: damage.what,
                reason: damage.reason,
            });
        }
    }

    fn validate(&mut self) -> Result<()> {
        let Some((validation, _)) = &self.setup.validation else {
            return Ok(());
        };
        if self.config.validate_every == 0 {
            return Ok(());
        }
        let _range = profile::range(c"validation");
        let started = Instant::now();
        let feeder = Feeder::new(self.config, self.device, false);
        let mut progress = Progress {
            observer: &mut *self.observer,
        };
        let loss = validation.loss(&self.model, &feeder, &mut || progress.go_on())?;
        self.validation_loss = Some(loss);
        self.record(Record::Validation {
            step: self.state.step,
            loss,
            seconds: started.elapsed().as_secs_f64(),
        });
        Ok(())
    }

    fn draw_samples(&mut self) -> Result<()> {
        let Some(sheet) = self.setup.sheet.as_ref().filter(|_| self.config.sample_every > 0) else {
            return Ok(());
        };
        let _range = profile::range(c"samples");
        let mut progress = Progress {
            observer: &mut *self.observer,
        };
        let image = sheet.draw(self.model.dit(), &mut || progress.go_on())?;
        let folder = self.run.join(SAMPLES);
        std::fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, error))?;
        let step = self.state.step;
        let file = format!("{SAMPLES}/step-{step:08}.png");
        let path = self.run.join(&file);
        // What cannot be written now stops nothing; the next sheet may find room.
        if let Err(error) = write_image(&path, &image, &WriteOptions::default()) {
            let text = format!("no sheet of samples: {error}");
            self.record(Record::Notice { step, text });
            return Ok(());
        }
        let png = std::fs::read(&path).map_err(|error| Error::io(&path, error))?;
        let shown = Shown::Picture {
            png: &png,
            width: image.width(),
            height: image.height(),
        };
        let outcome = self.events.add(step, &[("samples", shown)]);
        self.log_outcome(outcome);
        self.record(Record::Samples { step, file });
        Ok(())
    }

    /// Saves; a disk that does not take it is reported, and the run goes on: the last checkpoint stays, and the next one may
    /// find room.
    fn save_or_say(&mut self) -> Result<()> {
        match self.save() {
            Err(error @ (Error::Io { .. } | Error::File { .. })) => {
                let text = format!("no checkpoint: {error}");
                let step = self.state.step;
                self.record(Record::Notice { step, text });
                Ok(())
            }
            outcome => outcome,
        }
    }

    /// Saves, unless nothing was trained or the newest checkpoint is of this step, and deletes old checkpoints.
    fn save(&mut self) -> Result<()> {
        let step = self.state.step;
        if step == 0 || self.saved.as_ref().is_some_and(|(saved, _)| *saved == step) {
            return Ok(());
        }
        let _range = profile::range(c"save");
        self.collect()?;
        let started = Instant::now();
        let options = SaveOptions {
            dtype: match self.config.save_dtype {
                SaveType::Bf16 => Float::Bf16,
                SaveType::F32 => Float::F32,
            },
            average: self.config.ema.is_some(),
        };
        let Saved { folder, bytes } = checkpoint::save(self.run, &self.model, &self.state, options)?;
        let kind = self.model.dit().config().kind;
        let settings = sample_settings(self.config, &self.setup.pipeline)?;
        super::manifest::write(&folder, self.setup.paths(), kind, &settings)?;
        self.saved = Some((step, folder.clone()));
        checkpoint::prune(self.run, self.config.keep_last, self.config.keep_every)?;
        let name = folder.strip_prefix(self.run).unwrap_or(&folder);
        self.record(Record::Checkpoint {
            step,
            folder: name.display().to_string(),
            bytes,
            seconds: started.elapsed().as_secs_f64(),
        });
        Ok(())
    }

    /// Does work whose time is not training's.
    fn paused(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        // The steps submitted so far are training's.
        self.device.synchronize()?;
        let started = Instant::now();
        let outcome = work(self);
        self.interval.exclude(started.elapsed());
        outcome
    }

    /// Writes a line to the log and the event file, and tells the observer.
    fn record(&mut self, record: Record) {
        let outcome = self.log.add(&record);
        self.log_outcome(outcome);
        let scalars: Vec<(&str, Shown<'_>)> = match &record {
            Record::Train(train) => {
                let optional = [
                    ("train/loss", train.loss),
                    ("train/grad_norm", train.grad_norm),
                    ("speed/mfu", train.mfu),
                ];
                let always = [
                    ("train/lr", train.lr),
                    ("train/skipped", train.skipped as f64),
                    ("speed/pictures_per_second", train.pictures_per_second),
                    ("speed/data_wait", train.data_wait),
                    ("memory/peak_bytes", train.peak_memory_bytes as f64),
                ];
                let optional = optional.into_iter().filter_map(|(tag, value)| Some((tag, value?)));
                optional
                    .chain(always)
                    .map(|(tag, value)| (tag, Shown::Scalar(value)))
                    .collect()
            }
            Record::Validation { loss, .. } => vec![("validation/loss", Shown::Scalar(*loss))],
            _ => Vec::new(),
        };
        if !scalars.is_empty() {
            let outcome = self.events.add(record.step(), &scalars);
            self.log_outcome(outcome);
        }
        self.observer.event(&Event::Record(&record));
    }

    /// Says once that the log cannot be written; training goes on without.
    fn log_outcome(&mut self, outcome: Result<()>) {
        if let Err(error) = outcome
            && !std::mem::replace(&mut self.log_failed, true)
        {
            self.observer
                .event(&Event::Notice(&format!("the log is incomplete: {error}")));
        }
    }

    /// Saves what should be saved, writes the report, and says how the run ended.
    fn finish(mut self, outcome: Result<()>) -> Result<Summary> {
        self.report_damages();
        let step = self.state.step;
        let outcome = match outcome {
            Ok(()) => self.save(),
            // What is on the device is good.
            Err(error @ Error::Interrupted) => self.save().and(Err(error)),
            Err(error) => Err(error),
        };
        let text = match &outcome {
            Ok(()) => "done".to_owned(),
            Err(Error::Interrupted) => "stopped".to_owned(),
            Err(error) => error.to_string(),
        };
        self.record(Record::End { step, outcome: text });
        let report = write_report(self.run);
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

/// The state of a checkpoint, made to fit the configuration; `fresh` is that of a run that begins.
fn continued(resumed: &Checkpoint, fresh: RunState, progress: &mut Progress<'_>) -> Result<RunState> {
    let state = resumed.state.clone();
    if state.model != fresh.model {
        return Err(Error::file(
            resumed.folder(),
            "belongs to a run that began from another model: name that one again, or choose another --out",
        ));
    }
    let position = match state.data == fresh.data {
        true => state.position,
        false => {
            progress.notice("the data, their sizes, the batch or the seed changed: the run goes on with a new epoch");
            Position {
                epoch: state.position.epoch + 1,
                batch: 0,
            }
        }
    };
    Ok(RunState {
        position,
        data: fresh.data,
        config: fresh.config,
        ..state
    })
}

fn elements(shape: &[usize]) -> u64 {
    shape.iter().product::<usize>() as u64
}
