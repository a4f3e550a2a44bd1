//! Loading and launching kernels.

use std::ffi::{CStr, CString};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::{result, sys};

use super::args::{Args, Parameter};
use super::driver::check;
use super::gpu::Gpu;
use super::libraries;
use crate::error::{Error, Result};

/// What a kernel says about its own launch (`L2P_LAUNCH` in `cuda/common/launch.cuh`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub struct LaunchInfo {
    /// Threads per block.
    pub threads: u32,
    /// Bytes of dynamic shared memory per block.
    pub dynamic_shared_memory: u32,
    /// What one block covers; the kernel's comment says in which units.
    pub tile: [u32; 4],
}

/// A kernel ready to be launched on its device.
pub struct Kernel {
    name: CString,
    function: sys::CUfunction,
    info: LaunchInfo,
    /// The image's word on the kernel's parameters; `None` where the driver does not pass it on.
    parameters: Option<Vec<Parameter>>,
    /// The layout of arguments that was last found to be that of the parameters; see [`Args::layout`].
    checked: AtomicU64,
}

// SAFETY: a function handle may be used from any thread that has the device's context current, which `launch` sees to.
unsafe impl Send for Kernel {}
// SAFETY: as above; launching does not change the kernel.
unsafe impl Sync for Kernel {}

impl Kernel {
    /// Finds `name` in a loaded module and allows it the shared memory it asks for.
    pub(super) fn load(module: sys::CUmodule, name: &str) -> Result<Self> {
        let name = CString::new(name).expect("kernel names hold no zero byte");
        // SAFETY: the module is loaded and stays so for the life of the device.
        let function = unsafe { result::module::get_function(module, name.clone()) };
        let function = check(&format!("loading kernel {}", name.to_string_lossy()), function)?;
        let info = read_launch_info(module, &name)?.unwrap_or_default();
        // Unasked, a kernel gets 48 KiB, its static shared memory included.
        if info.dynamic_shared_memory > 0 {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: `function` was just loaded.
            let outcome = unsafe {
                result::function::set_function_attribute(function, attribute, info.dynamic_shared_memory as i32)
            };
            check(&format!("shared memory of {}", name.to_string_lossy()), outcome)?;
        }
        let parameters = read_parameters(function)?;
        Ok(Kernel {
            name,
            function,
            info,
            parameters,
            checked: AtomicU64::new(Args::NO_LAYOUT),
        })
    }

    /// What the kernel says about its launch; zeros when it says nothing.
    pub fn info(&self) -> &LaunchInfo {
        &self.info
    }

    /// Blocks of `threads` threads that one multiprocessor runs at the same time.
    ///
    /// # Errors
    /// When the driver cannot tell.
    pub fn resident_blocks(&self, threads: u32) -> Result<u32> {
        let shared = self.info.dynamic_shared_memory as usize;
        // SAFETY: the function was loaded by this kernel.
        let blocks =
            unsafe { result::occupancy::max_active_block_per_multiprocessor(self.function, threads as i32, shared) };
        Ok(check("occupancy", blocks)? as u32)
    }

    /// Compares the arguments with what the image says of the kernel's parameters: how many there are, and the size and offset of
    /// each. Done once for each layout of arguments: a kernel that is launched in one way, as all are, costs a comparison of two
    /// numbers from its second launch on. Drivers before CUDA 12.4 do not tell; then nothing is compared.
    ///
    /// # Errors
    /// When they differ: names kernel and argument.
    pub fn check(&self, args: &Args) -> Result<()> {
        let Some(parameters) = &self.parameters else {
            return Ok(());
        };
        let layout = args.layout();
        if layout != Args::NO_LAYOUT && layout == self.checked.load(Ordering::Relaxed) {
            return Ok(());
        }
        args.ensure_parameters(&self.name.to_string_lossy(), parameters)?;
        self.checked.store(layout, Ordering::Relaxed);
        Ok(())
    }

    /// Launches `grid` blocks of the kernel's own block size on the device's stream.
    ///
    /// # Errors
    /// When the arguments are not those of the image ([`Kernel::check`]) or the launch is refused. Errors while the kernel runs show at
    /// the next synchronisation.
    ///
    /// # Safety
    /// The arguments must be those the kernel takes, in order and type, every address must point to memory of
    /// the size the kernel accesses, and no address that the kernel writes may belong to a tensor that is shared.
    pub unsafe fn launch(&self, device: &Gpu, grid: [u32; 3], args: Args) -> Result<()> {
        // SAFETY: by the caller's promise.
        unsafe { self.launch_with(device, grid, self.info.threads, args) }
    }

    /// Launches `grid` blocks of `threads` threads, for kernels that leave their block size open.
    ///
    /// # Errors
    /// As for [`Kernel::launch`].
    ///
    /// # Safety
    /// As for [`Kernel::launch`].
    pub unsafe fn launch_with(&self, device: &Gpu, grid: [u32; 3], threads: u32, args: Args) -> Result<()> {
        // SAFETY: by the caller's promise.
        unsafe { self.submit(device, grid, threads, args, &mut []) }
    }

    /// As [`Kernel::launch`], for kernels that may begin while the one ahead of them still runs (`cuda/common/overlap.cuh`). Hopper and
    /// later.
    ///
    /// # Errors
    /// As for [`Kernel::launch`].
    ///
    /// # Safety
    /// As for [`Kernel::launch`]; and before the kernel reads what work ahead of it writes, or writes anything, it must wait for that
    /// work, whatever path it takes.
    pub unsafe fn launch_overlapped(&self, device: &Gpu, grid: [u32; 3], args: Args) -> Result<()> {
        let mut attributes = [sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        }];
        // SAFETY: by the caller's promise.
        unsafe { self.submit(device, grid, self.info.threads, args, &mut attributes) }
    }

    /// Checks the arguments and launches.
    ///
    /// # Safety
    /// As for [`Kernel::launch`], and what the attributes ask for.
    unsafe fn submit(
        &self,
        device: &Gpu,
        grid: [u32; 3],
        threads: u32,
        mut args: Args,
        attributes: &mut [sys::CUlaunchAttribute],
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        self.check(&args)?;
        let mut pointers = args.pointers();
        let [x, y, z] = grid;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.info.dynamic_shared_memory,
            hStream: device.stream().cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // SAFETY: by the caller's promise; configuration, attributes and argument pointers live until the call returns, which copies them.
        let launch = || unsafe {
            match config.numAttrs {
                0 => result::launch_kernel(
                    self.function,
                    grid.into(),
                    (threads, 1, 1),
                    config.sharedMemBytes,
                    config.hStream,
                    &mut pointers,
                ),
                _ => {
                    sys::cuLaunchKernelEx(&config, self.function, pointers.as_mut_ptr(), std::ptr::null_mut()).result()
                }
            }
        };
        let outcome = device.submit(launch)?;
        check(
            &format!("launching {} on a grid of {grid:?}", self.name.to_string_lossy()),
            outcome,
        )
    }
}

/// Offsets and sizes of a kernel's parameters, or `None` where the driver is too old to tell.
fn read_parameters(function: sys::CUfunction) -> Result<Option<Vec<Parameter>>> {
    /// `cuFuncGetParamInfo` came with this release of CUDA, as drivers count them.
    const FIRST_RELEASE: i32 = 12040;
    let release = libraries::driver_release().unwrap_or(0);
    if release < FIRST_RELEASE {
        static SAID: Once = Once::new();
        SAID.call_once(|| {
            tracing::debug!(
                "arguments of kernels are not compared with the images: the driver supports CUDA {}, which cannot tell before 12.4",
                libraries::format_release(release)
            );
        });
        return Ok(None);
    }
    let mut parameters = Vec::new();
    loop {
        let (mut offset, mut bytes) = (0, 0);
        // SAFETY: the function is loaded; plain out-parameters.
        let told = unsafe { sys::cuFuncGetParamInfo(function, parameters.len(), &mut offset, &mut bytes) };
        // Past the last parameter.
        if told == sys::CUresult::CUDA_ERROR_INVALID_VALUE {
            return Ok(Some(parameters));
        }
        check("cuFuncGetParamInfo", told.result())?;
        parameters.push(Parameter { offset, bytes });
    }
}

fn read_launch_info(module: sys::CUmodule, kernel: &CStr) -> Result<Option<LaunchInfo>> {
    let symbol = CString::new([kernel.to_bytes(), b"_launch"].concat()).expect("kernel names hold no zero byte");
    let (mut address, mut bytes) = (0, 0);
    // SAFETY: plain out-parameters and a symbol name.
    let found = unsafe { sys::cuModuleGetGlobal_v2(&mut address, &mut bytes, module, symbol.as_ptr()) };
    if found == sys::CUresult::CUDA_ERROR_NOT_FOUND {
        return Ok(None);
    }
    check("cuModuleGetGlobal", found.result())?;
    if bytes != size_of::<LaunchInfo>() {
        return Err(Error::invalid(format!(
            "kernel symbol {} has {bytes} bytes",
            symbol.to_string_lossy()
        )));
    }
    let mut info = [LaunchInfo::default()];
    // SAFETY: the symbol holds exactly one LaunchInfo, checked above.
    check("reading launch parameters", unsafe {
        result::memcpy_dtoh_sync(&mut info, address)
    })?;
    Ok(Some(info[0]))
}
