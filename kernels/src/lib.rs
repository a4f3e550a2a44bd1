//! The CUDA kernels of l2p, compiled at build time by `ptx-build` and embedded here.
//!
//! Each source `cuda/<op>.cu` is one [`Image`]. Kernels are plain C symbols; a kernel `k` that needs more than its
//! arguments to be launched (threads, dynamic shared memory, tile shape) describes itself in a symbol `k_launch`, see
//! `cuda/common/launch.cuh`.

/// One compiled source, for every target.
#[derive(Debug, Clone, Copy)]
pub struct Image {
    /// The source's file stem, for example `attention`.
    pub name: &'static str,
    /// Fat binary with machine code for compute capability 9.0 with architecture-specific features.
    pub sm_90a: &'static [u8],
    /// Fat binary with PTX for compute capability 8.0 and later.
    pub compute_80: &'static [u8],
}

/// All images, sorted by name. Empty when the crate was built without a CUDA compiler.
pub static IMAGES: &[Image] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// How to get kernels into a build that has none; for error messages.
pub const HOW_TO_BUILD: &str =
    "this build has no CUDA kernels: run scripts/cuda-toolchain (or set L2P_NVCC or CUDA_HOME), then build again";

/// The image named `name`, or `None` when this build has none of that name.
pub fn image(name: &str) -> Option<&'static Image> {
    IMAGES.iter().find(|image| image.name == name)
}
