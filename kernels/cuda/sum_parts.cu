// The sum of one array per rank, in the order of ranks; engine/src/ops/sum_parts.rs holds the contract.
//
// Eight elements per thread. Bound by memory: every part is read once, 4 bytes are written per element.
#include "common/fault.cuh"
#include "common/launch.cuh"
#include "common/types.cuh"

constexpr int THREADS = 256;
constexpr int ELEMENTS_PER_BLOCK = THREADS * 8;

// parts [ranks, elements]; the sums go to target from `start` on.
template <typename T>
__device__ __forceinline__ void sum(
    const T* parts, float* target, unsigned long long start, int ranks, unsigned long long elements, float factor) {
    target += start;
    const unsigned long long first = static_cast<unsigned long long>(blockIdx.x) * ELEMENTS_PER_BLOCK;
    // Whole vectors need every part to begin aligned, and the last one may be cut short.
    const bool aligned =
        (reinterpret_cast<size_t>(parts) | reinterpret_cast<size_t>(target) | (elements * sizeof(T))) % 16 == 0;
    if (aligned && first + ELEMENTS_PER_BLOCK <= elements) {
        const T* mine = parts + first + threadIdx.x * 8;
        float total[8];
        load8(total, mine);
#pragma unroll 4
        for (int rank = 1; rank < ranks; ++rank) {
            float values[8];
            load8(values, mine + L2P_FAULT_IF(28, ranks - rank, rank) * elements);
#pragma unroll
            for (int i = 0; i < 8; ++i) total[i] += values[i];
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) total[i] *= factor;
        store8(target + first + threadIdx.x * 8, total);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const unsigned long long single = first + i * THREADS + threadIdx.x;
            if (single >= elements) continue;
            float total = to_float(parts[single]);
            for (int rank = 1; rank < ranks; ++rank) total += to_float(parts[rank * elements + single]);
            target[single] = total * factor;
        }
    }
}

extern "C" __global__ __launch_bounds__(THREADS) void sum_parts_f32(
    const float* parts, float* target, unsigned long long start, int ranks, unsigned long long elements, float factor) {
    sum(parts, target, start, ranks, elements, factor);
}
L2P_LAUNCH(sum_parts_f32, THREADS, 0, ELEMENTS_PER_BLOCK)

extern "C" __global__ __launch_bounds__(THREADS) void sum_parts_bf16(
    const bf16* parts, float* target, unsigned long long start, int ranks, unsigned long long elements, float factor) {
    sum(parts, target, start, ranks, elements, factor);
}
L2P_LAUNCH(sum_parts_bf16, THREADS, 0, ELEMENTS_PER_BLOCK)
