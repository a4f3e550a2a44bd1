// Residual sums whose branch is multiplied by a vector per item, and sums over an item's rows; engine/src/ops/gated_add.rs holds the
// contract.
//
// Bound by memory: 4 bytes read and 2 written per element of a sum; 2 or 4 read per element of sums over rows.
#include "common/launch.cuh"
#include "common/row.cuh"

constexpr int THREADS = 256;

// x, y, sum: `vectors` vectors of eight elements, `row` of them per row of `tokens` rows per item; gate: rows of `stride` elements, one
// per item. sum = x + gate * y, or gate * y where x is null. One thread per vector.
extern "C" __global__ __launch_bounds__(THREADS) void gated_add(
    const bf16* x, const bf16* y, const float* gate, bf16* sum, long long vectors, int row, int tokens, int stride) {
    const size_t vector = static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (vector >= vectors) return;
    const size_t item = vector / row / tokens;
    float value[8], factor[8], base[8] = {};
    load8(value, y + vector * 8);
    load8(factor, gate + item * stride + vector % row * 8);
    if (x != nullptr) load8(base, x + vector * 8);
#pragma unroll
    for (int j = 0; j < 8; ++j) value[j] = fmaf(factor[j], value[j], base[j]);
    store8(sum + vector * 8, value);
}
L2P_LAUNCH(gated_add, THREADS, 0, THREADS)

constexpr int SUM_THREADS = 256;  // at most

// partial [items, blocks, dim] gets each block's sums over rows of a * b, or of a where b is null; a, b [items, tokens, dim]. Grid
// (blocks, items), blocks <= tokens; a block takes every gridDim.x-th row of its item.
extern "C" __global__ __launch_bounds__(SUM_THREADS) void item_sums(
    const bf16* a, const bf16* b, float* partial, int dim, int tokens) {
    const size_t item = blockIdx.y;
    const int vectors = dim / 8;
    Row total = {};
    for (int token = blockIdx.x; token < tokens; token += gridDim.x) {
        const size_t start = (item * tokens + token) * dim;
        Row row;
        load_row(row, a + start, vectors);
#pragma unroll
        for (int i = 0; i < ROW_VECTORS; ++i) {
            const int vector = threadIdx.x + i * blockDim.x;
            if (vector >= vectors) continue;
            float factor[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) factor[j] = 1.0f;
            if (b != nullptr) load8(factor, b + start + vector * 8);
#pragma unroll
            for (int j = 0; j < 8; ++j) total.value[i][j] += row.value[i][j] * factor[j];
        }
    }
#pragma unroll
    for (int i = 0; i < ROW_VECTORS; ++i) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector < vectors) store8(partial + (item * gridDim.x + blockIdx.x) * dim + vector * 8, total.value[i]);
    }
}
L2P_LAUNCH(item_sums, SUM_THREADS, 0, ROW_VECTORS * 8)
