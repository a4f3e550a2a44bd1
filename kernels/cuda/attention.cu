// Attention with heads of 64 or 128 on every GPU from Ampere on; engine/src/ops/attention holds the contract.
//
// One block takes BLOCK_M queries of one head and walks over its keys, BLOCK_N at a time, each warp holding the scores, weights
// and result of its 32 queries in registers: no score ever reaches memory. Keys and values have one buffer each; the values
// arrive under the product of queries and keys, the next keys under that of weights and values. Bound by the tensor cores:
// 4 * head_dim operations per query and key, and each key is read once per BLOCK_M queries, out of L2.
#include "common/attention.cuh"
#include "common/launch.cuh"

constexpr int BLOCK_M = 128;  // queries per block
constexpr int BLOCK_N = 64;   // per step
constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr int ROW_TILES = BLOCK_M / WARPS / 16;  // of one warp
constexpr int KEY_TILES = BLOCK_N / 8;

template <int HEAD_DIM>
constexpr int SMEM_BYTES = (BLOCK_M + 2 * BLOCK_N) * HEAD_DIM * sizeof(bf16);

// Starts copying COUNT rows from `first` on; twice unrolled, not more: the addresses would cost the registers that the result
// needs.
template <int COUNT, int UNITS>
__device__ __forceinline__ void copy_tile(uint32_t tile, const bf16* from, int stride, int first, int limit) {
    copy_rows<COUNT, UNITS, THREADS, 2>(tile, from, stride, first, limit);
}

template <int HEAD_DIM>
__device__ __forceinline__ void attention(
    const bf16* qkv, const int* lengths, bf16* output, float* lse, int tokens, int heads, int kv_heads, bool causal,
    float scale) {
    constexpr int UNITS = HEAD_DIM / UNIT;
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t q_tile = shared_address(shared);
    const uint32_t k_tile = q_tile + BLOCK_M * HEAD_DIM * sizeof(bf16);
    const uint32_t v_tile = k_tile + BLOCK_N * HEAD_DIM * sizeof(bf16);

    // Under the causal mask the last queries have most to do: they come first.
    const int first = (causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x) * BLOCK_M;
    const int head = blockIdx.y, item = blockIdx.z;
    const int keys = key_length(lengths, item, tokens);
    const int seen = causal ? min(keys, first + BLOCK_M) : keys;  // by some query of the block
    const int stride = (heads + 2 * kv_heads) * HEAD_DIM;
    const bf16* q = qkv + static_cast<size_t>(item) * tokens * stride + head * HEAD_DIM;
    const bf16* k = qkv + static_cast<size_t>(item) * tokens * stride + (heads + head / (heads / kv_heads)) * HEAD_DIM;

    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, member = threadIdx.x % 4;
    const int warp_row = warp * ROW_TILES * 16;
    RowSoftmax softmax[ROW_TILES];
    float result[ROW_TILES][HEAD_DIM / 8][4] = {};

    copy_tile<BLOCK_M, UNITS>(q_tile, q, stride, first, tokens);
    if (seen > 0) copy_tile<BLOCK_N, UNITS>(k_tile, k, stride, 0, seen);
    cp_async_commit();
    for (int start = 0; start < seen; start += BLOCK_N) {
        cp_async_wait<0>();
        __syncthreads();  // queries and keys are there, and nobody reads the values of the step before any more
        copy_tile<BLOCK_N, UNITS>(v_tile, k + kv_heads * HEAD_DIM, stride, start, seen);
        cp_async_commit();
        float scores[ROW_TILES][KEY_TILES][4] = {};
#pragma unroll
        for (int unit = 0; unit < UNITS; unit += 2) {
            uint32_t a[ROW_TILES][4];
#pragma unroll
            for (int i = 0; i < ROW_TILES; ++i) load_a<UNITS>(a[i], q_tile, warp_row + 16 * i, unit);
#pragma unroll
            for (int j = 0; j < KEY_TILES; j += 2) {
                uint32_t b[4];
                load_b<UNITS>(b, k_tile, 8 * j, unit);
#pragma unroll
                for (int i = 0; i < ROW_TILES; ++i) {
                    mma(scores[i][j], a[i], b[0], b[1]);
                    mma(scores[i][j + 1], a[i], b[2], b[3]);
                }
            }
        }
        cp_async_wait<0>();
        __syncthreads();  // the values are there, and nobody reads these keys any more
        if (start + BLOCK_N < seen) copy_tile<BLOCK_N, UNITS>(k_tile, k, stride, start + BLOCK_N, seen);
        cp_async_commit();
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i) {
            const int row = first + warp_row + 16 * i;
            if (start + BLOCK_N > (causal ? min(keys, row + 1) : keys)) {
                mask_keys(scores[i], row + group, start + 2 * member, keys, causal);
            }
            float top[2];
            row_tops(top, scores[i]);
            if (needs_raise(softmax[i], top, scale)) {
                float factor[2];
                raise(softmax[i], top, scale, factor);
                scale_rows(result[i], factor);
            }
            weigh(softmax[i], scores[i], scale);
        }
#pragma unroll
        for (int j = 0; j < KEY_TILES; j += 2) {
            uint32_t a[ROW_TILES][4];
#pragma unroll
            for (int i = 0; i < ROW_TILES; ++i) pack_fragment(a[i], scores[i][j], scores[i][j + 1]);
#pragma unroll
            for (int unit = 0; unit < UNITS; unit += 2) {
                uint32_t b[4];
                load_b_transposed<UNITS>(b, v_tile, 8 * j, unit);
#pragma unroll
                for (int i = 0; i < ROW_TILES; ++i) {
                    mma(result[i][unit], a[i], b[0], b[1]);
                    mma(result[i][unit + 1], a[i], b[2], b[3]);
                }
            }
        }
    }
    cp_async_wait<0>();
    __syncthreads();  // nobody reads the queries any more: their tile takes the result

#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = group_sum(softmax[i].sum[half]);
            factor[half] = inverse_or_zero(sum);
            const int row = first + warp_row + 16 * i + group + 8 * half;
            if (lse != nullptr && member == 0 && row < tokens) {
                lse[(static_cast<size_t>(item) * heads + head) * tokens + row] =
                    log_sum_exp(softmax[i].reference[half], sum, scale);
            }
        }
        scale_rows(result[i], factor);
        place_rows<UNITS>(shared, warp_row + 16 * i, 0, result[i]);
    }
    __syncwarp();  // a warp stores the rows that it placed
    const int row = first + warp_row;
    const size_t output_stride = static_cast<size_t>(heads) * HEAD_DIM;
    bf16* to = output + (static_cast<size_t>(item) * tokens + row) * output_stride + head * HEAD_DIM;
    store_rows<UNITS, ROW_TILES * 16>(to, output_stride, tokens - row, shared, warp_row);
}

// qkv [items, tokens, heads + 2 kv_heads, head_dim]; lengths [items] or null; output [items, tokens, heads, head_dim];
// lse (the rows' log-sum-exp) [items, heads, tokens] or null; scale in powers of two; grid (query tiles, heads, items).
#define ATTENTION_KERNEL(head_dim)                                                                            \
    extern "C" __global__ __launch_bounds__(THREADS, 2) void attention_##head_dim(                            \
        const bf16* qkv, const int* lengths, bf16* output, float* lse, int tokens, int heads,            \
        int kv_heads, int causal, float scale) {                                                              \
        attention<head_dim>(qkv, lengths, output, lse, tokens, heads, kv_heads, causal != 0, scale);     \
    }                                                                                                         \
    L2P_LAUNCH(attention_##head_dim, THREADS, SMEM_BYTES<head_dim>, BLOCK_M)

ATTENTION_KERNEL(64)
ATTENTION_KERNEL(128)
