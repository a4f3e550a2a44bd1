//! Buffers in a GPU's memory.

use std::sync::Arc;

use cudarc::driver::result;

use super::cpu::{POISON_BYTE, poison_new_buffers};
use super::cuda::{CudaDevice, check};
use super::memory::MemoryTag;
use crate::error::Result;

/// A block of a GPU's memory, counted by tag. It returns to the pool when its buffer is gone and every recording that uses its
/// address.
pub(super) struct Block {
    device: Arc<CudaDevice>,
    pub(super) address: u64,
    bytes: usize,
    tag: MemoryTag,
}

impl Drop for Block {
    fn drop(&mut self) {
        self.device.ledger().remove(self.tag, self.bytes as u64);
        if self.device.bind().is_ok() {
            self.device.free(self.address, self.bytes as u64);
        }
    }
}

/// A block of a GPU's memory that nobody else writes.
pub struct CudaBuffer {
    block: Arc<Block>,
}

impl CudaBuffer {
    /// A block of `bytes` bytes with undefined content (NaNs when poisoning is on).
    pub(crate) fn new(device: &Arc<CudaDevice>, bytes: usize) -> Result<Self> {
        let address = device.allocate(bytes)?;
        let tag = MemoryTag::current();
        device.ledger().add(tag, bytes as u64);
        let block = Arc::new(Block {
            device: device.clone(),
            address,
            bytes,
            tag,
        });
        let buffer = CudaBuffer { block };
        if poison_new_buffers() {
            buffer.fill(POISON_BYTE)?;
        }
        Ok(buffer)
    }

    pub(crate) fn device(&self) -> &Arc<CudaDevice> {
        &self.block.device
    }

    /// The block's address. Work that is being recorded may use it as long as the recording lives.
    pub(crate) fn ptr(&self) -> u64 {
        self.block.device.note_use(&self.block);
        self.block.address
    }

    fn bytes(&self) -> usize {
        self.block.bytes
    }

    pub(crate) fn fill_zero(&mut self) -> Result<()> {
        self.fill(0)
    }

    fn fill(&self, byte: u8) -> Result<()> {
        if self.bytes() == 0 {
            return Ok(());
        }
        let (device, address) = (self.device(), self.ptr());
        let stream = device.stream().cu_stream();
        // SAFETY: the block belongs to this buffer and has `bytes` bytes.
        let fill = || unsafe { result::memset_d8_async(address, byte, self.bytes(), stream) };
        check("cuMemsetD8Async", device.submit(fill)?)
    }

    /// Copies from pageable host memory into the block, from byte `offset` on; the source may be reused on return.
    pub(crate) fn copy_from_host(&mut self, offset: usize, source: &[u8]) -> Result<()> {
        assert!(offset + source.len() <= self.bytes(), "a copy past the end of a buffer");
        if source.is_empty() {
            return Ok(());
        }
        let (device, address) = (self.device(), self.ptr() + offset as u64);
        device.expect_not_recording("a copy from the host")?;
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
        device.expect_not_recording("a copy to the host")?;
        let stream = device.stream().cu_stream();
        // SAFETY: the range lies in the block (checked above), and the stream is waited for before `target` is used.
        let copy = || unsafe { result::memcpy_dtoh_async(target, address, stream) };
        check("copy from the GPU", device.submit(copy)?)?;
        device.synchronize()
    }

    /// Fills the block through the pinned staging buffers, so that reading a file and copying overlap.
    pub(crate) fn upload(&mut self, fill: &mut dyn FnMut(usize, &mut [u8]) -> Result<()>) -> Result<()> {
        let (device, address, bytes) = (self.device().clone(), self.ptr(), self.bytes());
        device.expect_not_recording("an upload")?;
        device.with_staging(|staging| staging.upload(&device, address, bytes, fill))
    }
}
