//! Blocks of a GPU's memory.

use std::sync::Arc;

use cudarc::driver::result;

use super::cpu::{POISON_BYTE, poison_new_buffers};
use super::driver::check;
use super::gpu::Gpu;
use super::memory::MemoryTag;
use crate::error::Result;

/// A block of a GPU's memory, counted by tag. It returns to the pool when nobody holds it, and no recording that uses its address.
pub(super) struct Block {
    gpu: Arc<Gpu>,
    address: u64,
    bytes: usize,
    tag: MemoryTag,
}

impl Block {
    /// A block of `bytes` bytes with undefined content (NaNs when poisoning is on).
    ///
    /// # Errors
    /// When the GPU has no room for it.
    pub fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Arc<Self>> {
        let address = gpu.allocate(bytes)?;
        let tag = MemoryTag::current();
        gpu.ledger().add(tag, bytes as u64);
        let block = Arc::new(Block {
            gpu: gpu.clone(),
            address,
            bytes,
            tag,
        });
        if poison_new_buffers() {
            block.fill(POISON_BYTE)?;
        }
        Ok(block)
    }

    /// Its address. Work that is being recorded may use it as long as the recording lives.
    pub fn ptr(self: &Arc<Self>) -> u64 {
        self.gpu.note_use(self.address, self);
        self.address
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Sets every byte, in the order of the stream.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn fill(self: &Arc<Self>, byte: u8) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        let (address, stream) = (self.ptr(), self.gpu.stream().cu_stream());
        // SAFETY: the block has `bytes` bytes, and those who hold it vouch that nobody reads them meanwhile.
        let fill = || unsafe { result::memset_d8_async(address, byte, self.bytes, stream) };
        check("cuMemsetD8Async", self.gpu.submit(fill)?)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.gpu.ledger().remove(self.tag, self.bytes as u64);
        if self.gpu.bind().is_ok() {
            self.gpu.free(self.address, self.bytes as u64);
        }
    }
}
