//! A model as it lies on disk, opened and checked: what it is, what it draws, and what that takes. No weights are loaded; nothing here
//! changes, so that any thread may ask.

use super::prompts::PromptFiles;
use super::settings::{Asked, Batching, Settings};
use crate::checkpoint::{Checkpoint, EstimateInput, MemoryEstimate, ModelPaths, Transformer, open_vae};
use crate::device::{Device, format_bytes};
use crate::error::{Error, Result};
use crate::flow::schedule::Schedule;
use crate::flow::solver::Solver;
use crate::model::config::{ModelKind, VaeConfig};
use crate::model::objective::{Prediction, Trained};
use crate::model::{DeviceLimits, Precision, Spec};

/// Steps where neither user nor model says: enough for a model that was not distilled.
const DEFAULT_STEPS: usize = 28;

/// The shift where neither user nor model says.
const DEFAULT_SHIFT: f32 = 3.0;

/// GPU memory that libraries, kernels and recordings take beside tensors.
const LIBRARIES_BYTES: u64 = 400_000_000;

/// A model's files, and the device that it is to run on.
pub struct ModelFiles {
    device: Device,
    paths: ModelPaths,
    transformer: Transformer,
    trained: Trained,
    /// A latent model's.
    vae: Option<(VaeConfig, Checkpoint)>,
    /// How the weights of the transformer's and of the text encoder's blocks are kept.
    trunk: Precision,
    text: Precision,
    /// Bytes of GPU memory for weights and activations; `None` for what there is.
    limit: Option<u64>,
}

impl ModelFiles {
    /// Opens the model at `paths`: reads configurations and headers.
    ///
    /// # Errors
    /// When a part is missing, damaged, does not fit the others, or has sizes that the device's kernels cannot take.
    pub fn open(paths: ModelPaths, device: Device) -> Result<Self> {
        let transformer = paths.open_transformer()?;
        transformer.spec.ensure_runs_on(&device)?;
        let vae = match transformer.spec.geometry().kind {
            ModelKind::Latent => {
                let (config, checkpoint) = open_vae(paths.vae()?)?;
                config.ensure_runs_on(&device)?;
                Some((config, checkpoint))
            }
            ModelKind::Pixel => None,
        };
        Ok(ModelFiles {
            device,
            trained: paths.trained()?,
            paths,
            transformer,
            vae,
            trunk: Precision::default(),
            text: Precision::default(),
            limit: None,
        })
    }

    /// The same, with the weights of the transformer's blocks and of the text encoder's kept as these say.
    ///
    /// # Errors
    /// When a pattern of what to keep fits no tensor of the transformer.
    pub fn kept_in(mut self, trunk: Precision, text: Precision) -> Result<Self> {
        trunk.ensure_used(&self.spec().metas())?;
        (self.trunk, self.text) = (trunk, text);
        Ok(self)
    }

    /// Sees to it that drawing `batch` pictures of this size takes at most `limit` bytes of GPU memory as its driver counts them (`None`:
    /// what is free): main blocks that do not fit stay in host memory, and so do layers of the text encoder. Returns how many main blocks
    /// stay there.
    ///
    /// # Errors
    /// On the CPU; for a family whose blocks cannot; and when it does not fit however many stay there.
    pub fn fit(&mut self, limit: Option<u64>, settings: &Settings, batch: usize) -> Result<usize> {
        let Device::Cuda(device) = &self.device else {
            return Err(Error::invalid(
                "--vram is about a GPU's memory, but this runs on the CPU: leave it out, or choose a GPU (--device cuda)",
            ));
        };
        let left = match limit {
            None => device.available_memory()?.saturating_sub(LIBRARIES_BYTES),
            // What the process holds by now is the driver's own.
            Some(limit) => limit.saturating_sub(device.driver_memory_in_use()? + LIBRARIES_BYTES),
        };
        let metas = self.spec().metas();
        let activations = self.parts(settings, batch).1;
        let blocks = self.spec().main_blocks();
        let mut trunk = self.trunk.clone();
        let kept = trunk.fit(
            "the transformer",
            &metas,
            blocks,
            &self.device,
            activations as f64,
            left,
        )?;
        if kept > 0 && !self.spec().streams() {
            return Err(Error::invalid(
                "the weights of a model of this family cannot stay in host memory: allow it more GPU memory (--vram)",
            ));
        }
        (self.trunk, self.limit) = (trunk, Some(left));
        Ok(kept)
    }

    /// Bytes of host memory in which main blocks stay.
    pub fn host_bytes(&self) -> u64 {
        let blocks = self
            .trunk
            .streamed_blocks(&self.spec().metas(), self.device.compute_dtype().size());
        blocks.iter().map(|bytes| *bytes as u64).sum()
    }

    /// How the weights of the transformer's blocks are kept.
    pub fn trunk(&self) -> &Precision {
        &self.trunk
    }

    /// The device that the model runs on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Where the model's parts are.
    pub fn paths(&self) -> &ModelPaths {
        &self.paths
    }

    /// The transformer's files.
    pub fn transformer(&self) -> &Transformer {
        &self.transformer
    }

    /// What the transformer was trained for.
    pub fn trained(&self) -> &Trained {
        &self.trained
    }

    /// The levels that a picture of these settings visits.
    ///
    /// # Errors
    /// When the settings make none, or the solver is none for this model.
    pub fn schedule(&self, settings: &Settings) -> Result<Schedule> {
        Schedule::of(
            &self.trained,
            settings.solver,
            settings.steps,
            f64::from(settings.shift),
        )
    }

    /// What the transformer is.
    pub fn spec(&self) -> &dyn Spec {
        &*self.transformer.spec
    }

    /// The VAE's files, of a latent model.
    pub fn vae_files(&self) -> Option<(&VaeConfig, &Checkpoint)> {
        self.vae.as_ref().map(|(config, checkpoint)| (config, checkpoint))
    }

    fn vae_config(&self) -> Option<&VaeConfig> {
        self.vae.as_ref().map(|(config, _)| config)
    }

    /// Pixels along the side of what the transformer draws as one cell: 1, or those of a latent.
    pub fn cell(&self) -> usize {
        self.vae_config().map_or(1, VaeConfig::downsampling)
    }

    /// The text encoder's files.
    ///
    /// # Errors
    /// Saying how to name a part that is missing, or what is damaged or does not fit.
    pub fn prompt_files(&self) -> Result<PromptFiles<'_>> {
        let files = PromptFiles::open(
            &self.paths,
            &self.device,
            self.spec().caption_width(),
            self.spec().readout(),
        )?;
        let mut files = files.kept_in(self.text.clone());
        if let Some(limit) = self.limit {
            files.fit(limit, &self.device)?;
        }
        Ok(files)
    }

    /// Checks before any work that there is a text encoder, of the width that the transformer takes; reads no weights.
    ///
    /// # Errors
    /// As [`ModelFiles::prompt_files`].
    pub fn ensure_text_encoder(&self) -> Result<()> {
        self.prompt_files().map(|_| ())
    }

    /// Sides of a picture are multiples of this many pixels.
    pub fn size_multiple(&self) -> usize {
        self.spec().size_multiple(self.cell())
    }

    /// What the model says about how to draw with it, completed by general defaults.
    ///
    /// # Errors
    /// When the scheduler's configuration cannot be read.
    pub fn defaults(&self) -> Result<Settings> {
        let own = &self.paths.defaults;
        let scheduler = self.paths.scheduler()?;
        let geometry = self.spec().geometry();
        let side = match geometry.kind {
            ModelKind::Latent => geometry.published_side(),
            ModelKind::Pixel => geometry.published_side().next_multiple_of(self.size_multiple()),
        };
        // A shift of flow matching says nothing of another objective's schedule.
        let scheduler = scheduler.filter(|scheduler| scheduler.trained.prediction() == self.trained.prediction());
        let shift = match self.trained.prediction() {
            Prediction::Flow => DEFAULT_SHIFT,
            _ => 1.0,
        };
        let settings = Settings {
            width: own.width.unwrap_or(side),
            height: own.height.unwrap_or(side),
            steps: own.steps.unwrap_or(DEFAULT_STEPS),
            shift: own
                .shift
                .or(scheduler.map(|scheduler| scheduler.shift))
                .unwrap_or(shift),
            cfg: own.cfg.unwrap_or(1.0),
            solver: own.solver.unwrap_or(Solver::default_of(&self.trained)),
        };
        Ok(Settings {
            shift: self.published_shift(&settings).unwrap_or(settings.shift),
            ..settings
        })
    }

    /// The shift that the model's published schedule has for this size and these steps, where neither says otherwise.
    fn published_shift(&self, settings: &Settings) -> Option<f32> {
        let says_nothing = self.paths.defaults.shift.is_none() && self.trained.prediction() == Prediction::Flow;
        let shift = self.spec().shift(self.image_tokens(settings), settings.steps);
        shift.filter(|_| says_nothing)
    }

    /// What was asked for, then what the model says; sides as they are, not yet multiples of what the model draws.
    ///
    /// # Errors
    /// When the scheduler's configuration cannot be read, or a value cannot be drawn with any model.
    pub fn settings(&self, asked: &Asked) -> Result<Settings> {
        let defaults = self.defaults()?;
        let settings = Settings {
            width: asked.width.unwrap_or(defaults.width),
            height: asked.height.unwrap_or(defaults.height),
            steps: asked.steps.unwrap_or(defaults.steps),
            shift: asked.shift.unwrap_or(defaults.shift),
            cfg: asked.cfg.unwrap_or(defaults.cfg),
            solver: asked.solver.unwrap_or(defaults.solver),
        };
        let published = self.published_shift(&settings).filter(|_| asked.shift.is_none());
        let settings = Settings {
            shift: published.unwrap_or(settings.shift),
            ..settings
        };
        settings.check()?;
        self.schedule(&settings)?;
        Ok(settings)
    }

    /// The settings with sides rounded up to what the model draws, and a sentence for each that was.
    pub fn rounded(&self, settings: Settings) -> (Settings, Vec<String>) {
        let multiple = self.size_multiple();
        let mut notes = Vec::new();
        let mut round = |side: usize, name: &str| {
            let rounded = side.next_multiple_of(multiple);
            if rounded != side {
                notes.push(format!(
                    "{name} {side} is rounded up to {rounded}: this model draws multiples of {multiple}"
                ));
            }
            rounded
        };
        let settings = Settings {
            width: round(settings.width, "width"),
            height: round(settings.height, "height"),
            ..settings
        };
        (settings, notes)
    }

    /// Refuses settings that cannot be drawn, and sides that this model does not draw.
    ///
    /// # Errors
    /// Naming the value and what it should be.
    pub fn ensure_drawable(&self, settings: &Settings) -> Result<()> {
        settings.check()?;
        self.schedule(settings)?;
        let multiple = self.size_multiple();
        for (name, side) in [("width", settings.width), ("height", settings.height)] {
            if side % multiple != 0 {
                return Err(Error::invalid(format!(
                    "a {name} of {side} cannot be drawn: this model draws multiples of {multiple}, such as {}",
                    side.next_multiple_of(multiple)
                )));
            }
        }
        Ok(())
    }

    /// What the model's files ask for and is not done, in words.
    ///
    /// # Errors
    /// When the scheduler's configuration cannot be read.
    pub fn notes(&self) -> Result<Vec<String>> {
        let notes = self.paths.scheduler()?.map(|scheduler| scheduler.notes);
        let mut notes = notes.unwrap_or_default();
        if self.spec().shift(1, 1).is_some() {
            notes.retain(|note| !note.contains("says use_dynamic_shifting"));
        }
        Ok(notes)
    }

    /// Height, width and channels of what the transformer draws: an image, or the latent of one.
    pub fn canvas(&self, settings: &Settings) -> [usize; 3] {
        let cell = self.cell();
        [
            settings.height / cell,
            settings.width / cell,
            self.spec().geometry().channels,
        ]
    }

    /// Image tokens of one picture.
    pub fn image_tokens(&self, settings: &Settings) -> usize {
        let [height, width, _] = self.canvas(settings);
        self.spec().geometry().image_tokens([height, width])
    }

    /// Pictures to draw at once, out of so many: as many as fill a GPU and fit into the memory that it has to spare. The CPU draws one
    /// by one: there a batch gains nothing, and the first picture would come later.
    ///
    /// # Errors
    /// When the device does not tell what it has.
    pub fn batch_size(&self, settings: &Settings, pictures: usize, batching: Batching) -> Result<usize> {
        if matches!(self.device, Device::Cpu) {
            return Ok(1);
        }
        let available = self.device.available_memory()?;
        let mut batch = batching.largest(self.image_tokens(settings)).min(pictures.max(1));
        while batch > 1 && self.estimate(settings, batch) > available {
            batch -= 1;
        }
        Ok(batch)
    }

    /// Bytes of device memory that drawing `batch` pictures of this size at once takes, estimated.
    pub fn estimate(&self, settings: &Settings, batch: usize) -> u64 {
        let (weights, activations) = self.parts(settings, batch);
        weights.saturating_add(activations)
    }

    /// Weights and activations of [`ModelFiles::estimate`].
    pub(super) fn parts(&self, settings: &Settings, batch: usize) -> (u64, u64) {
        let estimate = MemoryEstimate::of(&EstimateInput {
            spec: self.spec(),
            vae: self.vae_config(),
            text_parameters: 0,
            trunk: &self.trunk,
            width: settings.width,
            height: settings.height,
        });
        // The estimate counts bf16; the CPU computes in f32.
        let element = self.device.compute_dtype().size() as u64;
        let bytes = |bf16: u64| (bf16 / 2).saturating_mul(element);
        let sampling = estimate.sampling;
        // Two pictures in f32 beside the one on its way.
        let looked_back = match settings.solver.looks_back() {
            true => (self.canvas(settings).iter().product::<usize>() as u64).saturating_mul(2 * 4 * batch as u64),
            false => 0,
        };
        (
            bytes(sampling.weights),
            bytes(sampling.activations.saturating_mul(batch as u64)).saturating_add(looked_back),
        )
    }

    /// Refuses settings that make no sense and work that the device has no memory for, before any of it starts.
    ///
    /// # Errors
    /// Naming the value at fault, or the estimate and what there is.
    pub fn ensure_room(&self, settings: &Settings, batch: usize) -> Result<()> {
        settings.check()?;
        self.ensure_memory(settings, batch, self.estimate(settings, batch))
    }

    /// Refuses work that takes `needed` bytes where the device does not have them.
    pub(super) fn ensure_memory(&self, settings: &Settings, batch: usize, needed: u64) -> Result<()> {
        let available = self.device.available_memory()?;
        if needed <= available {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "{}x{} pixels{} take about {} of memory, but {} has {} to spare: draw smaller{}",
            settings.width,
            settings.height,
            if batch > 1 {
                format!(" in batches of {batch}")
            } else {
                String::new()
            },
            format_bytes(needed),
            self.device,
            format_bytes(available),
            if batch > 1 { " or fewer at once (--batch 1)" } else { "" },
        )))
    }
}
