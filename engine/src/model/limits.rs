//! What the CUDA kernels ask of a model's sizes, checked before anything is loaded. Operations check the same at their doors,
//! but by then a text encoder has run and gigabytes have been read.

use super::config::TextConfig;
use crate::device::Device;
use crate::error::{Error, Result};

/// Kernels move eight elements at a time.
const VECTOR: usize = 8;

/// The heads that the kernel for normalised and rotated queries and keys handles.
const HEAD_DIM: usize = 128;

/// A model, or a part of one, that not every device can run.
pub trait DeviceLimits {
    /// What it is, for messages.
    const PART: &'static str;

    /// Why the CUDA kernels cannot run it, if they cannot.
    fn cuda_obstacle(&self) -> Option<String>;

    /// Refuses the device when it cannot run the model; nothing has been loaded then.
    ///
    /// # Errors
    /// Naming the size at fault and the way out.
    fn ensure_runs_on(&self, device: &Device) -> Result<()> {
        match (device, self.cuda_obstacle()) {
            (Device::Cuda(_), Some(obstacle)) => Err(Error::invalid(format!(
                "the {} cannot run on CUDA: {obstacle}; use --device cpu",
                Self::PART
            ))),
            _ => Ok(()),
        }
    }
}

impl DeviceLimits for TextConfig {
    const PART: &'static str = "text encoder";

    fn cuda_obstacle(&self) -> Option<String> {
        vectors(&[("width", self.dim), ("feed-forward width", self.ffn_hidden)]).or_else(|| heads(self.head_dim))
    }
}

/// Why kernels cannot take one of these sizes, if they cannot.
pub(super) fn vectors(sizes: &[(&str, usize)]) -> Option<String> {
    let odd = sizes.iter().find(|(_, size)| !size.is_multiple_of(VECTOR));
    odd.map(|(what, size)| format!("its {what} of {size} is not a multiple of {VECTOR}"))
}

/// Why kernels cannot take heads of this width, if they cannot.
pub(super) fn heads(head_dim: usize) -> Option<String> {
    (head_dim != HEAD_DIM).then(|| format!("its attention heads are {head_dim} wide, the kernels are for {HEAD_DIM}"))
}
