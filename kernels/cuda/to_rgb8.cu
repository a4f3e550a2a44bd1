// Images of floats to bytes, and how many of each image's values are not finite; engine/src/ops/to_rgb8.rs holds the contract.
//
// Four values per thread, those of a warp side by side. Bound by memory: 4 bytes read and 1 written per value. Counting costs a vote
// per warp: only where something is not finite is anything added in memory.
#include "common/launch.cuh"
#include "common/reduce.cuh"

constexpr int THREADS = 256;
constexpr int VALUES = 4;

// Ties go to the even byte; NaN becomes 0.
__device__ __forceinline__ unsigned char to_byte(float value) {
    const float unit = fminf(fmaxf(value * 0.5f + 0.5f, 0.0f), 1.0f);
    return static_cast<unsigned char>(__float2int_rn(unit * 255.0f));
}

// x, y [items, values]; not_finite [items], zeros before. Grid (blocks, items).
extern "C" __global__ __launch_bounds__(THREADS) void to_rgb8(
    const float* x, unsigned char* y, int* not_finite, size_t values) {
    x += blockIdx.y * values, y += blockIdx.y * values;
    const size_t first = static_cast<size_t>(blockIdx.x) * THREADS * VALUES + threadIdx.x;
    float value[VALUES];  // all on their way before the first is used
#pragma unroll
    for (int i = 0; i < VALUES; ++i) value[i] = first + i * THREADS < values ? x[first + i * THREADS] : 0.0f;
    int bad = 0;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
        bad += !isfinite(value[i]);
        if (first + i * THREADS < values) y[first + i * THREADS] = to_byte(value[i]);
    }
    add_count(not_finite + blockIdx.y, bad);
}
L2P_LAUNCH(to_rgb8, THREADS, 0, THREADS * VALUES)
