// How many values of a tensor are not finite; engine/src/ops/finite.rs holds the contract.
//
// Eight values per thread. Bound by memory: each value is read once.
#include "common/launch.cuh"
#include "common/reduce.cuh"

constexpr int THREADS = 256;
constexpr int ELEMENTS_PER_BLOCK = THREADS * 8;

// count, one number, zero before.
template <typename T>
__device__ __forceinline__ void count_not_finite(const T* x, int* count, size_t elements) {
    const size_t first = static_cast<size_t>(blockIdx.x) * ELEMENTS_PER_BLOCK;
    int bad = 0;
    // A view may start anywhere; whole vectors need an aligned start, and the last one may be cut short.
    if (reinterpret_cast<size_t>(x) % 16 == 0 && first + ELEMENTS_PER_BLOCK <= elements) {
        float values[8];
        load8(values, x + first + threadIdx.x * 8);
#pragma unroll
        for (int i = 0; i < 8; ++i) bad += !isfinite(values[i]);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const size_t single = first + i * THREADS + threadIdx.x;
            if (single < elements) bad += !isfinite(to_float(x[single]));
        }
    }
    add_count(count, bad);
}

extern "C" __global__ __launch_bounds__(THREADS) void count_not_finite_f32(const float* x, int* count, size_t elements) {
    count_not_finite(x, count, elements);
}
L2P_LAUNCH(count_not_finite_f32, THREADS, 0, ELEMENTS_PER_BLOCK)

extern "C" __global__ __launch_bounds__(THREADS) void count_not_finite_bf16(const bf16* x, int* count, size_t elements) {
    count_not_finite(x, count, elements);
}
L2P_LAUNCH(count_not_finite_bf16, THREADS, 0, ELEMENTS_PER_BLOCK)
