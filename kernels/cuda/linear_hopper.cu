// Linear layers by Hopper's warpgroup products, with what follows them done in registers; engine/src/ops/linear_swiglu.rs
// and patch_embed.rs hold the contracts.
//
// A block makes tiles of TOKENS rows by FEATURES columns of x weightᵀ: two consumer warpgroups take half of the rows each, a
// producer fills a ring of STAGES steps of DEPTH summed elements by bulk copies. Products are as wide as there are, which reads
// the least from shared memory. Two blocks form a cluster: they work on the same rows and neighbouring columns, and each fetches
// half of the rows' elements for both. Blocks stay on their multiprocessor and take one tile after the other.
//
// A lane's pairs of columns are exchanged within groups of four lanes before they are stored, 16 bytes a lane.
//
// What follows the product:
//   SwiGLU        a tile's columns are 128 of gate and the same of up: silu(gate) * up, half as many columns stored
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

constexpr int ROWS = 64;                  // of one product, and of a box of either operand
constexpr int TOKENS = CONSUMERS * ROWS;  // of a tile; each consumer's are fetched by one block of the cluster
constexpr int FEATURES = 256;             // of a tile and of one product
constexpr int COLUMN_BOXES = FEATURES / ROWS;
constexpr int DEPTH = PANEL;  // summed elements of a step
constexpr int GROUP = 32;     // columns whose pairs are exchanged between four lanes
constexpr int STAGES = 4;
constexpr int BAND = 4;       // pairs of neighbouring columns; see find_tile
static_assert(CONSUMERS == CLUSTER);

// Bytes.
constexpr int BOX = ROWS * PANEL_ROW_BYTES;
constexpr int STAGE = (CONSUMERS + COLUMN_BOXES) * BOX;
constexpr int BARRIERS = STAGES * STAGE;
constexpr int SMEM_BYTES = BARRIERS + 2 * 8 * STAGES;
static_assert(SMEM_BYTES <= 227 << 10);

struct Shared {
    uint32_t start;

    __device__ uint32_t rows(int stage, int consumer) const { return start + stage * STAGE + consumer * BOX; }
    __device__ uint32_t columns(int stage) const { return start + stage * STAGE + CONSUMERS * BOX; }
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

// Tiles of a cluster: pairs of neighbouring columns.
__device__ __forceinline__ int count_pairs(const Problem& p) {
    return (p.tokens + TOKENS - 1) / TOKENS * ((p.column_tiles + CLUSTER - 1) / CLUSTER);
}

// Columns first within bands of BAND pairs of columns, then rows, every other band upwards: the clusters that run together read about
// as many bytes of x as of weights, a band's weights stay in L2 for as long as it lasts, and the next begins with the rows that
// this one has left there.
__device__ __forceinline__ Tile find_tile(const Problem& p, int pair, int rank) {
    const int down = (p.tokens + TOKENS - 1) / TOKENS, across = (p.column_tiles + CLUSTER - 1) / CLUSTER;
    const int band = pair / (down * BAND), width = min(BAND, across - band * BAND), index = pair - band * down * BAND;
    const int row = band % 2 == 0 ? index / width : down - 1 - index / width;
    return {row * TOKENS, (band * BAND + index % width) * CLUSTER + rank};
}

// ---- what follows the product, and where its columns come from ----

// What a consumer's lanes hold of a tile: as Accumulators in common/hopper.cuh, of FEATURES columns.
using Sums = Sums64<FEATURES>;

// Lane m of four holds pairs of columns, pair[t] being columns 8 t + 2 m and the next; afterwards it holds columns 8 m to 8 m + 7.
__device__ __forceinline__ Bf16x8 exchange(__nv_bfloat162 (&pair)[4], int member) {
    uint32_t words[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) words[t] = *reinterpret_cast<uint32_t*>(&pair[t]);
    // Transposes 4 x 4 words: first within the quarters' 2 x 2 words, then the quarters.
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = member & bit;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            if (t & bit) continue;
            const uint32_t received = __shfl_xor_sync(FULL_WARP, upper ? words[t] : words[t | bit], bit);
            if (upper) {
                words[t] = received;
            } else {
                words[t | bit] = received;
            }
        }
    }
    Bf16x8 run;
#pragma unroll
    for (int i = 0; i < 4; ++i) run.pair[i] = *reinterpret_cast<__nv_bfloat162*>(&words[i]);
    return run;
}

struct SwiGlu {
    bf16* output;  // [tokens, outputs]

    // Which row of the weights box `box` starts with: gate, then up.
    __device__ __forceinline__ int box_row(const Problem& p, const Tile& tile, int box) const {
        return tile.column * (FEATURES / 2) + box % (COLUMN_BOXES / 2) * ROWS + box / (COLUMN_BOXES / 2) * p.outputs;
    }

    __device__ __forceinline__ void finish(const Sums& sums, const Problem& p, const Tile& tile, int row, int member) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = tile.token + row + 8 * half;
#pragma unroll
            for (int group = 0; group < FEATURES / 2 / GROUP; ++group) {
                __nv_bfloat162 pairs[4];
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    const float* const gate = &sums[group * 4 + t][2 * half];
                    const float* const up = &sums[FEATURES / 16 + group * 4 + t][2 * half];
                    pairs[t] = __floats2bfloat162_rn(silu_by_tanh(gate[0]) * up[0], silu_by_tanh(gate[1]) * up[1]);
                }
                const Bf16x8 run = exchange(pairs, member);
                const int output = tile.column * (FEATURES / 2) + group * GROUP + 8 * member;
                if (token < p.tokens && output < p.outputs) {
                    *reinterpret_cast<Bf16x8*>(this->output + static_cast<size_t>(token) * p.outputs + output) = run;
                }
            }
        }
    }
};

struct Bias {
    bf16* output;      // [tokens, outputs]
    const bf16* bias;  // [outputs]

    __device__ __forceinline__ int box_row(const Problem&, const Tile& tile, int box) const { return tile.column * FEATURES + box * ROWS; }

    __device__ __forceinline__ void finish(const Sums& sums, const Problem& p, const Tile& tile, int row, int member) const {
#pragma unroll
        for (int group = 0; group < FEATURES / GROUP; ++group) {
            const int first = tile.column * FEATURES + group * GROUP;
            float2 added[4] = {};
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                const int column = first + 8 * t + 2 * member;
                if (column < p.outputs) added[t] = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(bias + column));
            }
            const int column = first + 8 * member;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = tile.token + row + 8 * half;
                __nv_bfloat162 pairs[4];
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    const float* const sum = &sums[group * 4 + t][2 * half];
                    pairs[t] = __floats2bfloat162_rn(sum[0] + added[t].x, sum[1] + added[t].y);
                }
                const Bf16x8 run = exchange(pairs, member);
                if (token < p.tokens && column < p.outputs) {
                    *reinterpret_cast<Bf16x8*>(output + static_cast<size_t>(token) * p.outputs + column) = run;
                }
            }
        }
    }
};

// ---- where the rows come from ----

constexpr uint16_t ALL = (1 << CLUSTER) - 1;

// Rows of a matrix [tokens, depth].
struct MatrixRows {
    __device__ __forceinline__ void copy(uint32_t to, const TensorMap& map, int element, int token, uint32_t barrier) const {
        copy_box_2d_to(to, map, element, token, barrier, ALL);
    }
};

// Patches of an image: the map's dimensions are the elements of a patch's row, patches across, rows of a patch, patches down. A
// block of ROWS tokens lies in one row of patches: there are a multiple of ROWS across.
struct PatchRows {
    int steps_per_row;  // DEPTH elements each
    int across;

    __device__ __forceinline__ void copy(uint32_t to, const TensorMap& map, int element, int token, uint32_t barrier) const {
        const int step = element / DEPTH;
        copy_box_4d_to(to, map, step % steps_per_row * DEPTH, token % across, step / steps_per_row, token / across, barrier, ALL);
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
            barrier_wait(shared.free(stage), (use / STAGES + 1) % 2);
            barrier_arrive_expecting(ready, STAGE);
            // The rows are the cluster's: each block fetches half of them for both.
            rows.copy(shared.rows(stage, rank), x, element, tile.token + rank * ROWS, ready);
#pragma unroll
            for (int box = 0; box < COLUMN_BOXES; ++box) {
                copy_box_2d(shared.columns(stage) + box * BOX, weights, element, end.box_row(p, tile, box), ready);
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
    const int lane = threadIdx.x % WARP, row = consumer * ROWS + threadIdx.x / WARP % WARPS * 16 + lane / 4;
    const int pairs = count_pairs(p);
    unsigned use = 0;
    for (int pair = blockIdx.x / CLUSTER; pair < pairs; pair += gridDim.x / CLUSTER) {
        Sums sums;
        hold(sums);
        int before = 0;
        for (int element = 0; element < p.depth; element += DEPTH, ++use) {
            const int stage = use % STAGES;
            barrier_wait(shared.ready(stage), use / STAGES % 2);
            product_fence();
#pragma unroll
            for (int offset = 0; offset < PANEL_ROW_BYTES; offset += PRODUCT_DEPTH * 2) {
                issue_by_rows(sums, operand_by_rows(shared.rows(stage, consumer), offset),
                              operand_by_rows(shared.columns(stage), offset), element > 0 || offset > 0);
            }
            product_commit();
            products_wait<1>();  // all but this step's
            if (element > 0) release(shared.free(before));
            before = stage;
        }
        products_wait<0>();
        hold(sums);
        release(shared.free(before));
        end.finish(sums, p, find_tile(p, pair, rank), row, lane % 4);
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

// x, weights: maps by boxes of DEPTH elements and ROWS rows. Outputs are multiples of 8. The launch's tile: rows, columns, summed
// elements, rows of a box.
// The grid is an even number of blocks, at most as many as the GPU has multiprocessors.
#define LINEAR_KERNEL __global__ __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)

// weights [2 outputs, depth]: gate, then up; outputs are multiples of GROUP.
extern "C" LINEAR_KERNEL void linear_swiglu(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weights, bf16* output, int tokens, int outputs, int depth) {
    const Problem p = {tokens, outputs, depth, (2 * outputs + FEATURES - 1) / FEATURES};
    linear(x, weights, p, MatrixRows{}, SwiGlu{output});
}
L2P_LAUNCH(linear_swiglu, THREADS, SMEM_BYTES, TOKENS, FEATURES, DEPTH, ROWS)

extern "C" LINEAR_KERNEL void linear_patches(
    const __grid_constant__ TensorMap image, const __grid_constant__ TensorMap weights, bf16* output, const bf16* bias, int tokens,
    int outputs, int depth, int steps_per_row, int across) {
    const Problem p = {tokens, outputs, depth, (outputs + FEATURES - 1) / FEATURES};
    linear(image, weights, p, PatchRows{steps_per_row, across}, Bias{output, bias});
}
L2P_LAUNCH(linear_patches, THREADS, SMEM_BYTES, TOKENS, FEATURES, DEPTH, ROWS)
#endif
