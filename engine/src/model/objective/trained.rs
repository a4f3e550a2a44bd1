//! What a model's files say that it was trained to predict, and on which schedule of noise.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Error, Result};
use crate::limits::{Beta, Real, Steps};

/// A choice between names, read and written as the name.
macro_rules! names {
    ($(#[$doc:meta])* $choice:ident, $what:literal { $($(#[$variant_doc:meta])* $variant:ident = $name:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub enum $choice {
            $($(#[$variant_doc])* #[serde(rename = $name)] $variant,)+
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

names! {
    /// What a model predicts.
    Prediction, "objective" {
        /// Flow matching: the velocity noise − picture of a straight way.
        Flow = "flow",
        /// The noise.
        Epsilon = "epsilon",
        /// `a · noise − b · picture`, where `a` and `b` are the shares of picture and noise. Source: Salimans and Ho, "Progressive
        /// Distillation for Fast Sampling of Diffusion Models" (2022).
        V = "v",
        /// The picture.
        Sample = "sample",
    }
}

names! {
    /// How variances grow over the steps of a discrete schedule, under diffusers' names.
    BetaSchedule, "schedule of betas" {
        /// Evenly.
        Linear = "linear",
        /// Their roots evenly.
        ScaledLinear = "scaled_linear",
        /// So that the share of the picture falls along a cosine. Source: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic
        /// Models" (2021).
        Cosine = "squaredcos_cap_v2",
    }
}

names! {
    /// Which steps of a discrete schedule sampling takes, under diffusers' names.
    Spacing, "spacing of timesteps" {
        /// Evenly from the first on.
        Leading = "leading",
        /// Evenly back from the last.
        Trailing = "trailing",
        /// Evenly, the first and the last among them.
        Linspace = "linspace",
    }
}

impl BetaSchedule {
    /// First and last beta of the models that made the schedule known; a cosine has none of its own.
    pub fn usual(self) -> [f64; 2] {
        match self {
            BetaSchedule::Linear | BetaSchedule::Cosine => [1e-4, 0.02],
            BetaSchedule::ScaledLinear => [0.00085, 0.012],
        }
    }
}

/// A discrete schedule of noise: `1 − beta` of the picture's variance is left at each of its steps. Entries have diffusers' names and
/// meanings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NoiseSchedule {
    /// How betas grow.
    pub beta_schedule: BetaSchedule,
    /// The first beta; a cosine has none.
    #[serde(deserialize_with = "beta")]
    pub beta_start: f64,
    /// The last beta; a cosine has none.
    #[serde(deserialize_with = "beta")]
    pub beta_end: f64,
    /// Steps of the schedule.
    #[serde(deserialize_with = "steps")]
    pub num_train_timesteps: usize,
    /// Whether betas are rescaled so that nothing is left of the picture at the last step.
    pub rescale_betas_zero_snr: bool,
    /// Which steps are taken.
    pub timestep_spacing: Spacing,
    /// Added to leading steps.
    #[serde(deserialize_with = "offset")]
    pub steps_offset: usize,
    /// Whether DDIM's last step ends at the picture, and not at the schedule's first step.
    pub set_alpha_to_one: bool,
}

fn beta<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<f64, D::Error> {
    Beta::deserialize(deserializer).map(Real::get)
}

fn steps<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<usize, D::Error> {
    Steps::deserialize(deserializer).map(Steps::get)
}

fn offset<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<usize, D::Error> {
    crate::limits::Bounded::<0, { Steps::MOST }>::deserialize(deserializer).map(crate::limits::Bounded::get)
}

impl Default for NoiseSchedule {
    /// That of "Denoising Diffusion Probabilistic Models" (Ho et al., 2020), sampled from its last step on.
    fn default() -> Self {
        NoiseSchedule {
            beta_schedule: BetaSchedule::Linear,
            beta_start: 1e-4,
            beta_end: 0.02,
            num_train_timesteps: 1000,
            rescale_betas_zero_snr: false,
            timestep_spacing: Spacing::Trailing,
            steps_offset: 0,
            set_alpha_to_one: true,
        }
    }
}

/// What a model was trained for: flow matching, or a prediction on a discrete schedule.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Said", into = "Said")]
pub struct Trained {
    /// `None` for flow matching.
    noise: Option<(Prediction, NoiseSchedule)>,
}

/// The same as files have it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Said {
    prediction: Prediction,
    #[serde(skip_serializing_if = "Option::is_none")]
    schedule: Option<NoiseSchedule>,
}

impl TryFrom<Said> for Trained {
    type Error = Error;

    fn try_from(said: Said) -> Result<Self> {
        Trained::new(said.prediction, said.schedule)
    }
}

impl From<Trained> for Said {
    fn from(trained: Trained) -> Self {
        Said {
            prediction: trained.prediction(),
            schedule: trained.noise.map(|(_, schedule)| schedule),
        }
    }
}

impl Trained {
    /// Flow matching.
    pub const FLOW: Trained = Trained { noise: None };

    /// A prediction, and for all but flow matching its schedule, which is [`NoiseSchedule::default`] where none is said.
    ///
    /// # Errors
    /// When flow matching comes with a discrete schedule, betas fall, or noise is predicted where nothing is left of the picture.
    pub fn new(prediction: Prediction, schedule: Option<NoiseSchedule>) -> Result<Self> {
        if prediction == Prediction::Flow {
            return match schedule {
                None => Ok(Trained::FLOW),
                Some(_) => Err(Error::invalid(
                    "flow matching has no discrete schedule of betas: leave it out",
                )),
            };
        }
        let schedule = schedule.unwrap_or_default();
        if schedule.beta_schedule != BetaSchedule::Cosine && schedule.beta_start > schedule.beta_end {
            return Err(Error::invalid(format!(
                "beta_start = {} is larger than beta_end = {}",
                schedule.beta_start, schedule.beta_end
            )));
        }
        if schedule.rescale_betas_zero_snr && prediction == Prediction::Epsilon {
            return Err(Error::invalid(
                "epsilon and rescale_betas_zero_snr exclude each other: where nothing is left of the picture, it cannot be told from the \
                 noise alone; a model of such a schedule predicts v or sample",
            ));
        }
        Ok(Trained {
            noise: Some((prediction, schedule)),
        })
    }

    /// What the model predicts.
    pub fn prediction(&self) -> Prediction {
        self.noise
            .as_ref()
            .map_or(Prediction::Flow, |(prediction, _)| *prediction)
    }

    /// The discrete schedule, of all but flow matching.
    pub fn schedule(&self) -> Option<&NoiseSchedule> {
        self.noise.as_ref().map(|(_, schedule)| schedule)
    }
}

impl fmt::Display for Trained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((prediction, schedule)) = &self.noise else {
            return f.write_str("flow");
        };
        write!(f, "{prediction} over {} ", schedule.num_train_timesteps)?;
        match schedule.beta_schedule {
            BetaSchedule::Cosine => f.write_str("steps of a cosine")?,
            kind => write!(f, "{kind} betas {} to {}", schedule.beta_start, schedule.beta_end)?,
        }
        match schedule.rescale_betas_zero_snr {
            true => f.write_str(", zero-terminal SNR"),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_say_it_and_contradictions_are_refused() {
        let read = |text: &str| serde_json::from_str::<Trained>(text);
        assert_eq!(read(r#"{"prediction":"flow"}"#).unwrap(), Trained::FLOW);
        let found =
            read(r#"{"prediction":"v","schedule":{"beta_schedule":"scaled_linear","rescale_betas_zero_snr":true}}"#);
        let found = found.unwrap();
        assert_eq!(found.prediction(), Prediction::V);
        assert_eq!(found.schedule().unwrap().num_train_timesteps, 1000);
        assert_eq!(read(&serde_json::to_string(&found).unwrap()).unwrap(), found);
        assert!(found.to_string().contains("v over 1000 scaled_linear"), "{found}");
        for (text, word) in [
            (r#"{"prediction":"flow","schedule":{}}"#, "no discrete schedule"),
            (
                r#"{"prediction":"epsilon","schedule":{"rescale_betas_zero_snr":true}}"#,
                "exclude each other",
            ),
            (
                r#"{"prediction":"v","schedule":{"beta_start":0.1}}"#,
                "larger than beta_end",
            ),
            (
                r#"{"prediction":"v","schedule":{"beta_start":-1}}"#,
                "expected a number from",
            ),
            (
                r#"{"prediction":"v","schedule":{"num_train_timesteps":0}}"#,
                "from 1 to",
            ),
            (r#"{"prediction":"noise"}"#, "unknown variant"),
        ] {
            let message = read(text).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    }
}
