// Conversion between f32 and bf16; engine/src/ops/cast.rs holds the contract.
//
// Eight elements per thread. Bound by memory: 6 bytes per element.
#include "common/launch.cuh"
#include "common/types.cuh"

constexpr int THREADS = 256;
constexpr int ELEMENTS_PER_BLOCK = THREADS * 8;

template <typename To, typename From>
__device__ __forceinline__ void convert(const From* x, To* y, size_t elements) {
    const size_t first = static_cast<size_t>(blockIdx.x) * ELEMENTS_PER_BLOCK;
    const size_t index = first + threadIdx.x * 8;
    // A view may start anywhere; whole vectors need an aligned start, and the last one may be cut short.
    const bool aligned = (reinterpret_cast<size_t>(x) | reinterpret_cast<size_t>(y)) % 16 == 0;
    if (aligned && first + ELEMENTS_PER_BLOCK <= elements) {
        float values[8];
        load8(values, x + index);
        store8(y + index, values);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const size_t single = first + i * THREADS + threadIdx.x;
            if (single < elements) y[single] = from_float<To>(to_float(x[single]));
        }
    }
}

extern "C" __global__ __launch_bounds__(THREADS) void cast_f32_to_bf16(const float* x, bf16* y, size_t elements) {
    convert(x, y, elements);
}
L2P_LAUNCH(cast_f32_to_bf16, THREADS, 0, ELEMENTS_PER_BLOCK)

extern "C" __global__ __launch_bounds__(THREADS) void cast_bf16_to_f32(const bf16* x, float* y, size_t elements) {
    convert(x, y, elements);
}
L2P_LAUNCH(cast_bf16_to_f32, THREADS, 0, ELEMENTS_PER_BLOCK)
