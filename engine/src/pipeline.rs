//! From prompts to pictures: which parts of a model are on the device when, and how long each phase takes.
//!
//! The phases of a call: `text` (encoder loaded, prompts encoded, encoder freed), `load` (transformer), `start` (a start image is
//! encoded), `denoise`, `decode` (VAE, latent models only); what they spent on searching for the algorithms of matrix products is a
//! phase of its own, `search`. Device memory therefore peaks at the larger of the text encoder and the transformer with one step's
//! activations.
//!
//! [`ModelFiles`] is a model on disk, [`LoadedModel`] one on its device; neither changes. A [`Pipeline`] is what one thread draws with: it
//! brings parts onto the device and keeps recorded steps. `serve` puts it on a thread of its own.

mod blame;
mod edit;
mod files;
pub mod generator;
mod loaded;
mod prompts;
mod report;
mod settings;
mod start;

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Instant;

pub use edit::Edit;
pub use files::ModelFiles;
pub use loaded::LoadedModel;
pub use prompts::{Encoded, PromptEncoder, PromptFiles};
pub use report::{Phase, Report};
pub use settings::{Asked, Batching, Settings};
pub use start::{Kept, StartImage};

use crate::checkpoint::ModelPaths;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::flow::held::Beginning;
use crate::flow::noise_source::NoiseSource;
use crate::flow::sampler::{Guides, Listener, Sampler, Walk, sample};
use crate::model::vae::VaeEncoder;
use crate::profile::{self, Profile};
use crate::tensor::{HostTensor, Tensor};

/// Captions as the transformer takes them: features `[1, tokens, caption_width]` each.
pub struct Captions {
    /// One per picture.
    pub prompts: Vec<Tensor>,
    /// What to move away from, for each picture; empty without guidance.
    pub negatives: Vec<Tensor>,
}

/// Told after each text that was encoded.
#[derive(Clone, Copy, Debug)]
pub struct EncodeReport<'a> {
    /// The text.
    pub text: &'a str,
    /// Tokens at its end that the tokenizer's limit cut off.
    pub dropped_tokens: usize,
}

/// A model, opened and checked, whose parts come to the device as they are needed. It tells all that its [`ModelFiles`] do.
pub struct Pipeline {
    files: Arc<ModelFiles>,
    model: Option<LoadedModel>,
    text: Option<PromptEncoder>,
    /// A latent model's, for start images; kept once it was needed.
    encoder: Option<VaeEncoder>,
    /// Keep the text encoder on the device after its phase.
    keep_text_encoder: bool,
    sampler: Sampler,
    report: Report,
}

impl Captions {
    /// What pictures are to follow; `cfg` is the strength of guidance.
    pub fn guides(&self, cfg: f32) -> Guides<'_> {
        Guides {
            prompts: &self.prompts,
            negatives: &self.negatives,
            cfg,
        }
    }
}

impl Deref for Pipeline {
    type Target = Arc<ModelFiles>;

    fn deref(&self) -> &Arc<ModelFiles> {
        &self.files
    }
}

impl Pipeline {
    /// Opens the model at `paths`; see [`ModelFiles::open`].
    ///
    /// # Errors
    /// Those of [`ModelFiles::open`].
    pub fn open(paths: ModelPaths, device: Device, keep_text_encoder: bool) -> Result<Self> {
        let files = ModelFiles::open(paths, device)?;
        Ok(Pipeline::of(Arc::new(files), keep_text_encoder))
    }

    /// A pipeline for opened files, with nothing on the device yet.
    pub fn of(files: Arc<ModelFiles>, keep_text_encoder: bool) -> Self {
        Pipeline {
            files,
            model: None,
            text: None,
            encoder: None,
            keep_text_encoder,
            sampler: Sampler::default(),
            report: Report::default(),
        }
    }

    /// The phases since this was last asked.
    pub fn take_report(&mut self) -> Report {
        std::mem::take(&mut self.report)
    }

    /// Keeps the recorded steps of up to so many shapes of pictures, for more pictures of these shapes. Each holds the memory that a
    /// step takes, also while a VAE decodes; where the device has no room for that, older ones are given up, and the step of the
    /// picture itself is not kept. None are kept where nobody asks.
    pub fn keep_steps(&mut self, shapes: usize) {
        self.sampler = Sampler::keeping(shapes);
    }

    /// Shapes whose steps are kept now.
    pub fn kept_steps(&self) -> usize {
        self.sampler.kept()
    }

    /// The captions of `texts`, as they come from the text encoder, in host memory; equal texts are encoded once. `encoded` is called
    /// after each of them; an error from it ends the work.
    ///
    /// # Errors
    /// When the text encoder or tokenizer is missing or damaged, the device has no room, or `encoded` says so.
    pub fn encode(
        &mut self,
        texts: &[String],
        encoded: &mut dyn FnMut(EncodeReport<'_>) -> Result<()>,
    ) -> Result<Vec<Arc<HostTensor>>> {
        self.phase("text", |pipeline| {
            if pipeline.text.is_none() {
                pipeline.text = Some(pipeline.files.prompt_files()?.load(pipeline.files.device())?);
            }
            let encoder = pipeline.text.as_ref().expect("loaded above");
            let mut known: HashMap<&str, Arc<HostTensor>> = HashMap::new();
            let mut outcome = || {
                for text in texts {
                    if !known.contains_key(text.as_str()) {
                        let prompt = encoder.encode(text)?;
                        known.insert(text, Arc::new(HostTensor::from_tensor(&prompt.features)?));
                        encoded(EncodeReport {
                            text,
                            dropped_tokens: prompt.dropped_tokens,
                        })?;
                    }
                }
                Ok(())
            };
            let outcome = outcome();
            if !pipeline.keep_text_encoder {
                pipeline.text = None;
            }
            outcome?;
            Ok(texts.iter().map(|text| known[text.as_str()].clone()).collect())
        })
    }

    /// Brings the transformer (and a latent model's VAE decoder) onto the device; nothing when they are there.
    /// `loaded(done, total)` is told of each block; an error from it ends the loading.
    ///
    /// # Errors
    /// When a tensor cannot be read, the device has no room, or `loaded` says so.
    pub fn load(&mut self, loaded: &mut dyn FnMut(usize, usize) -> Result<()>) -> Result<()> {
        if self.model.is_some() {
            return Ok(());
        }
        self.phase("load", |pipeline| {
            pipeline.model = Some(LoadedModel::load(&pipeline.files, loaded)?);
            Ok(())
        })
    }

    /// The loaded model.
    ///
    /// # Errors
    /// Before [`Pipeline::load`].
    pub fn model(&self) -> Result<&LoadedModel> {
        loaded(&self.model)
    }

    /// The noise of pictures with these seeds, f32 `[seeds, height, width, channels]` (latent model: of the latent).
    ///
    /// # Errors
    /// When the device has no room.
    pub fn noise(&self, source: NoiseSource, seeds: &[u64], settings: &Settings) -> Result<Tensor> {
        source.noise(self.device(), seeds, self.canvas(settings))
    }

    /// Draws one picture per caption from `noise`. Returns what the transformer drew, f32 (pixel model: images; latent model:
    /// latents).
    ///
    /// # Errors
    /// When shapes do not fit, the device has no room, or `progress` says so.
    pub fn denoise(
        &mut self,
        captions: &Captions,
        noise: Tensor,
        settings: &Settings,
        progress: &mut dyn Listener,
    ) -> Result<Tensor> {
        self.denoise_from(None, captions, noise, settings, progress)
    }

    /// As [`Pipeline::denoise`]; with a start image, what is drawn begins as much of it as its strength leaves, and keeps of it what its
    /// mask says.
    ///
    /// # Errors
    /// As [`Pipeline::denoise`], and when the start image has another size or its strength makes no sense.
    pub fn denoise_from(
        &mut self,
        start: Option<&StartImage>,
        captions: &Captions,
        noise: Tensor,
        settings: &Settings,
        progress: &mut dyn Listener,
    ) -> Result<Tensor> {
        let mut schedule = self.schedule(settings)?;
        let mut beginning = Beginning::from(noise);
        if let Some(start) = start {
            schedule = start.schedule(schedule)?;
            let own = self.model()?.denoiser().objective();
            let shares = schedule.with_objective(own, |objective| objective.mix(schedule.sigma(0)));
            beginning = self.begin_from(start, beginning.noise, settings, shares)?;
        }
        let guides = captions.guides(settings.cfg);
        let keep = self.room_to_keep(&guides, &beginning.noise, settings)?;
        self.phase("denoise", |pipeline| {
            let model = loaded(&pipeline.model)?.denoiser();
            if keep {
                return pipeline.sampler.draw(model, guides, &schedule, beginning, progress);
            }
            let size = [beginning.noise.dim(1), beginning.noise.dim(2)];
            let conditioning = guides.prepare(model, size)?;
            sample(model, &conditioning, &schedule, beginning, progress)
        })
    }

    /// Whether the step of these pictures can be kept, beside the others or in the place of the oldest of them.
    fn room_to_keep(&mut self, guides: &Guides<'_>, noise: &Tensor, settings: &Settings) -> Result<bool> {
        if self.sampler.keeps(guides, noise, settings.solver) {
            return Ok(true);
        }
        if self.sampler.most() == 0 {
            return Ok(false);
        }
        // What the step holds, and what decoding takes meanwhile.
        let needed = self.parts(settings, noise.dim(0)).1.saturating_mul(2);
        while needed > self.device().available_memory()? {
            if !self.sampler.forget_oldest() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Refuses settings that make no sense and work that the device has no memory for beside what is loaded; kept steps are given up
    /// for it. `start` is what the pictures begin with, if anything.
    ///
    /// # Errors
    /// Naming the value at fault, or the estimate and what there is.
    pub fn make_room(&mut self, settings: &Settings, batch: usize, start: Option<&StartImage>) -> Result<()> {
        self.ensure_drawable(settings)?;
        let (weights, activations) = self.parts(settings, batch);
        let held = start.map_or(0, |start| start.held_bytes(self.canvas(settings), batch));
        let activations = activations.saturating_add(held);
        let needed = match &self.model {
            Some(_) => activations,
            None => weights.saturating_add(activations),
        };
        loop {
            let refused = self.ensure_memory(settings, batch, needed);
            if refused.is_ok() || !self.sampler.forget_oldest() {
                return refused;
            }
        }
    }

    /// Times the operations of one step of [`Pipeline::denoise`] one by one. The step runs call by call, so that there is time
    /// between its operations that a recorded step does not have; on CUDA one more runs before it, which keeps the device busy
    /// while this one is submitted.
    ///
    /// # Errors
    /// When shapes do not fit, or the device has no room.
    pub fn profile_step(&self, captions: &Captions, noise: Tensor, settings: &Settings) -> Result<Profile> {
        let model = self.model()?.denoiser();
        let conditioning = captions
            .guides(settings.cfg)
            .prepare(model, [noise.dim(1), noise.dim(2)])?;
        let before = usize::from(matches!(self.device(), Device::Cuda(_)));
        let schedule = self.schedule(&Settings {
            steps: before + 1,
            ..*settings
        })?;
        let mut walk = Walk::new(model, &conditioning, &schedule, noise)?.unrecorded();
        for _ in 0..before {
            walk.advance()?;
        }
        Ok(profile::measure(self.device(), || walk.advance())?.1)
    }

    /// The images of what [`Pipeline::denoise`] returned; see [`LoadedModel::decode`].
    ///
    /// # Errors
    /// When the device has no room.
    pub fn decode(&mut self, drawn: &Tensor) -> Result<Tensor> {
        if !self.model()?.is_latent() {
            return Ok(drawn.clone());
        }
        self.phase("decode", |pipeline| pipeline.model()?.decode(drawn))
    }

    /// The pictures of what [`Pipeline::denoise`] returned; see [`LoadedModel::pictures`].
    ///
    /// # Errors
    /// As [`LoadedModel::pictures`].
    pub fn pictures(&mut self, drawn: &Tensor) -> Result<Vec<Vec<u8>>> {
        self.phase("decode", |pipeline| pipeline.model()?.pictures(drawn))
    }

    /// Runs `work` as one phase: timed to the device's end of work, with memory peaks of its own.
    fn phase<T>(&mut self, name: &'static str, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let _range = profile::range(match name {
            "text" => c"text",
            "load" => c"load",
            "start" => c"start",
            "denoise" => c"denoise",
            _ => c"decode",
        });
        self.device().reset_memory_peaks();
        let searched = |pipeline: &Self| match pipeline.device() {
            Device::Cpu => 0.0,
            Device::Cuda(device) => device.searched().time.as_secs_f64(),
        };
        let (start, searched_before) = (Instant::now(), searched(self));
        let outcome = work(self)?;
        self.device().synchronize()?;
        let driver_bytes = match self.device() {
            Device::Cpu => None,
            Device::Cuda(device) => Some(device.driver_memory_in_use()?),
        };
        let (seconds, searching) = (start.elapsed().as_secs_f64(), searched(self) - searched_before);
        let memory = self.device().memory_report();
        if searching > 0.0 {
            // A search takes no memory beside that of the work it is part of.
            self.report.add(Phase {
                name: "search",
                seconds: searching,
                memory: memory.clone(),
                driver_bytes,
            });
        }
        self.report.add(Phase {
            name,
            seconds: seconds - searching,
            memory,
            driver_bytes,
        });
        Ok(outcome)
    }
}

fn loaded(model: &Option<LoadedModel>) -> Result<&LoadedModel> {
    let model = model.as_ref();
    model.ok_or_else(|| Error::invalid("the transformer is not loaded"))
}
