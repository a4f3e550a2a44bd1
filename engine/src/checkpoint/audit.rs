//! Whether a checkpoint is a whole model: what it lacks, what it has no place for, and whether it is a delta.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::head::HeadLayout;
use super::set::Checkpoint;
use crate::error::{Error, Result};
use crate::layers::ParamSource;
use crate::model::config::{DitConfig, DitSurvey, ModelKind, TransformerConfig, block_tensors};
use crate::model::zimage::ZImage;
use crate::printable::shown_name;

/// Names listed in a message before the rest is only counted.
const NAMES_SHOWN: usize = 4;

/// A tensor whose shape is not that of the model.
#[derive(Clone, Debug, Serialize)]
pub struct WrongShape {
    /// The canonical name.
    pub name: String,
    /// As in the file.
    pub found: Vec<usize>,
    /// As the model's sizes demand.
    pub expected: Vec<usize>,
}

/// A checkpoint's tensors compared with those of the model that it seems to be.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Audit {
    /// Tensors that the model needs.
    pub missing: Vec<String>,
    /// Tensors of a wrong shape.
    pub wrong: Vec<WrongShape>,
    /// Tensors for which the model has no place.
    pub unexpected: Vec<String>,
    /// Tensors of the latent model that a pixel model was made from, which are left aside.
    pub unused: Vec<String>,
}

impl Audit {
    /// Compares a checkpoint with a model's sizes.
    pub fn of(checkpoint: &Checkpoint, config: &DitConfig, head: Option<&HeadLayout>) -> Self {
        let head_tensors = head.map(HeadLayout::tensors).unwrap_or_default();
        let expected: BTreeMap<_, _> = config.tensors().into_iter().chain(head_tensors).collect();
        let mut audit = Audit::default();
        for (name, shape) in &expected {
            match checkpoint.shape(name) {
                None => audit.missing.push(name.clone()),
                Some(found) if found != *shape => audit.wrong.push(WrongShape {
                    name: name.clone(),
                    found,
                    expected: shape.clone(),
                }),
                Some(_) => {}
            }
        }
        if config.kind == ModelKind::Pixel && head.is_none() {
            audit.missing.push("local_decoder.bottleneck.0.weight".into());
        }
        for name in checkpoint.tensors().keys().filter(|name| !expected.contains_key(*name)) {
            let list = if is_other_end(name, config) {
                &mut audit.unused
            } else {
                &mut audit.unexpected
            };
            list.push(name.clone());
        }
        audit
    }

    /// Whether it is exactly the model.
    pub fn is_whole(&self) -> bool {
        self.missing.is_empty() && self.wrong.is_empty() && self.unexpected.is_empty()
    }
}

/// Whether the tensor belongs to the input or output side of another patch size or kind of model.
fn is_other_end(name: &str, config: &DitConfig) -> bool {
    let other_patch = |part: &str| {
        name.strip_prefix(part)
            .is_some_and(|rest| !rest.starts_with(&format!("{}-1.", config.patch)))
    };
    match config.kind {
        ModelKind::Pixel => other_patch("all_x_embedder.") || name.starts_with("all_final_layer."),
        ModelKind::Latent => other_patch("all_x_embedder.") || other_patch("all_final_layer."),
    }
}

/// Parts that every model has, and the tensors of each.
const PARTS: [(&str, &[&str]); 4] = [
    (
        "t_embedder",
        &["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"],
    ),
    ("cap_embedder", &["0.weight", "1.weight", "1.bias"]),
    ("x_pad_token", &[]),
    ("cap_pad_token", &[]),
];

/// The parts of a model that a checkpoint lacks as a whole, where every part it has is complete. A delta lacks some, a
/// whole model none; `None` is a damaged file.
pub fn missing_parts(checkpoint: &Checkpoint) -> Option<Vec<String>> {
    let survey = DitSurvey::of(checkpoint);
    let mut missing = Vec::new();
    let mut note = |part: String, tensors: &mut dyn Iterator<Item = String>| {
        let (mut there, mut absent) = (0, 0);
        for tensor in tensors {
            *(if checkpoint.shape(&tensor).is_some() {
                &mut there
            } else {
                &mut absent
            }) += 1;
        }
        if there == 0 {
            missing.push(part);
        }
        there == 0 || absent == 0
    };
    for (part, tensors) in PARTS {
        let alone = tensors.is_empty().then(|| part.to_owned());
        let mut names = tensors.iter().map(|tensor| format!("{part}.{tensor}")).chain(alone);
        if !note(part.into(), &mut names) {
            return None;
        }
    }
    let groups = [
        ("layers", &survey.layers, true),
        ("noise_refiner", &survey.noise_refiners, true),
        ("context_refiner", &survey.context_refiners, false),
    ];
    for (group, present, modulated) in groups {
        for index in 0..=present.last().copied().unwrap_or(0) {
            let block = format!("{group}.{index}");
            let mut names = block_tensors(modulated)
                .iter()
                .map(|tensor| format!("{block}.{tensor}"));
            if !note(block.clone(), &mut names) {
                return None;
            }
        }
    }
    let begins = |part: &str| checkpoint.tensors().keys().any(|name| name.starts_with(part));
    if !begins("all_x_embedder.") {
        missing.push("all_x_embedder".into());
    }
    if !begins("local_decoder.") && !begins("all_final_layer.") {
        missing.push("local_decoder".into());
    }
    Some(missing)
}

/// Whether the checkpoint has every part of a model, each complete.
pub fn is_whole(checkpoint: &Checkpoint) -> bool {
    missing_parts(checkpoint).is_some_and(|missing| missing.is_empty())
}

/// Whether the checkpoint holds some parts of a model, each complete, and lacks others.
pub fn is_delta(checkpoint: &Checkpoint) -> bool {
    missing_parts(checkpoint).is_some_and(|missing| !missing.is_empty())
}

/// A transformer that was checked to be whole.
#[derive(Debug)]
pub struct Transformer {
    /// Its tensors.
    pub checkpoint: Checkpoint,
    /// Its sizes and settings.
    pub config: DitConfig,
    /// Its head, for a pixel model.
    pub head: Option<HeadLayout>,
}

impl Transformer {
    /// What the model is.
    ///
    /// # Errors
    /// When the head makes no sense.
    pub fn spec(&self) -> Result<ZImage> {
        let spec = ZImage::read(&self.checkpoint, &self.config);
        spec.map_err(|error| match error {
            Error::Invalid(reason) => Error::file(self.checkpoint.path(), reason),
            error => error,
        })
    }

    /// Reads the sizes of a checkpoint and checks that every tensor is there, with the right shape and a readable type,
    /// and that none is left over.
    ///
    /// # Errors
    /// Naming the file and the tensors at fault; a delta's message says that it needs a base, a quantised model's how it is
    /// quantised.
    pub fn new(checkpoint: Checkpoint, file: Option<&TransformerConfig>) -> Result<Self> {
        checkpoint.expect_plain_weights()?;
        if let Some(missing) = missing_parts(&checkpoint).filter(|missing| !missing.is_empty()) {
            return Err(Error::file(
                checkpoint.path(),
                format!(
                    "is a delta, or damaged: it lacks {}; give the model that it was trained over with --base",
                    list(&missing)
                ),
            ));
        }
        let of_checkpoint = |error| match error {
            Error::Invalid(reason) => Error::file(checkpoint.path(), reason),
            error => error,
        };
        let config = DitConfig::read(&checkpoint, file).map_err(of_checkpoint)?;
        let head = match config.kind {
            ModelKind::Pixel => HeadLayout::read(&checkpoint, config.dim),
            ModelKind::Latent => None,
        };
        if let Some(head) = &head {
            head.check().map_err(of_checkpoint)?;
        }
        let transformer = Transformer {
            checkpoint,
            config,
            head,
        };
        transformer.expect_whole()?;
        Ok(transformer)
    }

    /// What a comparison of its tensors with its sizes gives; in a whole transformer only some may be unused.
    pub fn audit(&self) -> Audit {
        Audit::of(&self.checkpoint, &self.config, self.head.as_ref())
    }

    /// Its tensors without those of the latent model that a pixel model was made from.
    pub fn without_unused(self) -> Checkpoint {
        let unused: BTreeSet<_> = self.audit().unused.into_iter().collect();
        let mut checkpoint = self.checkpoint;
        checkpoint.retain(|name, _| !unused.contains(name));
        checkpoint
    }

    fn expect_whole(&self) -> Result<()> {
        let audit = self.audit();
        let refuse = |reason: String| Err(Error::file(self.checkpoint.path(), reason));
        if let Some(WrongShape { name, found, expected }) = audit.wrong.first() {
            let tensor = self.checkpoint.tensor(name)?;
            return Err(Error::file(
                tensor.path(),
                format!(
                    "tensor `{}` has shape {found:?}, expected {expected:?} as in the rest of the model",
                    shown_name(name)
                ),
            ));
        }
        if !audit.missing.is_empty() {
            let count = audit.missing.len();
            return refuse(format!(
                "lacks {count} {} of the model: {}",
                plural(count),
                list(&audit.missing)
            ));
        }
        if !audit.unexpected.is_empty() {
            let count = audit.unexpected.len();
            return refuse(format!(
                "holds {count} {} that a {} model has no place for: {}",
                plural(count),
                self.config.kind,
                list(&audit.unexpected)
            ));
        }
        let unused: BTreeSet<_> = audit.unused.iter().collect();
        for (name, tensor) in self.checkpoint.tensors() {
            if !unused.contains(name) {
                tensor.float()?;
            }
        }
        Ok(())
    }
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "tensor" } else { "tensors" }
}

/// The first few names, and how many more there are.
fn list(names: &[String]) -> String {
    let shown = names.iter().take(NAMES_SHOWN);
    let shown: Vec<_> = shown.map(|name| format!("`{}`", shown_name(name))).collect();
    match names.len().saturating_sub(NAMES_SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
