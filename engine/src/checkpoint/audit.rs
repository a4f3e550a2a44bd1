//! Whether a checkpoint is a whole model: what it lacks, what it has no place for, and whether it is a delta.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::Serialize;

use super::set::Checkpoint;
use crate::error::{Error, Result};
use crate::layers::{Group, ParamSource};
use crate::model::Spec;
use crate::model::families::read_spec;
use crate::model::family::TransformerConfig;
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
    /// Compares a checkpoint with a model's description.
    pub fn of(checkpoint: &Checkpoint, spec: &dyn Spec) -> Self {
        let expected: BTreeMap<_, _> = spec.tensors().into_iter().collect();
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
        for name in checkpoint.tensors().keys().filter(|name| !expected.contains_key(*name)) {
            let list = match spec.leaves_aside(name) {
                true => &mut audit.unused,
                false => &mut audit.unexpected,
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

/// A part's name, and the names of its tensors.
type Part = (String, Vec<String>);

/// The parts of a model that a checkpoint lacks as a whole, where every part it has is complete. A delta lacks some, a
/// whole model none; `None` is a damaged file.
///
/// A part is a block, or what else its tensors' names begin with. Of input and output it is enough that there are some.
pub fn missing_parts(checkpoint: &Checkpoint) -> Option<Vec<String>> {
    let family = checkpoint.family();
    let [mut embedders, mut blocks, mut refiners]: [Vec<Part>; 3] = Default::default();
    for meta in family.outline(checkpoint) {
        let (list, depth) = match meta.group {
            Group::Embedder | Group::Layer { .. } | Group::Other => (&mut embedders, 1),
            Group::Block { .. } => (&mut blocks, 2),
            Group::Refiner => (&mut refiners, 2),
            Group::Input | Group::Output => continue,
        };
        for tensor in meta.parts {
            let part = tensor.name.split('.').take(depth).collect::<Vec<_>>().join(".");
            match list.iter_mut().find(|(known, _)| *known == part) {
                Some((_, tensors)) => tensors.push(tensor.name),
                None => list.push((part, vec![tensor.name])),
            }
        }
    }
    // Those of most tensors tell people most.
    embedders.sort_by_key(|(_, tensors)| std::cmp::Reverse(tensors.len()));
    let mut missing = Vec::new();
    for (part, tensors) in embedders.into_iter().chain(blocks).chain(refiners) {
        let there = tensors.iter().filter(|name| checkpoint.shape(name).is_some()).count();
        match there {
            0 => missing.push(part),
            there if there < tensors.len() => return None,
            _ => {}
        }
    }
    let names = || checkpoint.tensors().keys();
    for end in family.ends() {
        if !end.iter().any(|part| names().any(|name| name.starts_with(part))) {
            missing.extend(end.first().map(|part| part.trim_end_matches('.').to_owned()));
        }
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
    /// What it is.
    pub spec: Arc<dyn Spec>,
}

impl Transformer {
    /// Reads what a checkpoint is and checks that every tensor is there, with the right shape and a readable type,
    /// and that none is left over.
    ///
    /// # Errors
    /// Naming the file and the tensors at fault; a delta's message says that it needs a base, a quantised model's how it is
    /// quantised.
    pub fn new(checkpoint: Checkpoint, file: Option<&TransformerConfig>) -> Result<Self> {
        checkpoint.ensure_readable_weights()?;
        if let Some(missing) = missing_parts(&checkpoint).filter(|missing| !missing.is_empty()) {
            return Err(Error::file(
                checkpoint.path(),
                format!(
                    "is a delta, or damaged: it lacks {}; give the model that it was trained over with --base",
                    list(&missing)
                ),
            ));
        }
        let spec = read(&checkpoint, file).map_err(|error| match error {
            Error::Invalid(reason) => Error::file(checkpoint.path(), reason),
            error => error,
        })?;
        let transformer = Transformer { checkpoint, spec };
        transformer.ensure_whole()?;
        Ok(transformer)
    }

    /// What a comparison of its tensors with its description gives; in a whole transformer only some may be unused.
    pub fn audit(&self) -> Audit {
        Audit::of(&self.checkpoint, &*self.spec)
    }

    /// Its tensors without those of the latent model that a pixel model was made from.
    pub fn without_unused(self) -> Checkpoint {
        let unused: BTreeSet<_> = self.audit().unused.into_iter().collect();
        let mut checkpoint = self.checkpoint;
        checkpoint.retain(|name, _| !unused.contains(name));
        checkpoint
    }

    fn ensure_whole(&self) -> Result<()> {
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
                self.spec.geometry().kind,
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

/// What the tensors of a checkpoint and its `config.json` tell.
pub(super) fn read(checkpoint: &Checkpoint, file: Option<&TransformerConfig>) -> Result<Arc<dyn Spec>> {
    read_spec(checkpoint, checkpoint.tensors().keys().map(String::as_str), file)
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
