// The gradient of attention with heads of 64 or 128 on every GPU from Ampere on; engine/src/ops/attention/backward holds the
// contract.
//
//   attention_backward_rows     what each query row brings along (common/attention_backward.cuh); for the Hopper kernels too
//   attention_backward_keys_*   dk and dv: a block holds ROWS keys and values and passes over all queries that see them
//   attention_backward_queries_*  dq: a block holds ROWS queries and passes over all keys that they see
//
// Each block sums its results in registers, in one order: nothing is added in memory, and two runs give the same bits. That
// costs the weights twice, 14 * head_dim operations per query and key instead of 10 * head_dim. Bound by the tensor cores
// and, since each warp has only 16 rows, by reading their operands out of shared memory.
#include "common/attention_backward.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"

constexpr int ROWS = 64;  // that a block holds
constexpr int STEP = 64;  // rows that it passes over at a time
constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr int STEP_TILES = STEP / 8;
static_assert(ROWS == WARPS * 16 && STEP == STAT_ROWS);

template <int HEAD_DIM>
struct Shared {
    static constexpr int TILE = ROWS * HEAD_DIM * sizeof(bf16);
    static constexpr int STATS = 4 * TILE;
    static constexpr int BYTES = STATS + 2 * STAT_ROWS * sizeof(float);
};

// Starts copying ROWS rows from `first` on; not unrolled: the addresses would cost the registers that the results need.
template <int UNITS>
__device__ __forceinline__ void copy_tile(uint32_t tile, const bf16* from, int stride, int first, int limit) {
    static_assert(ROWS == STEP);
    copy_rows<ROWS, UNITS, THREADS, 1>(tile, from, stride, first, limit);
}

// Starts copying the stats of one tile of queries.
__device__ __forceinline__ void copy_stats(uint32_t to, const float* from) {
    if (threadIdx.x < 2 * STAT_ROWS / 4) cp_async16(to + 16 * threadIdx.x, from + 4 * threadIdx.x, true);
}

using Products = float[STEP_TILES][4];

// products = held passedᵀ for the warp's 16 rows from `row` on.
template <int UNITS>
__device__ __forceinline__ void multiply_tiles(Products& products, uint32_t held, int row, uint32_t passed) {
#pragma unroll 2  // not more: operands would be loaded ahead into registers that there are not
    for (int unit = 0; unit < UNITS; unit += 2) {
        uint32_t a[4];
        load_a<UNITS>(a, held, row, unit);
#pragma unroll
        for (int j = 0; j < STEP_TILES; j += 2) {
            uint32_t b[4];
            load_b<UNITS>(b, passed, 8 * j, unit);
            mma(products[j], a, b[0], b[1]);
            mma(products[j + 1], a, b[2], b[3]);
        }
    }
}

// sums += factors passed, the factors rounded to bf16.
template <int UNITS>
__device__ __forceinline__ void add_product(float (&sums)[UNITS][4], const Products& factors, uint32_t passed) {
#pragma unroll
    for (int j = 0; j < STEP_TILES; j += 2) {
        uint32_t a[4];
        pack_fragment(a, factors[j], factors[j + 1]);
#pragma unroll
        for (int unit = 0; unit < UNITS; unit += 2) {
            uint32_t b[4];
            load_b_transposed<UNITS>(b, passed, 8 * j, unit);
            mma(sums[unit], a, b[0], b[1]);
            mma(sums[unit + 1], a, b[2], b[3]);
        }
    }
}

// Multiplies the sums of the warp's 16 rows by `factor` and writes them, through its part of a tile that no other warp
// uses; `valid` of the rows exist.
template <int UNITS>
__device__ __forceinline__ void store_sums(
    bf16* to, int stride, int valid, unsigned char* tile, int row, float (&sums)[UNITS][4], float factor) {
    const float factors[2] = {factor, factor};
    scale_rows(sums, factors);
    place_rows<UNITS>(tile, row, 0, sums);
    __syncwarp();  // the rows are all placed
    store_rows<UNITS, 16>(to, stride, valid, tile, row);
    __syncwarp();  // and all read, before the next are placed
}

// The rows of one packed tensor, or of one result.
struct Layout {
    int heads, kv_heads, head_dim;
    __device__ int stride() const { return (heads + 2 * kv_heads) * head_dim; }
    __device__ int key_column(int kv_head) const { return (heads + kv_head) * head_dim; }
    __device__ int value_column(int kv_head) const { return (heads + kv_heads + kv_head) * head_dim; }
    __device__ int result_stride() const { return heads * head_dim; }
};

template <int HEAD_DIM>
__device__ __forceinline__ void keys_backward(
    const bf16* qkv, const bf16* dy, const float* stats, const int* lengths, bf16* dqkv, int tokens, int heads,
    int kv_heads, bool causal, float scale, float factor) {
    constexpr int UNITS = HEAD_DIM / UNIT;
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t k_tile = shared_address(shared), v_tile = k_tile + Shared<HEAD_DIM>::TILE;
    const uint32_t q_tile = v_tile + Shared<HEAD_DIM>::TILE, dy_tile = q_tile + Shared<HEAD_DIM>::TILE;
    const float* const stat = reinterpret_cast<const float*>(shared + Shared<HEAD_DIM>::STATS);

    const Layout layout{heads, kv_heads, HEAD_DIM};
    const int first = blockIdx.x * ROWS, kv_head = blockIdx.y, item = blockIdx.z;
    const int keys = key_length(lengths, item, tokens), tiles = stat_tiles(tokens);
    const size_t row = static_cast<size_t>(item) * tokens;
    const bf16* const packed = qkv + row * layout.stride();
    const bf16* const gradient = dy + row * layout.result_stride();
    const int warp_row = threadIdx.x / WARP * 16, group = threadIdx.x % WARP / 4, member = threadIdx.x % 4;

    const int group_heads = heads / kv_heads;
    const int first_tile = causal ? first / STEP : 0;  // the first with a query that sees a key of this block
    const int steps = first < keys ? group_heads * (tiles - first_tile) : 0;
    const auto head_of = [&](int step) { return kv_head * group_heads + step / (tiles - first_tile); };
    const auto tile_of = [&](int step) { return first_tile + step % (tiles - first_tile); };
    const auto copy_dy = [&](int step) {
        copy_tile<UNITS>(dy_tile, gradient + head_of(step) * HEAD_DIM, layout.result_stride(), tile_of(step) * STEP, tokens);
    };
    const auto copy_queries = [&](int step) {
        copy_tile<UNITS>(q_tile, packed + head_of(step) * HEAD_DIM, layout.stride(), tile_of(step) * STEP, tokens);
        copy_stats(shared_address(stat), stats + stat_index(item, head_of(step), heads, tiles, tile_of(step)));
    };

    float dk[UNITS][4] = {}, dv[UNITS][4] = {};
    if (steps > 0) {
        copy_tile<UNITS>(k_tile, packed + layout.key_column(kv_head), layout.stride(), first, keys);
        copy_tile<UNITS>(v_tile, packed + layout.value_column(kv_head), layout.stride(), first, keys);
        copy_dy(0);
        cp_async_commit();
        copy_queries(0);
        cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
        Products weights = {}, ds = {};
        cp_async_wait<1>();
        __syncthreads();  // dy is there
        multiply_tiles<UNITS>(ds, v_tile, warp_row, dy_tile);
        cp_async_wait<0>();
        __syncthreads();  // the queries and their stats are there
        multiply_tiles<UNITS>(weights, k_tile, warp_row, q_tile);
#pragma unroll
        for (int j = 0; j < STEP_TILES; ++j) {
            const int column = 8 * j + 2 * member;
            const float2 shift = *reinterpret_cast<const float2*>(stat + column);
            const float2 delta = *reinterpret_cast<const float2*>(stat + STAT_ROWS + column);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = first + warp_row + group + i / 2 * 8, query = tile_of(step) * STEP + column + i % 2;
                float weight = weight_of(weights[j][i], scale, i % 2 ? shift.y : shift.x);
                if (causal && key > query) weight = 0.0f;
                weights[j][i] = weight;
                ds[j][i] = weight * (ds[j][i] - (i % 2 ? delta.y : delta.x));
            }
        }
        add_product<UNITS>(dv, weights, dy_tile);
        __syncthreads();  // dy is no longer read
        if (step + 1 < steps) copy_dy(step + 1);
        cp_async_commit();
        add_product<UNITS>(dk, ds, q_tile);
        __syncthreads();  // nor are the queries
        if (step + 1 < steps) copy_queries(step + 1);
        cp_async_commit();
    }
    // What masked keys were multiplied with is of no interest: their sums may be anything.
#pragma unroll
    for (int i = 0; i < UNITS; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (first + warp_row + group + j / 2 * 8 >= keys) dk[i][j] = dv[i][j] = 0.0f;
    const int valid = tokens - (first + warp_row);
    bf16* const to = dqkv + (row + first + warp_row) * layout.stride();
    store_sums<UNITS>(to + layout.key_column(kv_head), layout.stride(), valid, shared, warp_row, dk, factor);
    store_sums<UNITS>(to + layout.value_column(kv_head), layout.stride(), valid, shared, warp_row, dv, 1.0f);
}

template <int HEAD_DIM>
__device__ __forceinline__ void queries_backward(
    const bf16* qkv, const bf16* dy, const float* stats, const int* lengths, bf16* dqkv, int tokens, int heads,
    int kv_heads, bool causal, float scale, float factor) {
    constexpr int UNITS = HEAD_DIM / UNIT;
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t q_tile = shared_address(shared), dy_tile = q_tile + Shared<HEAD_DIM>::TILE;
    const uint32_t k_tile = dy_tile + Shared<HEAD_DIM>::TILE, v_tile = k_tile + Shared<HEAD_DIM>::TILE;

    // Under the causal mask the last queries have most to do: they come first.
    const int first = (causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x) * ROWS;
    const Layout layout{heads, kv_heads, HEAD_DIM};
    const int head = blockIdx.y, item = blockIdx.z, kv_head = L2P_FAULT_IF(23, head % kv_heads, head / (heads / kv_heads));
    const int keys = key_length(lengths, item, tokens), tiles = stat_tiles(tokens);
    const int seen = causal ? min(keys, first + ROWS) : keys;  // by some query of the block
    const size_t row = static_cast<size_t>(item) * tokens;
    const bf16* const packed = qkv + row * layout.stride();
    const bf16* const gradient = dy + row * layout.result_stride();
    const int warp_row = threadIdx.x / WARP * 16, group = threadIdx.x % WARP / 4, member = threadIdx.x % 4;
    const auto copy_keys = [&](int start) {
        copy_tile<UNITS>(k_tile, packed + layout.key_column(kv_head), layout.stride(), start, seen);
    };
    const auto copy_values = [&](int start) {
        copy_tile<UNITS>(v_tile, packed + layout.value_column(kv_head), layout.stride(), start, seen);
    };

    float dq[UNITS][4] = {};
    float shift[2], delta[2];
    const float* const stat = stats + stat_index(item, head, heads, tiles, first / STAT_ROWS) + warp_row + group;
#pragma unroll
    for (int half = 0; half < 2; ++half) shift[half] = stat[8 * half], delta[half] = stat[STAT_ROWS + 8 * half];

    copy_tile<UNITS>(q_tile, packed + head * HEAD_DIM, layout.stride(), first, tokens);
    copy_tile<UNITS>(dy_tile, gradient + head * HEAD_DIM, layout.result_stride(), first, tokens);
    if (seen > 0) copy_values(0);
    cp_async_commit();
    if (seen > 0) copy_keys(0);
    cp_async_commit();
    for (int start = 0; start < seen; start += STEP) {
        Products weights = {}, ds = {};
        cp_async_wait<1>();
        __syncthreads();  // the values are there
        multiply_tiles<UNITS>(ds, dy_tile, warp_row, v_tile);
        cp_async_wait<0>();
        __syncthreads();  // the keys are there, and nobody reads the values any more
        if (start + STEP < seen) copy_values(start + STEP);
        cp_async_commit();
        multiply_tiles<UNITS>(weights, q_tile, warp_row, k_tile);
#pragma unroll
        for (int j = 0; j < STEP_TILES; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int query = first + warp_row + group + i / 2 * 8, key = start + 8 * j + 2 * member + i % 2;
                const bool sees = key < keys && !(causal && key > query);
                const float weight = sees ? weight_of(weights[j][i], scale, shift[i / 2]) : 0.0f;
                ds[j][i] = weight * (ds[j][i] - delta[i / 2]);
            }
        add_product<UNITS>(dq, ds, k_tile);
        __syncthreads();  // nobody reads the keys any more
        if (start + STEP < seen) copy_keys(start + STEP);
        cp_async_commit();
    }
    cp_async_wait<0>();
    __syncthreads();  // nothing arrives any more: the queries' tile takes the result
    bf16* const to = dqkv + (row + first + warp_row) * layout.stride() + head * HEAD_DIM;
    store_sums<UNITS>(to, layout.stride(), tokens - (first + warp_row), shared, warp_row, dq, factor);
}

// qkv and dqkv [items, tokens, heads + 2 kv_heads, head_dim]; dy [items, tokens, heads, head_dim]; stats as in
// common/attention_backward.cuh; lengths [items] or null; scale of the scores in powers of two, factor their natural one;
// grid (tiles of ROWS tokens, kv_heads or heads, items).
#define ATTENTION_BACKWARD_KERNEL(part, head_dim)                                                                       \
    extern "C" __global__ __launch_bounds__(THREADS, 2) void attention_backward_##part##_##head_dim(                    \
        const bf16* qkv, const bf16* dy, const float* stats, const int* lengths, bf16* dqkv, int tokens, int heads,     \
        int kv_heads, int causal, float scale, float factor) {                                                          \
        part##_backward<head_dim>(qkv, dy, stats, lengths, dqkv, tokens, heads, kv_heads, causal != 0, scale, factor);  \
    }                                                                                                                   \
    L2P_LAUNCH(attention_backward_##part##_##head_dim, THREADS, Shared<head_dim>::BYTES, ROWS)

ATTENTION_BACKWARD_KERNEL(keys, 64)
ATTENTION_BACKWARD_KERNEL(keys, 128)
ATTENTION_BACKWARD_KERNEL(queries, 64)
ATTENTION_BACKWARD_KERNEL(queries, 128)

constexpr int STAT_THREADS = 256;

// stats from dy and output [items, tokens, heads, head_dim] and lse [items, heads, tokens]; head_dim a multiple of 8, at
// most 256. One warp per row and head; a block takes as many heads of one row as it has warps. Bound by memory: reads 4 bytes
// per element once. grid (rows of whole tiles, heads / warps of a block, items).
extern "C" __global__ __launch_bounds__(STAT_THREADS) void attention_backward_rows(
    const bf16* dy, const bf16* output, const float* lse, float* stats, int tokens, int heads, int head_dim) {
    constexpr float LOG2_E = 1.0f / LN_2;
    const int row = blockIdx.x, item = blockIdx.z, lane = threadIdx.x % WARP;
    const int head = blockIdx.y * (STAT_THREADS / WARP) + threadIdx.x / WARP;
    if (head >= heads) return;
    float shift = INFINITY, delta = 0.0f;
    if (row < tokens) {
        if (lane * UNIT < head_dim) {
            const size_t at = ((static_cast<size_t>(item) * tokens + row) * heads + head) * head_dim + lane * UNIT;
            float a[UNIT], b[UNIT];
            load8(a, dy + at);
            load8(b, output + at);
#pragma unroll
            for (int i = 0; i < UNIT; ++i) delta += a[i] * b[i];
        }
        delta = warp_sum(L2P_FAULT_IF(22, lane == 7 ? 0.0f : delta, delta));
        const float log_sum = lse[(static_cast<size_t>(item) * heads + head) * tokens + row];
        if (log_sum > -INFINITY) shift = log_sum * LOG2_E;  // a row without keys has no weights
    }
    if (lane == 0) {
        float* const to = stats + stat_index(item, head, heads, stat_tiles(tokens), row / STAT_ROWS) + row % STAT_ROWS;
        to[0] = shift;
        to[STAT_ROWS] = delta;
    }
}
L2P_LAUNCH(attention_backward_rows, STAT_THREADS, 0, STAT_THREADS / WARP, STAT_ROWS)
