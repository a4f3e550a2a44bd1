// Normalisation and rotation of query and key heads, and the gradient; engine/src/ops/qk_norm_rope.rs holds the contract.
//
// Forward: one block per token. Sixteen lanes share a head row, eight elements (four pairs) each; a lane handles the same pairs of
// every head, so it reads its cosines, sines and weights once. Bound by memory: q and k are read and written once.
#include "common/launch.cuh"
#include "common/types.cuh"

constexpr int HEAD_DIM = 128;
constexpr int LANES = HEAD_DIM / 8;  // per head row
constexpr int THREADS = 256;
constexpr int GROUPS = THREADS / LANES;  // head rows that the block handles side by side
constexpr int ROWS_IN_FLIGHT = 2;        // rows that a group reads before it computes

// Four pairs of one head row as they lie in memory. Interleaved: a0 b0, a1 b1, a2 b2, a3 b3. Half split: a0 a1, a2 a3 from
// the first half of the row, b0 b1, b2 b3 from the second.
using PackedPairs = Bf16x8;

using Bf16x4 = Bf16Run<4>;

struct Pairs {
    float a[4], b[4];
};

template <bool HALF_SPLIT>
__device__ __forceinline__ PackedPairs load_pairs(const bf16* row, int lane) {
    PackedPairs packed;
    if constexpr (HALF_SPLIT) {
        const Bf16x4 first = *reinterpret_cast<const Bf16x4*>(row + 4 * lane);
        const Bf16x4 second = *reinterpret_cast<const Bf16x4*>(row + HEAD_DIM / 2 + 4 * lane);
        packed.pair[0] = first.pair[0], packed.pair[1] = first.pair[1];
        packed.pair[2] = second.pair[0], packed.pair[3] = second.pair[1];
    } else {
        packed = *reinterpret_cast<const PackedPairs*>(row + 8 * lane);
    }
    return packed;
}

template <bool HALF_SPLIT>
__device__ __forceinline__ Pairs unpack(const PackedPairs& packed) {
    Pairs pairs;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (HALF_SPLIT) {
            const float2 a = __bfloat1622float2(packed.pair[i / 2]), b = __bfloat1622float2(packed.pair[2 + i / 2]);
            pairs.a[i] = i % 2 == 0 ? a.x : a.y;
            pairs.b[i] = i % 2 == 0 ? b.x : b.y;
        } else {
            const float2 pair = __bfloat1622float2(packed.pair[i]);
            pairs.a[i] = pair.x;
            pairs.b[i] = pair.y;
        }
    }
    return pairs;
}

template <bool HALF_SPLIT>
__device__ __forceinline__ void store_pairs(bf16* row, int lane, const Pairs& pairs) {
    if constexpr (HALF_SPLIT) {
        Bf16x4 first, second;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            first.pair[i] = __floats2bfloat162_rn(pairs.a[2 * i], pairs.a[2 * i + 1]);
            second.pair[i] = __floats2bfloat162_rn(pairs.b[2 * i], pairs.b[2 * i + 1]);
        }
        *reinterpret_cast<Bf16x4*>(row + 4 * lane) = first;
        *reinterpret_cast<Bf16x4*>(row + HEAD_DIM / 2 + 4 * lane) = second;
    } else {
        PackedPairs packed;
#pragma unroll
        for (int i = 0; i < 4; ++i) packed.pair[i] = __floats2bfloat162_rn(pairs.a[i], pairs.b[i]);
        *reinterpret_cast<PackedPairs*>(row + 8 * lane) = packed;
    }
}

// One or the other, word by word: a choice between two places would put both into local memory.
__device__ __forceinline__ PackedPairs choose(bool first, const PackedPairs& a, const PackedPairs& b) {
    PackedPairs chosen;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const unsigned words[2] = {*reinterpret_cast<const unsigned*>(&a.pair[i]), *reinterpret_cast<const unsigned*>(&b.pair[i])};
        const unsigned word = first ? words[0] : words[1];
        chosen.pair[i] = *reinterpret_cast<const __nv_bfloat162*>(&word);
    }
    return chosen;
}

// The sum over the lanes of a head row; the whole warp must take part.
__device__ __forceinline__ float row_lanes_sum(float value) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(FULL_WARP, value, offset);
    return value;
}

template <bool HALF_SPLIT>
__device__ __forceinline__ void normalise_and_rotate(
    const bf16* qkv, bf16* result, const bf16* q_weight, const bf16* k_weight, const float* table, int heads, int kv_heads,
    int table_rows, float epsilon) {
    const int lane = threadIdx.x % LANES;
    const int group = threadIdx.x / LANES;
    const int rows = heads + kv_heads;
    const size_t start = static_cast<size_t>(blockIdx.x) * (heads + 2 * kv_heads) * HEAD_DIM;
    const bf16* token = qkv + start;
    bf16* target = result + start;
    const PackedPairs q_factors = load_pairs<HALF_SPLIT>(q_weight, lane);
    const PackedPairs k_factors = load_pairs<HALF_SPLIT>(k_weight, lane);
    float angles[8];  // cosine and sine of this lane's four pairs
    load8(angles, table + static_cast<size_t>(blockIdx.x % table_rows) * HEAD_DIM + 8 * lane);

    // Every thread runs every step, so that the shuffles see whole warps; rows past the end are zeros and are not stored.
    for (int first = group; first - group < rows; first += ROWS_IN_FLIGHT * GROUPS) {
        PackedPairs packed[ROWS_IN_FLIGHT] = {};
#pragma unroll
        for (int i = 0; i < ROWS_IN_FLIGHT; ++i) {
            const int row = first + i * GROUPS;
            if (row < rows) packed[i] = load_pairs<HALF_SPLIT>(token + row * HEAD_DIM, lane);
        }
#pragma unroll
        for (int i = 0; i < ROWS_IN_FLIGHT; ++i) {
            const int row = first + i * GROUPS;
            Pairs pairs = unpack<HALF_SPLIT>(packed[i]);
            float squares = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; ++j) squares += pairs.a[j] * pairs.a[j] + pairs.b[j] * pairs.b[j];
            squares = L2P_FAULT_IF(11, lane == 5 ? 0.0f : squares, squares);
            const float inverse = rsqrtf(row_lanes_sum(squares) / HEAD_DIM + epsilon);
            const Pairs factors = unpack<HALF_SPLIT>(choose(row < heads, q_factors, k_factors));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float a = pairs.a[j] * inverse * factors.a[j], b = pairs.b[j] * inverse * factors.b[j];
                const float cos = angles[2 * j], sin = angles[2 * j + 1];
                pairs.a[j] = a * cos - b * sin;
                pairs.b[j] = a * sin + b * cos;
            }
            if (row < rows) store_pairs<HALF_SPLIT>(target + row * HEAD_DIM, lane, pairs);
        }
    }
    if (qkv == result) return;
    for (int row = rows + group; row < rows + kv_heads; row += GROUPS) {
        const uint4* values = reinterpret_cast<const uint4*>(token + row * HEAD_DIM);
        reinterpret_cast<uint4*>(target + row * HEAD_DIM)[lane] = values[lane];
    }
}

// qkv, result [tokens, (heads + 2 * kv_heads) * HEAD_DIM], which may be the same; table [table_rows, HEAD_DIM / 2, 2], token t uses row t % table_rows.
extern "C" __global__ __launch_bounds__(THREADS) void qk_norm_rope_interleaved(
    const bf16* qkv, bf16* result, const bf16* q_weight, const bf16* k_weight, const float* table, int heads, int kv_heads,
    int table_rows, float epsilon) {
    normalise_and_rotate<false>(qkv, result, q_weight, k_weight, table, heads, kv_heads, table_rows, epsilon);
}
L2P_LAUNCH(qk_norm_rope_interleaved, THREADS, 0, HEAD_DIM)

extern "C" __global__ __launch_bounds__(THREADS) void qk_norm_rope_half_split(
    const bf16* qkv, bf16* result, const bf16* q_weight, const bf16* k_weight, const float* table, int heads, int kv_heads,
    int table_rows, float epsilon) {
    normalise_and_rotate<true>(qkv, result, q_weight, k_weight, table, heads, kv_heads, table_rows, epsilon);
}
L2P_LAUNCH(qk_norm_rope_half_split, THREADS, 0, HEAD_DIM)

// The gradient, in place. A block takes every gridDim.x-th token; what its threads find for the weights of q and k stays in
// registers and is added up once per block, group by group.
template <bool HALF_SPLIT>
__device__ __forceinline__ void rotate_back_and_differentiate(
    bf16* gradient, const bf16* qkv, const bf16* q_weight, const bf16* k_weight, const float* table, float* partial, int tokens,
    int heads, int kv_heads, int table_rows, float epsilon) {
    __shared__ alignas(16) float sums[GROUPS][HEAD_DIM];
    const int lane = threadIdx.x % LANES;
    const int group = threadIdx.x / LANES;
    const int rows = heads + kv_heads;
    const PackedPairs q_factors = load_pairs<HALF_SPLIT>(q_weight, lane);
    const PackedPairs k_factors = load_pairs<HALF_SPLIT>(k_weight, lane);
    Pairs q_total = {}, k_total = {};
    for (int token = blockIdx.x; token < tokens; token += gridDim.x) {
        const size_t start = static_cast<size_t>(token) * (heads + 2 * kv_heads) * HEAD_DIM;
        float angles[8];
        load8(angles, table + static_cast<size_t>(token % table_rows) * HEAD_DIM + 8 * lane);
        // Every thread runs every step, so that the shuffles see whole warps; rows past the end are zeros and are not stored.
        for (int first = group; first - group < rows; first += GROUPS) {
            const bool valid = first < rows;
            PackedPairs packed_input = {}, packed_gradient = {};
            if (valid) {
                packed_input = load_pairs<HALF_SPLIT>(qkv + start + first * HEAD_DIM, lane);
                packed_gradient = load_pairs<HALF_SPLIT>(gradient + start + first * HEAD_DIM, lane);
            }
            Pairs input = unpack<HALF_SPLIT>(packed_input), turned = unpack<HALF_SPLIT>(packed_gradient);
            const bool is_query = first < heads;
            const Pairs factors = unpack<HALF_SPLIT>(choose(is_query, q_factors, k_factors));
            float squares = 0.0f, along = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float cos = angles[2 * j], sin = angles[2 * j + 1];
                const float a = turned.a[j] * cos + turned.b[j] * sin, b = turned.b[j] * cos - turned.a[j] * sin;
                turned.a[j] = a;
                turned.b[j] = b;
                squares += input.a[j] * input.a[j] + input.b[j] * input.b[j];
                along += a * factors.a[j] * input.a[j] + b * factors.b[j] * input.b[j];
            }
            const float inverse = rsqrtf(row_lanes_sum(squares) / HEAD_DIM + epsilon);
            const float share = row_lanes_sum(along) * inverse / HEAD_DIM;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float a = input.a[j] * inverse, b = input.b[j] * inverse;  // normalised
                const float to_a = turned.a[j] * a, to_b = turned.b[j] * b;
                q_total.a[j] += is_query ? to_a : 0.0f;
                q_total.b[j] += is_query ? to_b : 0.0f;
                k_total.a[j] += is_query ? 0.0f : to_a;
                k_total.b[j] += is_query ? 0.0f : to_b;
                input.a[j] = inverse * (turned.a[j] * factors.a[j] - a * share);
                input.b[j] = inverse * (turned.b[j] * factors.b[j] - b * share);
            }
            if (valid) store_pairs<HALF_SPLIT>(gradient + start + first * HEAD_DIM, lane, input);
        }
    }
    if (partial == nullptr) return;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        const Pairs& total = which == 0 ? q_total : k_total;
        __syncthreads();  // the sums of the other weight have been read
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            sums[group][HALF_SPLIT ? 4 * lane + j : 8 * lane + 2 * j] = total.a[j];
            sums[group][HALF_SPLIT ? HEAD_DIM / 2 + 4 * lane + j : 8 * lane + 2 * j + 1] = total.b[j];
        }
        __syncthreads();  // every group's sums are written before they are added up
        if (threadIdx.x < HEAD_DIM) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < GROUPS; ++i) sum += sums[i][threadIdx.x];
            partial[(static_cast<size_t>(which) * gridDim.x + blockIdx.x) * HEAD_DIM + threadIdx.x] = sum;
        }
    }
}

// gradient, qkv [tokens, (heads + 2 * kv_heads) * HEAD_DIM], qkv as it was before normalisation; partial [2, blocks, HEAD_DIM]
// for the weights of q and k, or null.
extern "C" __global__ __launch_bounds__(THREADS) void qk_norm_rope_backward_interleaved(
    bf16* gradient, const bf16* qkv, const bf16* q_weight, const bf16* k_weight, const float* table, float* partial, int tokens,
    int heads, int kv_heads, int table_rows, float epsilon) {
    rotate_back_and_differentiate<false>(
        gradient, qkv, q_weight, k_weight, table, partial, tokens, heads, kv_heads, table_rows, epsilon);
}
L2P_LAUNCH(qk_norm_rope_backward_interleaved, THREADS, 0, HEAD_DIM)

extern "C" __global__ __launch_bounds__(THREADS) void qk_norm_rope_backward_half_split(
    bf16* gradient, const bf16* qkv, const bf16* q_weight, const bf16* k_weight, const float* table, float* partial, int tokens,
    int heads, int kv_heads, int table_rows, float epsilon) {
    rotate_back_and_differentiate<true>(
        gradient, qkv, q_weight, k_weight, table, partial, tokens, heads, kv_heads, table_rows, epsilon);
}
L2P_LAUNCH(qk_norm_rope_backward_half_split, THREADS, 0, HEAD_DIM)
