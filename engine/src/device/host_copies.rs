//! Copies of a GPU's memory on the host that are made while the GPU computes.
//!
//! They run on a stream of their own, into pinned memory: only from there a copy runs at the full speed of the bus and beside the
//! GPU's other work. The memory is taken once and serves one set of copies after the other.
//!
//! Taking it takes seconds, for the driver faults in and pins every page, and meanwhile it holds the process's memory map and its own
//! lock of the context; CUDA's guide counts it among the calls that no two streams' work overlaps. So it is taken in pieces: work that
//! another thread submits waits for one of them at most, and goes on before the next.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::{PinnedHostSlice, result};

use super::buffer::CudaBuffer;
use super::cuda::CudaDevice;
use super::driver::check;
use super::streams::{SideStream, StreamMark, keep_out_of_recordings};
use crate::error::{Error, Result};

/// Bytes of a piece of pinned memory: some milliseconds of the driver's time.
const PIECE: usize = 64 << 20;

/// Bytes to whose multiples a copy's place is aligned; an element never lies in two pieces.
const ALIGNMENT: usize = 64;

/// Pinned host memory, and the copies in it.
pub struct HostCopies {
    stream: SideStream,
    pieces: Vec<PinnedHostSlice<u8>>,
    /// Bytes that copies take.
    used: usize,
    /// The point after the last copy.
    made: Option<Arc<StreamMark>>,
}

impl HostCopies {
    /// Takes memory for `bytes` bytes of copies; see the module's head comment. `go_on` is asked before every piece.
    ///
    /// # Errors
    /// Those of `go_on`, and when the system has no memory that can be pinned; what was taken is given back.
    pub fn new(device: &Arc<CudaDevice>, bytes: usize, go_on: &dyn Fn() -> Result<()>) -> Result<Self> {
        // Taking memory is refused to other threads while one records a graph, unless they say that they do not mind.
        keep_out_of_recordings()?;
        let stream = SideStream::new(device)?;
        let mut pieces = Vec::with_capacity(bytes.div_ceil(PIECE));
        let mut left = bytes;
        while left > 0 {
            go_on()?;
            let size = left.min(PIECE);
            // Plain cached pages (no flags), for they are read.
            // SAFETY: the memory is read only where a copy was made into it.
            let (began, piece) = (Instant::now(), unsafe {
                device.context().alloc_pinned_with_flags::<u8>(size, 0)
            });
            pieces.push(check("pinned host memory", piece)?);
            // The driver's lock goes to whoever asks next, and this thread would always be the one; steps come first.
            std::thread::sleep(began.elapsed());
            left -= size;
        }
        Ok(HostCopies {
            stream,
            pieces,
            used: 0,
            made: None,
        })
    }

    /// The device.
    pub fn device(&self) -> &Arc<CudaDevice> {
        self.stream.device()
    }

    /// Bytes that the copy of a tensor of `bytes` bytes takes.
    pub fn room_for(bytes: usize) -> usize {
        bytes.next_multiple_of(ALIGNMENT)
    }

    /// Forgets the copies so far. Those to come are of what all work leaves that was submitted to the device so far.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn begin(&mut self) -> Result<()> {
        self.made = None;
        self.used = 0;
        self.stream.begin_after_device()
    }

    /// Starts a copy of `bytes` bytes of `source` from byte `offset` on, and returns where it will lie. Until the device is held
    /// ([`StreamMark::hold_device`]) or the copies are waited for, nobody may change the source or give it back.
    pub(crate) fn add(&mut self, source: &CudaBuffer, offset: usize, bytes: usize) -> Result<Range<usize>> {
        let place = self.used..self.used + bytes;
        let room: usize = self.pieces.iter().map(PinnedHostSlice::len).sum();
        if place.end > room {
            return Err(Error::invalid(format!(
                "copies of {} bytes do not fit into the {room} bytes that were taken for them",
                place.end
            )));
        }
        let device = self.stream.device().clone();
        device.ensure_not_recording("a copy to the host")?;
        let address = source.address_of(offset, bytes);
        let mut done = 0;
        while done < bytes {
            let at = place.start + done;
            let within = at % PIECE;
            let piece = check("pinned host memory", self.pieces[at / PIECE].as_mut_slice())?;
            let size = (piece.len() - within).min(bytes - done);
            let target = &mut piece[within..within + size];
            // SAFETY: the source's range lies in its block (checked by `address_of`); the target is this value's own memory, which is
            // read only after waiting for the copies, and given back only after waiting for the stream.
            let copy = || unsafe { result::memcpy_dtoh_async(target, address + done as u64, self.stream.handle()) };
            check("copy from the GPU", device.submit(copy)?)?;
            done += size;
        }
        self.used = Self::room_for(place.end);
        Ok(place)
    }

    /// Ends the list of copies. The point after them is for those who want to change the sources.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn end(&mut self) -> Result<Arc<StreamMark>> {
        let mark = Arc::new(self.stream.mark_to_wait_for()?);
        self.made = Some(mark.clone());
        Ok(mark)
    }

    /// Hands the copied bytes in `place` to `work`, piece by piece, whose lengths are multiples of every element's size but for the
    /// last. Waits until all copies are made.
    ///
    /// # Errors
    /// The first error of the work before the copies; when the list of copies was not ended, or `place` is none.
    pub fn read(&self, place: Range<usize>, work: &mut dyn FnMut(&[u8])) -> Result<()> {
        let made = self.made.as_ref().filter(|_| place.end <= self.used);
        made.ok_or_else(|| Error::invalid("there is no such copy"))?.wait()?;
        let mut at = place.start;
        while at < place.end {
            let within = at % PIECE;
            let piece = check("pinned host memory", self.pieces[at / PIECE].as_slice())?;
            let size = (piece.len() - within).min(place.end - at);
            work(&piece[within..within + size]);
            at += size;
        }
        Ok(())
    }
}

impl Drop for HostCopies {
    fn drop(&mut self) {
        // A device that failed copies nothing any more.
        let _ = self.stream.synchronize();
    }
}
