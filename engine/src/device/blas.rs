//! Matrix products through cuBLASLt.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Mutex;

use cudarc::cublaslt::{result, sys};

use super::cuda::CudaDevice;
use super::memory::MemoryTag;
use super::{CudaBuffer, format_bytes};
use crate::error::{Error, Result};
use crate::tensor::DType;

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
    workspace: Mutex<Option<CudaBuffer>>,
}

// SAFETY: cuBLASLt handles may be used from several threads at once.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Blas {
    pub(super) fn new() -> Result<Self> {
        let handle = check("cublasLtCreate", result::create_handle())?;
        Ok(Blas {
            handle,
            plans: Mutex::default(),
            workspace: Mutex::new(None),
        })
    }

    /// Runs `product` on the device's stream.
    ///
    /// # Errors
    /// When the library has no algorithm for the product or refuses it.
    ///
    /// # Safety
    /// The addresses must belong to bf16 matrices (`D` to one of the product's output type) of the extents that `product`
    /// names, on `device`, and `D` must not be shared with a tensor that somebody reads.
    pub unsafe fn matmul(
        &self,
        device: &std::sync::Arc<CudaDevice>,
        product: Matmul,
        operands: MatmulOperands,
    ) -> Result<()> {
        if product.m == 0 || product.n == 0 {
            return Ok(());
        }
        device.bind()?;
        let workspace = self.workspace(device)?;
        let mut plans = self.plans.lock().unwrap();
        let plan = match plans.entry(product) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(Plan::new(self.handle, product)?),
        };
        let (alpha, beta) = (1.0f32, if product.accumulate { 1.0f32 } else { 0.0 });
        // cuBLASLt is column-major: a row-major matrix is its transpose there, so Dᵀ = op(B)ᵀ · op(A)ᵀ is computed.
        // SAFETY: the caller vouches for the operands, the plan for descriptors of the same extents, and the workspace has
        // the size that the plan was made for.
        unsafe {
            if product.bias {
                plan.set(
                    sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                    &operands.bias,
                )?;
            }
            let outcome = result::matmul(
                self.handle,
                plan.description,
                std::ptr::from_ref(&alpha).cast(),
                std::ptr::from_ref(&beta).cast(),
                operands.b as *const c_void,
                plan.left,
                operands.a as *const c_void,
                plan.right,
                operands.d as *const c_void,
                plan.target,
                operands.d as *mut c_void,
                plan.target,
                &plan.algorithm,
                workspace as *mut c_void,
                WORKSPACE_BYTES,
                device.stream().cu_stream().cast(),
            );
            check(&format!("cublasLtMatmul {product:?}"), outcome)
        }
    }

    fn workspace(&self, device: &std::sync::Arc<CudaDevice>) -> Result<u64> {
        let mut workspace = self.workspace.lock().unwrap();
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

/// Descriptors and the chosen algorithm of one product.
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    left: sys::cublasLtMatrixLayout_t,
    right: sys::cublasLtMatrixLayout_t,
    target: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: the descriptors are plain memory owned by this plan.
unsafe impl Send for Plan {}

impl Plan {
    fn new(handle: sys::cublasLtHandle_t, product: Matmul) -> Result<Self> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let Matmul {
            m,
            n,
            k,
            transpose_a,
            transpose_b,
            output,
            ..
        } = product;
        let output_type = match output {
            DType::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
            DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
            other => return Err(Error::invalid(format!("a matrix product cannot give {other}"))),
        };
        let input_type = sys::cudaDataType_t::CUDA_R_16BF;
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let description = check(
            "cublasLtMatmulDescCreate",
            result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F),
        )?;
        // A row-major [rows, columns] matrix is a column-major one of `columns` rows with that leading dimension.
        let layout = |kind, (rows, columns): (usize, usize)| {
            let layout = result::create_matrix_layout(kind, columns as u64, rows as u64, columns as i64);
            check("cublasLtMatrixLayoutCreate", layout)
        };
        let left = layout(input_type, if transpose_b { (n, k) } else { (k, n) })?;
        let right = layout(input_type, if transpose_a { (k, m) } else { (m, k) })?;
        let target = layout(output_type, (m, n))?;
        // SAFETY: never read before the search below fills it.
        let algorithm = unsafe { std::mem::zeroed() };
        let mut plan = Plan {
            description,
            left,
            right,
            target,
            algorithm,
        };
        // `cublasOperation_t`: 0 is "as stored", 1 "transposed".
        let operation = |transposed: bool| i32::from(transposed);
        // SAFETY: each attribute gets a value of its own type.
        unsafe {
            plan.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &operation(transpose_b))?;
            plan.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &operation(transpose_a))?;
            if product.bias {
                let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
                plan.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
                plan.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &input_type)?;
            }
        }
        plan.algorithm = plan.search(handle, product)?;
        Ok(plan)
    }

    /// The algorithm that the library's own model expects to be fastest.
    fn search(&self, handle: sys::cublasLtHandle_t, product: Matmul) -> Result<sys::cublasLtMatmulAlgo_t> {
        let preference = check("cublasLtMatmulPreferenceCreate", result::create_matmul_pref())?;
        let limit = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: the attribute is a 64-bit count; all descriptors are alive.
        let found = unsafe {
            let bytes = WORKSPACE_BYTES as u64;
            let set = result::set_matmul_pref_attribute(
                preference,
                limit,
                std::ptr::from_ref(&bytes).cast(),
                size_of::<u64>(),
            );
            check("cublasLtMatmulPreferenceSetAttribute", set)?;
            let found = result::get_matmul_algo_heuristic(
                handle,
                self.description,
                self.left,
                self.right,
                self.target,
                self.target,
                preference,
            );
            // A preference that cannot be freed is not worth failing for.
            let _ = result::destroy_matmul_pref(preference);
            found
        };
        let found = found.map_err(|error| Error::Cuda {
            call: "cublasLtMatmulAlgoGetHeuristic".into(),
            reason: format!(
                "{:?}: no algorithm for {product:?} in {}",
                error.0,
                format_bytes(WORKSPACE_BYTES as u64)
            ),
        })?;
        Ok(found.algo)
    }

    /// # Safety
    /// `value` must be of the attribute's type.
    unsafe fn set<T>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<()> {
        let value = std::ptr::from_ref(value).cast();
        // SAFETY: by the caller's promise; the library copies the value.
        let outcome = unsafe { result::set_matmul_desc_attribute(self.description, attribute, value, size_of::<T>()) };
        check("cublasLtMatmulDescSetAttribute", outcome)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: created in `new` and not destroyed before. There is nothing to do about a failure here.
        unsafe {
            let _ = result::destroy_matmul_desc(self.description);
            for layout in [self.left, self.right, self.target] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}
