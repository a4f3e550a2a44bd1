// Attention with heads of 512 on every GPU from Ampere on; engine/src/ops/attention holds the contract.
//
// A head this wide leaves room for BLOCK_M queries a block: their result alone is half of the register file. The block walks
// over the keys, BLOCK_N at a time. For the scores its warps share out BLOCK_M x BLOCK_N in tiles of 32 x 32; the weights go through
// shared memory, and for the result each warp takes 32 queries and a quarter of the columns. Keys and values come through
// one ring of chunks: a chunk of keys is CHUNK_DIMS of the head for all BLOCK_N keys, a chunk of values 16 keys by
// 8 CHUNK_DIMS columns. Each key and value is read once per 64 queries: 64 operations per byte out of L2, which bounds a
// Hopper at about 40 % of its tensor cores and an Ampere not at all.
#include "common/attention.cuh"
#include "common/launch.cuh"
#include "common/named_barrier.cuh"

constexpr int HEAD_DIM = 512;
constexpr int UNITS = HEAD_DIM / UNIT;
constexpr int BLOCK_M = 64;   // queries per block
constexpr int BLOCK_N = 128;  // per step
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int QUARTERS = 4;                           // warps that share 32 rows
constexpr int WARP_ROWS = BLOCK_M / (WARPS / QUARTERS);  // 32
constexpr int ROW_TILES = WARP_ROWS / 16;
constexpr int WARP_KEYS = BLOCK_N / QUARTERS;  // 32
constexpr int KEY_TILES = WARP_KEYS / 8;
constexpr int COLUMN_TILES = HEAD_DIM / QUARTERS / 8;  // of the result of one warp

enum class NamedBarrier {
    ROWS = 1,  // one for each half of the rows: the warps that share them
};

// Shared memory: queries, weights, the ring, and for each row one number of each quarter.
template <int CHUNK_DIMS, int STAGES>
struct Layout {
    static constexpr int CHUNK_BYTES = BLOCK_N * CHUNK_DIMS * sizeof(bf16);
    static constexpr int WEIGHTS = BLOCK_M * HEAD_DIM * sizeof(bf16);
    static constexpr int RING = WEIGHTS + BLOCK_M * BLOCK_N * sizeof(bf16);
    static constexpr int ROW_NUMBERS = RING + STAGES * CHUNK_BYTES;
    static constexpr int BYTES = ROW_NUMBERS + BLOCK_M * QUARTERS * sizeof(float);
};

// Starts copying rows of UNITS_PER_ROW units; row r comes from `from` + r * stride and is zeros unless r < valid.
template <int COUNT, int UNITS_PER_ROW>
__device__ __forceinline__ void copy_tile(uint32_t tile, const bf16* from, size_t stride, int valid) {
    static_assert(COUNT * UNITS_PER_ROW % THREADS == 0);
#pragma unroll 2
    for (int i = 0; i < COUNT * UNITS_PER_ROW / THREADS; ++i) {
        const int index = threadIdx.x + i * THREADS;
        const int row = index / UNITS_PER_ROW, unit = index % UNITS_PER_ROW;
        const bf16* source = from + (row < valid ? row : 0) * stride + unit * UNIT;
        cp_async16(tile + 16 * swizzled<UNITS_PER_ROW>(row, unit), source, row < valid);
    }
}

// The stream of chunks: for each step first its keys, then its values.
template <int CHUNK_DIMS, int STAGES>
struct Ring {
    static constexpr int CHUNKS = HEAD_DIM / CHUNK_DIMS;  // of the keys of a step, and as many of its values
    static constexpr int PARTS = HEAD_DIM / (8 * CHUNK_DIMS);
    static constexpr int CHUNK_BYTES = Layout<CHUNK_DIMS, STAGES>::CHUNK_BYTES;
    static_assert(CHUNKS == BLOCK_N / 16 * PARTS);

    uint32_t address;  // of the first slot
    const bf16* k;
    const bf16* v;
    size_t stride;
    int seen;        // keys that exist for this block
    int start = 0;   // first key of the step that is being fetched
    int chunk = 0;   // next chunk of that step to fetch
    int fill = 0;    // slot it goes to
    int drain = 0;   // slot to use next

    // Starts fetching the next chunk, if there is one; closes a group of copies in any case.
    __device__ __forceinline__ void fetch() {
        if (start < seen) {
            const uint32_t slot = address + fill * CHUNK_BYTES;
            if (chunk < CHUNKS) {
                copy_tile<BLOCK_N, CHUNK_DIMS / UNIT>(slot, k + start * stride + chunk * CHUNK_DIMS, stride, seen - start);
            } else {
                const int key = start + (chunk - CHUNKS) / PARTS * 16, part = (chunk - CHUNKS) % PARTS;
                // The last keys of a step may not exist: nothing is read then, from an address that does.
                const bf16* from = v + (key < seen ? key : 0) * stride + part * 8 * CHUNK_DIMS;
                copy_tile<16, CHUNK_DIMS>(slot, from, stride, seen - key);
            }
            fill = fill + 1 == STAGES ? 0 : fill + 1;
            if (++chunk == 2 * CHUNKS) chunk = 0, start += BLOCK_N;
        }
        cp_async_commit();
    }

    // The slot of the next chunk, once it is there for the whole block.
    __device__ __forceinline__ uint32_t next() {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // the chunk is there, and nobody reads the one before any more: its slot is free
        fetch();
        const uint32_t slot = address + drain * CHUNK_BYTES;
        drain = drain + 1 == STAGES ? 0 : drain + 1;
        return slot;
    }
};

template <int CHUNK_DIMS, int STAGES>
__device__ __forceinline__ void attention(
    const bf16* qkv, const int* lengths, bf16* output, float* lse, int tokens, int heads, int kv_heads, bool causal,
    float scale) {
    using Shared = Layout<CHUNK_DIMS, STAGES>;
    using Chunks = Ring<CHUNK_DIMS, STAGES>;
    constexpr int KEY_UNITS = CHUNK_DIMS / UNIT;           // of a row of a chunk of keys
    constexpr int VALUE_UNITS = CHUNK_DIMS;                // of a row of a chunk of values
    constexpr int PART_TILES = VALUE_UNITS / QUARTERS;     // of one warp
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t q_tile = shared_address(shared);
    float* row_numbers = reinterpret_cast<float*>(shared + Shared::ROW_NUMBERS);

    // Under the causal mask the last queries have most to do: they come first.
    const int first = (causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x) * BLOCK_M;
    const int head = blockIdx.y, item = blockIdx.z;
    const int keys = key_length(lengths, item, tokens);
    const int seen = causal ? min(keys, first + BLOCK_M) : keys;  // by some query of the block
    const size_t stride = static_cast<size_t>(heads + 2 * kv_heads) * HEAD_DIM;
    const bf16* rows = qkv + static_cast<size_t>(item) * tokens * stride;
    const bf16* k = rows + (heads + head / (heads / kv_heads)) * HEAD_DIM;
    Chunks ring{.address = q_tile + Shared::RING, .k = k, .v = k + kv_heads * HEAD_DIM, .stride = stride, .seen = seen};

    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, member = threadIdx.x % 4;
    const int quarter = warp % QUARTERS, row_half = warp / QUARTERS, warp_row = row_half * WARP_ROWS;
    RowSoftmax softmax[ROW_TILES];
    float result[ROW_TILES][COLUMN_TILES][4] = {};

    copy_tile<BLOCK_M, UNITS>(q_tile, rows + first * stride + head * HEAD_DIM, stride, tokens - first);
    for (int i = 0; i < STAGES - 1; ++i) ring.fetch();  // the queries belong to the first group
    for (int start = 0; start < seen; start += BLOCK_N) {
        float scores[ROW_TILES][KEY_TILES][4] = {};
#pragma unroll 1
        for (int chunk = 0; chunk < Chunks::CHUNKS; ++chunk) {
            const uint32_t k_tile = ring.next();
#pragma unroll
            for (int unit = 0; unit < KEY_UNITS; unit += 2) {
                uint32_t a[ROW_TILES][4];
#pragma unroll
                for (int i = 0; i < ROW_TILES; ++i) {
                    load_a<UNITS>(a[i], q_tile, warp_row + 16 * i, chunk * KEY_UNITS + unit);
                }
#pragma unroll
                for (int j = 0; j < KEY_TILES; j += 2) {
                    uint32_t b[4];
                    load_b<KEY_UNITS>(b, k_tile, quarter * WARP_KEYS + 8 * j, unit);
#pragma unroll
                    for (int i = 0; i < ROW_TILES; ++i) {
                        mma(scores[i][j], a[i], b[0], b[1]);
                        mma(scores[i][j + 1], a[i], b[2], b[3]);
                    }
                }
            }
        }

        // The four warps that share rows agree on each row's largest score.
        const int key = start + quarter * WARP_KEYS;
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i) {
            const int row = warp_row + 16 * i;
            if (key + WARP_KEYS > (causal ? min(keys, first + row + 1) : keys)) {
                mask_keys(scores[i], first + row + group, key + 2 * member, keys, causal);
            }
            float top[2];
            row_tops(top, scores[i]);
            if (member == 0) {
                row_numbers[(row + group) * QUARTERS + quarter] = top[0];
                row_numbers[(row + group + 8) * QUARTERS + quarter] = top[1];
            }
        }
        named_barrier_sync(NamedBarrier::ROWS, row_half, QUARTERS * WARP);  // the quarters' largest scores are written before they are read
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i) {
            const int row = warp_row + 16 * i;
            float top[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float4 quarters =
                    *reinterpret_cast<const float4*>(row_numbers + (row + group + 8 * half) * QUARTERS);
                top[half] = fmaxf(fmaxf(quarters.x, quarters.y), fmaxf(quarters.z, quarters.w));
            }
            if (needs_raise(softmax[i], top, scale)) {
                float factor[2];
                raise(softmax[i], top, scale, factor);
                scale_rows(result[i], factor);
            }
            weigh(softmax[i], scores[i], scale);
            place_rows<BLOCK_N / UNIT>(shared + Shared::WEIGHTS, row, quarter * KEY_TILES, scores[i]);
        }

        // The barrier within the first `next` lets the other warps see the weights.
#pragma unroll 1
        for (int step = 0; step < BLOCK_N / 16; ++step) {
            uint32_t a[ROW_TILES][4];
#pragma unroll
            for (int part = 0; part < Chunks::PARTS; ++part) {
                const uint32_t v_tile = ring.next();
                if (part == 0) {
#pragma unroll
                    for (int i = 0; i < ROW_TILES; ++i) {
                        load_a<BLOCK_N / UNIT>(a[i], q_tile + Shared::WEIGHTS, warp_row + 16 * i, 2 * step);
                    }
                }
#pragma unroll
                for (int j = 0; j < PART_TILES; j += 2) {
                    uint32_t b[4];
                    load_b_transposed<VALUE_UNITS>(b, v_tile, 0, quarter * PART_TILES + j);
#pragma unroll
                    for (int i = 0; i < ROW_TILES; ++i) {
                        mma(result[i][part * PART_TILES + j], a[i], b[0], b[1]);
                        mma(result[i][part * PART_TILES + j + 1], a[i], b[2], b[3]);
                    }
                }
            }
        }
    }

    // Each thread has summed its own columns: the row's sum is that of its group and of the four quarters.
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = group_sum(softmax[i].sum[half]);
            const int row = warp_row + 16 * i + group + 8 * half;
            if (member == 0) row_numbers[row * QUARTERS + quarter] = sum;
        }
    cp_async_wait<0>();
    __syncthreads();  // the quarters' sums are written before they are read; nobody reads the queries any more
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + 16 * i + group + 8 * half;
            const float4 quarters = *reinterpret_cast<const float4*>(row_numbers + row * QUARTERS);
            const float sum = quarters.x + quarters.y + quarters.z + quarters.w;
            factor[half] = inverse_or_zero(sum);
            if (lse != nullptr && quarter == 0 && member == 0 && first + row < tokens) {
                lse[(static_cast<size_t>(item) * heads + head) * tokens + first + row] =
                    log_sum_exp(softmax[i].reference[half], sum, scale);
            }
        }
        scale_rows(result[i], factor);
    }
    // The columns of a part are spread over the quarters; the result takes the place of the queries.
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
        for (int part = 0; part < Chunks::PARTS; ++part) {
            const auto& tiles = reinterpret_cast<const float(&)[PART_TILES][4]>(result[i][part * PART_TILES]);
            place_rows<UNITS>(shared, warp_row + 16 * i, part * VALUE_UNITS + quarter * PART_TILES, tiles);
        }
    __syncthreads();  // the rows are whole before they are stored
    constexpr int STORED_ROWS = BLOCK_M / WARPS;
    const int row = first + warp * STORED_ROWS;
    const size_t output_stride = static_cast<size_t>(heads) * HEAD_DIM;
    bf16* to = output + (static_cast<size_t>(item) * tokens + row) * output_stride + head * HEAD_DIM;
    store_rows<UNITS, STORED_ROWS>(to, output_stride, tokens - row, shared, warp * STORED_ROWS);
}

// qkv [items, tokens, heads + 2 kv_heads, head_dim]; lengths [items] or null; output [items, tokens, heads, head_dim]; lse
// (the rows' log-sum-exp) [items, heads, tokens] or null; scale in powers of two; grid (query tiles, heads, items). Further
// arguments are entries of the launch information's tile.
#define ATTENTION_KERNEL(name, chunk_dims, stages, ...)                                                        \
    extern "C" __global__ __launch_bounds__(THREADS, 1) void name(                                             \
        const bf16* qkv, const int* lengths, bf16* output, float* lse, int tokens, int heads,             \
        int kv_heads, int causal, float scale) {                                                               \
        attention<chunk_dims, stages>(qkv, lengths, output, lse, tokens, heads, kv_heads, causal != 0, scale); \
    }                                                                                                          \
    constexpr int name##_bytes = Layout<chunk_dims, stages>::BYTES;                                            \
    L2P_LAUNCH(name, THREADS, name##_bytes, BLOCK_M __VA_OPT__(, ) __VA_ARGS__)

ATTENTION_KERNEL(attention_512, 64, 4)
// For GPUs with 99 KiB of shared memory per block. It tells the launcher how much the faster one needs.
ATTENTION_KERNEL(attention_512_small, 32, 2, attention_512_bytes)
static_assert(attention_512_small_bytes <= 99 << 10);
