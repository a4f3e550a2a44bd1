// Sums over a warp and over a block.
#pragma once
#include "common/types.cuh"

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(FULL_WARP, value, offset);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, offset));
    return value;
}

// Adds what the threads of a warp, all of which take part, have counted to a number in memory; whole numbers, so that the order does
// not matter. Where nothing was counted memory is left alone.
__device__ __forceinline__ void add_count(int* total, int counted) {
    const int sum = __reduce_add_sync(FULL_WARP, counted);
    if (sum > 0 && threadIdx.x % WARP == 0) atomicAdd(total, sum);
}

// The sum over all threads of the block, returned to each of them. `scratch` holds one float per warp. Two barriers: the
// first orders the warps' sums before they are read, the second lets `scratch` be used again.
template <int THREADS>
__device__ __forceinline__ float block_sum(float value, float* scratch) {
    static_assert(THREADS % WARP == 0 && THREADS <= 1024);
    constexpr int WARPS = THREADS / WARP;
    value = warp_sum(value);
    if constexpr (WARPS == 1) return value;
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    if (L2P_FAULT_IF(3, false, true)) __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += scratch[warp];
    __syncthreads();
    return total;
}

// The sum of `values` [count] in f64, in an order that their number alone decides; right in thread 0. `scratch` holds one double per
// thread.
template <int THREADS>
__device__ __forceinline__ double block_sum_f64(const float* values, int count, double* scratch) {
    static_assert((THREADS & (THREADS - 1)) == 0);
    double sums[4] = {};
    for (int first = threadIdx.x; first < count; first += 4 * THREADS) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int index = first + i * THREADS;
            if (index < count) sums[i] += values[index];
        }
    }
    scratch[threadIdx.x] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();  // the sums so far are written before they are read
        if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    }
    return scratch[0];
}
