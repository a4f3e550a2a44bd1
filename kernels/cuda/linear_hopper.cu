// Linear layers by Hopper's warpgroup products, with what follows them done in registers; engine/src/ops/linear_swiglu.rs
// and patch_embed.rs hold the contracts.
//
// A block makes tiles of BLOCK_M rows (tokens) by BLOCK_N columns (features) of x weightᵀ: two consumer warpgroups take half
// of the rows each, a producer fills a ring of STAGES steps of BLOCK_K summed elements by bulk copies (common/pipeline.cuh).
// Products are as wide as there are, which reads the least from shared memory. Two blocks form a cluster: they work on the
// same rows and neighbouring columns, and each fetches half of the rows' elements for both (multicast). Blocks stay on their
// multiprocessor and take one tile after the other (a persistent kernel).
//
// A lane's pairs of columns are exchanged within groups of four lanes before they are stored, 16 bytes a lane.
//
// What follows the product:
//   SwiGLU        a tile's columns are 128 of gate and the same of up: silu(gate) * up, half as many columns stored
//   Bias          added; the rows are patches of an image, gathered by the bulk copies themselves
//
// Bound by the tensor cores: 2 * BLOCK_M * BLOCK_N operations per summed element, for which 32 bytes per clock come out of L2.
#include "common/launch.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "common/pipeline.cuh"

constexpr int CONSUMERS = 2;
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int CLUSTER = 2;

constexpr int ROWS = MMA_M;                // of one product, and of a box of either operand
constexpr int BLOCK_M = CONSUMERS * ROWS;  // tokens of a tile; each consumer's are fetched by one block of the cluster
constexpr int BLOCK_N = 256;               // features of a tile and of one product
constexpr int BLOCK_K = PANEL;             // summed elements of a step
constexpr int COLUMN_BOXES = BLOCK_N / ROWS;
constexpr int GROUP = 32;  // columns whose pairs are exchanged between four lanes
constexpr int STAGES = 4;
constexpr int BAND = 4;  // pairs of neighbouring columns; see find_tile
static_assert(CONSUMERS == CLUSTER);
using Ring = Pipeline<STAGES, unsigned>;

// Bytes.
constexpr int BOX = ROWS * PANEL_ROW_BYTES;
constexpr int STAGE = (CONSUMERS + COLUMN_BOXES) * BOX;
constexpr int BARRIERS = STAGES * STAGE;
constexpr int SMEM_BYTES = BARRIERS + Ring::BYTES;
static_assert(SMEM_BYTES <= MAX_SHARED_BYTES);

struct Shared {
    uint32_t start;

    __device__ uint32_t rows(int stage, int consumer) const { return start + stage * STAGE + consumer * BOX; }
    __device__ uint32_t columns(int stage) const { return start + stage * STAGE + CONSUMERS * BOX; }
    // A stage is empty when nobody in the cluster reads it any more.
    __device__ Ring ring() const { return {start + BARRIERS}; }
};

struct Problem {
    int tokens, outputs;  // rows and columns of the result
    int depth;            // summed elements
    int column_tiles;     // of BLOCK_N columns of the product
};

struct Tile {
    int token;   // first row
    int column;  // which tile of columns
};

// The summed elements of a problem.
__device__ __forceinline__ int summed(int depth) { return L2P_FAULT_IF(9, max(depth - BLOCK_K, BLOCK_K), depth); }

// Tiles of a cluster: pairs of neighbouring columns.
__device__ __forceinline__ int count_pairs(const Problem& p) {
    return (p.tokens + BLOCK_M - 1) / BLOCK_M * ((p.column_tiles + CLUSTER - 1) / CLUSTER);
}

// Columns first within bands of BAND pairs of columns, then rows, every other band upwards: the clusters that run together
// read about as many bytes of x as of weights, a band's weights stay in L2 for as long as it lasts, and the next begins with
// the rows that this one has left there.
__device__ __forceinline__ Tile find_tile(const Problem& p, int pair, int rank) {
    const int down = (p.tokens + BLOCK_M - 1) / BLOCK_M, across = (p.column_tiles + CLUSTER - 1) / CLUSTER;
    const int band = pair / (down * BAND), width = min(BAND, across - band * BAND), index = pair - band * down * BAND;
    const int row = band % 2 == 0 ? index / width : down - 1 - index / width;
    return {row * BLOCK_M, (band * BAND + index % width) * CLUSTER + rank};
}

// ---- what follows the product, and where its columns come from ----

// What a consumer's lanes hold of a tile.
using Sums = Accumulators<BLOCK_N>;

// Lane m of four holds pairs of columns, pair[t] being columns 8 t + 2 m and the next; afterwards it holds columns 8 m to 8 m
// + 7.
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
        return tile.column * (BLOCK_N / 2) + box % (COLUMN_BOXES / 2) * ROWS + box / (COLUMN_BOXES / 2) * p.outputs;
    }

    __device__ __forceinline__ void finish(const Sums& sums, const Problem& p, const Tile& tile, int row, int member) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = tile.token + row + 8 * half;
#pragma unroll
            for (int group = 0; group < BLOCK_N / 2 / GROUP; ++group) {
                __nv_bfloat162 pairs[4];
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    const float* const gate = &sums[group * 4 + t][2 * half];
                    const float* const up = &sums[BLOCK_N / 16 + group * 4 + t][2 * half];
                    pairs[t] = __floats2bfloat162_rn(silu_by_tanh(gate[0]) * up[0], silu_by_tanh(gate[1]) * up[1]);
                }
                const Bf16x8 run = exchange(pairs, member);
                const int output = tile.column * (BLOCK_N / 2) + group * GROUP + 8 * member;
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

    __device__ __forceinline__ int box_row(const Problem&, const Tile& tile, int box) const {
        return tile.column * BLOCK_N + box * ROWS;
    }

    __device__ __forceinline__ void finish(const Sums& sums, const Problem& p, const Tile& tile, int row, int member) const {
#pragma unroll
        for (int group = 0; group < BLOCK_N / GROUP; ++group) {
            const int first = tile.column * BLOCK_N + group * GROUP;
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
    __device__ __forceinline__ void load(uint32_t to, const TensorMap& map, uint32_t full, int element, int token) const {
        tma_load_multicast(to, map, full, ALL, element, token);
    }
};

// Patches of an image: the map's dimensions are the elements of a patch's row, patches across, rows of a patch, patches down. A
// block of ROWS tokens lies in one row of patches: there are a multiple of ROWS across.
struct PatchRows {
    int steps_per_row;  // BLOCK_K elements each
    int across;

    __device__ __forceinline__ void load(uint32_t to, const TensorMap& map, uint32_t full, int element, int token) const {
        const int step = element / BLOCK_K;
        const int column = step % steps_per_row * BLOCK_K, row = step / steps_per_row;
        tma_load_multicast(to, map, full, ALL, column, token % across, row, token / across);
    }
};

// ---- the loop ----

template <class Rows, class End>
__device__ __forceinline__ void produce(
    const TensorMap& x, const TensorMap& weights, const Problem& p, const Rows& rows, const End& end, const Shared& shared, int rank) {
    const int pairs = count_pairs(p);
    Ring::State state;
    for (int pair = blockIdx.x / CLUSTER; pair < pairs; pair += gridDim.x / CLUSTER) {
        const Tile tile = find_tile(p, pair, rank);
        for (int element = 0; element < p.depth; element += BLOCK_K, ++state.use) {
            const int stage = state.stage();
            const uint32_t full = shared.ring().producer_acquire(state, STAGE);
            // The rows are the cluster's: each block fetches half of them for both.
            rows.load(shared.rows(stage, rank), x, full, element, tile.token + L2P_FAULT_IF(20, 1 - rank, rank) * ROWS);
#pragma unroll
            for (int box = 0; box < COLUMN_BOXES; ++box) {
                tma_load(shared.columns(stage) + box * BOX, weights, full, element, end.box_row(p, tile, box));
            }
        }
    }
}

template <class End>
__device__ __forceinline__ void consume(const Problem& p, const End& end, const Shared& shared, int rank, int consumer) {
    const int lane = threadIdx.x % WARP, row = consumer * ROWS + threadIdx.x / WARP % WARPGROUP_WARPS * 16 + lane / 4;
    const int pairs = count_pairs(p);
    Ring::State state;
    for (int pair = blockIdx.x / CLUSTER; pair < pairs; pair += gridDim.x / CLUSTER) {
        Sums sums;
        hold(sums);
        int before = 0;
        for (int element = 0; element < p.depth; element += BLOCK_K, ++state.use) {
            const int stage = state.stage();
            shared.ring().consumer_wait(state);
            wgmma_fence();
#pragma unroll
            for (int offset = 0; offset < PANEL_ROW_BYTES; offset += MMA_K<bf16> * sizeof(bf16)) {
                wgmma(sums, k_major_panel(shared.rows(stage, consumer), offset), k_major_panel(shared.columns(stage), offset),
                      element > 0 || offset > 0);
            }
            wgmma_commit();
            wgmma_wait<1>();  // all but this step's
            if (element > 0) shared.ring().consumer_release_cluster<CLUSTER>(before);
            before = stage;
        }
        wgmma_wait<0>();
        hold(sums);
        shared.ring().consumer_release_cluster<CLUSTER>(before);
        end.finish(sums, p, find_tile(p, pair, rank), row, lane % 4);
    }
}

template <class Rows, class End>
__device__ __forceinline__ void linear(
    const TensorMap& x, const TensorMap& weights, const Problem& p, const Rows& rows, const End& end) {
    // All registers of the multiprocessor: what the launch gives each thread, shared out anew.
    constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
    static_assert((PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) * WARPGROUP <= REGISTERS_OF_MULTIPROCESSOR);
    extern __shared__ __align__(1024) unsigned char memory[];
    const Shared shared{shared_address(memory)};
    if (threadIdx.x == 0) {
        tma_prefetch(x);
        tma_prefetch(weights);
        shared.ring().init(CLUSTER * CONSUMERS * WARPGROUP_WARPS);
        mbarrier_init_fence();
    }
    cluster_sync();  // the barriers of both blocks are initialised before anybody uses them

    const int rank = cluster_rank();
    const int warp = uniform_warp();
    if (warp < WARPGROUP_WARPS) {
        warpgroup_reg_dealloc<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) produce(x, weights, p, rows, end, shared, rank);
    } else {
        warpgroup_reg_alloc<CONSUMER_REGISTERS>();
        consume(p, end, shared, rank, warp / WARPGROUP_WARPS - 1);
    }
    cluster_sync();  // nobody leaves while the other block still copies into its memory or arrives at its barriers
}

// x, weights: maps by boxes of BLOCK_K elements and ROWS rows. Outputs are multiples of 8. The launch's tile: rows, columns,
// summed elements, rows of a box. The grid is an even number of blocks, at most as many as the GPU has multiprocessors.
#define LINEAR_KERNEL __global__ __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)

// weights [2 outputs, depth]: gate, then up; outputs are multiples of GROUP.
extern "C" LINEAR_KERNEL void linear_swiglu(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weights, bf16* output, int tokens, int outputs, int depth) {
    const Problem p = {tokens, outputs, summed(depth), (2 * outputs + BLOCK_N - 1) / BLOCK_N};
    linear(x, weights, p, MatrixRows{}, SwiGlu{output});
}
L2P_LAUNCH(linear_swiglu, THREADS, SMEM_BYTES, BLOCK_M, BLOCK_N, BLOCK_K, ROWS)

extern "C" LINEAR_KERNEL void linear_patches(
    const __grid_constant__ TensorMap image, const __grid_constant__ TensorMap weights, bf16* output, const bf16* bias, int tokens,
    int outputs, int depth, int steps_per_row, int across) {
    const Problem p = {tokens, outputs, summed(depth), (outputs + BLOCK_N - 1) / BLOCK_N};
    linear(image, weights, p, PatchRows{steps_per_row, across}, Bias{output, bias});
}
L2P_LAUNCH(linear_patches, THREADS, SMEM_BYTES, BLOCK_M, BLOCK_N, BLOCK_K, ROWS)
#endif
