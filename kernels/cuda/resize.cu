// Nearest resize of NHWC images; engine/src/ops/resize.rs holds the contract.
//
// A block copies up to THREADS units of one output row; a unit is 16 bytes where a pixel's bytes allow it, else one element.
// Bound by memory: an output row reads its source pixels from L2 or once from memory.
#include "common/launch.cuh"
#include "common/types.cuh"

constexpr int THREADS = 256;

// PyTorch's choice of the source index.
__device__ __forceinline__ int source_index(int index, float ratio, int source) {
    return min(static_cast<int>(static_cast<float>(index) * ratio), source - 1);
}

// Grid: (rows of the output over all items, blocks along a row). `units` per pixel; ratios are source over output extents.
template <typename Unit>
__device__ __forceinline__ void resize(
    const Unit* x, Unit* y, int source_height, int source_width, int height, int width, int units, float row_ratio, float column_ratio) {
    const int item = blockIdx.x / height, row = blockIdx.x % height;
    const int at = blockIdx.y * THREADS + threadIdx.x;
    if (at >= width * units) return;
    const int column = at / units, unit = at % units;
    const int source_row = source_index(row, row_ratio, source_height), source_column = source_index(column, column_ratio, source_width);
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

// ---- backward ----

// The first index of an output of `extent` pixels that shows source index `source_at` or a later one; `extent` if none does.
__device__ __forceinline__ int first_shown(int source_at, float ratio, int source, int extent) {
    int index = min(static_cast<int>(static_cast<float>(source_at) / ratio), extent);
    while (index > 0 && source_index(index - 1, ratio, source) >= source_at) --index;
    while (index < extent && source_index(index, ratio, source) < source_at) ++index;
    return index;
}

// Each source pixel gets the sum over the pixels of dy that show it, in the order of rows and columns. Grid: (rows of the source
// over all items, blocks along a row); a thread takes VECTOR channels. Bound by memory: dy is read once.
template <int VECTOR>
__device__ __forceinline__ void resize_backward(
    const bf16* dy, bf16* dx, int source_height, int source_width, int height, int width, int channels, float row_ratio,
    float column_ratio) {
    const int item = blockIdx.x / source_height, row = blockIdx.x % source_height, vectors = channels / VECTOR;
    const int at = blockIdx.y * THREADS + threadIdx.x;
    if (at >= source_width * vectors) return;
    const int column = at / vectors, channel = at % vectors * VECTOR;
    const int bottom = first_shown(row + 1, row_ratio, source_height, height);
    const int left = first_shown(column, column_ratio, source_width, width);
    const int right = first_shown(column + 1, column_ratio, source_width, width);
    float sums[VECTOR] = {};
    for (int y = first_shown(row, row_ratio, source_height, height); y < bottom; ++y)
        for (int x = left; x < right; ++x) {
            const bf16* const from = dy + ((static_cast<size_t>(item) * height + y) * width + x) * channels + channel;
            if constexpr (VECTOR == 8) {
                float values[8];
                load8(values, from);
#pragma unroll
                for (int i = 0; i < 8; ++i) sums[i] += values[i];
            } else {
                sums[0] += to_float(*from);
            }
        }
    bf16* const to = dx + (static_cast<size_t>(blockIdx.x) * source_width + column) * channels + channel;
    if constexpr (VECTOR == 8) store8(to, sums);
    else *to = from_float<bf16>(sums[0]);
}

#define RESIZE_BACKWARD_KERNEL(name, VECTOR)                                                                       \
    extern "C" __global__ __launch_bounds__(THREADS) void name(                                                    \
        const bf16* dy, bf16* dx, int source_height, int source_width, int height, int width, int channels,        \
        float row_ratio, float column_ratio) {                                                                     \
        resize_backward<VECTOR>(                                                                                   \
            dy, dx, source_height, source_width, height, width, channels, row_ratio, column_ratio);                \
    }                                                                                                              \
    L2P_LAUNCH(name, THREADS, 0, VECTOR)

RESIZE_BACKWARD_KERNEL(resize_nearest_backward, 8)
RESIZE_BACKWARD_KERNEL(resize_nearest_backward_single, 1)
