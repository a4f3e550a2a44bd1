// Linear layers by Hopper's warpgroup products, with what follows them done in registers; engine/src/ops/linear_swiglu.rs,
// linear_qk_norm_rope.rs and patch_embed.rs hold the contracts.
//
// A block makes tiles of TOKENS rows by FEATURES columns of x weightᵀ: two consumer warpgroups take half of the columns each, a
// producer fills a ring of STAGES steps of DEPTH summed elements by bulk copies. Two blocks form a cluster: they work on the same
// rows and neighbouring columns, and each fetches half of the rows' elements for both. Blocks stay on their multiprocessor and
// take one tile after the other, rows first, so that the blocks that run together read the same weights.
//
// A group of 32 output columns is fetched in an order (column 8 t + 2 m + j of the product is output 8 m + 2 t + j) that gives a
// lane eight consecutive outputs: it stores 16 bytes, a group of four lanes 64.
//
// What follows the product:
//   SwiGLU        gate and up columns alternate in groups of 32: silu(gate) * up, half as many columns stored
//   QkNormRope    a warpgroup's 128 columns are a head: RMS norm and rotation of query and key heads
//   Bias          added; the rows are patches of an image, gathered by the bulk copies themselves
//
// Bound by the tensor cores: 2 * TOKENS * FEATURES operations per summed element, for which 32 bytes per clock come out of L2.
#include "common/launch.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "common/cluster.cuh"
#include "common/products.cuh"

constexpr int CONSUMERS = 2;
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int WARPS = WARPGROUP / WARP;  // of one consumer
constexpr int CLUSTER = 2;

constexpr int ROWS = 64;                         // of one product
constexpr int BLOCKS = 2;                        // of rows, of one consumer
constexpr int TOKENS = BLOCKS * ROWS;            // of a tile; block b is fetched by the cluster's block b
constexpr int COLUMNS = 128;                     // of one consumer
constexpr int FEATURES = CONSUMERS * COLUMNS;    // of a tile
constexpr int DEPTH = PANEL;                     // summed elements of a step
constexpr int GROUP = 32;                        // columns that are arranged among themselves
constexpr int GROUPS = COLUMNS / GROUP;
constexpr int STAGES = 4;
static_assert(BLOCKS == CLUSTER);

// Bytes.
constexpr int ROWS_TILE = ROWS * PANEL_ROW_BYTES;
constexpr int GROUP_TILE = GROUP * PANEL_ROW_BYTES;
constexpr int COLUMNS_TILE = COLUMNS * PANEL_ROW_BYTES;
constexpr int STAGE = BLOCKS * ROWS_TILE + CONSUMERS * COLUMNS_TILE;
constexpr int BARRIERS = STAGES * STAGE;
constexpr int SMEM_BYTES = BARRIERS + 2 * 8 * STAGES;
static_assert(SMEM_BYTES <= 227 << 10);

struct Shared {
    uint32_t start;

    __device__ uint32_t rows(int stage, int block) const { return start + stage * STAGE + block * ROWS_TILE; }
    __device__ uint32_t columns(int stage, int consumer) const {
        return start + stage * STAGE + BLOCKS * ROWS_TILE + consumer * COLUMNS_TILE;
    }
    // `ready`: the stage has been filled; `free`: nobody in the cluster reads it any more.
    __device__ uint32_t ready(int stage) const { return start + BARRIERS + 8 * stage; }
    __device__ uint32_t free(int stage) const { return start + BARRIERS + 8 * (STAGES + stage); }
};

struct Problem {
    int tokens, outputs;  // rows and columns of the result
    int depth;            // summed elements
    int column_tiles;     // of FEATURES columns of the product
};

struct Tile {
    int token;   // first row
    int column;  // which tile of columns
};

// Tiles of a cluster: pairs of neighbouring columns, rows first.
__device__ __forceinline__ int count_pairs(const Problem& p) {
    return (p.tokens + TOKENS - 1) / TOKENS * ((p.column_tiles + CLUSTER - 1) / CLUSTER);
}

__device__ __forceinline__ Tile find_tile(const Problem& p, int pair, int rank) {
    const int down = (p.tokens + TOKENS - 1) / TOKENS;
    return {pair % down * TOKENS, pair / down * CLUSTER + rank};
}

// ---- what follows the product, and where its columns come from ----

// The columns of a product are rows of a weight matrix, through a map of four dimensions that arranges groups of 32: element,
// j, m and t of row 8 (m + ..) + 2 t + j. Copies the group that starts at `row`.
__device__ __forceinline__ void copy_group(uint32_t to, const TensorMap& weights, int element, int row, uint32_t barrier) {
    copy_box_4d(to, weights, element, 0, row / 8, 0, barrier);
}

// A lane's eight outputs of a group, from the four tiles of eight columns that start at `tile`.
__device__ __forceinline__ void gather(float (&values)[8], const Accumulators& sums, int tile, int half) {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = sums[tile + i / 2][2 * half + i % 2];
}

struct SwiGlu {
    bf16* output;  // [tokens, outputs]

    // Groups alternate: gate, up.
    __device__ __forceinline__ void copy_columns(
        const TensorMap& weights, const Problem& p, const Tile& tile, int consumer, int element, uint32_t to, uint32_t barrier) const {
        const int first = tile.column * (FEATURES / 2) + consumer * (COLUMNS / 2);
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
            const int row = first + group / 2 * GROUP + group % 2 * p.outputs;
            copy_group(to + group * GROUP_TILE, weights, element, row, barrier);
        }
    }

    __device__ __forceinline__ void finish(
        const Accumulators (&sums)[BLOCKS], const Problem& p, const Tile& tile, int consumer, int row, int member) const {
        const int first = tile.column * (FEATURES / 2) + consumer * (COLUMNS / 2) + member * 8;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = tile.token + block * ROWS + row + 8 * half;
#pragma unroll
                for (int pair = 0; pair < GROUPS / 2; ++pair) {
                    float gate[8], up[8];
                    gather(gate, sums[block], pair * 8, half);
                    gather(up, sums[block], pair * 8 + 4, half);
#pragma unroll
                    for (int i = 0; i < 8; ++i) gate[i] = silu_by_tanh(gate[i]) * up[i];
                    const int output = first + pair * GROUP;
                    if (token < p.tokens && output < p.outputs) {
                        store8(this->output + static_cast<size_t>(token) * p.outputs + output, gate);
                    }
                }
            }
    }
};

// Columns in the order of the weights' rows.
__device__ __forceinline__ void copy_plain_columns(
    const TensorMap& weights, const Tile& tile, int consumer, int element, uint32_t to, uint32_t barrier) {
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        copy_group(to + group * GROUP_TILE, weights, element, tile.column * FEATURES + consumer * COLUMNS + group * GROUP, barrier);
    }
}

struct QkNormRope {
    bf16* output;          // [tokens, outputs], heads of COLUMNS
    const bf16* q_weight;  // [COLUMNS]
    const bf16* k_weight;
    const float* table;  // [table_rows, COLUMNS / 2, 2]: cosine and sine of each pair; token t uses row t % table_rows
    int heads, kv_heads, table_rows;
    float epsilon;

    __device__ __forceinline__ void copy_columns(
        const TensorMap& weights, const Problem&, const Tile& tile, int consumer, int element, uint32_t to, uint32_t barrier) const {
        copy_plain_columns(weights, tile, consumer, element, to, barrier);
    }

    __device__ __forceinline__ void finish(
        const Accumulators (&sums)[BLOCKS], const Problem& p, const Tile& tile, int consumer, int row, int member) const {
        const int head = tile.column * CONSUMERS + consumer;  // queries, then keys, then values
        const bool normalised = head < heads + kv_heads;
        const bf16* const weight = head < heads ? q_weight : k_weight;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = tile.token + block * ROWS + row + 8 * half;
                float squares = 0.0f;
#pragma unroll
                for (int i = 0; i < COLUMNS / 8; ++i)
#pragma unroll
                    for (int j = 0; j < 2; ++j) squares += sums[block][i][2 * half + j] * sums[block][i][2 * half + j];
                // The four lanes of a group share a row.
                squares += __shfl_xor_sync(FULL_WARP, squares, 1);
                squares += __shfl_xor_sync(FULL_WARP, squares, 2);
                const float inverse = rsqrtf(squares / COLUMNS + epsilon);
                if (token >= p.tokens || head * COLUMNS >= p.outputs) continue;
                const float* const angles = table + static_cast<size_t>(token % table_rows) * COLUMNS;
                bf16* const to = output + static_cast<size_t>(token) * p.outputs + head * COLUMNS;
#pragma unroll
                for (int group = 0; group < GROUPS; ++group) {
                    const int channel = group * GROUP + member * 8;
                    float values[8];
                    gather(values, sums[block], group * 4, half);
                    if (normalised) {
                        float factors[8], turn[8];
                        load8(factors, weight + channel);
                        load8(turn, angles + channel);
#pragma unroll
                        for (int i = 0; i < 8; i += 2) {
                            const float a = values[i] * inverse * factors[i], b = values[i + 1] * inverse * factors[i + 1];
                            values[i] = a * turn[i] - b * turn[i + 1];
                            values[i + 1] = a * turn[i + 1] + b * turn[i];
                        }
                    }
                    store8(to + channel, values);
                }
            }
    }
};

struct Bias {
    bf16* output;      // [tokens, outputs]
    const bf16* bias;  // [outputs]

    __device__ __forceinline__ void copy_columns(
        const TensorMap& weights, const Problem&, const Tile& tile, int consumer, int element, uint32_t to, uint32_t barrier) const {
        copy_plain_columns(weights, tile, consumer, element, to, barrier);
    }

    __device__ __forceinline__ void finish(
        const Accumulators (&sums)[BLOCKS], const Problem& p, const Tile& tile, int consumer, int row, int member) const {
        const int first = tile.column * FEATURES + consumer * COLUMNS + member * 8;
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
            const int column = first + group * GROUP;
            if (column >= p.outputs) continue;
            float added[8];
            load8(added, bias + column);
#pragma unroll
            for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int token = tile.token + block * ROWS + row + 8 * half;
                    float values[8];
                    gather(values, sums[block], group * 4, half);
#pragma unroll
                    for (int i = 0; i < 8; ++i) values[i] += added[i];
                    if (token < p.tokens) store8(output + static_cast<size_t>(token) * p.outputs + column, values);
                }
        }
    }
};

// ---- where the rows come from ----

// Rows of a matrix [tokens, depth].
struct MatrixRows {
    __device__ __forceinline__ void copy(
        uint32_t to, const TensorMap& map, const Problem&, int element, int token, uint32_t barrier, uint16_t blocks) const {
        copy_box_2d_to(to, map, element, token, barrier, blocks);
    }
};

// Patches of an image: the map's dimensions are the elements of a patch's row, patches across, rows of a patch, patches down. A
// block of ROWS tokens lies in one row of patches: there are a multiple of ROWS across.
struct PatchRows {
    int steps_per_row;  // DEPTH elements each
    int across;

    __device__ __forceinline__ void copy(
        uint32_t to, const TensorMap& map, const Problem&, int element, int token, uint32_t barrier, uint16_t blocks) const {
        const int step = element / DEPTH;
        copy_box_4d_to(to, map, step % steps_per_row * DEPTH, token % across, step / steps_per_row, token / across, barrier, blocks);
    }
};

// ---- the loop ----

template <class Rows, class End>
__device__ __forceinline__ void produce(
    const TensorMap& x, const TensorMap& weights, const Problem& p, const Rows& rows, const End& end, const Shared& shared, int rank) {
    const int pairs = count_pairs(p);
    unsigned use = 0;
    for (int pair = blockIdx.x / CLUSTER; pair < pairs; pair += gridDim.x / CLUSTER) {
        const Tile tile = find_tile(p, pair, rank);
        for (int element = 0; element < p.depth; element += DEPTH, ++use) {
            const int stage = use % STAGES;
            const uint32_t ready = shared.ready(stage);
            cluster_barrier_wait(shared.free(stage), (use / STAGES + 1) % 2);
            barrier_arrive_expecting(ready, STAGE);
            rows.copy(shared.rows(stage, rank), x, p, element, tile.token + rank * ROWS, ready, (1 << CLUSTER) - 1);
#pragma unroll
            for (int consumer = 0; consumer < CONSUMERS; ++consumer) {
                end.copy_columns(weights, p, tile, consumer, element, shared.columns(stage, consumer), ready);
            }
        }
    }
}

// Tells the producers of the whole cluster that this warp's part of the products that read a stage is complete.
__device__ __forceinline__ void release(uint32_t barrier) {
    const int lane = threadIdx.x % WARP;
    if (lane < CLUSTER) barrier_arrive_at(barrier, lane);
}

template <class End>
__device__ __forceinline__ void consume(const Problem& p, const End& end, const Shared& shared, int rank, int consumer) {
    const int lane = threadIdx.x % WARP, row = threadIdx.x / WARP % WARPS * 16 + lane / 4;
    const int pairs = count_pairs(p);
    unsigned use = 0;
    for (int pair = blockIdx.x / CLUSTER; pair < pairs; pair += gridDim.x / CLUSTER) {
        Accumulators sums[BLOCKS];
        hold(sums[0]);
        hold(sums[1]);
        int before = 0;
        for (int element = 0; element < p.depth; element += DEPTH, ++use) {
            const int stage = use % STAGES;
            barrier_wait(shared.ready(stage), use / STAGES % 2);
            product_fence();
#pragma unroll
            for (int offset = 0; offset < PANEL_ROW_BYTES; offset += PRODUCT_DEPTH * 2)
#pragma unroll
                for (int block = 0; block < BLOCKS; ++block) {
                    issue_product(sums[block], operand_by_rows(shared.rows(stage, block), offset),
                                  operand_by_rows(shared.columns(stage, consumer), offset), element > 0 || offset > 0);
                }
            product_commit();
            products_wait<1>();  // all but this step's
            if (element > 0) release(shared.free(before));
            before = stage;
        }
        products_wait<0>();
        hold(sums[0]);
        hold(sums[1]);
        release(shared.free(before));
        end.finish(sums, p, find_tile(p, pair, rank), consumer, row, lane % 4);
    }
}

template <class Rows, class End>
__device__ __forceinline__ void linear(
    const TensorMap& x, const TensorMap& weights, const Problem& p, const Rows& rows, const End& end) {
    // All registers of the multiprocessor: what the launch gives each thread, shared out anew.
    constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
    static_assert((PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) * WARPGROUP <= 65536);
    extern __shared__ __align__(1024) unsigned char memory[];
    const Shared shared{shared_address(memory)};
    if (threadIdx.x == 0) {
        prefetch_map(x);
        prefetch_map(weights);
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(shared.ready(stage), 1);
            barrier_init(shared.free(stage), CLUSTER * CONSUMERS * WARPS);
        }
        barriers_ready();
    }
    cluster_sync();  // the barriers of both blocks are initialised before anybody uses them

    const int rank = cluster_rank();
    // The same for all threads of a warp, and known to the compiler as such.
    const int warp = __shfl_sync(FULL_WARP, threadIdx.x / WARP, 0);
    if (warp < WARPS) {
        registers_give<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) produce(x, weights, p, rows, end, shared, rank);
    } else {
        registers_take<CONSUMER_REGISTERS>();
        consume(p, end, shared, rank, warp / WARPS - 1);
    }
    cluster_sync();  // nobody leaves while the other block still copies into its memory or arrives at its barriers
}

// x: map of the rows by boxes of DEPTH elements and ROWS rows; weights: map [rows, depth] arranged as `copy_group` says, by boxes of
// DEPTH elements and GROUP rows. Outputs are multiples of 8. The launch's tile: rows, columns, summed elements, rows of a box.
// The grid is an even number of blocks, at most as many as the GPU has multiprocessors.
#define LINEAR_KERNEL __global__ __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)

// weights [2 outputs, depth]: gate, then up; outputs are multiples of GROUP.
extern "C" LINEAR_KERNEL void linear_swiglu(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weights, bf16* output, int tokens, int outputs, int depth) {
    const Problem p = {tokens, outputs, depth, (2 * outputs + FEATURES - 1) / FEATURES};
    linear(x, weights, p, MatrixRows{}, SwiGlu{output});
}
L2P_LAUNCH(linear_swiglu, THREADS, SMEM_BYTES, TOKENS, FEATURES, DEPTH, ROWS)

extern "C" LINEAR_KERNEL void linear_qk_norm_rope(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weights, bf16* output, const bf16* q_weight,
    const bf16* k_weight, const float* table, int tokens, int depth, int heads, int kv_heads, int table_rows, float epsilon) {
    const int outputs = (heads + 2 * kv_heads) * COLUMNS;
    const Problem p = {tokens, outputs, depth, (outputs + FEATURES - 1) / FEATURES};
    linear(x, weights, p, MatrixRows{}, QkNormRope{output, q_weight, k_weight, table, heads, kv_heads, table_rows, epsilon});
}
L2P_LAUNCH(linear_qk_norm_rope, THREADS, SMEM_BYTES, TOKENS, FEATURES, DEPTH, ROWS)

extern "C" LINEAR_KERNEL void linear_patches(
    const __grid_constant__ TensorMap image, const __grid_constant__ TensorMap weights, bf16* output, const bf16* bias, int tokens,
    int outputs, int depth, int steps_per_row, int across) {
    const Problem p = {tokens, outputs, depth, (outputs + FEATURES - 1) / FEATURES};
    linear(image, weights, p, PatchRows{steps_per_row, across}, Bias{output, bias});
}
L2P_LAUNCH(linear_patches, THREADS, SMEM_BYTES, TOKENS, FEATURES, DEPTH, ROWS)
#endif
