//! The keys of a configuration as flags.

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, Error, FromArgMatches};
use l2p_engine::train::run::{KEYS, Key, TrainConfig};
use serde_json::Value;

/// The flags that were given: names of keys, and their values as text.
#[derive(Clone, Debug, Default)]
pub struct KeyFlags(pub Vec<(String, Vec<String>)>);

impl Args for KeyFlags {
    fn augment_args(command: Command) -> Command {
        let defaults = serde_json::to_value(TrainConfig::default()).unwrap_or_default();
        command.args(KEYS.iter().map(|key| flag(key, &defaults[key.name])))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for KeyFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let mut flags = KeyFlags::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        let given = KEYS
            .iter()
            .filter(|key| matches.value_source(key.name) == Some(ValueSource::CommandLine));
        self.0 = given
            .map(|key| {
                let values = matches.get_many::<String>(key.name).into_iter().flatten();
                (key.name.to_owned(), values.cloned().collect())
            })
            .collect();
        Ok(())
    }
}

/// The flag of a key: `weight_decay` is `--weight-decay`.
fn flag(key: &Key, default: &Value) -> Arg {
    let words: Vec<&str> = key.help.split_whitespace().collect();
    let help = words.join(" ").replace('`', "");
    let help = help.strip_suffix('.').unwrap_or(&help);
    let help = match shown(default) {
        Some(default) => format!("{help} [default: {default}]"),
        None => help.to_owned(),
    };
    let arg = Arg::new(key.name)
        .long(key.name.replace('_', "-"))
        .value_name(key.value)
        .help_heading(key.group)
        .help(help)
        .action(ArgAction::Append);
    match default {
        // `--profile` alone says yes.
        Value::Bool(_) => arg.num_args(0..=1).default_missing_value("true"),
        _ => arg.allow_hyphen_values(true),
    }
}

/// A default that is worth saying.
fn shown(default: &Value) -> Option<String> {
    match default {
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        Value::Number(number) => Some(match number.as_f64() {
            Some(value) if number.is_f64() => as_written(value),
            _ => number.to_string(),
        }),
        _ => None,
    }
}

/// A number as a person would write it.
fn as_written(value: f64) -> String {
    // A number of f32 has digits in f64 that nobody wrote.
    let single = value as f32;
    if value != 0.0 && value.abs() < 1e-3 {
        shorter(format!("{value:e}"), format!("{single:e}"))
    } else {
        shorter(value.to_string(), single.to_string())
    }
}

/// The shorter of two texts.
fn shorter(one: String, other: String) -> String {
    if other.len() < one.len() { other } else { one }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_a_flag() {
        let command = KeyFlags::augment_args(Command::new("l2p-train"));
        command.clone().debug_assert();
        let matches = command.get_matches_from([
            "l2p-train",
            "--lr",
            "1e-3",
            "--sample-prompts",
            "a",
            "--sample-prompts",
            "b",
            "--profile",
        ]);
        let flags = KeyFlags::from_arg_matches(&matches).unwrap();
        let expected = [
            ("lr", vec!["1e-3"]),
            ("sample_prompts", vec!["a", "b"]),
            ("profile", vec!["true"]),
        ];
        let expected = expected.map(|(name, values)| (name.to_owned(), values.into_iter().map(String::from).collect()));
        assert_eq!(flags.0, expected);
    }

    #[test]
    fn defaults_read_as_they_were_written() {
        let defaults = serde_json::to_value(TrainConfig::default()).unwrap();
        let of = |name: &str| shown(&defaults[name]);
        assert_eq!(of("lr").as_deref(), Some("5e-5"));
        assert_eq!(of("beta1").as_deref(), Some("0.9"));
        assert_eq!(of("epsilon").as_deref(), Some("1e-8"));
        assert_eq!(
            (of("shift").as_deref(), of("steps").as_deref()),
            (Some("3"), Some("1000"))
        );
        assert_eq!(of("policy").as_deref(), Some("paper"));
        assert_eq!((of("model"), of("clip_norm"), of("buckets")), (None, None, None));
    }
}
