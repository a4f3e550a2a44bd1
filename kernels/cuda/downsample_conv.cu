// The neighbourhoods of a 3x3 convolution of stride 2; engine/src/ops/downsample_conv.rs holds the contract.
//
// Bound by memory: nine vectors of 16 bytes written for four read, the reads of neighbours coming from L2.
#include "common/launch.cuh"
#include "common/types.cuh"

constexpr int THREADS = 256;
constexpr int KERNEL = 3;

// x [batch, height, width, vectors * 8] -> y [batch, height / 2, width / 2, 9, vectors * 8]. Grid: (output rows over all
// items, blocks along a row); a thread moves one vector.
extern "C" __global__ __launch_bounds__(THREADS) void gather_3x3_stride_2(
    const uint4* x, uint4* y, int height, int width, int vectors) {
    const int rows = height / 2, columns = width / 2, per_pixel = KERNEL * KERNEL * vectors;
    const int at = blockIdx.y * THREADS + threadIdx.x;
    if (at >= columns * per_pixel) return;
    const int item = blockIdx.x / rows, row = blockIdx.x % rows;
    const int column = at / per_pixel, tap = at % per_pixel / vectors, vector = at % vectors;
    const int source_row = 2 * row + tap / KERNEL, source_column = 2 * column + tap % KERNEL;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (source_row < height && source_column < width) {
        value = x[((static_cast<size_t>(item) * height + source_row) * width + source_column) * vectors + vector];
    }
    y[static_cast<size_t>(blockIdx.x) * columns * per_pixel + at] = value;
}
L2P_LAUNCH(gather_3x3_stride_2, THREADS, 0, 1)
