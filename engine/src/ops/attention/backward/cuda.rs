//! The gradient of attention on CUDA: which kernels, and their launches.

use std::sync::Arc;

use super::{AttentionBackwardKernel, Gradient, OP};
use crate::device::CudaDevice;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

pub(super) fn attention_backward(
    device: &Arc<CudaDevice>,
    kernel: AttentionBackwardKernel,
    gradient: &Gradient<'_>,
    _dqkv: &mut Tensor,
) -> Result<()> {
    Err(Error::invalid(format!(
        "{OP}: {} has no {kernel:?} kernel for heads of {}",
        device.name(),
        gradient.forward.spec.head_dim
    )))
}
