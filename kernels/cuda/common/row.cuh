// A row of a matrix in the registers of one block, for normalisations.
#pragma once
#include "common/reduce.cuh"

constexpr int ROW_VECTORS = 4;  // per thread; rows of up to 1024 * ROW_VECTORS * 8 elements
constexpr int MAX_WARPS = 32;

// As block_sum, for a block size known only at launch.
__device__ __forceinline__ float row_sum(float value, float* scratch) {
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();  // the warps' sums are written before they are read
    float total = 0.0f;
    for (int warp = 0; warp < blockDim.x / WARP; ++warp) total += scratch[warp];
    __syncthreads();  // and read before the next row_sum overwrites them
    return total;
}

// Vector i of a thread is vector threadIdx.x + i * blockDim.x of the row.
struct Row {
    float value[ROW_VECTORS][8];
};

// Reads a row of `vectors` vectors of eight elements; what lies past its end is zero.
__device__ __forceinline__ void load_row(Row& row, const bf16* from, int vectors) {
#pragma unroll
    for (int i = 0; i < ROW_VECTORS; ++i) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector < vectors) {
            load8(row.value[i], from + vector * 8);
        } else {
#pragma unroll
            for (int j = 0; j < 8; ++j) row.value[i][j] = 0.0f;
        }
    }
}
