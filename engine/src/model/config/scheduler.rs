//! The schedule's settings: flow matching's, or those of a discrete schedule, as the class of the file decides.
//!
//! What the discrete schedulers of diffusers share is read off any of [`DISCRETE`]; a solver is chosen apart from it.

use std::path::Path;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files;
use crate::limits::{Beta, Bounded, Budget, Real, SigmaShift, Steps};
use crate::model::objective::{BetaSchedule, NoiseSchedule, Prediction, Spacing, Trained};
use crate::printable::shown_name;

/// The class that is carried out.
const CLASS: &str = "FlowMatchEulerDiscreteScheduler";

/// The classes whose discrete schedules are carried out, and how each spaces timesteps where the file does not say.
const DISCRETE: [(&str, Spacing); 4] = [
    ("DDIMScheduler", Spacing::Leading),
    ("DDPMScheduler", Spacing::Leading),
    ("DPMSolverMultistepScheduler", Spacing::Linspace),
    ("EulerDiscreteScheduler", Spacing::Linspace),
];

/// The classes that clip the picture of every step where the file does not say.
const CLIPPING: [&str; 2] = ["DDIMScheduler", "DDPMScheduler"];

/// The timesteps that a model's time runs over.
const TRAIN_TIMESTEPS: f64 = 1000.0;

/// The schedule's settings, from `scheduler_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SchedulerConfig {
    /// How far sigmas are shifted towards noise.
    pub shift: f32,
    /// What the model was trained for.
    pub trained: Trained,
    /// What the file asks for and this program does not do, in words; pictures are right all the same, but not those that
    /// other programs draw with the file.
    pub notes: Vec<String>,
}

/// The entries that are used, or would make a difference.
#[derive(Deserialize)]
struct Entries {
    #[serde(rename = "_class_name")]
    class_name: Option<String>,
    shift: Option<SigmaShift>,
    num_train_timesteps: Option<f64>,
    prediction_type: Option<String>,
    #[serde(default)]
    use_flow_sigmas: Option<bool>,
    invert_sigmas: Option<bool>,
    use_dynamic_shifting: Option<bool>,
    shift_terminal: Option<f64>,
    stochastic_sampling: Option<bool>,
    use_karras_sigmas: Option<bool>,
    use_exponential_sigmas: Option<bool>,
    use_beta_sigmas: Option<bool>,
    use_lu_lambdas: Option<bool>,
    flow_shift: Option<SigmaShift>,
    beta_schedule: Option<String>,
    beta_start: Option<Beta>,
    beta_end: Option<Beta>,
    trained_betas: Option<IgnoredAny>,
    variance_type: Option<String>,
    rescale_betas_zero_snr: Option<bool>,
    timestep_spacing: Option<Spacing>,
    steps_offset: Option<Bounded<0, { Steps::MOST }>>,
    set_alpha_to_one: Option<bool>,
    clip_sample: Option<bool>,
    thresholding: Option<bool>,
    algorithm_type: Option<String>,
    solver_order: Option<f64>,
    solver_type: Option<String>,
    final_sigmas_type: Option<String>,
}

impl SchedulerConfig {
    /// Reads `scheduler_config.json` in the scheduler's folder.
    ///
    /// # Errors
    /// When it cannot be read, the shift makes no sense, or it asks for something without which pictures would be wrong.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("scheduler_config.json");
        // What is no JSON, and is written all the same where a solver's λ has no bound.
        let text = files::read_text(&path, Budget::CONFIG)?.replace(": -Infinity", ": null");
        let entries: Entries = files::from_json(text.as_bytes()).map_err(|reason| Error::file(&path, reason))?;
        let refuse = |reason| Error::file(&path, reason);
        entries.check().map_err(refuse)?;
        Ok(SchedulerConfig {
            shift: entries.shift().map_or(1.0, Real::single),
            trained: entries.trained().map_err(refuse)?,
            notes: entries
                .notes()
                .into_iter()
                .map(|note| format!("{}: {note}", path.display()))
                .collect(),
        })
    }
}

impl Entries {
    /// Whether it describes a walk along straight lines from noise to the picture, by whatever solver.
    fn is_flow(&self) -> bool {
        let class = self.class_name.as_deref();
        let flow_prediction = self.prediction_type.as_deref() == Some("flow_prediction");
        class.is_none_or(|class| class.contains("FlowMatch")) || flow_prediction || self.use_flow_sigmas == Some(true)
    }

    /// Flow matching's shift, under the name that its class has for it.
    fn shift(&self) -> Option<SigmaShift> {
        match self.is_flow() {
            true => self.shift.or(self.flow_shift),
            false => None,
        }
    }

    /// What the model was trained for.
    fn trained(&self) -> std::result::Result<Trained, String> {
        if self.is_flow() {
            return Ok(Trained::FLOW);
        }
        let spacing = self.spacing()?;
        let prediction = match self.prediction_type.as_deref() {
            None | Some("epsilon") => Prediction::Epsilon,
            Some("v_prediction") => Prediction::V,
            Some("sample") => Prediction::Sample,
            Some(other) => {
                let other = shown_name(other);
                return Err(format!(
                    "says prediction_type = {other}, only epsilon, v_prediction and sample are supported"
                ));
            }
        };
        let beta_schedule = match self.beta_schedule.as_deref() {
            None => BetaSchedule::Linear,
            Some(name) => name.parse().map_err(|_| {
                let name = shown_name(name);
                format!("says beta_schedule = {name}, only linear, scaled_linear and squaredcos_cap_v2 are supported")
            })?,
        };
        let steps = self.num_train_timesteps.unwrap_or(TRAIN_TIMESTEPS);
        let steps = Some(steps as u64)
            .filter(|whole| *whole as f64 == steps)
            .and_then(Steps::new);
        let Some(steps) = steps else {
            return Err(format!(
                "says num_train_timesteps = {:?}, only 1 to {} are supported",
                self.num_train_timesteps,
                Steps::MOST
            ));
        };
        let defaults = NoiseSchedule::default();
        let schedule = NoiseSchedule {
            beta_schedule,
            beta_start: self.beta_start.map_or(defaults.beta_start, Real::get),
            beta_end: self.beta_end.map_or(defaults.beta_end, Real::get),
            num_train_timesteps: steps.get(),
            rescale_betas_zero_snr: self.rescale_betas_zero_snr.unwrap_or(false),
            timestep_spacing: self.timestep_spacing.unwrap_or(spacing),
            steps_offset: self.steps_offset.map_or(0, Bounded::get),
            set_alpha_to_one: self.set_alpha_to_one.unwrap_or(true),
        };
        Trained::new(prediction, Some(schedule)).map_err(|error| error.to_string())
    }

    /// How the file's class spaces timesteps where the file does not say.
    fn spacing(&self) -> std::result::Result<Spacing, String> {
        let class = self.class_name.as_deref().unwrap_or_default();
        let known = DISCRETE.iter().find(|(name, _)| *name == class);
        known.map(|(_, spacing)| *spacing).ok_or_else(|| {
            let names = DISCRETE.map(|(name, _)| name).join(", ");
            format!("describes a {}; only {CLASS}, {names} are supported", shown_name(class))
        })
    }

    /// What of a discrete schedule would make pictures wrong, in words.
    fn check_discrete(&self) -> std::result::Result<(), String> {
        self.spacing()?;
        let class = self.class_name.as_deref().unwrap_or_default();
        if self.clip_sample.unwrap_or(CLIPPING.contains(&class)) {
            return Err("clips pictures at every step (clip_sample, which is true where this class does not say), which is not \
                        supported: a model that draws well without it says clip_sample = false"
                .into());
        }
        if self.thresholding == Some(true) {
            return Err("says thresholding = true, which is not supported".into());
        }
        if self.trained_betas.is_some() {
            return Err("says trained_betas: only betas of a beta_schedule are supported".into());
        }
        match self.variance_type.as_deref() {
            Some(learned) if learned.starts_with("learned") => Err(format!(
                "says variance_type = {}: models that predict a variance too are not supported",
                shown_name(learned)
            )),
            _ => Ok(()),
        }
    }

    /// What would make pictures wrong, in words.
    fn check(&self) -> std::result::Result<(), String> {
        if !self.is_flow() {
            return self.check_discrete();
        }
        if self.invert_sigmas == Some(true) {
            return Err(
                "says invert_sigmas = true: time runs from the picture to noise, which is not supported".into(),
            );
        }
        match self.num_train_timesteps {
            Some(steps) if steps != TRAIN_TIMESTEPS => Err(format!(
                "says num_train_timesteps = {steps}, only {TRAIN_TIMESTEPS} is supported"
            )),
            _ => Ok(()),
        }
    }

    /// What is left undone, in words.
    fn notes(&self) -> Vec<String> {
        let mut notes = match self.is_flow() {
            true => Vec::new(),
            false => self.solver_notes(),
        };
        let other_class = self
            .class_name
            .as_deref()
            .filter(|class| *class != CLASS && self.is_flow());
        if let Some(class) = other_class {
            notes.push(format!(
                "describes a {}; steps are Euler's all the same",
                shown_name(class)
            ));
        }
        if self.use_dynamic_shifting == Some(true) {
            let shift = self.shift().map_or(1.0, Real::get);
            notes.push(format!(
                "says use_dynamic_shifting: the shift does not follow the picture's size here, it is {shift} unless you set \
                 another"
            ));
        }
        let spacings = [
            ("use_karras_sigmas", self.use_karras_sigmas),
            ("use_exponential_sigmas", self.use_exponential_sigmas),
            ("use_beta_sigmas", self.use_beta_sigmas),
            ("use_lu_lambdas", self.use_lu_lambdas),
        ];
        for (name, _) in spacings.into_iter().filter(|(_, said)| *said == Some(true)) {
            notes.push(format!(
                "says {name}: sigmas are spaced evenly and shifted all the same"
            ));
        }
        if let Some(terminal) = self.shift_terminal {
            notes.push(format!(
                "says shift_terminal = {terminal}: sigmas are not stretched to it"
            ));
        }
        if self.stochastic_sampling == Some(true) {
            notes.push("says stochastic_sampling: no noise is added between steps".into());
        }
        notes
    }

    /// How the file's solver is another than those that are there.
    fn solver_notes(&self) -> Vec<String> {
        let class = self.class_name.as_deref().unwrap_or_default();
        let mut notes = Vec::new();
        match class {
            "DDIMScheduler" => {}
            "DPMSolverMultistepScheduler" => {
                let plain = |said: &Option<String>, known: &str| said.as_deref().is_none_or(|said| said == known);
                let second = self.solver_order.is_none_or(|order| order == 2.0);
                let known =
                    plain(&self.algorithm_type, "dpmsolver++") && plain(&self.solver_type, "midpoint") && second;
                if !known || !plain(&self.final_sigmas_type, "zero") {
                    notes.push(
                        "describes another DPM-Solver than dpmsolver++ of order 2 with midpoints and final_sigmas_type zero: steps are \
                         ddim's, or dpm++2m's where you ask for them"
                            .into(),
                    );
                }
            }
            class => notes.push(format!(
                "describes a {}; steps are ddim's, without added noise, or dpm++2m's where you ask for them",
                shown_name(class)
            )),
        }
        notes
    }
}
