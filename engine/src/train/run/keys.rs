//! The keys of a configuration: one table from which the structure, the command line's flags and the list of known names
//! follow.

/// A key as the user sees it.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// The name in the file; as a flag, `_` is written `-`.
    pub name: &'static str,
    /// The heading under which it is explained.
    pub group: &'static str,
    /// What its value stands for, for the command line's help.
    pub value: &'static str,
    /// What it means.
    pub help: &'static str,
}

/// Makes `TrainConfig` and [`Key`]s from lines of `/// help`, `name: type = default => "VALUE"`.
macro_rules! configuration {
    ($($group:literal { $(
        $(#[doc = $help:literal])+
        $(#[serde($($serde:tt)+)])*
        $name:ident: $type:ty = $default:expr => $value:literal,
    )+ })+) => {
        /// What to train, on what, and how; see the keys' own words.
        #[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
        #[serde(default)]
        pub struct TrainConfig {
            $($(
                $(#[doc = $help])+
                $(#[serde($($serde)+)])*
                pub $name: $type,
            )+)+
        }

        impl Default for TrainConfig {
            fn default() -> Self {
                TrainConfig { $($($name: $default,)+)+ }
            }
        }

        /// All keys, in the order of the help.
        pub const KEYS: &[Key] = &[$($(
            Key {
                name: stringify!($name),
                group: $group,
                value: $value,
                help: concat!($($help, "\n"),+),
            },
        )+)+];
    };
}

pub(super) use configuration;
