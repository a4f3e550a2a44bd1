//! What the fused linear layers share on Hopper (`linear_hopper.cu`): maps of their operands and the grid.

use std::sync::Arc;

use crate::device::{CudaDevice, Kernel, TensorMap, TensorMapSpec};
use crate::error::Result;
use crate::tensor::Tensor;

/// The kernels' image.
pub(super) const IMAGE: &str = "linear_hopper";

/// Blocks that work together.
const CLUSTER: usize = 2;

/// Rows below which the kernels' tiles would leave most of the GPU idle; the library has smaller ones.
const FEWEST_ROWS: usize = 1024;

/// The device of `x`, if it has these kernels, they suit the numbers of rows and summed elements, and its options do not turn them
/// off.
pub(super) fn device_for(x: &Tensor, rows: usize, depth: usize) -> Option<&Arc<CudaDevice>> {
    let suits = rows >= FEWEST_ROWS && depth.is_multiple_of(8) && i32::try_from(rows).is_ok();
    x.cuda()
        .filter(|device| suits && device.options().fused_linear && device.has_hopper_kernels())
}

/// A matrix `[rows, depth]` by the kernel's boxes.
pub(super) fn matrix_map(kernel: &Kernel, matrix: &Tensor, rows: usize, depth: usize) -> Result<TensorMap> {
    let [.., step, box_rows] = kernel.info().tile;
    TensorMap::new(
        matrix,
        &TensorMapSpec {
            extents: &[depth as u64, rows as u64],
            strides: &[(depth * matrix.dtype().size()) as u64],
            tile: &[step, box_rows],
            swizzle: 128,
        },
    )
}

/// One block per multiprocessor, or per tile where these are fewer, in whole clusters. `columns` are those of the product.
pub(super) fn blocks(device: &CudaDevice, kernel: &Kernel, rows: usize, columns: usize) -> u32 {
    let [tile_rows, tile_columns, ..] = kernel.info().tile.map(|extent| extent.max(1) as usize);
    let pairs = rows.div_ceil(tile_rows) * columns.div_ceil(tile_columns).div_ceil(CLUSTER);
    let clusters = pairs.min(device.multiprocessors() as usize / CLUSTER);
    (clusters * CLUSTER) as u32
}
