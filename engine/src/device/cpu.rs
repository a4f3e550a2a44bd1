//! Buffers in host memory.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

use super::host_memory::available_memory;
use super::memory::{MemoryTag, cpu_ledger, format_bytes};
use crate::error::{Error, Result};

/// Wide enough for any vector register and a whole cache line.
const ALIGNMENT: usize = 64;

static POISON: AtomicBool = AtomicBool::new(false);

/// When on, new buffers of either device are filled with NaNs instead of zeros or leftovers, so that a test sees any
/// element that an operation forgot to write.
pub fn set_poison_new_buffers(on: bool) {
    POISON.store(on, Ordering::Relaxed);
}

pub(super) fn poison_new_buffers() -> bool {
    POISON.load(Ordering::Relaxed)
}

/// A byte that repeated makes a NaN of f32 and of bf16.
pub(super) const POISON_BYTE: u8 = 0xff;

/// An aligned buffer in host memory, counted by tag.
pub struct CpuBuffer {
    start: NonNull<u8>,
    layout: Layout,
    bytes: usize,
    tag: MemoryTag,
}

// SAFETY: the buffer owns its memory, and shared access is read-only.
unsafe impl Send for CpuBuffer {}
// SAFETY: as above; writing needs `&mut`.
unsafe impl Sync for CpuBuffer {}

impl CpuBuffer {
    /// A buffer of `bytes` bytes, zero unless poisoning is on.
    pub(crate) fn new(bytes: usize) -> Result<Self> {
        let layout = Layout::from_size_align(bytes.max(1), ALIGNMENT)
            .map_err(|_| Error::invalid(format!("a buffer of {bytes} bytes is too large")))?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(|| Error::OutOfMemory {
            device: "CPU".into(),
            requested: format_bytes(bytes as u64),
            in_use: format_bytes(cpu_ledger().report().total.current),
            free: format_bytes(available_memory()),
        })?;
        let tag = MemoryTag::current();
        cpu_ledger().add(tag, bytes as u64);
        let mut buffer = CpuBuffer {
            start,
            layout,
            bytes,
            tag,
        };
        if poison_new_buffers() {
            buffer.bytes_mut().fill(POISON_BYTE);
        }
        Ok(buffer)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the allocation holds `bytes` initialised bytes and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes this the only access.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for CpuBuffer {
    fn drop(&mut self) {
        cpu_ledger().remove(self.tag, self.bytes as u64);
        // SAFETY: allocated in `new` with this layout and not freed before.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}
