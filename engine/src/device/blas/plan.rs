//! One product's descriptors, and the algorithm that it runs with.

use std::ffi::c_void;
use std::mem::MaybeUninit;

use cudarc::cublaslt::{result, sys};

use super::{Matmul, MatmulOperands, WORKSPACE_BYTES, check};
use crate::device::gpu::Gpu;
use crate::device::memory::format_bytes;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// A choice of algorithm, opaque but for its bytes; valid for one version of the library on one kind of GPU.
pub(super) type Algorithm = sys::cublasLtMatmulAlgo_t;

/// Descriptors and the chosen algorithm of one product.
pub(super) struct Plan {
    /// What it computes.
    pub product: Matmul,
    /// How.
    pub algorithm: Algorithm,
    handle: sys::cublasLtHandle_t,
    description: sys::cublasLtMatmulDesc_t,
    left: sys::cublasLtMatrixLayout_t,
    right: sys::cublasLtMatrixLayout_t,
    target: sys::cublasLtMatrixLayout_t,
}

// SAFETY: the descriptors are plain memory owned by this plan.
unsafe impl Send for Plan {}

impl Plan {
    /// A plan with the algorithm that the library's own model expects to be fastest.
    pub fn new(handle: sys::cublasLtHandle_t, product: Matmul) -> Result<Self> {
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
        let description = result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F);
        let description = check("cublasLtMatmulDescCreate", description)?;
        // A row-major [rows, columns] matrix is a column-major one of `columns` rows with that leading dimension.
        let layout = |kind, (rows, columns): (usize, usize)| {
            let layout = result::create_matrix_layout(kind, columns as u64, rows as u64, columns as i64);
            check("cublasLtMatrixLayoutCreate", layout)
        };
        let mut plan = Plan {
            product,
            // Never read before the search below fills it.
            algorithm: Algorithm { data: [0; 8] },
            handle,
            description,
            left: layout(input_type, if transpose_b { (n, k) } else { (k, n) })?,
            right: layout(input_type, if transpose_a { (k, m) } else { (m, k) })?,
            target: layout(output_type, (m, n))?,
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
        plan.algorithm = plan.candidates(1)?[0];
        Ok(plan)
    }

    /// Up to `count` algorithms, in the order of speed that the library expects; at least one.
    pub fn candidates(&self, count: usize) -> Result<Vec<Algorithm>> {
        let preference = check("cublasLtMatmulPreferenceCreate", result::create_matmul_pref())?;
        let limit = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let bytes = WORKSPACE_BYTES as u64;
        let mut found = vec![MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::uninit(); count];
        let mut returned = 0;
        // SAFETY: the attribute is a 64-bit count, all descriptors are alive, and there is room for `count` results.
        let outcome = unsafe {
            let value = std::ptr::from_ref(&bytes).cast();
            let set = result::set_matmul_pref_attribute(preference, limit, value, size_of::<u64>());
            let outcome = set.and_then(|()| {
                sys::cublasLtMatmulAlgoGetHeuristic(
                    self.handle,
                    self.description,
                    self.left,
                    self.right,
                    self.target,
                    self.target,
                    preference,
                    count as i32,
                    found.as_mut_ptr().cast(),
                    &mut returned,
                )
                .result()
            });
            // A preference that cannot be freed is not worth failing for.
            let _ = result::destroy_matmul_pref(preference);
            outcome
        };
        let usable = found[..returned.max(0) as usize].iter().filter_map(|entry| {
            // SAFETY: the library has filled this many results.
            let entry = unsafe { entry.assume_init_ref() };
            (entry.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS).then_some(entry.algo)
        });
        let usable: Vec<Algorithm> = usable.collect();
        match (outcome, usable.is_empty()) {
            (Ok(()), false) => Ok(usable),
            (outcome, _) => Err(Error::Cuda {
                call: "cublasLtMatmulAlgoGetHeuristic".into(),
                reason: format!(
                    "{outcome:?}: no algorithm for {:?} with {} of workspace",
                    self.product,
                    format_bytes(WORKSPACE_BYTES as u64)
                ),
            }),
        }
    }

    /// Whether the library can run exactly this product with an algorithm, in the workspace that there is. What comes from a
    /// file or was chosen for another shape is asked about before it runs.
    pub fn accepts(&self, algorithm: &Algorithm) -> bool {
        let mut found = MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed();
        // SAFETY: all descriptors are alive; the library reads the algorithm, checks it, and writes the result.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.handle,
                self.description,
                self.left,
                self.right,
                self.target,
                self.target,
                algorithm,
                found.as_mut_ptr(),
            )
        };
        // SAFETY: zeros are a value of every field, among them the states' success.
        let found = unsafe { found.assume_init() };
        status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
            && found.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
            && found.workspaceSize <= WORKSPACE_BYTES
    }

    /// Runs the product with the plan's algorithm.
    ///
    /// # Safety
    /// As for [`super::Blas::matmul`]; `workspace` has [`WORKSPACE_BYTES`] bytes.
    pub unsafe fn run(&self, device: &Gpu, operands: MatmulOperands, workspace: u64) -> Result<()> {
        let Matmul { bias, accumulate, .. } = self.product;
        let (alpha, beta) = (1.0f32, if accumulate { 1.0f32 } else { 0.0 });
        // cuBLASLt is column-major: a row-major matrix is its transpose there, so Dᵀ = op(B)ᵀ · op(A)ᵀ is computed.
        // SAFETY: the caller vouches for the operands, the plan for descriptors of the same extents.
        unsafe {
            if bias {
                let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
                self.set(attribute, &operands.bias)?;
            }
            let product = || {
                result::matmul(
                    self.handle,
                    self.description,
                    std::ptr::from_ref(&alpha).cast(),
                    std::ptr::from_ref(&beta).cast(),
                    operands.b as *const c_void,
                    self.left,
                    operands.a as *const c_void,
                    self.right,
                    operands.d as *const c_void,
                    self.target,
                    operands.d as *mut c_void,
                    self.target,
                    &self.algorithm,
                    workspace as *mut c_void,
                    WORKSPACE_BYTES,
                    device.stream().cu_stream().cast(),
                )
            };
            let outcome = device.submit(product)?;
            check(&format!("cublasLtMatmul {:?}", self.product), outcome)
        }
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
