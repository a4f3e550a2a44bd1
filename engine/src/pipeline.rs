//! From prompts to pictures: which parts of a model are on the device when, and how long each phase takes.
//!
//! The phases of a run: `text` (encoder loaded, prompts encoded, encoder freed), `load` (transformer), `denoise`, `decode`
//! (VAE, latent models only); what they spent on searching for the algorithms of matrix products is a phase of its own, `search`.
//! Device memory therefore peaks at the larger of the text encoder and the transformer with one step's activations.

mod blame;
mod prompts;
mod settings;

use std::collections::HashMap;
use std::time::Instant;

pub use prompts::{Encoded, PromptEncoder, PromptFiles};
pub use settings::Settings;

use serde::Serialize;

use crate::checkpoint::{Checkpoint, EstimateInput, MemoryEstimate, ModelPaths, Transformer, open_vae};
use crate::device::{Device, MemoryReport, MemoryTag, format_bytes};
use crate::error::{Error, Result};
use crate::flow::noise_source::NoiseSource;
use crate::flow::sampler::{Guides, Sampler, StepReport, Walk};
use crate::flow::schedule::Schedule;
use crate::model::config::{ModelKind, VaeConfig};
use crate::model::vae::VaeDecoder;
use crate::model::{Denoiser, DeviceLimits, Spec};
use crate::ops::to_rgb8::to_rgb8;
use crate::profile::{self, Profile};
use crate::tensor::Tensor;

/// Steps where neither user nor model says: enough for a model that was not distilled.
const DEFAULT_STEPS: usize = 28;

/// The shift where neither user nor model says.
const DEFAULT_SHIFT: f32 = 3.0;

/// Pixels that [`Pipeline::pictures`] decodes together.
const DECODED_PIXELS: usize = 1 << 20;

/// One phase of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    /// Its name; see the module's head comment.
    pub name: &'static str,
    /// Wall time, waiting for the device included.
    pub seconds: f64,
    /// Device memory, peaks within the phase.
    pub memory: MemoryReport,
    /// Bytes of the GPU in use at the phase's end as its driver counts them (all processes, contexts included).
    pub driver_bytes: Option<u64>,
}

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

/// A model, opened and checked, whose parts come to the device as they are needed.
pub struct Pipeline {
    device: Device,
    paths: ModelPaths,
    transformer: Transformer,
    /// A latent model's.
    vae_files: Option<(VaeConfig, Checkpoint)>,
    model: Option<Box<dyn Denoiser>>,
    vae: Option<VaeDecoder>,
    text: Option<PromptEncoder>,
    /// Keep the text encoder on the device after its phase.
    keep_text_encoder: bool,
    sampler: Sampler,
    phases: Vec<Phase>,
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

    /// Those of some of the pictures.
    ///
    /// # Errors
    /// When there are fewer.
    pub fn select(&self, pictures: std::ops::Range<usize>) -> Result<Self> {
        let select = |captions: &[Tensor]| match captions.get(pictures.clone()) {
            _ if captions.is_empty() => Ok(Vec::new()),
            Some(captions) => Ok(captions.to_vec()),
            None => Err(Error::invalid(format!(
                "{} captions are too few for pictures {pictures:?}",
                captions.len()
            ))),
        };
        Ok(Captions {
            prompts: select(&self.prompts)?,
            negatives: select(&self.negatives)?,
        })
    }
}

impl Pipeline {
    /// Opens the model at `paths`: reads configurations and headers, loads no weights.
    ///
    /// # Errors
    /// When a part is missing, damaged, does not fit the others, or has sizes that the device's kernels cannot take.
    pub fn open(paths: ModelPaths, device: Device, keep_text_encoder: bool) -> Result<Self> {
        let transformer = paths.open_transformer()?;
        transformer.spec.expect_runs_on(&device)?;
        let vae_files = match transformer.spec.geometry().kind {
            ModelKind::Latent => {
                let (config, checkpoint) = open_vae(paths.vae()?)?;
                config.expect_runs_on(&device)?;
                Some((config, checkpoint))
            }
            ModelKind::Pixel => None,
        };
        Ok(Pipeline {
            device,
            paths,
            transformer,
            vae_files,
            model: None,
            vae: None,
            text: None,
            keep_text_encoder,
            sampler: Sampler::default(),
            phases: Vec::new(),
        })
    }

    /// What the transformer is.
    pub fn spec(&self) -> &dyn Spec {
        &*self.transformer.spec
    }

    /// Pixels along a side of what one cell of the transformer's input stands for: 1, or a VAE's downsampling.
    fn cell(&self) -> usize {
        self.vae_config().map_or(1, VaeConfig::downsampling)
    }

    /// The transformer's files.
    pub fn transformer(&self) -> &Transformer {
        &self.transformer
    }

    /// Where the model's parts are.
    pub fn paths(&self) -> &ModelPaths {
        &self.paths
    }

    /// The VAE's files, of a latent model.
    pub fn vae_files(&self) -> Option<(&VaeConfig, &Checkpoint)> {
        self.vae_files.as_ref().map(|(config, checkpoint)| (config, checkpoint))
    }

    fn vae_config(&self) -> Option<&VaeConfig> {
        self.vae_files.as_ref().map(|(config, _)| config)
    }

    /// The device that the model runs on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The phases since this was last asked.
    pub fn take_phases(&mut self) -> Vec<Phase> {
        std::mem::take(&mut self.phases)
    }

    /// Keeps the recorded steps of so many shapes of pictures, for more pictures of these shapes; each holds the memory that a step
    /// takes, also while a VAE decodes. None are kept where nobody asks.
    pub fn keep_steps(&mut self, shapes: usize) {
        self.sampler = Sampler::keeping(shapes);
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
        Ok(Settings {
            width: own.width.unwrap_or(side),
            height: own.height.unwrap_or(side),
            steps: own.steps.unwrap_or(DEFAULT_STEPS),
            shift: own
                .shift
                .or(scheduler.map(|scheduler| scheduler.shift))
                .unwrap_or(DEFAULT_SHIFT),
            cfg: own.cfg.unwrap_or(1.0),
        })
    }

    /// What the model's files ask for and is not done, in words.
    ///
    /// # Errors
    /// When the scheduler's configuration cannot be read.
    pub fn notes(&self) -> Result<Vec<String>> {
        Ok(self
            .paths
            .scheduler()?
            .map(|scheduler| scheduler.notes)
            .unwrap_or_default())
    }

    /// Bytes of device memory that drawing `batch` pictures of this size at once takes, estimated.
    pub fn estimate(&self, settings: &Settings, batch: usize) -> u64 {
        let (weights, activations) = self.parts(settings, batch);
        weights.saturating_add(activations)
    }

    /// Weights and activations of [`Pipeline::estimate`].
    fn parts(&self, settings: &Settings, batch: usize) -> (u64, u64) {
        let estimate = MemoryEstimate::of(&EstimateInput {
            spec: self.spec(),
            vae: self.vae_config(),
            text_parameters: 0,
            width: settings.width,
            height: settings.height,
        });
        // The estimate counts bf16; the CPU computes in f32.
        let element = self.device.compute_dtype().size() as u64;
        let bytes = |bf16: u64| (bf16 / 2).saturating_mul(element);
        let sampling = estimate.sampling;
        (
            bytes(sampling.weights),
            bytes(sampling.activations.saturating_mul(batch as u64)),
        )
    }

    /// Has batches of this kind share one recorded step, where the device has room for what it holds; [`Pipeline::keep_steps`] does
    /// not ask.
    ///
    /// # Errors
    /// When the device does not tell what it has.
    pub fn share_steps(&mut self, settings: &Settings, batch: usize) -> Result<()> {
        let (weights, activations) = self.parts(settings, batch);
        let needed = weights.saturating_add(activations.saturating_mul(2));
        self.keep_steps(usize::from(needed <= self.device.available_memory()?));
        Ok(())
    }

    /// Refuses settings that make no sense and work that the device has no memory for, before any of it starts.
    ///
    /// # Errors
    /// Naming the value at fault, or the estimate and what there is.
    pub fn expect_room(&self, settings: &Settings, batch: usize) -> Result<()> {
        settings.check()?;
        let (needed, available) = (self.estimate(settings, batch), self.device.available_memory()?);
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

    /// The captions of `prompts` and of `negatives` (as many, or none); equal texts are encoded once. `encoded` is called
    /// after each of them; an error from it ends the work.
    ///
    /// # Errors
    /// When the text encoder or tokenizer is missing or damaged, the device has no room, or `encoded` says so.
    pub fn encode(
        &mut self,
        prompts: &[String],
        negatives: &[String],
        encoded: &mut dyn FnMut(EncodeReport<'_>) -> Result<()>,
    ) -> Result<Captions> {
        self.phase("text", |pipeline| {
            if pipeline.text.is_none() {
                pipeline.text = Some(pipeline.prompt_files()?.load(&pipeline.device)?);
            }
            let encoder = pipeline.text.as_ref().expect("loaded above");
            let mut known: HashMap<&str, Tensor> = HashMap::new();
            for text in prompts.iter().chain(negatives) {
                if !known.contains_key(text.as_str()) {
                    let prompt = encoder.encode(text)?;
                    known.insert(text, prompt.features);
                    encoded(EncodeReport {
                        text,
                        dropped_tokens: prompt.dropped_tokens,
                    })?;
                }
            }
            let all = |texts: &[String]| texts.iter().map(|text| known[text.as_str()].clone()).collect();
            let captions = Captions {
                prompts: all(prompts),
                negatives: all(negatives),
            };
            if !pipeline.keep_text_encoder {
                pipeline.text = None;
            }
            Ok(captions)
        })
    }

    /// Checks before any work that there is a text encoder, of the width that the transformer takes; reads no weights.
    ///
    /// # Errors
    /// Saying how to name a part that is missing, or what is damaged or does not fit.
    pub fn expect_text_encoder(&self) -> Result<()> {
        self.prompt_files().map(|_| ())
    }

    fn prompt_files(&self) -> Result<PromptFiles<'_>> {
        PromptFiles::open(&self.paths, &self.device, self.spec().caption_width())
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
            // First what takes no time, so that its faults show before gigabytes are read.
            if let Some((config, checkpoint)) = &pipeline.vae_files {
                let _tag = MemoryTag::Weights.scope();
                let vae = VaeDecoder::load(checkpoint, &pipeline.device, config);
                pipeline.vae = Some(vae.map_err(|error| of_file(checkpoint, error))?);
            }
            let transformer = &pipeline.transformer;
            let spec = &transformer.spec;
            pipeline.model = Some(spec.load(&transformer.checkpoint, &pipeline.device, loaded)?);
            Ok(())
        })
    }

    /// The noise of pictures with these seeds, f32 `[seeds, height, width, channels]` (latent model: of the latent).
    ///
    /// # Errors
    /// When the device has no room.
    pub fn noise(&self, source: NoiseSource, seeds: &[u64], settings: &Settings) -> Result<Tensor> {
        source.noise(&self.device, seeds, self.canvas(settings))
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

    /// Draws one picture per caption from `noise`. Returns what the transformer drew, f32 (pixel model: images; latent model:
    /// latents).
    ///
    /// # Errors
    /// When shapes do not fit, the device has no room, or `progress` returns an error.
    pub fn denoise(
        &mut self,
        captions: &Captions,
        noise: Tensor,
        settings: &Settings,
        progress: &mut dyn FnMut(StepReport) -> Result<()>,
    ) -> Result<Tensor> {
        let schedule = Schedule::new(settings.steps, f64::from(settings.shift))?;
        self.phase("denoise", |pipeline| {
            let model = loaded(&pipeline.model)?;
            let guides = captions.guides(settings.cfg);
            pipeline.sampler.draw(model, guides, &schedule, noise, progress)
        })
    }

    /// Times the operations of one step of [`Pipeline::denoise`] one by one. The step runs call by call, so that there is time
    /// between its operations that a recorded step does not have; on CUDA one more runs before it, which keeps the device busy
    /// while this one is submitted.
    ///
    /// # Errors
    /// When shapes do not fit, or the device has no room.
    pub fn profile_step(&self, captions: &Captions, noise: Tensor, settings: &Settings) -> Result<Profile> {
        let model = loaded(&self.model)?;
        let conditioning = captions
            .guides(settings.cfg)
            .prepare(model, [noise.dim(1), noise.dim(2)])?;
        let before = usize::from(matches!(self.device, Device::Cuda(_)));
        let schedule = Schedule::new(before + 1, f64::from(settings.shift))?;
        let mut walk = Walk::new(model, &conditioning, &schedule, noise)?.unrecorded();
        for _ in 0..before {
            walk.advance()?;
        }
        Ok(profile::measure(&self.device, || walk.advance())?.1)
    }

    /// The images of what [`Pipeline::denoise`] returned: latents through the VAE decoder, images as they are. f32
    /// `[batch, height, width, 3]`, about −1 to 1.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn decode(&mut self, drawn: &Tensor) -> Result<Tensor> {
        if self.vae.is_none() {
            return Ok(drawn.clone());
        }
        self.phase("decode", |pipeline| {
            let vae = pipeline
                .vae
                .as_ref()
                .ok_or_else(|| Error::invalid("the VAE is not loaded"))?;
            // One picture at a time: the decoder's maps are the largest tensors of a latent model.
            let one = |item| vae.decode(&drawn.narrow(item, 1)?);
            let first = one(0)?;
            let count = drawn.dim(0);
            if count == 1 {
                return Ok(first);
            }
            let mut extents = first.shape().to_vec();
            extents[0] = count;
            let mut images = Tensor::empty(&pipeline.device, extents.as_slice(), first.dtype())?;
            let elements = first.elements();
            images.copy_elements_from(0, &first)?;
            drop(first);
            for item in 1..count {
                images.copy_elements_from(item * elements, &one(item)?)?;
            }
            Ok(images)
        })
    }

    /// The pictures of what [`Pipeline::denoise`] returned as bytes on the host, one buffer of `height · width · 3` per item:
    /// [`Pipeline::decode`] and [`Pipeline::to_bytes`] for many small pictures, several at a time.
    ///
    /// # Errors
    /// When the device has no room, and [`Error::NotFinite`] naming the first picture that holds NaN or an infinity and the first
    /// weight that does.
    pub fn pictures(&mut self, drawn: &Tensor) -> Result<Vec<Vec<u8>>> {
        let cell = self.cell();
        let pixels = drawn.dim(1) * drawn.dim(2) * cell * cell;
        let at_once = (DECODED_PIXELS / pixels.max(1)).max(1);
        self.phase("decode", |pipeline| {
            let count = drawn.dim(0);
            let mut pictures = Vec::with_capacity(count);
            for first in (0..count).step_by(at_once) {
                let part = drawn.narrow(first, at_once.min(count - first))?;
                let images = match &pipeline.vae {
                    Some(vae) => vae.decode(&part)?,
                    None => part,
                };
                let drawn = to_rgb8(&images)?.into_pictures(first, count);
                pictures.extend(drawn.map_err(|error| pipeline.blame(error))?);
            }
            Ok(pictures)
        })
    }

    /// The pictures of `images` as bytes on the host, one buffer of `height · width · 3` per item.
    ///
    /// # Errors
    /// [`Error::NotFinite`] naming the first picture that holds NaN or an infinity and the first weight that does; when the copy from
    /// the device fails.
    pub fn to_bytes(&self, images: &Tensor) -> Result<Vec<Vec<u8>>> {
        let pictures = to_rgb8(images)?.into_pictures(0, images.dim(0));
        pictures.map_err(|error| self.blame(error))
    }

    /// The error, and of a picture that is not finite the weight to blame.
    fn blame(&self, error: Error) -> Error {
        let vae = self.vae_files.as_ref().map(|(_, checkpoint)| checkpoint);
        blame::blame(error, [&self.transformer.checkpoint].into_iter().chain(vae))
    }

    /// Runs `work` as one phase: timed to the device's end of work, with memory peaks of its own.
    fn phase<T>(&mut self, name: &'static str, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let _range = profile::range(match name {
            "text" => c"text",
            "load" => c"load",
            "denoise" => c"denoise",
            _ => c"decode",
        });
        self.device.reset_memory_peaks();
        let searched = |pipeline: &Self| match &pipeline.device {
            Device::Cpu => 0.0,
            Device::Cuda(device) => device.searched().time.as_secs_f64(),
        };
        let (start, searched_before) = (Instant::now(), searched(self));
        let outcome = work(self)?;
        self.device.synchronize()?;
        let driver_bytes = match &self.device {
            Device::Cpu => None,
            Device::Cuda(device) => Some(device.driver_memory_in_use()?),
        };
        let (seconds, searching) = (start.elapsed().as_secs_f64(), searched(self) - searched_before);
        let memory = self.device.memory_report();
        if searching > 0.0 {
            // A search takes no memory beside that of the work it is part of.
            self.phases.push(Phase {
                name: "search",
                seconds: searching,
                memory: memory.clone(),
                driver_bytes,
            });
        }
        self.phases.push(Phase {
            name,
            seconds: seconds - searching,
            memory,
            driver_bytes,
        });
        Ok(outcome)
    }
}

fn loaded(model: &Option<Box<dyn Denoiser>>) -> Result<&dyn Denoiser> {
    let model = model.as_deref();
    model.ok_or_else(|| Error::invalid("the transformer is not loaded"))
}

/// The error with the file that it is about.
fn of_file(checkpoint: &Checkpoint, error: Error) -> Error {
    match error {
        Error::Invalid(reason) => Error::file(checkpoint.path(), reason),
        error => error,
    }
}
