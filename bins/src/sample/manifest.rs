//! What the pictures of a set were drawn with, kept beside them: a run that goes on must draw the others in the same way.

use std::path::Path;

use anyhow::bail;
use l2p_engine::flow::noise_source::NoiseSource;
use l2p_engine::limits::Budget;
use l2p_engine::pipeline::{ModelFiles, Settings};
use l2p_engine::{Error, files, shown_name};
use serde::Serialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::arguments::Arguments;
use super::sets::Set;

/// The file's name in the folder of pictures.
pub const NAME: &str = "manifest.json";

/// The version of the format.
const FORMAT: u64 = 1;

/// Everything that the pictures of a set depend on.
#[derive(Serialize)]
pub struct Manifest<'a> {
    format: u64,
    /// The version of this program.
    engine: &'static str,
    layout: &'static str,
    /// How many prompts, how many pictures of each, and a SHA-256 of the prompts and of the pictures' names.
    prompts: usize,
    per_prompt: usize,
    prompts_sha256: String,
    /// The model's name, and a SHA-256 of its parts: of every tensor the name, shape, type, first and last bytes.
    model: &'a str,
    transformer_sha256: String,
    text_encoder_sha256: String,
    vae_sha256: Option<String>,
    /// How weights are kept and what is computed in.
    weights: String,
    dtype: String,
    /// Seed of the first picture; each further one has the next.
    seed: u64,
    steps: usize,
    cfg: f32,
    shift: f32,
    solver: String,
    width: usize,
    height: usize,
    rng: String,
    negative: &'a str,
}

impl<'a> Manifest<'a> {
    /// That of a set's pictures, drawn by the model that they name so.
    ///
    /// # Errors
    /// When a file of the model cannot be read.
    pub fn of(
        arguments: &'a Arguments,
        set: &Set,
        (model, settings, rng): (&'a str, &Settings, NoiseSource),
        files: &ModelFiles,
    ) -> l2p_engine::Result<Self> {
        let vae = files.vae_files().map(|(_, checkpoint)| checkpoint.identity());
        Ok(Manifest {
            format: FORMAT,
            engine: env!("CARGO_PKG_VERSION"),
            layout: set.layout.name(),
            prompts: set.entries.len(),
            per_prompt: set.entries.first().map_or(0, |entry| entry.pictures.len()),
            prompts_sha256: prompts_hash(set),
            model,
            transformer_sha256: hex(&files.transformer().checkpoint.identity()?),
            text_encoder_sha256: hex(&files.prompt_files()?.identity(files.device())?),
            vae_sha256: vae.transpose()?.map(|hash| hex(&hash)),
            weights: arguments.weights.to_string(),
            dtype: files.device().compute_dtype().to_string(),
            seed: arguments.seed.unwrap_or(0),
            steps: settings.steps,
            cfg: settings.cfg,
            shift: settings.shift,
            solver: settings.solver.to_string(),
            width: settings.width,
            height: settings.height,
            rng: rng.to_string(),
            negative: arguments.negative.as_deref().unwrap_or(""),
        })
    }

    /// Refuses a folder whose pictures were drawn otherwise.
    ///
    /// # Errors
    /// Naming the first entry that differs; when the file there cannot be read.
    pub fn ensure_same(&self, folder: &Path) -> anyhow::Result<()> {
        let path = folder.join(NAME);
        if !path.exists() {
            return Ok(());
        }
        let found: Map<String, Value> = files::read_json(&path, Budget::CONFIG)?;
        let asked = serde_json::to_value(self)?;
        let Some(asked) = asked.as_object() else { return Ok(()) };
        let (nothing, euler) = (Value::Null, Value::from("euler"));
        for (key, value) in asked {
            let there = match found.get(key) {
                // Earlier versions had no other solver, and did not say so.
                None if key == "solver" => &euler,
                there => there.unwrap_or(&nothing),
            };
            if !same(there, value) {
                bail!(
                    "{}: the pictures there were drawn with another {} ({} there, {} now): choose another --out, or the settings \
                     of that file",
                    path.display(),
                    key.replace('_', " "),
                    shown_name(&there.to_string()),
                    shown_name(&value.to_string())
                );
            }
        }
        match found.keys().find(|key| !asked.contains_key(*key)) {
            Some(key) => bail!(
                "{}: has an entry `{}` that this program does not know",
                path.display(),
                shown_name(key)
            ),
            None => Ok(()),
        }
    }

    /// Writes the file.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn write(&self, folder: &Path) -> l2p_engine::Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(|error| Error::invalid(error.to_string()))?;
        files::replace(&folder.join(NAME), format!("{text}\n").as_bytes())
    }
}

/// Whether two values are the same; numbers as numbers, since f32 gets longer on its way through a file.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) if !(a.fract() == 0.0 && b.fract() == 0.0) => a as f32 == b as f32,
        _ => a == b || (a.is_number() && a.as_f64() == b.as_f64() && a.as_u64() == b.as_u64()),
    }
}

fn prompts_hash(set: &Set) -> String {
    let mut hash = Sha256::new();
    for entry in &set.entries {
        hash.update(entry.prompt.as_bytes());
        for picture in &entry.pictures {
            hash.update([0]);
            hash.update(picture.as_os_str().as_encoded_bytes());
        }
        hash.update(b"\n");
    }
    hex(&hash.finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_are_compared_as_what_they_are() {
        assert!(same(&json!(0.1), &json!(0.1f32)));
        assert!(same(&json!(3.0), &json!(3.0)));
        assert!(!same(&json!(2.5), &json!(2.25)));
        // Seeds that no f32 and no f64 tells apart.
        assert!(!same(&json!(u64::MAX), &json!(u64::MAX - 1)));
        assert!(!same(&json!("a"), &json!("b")) && same(&json!("a"), &json!("a")));
        assert!(!same(&json!(null), &json!(0)));
    }
}
