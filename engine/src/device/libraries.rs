//! Finds the CUDA libraries at run time, so that one binary starts on machines with and without them.

use std::path::PathBuf;
use std::sync::OnceLock;

use super::options::DeviceOptions;

/// The folders looked at beside the loader's own, in this order; those of the options come first.
const FOLDERS: [&str; 4] = [
    "/usr/local/cuda/lib64",
    "/usr/local/cuda/targets/x86_64-linux/lib",
    "/usr/lib/x86_64-linux-gnu",
    "/opt/cuda/lib64",
];

/// Where toolkits keep CUPTI, beside the folders above.
const CUPTI_FOLDER: &str = "/usr/local/cuda/extras/CUPTI/lib64";

/// The file names of CUPTI.
const CUPTI: [&str; 3] = ["libcupti.so.13", "libcupti.so.12", "libcupti.so"];

/// The file names of NCCL; its own packages link the first alone.
const NCCL: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// The file names under which cuBLASLt of the supported major versions is installed.
const CUBLAS_LT: [&str; 2] = ["libcublasLt.so.13", "libcublasLt.so.12"];

/// Whether the CUDA driver's library can be loaded.
pub fn driver_present() -> bool {
    // SAFETY: only tries to load the library by its standard names.
    unsafe { cudarc::driver::sys::is_culib_present() }
}

/// The newest CUDA release that the driver supports, as it counts them: 13000 is 13.0. `None` without a driver.
pub fn driver_release() -> Option<i32> {
    if !driver_present() {
        return None;
    }
    let mut release = 0;
    // SAFETY: plain out-parameter; the library is present.
    unsafe { cudarc::driver::sys::cuDriverGetVersion(&mut release) }
        .result()
        .ok()?;
    Some(release)
}

/// A release of [`driver_release`] for people, such as `13.0`.
pub fn format_release(release: i32) -> String {
    format!("{}.{}", release / 1000, release % 1000 / 10)
}

/// Whether cuBLASLt can be loaded, after looking in the usual folders too.
pub fn cublas_lt_present(options: &DeviceOptions) -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    *PRESENT.get_or_init(|| {
        preload_cublas_lt(options);
        // SAFETY: only tries to load the library by its standard names.
        unsafe { cudarc::cublaslt::sys::is_culib_present() }
    })
}

/// Where cuBLASLt was looked for, for messages.
pub fn cublas_lt_places(options: &DeviceOptions) -> String {
    let folders: Vec<String> = folders(options).map(|folder| folder.display().to_string()).collect();
    format!("{} in LD_LIBRARY_PATH, {}", CUBLAS_LT.join(" or "), folders.join(", "))
}

/// Loads CUPTI, by the loader's own search or from the usual folders; otherwise says how to get it.
pub fn load_cupti() -> Result<libloading::Library, String> {
    let options = DeviceOptions::of_process().map_err(|error| error.to_string())?;
    let in_folders = folders(options)
        .chain([PathBuf::from(CUPTI_FOLDER)])
        .flat_map(|folder| CUPTI.map(|name| folder.join(name)));
    let candidates = CUPTI.map(PathBuf::from).into_iter().chain(in_folders);
    for path in candidates {
        // SAFETY: loading the library runs its initialisers only, which have no preconditions.
        if let Ok(library) = unsafe { libloading::Library::new(path) } {
            return Ok(library);
        }
    }
    Err(format!(
        "CUPTI was not found ({} in LD_LIBRARY_PATH or the CUDA toolkit): install it (pip: nvidia-cuda-cupti) and name its \
         folder in L2P_CUDA_LIBRARIES",
        CUPTI.join(", ")
    ))
}

/// Loads NCCL, by the loader's own search, from the usual folders, or from where pip puts it; otherwise says where it was
/// looked for.
pub fn load_nccl() -> Result<libloading::Library, String> {
    let options = DeviceOptions::of_process().map_err(|error| error.to_string())?;
    let folders: Vec<PathBuf> = folders(options).chain(nccl_wheels(options)).collect();
    let in_folders = folders.iter().flat_map(|folder| NCCL.map(|name| folder.join(name)));
    for path in NCCL.map(PathBuf::from).into_iter().chain(in_folders) {
        // SAFETY: loading the library runs its initialisers only, which have no preconditions.
        if let Ok(library) = unsafe { libloading::Library::new(path) } {
            return Ok(library);
        }
    }
    let folders: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
    Err(format!(
        "NCCL, which several GPUs need, was not found ({} in LD_LIBRARY_PATH, {}): install it (Debian: libnccl2, pip: \
         nvidia-nccl-cu13) or name its folder in L2P_CUDA_LIBRARIES",
        NCCL.join(" or "),
        folders.join(", ")
    ))
}

/// Where pip installs NCCL: beside the other CUDA wheels that the options may name, and in the Python environments.
fn nccl_wheels(options: &DeviceOptions) -> Vec<PathBuf> {
    let beside = folders(options).filter_map(|folder| Some(folder.parent()?.parent()?.join("nccl/lib")));
    let libraries = options.python_prefixes.iter().flat_map(|prefix| {
        let entries = std::fs::read_dir(prefix.join("lib")).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    });
    let packages = libraries
        .filter(|folder| {
            folder
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("python3"))
        })
        .flat_map(|folder| {
            ["site-packages", "dist-packages"].map(|packages| folder.join(packages).join("nvidia/nccl/lib"))
        });
    let mut found: Vec<PathBuf> = Vec::new();
    for folder in beside.chain(packages).filter(|folder| folder.is_dir()) {
        if !found.contains(&folder) {
            found.push(folder);
        }
    }
    found
}

fn folders(options: &DeviceOptions) -> impl Iterator<Item = PathBuf> {
    let own = options.library_folders.iter().cloned();
    own.chain(FOLDERS.map(PathBuf::from))
}

/// Loads cuBLASLt by path where the loader's own search would miss it. A library that is already in the process is found
/// by its bare name from then on.
fn preload_cublas_lt(options: &DeviceOptions) {
    let found = folders(options)
        .flat_map(|folder| CUBLAS_LT.map(|name| folder.join(name)))
        .filter(|path| path.is_file());
    for path in found {
        // SAFETY: loading a CUDA library runs its initialisers only, which have no preconditions.
        if let Ok(library) = unsafe { libloading::Library::new(&path) } {
            // Kept for the life of the process: the loader must not unload it before it is used.
            std::mem::forget(library);
            return;
        }
    }
}
