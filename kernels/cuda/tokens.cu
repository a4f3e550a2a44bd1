// Copying spans of tokens and filling in pad tokens; engine/src/ops/tokens.rs holds the contract.
//
// Bound by memory: every vector of 16 bytes is read once and written once.
#include "common/launch.cuh"
#include "common/types.cuh"

constexpr int THREADS = 256;
constexpr int VECTORS_PER_THREAD = 4;
constexpr int VECTORS_PER_BLOCK = THREADS * VECTORS_PER_THREAD;

// Copies `vectors` consecutive vectors per batch item; the items lie `source_stride` and `target_stride` vectors apart. A
// null source stands for zeros. Grid of items * blocks_per_item blocks.
extern "C" __global__ __launch_bounds__(THREADS) void copy_span(
    const uint4* source, uint4* target, long long vectors, long long source_stride, long long target_stride,
    int blocks_per_item) {
    const long long item = blockIdx.x / blocks_per_item;
    const long long first = static_cast<long long>(blockIdx.x % blocks_per_item) * VECTORS_PER_BLOCK + threadIdx.x;
    target += item * target_stride;
    if (source != nullptr) source += item * source_stride;
    uint4 values[VECTORS_PER_THREAD];
#pragma unroll
    for (int i = 0; i < VECTORS_PER_THREAD; ++i) {
        const long long vector = first + i * THREADS;
        values[i] = source != nullptr && vector < vectors ? source[vector] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < VECTORS_PER_THREAD; ++i) {
        const long long vector = first + i * THREADS;
        if (vector < vectors) target[vector] = values[i];
    }
}
L2P_LAUNCH(copy_span, THREADS, 0, VECTORS_PER_BLOCK)

constexpr int ROWS_PER_BLOCK = THREADS / WARP;

// x [rows, 8 * vectors], rows = items * tokens: every row whose index within its item is at least lengths[item] becomes
// `pad`. One warp per row.
extern "C" __global__ __launch_bounds__(THREADS) void fill_pad_tokens(
    uint4* x, const int* lengths, const uint4* pad, int tokens, int rows, int vectors) {
    const unsigned row = blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / WARP;
    if (row >= rows || static_cast<int>(row % tokens) < lengths[row / tokens]) return;
    uint4* target = x + static_cast<size_t>(row) * vectors;
    for (int vector = threadIdx.x % WARP; vector < vectors; vector += WARP) target[vector] = pad[vector];
}
L2P_LAUNCH(fill_pad_tokens, THREADS, 0, ROWS_PER_BLOCK)
