// What the attention kernels share: which keys a row sees, softmax over scores that arrive block by block (an online
// softmax), the way of a finished tile to memory. Everything works on accumulator fragments (common/mma.cuh).
#pragma once
#include "common/mma.cuh"

// The keys of a batch item.
__device__ __forceinline__ int key_length(const int* lengths, int item, int tokens) {
    return lengths == nullptr ? tokens : min(max(lengths[L2P_FAULT_IF(6, 0, item)], 0), tokens);
}

// Starts copying rows `first` to first + COUNT - 1, COUNT a multiple of the rows that the block's THREADS move at once, into
// a swizzled tile; rows at or past `limit` become zeros.
template <int COUNT, int UNITS, int THREADS, int UNROLL>
__device__ __forceinline__ void copy_rows(uint32_t tile, const bf16* from, int stride, int first, int limit) {
    static_assert(COUNT * UNITS % THREADS == 0);
#pragma unroll(UNROLL)
    for (int i = 0; i < COUNT * UNITS / THREADS; ++i) {
        const int index = threadIdx.x + i * THREADS;
        const int row = index / UNITS, unit = index % UNITS;
        const bool valid = first + row < limit;
        const bf16* source = from + static_cast<size_t>(valid ? first + row : 0) * stride + unit * UNIT;
        cp_async16(tile + 16 * swizzled<UNITS>(row, unit), source, valid);
    }
}

// A thread sees two rows of a 16-row fragment: its `group` and group + 8. The weights of a block are
// 2^(scale (score - reference)): `reference` is a maximum of the row's scores so far, but need not be the latest one, since
// any reference cancels in the end. It is raised only when a new score is more than SLACK above it (in powers of two): that
// spares most blocks the rescaling of the result and still keeps every weight far from overflow.
constexpr float SLACK = 8.0f;
constexpr float LN_2 = 0.69314718055994531f;

struct RowSoftmax {
    float reference[2] = {-INFINITY, -INFINITY};  // the unscaled score that gets weight 1
    float sum[2] = {0.0f, 0.0f};                  // of the weights of the columns that this thread sees
};

// Removes the keys that the rows at `row` and row + 8 must not see. `column` is the first key that this thread has.
template <int TILES>
__device__ __forceinline__ void mask_keys(float (&scores)[TILES][4], int row, int column, int keys, bool causal) {
    const int seen = row + L2P_FAULT_IF(2, 2, 1);  // under the causal mask: up to the row's own key
    const int limit[2] = {causal ? min(keys, seen) : keys, causal ? min(keys, seen + 8) : keys};
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (column + tile * 8 + i % 2 >= limit[i / 2]) scores[tile][i] = -INFINITY;
}

// The largest score of each row over the columns of all four members of the group.
template <int TILES>
__device__ __forceinline__ void row_tops(float (&top)[2], const float (&scores)[TILES][4]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        top[row] = fmaxf(scores[0][2 * row], scores[0][2 * row + 1]);
#pragma unroll
        for (int tile = 1; tile < TILES; ++tile) {
            top[row] = fmaxf(top[row], fmaxf(scores[tile][2 * row], scores[tile][2 * row + 1]));
        }
        top[row] = fmaxf(top[row], __shfl_xor_sync(FULL_WARP, top[row], 1));
        top[row] = fmaxf(top[row], __shfl_xor_sync(FULL_WARP, top[row], 2));
    }
}

// Whether some row of the warp needs a higher reference for a block with these largest scores. `scale` is that of the
// scores in powers of two.
__device__ __forceinline__ bool needs_raise(const RowSoftmax& softmax, const float (&top)[2], float scale) {
    const bool low = (top[0] - softmax.reference[0]) * scale > SLACK;
    const bool high = (top[1] - softmax.reference[1]) * scale > SLACK;
    return __any_sync(FULL_WARP, low || high);
}

// Raises the references to the largest scores; what was summed before must be multiplied by `factor`. Every row must have
// seen a key by now: the first block holds key 0, which each row of an item that has keys sees.
__device__ __forceinline__ void raise(RowSoftmax& softmax, const float (&top)[2], float scale, float (&factor)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const float reference = fmaxf(softmax.reference[row], top[row]);
        factor[row] = exp2_approximate((softmax.reference[row] - reference) * scale);
        softmax.reference[row] = reference;
        softmax.sum[row] *= factor[row];
    }
}

// Turns scores into weights and adds them to the sums.
template <int TILES>
__device__ __forceinline__ void weigh(RowSoftmax& softmax, float (&scores)[TILES][4], float scale) {
    const float shift[2] = {softmax.reference[0] * scale, softmax.reference[1] * scale};
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            scores[tile][i] = exp2_approximate(fmaf(scores[tile][i], scale, -shift[i / 2]));
            softmax.sum[i / 2] += scores[tile][i];
        }
}

template <int TILES>
__device__ __forceinline__ void scale_rows(float (&tiles)[TILES][4], const float (&factor)[2]) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) tiles[tile][i] *= factor[i / 2];
}

// The sum over the four members of a group.
__device__ __forceinline__ float group_sum(float value) {
    value += __shfl_xor_sync(FULL_WARP, value, 1);
    return value + __shfl_xor_sync(FULL_WARP, value, 2);
}

// The factor that turns a row's weighted sum into its mean; zero for a row without keys.
__device__ __forceinline__ float inverse_or_zero(float sum) { return sum > 0.0f ? 1.0f / sum : 0.0f; }

// The natural logarithm of the sum of exponentials of a row's scaled scores; -infinity for a row without keys.
__device__ __forceinline__ float log_sum_exp(float reference, float sum, float scale) {
    return sum > 0.0f ? (reference * scale + log2f(sum)) * LN_2 : -INFINITY;
}

// Writes the accumulators of rows `row` to row + 15 as bf16 into a swizzled tile, from unit `unit` on.
template <int UNITS, int TILES>
__device__ __forceinline__ void place_rows(unsigned char* tile, int row, int unit, const float (&values)[TILES][4]) {
    const int group = threadIdx.x % WARP / 4, member = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int position = swizzled<UNITS>(row + group + 8 * half, unit + i);
            *reinterpret_cast<uint32_t*>(tile + 16 * position + 4 * member) =
                pack_pair(values[i][2 * half], values[i][2 * half + 1]);
        }
}

// Copies rows `row` to row + ROWS - 1 of a swizzled tile to memory by one warp. `to` is where the first of them goes,
// `valid` how many of them exist there.
template <int UNITS, int ROWS>
__device__ __forceinline__ void store_rows(bf16* to, size_t stride, int valid, const unsigned char* tile, int row) {
    static_assert(ROWS * UNITS % WARP == 0);
#pragma unroll 4
    for (int i = threadIdx.x % WARP; i < ROWS * UNITS; i += WARP) {
        const int line = i / UNITS, unit = i % UNITS;
        if (line >= valid) break;
        *reinterpret_cast<uint4*>(to + line * stride + unit * UNIT) =
            *reinterpret_cast<const uint4*>(tile + 16 * swizzled<UNITS>(row + line, unit));
    }
}
