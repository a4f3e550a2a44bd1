//! One GPU: its context, stream, memory and kernels.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, result, sys};

use super::blas::{Blas, Searched};
use super::buffer::Block;
use super::graph::Recorded;
use super::kernel::Kernel;
use super::lock::lock;
use super::memory::{BesidePool, Ledger, MemoryReport, format_bytes};
use super::pool::Pool;
use super::{images, libraries, upload};
use crate::error::{Error, Result};

/// The oldest compute capability that the portable images run on.
pub(super) const OLDEST_CAPABILITY: (i32, i32) = (8, 0);

/// The capability for which there is machine code; any other GPU compiles the portable image when it is loaded.
pub(super) const NATIVE_CAPABILITY: (i32, i32) = (9, 0);

/// Bytes of stack that each resident thread is kept ready.
const STACK_BYTES: usize = 64;

/// Turns a driver result into the engine's, naming the call.
pub(super) fn check<T>(call: &str, outcome: std::result::Result<T, result::DriverError>) -> Result<T> {
    outcome.map_err(|error| Error::Cuda {
        call: call.into(),
        reason: describe(error),
    })
}

fn describe(error: result::DriverError) -> String {
    let text = error
        .error_string()
        .map(|text| text.to_string_lossy().into_owned())
        .unwrap_or_default();
    let name = error
        .error_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    format!("{name}: {text}")
}

/// One GPU with one stream, on which all its work runs in order.
pub struct CudaDevice {
    index: usize,
    name: String,
    capability: (i32, i32),
    multiprocessors: u32,
    total_memory: u64,
    /// Use the compute_80 images even where there is machine code.
    portable: bool,
    /// Where images are looked for before those of the build; see `images`.
    foreign_images: Option<PathBuf>,
    ledger: Ledger,
    kernels: Mutex<Kernels>,
    blas: OnceLock<Blas>,
    staging: Mutex<Option<upload::Staging>>,
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

#[derive(Default)]
struct Kernels {
    modules: HashMap<&'static str, usize>,
    kernels: HashMap<(&'static str, &'static str), Arc<Kernel>>,
    /// The images that are not the build's.
    foreign: Vec<&'static str>,
}

impl CudaDevice {
    /// Opens the GPU with the given index. One device per index is kept and shared for the life of the process.
    ///
    /// # Errors
    /// [`Error::NoGpu`] with the reason and the way out: no driver, no such index, too old a GPU, no cuBLASLt, or a build
    /// without kernels.
    pub fn open(index: usize) -> Result<Arc<Self>> {
        static OPENED: Mutex<Vec<Arc<CudaDevice>>> = Mutex::new(Vec::new());
        let mut opened = lock(&OPENED);
        if let Some(device) = opened.iter().find(|device| device.index == index) {
            return Ok(device.clone());
        }
        let device = Arc::new(Self::create(index)?);
        opened.push(device.clone());
        Ok(device)
    }

    fn create(index: usize) -> Result<Self> {
        let count = gpu_count()?;
        if index >= count {
            let known = match count {
                1 => "the only GPU is cuda:0".to_string(),
                _ => format!("the GPUs are cuda:0 to cuda:{}", count - 1),
            };
            return Err(Error::NoGpu(format!("there is no cuda:{index}: {known}")));
        }
        if l2p_kernels::IMAGES.is_empty() {
            return Err(Error::NoGpu(l2p_kernels::HOW_TO_BUILD.into()));
        }
        if !libraries::cublas_lt_present() {
            return Err(Error::NoGpu(format!(
                "cuBLASLt was not found ({}): install the CUDA toolkit's libraries or name their folder in L2P_CUDA_LIBRARIES",
                libraries::cublas_lt_places()
            )));
        }
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
        let pool = Pool::new(context.cu_device(), total_memory)?;
        let beside_pool = BesidePool {
            context: memory_in_use(&context)?,
            ..BesidePool::default()
        };
        Ok(CudaDevice {
            index,
            name,
            capability,
            multiprocessors,
            total_memory,
            portable: portable_forced() || capability != NATIVE_CAPABILITY,
            foreign_images: images::foreign_folder(),
            ledger: Ledger::default(),
            kernels: Mutex::default(),
            blas: OnceLock::new(),
            staging: Mutex::new(None),
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

    /// Whether the Hopper kernels (wgmma, bulk tensor copies) are in use; `L2P_PORTABLE=1` turns them off.
    pub fn has_hopper_kernels(&self) -> bool {
        !self.portable
    }

    /// The stream on which all work of the device runs.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

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

    /// The kernel `name` of the image `image`, loaded on first use.
    ///
    /// # Errors
    /// When the build has no such image or the driver cannot load it.
    pub fn kernel(&self, image: &'static str, name: &'static str) -> Result<Arc<Kernel>> {
        let mut kernels = lock(&self.kernels);
        if let Some(kernel) = kernels.kernels.get(&(image, name)) {
            return Ok(kernel.clone());
        }
        self.bind()?;
        let Kernels { modules, foreign, .. } = &mut *kernels;
        let kernel = self.charged(
            |beside| &mut beside.kernels,
            || {
                let module = match modules.get(image) {
                    Some(&module) => module,
                    None => {
                        let (module, is_foreign) = self.load_image(image)?;
                        modules.insert(image, module as usize);
                        foreign.extend(is_foreign.then_some(image));
                        module as usize
                    }
                };
                Kernel::load(module as sys::CUmodule, name)
            },
        )?;
        let kernel = Arc::new(kernel);
        kernels.kernels.insert((image, name), kernel.clone());
        Ok(kernel)
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

    /// The images in use that are not the build's but from the folder that `L2P_KERNEL_IMAGES` names.
    pub fn foreign_images(&self) -> Vec<&'static str> {
        lock(&self.kernels).foreign.clone()
    }

    /// Loads an image; it stays loaded for the life of the process. Says whether it is another than the build's.
    fn load_image(&self, name: &'static str) -> Result<(sys::CUmodule, bool)> {
        let image = l2p_kernels::image(name)
            .ok_or_else(|| Error::NoGpu(format!("there are no `{name}` kernels: {}", l2p_kernels::HOW_TO_BUILD)))?;
        let foreign = match &self.foreign_images {
            Some(folder) => images::foreign_image(folder, name, images::target(self.portable))?,
            None => None,
        };
        let is_foreign = foreign.is_some();
        let data: &'static [u8] = match foreign {
            Some(bytes) => {
                tracing::warn!("the `{name}` kernels are not the build's but L2P_KERNEL_IMAGES'");
                // As long as the module, which the driver may read from when a kernel is first used.
                Vec::leak(bytes)
            }
            None if self.portable => image.compute_80,
            None => image.sm_90a,
        };
        // SAFETY: `data` is a complete fat binary made by nvcc: the build's, or one that says as much of itself.
        let module = unsafe { result::module::load_data(data.as_ptr().cast()) };
        let module =
            module.map_err(|error| Error::NoGpu(image_refused(name, &self.name, self.capability, &describe(error))))?;
        Ok((module, is_foreign))
    }

    /// The cuBLASLt handle of this device.
    ///
    /// # Errors
    /// When the library refuses to start.
    pub fn blas(&self) -> Result<&Blas> {
        if self.blas.get().is_none() {
            self.bind()?;
            let blas = self.charged(|beside| &mut beside.library, || Blas::new(&self.name))?;
            // A second thread may have been faster; either handle will do.
            let _ = self.blas.set(blas);
        }
        Ok(self.blas.get().expect("set above"))
    }

    /// What searches for the algorithms of matrix products have taken so far.
    pub fn searched(&self) -> Searched {
        self.blas.get().map(Blas::searched).unwrap_or_default()
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

    pub(super) fn memory_report(&self) -> MemoryReport {
        MemoryReport {
            reserved: lock(&self.pool).reserved(),
            beside_pool: *lock(&self.beside_pool),
            ..self.ledger.report()
        }
    }

    pub(super) fn reset_memory_peaks(&self) {
        self.ledger.reset_peaks();
    }

    /// Runs `work` with the device's staging buffers for uploads, made on first use.
    pub(super) fn with_staging<T>(&self, work: impl FnOnce(&mut upload::Staging) -> Result<T>) -> Result<T> {
        let mut staging = lock(&self.staging);
        if staging.is_none() {
            self.bind()?;
            *staging = Some(upload::Staging::new(&self.context)?);
        }
        work(staging.as_mut().expect("made above"))
    }

    /// How often work was recorded.
    pub fn recordings(&self) -> u64 {
        self.recordings.load(Ordering::Relaxed)
    }

    /// From now on until [`CudaDevice::end_recording`], this thread's blocks come from a recording of their own, and no other
    /// thread can submit work, which would be recorded too.
    pub(super) fn begin_recording(&self) -> Result<()> {
        let _alone = self.turn.write().unwrap_or_else(PoisonError::into_inner);
        let mut recording = self.recording();
        if recording.is_some() {
            return Err(Error::invalid("work is being recorded on this device already"));
        }
        *recording = Some(Recorded::new());
        self.recordings.fetch_add(1, Ordering::Relaxed);
        self.is_recording.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Ends what [`CudaDevice::begin_recording`] began.
    pub(super) fn end_recording(&self) -> Option<Recorded> {
        let recorded = self.recording().take();
        self.is_recording.store(false, Ordering::SeqCst);
        recorded
    }

    fn recording(&self) -> MutexGuard<'_, Option<Recorded>> {
        lock(&self.recording)
    }

    /// Notes that an address in `block` is given out: work that is being recorded may use it at every replay.
    pub(super) fn note_use(&self, block: &Arc<Block>) {
        if self.is_recording.load(Ordering::SeqCst)
            && let Some(recorded) = &mut *self.recording()
        {
            recorded.keep(block);
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
    pub(super) fn expect_not_recording(&self, what: &str) -> Result<()> {
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

    pub(super) fn allocate(&self, bytes: usize) -> Result<u64> {
        self.bind()?;
        let outcome = {
            let mut pool = lock(&self.pool);
            match &mut *self.recording() {
                Some(recorded) if recorded.is_mine() => recorded.blocks.allocate(&mut pool, bytes as u64),
                _ => pool.allocate(bytes as u64),
            }
        };
        outcome.map_err(|error| {
            if error.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
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

/// Bytes of the card in use as its driver counts them.
fn memory_in_use(context: &CudaContext) -> Result<u64> {
    let (free, total) = check("cuMemGetInfo", context.mem_get_info())?;
    Ok((total - free) as u64)
}

/// Whether `L2P_PORTABLE` forces the portable images.
pub(super) fn portable_forced() -> bool {
    std::env::var("L2P_PORTABLE").is_ok_and(|value| !value.is_empty() && value != "0")
}

pub(super) fn too_old(name: &str, (major, minor): (i32, i32)) -> String {
    let (needed_major, needed_minor) = OLDEST_CAPABILITY;
    format!(
        "{name} has compute capability {major}.{minor}; the kernels of this build need {needed_major}.{needed_minor} or later \
         (Ampere and newer): run with --device cpu"
    )
}

/// Why an image that is there cannot be used. The usual reason is an image that the driver is too old to compile, or that
/// is too old for the GPU.
fn image_refused(image: &str, gpu: &str, (major, minor): (i32, i32), reason: &str) -> String {
    format!(
        "the driver cannot load the `{image}` kernels for {gpu} (compute capability {major}.{minor}): {reason}; install a \
         newer driver, build with another CUDA toolkit, or run with --device cpu"
    )
}

/// The number of GPUs, or why there is none.
pub(super) fn gpu_count() -> Result<usize> {
    if !libraries::driver_present() {
        return Err(Error::NoGpu(
            "no NVIDIA driver was found (libcuda cannot be loaded): install it, or run with --device cpu".into(),
        ));
    }
    match CudaContext::device_count().or_else(|_| result::init().and_then(|()| result::device::get_count())) {
        Ok(0) | Err(result::DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => Err(Error::NoGpu(
            "the NVIDIA driver shows no GPU: look at CUDA_VISIBLE_DEVICES and nvidia-smi, or run with --device cpu"
                .into(),
        )),
        Ok(count) => Ok(count as usize),
        Err(error) => Err(Error::NoGpu(format!(
            "the NVIDIA driver does not start ({}): check it with nvidia-smi, or run with --device cpu",
            describe(error)
        ))),
    }
}

/// A point in a stream's work.
pub struct Event(CudaEvent);

impl Event {
    /// Milliseconds of device time from `self` to `later`; waits for `later`.
    ///
    /// # Errors
    /// When the work between them failed.
    pub fn milliseconds_to(&self, later: &Event) -> Result<f32> {
        check("timing events", self.0.elapsed_ms(&later.0))
    }

    pub(super) fn is_reached(&self) -> Result<bool> {
        check("work on the GPU", self.0.try_is_complete())
    }

    pub(super) fn wait(&self) -> Result<()> {
        check("work on the GPU", self.0.synchronize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_or_image_that_is_too_old_is_named_with_the_way_out() {
        assert_eq!(
            too_old("Tesla V100", (7, 0)),
            "Tesla V100 has compute capability 7.0; the kernels of this build need 8.0 or later (Ampere and newer): run with \
             --device cpu"
        );
        let reason = "CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available for execution on the device";
        assert_eq!(
            image_refused("attention", "NVIDIA X", (12, 1), reason),
            format!(
                "the driver cannot load the `attention` kernels for NVIDIA X (compute capability 12.1): {reason}; install a \
                 newer driver, build with another CUDA toolkit, or run with --device cpu"
            )
        );
    }
}
