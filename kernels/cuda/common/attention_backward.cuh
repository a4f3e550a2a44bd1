// What the kernels of attention's gradient share: what each query row brings along, and weights from scores.
#pragma once
#include "common/attention.cuh"

// Each row of queries brings two numbers: `shift`, what its scores in powers of two are lowered by before they become
// weights, and `delta`, the product of its result and that result's gradient. They stand in tiles of STAT_ROWS rows, first
// all shifts of a tile, then all deltas: [items, heads, tiles, 2, STAT_ROWS]. Rows past the last query have shift +infinity,
// which makes all their weights zero, and delta 0.
constexpr int STAT_ROWS = 64;

__device__ __forceinline__ size_t stat_index(int item, int head, int heads, int tiles, int tile) {
    return ((static_cast<size_t>(item) * heads + head) * tiles + tile) * 2 * STAT_ROWS;
}

__host__ __device__ constexpr int stat_tiles(int tokens) { return (tokens + STAT_ROWS - 1) / STAT_ROWS; }

// The weight of a key, from its unscaled score. `scale` is that of the scores in powers of two.
__device__ __forceinline__ float weight_of(float score, float scale, float shift) {
    return exp2_approximate(fmaf(score, scale, -shift));
}
