//! One GPU: its context, stream, memory and kernels.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, result, sys};

use super::blas::{Blas, Searched};
use super::cpu::{POISON_BYTE, poison_new_buffers};
use super::kernel::Kernel;
use super::lock::lock;
use super::memory::{BesidePool, Ledger, MemoryReport, MemoryTag, format_bytes};
use super::pool::{Pool, Recording};
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
    /// While work is recorded: the blocks that the recording uses.
    recording: Mutex<Option<Recording>>,
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

    /// From now on until [`CudaDevice::end_recording`], blocks come from a recording of their own.
    pub(super) fn begin_recording(&self) -> Result<()> {
        let mut recording = lock(&self.recording);
        if recording.is_some() {
            return Err(Error::invalid("work is being recorded on this device already"));
        }
        *recording = Some(Recording::default());
        Ok(())
    }

    /// Ends what [`CudaDevice::begin_recording`] began.
    pub(super) fn end_recording(&self) -> Recording {
        lock(&self.recording).take().unwrap_or_default()
    }

    /// Returns blocks of a recording to the pool.
    pub(super) fn release_blocks(&self, blocks: &[(u64, u64)]) {
        let mut pool = lock(&self.pool);
        for &(address, bytes) in blocks {
            pool.free(address, bytes);
        }
    }

    fn free(&self, address: u64, bytes: u64) {
        let mut pool = lock(&self.pool);
        let recorded = match &mut *lock(&self.recording) {
            Some(recording) => recording.free(address, bytes),
            None => false,
        };
        if !recorded {
            pool.free(address, bytes);
        }
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.bind()?;
        let outcome = {
            let mut pool = lock(&self.pool);
            match &mut *lock(&self.recording) {
                Some(recording) => recording.allocate(&mut pool, bytes as u64),
                None => pool.allocate(bytes as u64),
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

/// A block of a GPU's memory, counted by tag; returns to the pool when dropped.
pub struct CudaBuffer {
    device: Arc<CudaDevice>,
    address: u64,
    bytes: usize,
    tag: MemoryTag,
}

impl CudaBuffer {
    /// A block of `bytes` bytes with undefined content (NaNs when poisoning is on).
    pub(crate) fn new(device: &Arc<CudaDevice>, bytes: usize) -> Result<Self> {
        let address = device.allocate(bytes)?;
        let tag = MemoryTag::current();
        device.ledger.add(tag, bytes as u64);
        let buffer = CudaBuffer {
            device: device.clone(),
            address,
            bytes,
            tag,
        };
        if poison_new_buffers() {
            buffer.fill(POISON_BYTE)?;
        }
        Ok(buffer)
    }

    pub(crate) fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    pub(crate) fn ptr(&self) -> u64 {
        self.address
    }

    pub(crate) fn fill_zero(&mut self) -> Result<()> {
        self.fill(0)
    }

    fn fill(&self, byte: u8) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        self.device.bind()?;
        let stream = self.device.stream.cu_stream();
        // SAFETY: the block belongs to this buffer and has `bytes` bytes.
        check("cuMemsetD8Async", unsafe {
            result::memset_d8_async(self.address, byte, self.bytes, stream)
        })
    }

    /// Copies from pageable host memory into the block, from byte `offset` on; the source may be reused on return.
    pub(crate) fn copy_from_host(&mut self, offset: usize, source: &[u8]) -> Result<()> {
        assert!(offset + source.len() <= self.bytes, "a copy past the end of a buffer");
        if source.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        let stream = self.device.stream.cu_stream();
        // SAFETY: the range lies in the block (checked above); the driver has copied a pageable source when it returns.
        let outcome = unsafe { result::memcpy_htod_async(self.address + offset as u64, source, stream) };
        check("copy to the GPU", outcome)
    }

    /// Copies from another block of the same device, in the order of the stream.
    pub(crate) fn copy_from_device(&mut self, to: usize, source: &CudaBuffer, from: usize, bytes: usize) -> Result<()> {
        assert!(
            to + bytes <= self.bytes && from + bytes <= source.bytes,
            "a copy past the end of a buffer"
        );
        if bytes == 0 {
            return Ok(());
        }
        self.device.bind()?;
        let stream = self.device.stream.cu_stream();
        // SAFETY: both ranges lie in their blocks (checked above), and different buffers do not overlap.
        let outcome =
            unsafe { result::memcpy_dtod_async(self.address + to as u64, source.address + from as u64, bytes, stream) };
        check("copy within the GPU", outcome)
    }

    /// Copies out of the block after all submitted work is done.
    pub(crate) fn copy_to_host(&self, offset: usize, target: &mut [u8]) -> Result<()> {
        assert!(offset + target.len() <= self.bytes, "a copy past the end of a buffer");
        if target.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        let stream = self.device.stream.cu_stream();
        // SAFETY: the range lies in the block (checked above), and the stream is waited for before `target` is used.
        let outcome = unsafe { result::memcpy_dtoh_async(target, self.address + offset as u64, stream) };
        check("copy from the GPU", outcome)?;
        self.device.synchronize()
    }

    /// Fills the block through the pinned staging buffers, so that reading a file and copying overlap.
    pub(crate) fn upload(&mut self, fill: &mut dyn FnMut(usize, &mut [u8]) -> Result<()>) -> Result<()> {
        let (device, address, bytes) = (self.device.clone(), self.address, self.bytes);
        device.with_staging(|staging| staging.upload(&device, address, bytes, fill))
    }
}

impl Drop for CudaBuffer {
    fn drop(&mut self) {
        self.device.ledger.remove(self.tag, self.bytes as u64);
        if self.device.bind().is_ok() {
            self.device.free(self.address, self.bytes as u64);
        }
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
