// Nearest resize of NHWC images; engine/src/ops/resize.rs holds the contract.
//
// A block copies up to THREADS units of one output row; a unit is 16 bytes where a pixel's bytes allow it, else one element.
// Bound by memory: an output row reads its source pixels from L2 or once from memory.
#include "common/launch.cuh"
#include "common/types.cuh"

constexpr int THREADS = 256;

// Grid: (rows of the output over all items, blocks along a row). `units` per pixel; ratios are source over output extents.
template <typename Unit>
__device__ __forceinline__ void resize(
    const Unit* x, Unit* y, int source_height, int source_width, int height, int width, int units, float row_ratio, float column_ratio) {
    const int item = blockIdx.x / height, row = blockIdx.x % height;
    const int at = blockIdx.y * THREADS + threadIdx.x;
    if (at >= width * units) return;
    const int column = at / units, unit = at % units;
    const int source_row = min(static_cast<int>(static_cast<float>(row) * row_ratio), source_height - 1);
    const int source_column = min(static_cast<int>(static_cast<float>(column) * column_ratio), source_width - 1);
    const size_t source = (static_cast<size_t>(item) * source_height + source_row) * source_width + source_column;
    y[static_cast<size_t>(blockIdx.x) * width * units + at] = x[source * units + unit];
}

#define RESIZE_KERNEL(name, Unit)                                                                                  \
    extern "C" __global__ __launch_bounds__(THREADS) void name(                                                    \
        const Unit* x, Unit* y, int source_height, int source_width, int height, int width, int units,             \
        float row_ratio, float column_ratio) {                                                                     \
        resize(x, y, source_height, source_width, height, width, units, row_ratio, column_ratio);                  \
    }                                                                                                              \
    L2P_LAUNCH(name, THREADS, 0, sizeof(Unit))

RESIZE_KERNEL(resize_nearest_vectors, uint4)
RESIZE_KERNEL(resize_nearest_bf16, uint16_t)
RESIZE_KERNEL(resize_nearest_f32, uint32_t)
