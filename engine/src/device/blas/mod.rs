//! Matrix products through cuBLASLt. The algorithms of large products are searched once and kept on disk, see `search`.

mod plan;
mod search;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex};

use cudarc::cublaslt::{result, sys};

use self::plan::Plan;
use self::search::AlgorithmCache;
use super::CudaBuffer;
use super::cuda::CudaDevice;
use super::lock::lock;
use super::memory::MemoryTag;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Scratch memory offered to cuBLASLt; what it asks for on Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// One matrix product on row-major operands: `D[m, n] = op(A) · op(B) (+ bias[n]) (+ D)`.
///
/// `A` is `[m, k]`, or `[k, m]` when `transpose_a` is set; `B` is `[k, n]`, or `[n, k]` when `transpose_b` is set. The
/// operands are bf16; sums are kept in f32 and rounded once when `D` is bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Matmul {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// The summed extent.
    pub k: usize,
    /// `A` is stored as `[k, m]`.
    pub transpose_a: bool,
    /// `B` is stored as `[n, k]`.
    pub transpose_b: bool,
    /// What the result is stored as: bf16 or f32.
    pub output: DType,
    /// A bf16 vector of `n` elements is added to each row.
    pub bias: bool,
    /// The product is added to what `D` holds.
    pub accumulate: bool,
}

/// Addresses of one product's operands in GPU memory.
#[derive(Clone, Copy, Debug)]
pub struct MatmulOperands {
    /// First element of `A`.
    pub a: u64,
    /// First element of `B`.
    pub b: u64,
    /// First element of the bias; read only when the product has one.
    pub bias: u64,
    /// First element of `D`.
    pub d: u64,
}

/// A cuBLASLt handle with the plans of the products met so far.
pub struct Blas {
    handle: sys::cublasLtHandle_t,
    plans: Mutex<HashMap<Matmul, Plan>>,
    algorithms: Mutex<AlgorithmCache>,
    workspace: Mutex<Option<CudaBuffer>>,
}

// SAFETY: cuBLASLt handles may be used from several threads at once.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Blas {
    pub(super) fn new(gpu: &str) -> Result<Self> {
        let handle = check("cublasLtCreate", result::create_handle())?;
        Ok(Blas {
            handle,
            plans: Mutex::default(),
            algorithms: Mutex::new(AlgorithmCache::open(gpu)),
            workspace: Mutex::new(None),
        })
    }

    /// Runs `product` on the device's stream. The first time, a large product is run with several algorithms to find the
    /// fastest.
    ///
    /// # Errors
    /// When the library has no algorithm for the product or refuses it.
    ///
    /// # Safety
    /// The addresses must belong to bf16 matrices (`D` to one of the product's output type) of the extents that `product`
    /// names, on `device`, and `D` must not be shared with a tensor that somebody reads.
    pub unsafe fn matmul(&self, device: &Arc<CudaDevice>, product: Matmul, operands: MatmulOperands) -> Result<()> {
        if product.m == 0 || product.n == 0 {
            return Ok(());
        }
        device.bind()?;
        let workspace = self.workspace(device)?;
        let mut plans = lock(&self.plans);
        let plan = match plans.entry(product) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let mut plan = Plan::new(self.handle, product)?;
                let mut algorithms = lock(&self.algorithms);
                // The library loads its kernels when they run first.
                let first_run = || {
                    // SAFETY: by the caller's promise; the workspace has the size that plans are made for.
                    unsafe {
                        algorithms.choose(device, &mut plan, operands, workspace)?;
                        plan.run(device, operands, workspace)
                    }
                };
                device.charged(|beside| &mut beside.library, first_run)?;
                entry.insert(plan);
                return Ok(());
            }
        };
        // SAFETY: as above.
        unsafe { plan.run(device, operands, workspace) }
    }

    fn workspace(&self, device: &Arc<CudaDevice>) -> Result<u64> {
        let mut workspace = lock(&self.workspace);
        if let Some(buffer) = &*workspace {
            return Ok(buffer.ptr());
        }
        let _tag = MemoryTag::Workspace.scope();
        let buffer = CudaBuffer::new(device, WORKSPACE_BYTES)?;
        let address = buffer.ptr();
        *workspace = Some(buffer);
        Ok(address)
    }
}

fn check<T>(call: &str, outcome: std::result::Result<T, result::CublasError>) -> Result<T> {
    outcome.map_err(|error| Error::Cuda {
        call: call.into(),
        reason: format!("{:?}", error.0),
    })
}
