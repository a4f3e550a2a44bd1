//! Tensors in host memory: what travels between threads, and to and from files, without touching a device.

use half::bf16;

use super::Tensor;
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// A tensor in host memory, in the element type of the device that made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostTensor {
    shape: Vec<usize>,
    dtype: DType,
    bytes: Vec<u8>,
}

impl HostTensor {
    /// Copies a tensor of f32 or bf16 from its device.
    ///
    /// # Errors
    /// When the copy fails, or the tensor holds another type.
    pub fn from_tensor(tensor: &Tensor) -> Result<Self> {
        let bytes = match tensor.dtype() {
            DType::Bf16 => bytemuck::cast_slice(&tensor.to_vec::<bf16>()?).to_vec(),
            _ => bytemuck::cast_slice(&tensor.to_vec::<f32>()?).to_vec(),
        };
        Ok(HostTensor {
            shape: tensor.shape().to_vec(),
            dtype: tensor.dtype(),
            bytes,
        })
    }

    /// A tensor of these bytes, row-major, from a file.
    ///
    /// # Errors
    /// When they do not make a tensor of this shape and type, which is f32 or bf16.
    pub fn from_bytes(bytes: &[u8], shape: &[usize], dtype: DType) -> Result<Self> {
        let elements = shape
            .iter()
            .try_fold(1usize, |product, &extent| product.checked_mul(extent));
        let whole = elements.and_then(|elements| elements.checked_mul(dtype.size())) == Some(bytes.len());
        match whole && matches!(dtype, DType::F32 | DType::Bf16) {
            true => Ok(HostTensor {
                shape: shape.to_vec(),
                dtype,
                bytes: bytes.to_vec(),
            }),
            false => Err(Error::invalid(format!(
                "{} bytes make no tensor {shape:?} of {dtype}",
                bytes.len()
            ))),
        }
    }

    /// Numbers in f32, row-major.
    pub fn from_f32(values: &[f32], shape: &[usize]) -> Self {
        HostTensor {
            shape: shape.to_vec(),
            dtype: DType::F32,
            bytes: bytemuck::cast_slice(values).to_vec(),
        }
    }

    /// The extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The bytes, row-major.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The numbers in f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        self.values().collect()
    }

    /// Whether every number is finite.
    pub fn is_finite(&self) -> bool {
        self.values().all(f32::is_finite)
    }

    fn values(&self) -> impl Iterator<Item = f32> {
        let size = self.dtype.size();
        self.bytes.chunks_exact(size).map(move |bytes| match *bytes {
            [a, b] => bf16::from_le_bytes([a, b]).to_f32(),
            [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
            _ => f32::NAN,
        })
    }

    /// The tensor on a device, in the type that it has here.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn to_tensor(&self, device: &Device) -> Result<Tensor> {
        let mut fill = |first: usize, target: &mut [u8]| {
            target.copy_from_slice(&self.bytes[first..first + target.len()]);
            Ok(())
        };
        Tensor::from_fill(device, self.shape.as_slice(), self.dtype, &mut fill)
    }

    /// The tensor on a device, in the type that it computes in.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn to_compute(&self, device: &Device) -> Result<Tensor> {
        match self.dtype == device.compute_dtype() {
            true => self.to_tensor(device),
            false => Tensor::from_f32(device, &self.to_f32(), self.shape.as_slice()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_from_a_device_and_from_bytes() {
        let values = [1.0, -2.5, 0.0, 3.0];
        let host = HostTensor::from_f32(&values, &[2, 2]);
        assert_eq!(host.to_f32(), values);
        for tensor in [host.to_tensor(&Device::Cpu), host.to_compute(&Device::Cpu)] {
            assert_eq!(HostTensor::from_tensor(&tensor.unwrap()).unwrap(), host);
        }
        assert_eq!(HostTensor::from_bytes(host.bytes(), &[2, 2], DType::F32).unwrap(), host);
        let half = HostTensor::from_bytes(&bf16::from_f32(-2.5).to_le_bytes(), &[1], DType::Bf16).unwrap();
        assert_eq!(half.to_f32(), [-2.5]);
        assert_eq!(half.to_compute(&Device::Cpu).unwrap().to_vec::<f32>().unwrap(), [-2.5]);
        for (shape, dtype) in [
            (&[3, 2][..], DType::F32),
            (&[usize::MAX, 2], DType::F32),
            (&[16], DType::U8),
        ] {
            assert!(HostTensor::from_bytes(host.bytes(), shape, dtype).is_err(), "{shape:?}");
        }
        assert!(host.is_finite() && !HostTensor::from_f32(&[f32::INFINITY], &[1]).is_finite());
    }
}
