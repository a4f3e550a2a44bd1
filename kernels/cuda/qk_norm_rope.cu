// Normalisation and rotation of query and key heads, in place; engine/src/ops/qk_norm_rope.rs holds the contract.
//
// One block per token. Sixteen lanes share a head row, eight elements (four pairs) each; a lane handles the same pairs of
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

struct alignas(8) Bf16x4 {
    __nv_bfloat162 pair[2];
};

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

// The sum over the lanes of a head row; the whole warp must take part.
__device__ __forceinline__ float row_lanes_sum(float value) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(FULL_WARP, value, offset);
    return value;
}

template <bool HALF_SPLIT>
__device__ __forceinline__ void normalise_and_rotate(
    bf16* qkv, const bf16* q_weight, const bf16* k_weight, const float* table, int heads, int kv_heads, int table_rows,
    float epsilon) {
    const int lane = threadIdx.x % LANES;
    const int group = threadIdx.x / LANES;
    const int rows = heads + kv_heads;
    bf16* token = qkv + static_cast<size_t>(blockIdx.x) * (heads + 2 * kv_heads) * HEAD_DIM;
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
            const float inverse = rsqrtf(row_lanes_sum(squares) / HEAD_DIM + epsilon);
            const Pairs factors = unpack<HALF_SPLIT>(row < heads ? q_factors : k_factors);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float a = pairs.a[j] * inverse * factors.a[j], b = pairs.b[j] * inverse * factors.b[j];
                const float cos = angles[2 * j], sin = angles[2 * j + 1];
                pairs.a[j] = a * cos - b * sin;
                pairs.b[j] = a * sin + b * cos;
            }
            if (row < rows) store_pairs<HALF_SPLIT>(token + row * HEAD_DIM, lane, pairs);
        }
    }
}

// qkv [tokens, (heads + 2 * kv_heads) * HEAD_DIM]; table [table_rows, HEAD_DIM / 2, 2], token t uses row t % table_rows.
extern "C" __global__ __launch_bounds__(THREADS) void qk_norm_rope_interleaved(
    bf16* qkv, const bf16* q_weight, const bf16* k_weight, const float* table, int heads, int kv_heads, int table_rows,
    float epsilon) {
    normalise_and_rotate<false>(qkv, q_weight, k_weight, table, heads, kv_heads, table_rows, epsilon);
}
L2P_LAUNCH(qk_norm_rope_interleaved, THREADS, 0, HEAD_DIM)

extern "C" __global__ __launch_bounds__(THREADS) void qk_norm_rope_half_split(
    bf16* qkv, const bf16* q_weight, const bf16* k_weight, const float* table, int heads, int kv_heads, int table_rows,
    float epsilon) {
    normalise_and_rotate<true>(qkv, q_weight, k_weight, table, heads, kv_heads, table_rows, epsilon);
}
L2P_LAUNCH(qk_norm_rope_half_split, THREADS, 0, HEAD_DIM)
