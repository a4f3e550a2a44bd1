//! The configuration of a training run: a TOML file, every key of which is also a flag.
//!
//! Paths in a file are relative to the file's folder. A flag wins over the file.

mod check;
mod read;

use std::path::PathBuf;

pub use read::nearest_key;

use super::choices::{
    Init, Noise, SaveType, ScheduleKind, parsed, parsed_list, parsed_option, shown, shown_list, shown_option,
};
use super::keys::{Key, configuration};
use super::numbers;
use crate::data::{PictureSize, Sizing};
use crate::error::{Error, Result};
use crate::flow::noise_source::NoiseSource;
use crate::flow::solver::Solver;
use crate::model::Precision;
use crate::model::objective::{BetaSchedule, Prediction, Trained};
use crate::train::{AdamWOptions, Policy, Recompute, Sharding, TrainOptions};

configuration! {
    "Model" {
        /// The model to begin from: a latent source model together with `patch`, or a pixel model.
        model: PathBuf = PathBuf::new() => "DIR|FILE",
        /// The model that `model`, a delta, was trained over.
        base: Option<PathBuf> = None => "DIR|FILE",
        /// The text encoder, where the model names none: its folder, or its file with config.json beside it.
        text_encoder: Option<PathBuf> = None => "DIR|FILE",
        /// Folder of the tokenizer, where the model names none.
        tokenizer: Option<PathBuf> = None => "DIR",
        /// The VAE, where a latent model that is trained names none: its folder, or its file with config.json beside it.
        vae: Option<PathBuf> = None => "DIR|FILE",
        /// Side of a patch in pixels (16, 64, 128 or 160): make a pixel model of it from `model` first. Everything that fits is
        /// copied; input projection and Detailer Head start random. It is written to init.safetensors in the run's folder.
        #[serde(deserialize_with = "numbers::optional_patch")]
        patch: Option<usize> = None => "PIXELS",
        /// Widths of the new head's stages from the image inwards; by default as `l2p-convert init` chooses.
        #[serde(deserialize_with = "numbers::optional_widths")]
        head_widths: Option<Vec<usize>> = None => "N,N,…",
        /// Width of the new head's bottleneck.
        #[serde(deserialize_with = "numbers::optional_width")]
        head_bottleneck: Option<usize> = None => "N",
        /// Where weights come from: `source` (from `model`) or `scratch` (all random, in the sizes of `model`).
        #[serde(deserialize_with = "parsed", serialize_with = "shown")]
        init: Init = Init::Source => "NAME",
        /// Seed of random weights.
        #[serde(deserialize_with = "numbers::seed")]
        init_seed: u64 = 0 => "N",
    }
    "Data" {
        /// The data set: a folder with metadata.jsonl, metadata.json or metadata.csv, or such a file. Columns: image (or
        /// file_name), prompt (or text), optionally seed.
        data: PathBuf = PathBuf::new() => "DIR|FILE",
        /// A data set for the validation loss.
        validation: Option<PathBuf> = None => "DIR|FILE",
        /// Pictures of `data` that are held out for the validation loss instead.
        #[serde(deserialize_with = "numbers::count")]
        held_out: usize = 0 => "N",
        /// Pictures keep about their proportions and get at most so many pixels.
        #[serde(deserialize_with = "numbers::optional_pixels")]
        max_pixels: Option<usize> = None => "N",
        /// All pictures get this size. Without any of the three, that of the pictures that the model draws by default.
        #[serde(deserialize_with = "parsed_option", serialize_with = "shown_option")]
        size: Option<PictureSize> = None => "WIDTHxHEIGHT",
        /// Each picture gets the size of these whose proportions are nearest to its own.
        #[serde(deserialize_with = "parsed_list", serialize_with = "shown_list")]
        buckets: Vec<PictureSize> = Vec::new() => "WIDTHxHEIGHT,…",
        /// The share of captions that are replaced by an empty one, which guidance needs.
        caption_dropout: f64 = 0.0 => "SHARE",
        /// Noise of a picture: `seed` (that of its own seed, the same every epoch), `fresh` (another every time) or `auto` (by
        /// seed where every picture has one).
        #[serde(deserialize_with = "parsed", serialize_with = "shown")]
        noise: Noise = Noise::Auto => "NAME",
        /// Generator of the noise of a seed: `philox`, or `torch` for pictures that were drawn with PyTorch's noise.
        #[serde(deserialize_with = "parsed", serialize_with = "shown")]
        rng: NoiseSource = NoiseSource::Philox => "NAME",
        /// Where caption features and latents are kept, for all runs that name it; by default in the run's folder.
        cache: Option<PathBuf> = None => "DIR",
        /// Threads that decode pictures; by default one for each processor but one, at most 16.
        #[serde(deserialize_with = "numbers::optional_threads")]
        workers: Option<usize> = None => "N",
        /// Gigabytes of decoded pictures and caption features that stay in host memory, so that later epochs read nothing from
        /// disk; by default a quarter of what is free.
        host_cache_gb: Option<f64> = None => "GB",
        /// The share of pictures and captions that may be damaged before the run stops.
        max_damaged: f64 = 0.01 => "SHARE",
    }
    "Training" {
        /// Optimizer steps.
        #[serde(deserialize_with = "numbers::some_steps")]
        steps: u64 = 1000 => "N",
        /// Minutes of training after which the run ends as it does after its last step; validation, samples and checkpoints do
        /// not count.
        max_minutes: Option<f64> = None => "MINUTES",
        /// Pictures in a batch of a rank.
        #[serde(deserialize_with = "numbers::batch")]
        batch: usize = 1 => "N",
        /// Batches of a rank whose gradients make one step.
        #[serde(deserialize_with = "numbers::batch")]
        accumulate: usize = 1 => "N",
        /// What is trained: `paper` (input projection, first and last 5 blocks, head), `released` (that, refiners, embedders, pad
        /// tokens), either with `:N` for another number of blocks, `full`, `head-only`, or patterns of tensor names separated
        /// by commas.
        #[serde(deserialize_with = "parsed", serialize_with = "shown")]
        policy: Policy = Policy::Paper { ends: crate::train::DEFAULT_ENDS } => "POLICY",
        /// Blocks that are computed twice to save memory: `none`, `frozen` or `all`.
        #[serde(deserialize_with = "parsed", serialize_with = "shown")]
        recompute: Recompute = Recompute::None => "WHICH",
        /// How the weights of main blocks that are not trained are kept: `bf16` (the compute type), `int8` or `fp8` (half the memory, and
        /// on Hopper products of the forward pass at twice the rate).
        #[serde(deserialize_with = "parsed", serialize_with = "shown")]
        trunk: Precision = Precision::default() => "TYPE",
        /// What ranks divide among them: `optimizer` (each keeps its part of the optimizer's state) or `none` (each keeps all of it);
        /// the result is the same.
        #[serde(deserialize_with = "parsed", serialize_with = "shown")]
        shard: Sharding = Sharding::Optimizer => "WHAT",
        /// Learning rate.
        lr: f64 = 5e-5 => "RATE",
        /// Steps over which the learning rate rises from 0.
        #[serde(deserialize_with = "numbers::steps")]
        warmup: u64 = 0 => "N",
        /// The learning rate after that: `constant` or `cosine` (falls to `lr_end` at the last step).
        #[serde(deserialize_with = "parsed", serialize_with = "shown")]
        schedule: ScheduleKind = ScheduleKind::Constant => "NAME",
        /// The learning rate at the end of a cosine.
        lr_end: f64 = 0.0 => "RATE",
        /// Decay of AdamW's first moment.
        beta1: f32 = 0.9 => "N",
        /// Decay of AdamW's second moment.
        beta2: f32 = 0.999 => "N",
        /// Added to the root of the second moment.
        epsilon: f32 = 1e-8 => "N",
        /// AdamW's weight decay.
        weight_decay: f32 = 0.01 => "N",
        /// Gradients are scaled down to this norm where theirs is larger.
        clip_norm: Option<f32> = None => "NORM",
        /// Keep an average of the trained weights with this decay, and save it too.
        ema: Option<f32> = None => "DECAY",
        /// What the model learns to predict: `flow` (the velocity of flow matching), `epsilon` (the noise), `v` or `sample` (the picture);
        /// by default what it was trained for. Another one turns the model into one for that.
        #[serde(deserialize_with = "parsed_option", serialize_with = "shown_option")]
        objective: Option<Prediction> = None => "NAME",
        /// The discrete schedule of all objectives but flow: `linear`, `scaled_linear` or `squaredcos_cap_v2`; by default the model's, or
        /// linear.
        #[serde(deserialize_with = "parsed_option", serialize_with = "shown_option")]
        betas: Option<BetaSchedule> = None => "NAME",
        /// Whether that schedule ends at noise alone (for `v` and `sample`); by default the model's, or false.
        zero_snr: Option<bool> = None => "true|false",
        /// How far noise levels are shifted towards noise: 3 at 1024², 4 at 4096². On a discrete schedule every step's ratio of picture to
        /// noise is divided by the square, as it is of flow matching.
        shift: f64 = 3.0 => "SHIFT",
        /// Entries of the table of noise levels.
        #[serde(deserialize_with = "numbers::table")]
        sigmas: usize = 1000 => "N",
        /// Seed of the order of the pictures, of noise levels, fresh noise and captions that are left out.
        #[serde(deserialize_with = "numbers::seed")]
        seed: u64 = 0 => "N",
        /// Steps in a row that may be skipped because their gradients are not finite before the run stops.
        #[serde(deserialize_with = "numbers::count")]
        max_skipped: u32 = 10 => "N",
        /// A loss so many times the average of the last intervals is reported as a spike.
        spike_factor: f64 = 3.0 => "FACTOR",
        /// Intervals in a row with a spike after which the run stops.
        #[serde(deserialize_with = "numbers::count")]
        spike_patience: u32 = 3 => "N",
    }
    "Output" {
        /// Steps from one line of the log to the next.
        #[serde(deserialize_with = "numbers::some_steps")]
        log_every: u64 = 10 => "N",
        /// Steps from one checkpoint to the next; 0 saves at the end only.
        #[serde(deserialize_with = "numbers::steps")]
        save_every: u64 = 500 => "N",
        /// Checkpoints that are kept, the newest ones.
        #[serde(deserialize_with = "numbers::some_count")]
        keep_last: usize = 2 => "N",
        /// Checkpoints at multiples of so many steps are kept too; 0 for none.
        #[serde(deserialize_with = "numbers::steps")]
        keep_every: u64 = 0 => "N",
        /// Element type of the trained tensors that are saved for use: `bf16` or `f32`.
        #[serde(deserialize_with = "parsed", serialize_with = "shown")]
        save_dtype: SaveType = SaveType::Bf16 => "TYPE",
        /// Steps from one validation loss to the next; 0 for none.
        #[serde(deserialize_with = "numbers::steps")]
        validate_every: u64 = 100 => "N",
        /// Steps from one sheet of samples to the next; 0 for none.
        #[serde(deserialize_with = "numbers::steps")]
        sample_every: u64 = 0 => "N",
        /// What is drawn on a sheet.
        sample_prompts: Vec<String> = Vec::new() => "TEXT",
        /// Seed of the first sample's noise; each further one takes the next.
        #[serde(deserialize_with = "numbers::seed")]
        sample_seed: u64 = 0 => "N",
        /// Denoising steps of a sample; by default the model's.
        #[serde(deserialize_with = "numbers::optional_table")]
        sample_steps: Option<usize> = None => "N",
        /// Guidance of a sample; by default the model's.
        sample_cfg: Option<f32> = None => "SCALE",
        /// Solver of a sample: `euler`, `ddim` or `dpm++2m`; by default the model's, or the first of these that fits the objective.
        #[serde(deserialize_with = "parsed_option", serialize_with = "shown_option")]
        sample_solver: Option<Solver> = None => "NAME",
        /// Time the parts of every step, and say at the end where the time went.
        profile: bool = false => "true|false",
    }
}

impl TrainConfig {
    /// The settings of the model's side of training.
    pub fn train_options(&self) -> TrainOptions {
        TrainOptions {
            policy: self.policy.clone(),
            recompute: self.recompute,
            adamw: AdamWOptions {
                beta1: self.beta1,
                beta2: self.beta2,
                epsilon: self.epsilon,
                weight_decay: self.weight_decay,
            },
            clip_norm: self.clip_norm,
            ema_decay: self.ema,
            trunk: self.trunk.clone(),
        }
    }

    /// What a model is trained for that was trained for `source` so far.
    ///
    /// # Errors
    /// When the keys contradict each other.
    pub fn trained(&self, source: &Trained) -> Result<Trained> {
        let prediction = self.objective.unwrap_or(source.prediction());
        if prediction == Prediction::Flow {
            return match (self.betas, self.zero_snr) {
                (None, None) => Ok(Trained::FLOW),
                _ => Err(Error::invalid(
                    "betas and zero_snr are about a discrete schedule, and flow matching has none: leave them out, or give another objective",
                )),
            };
        }
        let mut schedule = source.schedule().cloned().unwrap_or_default();
        if let Some(betas) = self.betas.filter(|betas| *betas != schedule.beta_schedule) {
            schedule.beta_schedule = betas;
            [schedule.beta_start, schedule.beta_end] = betas.usual();
        }
        schedule.rescale_betas_zero_snr = self.zero_snr.unwrap_or(schedule.rescale_betas_zero_snr);
        Trained::new(prediction, Some(schedule))
    }

    /// How pictures get their sizes; `default` where the configuration does not say.
    pub fn sizing(&self, default: PictureSize) -> Sizing {
        match (self.max_pixels, self.size) {
            (Some(pixels), _) => Sizing::MaxPixels(pixels),
            (_, Some(size)) => Sizing::Fixed(size),
            _ if !self.buckets.is_empty() => Sizing::Buckets(self.buckets.clone()),
            _ => Sizing::Fixed(default),
        }
    }

    /// Pictures of one optimizer step on one rank.
    pub fn pictures_per_step(&self) -> u64 {
        (self.batch * self.accumulate) as u64
    }

    /// Refuses a configuration that does not say where the model is and, unless it is for planning alone, where the data are.
    ///
    /// # Errors
    /// Naming the key.
    pub fn ensure_named(&self, data_too: bool) -> Result<()> {
        let named = [("model", &self.model), ("data", &self.data)];
        let wanted = if data_too { &named[..] } else { &named[..1] };
        match wanted.iter().find(|(_, path)| path.as_os_str().is_empty()) {
            None => Ok(()),
            Some((name, _)) => Err(Error::invalid(format!(
                "no {name}: say {name} = \"…\" in the configuration, or --{name}"
            ))),
        }
    }
}
