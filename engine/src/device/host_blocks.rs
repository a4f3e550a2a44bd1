//! Data that stays in host memory and is brought to a GPU again and again, block by block, ahead of its use.
//!
//! The host's copy of each block is pinned, for only from there a copy runs at the full speed of the bus and beside the GPU's other
//! work. On the GPU there are places for [`PLACES`] blocks; block `i` always goes to place `i % PLACES`, so that its address is known
//! before it is there. Copies run on a stream of their own:
//!
//! ```text
//! device    block 0    block 1    block 2    block 3 …             the last one    what follows
//! copies               3 → 0      4 → 1      5 → 2 …               2 → 2
//! ```
//!
//! A copy waits until the block that was in its place has been used, a block waits until it has been copied. Behind the last block the
//! first ones of the next pass are copied, and the device waits for them at the pass's end: every pass begins with them in place, and ends
//! so. A pass may therefore be recorded, its copies with it, and replayed.

use std::sync::Arc;

use cudarc::driver::{PinnedHostSlice, result};

use super::cuda::CudaDevice;
use super::driver::check;
use super::host_memory::available_memory;
use super::memory::format_bytes;
use super::streams::{SideStream, StreamMark};
use crate::error::{Error, Result};

/// Blocks that are on the GPU at once: one in use, and two ahead of it.
pub const PLACES: usize = 3;

/// Host memory that is left to everybody else.
const LEFT_ON_HOST: u64 = 1 << 30;

/// Blocks in pinned host memory and their copies to the GPU; see the module's head comment.
pub struct HostBlocks {
    copies: SideStream,
    /// Held by recordings of their copies, too.
    blocks: Vec<Arc<PinnedHostSlice<u8>>>,
    /// Bytes of a place.
    stride: usize,
    /// By place, the point at which a copy to it will have ended.
    pending: [Option<StreamMark>; PLACES],
    /// Whether the first blocks are in their places, as they are between two passes.
    ready: bool,
}

impl HostBlocks {
    /// Takes pinned memory for blocks of these sizes in bytes.
    ///
    /// # Errors
    /// When the host has too little memory, or the system lets too little of it be pinned.
    pub fn new(device: &Arc<CudaDevice>, sizes: &[usize], stride: usize) -> Result<Self> {
        let needed: u64 = sizes.iter().map(|size| *size as u64).sum();
        let available = available_memory();
        if needed.saturating_add(LEFT_ON_HOST) > available {
            return Err(Error::invalid(format!(
                "weights of {} are to stay in host memory, of which only {} can be used: give the GPU more of them (--vram), or keep \
                 them in eight bits",
                format_bytes(needed),
                format_bytes(available)
            )));
        }
        let take = |size: &usize| {
            // SAFETY: the memory is read by copies to the GPU alone, and those of a block only after it was written.
            let block = unsafe { device.context().alloc_pinned_with_flags::<u8>(*size, 0) };
            check("pinned host memory", block).map(Arc::new).map_err(|error| {
                Error::invalid(format!(
                    "{error}: weights of {} cannot be locked in host memory; see `ulimit -l`, or give the GPU more of them (--vram)",
                    format_bytes(needed)
                ))
            })
        };
        device.bind()?;
        Ok(HostBlocks {
            copies: SideStream::new(device)?,
            blocks: sizes.iter().map(take).collect::<Result<_>>()?,
            stride,
            pending: [const { None }; PLACES],
            ready: false,
        })
    }

    /// Bytes of host memory.
    pub fn host_bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.len() as u64).sum()
    }

    /// Writes `bytes` of the GPU's memory, from `source` on, to a block from byte `at` on; returns when they are there.
    ///
    /// # Errors
    /// When the copy fails.
    pub(crate) fn keep(&mut self, block: usize, at: usize, source: u64, bytes: usize) -> Result<()> {
        let device = self.copies.device().clone();
        device.ensure_not_recording("a copy to the host")?;
        let block = Arc::get_mut(&mut self.blocks[block]);
        let block =
            block.ok_or_else(|| Error::invalid("weights in host memory that a recording uses cannot be changed"))?;
        let target = check("pinned host memory", block.as_mut_slice())?;
        let target = &mut target[at..at + bytes];
        // SAFETY: the caller gives the address of as many bytes; the target is this value's own memory, and the copy has ended when this
        // function returns.
        let copy = || unsafe { result::memcpy_dtoh_async(target, source, device.stream().cu_stream()) };
        check("copy from the GPU", device.submit(copy)?)?;
        device.synchronize()
    }

    /// Begins a pass; `places` is the address of the places.
    pub(crate) fn begin(&mut self, places: u64) -> Result<()> {
        if !self.ready {
            self.pending = [const { None }; PLACES];
            self.copies.begin_after_device()?;
            for block in 0..self.blocks.len().min(PLACES) {
                self.copy(block, places)?;
            }
        }
        self.ready = false;
        Ok(())
    }

    /// What is submitted to the device from now on finds the block in its place.
    pub(crate) fn before(&mut self, block: usize) -> Result<()> {
        match self.pending[block % PLACES].take() {
            Some(copied) => copied.hold_device(),
            None => Ok(()),
        }
    }

    /// All that uses the block was submitted: its place goes to the next one.
    pub(crate) fn after(&mut self, block: usize, places: u64) -> Result<()> {
        let count = self.blocks.len();
        if count <= PLACES {
            return Ok(());
        }
        self.copies.begin_after_device()?;
        let next = if block + PLACES < count {
            block + PLACES
        } else {
            block % PLACES
        };
        self.copy(next, places)
    }

    /// Ends a pass: the device waits for the copies, so that the next one finds the first blocks.
    pub(crate) fn end(&mut self) -> Result<()> {
        for copied in self.pending.iter_mut().filter_map(Option::take) {
            copied.hold_device()?;
        }
        self.ready = true;
        Ok(())
    }

    fn copy(&mut self, block: usize, places: u64) -> Result<()> {
        let place = block % PLACES;
        let target = places + (place * self.stride) as u64;
        let block = &self.blocks[block];
        let source = check("pinned host memory", block.as_slice())?;
        let stream = self.copies.handle();
        self.copies.device().note_use(source.as_ptr() as u64, block);
        // SAFETY: a place has room for every block; it is the copies' until a mark says otherwise; the source lives until these copies are
        // done, and as long as a recording of them.
        let copy = || unsafe { result::memcpy_htod_async(target, source, stream) };
        check("copy to the GPU", self.copies.device().submit(copy)?)?;
        self.pending[place] = Some(self.copies.mark()?);
        Ok(())
    }
}

impl Drop for HostBlocks {
    fn drop(&mut self) {
        // Copies that are under way read this memory.
        if let Err(error) = self.copies.synchronize() {
            tracing::debug!("copies of weights to the GPU: {error}");
        }
    }
}
