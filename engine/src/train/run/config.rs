//! The configuration of a training run: a TOML file, every key of which is also a flag.
//!
//! Paths in a file are relative to the file's folder. A flag wins over the file.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::choices::{
    Init, Noise, SaveType, ScheduleKind, parsed, parsed_list, parsed_option, shown, shown_list, shown_option,
};
use super::keys::{Key, configuration};
use crate::data::{PictureSize, Sizing};
use crate::error::{Error, Result};
use crate::flow::noise_source::NoiseSource;
use crate::train::{AdamWOptions, Policy, Recompute, TrainOptions};

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
        patch: Option<usize> = None => "PIXELS",
        /// Widths of the new head's stages from the image inwards; by default as `l2p-convert init` chooses.
        head_widths: Option<Vec<usize>> = None => "N,N,…",
        /// Width of the new head's bottleneck.
        head_bottleneck: Option<usize> = None => "N",
        /// Where weights come from: `source` (from `model`) or `scratch` (all random, in the sizes of `model`).
        #[serde(deserialize_with = "parsed", serialize_with = "shown")]
        init: Init = Init::Source => "NAME",
        /// Seed of random weights.
        init_seed: u64 = 0 => "N",
    }
    "Data" {
        /// The data set: a folder with metadata.jsonl, metadata.json or metadata.csv, or such a file. Columns: image (or
        /// file_name), prompt (or text), optionally seed.
        data: PathBuf = PathBuf::new() => "DIR|FILE",
        /// A data set for the validation loss.
        validation: Option<PathBuf> = None => "DIR|FILE",
        /// Pictures of `data` that are held out for the validation loss instead.
        held_out: usize = 0 => "N",
        /// Pictures keep about their proportions and get at most so many pixels.
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
        workers: Option<usize> = None => "N",
        /// Gigabytes of decoded pictures and caption features that stay in host memory, so that later epochs read nothing from
        /// disk; by default a quarter of what is free.
        host_cache_gb: Option<f64> = None => "GB",
        /// The share of pictures and captions that may be damaged before the run stops.
        max_damaged: f64 = 0.01 => "SHARE",
    }
    "Training" {
        /// Optimizer steps.
        steps: u64 = 1000 => "N",
        /// Minutes of training after which the run ends as it does after its last step; validation, samples and checkpoints do
        /// not count.
        max_minutes: Option<f64> = None => "MINUTES",
        /// Pictures in a batch.
        batch: usize = 1 => "N",
        /// Batches whose gradients make one step.
        accumulate: usize = 1 => "N",
        /// What is trained: `paper` (input projection, first and last 5 blocks, head), `released` (that, refiners, embedders, pad
        /// tokens), either with `:N` for another number of blocks, `full`, `head-only`, or patterns of tensor names separated
        /// by commas.
        #[serde(deserialize_with = "parsed", serialize_with = "shown")]
        policy: Policy = Policy::Paper { ends: crate::train::DEFAULT_ENDS } => "POLICY",
        /// Blocks that are computed twice to save memory: `none`, `frozen` or `all`.
        #[serde(deserialize_with = "parsed", serialize_with = "shown")]
        recompute: Recompute = Recompute::None => "WHICH",
        /// Learning rate.
        lr: f64 = 5e-5 => "RATE",
        /// Steps over which the learning rate rises from 0.
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
        /// How far noise levels are shifted towards noise: 3 at 1024², 4 at 4096².
        shift: f64 = 3.0 => "SHIFT",
        /// Entries of the table of noise levels.
        sigmas: usize = 1000 => "N",
        /// Seed of the order of the pictures, of noise levels, fresh noise and captions that are left out.
        seed: u64 = 0 => "N",
        /// Steps in a row that may be skipped because their gradients are not finite before the run stops.
        max_skipped: u32 = 10 => "N",
        /// A loss so many times the average of the last intervals is reported as a spike.
        spike_factor: f64 = 3.0 => "FACTOR",
        /// Intervals in a row with a spike after which the run stops.
        spike_patience: u32 = 3 => "N",
    }
    "Output" {
        /// Steps from one line of the log to the next.
        log_every: u64 = 10 => "N",
        /// Steps from one checkpoint to the next; 0 saves at the end only.
        save_every: u64 = 500 => "N",
        /// Checkpoints that are kept, the newest ones.
        keep_last: usize = 2 => "N",
        /// Checkpoints at multiples of so many steps are kept too; 0 for none.
        keep_every: u64 = 0 => "N",
        /// Element type of the trained tensors that are saved for use: `bf16` or `f32`.
        #[serde(deserialize_with = "parsed", serialize_with = "shown")]
        save_dtype: SaveType = SaveType::Bf16 => "TYPE",
        /// Steps from one validation loss to the next; 0 for none.
        validate_every: u64 = 100 => "N",
        /// Steps from one sheet of samples to the next; 0 for none.
        sample_every: u64 = 0 => "N",
        /// What is drawn on a sheet.
        sample_prompts: Vec<String> = Vec::new() => "TEXT",
        /// Seed of the first sample's noise; each further one takes the next.
        sample_seed: u64 = 0 => "N",
        /// Denoising steps of a sample; by default the model's.
        sample_steps: Option<usize> = None => "N",
        /// Guidance of a sample; by default the model's.
        sample_cfg: Option<f32> = None => "SCALE",
        /// Time the parts of every step, and say at the end where the time went.
        profile: bool = false => "true|false",
    }
}

/// The names of keys whose values are paths.
const PATHS: [&str; 8] = [
    "model",
    "base",
    "text_encoder",
    "tokenizer",
    "vae",
    "data",
    "validation",
    "cache",
];

/// The names of other keys whose values are texts.
const TEXTS: [&str; 10] = [
    "init",
    "size",
    "buckets",
    "noise",
    "rng",
    "policy",
    "recompute",
    "schedule",
    "save_dtype",
    "sample_prompts",
];

/// Keys with lists of values; as flags they are given several times, or with commas where no value holds one.
const LISTS: [&str; 3] = ["head_widths", "buckets", "sample_prompts"];

impl TrainConfig {
    /// Reads a file, if one is given, and lays flags over it: pairs of a key's name and a value as text.
    ///
    /// # Errors
    /// Naming the file, the key at fault, and for an unknown key the nearest known one.
    pub fn read(path: Option<&Path>, flags: &[(String, Vec<String>)]) -> Result<Self> {
        let mut table = match path {
            Some(path) => read_table(path)?,
            None => Table::new(),
        };
        for (name, values) in flags {
            let key = find_key(name).map_err(Error::invalid)?;
            table.insert(key.name.into(), flag_value(key, values));
        }
        let config: TrainConfig = Value::Table(table).try_into().map_err(|error: toml::de::Error| {
            let reason = error.to_string();
            let reason = reason.trim().replace('\n', " ");
            match path {
                Some(path) => Error::file(path, reason),
                None => Error::invalid(reason),
            }
        })?;
        config.check()?;
        Ok(config)
    }

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
        }
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

    /// Pictures of one optimizer step.
    pub fn pictures_per_step(&self) -> u64 {
        (self.batch * self.accumulate) as u64
    }

    /// Refuses a configuration that does not say where the model is and, unless it is for planning alone, where the data are.
    ///
    /// # Errors
    /// Naming the key.
    pub fn expect_named(&self, data_too: bool) -> Result<()> {
        let named = [("model", &self.model), ("data", &self.data)];
        let wanted = if data_too { &named[..] } else { &named[..1] };
        match wanted.iter().find(|(_, path)| path.as_os_str().is_empty()) {
            None => Ok(()),
            Some((name, _)) => Err(Error::invalid(format!(
                "no {name}: say {name} = \"…\" in the configuration, or --{name}"
            ))),
        }
    }

    /// Refuses values that make no sense, alone or together.
    fn check(&self) -> Result<()> {
        let refuse = |reason: String| Err(Error::invalid(reason));
        let sizings = [self.max_pixels.is_some(), self.size.is_some(), !self.buckets.is_empty()];
        if sizings.iter().filter(|given| **given).count() > 1 {
            return refuse("max_pixels, size and buckets exclude each other: give one of them".into());
        }
        if self.validation.is_some() && self.held_out > 0 {
            return refuse("validation and held_out exclude each other: give one of them".into());
        }
        if self.sample_every > 0 && self.sample_prompts.is_empty() {
            return refuse("sample_every asks for samples, but sample_prompts names none".into());
        }
        let counts = [
            ("steps", self.steps),
            ("batch", self.batch as u64),
            ("accumulate", self.accumulate as u64),
            ("log_every", self.log_every),
            ("sigmas", self.sigmas as u64),
            ("keep_last", self.keep_last as u64),
            ("workers", self.workers.unwrap_or(1) as u64),
            ("sample_steps", self.sample_steps.unwrap_or(1) as u64),
        ];
        const MOST: u64 = 1 << 40;
        if let Some((name, value)) = counts.into_iter().find(|(_, value)| !(1..=MOST).contains(value)) {
            return refuse(format!("{name} = {value}: must be at least 1 and at most {MOST}"));
        }
        let shares = [
            ("caption_dropout", self.caption_dropout, 1.0),
            ("max_damaged", self.max_damaged, 1.0),
            ("beta1", f64::from(self.beta1), 0.999_999_9),
            ("beta2", f64::from(self.beta2), 0.999_999_9),
            ("ema", f64::from(self.ema.unwrap_or(0.5)), 0.999_999_9),
        ];
        if let Some((name, value, most)) = shares
            .into_iter()
            .find(|(_, value, most)| !(0.0..=*most).contains(value))
        {
            return refuse(format!(
                "{name} = {value}: must be from 0 to {}",
                if most < 1.0 { "just below 1" } else { "1" }
            ));
        }
        let positive = [
            ("lr", self.lr),
            ("epsilon", f64::from(self.epsilon)),
            ("shift", self.shift),
            ("clip_norm", f64::from(self.clip_norm.unwrap_or(1.0))),
            ("max_minutes", self.max_minutes.unwrap_or(1.0)),
        ];
        if let Some((name, value)) = positive
            .into_iter()
            .find(|(_, value)| !(value.is_finite() && *value > 0.0))
        {
            return refuse(format!("{name} = {value}: must be a positive number"));
        }
        let others = [
            ("lr_end", self.lr_end, 0.0),
            ("weight_decay", f64::from(self.weight_decay), 0.0),
            ("spike_factor", self.spike_factor, 1.0),
            ("host_cache_gb", self.host_cache_gb.unwrap_or(0.0), 0.0),
            ("sample_cfg", f64::from(self.sample_cfg.unwrap_or(1.0)), 0.0),
        ];
        match others
            .into_iter()
            .find(|(_, value, least)| !(value.is_finite() && value >= least))
        {
            Some((name, value, least)) => refuse(format!("{name} = {value}: must be at least {least}")),
            None => Ok(()),
        }
    }
}

fn read_table(path: &Path) -> Result<Table> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
    let mut table: Table = text.parse().map_err(|error: toml::de::Error| {
        let reason = error.to_string();
        Error::file(path, reason.trim().replace('\n', " "))
    })?;
    let folder = path.parent().unwrap_or(Path::new(""));
    for (name, value) in &mut table {
        find_key(name).map_err(|reason| Error::file(path, reason))?;
        if let (true, Value::String(text)) = (PATHS.contains(&name.as_str()), &mut *value) {
            *value = Value::String(folder.join(&*text).to_string_lossy().into_owned());
        }
    }
    Ok(table)
}

/// The key of this name; otherwise what is wrong with it.
fn find_key(name: &str) -> std::result::Result<&'static Key, String> {
    if let Some(key) = KEYS.iter().find(|key| key.name == name) {
        return Ok(key);
    }
    let nearest = KEYS
        .iter()
        .map(|key| (strsim::normalized_damerau_levenshtein(name, key.name), key.name))
        .max_by(|a, b| a.0.total_cmp(&b.0));
    Err(match nearest {
        Some((likeness, nearest)) if likeness > 0.4 => format!("`{name}` is no key; did you mean `{nearest}`?"),
        _ => format!("`{name}` is no key; `l2p-train --help` lists them"),
    })
}

/// A flag's values as the file would hold them. Texts need no quotes.
fn flag_value(key: &Key, values: &[String]) -> Value {
    // What the table takes as a number or truth value is one; everything else is text.
    let scalar = |text: &str| match format!("v = {text}").parse::<Table>() {
        Ok(mut table) if !key_is_text(key) => match table.remove("v") {
            Some(value @ (Value::Integer(_) | Value::Float(_) | Value::Boolean(_))) => value,
            _ => Value::String(text.into()),
        },
        _ => Value::String(text.into()),
    };
    if !LISTS.contains(&key.name) {
        return scalar(values.last().map_or("", String::as_str));
    }
    let split_at_commas = key.name != "sample_prompts";
    let parts = values.iter().flat_map(|value| match split_at_commas {
        true => value.split(',').map(str::trim).collect::<Vec<_>>(),
        false => vec![value.as_str()],
    });
    Value::Array(parts.map(scalar).collect())
}

/// Whether a key's value is text even where it looks like a number.
fn key_is_text(key: &Key) -> bool {
    PATHS.contains(&key.name) || TEXTS.contains(&key.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(pairs: &[(&str, &str)]) -> Vec<(String, Vec<String>)> {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), vec![(*value).to_owned()]);
        pairs.iter().map(owned).collect()
    }

    fn from_flags(pairs: &[(&str, &str)]) -> Result<TrainConfig> {
        TrainConfig::read(None, &flags(&[&[("model", "m"), ("data", "d")], pairs].concat()))
    }

    fn from_file(text: &str, pairs: &[(&str, &str)]) -> Result<TrainConfig> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.toml");
        std::fs::write(&path, text).unwrap();
        let config = TrainConfig::read(Some(&path), &flags(pairs));
        config.map(|config| TrainConfig {
            model: config.model.strip_prefix(folder.path()).unwrap_or(&config.model).into(),
            ..config
        })
    }

    #[test]
    fn flags_win_over_the_file_and_paths_are_relative_to_it() {
        let text = "model = \"source\"\ndata = \"d\"\nlr = 1e-3\nbatch = 8\npolicy = \"released:2\"\nsize = \"128x64\"";
        let config = from_file(text, &[("batch", "4"), ("ema", "0.99"), ("buckets", "")]).unwrap_err();
        assert!(config.to_string().contains("no size"), "{config}");
        let config = from_file(text, &[("batch", "4"), ("ema", "0.99")]).unwrap();
        assert_eq!(
            (config.model.as_path(), config.batch, config.lr),
            (Path::new("source"), 4, 1e-3)
        );
        assert_eq!((config.ema, config.policy), (Some(0.99), Policy::Released { ends: 2 }));
        assert_eq!(config.size, Some(PictureSize { width: 128, height: 64 }));
        let config = from_flags(&[("model", "1"), ("head_widths", "8, 16"), ("buckets", "64x64,32x64")]).unwrap();
        assert_eq!(
            (config.model.as_path(), config.head_widths),
            (Path::new("1"), Some(vec![8, 16]))
        );
        assert_eq!(config.buckets.len(), 2);
        let prompts = TrainConfig::read(
            None,
            &[
                &flags(&[("model", "m"), ("data", "d")])[..],
                &[("sample_prompts".into(), vec!["a, b".into(), "7".into()])],
            ]
            .concat(),
        );
        assert_eq!(prompts.unwrap().sample_prompts, ["a, b", "7"]);
    }

    #[test]
    fn mistakes_are_named() {
        let message = |pairs: &[(&str, &str)]| from_flags(pairs).unwrap_err().to_string();
        for (pairs, word) in [
            (("stepz", "3"), "`stepz` is no key; did you mean `steps`?"),
            (("xyzzy", "3"), "`l2p-train --help` lists them"),
            (("policy", "papers"), "`papers` is no freeze policy"),
            (
                ("noise", "loud"),
                "`loud` is no kind of noise; use auto or seed or fresh",
            ),
            (("steps", "0"), "steps = 0: must be at least 1"),
            (("steps", "many"), "steps"),
            (("lr", "-1"), "lr = -1: must be a positive number"),
            (("beta1", "1"), "beta1 = 1: must be from 0 to just below 1"),
            (("max_damaged", "2"), "max_damaged = 2: must be from 0 to 1"),
            (("spike_factor", "0.5"), "spike_factor = 0.5: must be at least 1"),
            (("size", "64"), "`64` is no size"),
        ] {
            let message = message(&[pairs]);
            assert!(message.contains(word), "{pairs:?}: {message}");
        }
        assert!(message(&[("size", "64x64"), ("max_pixels", "9")]).contains("exclude each other"));
        let modest = TrainConfig::read(None, &flags(&[("model", "m"), ("profile", "true")])).unwrap();
        modest.expect_named(false).unwrap();
        let missing = modest.expect_named(true).unwrap_err().to_string();
        assert_eq!(missing, "no data: say data = \"…\" in the configuration, or --data");
        let message = from_file("model = \"m\"\ndata = \"d\"\nweight_deacy = 1", &[])
            .unwrap_err()
            .to_string();
        assert!(
            message.ends_with("train.toml: `weight_deacy` is no key; did you mean `weight_decay`?"),
            "{message}"
        );
        let message = from_file("model = ", &[]).unwrap_err().to_string();
        assert!(message.contains("train.toml"), "{message}");
    }

    #[test]
    fn a_configuration_survives_being_written() {
        let config = from_flags(&[("size", "64x64"), ("policy", "layers.*,x_*"), ("schedule", "cosine")]).unwrap();
        let json = serde_json::to_string(&config).unwrap();
        let back: TrainConfig = serde_json::from_str(&json).unwrap();
        assert_eq!(serde_json::to_string(&back).unwrap(), json);
        assert_eq!(
            (back.schedule, back.policy.to_string().as_str()),
            (ScheduleKind::Cosine, "layers.*,x_*")
        );
    }
}
