// Linear layers by Hopper's warpgroup products: the loop that linear_hopper.cu and linear_quantised_hopper.cu share. Use inside
// `#if defined(__CUDA_ARCH_FEAT_SM90_ALL)`.
//
// A block makes tiles of BLOCK_M rows (tokens) by BLOCK_N columns (features) of x weightᵀ: two consumer warpgroups take half
// of the rows each, a producer fills a ring of STAGES steps of BLOCK_K summed elements by bulk copies (common/pipeline.cuh).
// A step is 128 bytes of each operand's rows, whatever its type. Two blocks form a cluster: they work on the same rows and
// neighbouring columns, and each fetches half of the rows' elements for both (multicast). Blocks stay on their multiprocessor
// and take one tile after the other (a persistent kernel).
//
// An end says which rows of the weights are a tile's columns (`box_row`), whether sums are whole or scaled group by group
// (`Totals`), and what becomes of them in registers (`finish`).
//
// Bound by the tensor cores: 2 * BLOCK_M * BLOCK_N operations per summed element; from L2 come 64 + BLOCK_N bytes per byte of a row.
#pragma once
#include "common/pipeline.cuh"

constexpr int CONSUMERS = 2;
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int CLUSTER = 2;
constexpr uint16_t ALL = (1 << CLUSTER) - 1;  // blocks of the cluster

constexpr int ROWS = MMA_M;                // of one product, and of a box of either operand
constexpr int BLOCK_M = CONSUMERS * ROWS;  // tokens of a tile; each consumer's are fetched by one block of the cluster
constexpr int BOX = ROWS * PANEL_ROW_BYTES;
constexpr int BAND = 4;  // pairs of neighbouring columns; see find_tile
static_assert(CONSUMERS == CLUSTER);

template <class Operand>
struct SumOf {
    using Type = float;
};
template <>
struct SumOf<s8> {
    using Type = int32_t;
};

// Tiles of operands of one type, and where they stand in shared memory.
template <class OperandType, int COLUMNS, int RING_STAGES>
struct Tiling {
    using Operand = OperandType;
    static constexpr int BLOCK_N = COLUMNS;  // features of a tile and of one product
    static constexpr int BLOCK_K = PANEL_ROW_BYTES / sizeof(Operand);
    static constexpr int COLUMN_BOXES = BLOCK_N / ROWS;
    static_assert(BLOCK_N % ROWS == 0);
    using Ring = Pipeline<RING_STAGES, unsigned>;
    using Sums = Accumulators<BLOCK_N, typename SumOf<Operand>::Type>;  // what a consumer's lanes hold of a tile

    // Bytes.
    static constexpr int STAGE = (CONSUMERS + COLUMN_BOXES) * BOX;
    static constexpr int BARRIERS = RING_STAGES * STAGE;
    static constexpr int SMEM_BYTES = BARRIERS + Ring::BYTES;
    static_assert(SMEM_BYTES <= MAX_SHARED_BYTES);

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

// ---- where the rows come from ----

// Rows of a matrix [tokens, depth].
struct MatrixRows {
    __device__ __forceinline__ void load(uint32_t to, const TensorMap& map, uint32_t full, int element, int token) const {
        tma_load_multicast(to, map, full, ALL, element, token);
    }
};

// ---- what is added up ----

// One step of products, as a group of its own: sums = or += rows columnsᵀ.
template <class Tiles>
__device__ __forceinline__ void issue_step(typename Tiles::Sums& sums, const Tiles& shared, int stage, int consumer, bool add) {
    using Operand = typename Tiles::Operand;
#pragma unroll
    for (int offset = 0; offset < PANEL_ROW_BYTES; offset += MMA_K<Operand> * sizeof(Operand)) {
        wgmma<Operand>(sums, k_major_panel(shared.rows(stage, consumer), offset), k_major_panel(shared.columns(stage), offset),
                       add || offset > 0);
    }
    wgmma_commit();
}

// All summed elements at once.
template <class Tiles>
struct Whole {
    using Totals = typename Tiles::Sums;

    __device__ __forceinline__ void add_up(
        Totals& sums, typename Tiles::Ring::State& state, const Tiles& shared, const Problem& p, const Tile&, int consumer, int) const {
        hold(sums);
        int before = 0;
        for (int element = 0; element < p.depth; element += Tiles::BLOCK_K, ++state.use) {
            const int stage = state.stage();
            shared.ring().consumer_wait(state);
            wgmma_fence();
            issue_step(sums, shared, stage, consumer, element > 0);
            wgmma_wait<1>();  // all but this step's
            if (element > 0) shared.ring().template consumer_release_cluster<CLUSTER>(before);
            before = stage;
        }
        wgmma_wait<0>();
        hold(sums);
        shared.ring().template consumer_release_cluster<CLUSTER>(before);
    }
};

// ---- what ends share ----

constexpr int STORED_COLUMNS = 32;  // whose pairs are exchanged between four lanes

// Lane `member` of four holds pairs of columns, pair[t] being columns 8 t + 2 member and the next; afterwards it holds columns
// 8 member to 8 member + 7.
__device__ __forceinline__ Bf16x8 exchange(__nv_bfloat162 (&pair)[4], int member) {
    uint32_t words[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) words[t] = *reinterpret_cast<uint32_t*>(&pair[t]);
    exchange_words(words, member);
    Bf16x8 run;
#pragma unroll
    for (int i = 0; i < 4; ++i) run.pair[i] = *reinterpret_cast<__nv_bfloat162*>(&words[i]);
    return run;
}

// ---- the loop ----

template <class Tiles, class Rows, class End>
__device__ __forceinline__ void produce(
    const TensorMap& x, const TensorMap& weights, const Problem& p, const Rows& rows, const End& end, const Tiles& shared, int rank) {
    const int pairs = count_pairs(p);
    typename Tiles::Ring::State state;
    for (int pair = blockIdx.x / CLUSTER; pair < pairs; pair += gridDim.x / CLUSTER) {
        const Tile tile = find_tile(p, pair, rank);
        for (int element = 0; element < p.depth; element += Tiles::BLOCK_K, ++state.use) {
            const int stage = state.stage();
            const uint32_t full = shared.ring().producer_acquire(state, Tiles::STAGE);
            // The rows are the cluster's: each block fetches half of them for both.
            rows.load(shared.rows(stage, rank), x, full, element, tile.token + L2P_FAULT_IF(20, 1 - rank, rank) * ROWS);
#pragma unroll
            for (int box = 0; box < Tiles::COLUMN_BOXES; ++box) {
                tma_load(shared.columns(stage) + box * BOX, weights, full, element, end.box_row(p, tile, box));
            }
        }
    }
}

template <class Tiles, class Sum, class End>
__device__ __forceinline__ void consume(const Problem& p, const Sum& sum, const End& end, const Tiles& shared, int rank, int consumer) {
    const int lane = threadIdx.x % WARP, row = consumer * ROWS + threadIdx.x / WARP % WARPGROUP_WARPS * 16 + lane / 4;
    const int pairs = count_pairs(p);
    typename Tiles::Ring::State state;
    for (int pair = blockIdx.x / CLUSTER; pair < pairs; pair += gridDim.x / CLUSTER) {
        const Tile tile = find_tile(p, pair, rank);
        typename Sum::Totals totals;
        sum.add_up(totals, state, shared, p, tile, consumer, row);
        end.finish(totals, p, tile, row, lane % 4);
    }
}

template <class Tiles, class Rows, class Sum, class End>
__device__ __forceinline__ void linear(
    const TensorMap& x, const TensorMap& weights, const Problem& p, const Rows& rows, const Sum& sum, const End& end) {
    // All registers of the multiprocessor: what the launch gives each thread, shared out anew.
    constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
    static_assert((PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) * WARPGROUP <= REGISTERS_OF_MULTIPROCESSOR);
    extern __shared__ __align__(1024) unsigned char memory[];
    const Tiles shared{shared_address(memory)};
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
        consume(p, sum, end, shared, rank, warp / WARPGROUP_WARPS - 1);
    }
    cluster_sync();  // nobody leaves while the other block still copies into its memory or arrives at its barriers
}

// x, weights: maps by boxes of BLOCK_K elements and ROWS rows. The launch's tile: rows, columns, summed elements, rows of a box.
// The grid is an even number of blocks, at most as many as the GPU has multiprocessors.
#define LINEAR_KERNEL extern "C" __global__ __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) void
#define LINEAR_LAUNCH(name, ...) \
    L2P_LAUNCH(name, THREADS, (__VA_ARGS__::SMEM_BYTES), BLOCK_M, (__VA_ARGS__::BLOCK_N), (__VA_ARGS__::BLOCK_K), ROWS)
