//! A report of what a model's files are, for people and programs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use super::audit::{Audit, is_delta, is_whole, missing_parts, read};
use super::eight_bit::EightBit;
use super::estimate::{EstimateInput, MemoryEstimate};
use super::finite::NotFinite;
use super::parts::{open_text_encoder, open_vae};
use super::paths::{Container, ModelPaths};
use super::set::{Checkpoint, Layout};
use super::write::WriteObserver;
use crate::error::{Error, Result};
use crate::model::config::{ModelKind, VaeConfig};
use crate::model::denoiser::Geometry;
use crate::model::detailer::DetailerLayout;
use crate::model::family::{Ends, TransformerConfig};
use crate::model::objective::Trained;
use crate::model::{Precision, Spec};

/// Tensors and bytes of one element type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TypeCount {
    /// Tensors.
    pub tensors: usize,
    /// Bytes.
    pub bytes: u64,
}

/// The size that a model was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Resolution {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// Whether the model says so itself; otherwise it is that of the published model with this patch size.
    pub stated: bool,
}

/// A part beside the transformer.
#[derive(Clone, Debug, Serialize)]
pub struct PartReport {
    /// Its folder.
    pub path: PathBuf,
    /// Elements of all its tensors.
    pub parameters: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Its weights of eight bits, where it has some.
    pub eight_bit: Option<EightBit>,
    /// Why it cannot be used, if so.
    pub problem: Option<String>,
}

/// What a model's files are.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// What was inspected.
    pub path: PathBuf,
    /// How it lies on disk.
    pub container: Container,
    /// The transformer's files, the base's included.
    pub files: Vec<PathBuf>,
    /// Names and stacking of the transformer's own tensors.
    pub layout: Layout,
    /// Prefixes before their names.
    pub prefixes: Vec<String>,
    /// Whether its own tensors are but a part of a model.
    pub delta: bool,
    /// The model that a delta lies over.
    pub base: Option<PathBuf>,
    /// Whether everything of the transformer is there, in the right shape and a type that can be read, and nothing is left over.
    pub complete: bool,
    /// How the transformer's weights are quantised, where they are in a way that is not read.
    pub quantised: Option<String>,
    /// The transformer's weights of eight bits, where it has some.
    pub eight_bit: Option<EightBit>,
    /// Latent or pixel.
    pub kind: Option<ModelKind>,
    /// Side of a patch.
    pub patch: Option<usize>,
    /// The size that it was made for.
    pub resolution: Option<Resolution>,
    /// Sizes and settings of the transformer, where its tensors tell them all.
    pub transformer: Option<Value>,
    /// The sizes in a line.
    #[serde(skip)]
    pub summary: String,
    /// Where they do not, or it cannot be used for another reason: why.
    pub problem: Option<String>,
    /// The Detailer Head.
    pub head: Option<DetailerLayout>,
    /// Elements of all tensors.
    pub parameters: u64,
    /// The same by part.
    pub parameters_by_part: BTreeMap<String, u64>,
    /// The number of tensors.
    pub tensors: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// The same by element type.
    pub dtypes: BTreeMap<String, TypeCount>,
    /// How its tensors compare with those of the model; for a delta `missing` names the parts that it leaves to its base.
    #[serde(flatten)]
    pub audit: Audit,
    /// Tensors in the same files that are no part of the transformer.
    pub foreign: Vec<String>,
    /// The text encoder.
    pub text_encoder: Option<PartReport>,
    /// The tokenizer's folder.
    pub tokenizer: Option<PathBuf>,
    /// The VAE.
    pub vae: Option<PartReport>,
    /// The schedule's shift, where the model says one.
    pub shift: Option<f32>,
    /// What the model was trained for, where its scheduler can be read.
    pub objective: Option<Trained>,
    /// What the schedule asks for and is not done, or why it is refused.
    pub notes: Vec<String>,
    /// GPU memory, where the sizes are known.
    pub memory: Option<MemoryEstimate>,
    /// Whether the weights themselves were looked at, see [`Inspection::check_values`].
    pub values_checked: bool,
    /// Weights that are not finite, by part: transformer, text encoder, VAE.
    pub not_finite: Vec<NotFinite>,
}

/// Reports on the model at `paths`.
///
/// # Errors
/// When a file is missing or damaged; a model that is merely incomplete is reported as such.
pub fn inspect(paths: &ModelPaths) -> Result<Inspection> {
    let own = paths.open_own_tensors()?;
    let layout = own.layout();
    let over_base = paths.base.as_ref().filter(|_| !is_whole(&own));
    let delta = over_base.is_some() || is_delta(&own);
    let prefixes = own.prefixes().map(Into::into).collect();
    let checkpoint = match over_base {
        Some(base) => own.over(base.open_tensors()?)?,
        None => own,
    };
    let ends = checkpoint.family().survey(&checkpoint);
    let Examined { spec, audit, problem } = examine(&checkpoint, paths.transformer_config()?.as_ref());
    // What is wrong with it is found again when the part is opened.
    let vae_config = paths.vae.as_deref().and_then(|vae| VaeConfig::read(vae).ok());
    let text_encoder = part(paths.text_encoder.as_deref(), Checkpoint::open_text_encoder, &|path| {
        open_text_encoder(path).map(drop)
    })?;
    let vae = part(paths.vae.as_deref(), Checkpoint::open_vae, &|path| {
        open_vae(path).map(drop)
    })?;
    let (shift, notes) = schedule(paths);
    let resolution = resolution(paths, &ends);
    let memory = spec.as_deref().zip(resolution).map(|(spec, size)| {
        MemoryEstimate::of(&EstimateInput {
            spec,
            vae: vae_config.as_ref(),
            trunk: &Precision::default(),
            text_parameters: text_encoder.as_ref().map_or(0, |part| part.parameters),
            width: size.width,
            height: size.height,
        })
    });
    Ok(Inspection {
        path: paths.path.clone(),
        container: paths.container,
        files: checkpoint.files().iter().map(|file| file.path().into()).collect(),
        layout,
        prefixes,
        delta,
        base: over_base.map(|base| base.path.clone()),
        complete: spec.is_some() && audit.is_whole() && problem.is_none(),
        quantised: checkpoint.quantisation(),
        eight_bit: checkpoint.eight_bit(),
        kind: ends.kind,
        patch: ends.patch,
        resolution,
        transformer: spec.as_ref().map(|spec| spec.sizes()),
        summary: spec.as_ref().map(|spec| spec.summary()).unwrap_or_default(),
        problem,
        head: ends.head,
        parameters: parameters(&checkpoint),
        parameters_by_part: by_part(&checkpoint),
        tensors: checkpoint.tensors().len(),
        bytes: bytes(&checkpoint),
        dtypes: dtypes(&checkpoint),
        audit,
        foreign: checkpoint.foreign().to_vec(),
        text_encoder,
        tokenizer: paths.tokenizer.clone(),
        vae,
        shift: paths.defaults.shift.or(shift),
        objective: paths.trained().ok(),
        notes,
        memory,
        values_checked: false,
        not_finite: Vec::new(),
    })
}

/// What a transformer's tensors tell.
struct Examined {
    spec: Option<Arc<dyn Spec>>,
    audit: Audit,
    problem: Option<String>,
}

/// Looks at a transformer's tensors, and what its `config.json` says.
fn examine(checkpoint: &Checkpoint, file: Option<&TransformerConfig>) -> Examined {
    let is_delta = is_delta(checkpoint);
    let (spec, unclear) = match read(checkpoint, file) {
        _ if is_delta => (None, None),
        Ok(spec) => (Some(spec), None),
        Err(error) => (None, Some(error.to_string())),
    };
    let mut audit = spec
        .as_ref()
        .map(|spec| Audit::of(checkpoint, &**spec))
        .unwrap_or_default();
    if is_delta {
        audit.missing = missing_parts(checkpoint).unwrap_or_default();
    }
    let problem = checkpoint.quantisation().or(unclear);
    Examined {
        spec,
        audit,
        problem: problem.or_else(|| unreadable(checkpoint)),
    }
}

impl Inspection {
    /// Looks at every weight of the model at `paths`, which is the one inspected, for NaN and infinity; reads its files whole.
    ///
    /// # Errors
    /// When a file cannot be read, or `observer` stops.
    pub fn check_values(&mut self, paths: &ModelPaths, observer: &mut dyn WriteObserver) -> Result<()> {
        let mut checkpoints = vec![paths.open_tensors()?];
        checkpoints.extend(
            paths
                .text_encoder
                .as_deref()
                .map(Checkpoint::open_text_encoder)
                .transpose()?,
        );
        checkpoints.extend(paths.vae.as_deref().map(Checkpoint::open_vae).transpose()?);
        self.not_finite.clear();
        for checkpoint in &checkpoints {
            self.not_finite.extend(checkpoint.first_not_finite(observer)?);
        }
        self.values_checked = true;
        Ok(())
    }
}

/// The first tensor of a type that cannot be computed with, in words.
fn unreadable(checkpoint: &Checkpoint) -> Option<String> {
    let mut floats = checkpoint.tensors().values().map(|tensor| tensor.float());
    floats.find_map(Result::err).map(|error| match error {
        Error::File { reason, .. } => reason,
        error => error.to_string(),
    })
}

/// The schedule's shift where the model says one, and what there is to say on its schedule.
fn schedule(paths: &ModelPaths) -> (Option<f32>, Vec<String>) {
    match paths.scheduler() {
        Ok(scheduler) => (
            scheduler.as_ref().map(|s| s.shift),
            scheduler.map(|s| s.notes).unwrap_or_default(),
        ),
        Err(error) => (None, vec![error.to_string()]),
    }
}

/// Elements of all tensors.
fn parameters(checkpoint: &Checkpoint) -> u64 {
    let tensors = checkpoint.tensors().values();
    tensors.map(|tensor| tensor.elements() as u64).sum()
}

/// Bytes of all tensors.
fn bytes(checkpoint: &Checkpoint) -> u64 {
    let tensors = checkpoint.tensors().values();
    tensors.map(|tensor| tensor.byte_count() as u64).sum()
}

fn by_part(checkpoint: &Checkpoint) -> BTreeMap<String, u64> {
    let mut parts = BTreeMap::new();
    for (name, tensor) in checkpoint.tensors() {
        let part = name.split('.').next().unwrap_or(name);
        *parts.entry(part.to_owned()).or_default() += tensor.elements() as u64;
    }
    parts
}

fn dtypes(checkpoint: &Checkpoint) -> BTreeMap<String, TypeCount> {
    let mut dtypes: BTreeMap<String, TypeCount> = BTreeMap::new();
    for tensor in checkpoint.tensors().values() {
        let count = dtypes.entry(tensor.dtype().to_string()).or_default();
        count.tensors += 1;
        count.bytes += tensor.byte_count() as u64;
    }
    dtypes
}

fn part(
    path: Option<&Path>,
    open: fn(&Path) -> Result<Checkpoint>,
    check: &dyn Fn(&Path) -> Result<()>,
) -> Result<Option<PartReport>> {
    let Some(path) = path else {
        return Ok(None);
    };
    let checkpoint = open(path)?;
    Ok(Some(PartReport {
        path: path.into(),
        parameters: parameters(&checkpoint),
        bytes: bytes(&checkpoint),
        eight_bit: checkpoint.eight_bit(),
        problem: check(path).err().map(|error| error.to_string()),
    }))
}

/// The model's own default, or that of the published model with this patch size.
fn resolution(paths: &ModelPaths, ends: &Ends) -> Option<Resolution> {
    let geometry = Geometry {
        kind: ends.kind?,
        patch: ends.patch?,
        channels: 0,
    };
    let published = geometry.published_side();
    let (width, height) = (paths.defaults.width, paths.defaults.height);
    Some(Resolution {
        width: width.or(height).unwrap_or(published),
        height: height.or(width).unwrap_or(published),
        stated: width.is_some() || height.is_some(),
    })
}
