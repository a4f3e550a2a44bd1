//! Uploads through two pinned host buffers: while one is copied to the GPU, the other is filled from the file.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, PinnedHostSlice, result, sys};

use super::driver::check;
use super::gpu::Gpu;
use crate::error::Result;

/// Bytes of each staging buffer: large enough to hide the start of a copy, small enough for any host.
const STAGING_BYTES: usize = 32 << 20;

/// Two pinned buffers and, for each, the event after which it may be filled again.
pub(super) struct Staging {
    buffers: [PinnedHostSlice<u8>; 2],
    copied: [CudaEvent; 2],
    next: usize,
}

impl Staging {
    pub fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let allocate = || {
            // Plain cached pages (no flags): `fill` may read back what it wrote.
            // SAFETY: the memory is written by `fill` before it is read.
            let pinned = unsafe { context.alloc_pinned_with_flags::<u8>(STAGING_BYTES, 0) };
            check("pinned host memory", pinned)
        };
        let event = || {
            let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
            check("cuEventCreate", context.new_event(Some(flags)))
        };
        Ok(Staging {
            buffers: [allocate()?, allocate()?],
            copied: [event()?, event()?],
            next: 0,
        })
    }

    /// Fills `bytes` bytes of device memory at `address`, piece by piece; `fill(first_byte, destination)` gives the content.
    pub fn upload(
        &mut self,
        gpu: &Gpu,
        address: u64,
        bytes: usize,
        fill: &mut dyn FnMut(usize, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        gpu.bind()?;
        let mut done = 0;
        while done < bytes {
            let size = STAGING_BYTES.min(bytes - done);
            let (buffer, copied) = (&mut self.buffers[self.next], &self.copied[self.next]);
            check("waiting for an upload", copied.synchronize())?;
            let piece = &mut check("pinned host memory", buffer.as_mut_slice())?[..size];
            fill(done, piece)?;
            let stream = gpu.stream();
            // SAFETY: the target lies in the caller's block; the source stays untouched until `copied` is reached.
            let copy = || unsafe { result::memcpy_htod_async(address + done as u64, piece, stream.cu_stream()) };
            check("copy to the GPU", gpu.submit(copy)?)?;
            check("cuEventRecord", copied.record(stream))?;
            self.next = 1 - self.next;
            done += size;
        }
        Ok(())
    }
}
