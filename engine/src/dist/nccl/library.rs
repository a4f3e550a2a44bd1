//! The functions of NCCL, found at run time.
//!
//! Declared here, since cudarc looks for a library of a name that NCCL's own packages do not have (`libnccl.so`, where pip and the
//! distributions install `libnccl.so.2`), and ends the program where a function is missing or a newer library returns a code that it
//! does not know.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use crate::device::libraries::load_nccl;
use crate::error::{Error, Result};

/// The oldest version whose communicators need not block: 2.14, as NCCL counts.
const OLDEST: c_int = 21_400;

/// Bytes of an id.
pub const ID_BYTES: usize = 128;

/// `ncclSuccess`
pub const SUCCESS: c_int = 0;
/// `ncclInProgress`
pub const IN_PROGRESS: c_int = 7;
/// `ncclUint8`: tensors are moved as bytes, nothing is computed with them.
pub const BYTES: c_int = 1;

/// `ncclUniqueId`
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId(pub [u8; ID_BYTES]);

/// `ncclConfig_t` as of version 2.14; newer libraries give what was added since its own defaults.
#[repr(C)]
pub struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

impl Config {
    /// A communicator whose calls return at once.
    pub fn not_blocking() -> Self {
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: OLDEST as u32,
            blocking: 0,
        }
    }
}

/// `ncclComm_t`
pub type Comm = *mut c_void;

macro_rules! functions {
    ($($field:ident = $name:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions, by the names of NCCL without their prefix.
        pub struct Library {
            $(pub $field: unsafe extern "C" fn($($argument),*) -> $result,)*
            // Last: the functions are its own.
            _library: libloading::Library,
        }

        impl Library {
            fn new(library: libloading::Library) -> std::result::Result<Self, libloading::Error> {
                Ok(Library {
                    $(
                        // SAFETY: the type is that of the function in nccl.h.
                        $field: *unsafe { library.get(concat!($name, "\0").as_bytes()) }?,
                    )*
                    _library: library,
                })
            }
        }
    };
}

functions! {
    get_version = "ncclGetVersion": fn(*mut c_int) -> c_int;
    get_unique_id = "ncclGetUniqueId": fn(*mut UniqueId) -> c_int;
    comm_init_rank_config = "ncclCommInitRankConfig": fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_int;
    comm_get_async_error = "ncclCommGetAsyncError": fn(Comm, *mut c_int) -> c_int;
    comm_finalize = "ncclCommFinalize": fn(Comm) -> c_int;
    comm_destroy = "ncclCommDestroy": fn(Comm) -> c_int;
    comm_abort = "ncclCommAbort": fn(Comm) -> c_int;
    get_error_string = "ncclGetErrorString": fn(c_int) -> *const c_char;
    get_last_error = "ncclGetLastError": fn(Comm) -> *const c_char;
    group_start = "ncclGroupStart": fn() -> c_int;
    group_end = "ncclGroupEnd": fn() -> c_int;
    send = "ncclSend": fn(*const c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
    recv = "ncclRecv": fn(*mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
    all_gather = "ncclAllGather": fn(*const c_void, *mut c_void, usize, c_int, Comm, *mut c_void) -> c_int;
    broadcast = "ncclBroadcast": fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
}

/// The library, opened on first use.
///
/// # Errors
/// [`Error::NoGpu`] when it is not found, with where it was looked for, or is too old.
pub fn library() -> Result<&'static Library> {
    static LIBRARY: OnceLock<std::result::Result<Library, String>> = OnceLock::new();
    let loaded = LIBRARY.get_or_init(|| {
        keep_multicast_off();
        let library = Library::new(load_nccl()?).map_err(|error| format!("NCCL is too old: {error}"))?;
        match version(&library) {
            version if version >= OLDEST => Ok(library),
            version => Err(format!("NCCL {} is too old: 2.14 or later is needed", printed(version))),
        }
    });
    loaded.as_ref().map_err(|reason| Error::NoGpu(reason.clone()))
}

/// The library's version, as people write it.
pub fn version_text() -> Result<String> {
    library().map(|library| printed(version(library)))
}

fn version(library: &Library) -> c_int {
    let mut version = 0;
    // SAFETY: a plain out-parameter.
    match unsafe { (library.get_version)(&mut version) } {
        SUCCESS => version,
        _ => 0,
    }
}

fn printed(version: c_int) -> String {
    // From 2.9 on two digits count the minor version.
    let (major, rest) = match version {
        ..10_000 => (version / 1000, version % 1000),
        _ => (version / 10_000, version % 10_000),
    };
    format!("{major}.{}.{}", rest / 100, rest % 100)
}

/// Multicast over NVLink holds resources of the switch that outlive a process that dies, which ranks may do; nothing here uses it.
fn keep_multicast_off() {
    const NAME: &str = "NCCL_NVLS_ENABLE";
    if std::env::var_os(NAME).is_none() {
        // SAFETY: NCCL, which is about to be loaded, reads its variables when a communicator is made, later and on this thread's
        // behalf; Rust's own readers take a lock, and the CUDA driver has read its variables when the device was opened.
        unsafe { std::env::set_var(NAME, "0") };
    }
}

impl Library {
    /// What a code means, with the library's own words on the last error.
    pub fn describe(&self, code: c_int) -> String {
        // SAFETY: both return a static or thread-local text that ends with a zero byte, or null.
        let (name, detail) = unsafe {
            (
                text((self.get_error_string)(code)),
                text((self.get_last_error)(std::ptr::null_mut())),
            )
        };
        match detail.is_empty() {
            true => name,
            false => format!("{name}: {detail}"),
        }
    }
}

/// # Safety
/// `text` is null, or a text that ends with a zero byte and stays while this copies it.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: by the caller's promise.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    crate::printable(text.trim()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_as_people_write_them() {
        assert_eq!(printed(2_708), "2.7.8");
        assert_eq!(printed(21_403), "2.14.3");
        assert_eq!(printed(23_004), "2.30.4");
    }

    #[test]
    fn the_configuration_is_laid_out_as_in_c() {
        assert_eq!(size_of::<Config>(), 24);
        assert_eq!(std::mem::offset_of!(Config, magic), 8);
        assert_eq!(std::mem::offset_of!(Config, version), 12);
        assert_eq!(std::mem::offset_of!(Config, blocking), 16);
        assert_eq!(size_of::<UniqueId>(), 128);
    }
}
