// Bytes to images of floats; engine/src/ops/from_rgb8.rs holds the contract.
//
// Four values per thread, those of a warp side by side. Bound by memory: 1 byte read and 4 written per value.
#include "common/launch.cuh"
#include "common/types.cuh"

constexpr int THREADS = 256;
constexpr int VALUES = 4;

extern "C" __global__ __launch_bounds__(THREADS) void from_rgb8(const unsigned char* x, float* y, size_t values) {
    const size_t first = static_cast<size_t>(blockIdx.x) * THREADS * VALUES + threadIdx.x;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
        const size_t at = first + i * THREADS;
        if (at < values) y[at] = __fsub_rn(__fdiv_rn(static_cast<float>(x[at]), 127.5f), 1.0f);
    }
}
L2P_LAUNCH(from_rgb8, THREADS, 0, THREADS * VALUES)
