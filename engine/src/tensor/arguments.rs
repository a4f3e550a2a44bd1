//! Tensors as arguments of kernels.

use super::Tensor;
use crate::device::{Args, TensorMap, TensorMapSpec};
use crate::error::Result;

impl Args {
    /// A tensor that the kernel reads.
    ///
    /// # Errors
    /// When the tensor is on the CPU.
    pub fn input(self, tensor: &Tensor) -> Result<Self> {
        let address = tensor.device_ptr()?;
        Ok(self.address(address))
    }

    /// A tensor that the kernel reads, or a null pointer.
    ///
    /// # Errors
    /// When the tensor is on the CPU.
    pub fn optional(self, tensor: Option<&Tensor>) -> Result<Self> {
        match tensor {
            Some(tensor) => self.input(tensor),
            None => Ok(self.address(0)),
        }
    }

    /// A tensor that the kernel writes.
    ///
    /// # Errors
    /// When the tensor is on the CPU or shares its buffer.
    pub fn output(self, tensor: &mut Tensor) -> Result<Self> {
        let address = tensor.device_ptr_mut()?;
        Ok(self.address(address))
    }

    /// A tensor that the kernel writes, or a null pointer.
    ///
    /// # Errors
    /// When the tensor is on the CPU or shares its buffer.
    pub fn optional_output(self, tensor: Option<&mut Tensor>) -> Result<Self> {
        match tensor {
            Some(tensor) => self.output(tensor),
            None => Ok(self.address(0)),
        }
    }
}

impl TensorMap {
    /// Describes the memory of `tensor`, from its first element on.
    ///
    /// # Errors
    /// When the tensor is on the CPU or the driver refuses the description.
    pub fn new(tensor: &Tensor, spec: &TensorMapSpec<'_>) -> Result<Self> {
        Self::of_memory(tensor.device_ptr()?, tensor.dtype(), spec)
    }
}
