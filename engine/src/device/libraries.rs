//! Finds the CUDA libraries at run time, so that one binary starts on machines with and without them.

use std::path::PathBuf;
use std::sync::OnceLock;

/// The folders looked at beside the loader's own, in this order; `L2P_CUDA_LIBRARIES` comes first.
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
pub fn cublas_lt_present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    *PRESENT.get_or_init(|| {
        preload_cublas_lt();
        // SAFETY: only tries to load the library by its standard names.
        unsafe { cudarc::cublaslt::sys::is_culib_present() }
    })
}

/// Where cuBLASLt was looked for, for messages.
pub fn cublas_lt_places() -> String {
    let folders: Vec<String> = folders().map(|folder| folder.display().to_string()).collect();
    format!("{} in LD_LIBRARY_PATH, {}", CUBLAS_LT.join(" or "), folders.join(", "))
}

/// Loads CUPTI, by the loader's own search or from the usual folders; otherwise says how to get it.
pub fn load_cupti() -> Result<libloading::Library, String> {
    let in_folders = folders()
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
    let folders: Vec<PathBuf> = folders().chain(nccl_wheels()).collect();
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

/// Where pip installs NCCL: beside the other CUDA wheels that `L2P_CUDA_LIBRARIES` may name, in the environment that is active,
/// and in those whose `python3` is in the search path.
fn nccl_wheels() -> Vec<PathBuf> {
    let beside = folders().filter_map(|folder| Some(folder.parent()?.parent()?.join("nccl/lib")));
    let active = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(std::env::var_os);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let pythons = std::env::split_paths(&path).filter(|folder| folder.join("python3").is_file());
    let prefixes = active
        .map(PathBuf::from)
        .chain(pythons.filter_map(|folder| Some(folder.parent()?.to_owned())));
    let libraries = prefixes.flat_map(|prefix| {
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

fn folders() -> impl Iterator<Item = PathBuf> {
    let own = std::env::var_os("L2P_CUDA_LIBRARIES").unwrap_or_default();
    let own: Vec<PathBuf> = std::env::split_paths(&own)
        .filter(|path| !path.as_os_str().is_empty())
        .collect();
    own.into_iter().chain(FOLDERS.map(PathBuf::from))
}

/// Loads cuBLASLt by path where the loader's own search would miss it. A library that is already in the process is found
/// by its bare name from then on.
fn preload_cublas_lt() {
    let found = folders()
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
