//! Numbers from outside: what a file, a flag or a request may ask for, checked where it is read.
//!
//! A size that passed its type's bounds can be multiplied with two others of them without overflow, so that no arithmetic behind the
//! door has to be checked again. Every bound stands in this file.

mod real;

use std::fmt;
use std::str::FromStr;

use serde::de::{Deserializer, Error as _, Visitor};
use serde::{Deserialize, Serialize};

pub use real::{Range, Real};

/// A whole number from `LEAST` to `MOST`, both included. Reading one from JSON, TOML or a flag fails with the range when it lies
/// outside, whatever its sign or size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Bounded<const LEAST: u64, const MOST: u64>(u64);

/// Width of a residual stream, of a feed-forward network, of features; channels of a feature map.
pub type Width = Bounded<1, { 1 << 18 }>;
/// A width that may be absent.
pub type WidthOrNone = Bounded<0, { 1 << 18 }>;
/// Blocks or layers of one kind.
pub type Layers = Bounded<0, 512>;
/// Attention heads.
pub type Heads = Bounded<1, 4096>;
/// Entries of a vocabulary.
pub type Vocabulary = Bounded<1, { 1 << 22 }>;
/// Side of a patch, in pixels.
pub type Patch = Bounded<1, 512>;
/// Side of a picture, in pixels.
pub type Side = Bounded<1, { 1 << 16 }>;
/// Pictures in a batch, or micro-batches in a step.
pub type Batch = Bounded<1, 65_536>;
/// Denoising steps, or entries of a table of sigmas.
pub type Steps = Bounded<1, 100_000>;
/// Optimizer steps, and intervals between them (0: never).
pub type TrainSteps = Bounded<0, 1_000_000_000_000>;
/// Optimizer steps, and intervals between them, of which there is at least one.
pub type SomeTrainSteps = Bounded<1, 1_000_000_000_000>;
/// Pictures, checkpoints or steps that are counted out.
pub type Count = Bounded<0, 1_000_000_000>;
/// The same where there is at least one.
pub type SomeCount = Bounded<1, 1_000_000_000>;
/// Pixels of a picture.
pub type Pixels = Bounded<1, { 1 << 32 }>;
/// Seed of a generator: whatever a whole number of TOML holds that is not negative.
pub type Seed = Bounded<0, { i64::MAX as u64 }>;
/// Ranks of a run.
pub type Ranks = Bounded<1, 4096>;
/// Seconds that somebody waits.
pub type Patience = Bounded<1, 86_400>;
/// Threads.
pub type Threads = Bounded<1, 1024>;
/// Pictures that one command draws, and how often it draws each prompt.
pub type Pictures = Bounded<1, 1_000_000>;
/// Entries of a data set's metadata.
pub type Entries = Bounded<0, 10_000_000>;
/// Tokens of a caption whose features come from a file.
pub type CaptionTokens = Bounded<1, 4096>;
/// Quality of JPEG files.
pub type Quality = Bounded<1, 100>;

/// Pixels of a picture from a file: as many as 16384 x 16384 have. Checked against its header, before anything is decoded; it
/// bounds the time that decoding takes.
pub const PICTURE_PIXELS: u64 = 1 << 28;

/// Bytes that decoding may take: those of the file, the decoder's own and the pixels that are kept, of all pictures together that
/// are decoded at one time. A picture that needs more by itself is refused by its header. Enough for 10240 x 10240 pixels in every
/// usual format.
pub const DECODING_BYTES: u64 = 5 << 28;

/// Bytes that a picture's file may hold beside the picture: text, profiles, previews.
pub const PICTURE_METADATA: u64 = 64 << 20;

impl<const LEAST: u64, const MOST: u64> Bounded<LEAST, MOST> {
    /// The least number.
    pub const LEAST: u64 = LEAST;
    /// The largest number.
    pub const MOST: u64 = MOST;

    /// The number, if it lies in the range.
    pub const fn new(value: u64) -> Option<Self> {
        if value < LEAST || value > MOST {
            return None;
        }
        Some(Bounded(value))
    }

    /// The number.
    pub const fn get(self) -> usize {
        self.0 as usize
    }

    /// The number if it lies in the range; otherwise a sentence that says so.
    ///
    /// # Errors
    /// `expected a whole number from LEAST to MOST, found VALUE`.
    pub fn checked(value: impl TryInto<u64> + fmt::Display + Copy) -> Result<Self, String> {
        let small = value.try_into().ok().and_then(Self::new);
        small.ok_or_else(|| Self::refusal(value))
    }

    fn refusal(found: impl fmt::Display) -> String {
        format!("expected a whole number from {LEAST} to {MOST}, found {found}")
    }
}

impl<const LEAST: u64, const MOST: u64> From<Bounded<LEAST, MOST>> for u64 {
    fn from(number: Bounded<LEAST, MOST>) -> u64 {
        number.0
    }
}

impl<const LEAST: u64, const MOST: u64> fmt::Display for Bounded<LEAST, MOST> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<const LEAST: u64, const MOST: u64> FromStr for Bounded<LEAST, MOST> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let value = text.parse().ok().and_then(Self::new);
        value.ok_or_else(|| Self::refusal(format_args!("`{text}`")))
    }
}

impl<'de, const LEAST: u64, const MOST: u64> Deserialize<'de> for Bounded<LEAST, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Number<const LEAST: u64, const MOST: u64>;
        impl<const LEAST: u64, const MOST: u64> Visitor<'_> for Number<LEAST, MOST> {
            type Value = Bounded<LEAST, MOST>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a whole number from {LEAST} to {MOST}")
            }

            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Self::Value, E> {
                Bounded::checked(value).map_err(E::custom)
            }

            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Self::Value, E> {
                Bounded::checked(value).map_err(E::custom)
            }

            fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Self::Value, E> {
                // With its point, which is what is wrong with 3.0.
                Err(E::custom(Bounded::<LEAST, MOST>::refusal(format_args!("{value:?}"))))
            }
        }
        deserializer.deserialize_any(Number)
    }
}

/// Names ranges of numbers with a fraction, and the type of a number within each.
macro_rules! ranges {
    ($($(#[$doc:meta])+ $name:ident, $range:ident: $least:literal to $most:literal;)+) => {
        $(
            $(#[$doc])+
            pub type $name = Real<$range>;

            #[doc = concat!("The range of [`", stringify!($name), "`].")]
            #[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
            pub struct $range;

            impl Range for $range {
                const LEAST: f64 = $least;
                const MOST: f64 = $most;
            }
        )+
    };
}

ranges! {
    /// The variance that a step of a discrete schedule adds.
    Beta, BetaRange: 1e-8 to 0.999;
    /// Base of rotary frequencies.
    RopeTheta, RopeThetaRange: 1.0 to 1e12;
    /// What a normalisation adds to a mean square or a variance.
    NormEpsilon, NormEpsilonRange: 1e-12 to 0.1;
    /// What a timestep is multiplied by.
    TimeScale, TimeScaleRange: 1e-3 to 1e6;
    /// What a VAE's latents are divided by.
    LatentScale, LatentScaleRange: 1e-4 to 1e4;
    /// What is added to a VAE's latents then.
    LatentShift, LatentShiftRange: -1e3 to 1e3;
    /// How far sigmas are shifted towards noise.
    SigmaShift, SigmaShiftRange: 1e-2 to 1e3;
    /// Guidance.
    Guidance, GuidanceRange: 0.0 to 1e3;
}

/// Widths of an autoencoder's blocks, of which each but the first halves the picture.
pub const VAE_BLOCKS: usize = 8;

/// What the header of a safetensors file may hold. The models in the world have some hundred tensors, the largest collections of
/// experts a hundred thousand.
pub mod header {
    /// Bytes; the format's own limit.
    pub const BYTES: u64 = 100_000_000;
    /// Tensors.
    pub const TENSORS: usize = 1 << 18;
    /// Bytes of a tensor's name.
    pub const NAME: usize = 1024;
    /// Extents of a tensor.
    pub const RANK: usize = 8;
    /// Bytes of a tensor, extents of zero counted as one.
    pub const TENSOR_BYTES: usize = 1 << 48;
    /// Entries of `__metadata__`.
    pub const METADATA: usize = 1 << 16;
}

/// What a kind of file is called and how large it may be.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// The kind, for messages.
    pub kind: &'static str,
    /// The most bytes.
    pub bytes: u64,
}

const MIB: u64 = 1 << 20;

impl Budget {
    /// A `config.json`, `scheduler_config.json`, `model_index.json` or `l2p.json`.
    pub const CONFIG: Budget = Budget::new("configuration file", 4 * MIB);
    /// The index of a model's safetensors files.
    pub const SHARD_INDEX: Budget = Budget::new("index of safetensors files", 64 * MIB);
    /// A training run's configuration.
    pub const TRAIN_CONFIG: Budget = Budget::new("training configuration", MIB);
    /// A file of a tokenizer's folder.
    pub const TOKENIZER: Budget = Budget::new("tokenizer file", 64 * MIB);
    /// A chat template; published ones have up to 30 kB.
    pub const CHAT_TEMPLATE: Budget = Budget::new("chat template", MIB / 4);
    /// The metadata of a data set, or a file of prompts.
    pub const METADATA: Budget = Budget::new("metadata file", 1024 * MIB);
    /// A file that holds one prompt or caption.
    pub const CAPTION: Budget = Budget::new("caption", MIB / 4);
    /// A PNG, JPEG or WebP file; decoded pictures have a budget of their own.
    pub const PICTURE: Budget = Budget::new("picture", 512 * MIB);
    /// Features or latents that a model made, kept for later.
    pub const FEATURES: Budget = Budget::new("file of features", 1024 * MIB);
    /// The algorithms chosen for matrix products.
    pub const MATMUL_CHOICES: Budget = Budget::new("file of matrix algorithms", 16 * MIB);
    /// What a run wrote for programs.
    pub const LOG: Budget = Budget::new("log", 1024 * MIB);

    /// A budget of `bytes` for files of `kind`.
    pub const fn new(kind: &'static str, bytes: u64) -> Self {
        Budget { kind, bytes }
    }
}

/// The most numbers of an array of features: as many as 65 536 pictures have in 2048 dimensions.
pub const FEATURE_VALUES: usize = 1 << 27;
/// The most arrays of an archive of them.
pub const FEATURE_ARRAYS: usize = 4096;
/// The most bytes of the description of an array in NumPy's format; those in the world have about a hundred.
pub const ARRAY_HEADER: usize = 1 << 16;
/// The largest absolute value of a feature: beyond all of f32. What is computed with six of them multiplied stays within f64.
pub const FEATURE_VALUE: f64 = 1e40;

/// The most bytes of a prompt or caption.
pub const LONGEST_PROMPT: usize = 1 << 16;
/// The most bytes of a prompt with its chat template around it.
pub const LONGEST_RENDERED: usize = 1 << 18;
/// The most bytes that a tokenizer's normalizer and pre-tokenizer may make of that, by an estimate that is never too low. Each takes
/// some 35 bytes of memory.
pub const LONGEST_NORMALIZED: f64 = (1 << 24) as f64;
/// Operators in one expression of a chat template: each can nest once more, and the time to compile them grows with their square.
pub const TEMPLATE_OPERATORS: usize = 1000;
/// `elif` branches of a chat template, each of which nests once more.
pub const TEMPLATE_BRANCHES: usize = 1000;
/// What rendering a chat template may cost: an instruction, or 64 bytes of text, each. Published ones need about a thousand.
pub const TEMPLATE_FUEL: u64 = 200_000;
/// Spaces by which a chat template may indent JSON.
pub const TEMPLATE_INDENT: usize = 64;
/// How deep values may be nested that a chat template keeps in a namespace.
pub const TEMPLATE_DEPTH: usize = 64;
/// Seconds in which a chat template is rendered, or a prompt tokenized; both usually take less than a millisecond.
pub const PROMPT_SECONDS: u64 = 3;
/// Seconds in which a tokenizer's file is brought into memory; large ones take about one.
pub const TOKENIZER_SECONDS: u64 = 60;
/// The most bytes of a tokenizer's steps (normalizer, pre-tokenizer and so on); the largest published ones have 0.4 MB.
pub const TOKENIZER_STEPS: usize = 4 << 20;
/// The most tokens that a tokenizer may add to every text.
pub const TOKENIZER_ADDED: usize = 256;

/// Reads a finite number; JSON and TOML can spell infinities (`1e999`, `inf`) that no setting means.
///
/// # Errors
/// When the number is not finite.
pub fn finite<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let value = f64::deserialize(deserializer)?;
    match value.is_finite() {
        true => Ok(value),
        false => Err(D::Error::custom(format!("expected a finite number, found {value}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_outside_are_refused_with_the_range_wherever_they_come_from() {
        type Small = Bounded<1, 8>;
        assert_eq!(serde_json::from_str::<Small>("8").unwrap().get(), 8);
        for text in ["0", "9", "-1", "1.5", "18446744073709551615", "1e30"] {
            let message = serde_json::from_str::<Small>(text).unwrap_err().to_string();
            assert!(message.contains("a whole number from 1 to 8"), "{text}: {message}");
        }
        assert!(serde_json::from_str::<Small>("\"3\"").is_err());
        assert_eq!("3".parse::<Small>().unwrap().get(), 3);
        for text in ["0", "-1", "3.0", "", "99999999999999999999999"] {
            assert!(text.parse::<Small>().unwrap_err().contains("from 1 to 8"));
        }
        assert!(Small::checked(-4i64).unwrap_err().contains("found -4"));
    }

    #[test]
    fn three_sizes_multiply_without_overflow() {
        let most = Bounded::<1, { 1 << 18 }>::new(1 << 18).unwrap().get();
        assert!(most.checked_mul(most).and_then(|area| area.checked_mul(most)).is_some());
    }
}
