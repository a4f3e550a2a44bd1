//! Numbers of a configuration: read through the bounds of their kind, plain from there on.

use serde::de::Error;
use serde::{Deserialize, Deserializer};

use crate::limits::{Batch, Count, Patch, Pixels, Seed, SomeCount, SomeTrainSteps, Steps, Threads, TrainSteps, Width};

fn plain<B: Into<u64>, T: TryFrom<u64>, E: Error>(number: B) -> Result<T, E> {
    // The fields have room for what the bounds let through; one that has not says so instead of losing digits.
    T::try_from(number.into()).map_err(|_| E::custom("the number is too large"))
}

/// Readers of numbers that are there, or have a default.
macro_rules! readers {
    ($($name:ident: $bounds:ident,)+) => {$(
        pub(super) fn $name<'de, D: Deserializer<'de>, T: TryFrom<u64>>(deserializer: D) -> Result<T, D::Error> {
            plain($bounds::deserialize(deserializer)?)
        }
    )+};
}

/// Readers of numbers that may be absent.
macro_rules! optional_readers {
    ($($name:ident: $bounds:ident,)+) => {$(
        pub(super) fn $name<'de, D: Deserializer<'de>, T: TryFrom<u64>>(
            deserializer: D,
        ) -> Result<Option<T>, D::Error> {
            Option::<$bounds>::deserialize(deserializer)?.map(plain).transpose()
        }
    )+};
}

readers! {
    batch: Batch,
    count: Count,
    seed: Seed,
    some_count: SomeCount,
    some_steps: SomeTrainSteps,
    steps: TrainSteps,
    table: Steps,
}

optional_readers! {
    optional_patch: Patch,
    optional_pixels: Pixels,
    optional_table: Steps,
    optional_threads: Threads,
    optional_width: Width,
}

/// Widths of several stages.
pub(super) fn optional_widths<'de, D: Deserializer<'de>, T: TryFrom<u64>>(
    deserializer: D,
) -> Result<Option<Vec<T>>, D::Error> {
    let widths = Option::<Vec<Width>>::deserialize(deserializer)?;
    widths.map(|widths| widths.into_iter().map(plain).collect()).transpose()
}
