//! `l2p.json`: a small file beside a pixel model that names its parts, so that it can share the source model's text encoder
//! and tokenizer instead of holding copies.
//!
//! ```json
//! {
//!   "format": 1,
//!   "kind": "pixel",
//!   "transformer": "delta.safetensors",
//!   "base": "../source",
//!   "text_encoder": "../source/text_encoder",
//!   "tokenizer": "../source/tokenizer",
//!   "objective": { "prediction": "epsilon", "schedule": { "beta_schedule": "linear" } },
//!   "defaults": { "width": 1024, "height": 1024, "steps": 30, "shift": 3.0, "cfg": 1.0 }
//! }
//! ```
//!
//! Paths are relative to the manifest. `transformer` may be a list of shards. `base` is the model that a delta lies over; a
//! part that is not named is taken from it. `objective` is what the model was trained for, where it is another than the scheduler's file
//! says ([`Trained`]). Without `base` the transformer must be whole.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Error, Result};
use crate::files;
use crate::flow::solver::Solver;
use crate::limits::{Budget, Guidance, Real, Side, SigmaShift, Steps};
use crate::model::config::ModelKind;
use crate::model::objective::Trained;

/// The manifest's file name.
pub const MANIFEST: &str = "l2p.json";

/// The version of the format that this build reads and writes.
pub const MANIFEST_FORMAT: u32 = 1;

/// What to draw with when the user does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Defaults {
    /// Pixels.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "side", default)]
    pub width: Option<usize>,
    /// Pixels.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "side", default)]
    pub height: Option<usize>,
    /// Denoising steps.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "steps", default)]
    pub steps: Option<usize>,
    /// How far sigmas are shifted towards noise.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "shift", default)]
    pub shift: Option<f32>,
    /// Guidance; 1 is none.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "guidance", default)]
    pub cfg: Option<f32>,
    /// The solver.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub solver: Option<Solver>,
}

fn side<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<usize>, D::Error> {
    Ok(Option::<Side>::deserialize(deserializer)?.map(Side::get))
}

fn steps<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<usize>, D::Error> {
    Ok(Option::<Steps>::deserialize(deserializer)?.map(Steps::get))
}

fn shift<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<f32>, D::Error> {
    Ok(Option::<SigmaShift>::deserialize(deserializer)?.map(Real::single))
}

fn guidance<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<f32>, D::Error> {
    Ok(Option::<Guidance>::deserialize(deserializer)?.map(Real::single))
}

impl Defaults {
    /// These, and those of `other` where these say nothing.
    pub fn or(self, other: Defaults) -> Self {
        Defaults {
            width: self.width.or(other.width),
            height: self.height.or(other.height),
            steps: self.steps.or(other.steps),
            shift: self.shift.or(other.shift),
            cfg: self.cfg.or(other.cfg),
            solver: self.solver.or(other.solver),
        }
    }
}

/// One path or several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany {
    /// One path.
    One(PathBuf),
    /// Several.
    Many(Vec<PathBuf>),
}

impl OneOrMany {
    /// All of them.
    pub fn as_slice(&self) -> &[PathBuf] {
        match self {
            OneOrMany::One(path) => std::slice::from_ref(path),
            OneOrMany::Many(paths) => paths,
        }
    }
}

/// The content of `l2p.json`; see the module's head comment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`MANIFEST_FORMAT`].
    pub format: u32,
    /// Latent or pixel, to be compared with what the tensors say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<ModelKind>,
    /// The transformer's files.
    pub transformer: OneOrMany,
    /// The model that a delta lies over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<PathBuf>,
    /// The file, or a folder with `config.json` and the text encoder's files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_encoder: Option<PathBuf>,
    /// A folder with the tokenizer's files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// The file, or a folder with `config.json` and the VAE's files, for a latent model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae: Option<PathBuf>,
    /// A folder with `scheduler_config.json`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduler: Option<PathBuf>,
    /// What the model was trained for; where it does not say, the scheduler does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub objective: Option<Trained>,
    /// What to draw with when the user does not say.
    #[serde(default)]
    pub defaults: Defaults,
}

/// The entry that says how to read the others.
#[derive(Deserialize)]
struct Format {
    format: Option<u32>,
}

impl Manifest {
    /// Reads the file; paths become relative to the working directory.
    ///
    /// # Errors
    /// When it cannot be read, is of a later format, or has an entry that is unknown or makes no sense.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = files::read(path, Budget::CONFIG)?;
        let refuse = |reason: String| Error::file(path, reason);
        let Format { format } = files::from_json(&bytes).map_err(refuse)?;
        match format {
            Some(MANIFEST_FORMAT) => {}
            Some(format) => {
                return Err(refuse(format!(
                    "is of format {format}; this program reads format {MANIFEST_FORMAT}"
                )));
            }
            None => return Err(refuse(format!("does not say \"format\": {MANIFEST_FORMAT}"))),
        }
        let mut manifest: Manifest = files::from_json(&bytes).map_err(refuse)?;
        if manifest.transformer.as_slice().is_empty() {
            return Err(refuse("names no file of the transformer".into()));
        }
        let folder = path.parent().unwrap_or(Path::new(""));
        let resolve = |part: &mut PathBuf| *part = tidy(&folder.join(&*part));
        match &mut manifest.transformer {
            OneOrMany::One(part) => resolve(part),
            OneOrMany::Many(parts) => parts.iter_mut().for_each(resolve),
        }
        let parts = [
            &mut manifest.base,
            &mut manifest.text_encoder,
            &mut manifest.tokenizer,
            &mut manifest.vae,
            &mut manifest.scheduler,
        ];
        parts.into_iter().flatten().for_each(resolve);
        Ok(manifest)
    }
}

/// The path without `.` and without a folder that is left again at once, where that folder is no link.
fn tidy(path: &Path) -> PathBuf {
    use std::path::Component;
    let mut tidied = PathBuf::new();
    for component in path.components() {
        let leaves_plain_folder = component == Component::ParentDir
            && matches!(tidied.components().next_back(), Some(Component::Normal(_)))
            && !tidied.is_symlink();
        match component {
            Component::CurDir => {}
            _ if leaves_plain_folder => {
                tidied.pop();
            }
            _ => tidied.push(component),
        }
    }
    if tidied.as_os_str().is_empty() {
        PathBuf::from(".")
    } else {
        tidied
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_tidied() {
        for (found, tidied) in [
            ("models/pixel/../source", "models/source"),
            ("../source", "../source"),
            ("./a/./b", "a/b"),
            ("a/../..", ".."),
            ("a/..", "."),
            ("/a/../b", "/b"),
        ] {
            assert_eq!(tidy(Path::new(found)), Path::new(tidied), "{found}");
        }
    }
}
