//! Reading a configuration from a file and from flags.

use std::path::Path;

use toml::{Table, Value};

use super::{KEYS, TrainConfig};
use crate::error::{Error, Result};
use crate::files;
use crate::limits::Budget;
use crate::printable::{printable, shown_name};
use crate::train::run::keys::Key;

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

/// What other trainers call a key.
const ELSEWHERE: [(&str, &str); 58] = [
    ("pretrained_model", "model"),
    ("pretrained_model_name_or_path", "model"),
    ("model_path", "model"),
    ("text_encoder_path", "text_encoder"),
    ("vae_path", "vae"),
    ("patch_size", "patch"),
    ("dataset", "data"),
    ("data_dir", "data"),
    ("train_data", "data"),
    ("train_data_dir", "data"),
    ("validation_data", "validation"),
    ("resolution", "size"),
    ("image_size", "size"),
    ("width", "size"),
    ("height", "size"),
    ("num_workers", "workers"),
    ("dataloader_num_workers", "workers"),
    ("cache_dir", "cache"),
    ("num_steps", "steps"),
    ("max_steps", "steps"),
    ("max_train_steps", "steps"),
    ("train_steps", "steps"),
    ("iterations", "steps"),
    ("batch_size", "batch"),
    ("train_batch_size", "batch"),
    ("grad_accum", "accumulate"),
    ("accumulation_steps", "accumulate"),
    ("gradient_accumulation", "accumulate"),
    ("gradient_accumulation_steps", "accumulate"),
    ("learning_rate", "lr"),
    ("min_lr", "lr_end"),
    ("lr_warmup_steps", "warmup"),
    ("warmup_steps", "warmup"),
    ("lr_scheduler", "schedule"),
    ("scheduler", "schedule"),
    ("adam_beta1", "beta1"),
    ("adam_beta2", "beta2"),
    ("eps", "epsilon"),
    ("adam_epsilon", "epsilon"),
    ("wd", "weight_decay"),
    ("adam_weight_decay", "weight_decay"),
    ("grad_clip", "clip_norm"),
    ("max_grad_norm", "clip_norm"),
    ("ema_decay", "ema"),
    ("gradient_checkpointing", "recompute"),
    ("random_seed", "seed"),
    ("logging_steps", "log_every"),
    ("save_steps", "save_every"),
    ("checkpointing_steps", "save_every"),
    ("checkpoints_total_limit", "keep_last"),
    ("eval_steps", "validate_every"),
    ("validation_steps", "validate_every"),
    ("validation_prompt", "sample_prompts"),
    ("guidance_scale", "sample_cfg"),
    ("prediction_type", "objective"),
    ("beta_schedule", "betas"),
    ("rescale_betas_zero_snr", "zero_snr"),
    ("sampler", "sample_solver"),
];

/// The way out for whoever wrote a path of Windows in double quotes.
const BACKSLASHES: &str = "in double quotes a backslash begins an escape: put a path in single quotes, 'C:\\Users', or write it \
                           with /";

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
        let config: TrainConfig = serde_path_to_error::deserialize(Value::Table(table)).map_err(|error| {
            let reason = error.inner().message().trim().replace('\n', " ");
            let reason = format!("`{}`: {reason}", error.path());
            match path {
                Some(path) => Error::file(path, reason),
                None => Error::invalid(reason),
            }
        })?;
        config.check()?;
        Ok(config)
    }
}

fn read_table(path: &Path) -> Result<Table> {
    let text = files::read_text(path, Budget::TRAIN_CONFIG)?;
    let mut table: Table = text
        .parse()
        .map_err(|error: toml::de::Error| Error::file(path, syntax(&text, &error)))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let folder = folder.to_str().ok_or_else(|| {
        Error::file(
            path,
            "is in a folder whose name is not UTF-8, which its paths cannot begin with",
        )
    })?;
    for (name, value) in &mut table {
        find_key(name).map_err(|reason| Error::file(path, reason))?;
        if let (true, Value::String(text)) = (PATHS.contains(&name.as_str()), &mut *value) {
            if text.chars().any(char::is_control) {
                let reason = format!(
                    "`{name}` holds a control character ({}); {BACKSLASHES}",
                    printable(text)
                );
                return Err(Error::file(path, reason));
            }
            *value = Value::String(Path::new(folder).join(&*text).to_string_lossy().into_owned());
        }
    }
    Ok(table)
}

/// What is wrong with the TOML, and where.
fn syntax(text: &str, error: &toml::de::Error) -> String {
    let start = error.span().map_or(0, |span| span.start.min(text.len()));
    let before = text.get(..start).unwrap_or_default();
    let number = before.matches('\n').count() + 1;
    let line = text.lines().nth(number - 1).unwrap_or_default();
    let reason = error.message().trim().replace('\n', " ");
    let way = match line.contains('\\') {
        true => format!("; {BACKSLASHES}"),
        false => String::new(),
    };
    format!("line {number}, `{}`: {reason}{way}", shown_name(line.trim()))
}

/// The key of this name; otherwise what is wrong with it.
fn find_key(name: &str) -> std::result::Result<&'static Key, String> {
    if let Some(key) = KEYS.iter().find(|key| key.name == name) {
        return Ok(key);
    }
    let shown = shown_name(name);
    Err(match nearest_key(name) {
        Some(nearest) => format!("`{shown}` is no key; did you mean `{nearest}`?"),
        None => format!("`{shown}` is no key; `l2p-train --help` lists them"),
    })
}

/// The key that is meant by a name that is none: what other programs call it, or a slip of the hand.
pub fn nearest_key(name: &str) -> Option<&'static str> {
    let name = name.to_ascii_lowercase().replace('-', "_");
    if let Some((_, key)) = ELSEWHERE.iter().find(|(elsewhere, _)| *elsewhere == name) {
        return Some(key);
    }
    let likeness = |key: &Key| strsim::normalized_damerau_levenshtein(&name, key.name);
    let nearest = KEYS.iter().map(|key| (likeness(key), key.name));
    let nearest = nearest.max_by(|a, b| a.0.total_cmp(&b.0));
    nearest
        .filter(|(likeness, _)| *likeness > 0.4)
        .map(|(_, nearest)| nearest)
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
    use crate::data::PictureSize;
    use crate::train::Policy;
    use crate::train::run::ScheduleKind;

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
            (
                ("steps", "0"),
                "`steps`: expected a whole number from 1 to 1000000000000, found 0",
            ),
            (
                ("seed", "-1"),
                "`seed`: expected a whole number from 0 to 9223372036854775807, found -1",
            ),
            (
                ("batch", "2.0"),
                "`batch`: expected a whole number from 1 to 65536, found 2.0",
            ),
            (("learning_rate", "1"), "`learning_rate` is no key; did you mean `lr`?"),
            (("train-batch-size", "1"), "did you mean `batch`?"),
            (("steps", "many"), "steps"),
            (("lr", "-1"), "lr = -1: must be a positive number"),
            (("lr", "1e39"), "lr = 1"),
            (("lr", "nan"), "lr = NaN: must be a positive number"),
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
        modest.ensure_named(false).unwrap();
        let missing = modest.ensure_named(true).unwrap_err().to_string();
        assert_eq!(missing, "no data: say data = \"…\" in the configuration, or --data");
        let message = from_file("model = \"m\"\ndata = \"d\"\nweight_deacy = 1", &[])
            .unwrap_err()
            .to_string();
        assert!(
            message.ends_with("train.toml: `weight_deacy` is no key; did you mean `weight_decay`?"),
            "{message}"
        );
        let message = from_file("model = \"m\"\ndata = \"C:\\Users\"", &[])
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("line 2") && message.contains("single quotes, 'C:\\Users'"),
            "{message}"
        );
        let message = from_file("model = \"C:\\temp\"", &[]).unwrap_err().to_string();
        assert!(message.contains("`model` holds a control character"), "{message}");
        let message = from_file("model = ", &[]).unwrap_err().to_string();
        assert!(message.contains("train.toml"), "{message}");
    }

    /// Every key with a number, far out on either side: refused by name, without a panic and without being taken for another.
    #[test]
    fn numbers_far_out_are_refused_by_name() {
        let table = Table::try_from(TrainConfig::default()).unwrap();
        let optional = [
            "patch",
            "head_widths",
            "head_bottleneck",
            "max_pixels",
            "workers",
            "host_cache_gb",
            "max_minutes",
            "clip_norm",
            "ema",
            "sample_steps",
            "sample_cfg",
        ];
        let numbers = table.iter().filter(|(_, value)| value.is_integer() || value.is_float());
        let names: Vec<&str> = numbers.map(|(name, _)| name.as_str()).chain(optional).collect();
        assert!(names.len() >= 38, "{names:?}");
        for name in names {
            for value in [
                "-1",
                "-9223372036854775808",
                "1e300",
                "nan",
                "-inf",
                "\"many\"",
                "99999999999999999999",
            ] {
                let message = match from_flags(&[(name, value)]) {
                    Err(error) => error.to_string(),
                    Ok(config) => panic!("{name} = {value} was taken: {config:?}"),
                };
                assert!(message.contains(name), "{name} = {value}: {message}");
            }
        }
        for (name, value) in [
            ("workers", 1u64 << 32),
            ("accumulate", 1 << 32),
            ("steps", 1 << 40),
            ("sigmas", 1 << 40),
        ] {
            let message = from_flags(&[(name, &value.to_string())]).unwrap_err().to_string();
            assert!(
                message.contains(&format!("`{name}`: expected a whole number")),
                "{message}"
            );
        }
        let message = from_flags(&[("size", "65552x16")]).unwrap_err().to_string();
        assert!(
            message.contains("`65552x16` is no size in pixels") && message.contains("sides of 1 to 65536"),
            "{message}"
        );
        // What a file of this program says of itself is checked too.
        let mut json = serde_json::to_value(TrainConfig::default()).unwrap();
        json["accumulate"] = (1u64 << 32).into();
        assert!(serde_json::from_value::<TrainConfig>(json).is_err());
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
