//! One GPU with its kernels and the library of matrix products.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::driver::{result, sys};

use super::blas::{Blas, Searched};
use super::driver::{NATIVE_CAPABILITY, describe, gpu_count};
use super::gpu::Gpu;
use super::kernel::Kernel;
use super::options::DeviceOptions;
use super::{images, libraries, upload};
use crate::error::{Error, Result};
use crate::lock::lock;

/// A [`Gpu`] that operations run on: with the kernels of this build, loaded as they are used, and cuBLASLt.
pub struct CudaDevice {
    /// Use the compute_80 images even where there is machine code.
    portable: bool,
    options: &'static DeviceOptions,
    kernels: Mutex<Kernels>,
    blas: OnceLock<Blas>,
    staging: Mutex<Option<upload::Staging>>,
    // Last, so that everything above is released while the context still exists.
    gpu: Arc<Gpu>,
}

#[derive(Default)]
struct Kernels {
    modules: HashMap<&'static str, usize>,
    kernels: HashMap<(&'static str, &'static str), Arc<Kernel>>,
    /// The images that are not the build's.
    foreign: Vec<&'static str>,
}

impl Deref for CudaDevice {
    type Target = Arc<Gpu>;

    fn deref(&self) -> &Arc<Gpu> {
        &self.gpu
    }
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
        if let Some(device) = opened.iter().find(|device| device.index() == index) {
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
        let options = DeviceOptions::of_process()?;
        if !libraries::cublas_lt_present(options) {
            return Err(Error::NoGpu(format!(
                "cuBLASLt was not found ({}): install the CUDA toolkit's libraries or name their folder in L2P_CUDA_LIBRARIES",
                libraries::cublas_lt_places(options)
            )));
        }
        let gpu = Gpu::new(index, options.pool)?;
        Ok(CudaDevice {
            portable: options.portable || gpu.capability() != NATIVE_CAPABILITY,
            options,
            kernels: Mutex::default(),
            blas: OnceLock::new(),
            staging: Mutex::new(None),
            gpu: Arc::new(gpu),
        })
    }

    /// The switches it was opened with.
    pub fn options(&self) -> &DeviceOptions {
        self.options
    }

    /// Whether the Hopper kernels (wgmma, bulk tensor copies) are in use; [`DeviceOptions::portable`] turns them off.
    pub fn has_hopper_kernels(&self) -> bool {
        !self.portable
    }

    /// Whether kernels that are made for it begin while the one ahead of them still runs: where there are Hopper kernels, unless
    /// [`DeviceOptions::overlap`] turns it off.
    pub fn overlaps_kernels(&self) -> bool {
        self.has_hopper_kernels() && self.options.overlap
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

    /// The images in use that are not the build's but from the folder that `L2P_KERNEL_IMAGES` names.
    pub fn foreign_images(&self) -> Vec<&'static str> {
        lock(&self.kernels).foreign.clone()
    }

    /// Loads an image; it stays loaded for the life of the process. Says whether it is another than the build's.
    fn load_image(&self, name: &'static str) -> Result<(sys::CUmodule, bool)> {
        let image = l2p_kernels::image(name)
            .ok_or_else(|| Error::NoGpu(format!("there are no `{name}` kernels: {}", l2p_kernels::HOW_TO_BUILD)))?;
        let foreign = match &self.options.kernel_images {
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
        let module = module
            .map_err(|error| Error::NoGpu(image_refused(name, self.name(), self.capability(), &describe(error))))?;
        Ok((module, is_foreign))
    }

    /// The cuBLASLt handle of this device.
    ///
    /// # Errors
    /// When the library refuses to start.
    pub fn blas(&self) -> Result<&Blas> {
        if self.blas.get().is_none() {
            self.bind()?;
            let blas = self.charged(|beside| &mut beside.library, || Blas::new(self.name(), self.options))?;
            // A second thread may have been faster; either handle will do.
            let _ = self.blas.set(blas);
        }
        Ok(self.blas.get().expect("set above"))
    }

    /// What searches for the algorithms of matrix products have taken so far.
    pub fn searched(&self) -> Searched {
        self.blas.get().map(Blas::searched).unwrap_or_default()
    }

    /// Runs `work` with the device's staging buffers for uploads, made on first use.
    pub(super) fn with_staging<T>(&self, work: impl FnOnce(&mut upload::Staging) -> Result<T>) -> Result<T> {
        let mut staging = lock(&self.staging);
        if staging.is_none() {
            self.bind()?;
            *staging = Some(upload::Staging::new(self.context())?);
        }
        work(staging.as_mut().expect("made above"))
    }
}

/// Why an image that is there cannot be used. The usual reason is an image that the driver is too old to compile, or that
/// is too old for the GPU.
fn image_refused(image: &str, gpu: &str, (major, minor): (i32, i32), reason: &str) -> String {
    format!(
        "the driver cannot load the `{image}` kernels for {gpu} (compute capability {major}.{minor}): {reason}; install a \
         newer driver, build with another CUDA toolkit, or run with --device cpu"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_the_driver_refuses_is_named_with_the_way_out() {
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
