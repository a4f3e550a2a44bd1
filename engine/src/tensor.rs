//! Tensors: a device buffer with a shape and an element type.
//!
//! A tensor is contiguous and row-major. Images and feature maps are `[batch, height, width, channels]`, token sequences
//! `[batch, tokens, dim]`. Cloning a tensor or taking a view shares its buffer; writing to one needs a buffer that nobody
//! shares, so that no reader ever sees a change.

mod arguments;
mod host;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use half::bf16;

use crate::device::{CpuBuffer, CudaBuffer, CudaDevice, Device, HostCopies};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::shape::Shape;

pub use host::HostTensor;

enum Storage {
    Cpu(CpuBuffer),
    Cuda(CudaBuffer),
}

/// A contiguous, row-major tensor; see the module's head comment.
#[derive(Clone)]
pub struct Tensor {
    storage: Arc<Storage>,
    /// First element within the buffer.
    offset: usize,
    shape: Shape,
    dtype: DType,
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {} on {})", self.dtype, self.shape, self.device())
    }
}

impl Tensor {
    /// A tensor whose elements have no defined value yet (on the CPU zero, or NaN when poisoning is on).
    ///
    /// # Errors
    /// When the device has no room for it, or no device could.
    pub fn empty(device: &Device, shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        let shape = shape.into();
        let bytes = shape.checked_bytes(dtype.size()).ok_or_else(|| too_large(shape))?;
        let storage = match device {
            Device::Cpu => Storage::Cpu(CpuBuffer::new(bytes)?),
            Device::Cuda(device) => Storage::Cuda(CudaBuffer::new(device, bytes)?),
        };
        Ok(Tensor {
            storage: Arc::new(storage),
            offset: 0,
            shape,
            dtype,
        })
    }

    /// A tensor like [`Tensor::empty`] in the device's compute type: f32 on the CPU, bf16 on CUDA.
    pub fn empty_compute(device: &Device, shape: impl Into<Shape>) -> Result<Self> {
        Self::empty(device, shape, device.compute_dtype())
    }

    /// A tensor of zeros.
    pub fn zeros(device: &Device, shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        let mut tensor = Self::empty(device, shape, dtype)?;
        match Arc::get_mut(&mut tensor.storage) {
            Some(Storage::Cpu(buffer)) => buffer.bytes_mut().fill(0),
            Some(Storage::Cuda(buffer)) => buffer.fill_zero()?,
            None => unreachable!("a new tensor's buffer is not shared"),
        }
        Ok(tensor)
    }

    /// Sets all elements to zero, keeping the tensor's address; on CUDA without waiting.
    ///
    /// # Errors
    /// When the buffer is shared.
    pub fn set_zero(&mut self) -> Result<()> {
        // What else is in the buffer belongs to nobody.
        match Arc::get_mut(&mut self.storage).ok_or_else(shared_buffer)? {
            Storage::Cpu(buffer) => buffer.bytes_mut().fill(0),
            Storage::Cuda(buffer) => buffer.fill_zero()?,
        }
        Ok(())
    }

    /// A tensor with the given elements, of the same type on the device as here.
    ///
    /// # Errors
    /// When `values` does not have as many elements as `shape`, or the device has no room.
    pub fn from_slice<T: Element>(device: &Device, values: &[T], shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        if values.len() != shape.elements() {
            return Err(Error::invalid(format!(
                "{} values do not fill a tensor of shape {shape}",
                values.len()
            )));
        }
        let mut tensor = Self::empty(device, shape, T::DTYPE)?;
        match Arc::get_mut(&mut tensor.storage) {
            Some(Storage::Cpu(buffer)) => buffer.bytes_mut().copy_from_slice(bytemuck::cast_slice(values)),
            Some(Storage::Cuda(buffer)) => buffer.copy_from_host(0, bytemuck::cast_slice(values))?,
            None => unreachable!("a new tensor's buffer is not shared"),
        }
        Ok(tensor)
    }

    /// A tensor in the device's compute type with the given values (rounded to nearest even where that is bf16).
    pub fn from_f32(device: &Device, values: &[f32], shape: impl Into<Shape>) -> Result<Self> {
        match device.compute_dtype() {
            DType::Bf16 => {
                let rounded: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
                Self::from_slice(device, &rounded, shape)
            }
            _ => Self::from_slice(device, values, shape),
        }
    }

    /// A tensor filled piece by piece, in order, without a whole copy in host memory: `fill(first_byte, destination)`
    /// writes the bytes of the tensor (in its own element type) from `first_byte` on into `destination`.
    ///
    /// # Errors
    /// Those of `fill`, and when the device has no room.
    pub fn from_fill(
        device: &Device,
        shape: impl Into<Shape>,
        dtype: DType,
        fill: &mut dyn FnMut(usize, &mut [u8]) -> Result<()>,
    ) -> Result<Self> {
        let mut tensor = Self::empty(device, shape, dtype)?;
        match Arc::get_mut(&mut tensor.storage) {
            Some(Storage::Cpu(buffer)) => fill(0, buffer.bytes_mut())?,
            Some(Storage::Cuda(buffer)) => buffer.upload(fill)?,
            None => unreachable!("a new tensor's buffer is not shared"),
        }
        Ok(tensor)
    }

    /// The extents.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The extent of dimension `index`.
    ///
    /// # Panics
    /// When there is no such dimension.
    pub fn dim(&self, index: usize) -> usize {
        self.shape[index]
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.elements()
    }

    /// The size in bytes of the elements (a view's buffer may be larger).
    pub fn bytes(&self) -> usize {
        self.elements() * self.dtype.size()
    }

    /// The device it lives on.
    pub fn device(&self) -> Device {
        match &*self.storage {
            Storage::Cpu(_) => Device::Cpu,
            Storage::Cuda(buffer) => Device::Cuda(buffer.device().clone()),
        }
    }

    /// The CUDA device it lives on, `None` on the CPU.
    pub fn cuda(&self) -> Option<&Arc<CudaDevice>> {
        match &*self.storage {
            Storage::Cpu(_) => None,
            Storage::Cuda(buffer) => Some(buffer.device()),
        }
    }

    /// The same elements under another shape.
    ///
    /// # Errors
    /// When the number of elements differs.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        shape.checked_bytes(self.dtype.size()).ok_or_else(|| too_large(shape))?;
        if shape.elements() != self.elements() {
            return Err(Error::Shape {
                op: "reshape",
                tensor: "input".into(),
                expected: format!("{} elements for {shape}", shape.elements()),
                found: self.shape,
            });
        }
        Ok(Tensor { shape, ..self.clone() })
    }

    /// This tensor under another shape, still the only one on its buffer if it was.
    ///
    /// # Errors
    /// When the number of elements differs.
    pub fn into_shape(self, shape: impl Into<Shape>) -> Result<Self> {
        let reshaped = self.reshape(shape)?;
        Ok(Tensor {
            shape: reshaped.shape,
            ..self
        })
    }

    /// The start of this tensor's buffer under any shape that fits there, still the only one on it if it was; what it holds has no meaning.
    ///
    /// # Errors
    /// When the buffer is shorter.
    pub fn within_buffer(self, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        let capacity = match &*self.storage {
            Storage::Cpu(buffer) => buffer.bytes().len(),
            Storage::Cuda(buffer) => buffer.bytes(),
        };
        match shape.checked_bytes(self.dtype.size()) {
            Some(bytes) if bytes <= capacity => Ok(Tensor {
                shape,
                offset: 0,
                ..self
            }),
            _ => Err(too_large(shape)),
        }
    }

    /// This tensor if nobody shares its buffer, so that it can be written; otherwise a copy of it.
    ///
    /// # Errors
    /// When the device has no room for a copy.
    pub fn into_unshared(mut self) -> Result<Self> {
        if Arc::get_mut(&mut self.storage).is_some() {
            return Ok(self);
        }
        let mut copy = Self::empty(&self.device(), self.shape, self.dtype)?;
        copy.copy_from(&self)?;
        Ok(copy)
    }

    /// A view of `count` entries of the outermost dimension from `start` on.
    ///
    /// # Errors
    /// When they reach past the end.
    pub fn narrow(&self, start: usize, count: usize) -> Result<Self> {
        let mut extents = self.shape.to_vec();
        let end = start.checked_add(count);
        match (extents.first_mut(), end) {
            (Some(extent), Some(end)) if end <= *extent => *extent = count,
            _ => {
                return Err(Error::Shape {
                    op: "narrow",
                    tensor: "input".into(),
                    expected: format!("at least {} entries", start.saturating_add(count)),
                    found: self.shape,
                });
            }
        }
        // Both within this tensor's elements, whose number was checked when it was made.
        let stride: usize = self.shape[1..].iter().product();
        Ok(Tensor {
            offset: self.offset + start * stride,
            shape: Shape::new(&extents),
            ..self.clone()
        })
    }

    /// A view of this tensor of bytes, from byte `first` on, as elements of another type; it shares the buffer.
    ///
    /// # Errors
    /// When this is no tensor of bytes, or `first` is no multiple of the element's size, or the view reaches past the end.
    pub fn view_of_bytes(&self, first: usize, shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        self.ensure_dtype("view_of_bytes", "tensor", DType::U8)?;
        let shape = shape.into();
        let start = self.offset + first;
        let end = shape
            .checked_bytes(dtype.size())
            .and_then(|bytes| first.checked_add(bytes));
        if !start.is_multiple_of(dtype.size()) || end.is_none_or(|end| end > self.elements()) {
            return Err(Error::invalid(format!(
                "view_of_bytes: {dtype} {shape} from byte {first} on does not lie in {} bytes",
                self.elements()
            )));
        }
        Ok(Tensor {
            offset: start / dtype.size(),
            shape,
            dtype,
            storage: self.storage.clone(),
        })
    }

    /// The elements on the host, for a tensor on the CPU.
    ///
    /// # Errors
    /// When the tensor is on a GPU or holds another type.
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        self.ensure_dtype("host access", "tensor", T::DTYPE)?;
        match &*self.storage {
            Storage::Cpu(buffer) => {
                let elements: &[T] = bytemuck::cast_slice(buffer.bytes());
                Ok(&elements[self.offset..self.offset + self.elements()])
            }
            Storage::Cuda(buffer) => Err(not_on_host(buffer)),
        }
    }

    /// The elements on the host for writing, for a tensor on the CPU.
    ///
    /// # Errors
    /// When the tensor is on a GPU, holds another type, or shares its buffer with another tensor.
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T]> {
        self.ensure_dtype("host access", "tensor", T::DTYPE)?;
        let (offset, count) = (self.offset, self.elements());
        match Arc::get_mut(&mut self.storage).ok_or_else(shared_buffer)? {
            Storage::Cpu(buffer) => {
                let elements: &mut [T] = bytemuck::cast_slice_mut(buffer.bytes_mut());
                Ok(&mut elements[offset..offset + count])
            }
            Storage::Cuda(buffer) => Err(not_on_host(buffer)),
        }
    }

    /// The address of the first element in GPU memory, for kernels that read it.
    ///
    /// # Errors
    /// When the tensor is on the CPU.
    pub fn device_ptr(&self) -> Result<u64> {
        match &*self.storage {
            Storage::Cuda(buffer) => Ok(buffer.ptr() + (self.offset * self.dtype.size()) as u64),
            Storage::Cpu(_) => Err(Error::invalid("a tensor on the CPU has no address in GPU memory")),
        }
    }

    /// The address of the first element in GPU memory, for kernels that write it.
    ///
    /// # Errors
    /// When the tensor is on the CPU or shares its buffer with another tensor.
    pub fn device_ptr_mut(&mut self) -> Result<u64> {
        if Arc::get_mut(&mut self.storage).is_none() {
            return Err(shared_buffer());
        }
        self.device_ptr()
    }

    /// Copies the elements into a new vector on the host, converted to f32.
    ///
    /// # Errors
    /// When the copy from the device fails (an earlier kernel's error shows here), or the tensor holds bytes.
    pub fn to_vec_f32(&self) -> Result<Vec<f32>> {
        match self.dtype {
            DType::F32 => self.to_vec::<f32>(),
            DType::Bf16 => Ok(self.to_vec::<bf16>()?.into_iter().map(bf16::to_f32).collect()),
            DType::I32 => Ok(self.to_vec::<i32>()?.into_iter().map(|value| value as f32).collect()),
            DType::U8 => Ok(self.to_vec::<u8>()?.into_iter().map(f32::from).collect()),
        }
    }

    /// Copies the elements into a new vector on the host. Waits for the work that produces them.
    ///
    /// # Errors
    /// When the tensor holds another type or the copy from the device fails.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        match &*self.storage {
            Storage::Cpu(_) => Ok(self.as_slice::<T>()?.to_vec()),
            Storage::Cuda(buffer) => {
                self.ensure_dtype("copy to host", "tensor", T::DTYPE)?;
                let mut values = vec![T::zeroed(); self.elements()];
                buffer.copy_to_host(self.offset * self.dtype.size(), bytemuck::cast_slice_mut(&mut values))?;
                Ok(values)
            }
        }
    }

    /// Starts a copy of the elements into host memory, on a stream of its own, and returns where in `copies` it will lie. Until the
    /// device's own stream waits for the copies, nobody may change or drop what shares this buffer.
    ///
    /// # Errors
    /// When the tensor is on the CPU, `copies` has no room left, or the driver refuses.
    pub fn copy_aside(&self, copies: &mut HostCopies) -> Result<Range<usize>> {
        match &*self.storage {
            Storage::Cuda(buffer) => copies.add(buffer, self.offset * self.dtype.size(), self.bytes()),
            Storage::Cpu(_) => Err(Error::invalid("a tensor on the CPU is read where it is")),
        }
    }

    /// Overwrites the elements with values from the host, keeping the tensor's address; on CUDA without waiting for earlier work.
    ///
    /// # Errors
    /// When the number or type of values differs, or the buffer is shared.
    pub fn copy_from_slice<T: Element>(&mut self, values: &[T]) -> Result<()> {
        if values.len() != self.elements() {
            return Err(Error::invalid(format!(
                "{} values do not fill a tensor of shape {}",
                values.len(),
                self.shape
            )));
        }
        self.copy_elements_from_slice(0, values)
    }

    /// Overwrites the elements from `first` on (row-major) with values from the host; see [`Tensor::copy_from_slice`].
    ///
    /// # Errors
    /// When they reach past the end or are of another type, or the buffer is shared.
    pub fn copy_elements_from_slice<T: Element>(&mut self, first: usize, values: &[T]) -> Result<()> {
        self.ensure_dtype("copy from host", "tensor", T::DTYPE)?;
        self.ensure_elements("copy from host", first, values.len())?;
        let offset = (self.offset + first) * self.dtype.size();
        match Arc::get_mut(&mut self.storage).ok_or_else(shared_buffer)? {
            Storage::Cpu(buffer) => {
                let bytes: &[u8] = bytemuck::cast_slice(values);
                buffer.bytes_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
                Ok(())
            }
            Storage::Cuda(buffer) => buffer.copy_from_host(offset, bytemuck::cast_slice(values)),
        }
    }

    /// Overwrites the elements with those of `source`, keeping the tensor's address; on CUDA without waiting.
    ///
    /// # Errors
    /// When shape, type or device differ, or the buffer is shared.
    pub fn copy_from(&mut self, source: &Tensor) -> Result<()> {
        source.ensure_shape("copy", "source", self.shape)?;
        self.copy_elements_from(0, source)
    }

    /// Overwrites the elements from `first` on (row-major) with those of `source`; see [`Tensor::copy_from`].
    ///
    /// # Errors
    /// When they reach past the end, type or device differ, or the buffer is shared.
    pub fn copy_elements_from(&mut self, first: usize, source: &Tensor) -> Result<()> {
        source.ensure_dtype("copy", "source", self.dtype)?;
        source.ensure_device("copy", "source", &self.device())?;
        self.ensure_elements("copy", first, source.elements())?;
        let size = self.dtype.size();
        let (from, to) = (source.offset * size, (self.offset + first) * size);
        let bytes = source.bytes();
        match (
            Arc::get_mut(&mut self.storage).ok_or_else(shared_buffer)?,
            &*source.storage,
        ) {
            (Storage::Cpu(target), Storage::Cpu(source)) => {
                target.bytes_mut()[to..to + bytes].copy_from_slice(&source.bytes()[from..from + bytes]);
                Ok(())
            }
            (Storage::Cuda(target), Storage::Cuda(source)) => target.copy_from_device(to, source, from, bytes),
            _ => unreachable!("the devices were compared"),
        }
    }

    fn ensure_elements(&self, op: &'static str, first: usize, count: usize) -> Result<()> {
        match first.checked_add(count) {
            Some(end) if end <= self.elements() => Ok(()),
            _ => Err(Error::Shape {
                op,
                tensor: "target".into(),
                expected: format!("at least {} elements", first.saturating_add(count)),
                found: self.shape,
            }),
        }
    }

    /// Copies a tensor to another device, converting between bf16 and f32 to the target's compute type where the source
    /// has its own device's compute type. For tests and for moving small inputs; weights go through [`Tensor::from_fill`].
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        match self.dtype {
            DType::F32 if self.device().compute_dtype() == DType::F32 => {
                Self::from_f32(device, &self.to_vec::<f32>()?, self.shape)
            }
            DType::Bf16 => Self::from_f32(device, &self.to_vec_f32()?, self.shape),
            DType::F32 => Self::from_slice(device, &self.to_vec::<f32>()?, self.shape),
            DType::I32 => Self::from_slice(device, &self.to_vec::<i32>()?, self.shape),
            DType::U8 => Self::from_slice(device, &self.to_vec::<u8>()?, self.shape),
        }
    }

    /// Checks the element type at an operation's door.
    ///
    /// # Errors
    /// [`Error::DType`] naming `op` and `name`.
    pub fn ensure_dtype(&self, op: &'static str, name: &str, expected: DType) -> Result<()> {
        if self.dtype == expected {
            return Ok(());
        }
        Err(Error::DType {
            op,
            tensor: name.into(),
            expected,
            found: self.dtype,
        })
    }

    /// Checks the shape at an operation's door.
    ///
    /// # Errors
    /// [`Error::Shape`] naming `op` and `name`.
    pub fn ensure_shape(&self, op: &'static str, name: &str, expected: impl Into<Shape>) -> Result<()> {
        let expected = expected.into();
        if self.shape == expected {
            return Ok(());
        }
        Err(Error::Shape {
            op,
            tensor: name.into(),
            expected: expected.to_string(),
            found: self.shape,
        })
    }

    /// Checks the number of dimensions at an operation's door.
    ///
    /// # Errors
    /// [`Error::Shape`] naming `op` and `name`; `expected` says in words what the dimensions are.
    pub fn ensure_rank(&self, op: &'static str, name: &str, rank: usize, expected: &str) -> Result<()> {
        if self.shape.len() == rank {
            return Ok(());
        }
        Err(Error::Shape {
            op,
            tensor: name.into(),
            expected: expected.into(),
            found: self.shape,
        })
    }

    /// Checks that the tensor is on `device` at an operation's door.
    ///
    /// # Errors
    /// [`Error::Placement`] naming `op` and `name`.
    pub fn ensure_device(&self, op: &'static str, name: &str, device: &Device) -> Result<()> {
        let found = self.device();
        if found == *device {
            return Ok(());
        }
        Err(Error::Placement {
            op,
            tensor: name.into(),
            expected: device.to_string(),
            found: found.to_string(),
        })
    }
}

fn too_large(shape: Shape) -> Error {
    Error::invalid(format!("a tensor of shape {shape} is larger than any memory"))
}

fn shared_buffer() -> Error {
    Error::invalid("a tensor that shares its buffer cannot be written")
}

fn not_on_host(buffer: &CudaBuffer) -> Error {
    Error::invalid(format!(
        "a tensor on {} cannot be read in place by the host",
        Device::Cuda(buffer.device().clone())
    ))
}
