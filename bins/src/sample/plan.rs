//! What all ranks draw together: the same on all of them, since the first one looks at what is there and all agree on the rest.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use l2p_engine::dist::World;
use l2p_engine::flow::noise_source::NoiseSource;
use l2p_engine::image_io::{self, WeightSettings};
use l2p_engine::limits::{Batch, Side, Steps};
use l2p_engine::pipeline::{Asked, Batching, ModelFiles, Settings};
use l2p_engine::serve::Event;

use super::arguments::Arguments;
use super::jobs::{self, Job};
use super::manifest::Manifest;
use super::sets::Set;
use super::start::Start;
use super::{count, found, go_on, notice};
use crate::prompts;

/// See the module's head comment.
pub struct Plan {
    /// All pictures that the arguments ask for.
    pub jobs: Vec<Job>,
    /// The numbers of those that are not there yet.
    pub missing: Vec<usize>,
    /// Size, steps, shift and guidance.
    pub settings: Settings,
    /// The generator of the noise.
    pub rng: NoiseSource,
    /// What pictures say of the model.
    pub model: String,
    /// How weights are kept, where not in the compute type.
    pub weights: Option<WeightSettings>,
    /// What all pictures begin with, if not with noise alone.
    pub start: Option<Start>,
    /// Width and height of the pictures that are written: those of the settings, or of what is kept of the start.
    pub shown: [usize; 2],
    /// Pictures at once; 0 until it is known.
    pub batch: usize,
}

impl Plan {
    /// The plan for these pictures, as one of the ranks makes it.
    ///
    /// # Errors
    /// When settings make no sense, a picture that is there was drawn otherwise, the device has no room, or ranks are to draw different
    /// things.
    pub fn new(
        arguments: &Arguments,
        set: Option<&Set>,
        jobs: Vec<Job>,
        files: &mut ModelFiles,
        world: &World,
    ) -> anyhow::Result<Self> {
        let settings = settings(arguments, files, world)?;
        let rng = arguments.rng.unwrap_or_default();
        let model = jobs::published(arguments.model.as_deref().unwrap_or(Path::new("")));
        let start = arguments.start.read(files, &settings)?;
        agree(&jobs, files, (&settings, start.as_ref()), rng, world)?;
        if let Some(set) = set {
            world.on_first("manifest", || {
                let manifest = Manifest::of(arguments, set, (&model, &settings, rng), files)?;
                manifest.ensure_same(&set.folder).map_err(crate::as_engine)
            })?;
        }
        let mut plan = Plan {
            missing: (0..jobs.len()).collect(),
            jobs,
            settings,
            rng,
            model,
            weights: arguments.weights.settings(),
            shown: start.as_ref().map_or([settings.width, settings.height], Start::shown),
            start,
            batch: 0,
        };
        if arguments.skip_existing {
            plan.missing = world.first_decides("pictures that are there", || {
                found::missing(&plan.jobs, &|job| plan.described(job), &mut || {
                    world.work();
                    go_on(world, &Event::Waiting)
                })
            })?;
        }
        let most = plan.missing.len().max(1);
        let batch = match arguments.batch.map(Batch::get) {
            Some(batch) => batch.min(most),
            // So that every rank has something to draw, if there is enough.
            None if arguments.memory.vram.is_some() => 1,
            None => files.batch_size(&settings, most.div_ceil(world.size()), Batching::PROMPT)?,
        };
        let batch = world.decide("batch", || Ok(batch))?;
        if let Some(note) = arguments
            .memory
            .fit(files, &settings, batch)?
            .filter(|_| world.is_first())
        {
            notice(&note);
        }
        files.ensure_room(&settings, batch)?;
        plan.batch = batch;
        Ok(plan)
    }

    /// What is written into a job's picture.
    pub fn described(&self, job: &Job) -> image_io::Settings {
        let [width, height] = self.shown;
        image_io::Settings {
            prompt: job.prompt.clone(),
            negative: job.negative.clone(),
            seed: job.seed,
            steps: self.settings.steps,
            cfg: self.settings.cfg,
            shift: self.settings.shift,
            width,
            height,
            model: self.model.clone(),
            rng: self.rng.to_string(),
            solver: self.settings.solver.noted(),
            weights: self.weights.clone(),
            start: self.start.as_ref().map(|start| start.settings.clone()),
        }
    }

    /// Whether there is something to move away from.
    pub fn guided(&self) -> bool {
        self.settings.cfg != 1.0
    }

    /// Batches of all ranks.
    pub fn batches(&self) -> usize {
        self.missing.len().div_ceil(self.batch)
    }

    /// Says what is about to be drawn.
    pub fn announce(&self, files: &ModelFiles, world: &World) {
        let ranks = match world.size() {
            1 => String::new(),
            ranks => format!("{ranks} ranks, the first on "),
        };
        crate::say(format_args!(
            "{} {}x{} on {ranks}{}: {}{}, shift {}, cfg {}",
            count(self.jobs.len(), "picture"),
            self.shown[0],
            self.shown[1],
            files.device(),
            count(self.settings.steps, "step"),
            self.settings.solver.in_words(),
            self.settings.shift,
            self.settings.cfg
        ));
        let there = self.jobs.len() - self.missing.len();
        if there > 0 {
            notice(&format!("{} of them are there, {} missing", there, self.missing.len()));
        }
        let busy = self.batches();
        if (1..world.size()).contains(&busy) {
            notice(&format!(
                "with {} at once only {busy} of {} ranks have something to draw",
                self.batch,
                world.size()
            ));
        }
        if let Some(word) = prompts::word_on_guidance(self.settings.cfg) {
            notice(&word);
        }
    }
}

/// The settings: what was asked for, then what the model says. Sides are rounded up to what the model can draw.
fn settings(arguments: &Arguments, files: &ModelFiles, world: &World) -> anyhow::Result<Settings> {
    let tell = |notes: &[String]| {
        let heard = notes.iter().filter(|_| world.is_first());
        heard.for_each(|note| notice(note));
    };
    tell(&files.notes()?);
    let size = arguments.start.size()?;
    let side = |given: Option<Side>, axis: usize| given.map(Side::get).or(size.map(|size| size[axis]));
    let settings = files.settings(&Asked {
        width: side(arguments.width, 0),
        height: side(arguments.height, 1),
        steps: arguments.steps.map(Steps::get),
        shift: arguments.shift,
        cfg: arguments.cfg,
        solver: arguments.solver,
    })?;
    let (settings, notes) = files.rounded(settings);
    // Of a picture that is kept its own size comes back.
    if size.is_none() || arguments.width.is_some() || arguments.height.is_some() {
        tell(&notes);
    }
    Ok(settings)
}

/// Sees to it that all ranks draw the same, with the same model.
fn agree(
    jobs: &[Job],
    files: &ModelFiles,
    (settings, start): (&Settings, Option<&Start>),
    rng: NoiseSource,
    world: &World,
) -> anyhow::Result<()> {
    if world.is_solo() {
        return Ok(());
    }
    let mut pictures = DefaultHasher::new();
    jobs.hash(&mut pictures);
    let (pictures, model) = (pictures.finish(), files.transformer().checkpoint.identity()?);
    let weights = files.trunk();
    let start = start.map(|start| &start.settings);
    let asked = format!(
        "{settings:?}\n{start:?}\n{rng}\n{weights:?}\nprompts, seeds and names {pictures:x}\nmodel {model:02x?}"
    );
    Ok(world.agree("settings", asked.as_bytes())?)
}
