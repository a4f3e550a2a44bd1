//! Descriptors for Hopper's bulk tensor copies (TMA).

use std::ffi::c_void;

use cudarc::driver::sys;

use super::driver::check;
use crate::dtype::DType;
use crate::error::Result;

/// A descriptor for Hopper's bulk tensor copies.
pub struct TensorMap(sys::CUtensorMap);

impl TensorMap {
    /// A descriptor of nothing.
    #[cfg(test)]
    pub(super) fn empty() -> Self {
        // SAFETY: a plain C structure of numbers.
        TensorMap(unsafe { std::mem::zeroed() })
    }

    /// The descriptor itself, for a kernel's parameter.
    pub(super) fn as_argument(&mut self) -> *mut c_void {
        std::ptr::from_mut(&mut self.0).cast()
    }
}

/// What a [`TensorMap`] describes; dimensions are listed innermost first, as the hardware wants them.
pub struct TensorMapSpec<'a> {
    /// Extents in elements, innermost first.
    pub extents: &'a [u64],
    /// Strides in bytes of all dimensions but the innermost; multiples of 16.
    pub strides: &'a [u64],
    /// The box that one copy moves, in elements.
    pub tile: &'a [u32],
    /// Bytes of the swizzle pattern in shared memory: 0 (none), 32, 64 or 128; at least the tile's innermost bytes.
    pub swizzle: u32,
}

impl TensorMap {
    /// Describes the memory at `address`, which holds elements of this type.
    ///
    /// # Errors
    /// When the driver refuses the description.
    pub(crate) fn of_memory(address: u64, dtype: DType, spec: &TensorMapSpec<'_>) -> Result<Self> {
        let element = match dtype {
            DType::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            DType::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            DType::I32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_INT32,
            DType::U8 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        };
        let swizzle = match spec.swizzle {
            128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            32 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            _ => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
        };
        let steps = vec![1u32; spec.extents.len()];
        // SAFETY: a plain C structure that the call below fills.
        let mut map: sys::CUtensorMap = unsafe { std::mem::zeroed() };
        // SAFETY: the slices have as many entries as the rank says; the driver checks the values.
        let outcome = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                element,
                spec.extents.len() as u32,
                address as *mut c_void,
                spec.extents.as_ptr(),
                spec.strides.as_ptr(),
                spec.tile.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check("cuTensorMapEncodeTiled", outcome.result())?;
        Ok(TensorMap(map))
    }
}
