// The sum of the squares of an array; engine/src/ops/sum_squares.rs holds the contract.
//
// Blocks sum chunks, eight elements per thread; a last block adds the chunks' sums in f64. Bound by memory: 4 bytes are read per
// element.
#include "common/launch.cuh"
#include "common/reduce.cuh"

constexpr int THREADS = 256;
constexpr int CHUNK = THREADS * 32;  // elements

// partial[chunk], of x [elements].
extern "C" __global__ __launch_bounds__(THREADS) void sum_squares(
    const float* x, float* partial, unsigned long long elements) {
    __shared__ float scratch[THREADS / WARP];
    const unsigned long long first = static_cast<unsigned long long>(blockIdx.x) * CHUNK;
    const bool aligned = reinterpret_cast<size_t>(x) % 16 == 0;
    float squares = 0.0f;
#pragma unroll
    for (int step = 0; step < CHUNK / (THREADS * 8); ++step) {
        const unsigned long long index = first + (step * THREADS + threadIdx.x) * 8;
        if (aligned && index + 8 <= elements) {
            float values[8];
            load8(values, x + index);
#pragma unroll
            for (int i = 0; i < 8; ++i) squares += values[i] * values[i];
        } else {
            const unsigned long long end = min(index + 8, elements);
            for (unsigned long long single = index; single < end; ++single) squares += x[single] * x[single];
        }
    }
    squares = block_sum<THREADS>(squares, scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = squares;
}
L2P_LAUNCH(sum_squares, THREADS, 0, CHUNK)

constexpr int FINISH_THREADS = 1024;

// sum[0] of partial [chunks], in an order that their number alone decides. One block.
extern "C" __global__ __launch_bounds__(FINISH_THREADS) void sum_squares_finish(
    const float* partial, float* sum, int chunks) {
    __shared__ double scratch[FINISH_THREADS];
    const double total = block_sum_f64<FINISH_THREADS>(partial, chunks, scratch);
    if (threadIdx.x == 0) sum[0] = static_cast<float>(total);
}
L2P_LAUNCH(sum_squares_finish, FINISH_THREADS, 0, FINISH_THREADS)
