//! A delta laid over the model that it was trained from.

use super::audit::is_whole;
use super::head::HeadLayout;
use super::set::Checkpoint;
use super::stored::CheckpointTensor;
use crate::error::{Error, Result};
use crate::layers::ParamSource;
use crate::model::config::{DitSurvey, ModelKind};
use crate::printable::shown_name;

/// Parts on the input and output side, which a delta may bring in a form that its base does not have.
const ENDS: [&str; 3] = ["all_x_embedder.", "all_final_layer.", "local_decoder."];

impl Checkpoint {
    /// This delta over `base`: its own tensors win, the base gives the rest. What belongs to the base's input and output
    /// alone is left behind: for a pixel delta the latent's final layer, and the input projection and head of another
    /// patch size.
    ///
    /// # Errors
    /// When the base is itself a delta, or a tensor of the delta's trunk is not in the base with the same shape.
    pub fn over(mut self, mut base: Checkpoint) -> Result<Self> {
        base.expect_plain_weights()?;
        if !is_whole(&base) {
            let reason = "is a delta, or damaged; the base must be a whole model";
            return Err(Error::file(base.path(), reason));
        }
        for (name, tensor) in self.tensors() {
            if !ENDS.iter().any(|end| name.starts_with(end)) {
                expect_counterpart(name, tensor, &base)?;
            }
        }
        let (mine, bases) = (DitSurvey::of(&self), DitSurvey::of(&base));
        let kind = match (mine.kind, bases.kind) {
            (Some(ModelKind::Pixel), _) | (None, Some(ModelKind::Pixel)) => ModelKind::Pixel,
            _ => ModelKind::Latent,
        };
        let patch = mine.patch.or(bases.patch.filter(|_| bases.kind == Some(kind)));
        let embedder = patch.map(|patch| format!("all_x_embedder.{patch}-1."));
        let brings_head = has_head(&self) && mine.patch.is_some_and(|mine| bases.patch != Some(mine));
        base.retain(|name, _| {
            let other_embedder = name.starts_with("all_x_embedder.")
                && embedder
                    .as_ref()
                    .is_some_and(|embedder| !name.starts_with(embedder.as_str()));
            let other_output = match kind {
                ModelKind::Pixel => name.starts_with("all_final_layer."),
                ModelKind::Latent => name.starts_with("local_decoder."),
            };
            let other_head = brings_head && name.starts_with("local_decoder.");
            !(other_embedder || other_output || other_head)
        });
        self.fill_from(base);
        Ok(self)
    }
}

fn has_head(checkpoint: &Checkpoint) -> bool {
    HeadLayout::read(checkpoint, 0).is_some()
}

fn expect_counterpart(name: &str, tensor: &CheckpointTensor, base: &Checkpoint) -> Result<()> {
    let shown = shown_name(name);
    let reason = match base.shape(name) {
        Some(shape) if shape == tensor.shape() => return Ok(()),
        Some(shape) => format!(
            "tensor `{shown}` has shape {:?}, in the base {} it has {shape:?}: the delta belongs to another model",
            tensor.shape(),
            base.path().display()
        ),
        None => format!(
            "tensor `{shown}` is not in the base {}: the delta belongs to another model",
            base.path().display()
        ),
    };
    Err(Error::file(tensor.path(), reason))
}
