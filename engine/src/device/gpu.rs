//! One GPU: its context, its stream, and its memory.

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use cudarc::driver::{CudaContext, CudaStream, DriverError, sys};

use super::driver::{Event, OLDEST_CAPABILITY, check, describe, memory_in_use, too_old};
use super::memory::{BesidePool, Ledger, MemoryReport, format_bytes};
use super::options::PoolKind;
use super::pool::Pool;
use super::recording::Recorded;
use crate::error::{Error, Result};
use crate::lock::lock;

/// Bytes of stack that each resident thread is kept ready.
const STACK_BYTES: usize = 64;

/// One GPU with one stream, on which all its work runs in order, and the memory that the work uses. Kernels and the library of
/// products are a [`CudaDevice`](super::CudaDevice)'s, which is one of these.
pub struct Gpu {
    index: usize,
    name: String,
    capability: (i32, i32),
    multiprocessors: u32,
    total_memory: u64,
    ledger: Ledger,
    pool: Mutex<Pool>,
    /// What the driver has taken for all else.
    beside_pool: Mutex<BesidePool>,
    /// While work is recorded: what the recording uses.
    recording: Mutex<Option<Recorded>>,
    /// Whether `recording` holds something, for those who ask often.
    is_recording: AtomicBool,
    /// Recordings begun so far.
    recordings: AtomicU64,
    /// Held for reading while something is submitted, for writing while a recording begins: nothing is caught in between.
    turn: RwLock<()>,
    stream: Arc<CudaStream>,
    // Last, so that everything above is released while the context still exists.
    context: Arc<CudaContext>,
}

impl Gpu {
    /// The GPU with the given index, which must be one, with a pool of this kind.
    ///
    /// # Errors
    /// [`Error::NoGpu`] when it is too old, and when the driver refuses something.
    pub(super) fn new(index: usize, pool: PoolKind) -> Result<Self> {
        let context = check("opening the GPU", CudaContext::new(index))?;
        let name = check("cuDeviceGetName", context.name())?;
        let capability = check("compute capability", context.compute_capability())?;
        if capability < OLDEST_CAPABILITY {
            return Err(Error::NoGpu(too_old(&name, capability)));
        }
        // No kernel here calls functions that the compiler does not know; what the driver keeps for them by default is 0.2 GB on a
        // large GPU. A kernel that needs more, of a library, gets it when it is launched.
        let limit = sys::CUlimit_enum::CU_LIMIT_STACK_SIZE;
        // SAFETY: the context is current; the call only changes how much memory it keeps for threads' stacks.
        let outcome = unsafe { sys::cuCtxSetLimit(limit, STACK_BYTES) };
        check("cuCtxSetLimit", outcome.result())?;
        let stream = check("cuStreamCreate", context.new_stream())?;
        let total_memory = check("cuDeviceTotalMem", context.total_mem())? as u64;
        let count = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = check("cuDeviceGetAttribute", context.attribute(count))? as u32;
        let pool = Pool::new(pool, context.cu_device(), total_memory)?;
        let beside_pool = BesidePool {
            context: memory_in_use(&context)?,
            ..BesidePool::default()
        };
        Ok(Gpu {
            index,
            name,
            capability,
            multiprocessors,
            total_memory,
            ledger: Ledger::default(),
            pool: Mutex::new(pool),
            beside_pool: Mutex::new(beside_pool),
            recording: Mutex::new(None),
            is_recording: AtomicBool::new(false),
            recordings: AtomicU64::new(0),
            turn: RwLock::new(()),
            stream,
            context,
        })
    }

    /// The index among the GPUs that CUDA shows to this process.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The vendor's name, for example `NVIDIA H200`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The compute capability, for example `(9, 0)`.
    pub fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// The number of streaming multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Bytes of shared memory that a block can ask for.
    ///
    /// # Errors
    /// When the driver cannot be asked.
    pub fn shared_memory_per_block(&self) -> Result<u32> {
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        Ok(check("cuDeviceGetAttribute", self.context.attribute(attribute))? as u32)
    }

    /// Bytes of memory on the card.
    pub fn total_memory(&self) -> u64 {
        self.total_memory
    }

    /// The stream on which all work of the device runs.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The context, in which host memory is pinned and events are made.
    pub(super) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// The accounts of its memory.
    pub(super) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Makes the device current for this thread.
    pub(crate) fn bind(&self) -> Result<()> {
        check("cuCtxSetCurrent", self.context.bind_to_thread())
    }

    /// Waits for all submitted work.
    ///
    /// # Errors
    /// The first error of that work.
    pub fn synchronize(&self) -> Result<()> {
        check("work on the GPU", self.stream.synchronize())
    }

    /// Runs `work`, and adds what the driver's count has grown meanwhile, the pool's growth aside, to a part of what is beside
    /// the pool.
    pub(super) fn charged<T>(
        &self,
        part: fn(&mut BesidePool) -> &mut u64,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let count = || {
            let in_use = self.driver_memory_in_use()?;
            Ok::<_, Error>(in_use.saturating_sub(lock(&self.pool).reserved()))
        };
        let before = count()?;
        let outcome = work()?;
        let grown = count()?.saturating_sub(before);
        *part(&mut lock(&self.beside_pool)) += grown;
        Ok(outcome)
    }

    /// Records a point in the stream's work for timing.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn record_event(&self) -> Result<Event> {
        self.bind()?;
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        Ok(Event(check("cuEventRecord", self.stream.record_event(Some(flags)))?))
    }

    /// Records a point in the stream's work to be waited for, which puts the waiting thread to sleep instead of keeping a
    /// core busy.
    pub(super) fn record_marker(&self) -> Result<Event> {
        self.bind()?;
        let flags = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC;
        Ok(Event(check("cuEventRecord", self.stream.record_event(Some(flags)))?))
    }

    /// Bytes of memory that a new allocation could use: what the driver has left and what the pool holds unused.
    ///
    /// # Errors
    /// When the driver cannot be asked.
    pub fn available_memory(&self) -> Result<u64> {
        let (free, _) = check("cuMemGetInfo", self.context.mem_get_info())?;
        let held = self.ledger.report().total.current;
        let unused = lock(&self.pool).reserved().saturating_sub(held);
        Ok(free as u64 + unused)
    }

    /// Bytes of the card in use by every process, contexts included, as the driver sees it.
    ///
    /// # Errors
    /// When the driver cannot be asked.
    pub fn driver_memory_in_use(&self) -> Result<u64> {
        memory_in_use(&self.context)
    }

    /// What is held, by tag, and what the driver has given.
    pub(super) fn memory_report(&self) -> MemoryReport {
        MemoryReport {
            reserved: lock(&self.pool).reserved(),
            beside_pool: *lock(&self.beside_pool),
            ..self.ledger.report()
        }
    }

    /// Peaks become what is held now.
    pub(super) fn reset_memory_peaks(&self) {
        self.ledger.reset_peaks();
    }

    /// How often work was recorded.
    pub fn recordings(&self) -> u64 {
        self.recordings.load(Ordering::Relaxed)
    }

    /// From now on until [`Gpu::end_recording`], this thread's blocks come from a recording of their own, and no other
    /// thread can submit work, which would be recorded too.
    pub(super) fn begin_recording(&self) -> Result<()> {
        let _alone = self.turn.write().unwrap_or_else(PoisonError::into_inner);
        let mut pool = lock(&self.pool);
        let mut recording = self.recording();
        if recording.is_some() {
            return Err(Error::invalid("work is being recorded on this device already"));
        }
        // What was done before has left holes, and what is recorded now keeps its memory: it is to find one block.
        self.compact(&mut pool)?;
        *recording = Some(Recorded::new());
        self.recordings.fetch_add(1, Ordering::Relaxed);
        self.is_recording.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Takes physical memory from under what is free, for other addresses; says whether there was any. What uses free memory has ended by
    /// then, and nothing becomes free meanwhile, since the pool is held.
    fn compact(&self, pool: &mut Pool) -> Result<bool> {
        self.bind()?;
        self.synchronize()?;
        Ok(pool.compact())
    }

    /// Ends what [`Gpu::begin_recording`] began.
    pub(super) fn end_recording(&self) -> Option<Recorded> {
        let recorded = self.recording().take();
        self.is_recording.store(false, Ordering::SeqCst);
        recorded
    }

    fn recording(&self) -> MutexGuard<'_, Option<Recorded>> {
        lock(&self.recording)
    }

    /// Notes that `address` is given out, whose memory `owner` holds: work that is being recorded may use it at every replay.
    pub(super) fn note_use<T: Any + Send + Sync>(&self, address: u64, owner: &Arc<T>) {
        if self.is_recording.load(Ordering::SeqCst)
            && let Some(recorded) = &mut *self.recording()
        {
            recorded.keep(address, owner);
        }
    }

    /// Calls `work`, which submits something to the device's stream.
    ///
    /// # Errors
    /// When another thread is recording work, or the device cannot be made current.
    pub(super) fn submit<T>(&self, work: impl FnOnce() -> T) -> Result<T> {
        self.bind()?;
        let _turn = self.turn.read().unwrap_or_else(PoisonError::into_inner);
        if self.is_recording.load(Ordering::SeqCst) && self.recording().as_ref().is_some_and(|r| !r.is_mine()) {
            return Err(Error::invalid("another thread is recording work on this device"));
        }
        Ok(work())
    }

    /// Refuses `what`, which cannot be recorded: at a replay the host's memory is another.
    ///
    /// # Errors
    /// While this thread records work.
    pub(super) fn ensure_not_recording(&self, what: &str) -> Result<()> {
        let recording = self.is_recording.load(Ordering::SeqCst);
        match recording && self.recording().as_ref().is_some_and(Recorded::is_mine) {
            true => Err(Error::invalid(format!("{what} cannot be recorded"))),
            false => Ok(()),
        }
    }

    /// Returns blocks of a recording to the pool.
    pub(super) fn release_blocks(&self, blocks: &[(u64, u64)]) {
        let mut pool = lock(&self.pool);
        for &(address, bytes) in blocks {
            pool.free(address, bytes);
        }
    }

    /// Takes back a block of `bytes` bytes that [`Gpu::allocate`] gave out.
    pub(super) fn free(&self, address: u64, bytes: u64) {
        let mut pool = lock(&self.pool);
        let recorded = match &mut *self.recording() {
            Some(recorded) => recorded.blocks.free(address, bytes),
            None => false,
        };
        if !recorded {
            pool.free(address, bytes);
        }
    }

    /// The address of a new block of at least `bytes` bytes.
    ///
    /// # Errors
    /// When the GPU has no room for it.
    pub(super) fn allocate(&self, bytes: usize) -> Result<u64> {
        self.bind()?;
        let outcome = {
            let mut pool = lock(&self.pool);
            match &mut *self.recording() {
                Some(recorded) if recorded.is_mine() => pool.allocate_recorded(&mut recorded.blocks, bytes as u64),
                // While another thread records, nothing can be waited for.
                Some(_) => pool.allocate(bytes as u64),
                None if pool.should_compact(bytes as u64) => {
                    self.compact(&mut pool)?;
                    pool.allocate(bytes as u64)
                }
                None => match pool.allocate(bytes as u64) {
                    Err(error) if is_out_of_memory(error) && self.compact(&mut pool)? => pool.allocate(bytes as u64),
                    outcome => outcome,
                },
            }
        };
        outcome.map_err(|error| {
            if !is_out_of_memory(error) {
                return Error::Cuda {
                    call: "allocating device memory".into(),
                    reason: describe(error),
                };
            }
            let free = self.context.mem_get_info().map_or(0, |(free, _)| free as u64);
            Error::OutOfMemory {
                device: format!("{} (cuda:{})", self.name, self.index),
                requested: format_bytes(bytes as u64),
                in_use: format_bytes(self.ledger.report().total.current),
                free: format_bytes(free),
            }
        })
    }
}

fn is_out_of_memory(error: DriverError) -> bool {
    error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY
}
