// Images of floats to bytes; engine/src/ops/to_rgb8.rs holds the contract.
//
// Four values per thread, those of a warp side by side. Bound by memory: 4 bytes read and 1 written per value.
#include "common/launch.cuh"
#include "common/types.cuh"

constexpr int THREADS = 256;
constexpr int VALUES = 4;

// Ties go to the even byte; NaN becomes 0.
__device__ __forceinline__ unsigned char to_byte(float value) {
    const float unit = fminf(fmaxf(value * 0.5f + 0.5f, 0.0f), 1.0f);
    return static_cast<unsigned char>(__float2int_rn(unit * 255.0f));
}

extern "C" __global__ __launch_bounds__(THREADS) void to_rgb8(const float* x, unsigned char* y, size_t values) {
    const size_t first = static_cast<size_t>(blockIdx.x) * THREADS * VALUES + threadIdx.x;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
        const size_t at = first + i * THREADS;
        if (at < values) y[at] = to_byte(x[at]);
    }
}
L2P_LAUNCH(to_rgb8, THREADS, 0, THREADS * VALUES)
