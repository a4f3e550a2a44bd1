//! A delta laid over the model that it was trained from.

use super::audit::is_whole;
use super::set::Checkpoint;
use super::stored::CheckpointTensor;
use crate::error::{Error, Result};
use crate::layers::ParamSource;
use crate::printable::shown_name;

impl Checkpoint {
    /// This delta over `base`: its own tensors win, the base gives the rest. What belongs to the base's input and output
    /// alone is left behind: for a pixel delta the latent's final layer, and the input projection and head of another
    /// patch size.
    ///
    /// # Errors
    /// When the base is itself a delta, or a tensor of the delta's trunk is not in the base with the same shape.
    pub fn over(mut self, mut base: Checkpoint) -> Result<Self> {
        base.ensure_readable_weights()?;
        if !is_whole(&base) {
            let reason = "is a delta, or damaged; the base must be a whole model";
            return Err(Error::file(base.path(), reason));
        }
        let family = base.family();
        // A delta may bring input and output in a form that its base does not have.
        let ends = family.ends().concat();
        for (name, tensor) in self.tensors() {
            if !ends.iter().any(|end| name.starts_with(end)) {
                ensure_counterpart(name, tensor, &base)?;
            }
        }
        let left_behind = family.left_behind(&self, &base);
        base.retain(|name, _| !left_behind(name));
        self.fill_from(base);
        Ok(self)
    }
}

fn ensure_counterpart(name: &str, tensor: &CheckpointTensor, base: &Checkpoint) -> Result<()> {
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
