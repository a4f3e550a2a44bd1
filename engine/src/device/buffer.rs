//! Buffers in a GPU's memory.

use std::sync::Arc;

use cudarc::driver::result;

use super::block::Block;
use super::cuda::CudaDevice;
use super::driver::check;
use crate::error::Result;

/// A block of a GPU's memory that nobody else writes.
pub struct CudaBuffer {
    block: Arc<Block>,
    device: Arc<CudaDevice>,
}

impl CudaBuffer {
    /// A block of `bytes` bytes with undefined content (NaNs when poisoning is on).
    pub(crate) fn new(device: &Arc<CudaDevice>, bytes: usize) -> Result<Self> {
        Ok(CudaBuffer {
            block: Block::new(device, bytes)?,
            device: device.clone(),
        })
    }

    pub(crate) fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    /// The block's address. Work that is being recorded may use it as long as the recording lives.
    pub(crate) fn ptr(&self) -> u64 {
        self.block.ptr()
    }

    /// The address of byte `offset`, from which on `bytes` bytes are the block's.
    pub(super) fn address_of(&self, offset: usize, bytes: usize) -> u64 {
        assert!(offset + bytes <= self.bytes(), "a copy past the end of a buffer");
        self.ptr() + offset as u64
    }

    pub(crate) fn bytes(&self) -> usize {
        self.block.bytes()
    }

    pub(crate) fn fill_zero(&mut self) -> Result<()> {
        self.block.fill(0)
    }

    /// Copies from pageable host memory into the block, from byte `offset` on; the source may be reused on return.
    pub(crate) fn copy_from_host(&mut self, offset: usize, source: &[u8]) -> Result<()> {
        assert!(offset + source.len() <= self.bytes(), "a copy past the end of a buffer");
        if source.is_empty() {
            return Ok(());
        }
        let (device, address) = (self.device(), self.ptr() + offset as u64);
        device.ensure_not_recording("a copy from the host")?;
        let stream = device.stream().cu_stream();
        // SAFETY: the range lies in the block (checked above); the driver has copied a pageable source when it returns.
        let copy = || unsafe { result::memcpy_htod_async(address, source, stream) };
        check("copy to the GPU", device.submit(copy)?)
    }

    /// Copies from another block of the same device, in the order of the stream.
    pub(crate) fn copy_from_device(&mut self, to: usize, source: &CudaBuffer, from: usize, bytes: usize) -> Result<()> {
        assert!(
            to + bytes <= self.bytes() && from + bytes <= source.bytes(),
            "a copy past the end of a buffer"
        );
        if bytes == 0 {
            return Ok(());
        }
        let (target, source) = (self.ptr() + to as u64, source.ptr() + from as u64);
        let stream = self.device().stream().cu_stream();
        // SAFETY: both ranges lie in their blocks (checked above), and different buffers do not overlap.
        let copy = || unsafe { result::memcpy_dtod_async(target, source, bytes, stream) };
        check("copy within the GPU", self.device().submit(copy)?)
    }

    /// Copies out of the block after all submitted work is done.
    pub(crate) fn copy_to_host(&self, offset: usize, target: &mut [u8]) -> Result<()> {
        assert!(offset + target.len() <= self.bytes(), "a copy past the end of a buffer");
        if target.is_empty() {
            return Ok(());
        }
        let (device, address) = (self.device(), self.ptr() + offset as u64);
        device.ensure_not_recording("a copy to the host")?;
        let stream = device.stream().cu_stream();
        // SAFETY: the range lies in the block (checked above), and the stream is waited for before `target` is used.
        let copy = || unsafe { result::memcpy_dtoh_async(target, address, stream) };
        check("copy from the GPU", device.submit(copy)?)?;
        device.synchronize()
    }

    /// Fills the block through the pinned staging buffers, so that reading a file and copying overlap.
    pub(crate) fn upload(&mut self, fill: &mut dyn FnMut(usize, &mut [u8]) -> Result<()>) -> Result<()> {
        let (device, address, bytes) = (self.device().clone(), self.ptr(), self.bytes());
        device.ensure_not_recording("an upload")?;
        device.with_staging(|staging| staging.upload(&device, address, bytes, fill))
    }
}
