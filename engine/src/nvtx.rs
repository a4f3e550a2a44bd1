//! Ranges for NVIDIA's profilers, without any library of theirs.
//!
//! A profiler that starts this process names an injection library in `NVTX_INJECTION64_PATH`. On the first range that
//! library is loaded and given a table of slots, in which it puts its own functions; without a profiler the slots stay
//! empty and a range costs one load and one branch. This is the client half of the NVTX 3 protocol (which CUDA ships as
//! C headers only), cut down to the two functions used here.

use std::cell::UnsafeCell;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

/// Indices into the core table.
const RANGE_PUSH: usize = 9;
const RANGE_POP: usize = 11;

/// Modules that an injection library may ask for, with their numbers of slots (slot 0 is never used).
const MODULE_CORE: c_uint = 1;
const MODULE_CORE2: c_uint = 5;
const SLOTS: usize = 16;

/// Numbers of the two export tables.
const TABLE_CALLBACKS: u32 = 1;
const TABLE_VERSION: u32 = 3;
/// The protocol version this client speaks.
const VERSION: u32 = 3;

type Function = *const c_void;
type RangePush = unsafe extern "C" fn(*const c_char) -> c_int;
type RangePop = unsafe extern "C" fn() -> c_int;
type GetExportTable = extern "C" fn(u32) -> *const c_void;
type Initialize = unsafe extern "C" fn(GetExportTable) -> c_int;

/// Function slots that the injection library fills while it initialises, and their addresses, as the protocol wants them.
#[repr(C)]
struct Slots {
    functions: UnsafeCell<[Function; SLOTS]>,
    addresses: UnsafeCell<[*mut Function; SLOTS + 1]>,
}

// SAFETY: written only inside `load`, which `OnceLock` runs once, before any reader.
unsafe impl Sync for Slots {}

impl Slots {
    const fn new() -> Self {
        Slots {
            functions: UnsafeCell::new([std::ptr::null(); SLOTS]),
            addresses: UnsafeCell::new([std::ptr::null_mut(); SLOTS + 1]),
        }
    }
}

static CORE: Slots = Slots::new();
static CORE2: Slots = Slots::new();

#[repr(C)]
struct CallbackTable {
    struct_size: usize,
    get_module: extern "C" fn(c_uint, *mut *mut *mut Function, *mut c_uint) -> c_int,
}

#[repr(C)]
struct VersionTable {
    struct_size: usize,
    version: u32,
    reserved: u32,
    set_injection_version: extern "C" fn(u32),
}

static CALLBACKS: CallbackTable = CallbackTable {
    struct_size: size_of::<CallbackTable>(),
    get_module,
};
static VERSIONS: VersionTable = VersionTable {
    struct_size: size_of::<VersionTable>(),
    version: VERSION,
    reserved: 0,
    set_injection_version,
};

extern "C" fn set_injection_version(_version: u32) {}

extern "C" fn get_export_table(table: u32) -> *const c_void {
    match table {
        TABLE_CALLBACKS => std::ptr::from_ref(&CALLBACKS).cast(),
        TABLE_VERSION => std::ptr::from_ref(&VERSIONS).cast(),
        _ => std::ptr::null(),
    }
}

extern "C" fn get_module(module: c_uint, table: *mut *mut *mut Function, size: *mut c_uint) -> c_int {
    let slots = match module {
        MODULE_CORE => &CORE,
        MODULE_CORE2 => &CORE2,
        _ => return 0,
    };
    let functions: *mut Function = slots.functions.get().cast();
    // SAFETY: runs on the one thread inside `load`; the out-pointers are null or valid by the protocol.
    unsafe {
        for index in 1..SLOTS {
            (*slots.addresses.get())[index] = functions.add(index);
        }
        if !table.is_null() {
            *table = slots.addresses.get().cast();
        }
        if !size.is_null() {
            *size = SLOTS as c_uint;
        }
    }
    1
}

/// The profiler's functions.
struct Profiler {
    push: RangePush,
    pop: RangePop,
}

/// Loads the injection library, where there is one.
fn load() -> Option<Profiler> {
    let path = std::env::var_os("NVTX_INJECTION64_PATH").filter(|path| !path.is_empty())?;
    // SAFETY: the user's profiler put this library there to be loaded; the symbol has this type by the protocol; both
    // slots hold functions of these types or null once initialisation succeeded.
    unsafe {
        let library = libloading::Library::new(path).ok()?;
        let succeeded = {
            let initialize = library.get::<Initialize>(b"InitializeInjectionNvtx2\0").ok()?;
            initialize(get_export_table) != 0
        };
        // The functions are used until the process ends.
        std::mem::forget(library);
        if !succeeded {
            return None;
        }
        let functions = &*CORE.functions.get();
        let (push, pop) = (functions[RANGE_PUSH], functions[RANGE_POP]);
        if push.is_null() || pop.is_null() {
            return None;
        }
        Some(Profiler {
            push: std::mem::transmute::<Function, RangePush>(push),
            pop: std::mem::transmute::<Function, RangePop>(pop),
        })
    }
}

fn profiler() -> Option<&'static Profiler> {
    static PROFILER: OnceLock<Option<Profiler>> = OnceLock::new();
    PROFILER.get_or_init(load).as_ref()
}

/// Opens a range on this thread.
pub(crate) fn push(name: &CStr) {
    if let Some(profiler) = profiler() {
        // SAFETY: the profiler's function takes a C string, which it copies.
        unsafe { (profiler.push)(name.as_ptr()) };
    }
}

/// As [`push`], for a name without a zero byte; one is added only when a profiler is attached.
pub(crate) fn push_str(name: &str) {
    if profiler().is_some() {
        // A name with a zero byte inside would be cut there: names are constants of this crate, without one.
        push(&CString::new(name).unwrap_or_default());
    }
}

/// Closes this thread's innermost range.
pub(crate) fn pop() {
    if let Some(profiler) = profiler() {
        // SAFETY: the profiler's function takes nothing.
        unsafe { (profiler.pop)() };
    }
}
