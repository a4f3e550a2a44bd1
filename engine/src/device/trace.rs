//! What the GPU did and when, from CUPTI: the only way to see the kernels of a replayed graph one by one without Nsight.
//!
//! Six functions of the library are used, loaded at run time. All records read here begin alike, in every version since
//! CUDA 9: the kind in the first four bytes, start and end in nanoseconds at bytes 16 and 24; a kernel's name is at byte 104.

use std::ffi::{CStr, c_char, c_void};
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::driver::sys;

use super::cuda::CudaDevice;
use super::driver::check;
use super::libraries;
use crate::error::{Error, Result};
use crate::lock::lock;

/// Kinds of records.
const MEMCPY: u32 = 1;
const MEMSET: u32 = 2;
const CONCURRENT_KERNEL: u32 = 10;
const KINDS: [u32; 3] = [MEMCPY, MEMSET, CONCURRENT_KERNEL];

/// Where in a record the fields are.
const START: usize = 16;
const END: usize = 24;
const KERNEL_NAME: usize = 104;

const BUFFER_BYTES: usize = 4 << 20;
const FLUSH_FORCED: u32 = 1;

/// One kernel, copy or fill.
#[derive(Clone, Debug)]
pub struct Activity {
    /// The kernel's symbol, `copy` or `fill`.
    pub name: String,
    /// Nanoseconds on the GPU's clock.
    pub start: u64,
    /// Nanoseconds on the GPU's clock.
    pub end: u64,
}

/// Traces a device's work while it lives.
pub struct Tracer {
    device: Arc<CudaDevice>,
    cupti: &'static Cupti,
}

impl Tracer {
    /// Starts to trace; graphs that are to be seen kernel by kernel must be recorded after this. One tracer at a time.
    ///
    /// # Errors
    /// When CUPTI is not found or does not start, with the way to get it.
    pub fn start(device: &Arc<CudaDevice>) -> Result<Self> {
        let cupti = Cupti::get()?;
        device.bind()?;
        device.synchronize()?;
        for kind in KINDS {
            // SAFETY: takes a kind of record.
            cupti.check("cuptiActivityEnable", unsafe { (cupti.enable)(kind) })?;
        }
        lock(&RECORDS).clear();
        Ok(Tracer {
            device: device.clone(),
            cupti,
        })
    }

    /// What the device has done since the start or the last call, by start time. Waits for submitted work.
    ///
    /// # Errors
    /// The first error of that work, or the library's.
    pub fn take(&mut self) -> Result<Vec<Activity>> {
        self.device.synchronize()?;
        // SAFETY: takes a flag; calls `complete` below for every buffer.
        let flushed = unsafe { (self.cupti.flush)(FLUSH_FORCED) };
        self.cupti.check("cuptiActivityFlushAll", flushed)?;
        let mut records = std::mem::take(&mut *lock(&RECORDS));
        records.sort_by_key(|record| record.start);
        Ok(records)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        for kind in KINDS {
            // SAFETY: takes a kind of record. That it is not enabled does no harm.
            unsafe { (self.cupti.disable)(kind) };
        }
    }
}

/// Nanoseconds in which at least one of the activities runs; they must be sorted by start.
pub fn busy_nanoseconds(activities: &[Activity]) -> u64 {
    let (mut busy, mut until) = (0, 0);
    for activity in activities {
        let start = activity.start.max(until);
        busy += activity.end.saturating_sub(start);
        until = until.max(activity.end);
    }
    busy
}

impl CudaDevice {
    /// Runs `work` between the marks that profilers wait for when they are told not to start with the program (`ncu
    /// --profile-from-start off`, `nsys --capture-range cudaProfilerApi`).
    ///
    /// # Errors
    /// Those of `work`, and when the driver refuses.
    pub fn profiled<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.bind()?;
        self.synchronize()?;
        // SAFETY: takes nothing; the context is current.
        check("cuProfilerStart", unsafe { sys::cuProfilerStart() }.result())?;
        let outcome = work();
        self.synchronize()?;
        // SAFETY: as above.
        check("cuProfilerStop", unsafe { sys::cuProfilerStop() }.result())?;
        outcome
    }
}

/// Records of buffers that the library has handed back.
static RECORDS: Mutex<Vec<Activity>> = Mutex::new(Vec::new());

type BufferRequested = unsafe extern "C" fn(*mut *mut u8, *mut usize, *mut usize);
type BufferCompleted = unsafe extern "C" fn(*mut c_void, u32, *mut u8, usize, usize);

/// The library's functions.
struct Cupti {
    enable: unsafe extern "C" fn(u32) -> u32,
    disable: unsafe extern "C" fn(u32) -> u32,
    flush: unsafe extern "C" fn(u32) -> u32,
    next: unsafe extern "C" fn(*mut u8, usize, *mut *mut u8) -> u32,
}

impl Cupti {
    fn get() -> Result<&'static Self> {
        static CUPTI: OnceLock<std::result::Result<Cupti, String>> = OnceLock::new();
        CUPTI
            .get_or_init(Self::load)
            .as_ref()
            .map_err(|reason| Error::invalid(reason.clone()))
    }

    fn load() -> std::result::Result<Self, String> {
        let library = libraries::load_cupti()?;
        let missing = |error: libloading::Error| format!("CUPTI lacks a function: {error}");
        // SAFETY: the symbols have these types in every version of the library; it is never unloaded.
        unsafe {
            let register: unsafe extern "C" fn(BufferRequested, BufferCompleted) -> u32 =
                *library.get(b"cuptiActivityRegisterCallbacks\0").map_err(missing)?;
            let cupti = Cupti {
                enable: *library.get(b"cuptiActivityEnable\0").map_err(missing)?,
                disable: *library.get(b"cuptiActivityDisable\0").map_err(missing)?,
                flush: *library.get(b"cuptiActivityFlushAll\0").map_err(missing)?,
                next: *library.get(b"cuptiActivityGetNextRecord\0").map_err(missing)?,
            };
            std::mem::forget(library);
            match register(request, complete) {
                0 => Ok(cupti),
                code => Err(format!("cuptiActivityRegisterCallbacks: error {code}")),
            }
        }
    }

    fn check(&self, call: &str, code: u32) -> Result<()> {
        match code {
            0 => Ok(()),
            code => Err(Error::Cuda {
                call: call.into(),
                reason: format!("CUPTI error {code}; another profiler may be attached to this process"),
            }),
        }
    }
}

fn layout() -> std::alloc::Layout {
    std::alloc::Layout::from_size_align(BUFFER_BYTES, 8).expect("a constant")
}

/// Gives the library a buffer.
unsafe extern "C" fn request(buffer: *mut *mut u8, size: *mut usize, most_records: *mut usize) {
    // SAFETY: the library passes valid out-parameters; a null buffer with size 0 tells it that there is no memory.
    unsafe {
        let memory = std::alloc::alloc(layout());
        *buffer = memory;
        *size = if memory.is_null() { 0 } else { BUFFER_BYTES };
        *most_records = 0;
    }
}

/// Reads the records of a buffer and frees it.
unsafe extern "C" fn complete(_context: *mut c_void, _stream: u32, buffer: *mut u8, _size: usize, valid: usize) {
    if buffer.is_null() {
        return;
    }
    if let Ok(cupti) = Cupti::get() {
        let mut records = lock(&RECORDS);
        let mut record = std::ptr::null_mut();
        // SAFETY: the buffer is the library's, with `valid` bytes of whole records.
        while unsafe { (cupti.next)(buffer, valid, &mut record) } == 0 {
            // SAFETY: `record` points to a record of one of the kinds that were enabled.
            records.extend(unsafe { read(record) });
        }
    }
    // SAFETY: every buffer comes from `request`.
    unsafe { std::alloc::dealloc(buffer, layout()) };
}

/// Reads a record; `None` for a kind that was not asked for.
///
/// # Safety
/// `record` must point to a CUPTI activity record.
unsafe fn read(record: *const u8) -> Option<Activity> {
    // SAFETY: by the caller's promise; records of the kinds read here have these fields, see the module's head comment.
    unsafe {
        let name = match record.cast::<u32>().read_unaligned() {
            MEMCPY => "copy".to_owned(),
            MEMSET => "fill".to_owned(),
            CONCURRENT_KERNEL => {
                let name = record.add(KERNEL_NAME).cast::<*const c_char>().read_unaligned();
                match name.is_null() {
                    true => "kernel".to_owned(),
                    false => CStr::from_ptr(name).to_string_lossy().into_owned(),
                }
            }
            _ => return None,
        };
        Some(Activity {
            name,
            start: record.add(START).cast::<u64>().read_unaligned(),
            end: record.add(END).cast::<u64>().read_unaligned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn activity(start: u64, end: u64) -> Activity {
        Activity {
            name: "kernel".into(),
            start,
            end,
        }
    }

    #[test]
    fn overlapping_work_counts_once() {
        assert_eq!(busy_nanoseconds(&[]), 0);
        let found = [activity(10, 20), activity(15, 18), activity(19, 25), activity(30, 31)];
        assert_eq!(busy_nanoseconds(&found), 16);
    }

    #[test]
    fn records_are_read_where_their_fields_are() {
        let name = c"attention";
        let mut record = [0u8; 128];
        record[..4].copy_from_slice(&CONCURRENT_KERNEL.to_ne_bytes());
        record[START..START + 8].copy_from_slice(&5u64.to_ne_bytes());
        record[END..END + 8].copy_from_slice(&9u64.to_ne_bytes());
        record[KERNEL_NAME..KERNEL_NAME + 8].copy_from_slice(&(name.as_ptr() as u64).to_ne_bytes());
        // SAFETY: laid out as a kernel's record.
        let found = unsafe { read(record.as_ptr()) }.unwrap();
        assert_eq!((found.name.as_str(), found.start, found.end), ("attention", 5, 9));
        record[..4].copy_from_slice(&77u32.to_ne_bytes());
        // SAFETY: a kind of which nothing is read.
        assert!(unsafe { read(record.as_ptr()) }.is_none());
    }
}
