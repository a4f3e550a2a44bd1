//! Values of a configuration that are chosen by name, and how values are read from text and written as text.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// A choice between names.
macro_rules! choice {
    ($(#[$doc:meta])* $choice:ident, $what:literal { $($(#[$variant_doc:meta])* $variant:ident = $name:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $choice {
            $($(#[$variant_doc])* $variant,)+
        }

        impl FromStr for $choice {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                match text {
                    $($name => Ok($choice::$variant),)+
                    _ => Err(Error::invalid(format!(
                        concat!("`{}` is no ", $what, "; use {}"), text, [$($name),+].join(" or ")
                    ))),
                }
            }
        }

        impl fmt::Display for $choice {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self {
                    $($choice::$variant => $name,)+
                })
            }
        }
    };
}

choice! {
    /// Where weights come from.
    Init, "way to begin" {
        /// From the model.
        Source = "source",
        /// From random numbers.
        Scratch = "scratch",
    }
}

choice! {
    /// The noise of training pictures.
    Noise, "kind of noise" {
        /// By seed where every picture has one, else fresh.
        Auto = "auto",
        /// That of the picture's seed.
        Seed = "seed",
        /// Another every time.
        Fresh = "fresh",
    }
}

choice! {
    /// The course of the learning rate.
    ScheduleKind, "schedule" {
        /// The same after the warm-up.
        Constant = "constant",
        /// Falls along half a cosine.
        Cosine = "cosine",
    }
}

choice! {
    /// Element types of saved tensors.
    SaveType, "element type to save" {
        /// bfloat16, as published models have it.
        Bf16 = "bf16",
        /// f32, for further arithmetic.
        F32 = "f32",
    }
}

pub(super) fn parsed<'de, D: Deserializer<'de>, T: FromStr<Err = Error>>(
    deserializer: D,
) -> std::result::Result<T, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(serde::de::Error::custom)
}

pub(super) fn parsed_option<'de, D: Deserializer<'de>, T: FromStr<Err = Error>>(
    deserializer: D,
) -> std::result::Result<Option<T>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    text.map(|text| text.parse().map_err(serde::de::Error::custom))
        .transpose()
}

pub(super) fn parsed_list<'de, D: Deserializer<'de>, T: FromStr<Err = Error>>(
    deserializer: D,
) -> std::result::Result<Vec<T>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    texts
        .iter()
        .map(|text| text.parse().map_err(serde::de::Error::custom))
        .collect()
}

pub(super) fn shown<S: Serializer, T: fmt::Display>(value: &T, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

pub(super) fn shown_option<S: Serializer, T: fmt::Display>(
    value: &Option<T>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    value.as_ref().map(ToString::to_string).serialize(serializer)
}

pub(super) fn shown_list<S: Serializer, T: fmt::Display>(
    values: &[T],
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    values
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .serialize(serializer)
}
