//! The schedule's settings.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::read_json;
use crate::error::{Error, Result};
use crate::limits::{Real, SigmaShift};
use crate::printable::shown_name;

/// The class that is carried out.
const CLASS: &str = "FlowMatchEulerDiscreteScheduler";

/// The timesteps that a model's time runs over.
const TRAIN_TIMESTEPS: f64 = 1000.0;

/// The schedule's settings, from `scheduler_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SchedulerConfig {
    /// How far sigmas are shifted towards noise.
    pub shift: f32,
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
}

impl SchedulerConfig {
    /// Reads `scheduler_config.json` in the scheduler's folder.
    ///
    /// # Errors
    /// When it cannot be read, the shift makes no sense, or it asks for something without which pictures would be wrong.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("scheduler_config.json");
        let entries: Entries = read_json(&path)?;
        entries.check().map_err(|reason| Error::file(&path, reason))?;
        Ok(SchedulerConfig {
            shift: entries.shift.map_or(1.0, Real::single),
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

    /// What would make pictures wrong, in words.
    fn check(&self) -> std::result::Result<(), String> {
        if !self.is_flow() {
            let class = shown_name(self.class_name.as_deref().unwrap_or_default());
            return Err(format!(
                "describes a {class}; only flow matching is supported, a {CLASS}"
            ));
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
        let mut notes = Vec::new();
        if let Some(class) = self.class_name.as_deref().filter(|class| *class != CLASS) {
            notes.push(format!(
                "describes a {}; steps are Euler's all the same",
                shown_name(class)
            ));
        }
        if self.use_dynamic_shifting == Some(true) {
            let shift = self.shift.map_or(1.0, Real::get);
            notes.push(format!(
                "says use_dynamic_shifting: the shift does not follow the picture's size here, it is {shift} unless you set \
                 another"
            ));
        }
        let spacings = [
            ("use_karras_sigmas", self.use_karras_sigmas),
            ("use_exponential_sigmas", self.use_exponential_sigmas),
            ("use_beta_sigmas", self.use_beta_sigmas),
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
}
