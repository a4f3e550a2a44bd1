//! Memory for buckets on their way.

use crate::device::Device;
use crate::error::Result;
use crate::tensor::Tensor;

/// Buckets that are on their way at most; each takes twice its bytes.
pub(super) const IN_FLIGHT: usize = 3;

/// Tensors of the compute type to send from and to receive in, as long as the longest bucket, kept so that no step waits for memory.
#[derive(Default)]
pub(super) struct Ring {
    pub parts: Vec<Tensor>,
    pub received: Vec<Tensor>,
    /// Of each.
    elements: usize,
}

impl Ring {
    /// With tensors of `elements` elements.
    pub fn new(device: &Device, elements: usize) -> Result<Self> {
        let buffers = || {
            let buffer = |_| Tensor::empty(device, [elements], device.compute_dtype());
            (0..=IN_FLIGHT).map(buffer).collect::<Result<Vec<_>>>()
        };
        Ok(Ring {
            parts: buffers()?,
            received: buffers()?,
            elements,
        })
    }

    /// A tensor of this shape to send from; where all are on their way, a new one.
    pub fn part(&mut self, device: &Device, shape: &[usize]) -> Result<Tensor> {
        Self::take(self.parts.pop(), device, self.elements, shape)
    }

    /// One to receive in.
    pub fn target(&mut self, device: &Device, shape: &[usize]) -> Result<Tensor> {
        Self::take(self.received.pop(), device, self.elements, shape)
    }

    fn take(buffer: Option<Tensor>, device: &Device, elements: usize, shape: &[usize]) -> Result<Tensor> {
        let buffer = match buffer {
            Some(buffer) => buffer,
            None => Tensor::empty(device, [elements], device.compute_dtype())?,
        };
        buffer.within_buffer(shape)
    }
}
