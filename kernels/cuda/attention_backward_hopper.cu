// The gradient of attention with heads of 128 on Hopper; engine/src/ops/attention/backward holds the contract,
// attention_backward.cu the kernel that makes the stats of the query rows.
//
// There are two kinds of blocks, in one launch so that the second kind fills the multiprocessors that the last of the first
// leave idle:
//   keys     dk and dv: a block holds 128 keys and values and passes over all queries that see them
//   queries  dq: a block holds 128 queries and passes over all keys that they see
//
// In both a producer warpgroup has one thread start bulk copies, and each of two consumer warpgroups holds 64 rows: products
// of held and passed rows give scores and dy * v, which become weights and ds in registers and, as left operands out of
// registers, are multiplied with the passed rows. No score ever reaches memory, consumers never wait for each other, and a
// block alone sums each result, in one order: two runs give the same bits.
//
// Seven products of 2 * 128 operations per query and key, where one kind of block that adds dq in memory needs five. In
// exchange there is no f32 copy of dq to be written, added to by one block after another (in a fixed order, or the sums
// would differ from run to run) and converted, no exchange of ds between warpgroups through shared memory, and no block that
// waits for another. Bound by the tensor cores; blocks that hold keys read shared memory at 7/8 of its rate meanwhile.
#include "common/attention_backward.cuh"
#include "common/launch.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "common/attention_hopper.cuh"

constexpr int CONSUMERS = 2;
constexpr int HELD = MMA_M;  // rows of one consumer
constexpr int BLOCK_M = CONSUMERS * HELD;
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;

enum class NamedBarrier {
    CONSUMER = 1,  // one for each consumer's own four warps
};

// All registers of the multiprocessor: what the launch gives each thread, shared out anew.
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
static_assert(HELD == STAT_ROWS);
static_assert((PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) * WARPGROUP <= REGISTERS_OF_MULTIPROCESSOR);

// What one block works on.
struct Task {
    int item, kv_head;
    int first_head, heads;  // of the queries that see the block's keys; one for a block that holds queries
    int first;              // row that the block holds
    int tokens, keys;       // of the item; only the first `keys` tokens are keys
    int first_tile, tiles;  // that the block passes over, for each head
    int stat_tiles;         // of a head
    bool causal;
    float scale;   // of the scores in powers of two
    float factor;  // of the scores
};

// Columns of the packed rows.
struct Columns {
    int heads, kv_heads;
    __device__ int key(int kv_head) const { return (heads + kv_head) * HEAD_DIM; }
    __device__ int value(int kv_head) const { return (heads + kv_heads + kv_head) * HEAD_DIM; }
    __device__ int packed() const { return (heads + 2 * kv_heads) * HEAD_DIM; }
};

// d = held passedᵀ, as one group; the tiles have HELD and PASSED rows.
template <int PASSED, int TILES>
__device__ __forceinline__ void issue_rows(float (&d)[TILES][4], uint32_t held, uint32_t passed) {
    static_assert(TILES * 8 == PASSED);
    wgmma_fence();
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
        for (int offset = 0; offset < PANEL_ROW_BYTES; offset += MMA_K<bf16> * sizeof(bf16)) {
            const uint64_t a = k_major_panel(held, panel * panel_bytes(HELD) + offset);
            const uint64_t b = k_major_panel(passed, panel * panel_bytes(PASSED) + offset);
            if (panel + offset == 0) wgmma_fresh(d, a, b);
            else wgmma(d, a, b);
        }
    wgmma_commit();
}

// Writes the sums of a consumer times `factor`, through a tile of HELD rows that nobody else uses any more; `row` is the
// warp's first within it, `valid` how many of its 16 exist.
__device__ __forceinline__ void store_sums(
    bf16* to, int stride, int valid, unsigned char* tile, int row, Accumulators<HEAD_DIM>& sums, float factor) {
    const float factors[2] = {factor, factor};
    scale_rows(sums, factors);
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel) {
        unsigned char* const part = tile + panel * panel_bytes(HELD);
        place_rows<PANEL / UNIT>(part, row, 0, reinterpret_cast<const float(&)[PANEL / 8][4]>(sums[panel * (PANEL / 8)]));
        __syncwarp();  // a warp stores the rows that it placed
        store_rows<PANEL / UNIT, 16>(to + panel * PANEL, stride, valid, part, row);
    }
}

// ---- blocks that hold keys and values ----

namespace keys_block {

constexpr int PASSED = STAT_ROWS;  // queries at a time
constexpr int STAGES = 4;
constexpr int STAT_BYTES = 2 * STAT_ROWS * sizeof(float);
using Ring = Pipeline<STAGES, int, 2>;  // of queries with their stats, and of dy: parts of a stage
constexpr int QUERIES_PART = 0, DY_PART = 1;

// Shared memory, as addresses from its start.
struct Layout {
    static constexpr int KEYS = 0;
    static constexpr int VALUES = KEYS + CONSUMERS * tile_bytes(HELD);
    static constexpr int QUERY_RING = VALUES + CONSUMERS * tile_bytes(HELD);
    static constexpr int DY_RING = QUERY_RING + STAGES * tile_bytes(PASSED);
    static constexpr int STAT_RING = DY_RING + STAGES * tile_bytes(PASSED);
    static constexpr int BARRIERS = STAT_RING + STAGES * STAT_BYTES;
    static constexpr int BYTES = BARRIERS + 8 * CONSUMERS + Ring::BYTES;

    uint32_t start;

    __device__ uint32_t keys(int consumer) const { return start + KEYS + consumer * tile_bytes(HELD); }
    __device__ uint32_t values(int consumer) const { return start + VALUES + consumer * tile_bytes(HELD); }
    __device__ uint32_t queries(int stage) const { return start + QUERY_RING + stage * tile_bytes(PASSED); }
    __device__ uint32_t dy(int stage) const { return start + DY_RING + stage * tile_bytes(PASSED); }
    __device__ uint32_t stats(int stage) const { return start + STAT_RING + stage * STAT_BYTES; }
    __device__ uint32_t held_full(int consumer) const { return start + BARRIERS + 8 * consumer; }
    __device__ Ring ring() const { return {start + BARRIERS + 8 * CONSUMERS}; }
};
static_assert(Layout::BYTES <= MAX_SHARED_BYTES);

__device__ __forceinline__ void produce(
    const TensorMap& packed, const TensorMap& gradient, const float* stats, const Layout& shared, const Task& task,
    Columns columns) {
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) {
        const int row = task.first + consumer * HELD;
        const uint32_t full = shared.held_full(consumer);
        mbarrier_arrive_expect_tx(full, 2 * tile_bytes(HELD));
        load_tile<HELD>(shared.keys(consumer), packed, full, columns.key(task.kv_head), row, task.item);
        load_tile<HELD>(shared.values(consumer), packed, full, columns.value(task.kv_head), row, task.item);
    }
    int step = 0;
    for (int head = task.first_head; head < task.first_head + task.heads; ++head) {
        const float* const stat = stats + stat_index(task.item, head, columns.heads, task.stat_tiles, 0);
        for (int tile = task.first_tile; tile < task.first_tile + task.tiles; ++tile, ++step) {
            const Ring::State state = Ring::at(step);
            const int stage = state.stage();
            const uint32_t queries_full = shared.ring().producer_acquire(state, tile_bytes(PASSED) + STAT_BYTES);
            load_tile<PASSED>(shared.queries(stage), packed, queries_full, head * HEAD_DIM, tile * PASSED, task.item);
            bulk_load(shared.stats(stage), stat + tile * 2 * STAT_ROWS, queries_full, STAT_BYTES);
            const uint32_t dy_full = shared.ring().producer_expect(state, tile_bytes(PASSED), DY_PART);
            load_tile<PASSED>(shared.dy(stage), gradient, dy_full, head * HEAD_DIM, tile * PASSED, task.item);
        }
    }
}

// Issues the scores of a step.
__device__ __forceinline__ void issue_scores(Accumulators<PASSED>& scores, const Layout& shared, int consumer, int step) {
    const Ring::State state = Ring::at(step);
    shared.ring().consumer_wait(state, QUERIES_PART);
    issue_rows<PASSED>(scores, shared.keys(consumer), shared.queries(state.stage()));
}

// Issues the products of dy and values of a step.
__device__ __forceinline__ void issue_products(Accumulators<PASSED>& products, const Layout& shared, int consumer, int step) {
    const Ring::State state = Ring::at(step);
    shared.ring().consumer_wait(state, DY_PART);
    issue_rows<PASSED>(products, shared.values(consumer), shared.dy(state.stage()));
}

// The loop over the queries. `key` is the first row of this thread's fragment.
__device__ __forceinline__ void consume(
    Accumulators<HEAD_DIM>& dk, Accumulators<HEAD_DIM>& dv, const unsigned char* memory, const Layout& shared, const Task& task,
    int consumer, int key) {
    const int member = threadIdx.x % 4, steps = task.heads * task.tiles;
    Accumulators<PASSED> weights, products;  // at first scores, and products of dy and values; then weights and ds
    uint32_t weight_factors[PASSED / MMA_K<bf16>][4], ds_factors[PASSED / MMA_K<bf16>][4];
    int tile = 0;
    hold(dk);  // the zeros are there before the first products are under way
    hold(dv);
    issue_scores(weights, shared, consumer, 0);
    issue_products(products, shared, consumer, 0);
    for (int step = 0;; ++step) {
        const int stage = Ring::at(step).stage();
        const float* const shift = reinterpret_cast<const float*>(memory + Layout::STAT_RING + stage * STAT_BYTES) + 2 * member;
        const int query = (task.first_tile + tile) * PASSED + 2 * member;
        const bool masked = task.causal && query < key + HELD;  // some query of the tile may not see some key of the block
        if (++tile == task.tiles) tile = 0;

        wgmma_wait<1>(weights);
#pragma unroll
        for (int j = 0; j < PASSED / 8; ++j) {
            const float2 shifts = *reinterpret_cast<const float2*>(shift + 8 * j);
#pragma unroll
            for (int i = 0; i < 4; ++i) weights[j][i] = weight_of(weights[j][i], task.scale, i % 2 ? shifts.y : shifts.x);
        }
        if (masked) {
#pragma unroll
            for (int j = 0; j < PASSED / 8; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (key + i / 2 * 8 > query + 8 * j + i % 2) weights[j][i] = 0.0f;
        }
        pack_operand(weight_factors, weights);
        issue_sums(dv, weight_factors, shared.dy(stage));

        wgmma_wait<1>(products);
#pragma unroll
        for (int j = 0; j < PASSED / 8; ++j) {
            const float2 deltas = *reinterpret_cast<const float2*>(shift + STAT_ROWS + 8 * j);
#pragma unroll
            for (int i = 0; i < 4; ++i) products[j][i] = weights[j][i] * (products[j][i] - (i % 2 ? deltas.y : deltas.x));
        }
        pack_operand(ds_factors, products);
        issue_sums(dk, ds_factors, shared.queries(stage));
        if (step + 1 == steps) break;
        issue_scores(weights, shared, consumer, step + 1);
        wgmma_wait<1>(dk);  // and with it dv: their factors' registers are free for the next products
        hold(dv);
        hold(weight_factors);
        hold(ds_factors);
        shared.ring().consumer_release(stage);
        issue_products(products, shared, consumer, step + 1);
    }
    wgmma_wait<0>(dk);
    wgmma_wait<0>(dv);
}

__device__ __forceinline__ void finish(
    Accumulators<HEAD_DIM>& dk, Accumulators<HEAD_DIM>& dv, unsigned char* memory, bf16* dqkv, const Task& task, Columns columns,
    int consumer) {
    const int warp_row = threadIdx.x / WARP % WARPGROUP_WARPS * 16, row = task.first + consumer * HELD + warp_row;
    // What masked keys were multiplied with is of no interest: their sums may be anything.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (row + threadIdx.x % WARP / 4 + 8 * half < task.keys) continue;
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 8; ++i) {
            dk[i][2 * half] = dk[i][2 * half + 1] = 0.0f;
            dv[i][2 * half] = dv[i][2 * half + 1] = 0.0f;
        }
    }
    const int stride = columns.packed(), valid = task.tokens - row;
    bf16* const to = dqkv + (static_cast<size_t>(task.item) * task.tokens + row) * stride;
    store_sums(to + columns.key(task.kv_head), stride, valid, memory + Layout::KEYS + consumer * tile_bytes(HELD), warp_row, dk,
               L2P_FAULT_IF(5, task.scale, task.factor));
    store_sums(to + columns.value(task.kv_head), stride, valid, memory + Layout::VALUES + consumer * tile_bytes(HELD), warp_row,
               dv, 1.0f);
}

__device__ __forceinline__ Task find_task(int block, Columns columns, int tokens, const int* lengths, bool causal) {
    const int blocks = (tokens + BLOCK_M - 1) / BLOCK_M;
    Task task;
    task.first = block % blocks * BLOCK_M;
    task.kv_head = block / blocks % columns.kv_heads;
    task.item = block / blocks / columns.kv_heads;
    task.heads = columns.heads / columns.kv_heads;
    task.first_head = task.kv_head * task.heads;
    task.tokens = tokens;
    task.keys = key_length(lengths, task.item, tokens);
    task.stat_tiles = stat_tiles(tokens);
    task.causal = causal;
    task.first_tile = causal ? task.first / PASSED : 0;
    task.tiles = task.first < task.keys ? task.stat_tiles - task.first_tile : 0;
    return task;
}

__device__ __forceinline__ void init_barriers(const Layout& shared) {
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) mbarrier_init(shared.held_full(consumer), 1);
    shared.ring().init(CONSUMERS * WARPGROUP_WARPS);
}

// All that a consumer does.
__device__ __forceinline__ void run(
    unsigned char* memory, const Layout& shared, bf16* dqkv, const Task& task, Columns columns, int consumer) {
    Accumulators<HEAD_DIM> dk = {}, dv = {};
    if (task.tiles > 0) {
        const int row = threadIdx.x / WARP % WARPGROUP_WARPS * 16 + threadIdx.x % WARP / 4;
        mbarrier_wait(shared.held_full(consumer), 0);
        consume(dk, dv, memory, shared, task, consumer, task.first + consumer * HELD + row);
    }
    named_barrier_sync(NamedBarrier::CONSUMER, consumer, WARPGROUP);  // no warp's products read the keys and values any more
    finish(dk, dv, memory, dqkv, task, columns, consumer);
}

}  // namespace keys_block

// ---- blocks that hold queries ----

namespace queries_block {

constexpr int PASSED = 128;  // keys at a time
constexpr int STAGES = 2;
using Ring = Pipeline<STAGES>;

// Shared memory, as addresses from its start.
struct Layout {
    static constexpr int QUERIES = 0;
    static constexpr int DY = QUERIES + CONSUMERS * tile_bytes(HELD);
    static constexpr int KEY_RING = DY + CONSUMERS * tile_bytes(HELD);
    static constexpr int VALUE_RING = KEY_RING + STAGES * tile_bytes(PASSED);
    static constexpr int BARRIERS = VALUE_RING + STAGES * tile_bytes(PASSED);
    static constexpr int BYTES = BARRIERS + 8 * CONSUMERS + 2 * Ring::BYTES;

    uint32_t start;

    __device__ uint32_t queries(int consumer) const { return start + QUERIES + consumer * tile_bytes(HELD); }
    __device__ uint32_t dy(int consumer) const { return start + DY + consumer * tile_bytes(HELD); }
    __device__ uint32_t keys(int stage) const { return start + KEY_RING + stage * tile_bytes(PASSED); }
    __device__ uint32_t values(int stage) const { return start + VALUE_RING + stage * tile_bytes(PASSED); }
    __device__ uint32_t held_full(int consumer) const { return start + BARRIERS + 8 * consumer; }
    __device__ Ring key_ring() const { return {start + BARRIERS + 8 * CONSUMERS}; }
    __device__ Ring value_ring() const { return {start + BARRIERS + 8 * CONSUMERS + Ring::BYTES}; }
};
static_assert(Layout::BYTES <= MAX_SHARED_BYTES);

__device__ __forceinline__ void produce(
    const TensorMap& packed, const TensorMap& gradient, const Layout& shared, const Task& task, Columns columns) {
    const int column = task.first_head * HEAD_DIM;
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) {
        const int row = task.first + consumer * HELD;
        const uint32_t full = shared.held_full(consumer);
        mbarrier_arrive_expect_tx(full, 2 * tile_bytes(HELD));
        load_tile<HELD>(shared.queries(consumer), packed, full, column, row, task.item);
        load_tile<HELD>(shared.dy(consumer), gradient, full, column, row, task.item);
    }
    for (int step = 0; step < task.tiles; ++step) {
        const Ring::State state = Ring::at(step);
        const int stage = state.stage(), row = step * PASSED;
        const uint32_t keys_full = shared.key_ring().producer_acquire(state, tile_bytes(PASSED));
        load_tile<PASSED>(shared.keys(stage), packed, keys_full, columns.key(task.kv_head), row, task.item);
        const uint32_t values_full = shared.value_ring().producer_acquire(state, tile_bytes(PASSED));
        load_tile<PASSED>(shared.values(stage), packed, values_full, columns.value(task.kv_head), row, task.item);
    }
}

// Issues the scores of a step.
__device__ __forceinline__ void issue_scores(Accumulators<PASSED>& scores, const Layout& shared, int consumer, int step) {
    const Ring::State state = Ring::at(step);
    shared.key_ring().consumer_wait(state);
    issue_rows<PASSED>(scores, shared.queries(consumer), shared.keys(state.stage()));
}

// Issues the products of dy and values of a step.
__device__ __forceinline__ void issue_products(Accumulators<PASSED>& products, const Layout& shared, int consumer, int step) {
    const Ring::State state = Ring::at(step);
    shared.value_ring().consumer_wait(state);
    issue_rows<PASSED>(products, shared.dy(consumer), shared.values(state.stage()));
}

// The loop over the keys. `query` is the first row of this thread's fragment; shift and delta are those of both its rows.
__device__ __forceinline__ void consume(
    Accumulators<HEAD_DIM>& dq, const Layout& shared, const Task& task, int consumer, int query, const float (&shift)[2],
    const float (&delta)[2]) {
    const int member = threadIdx.x % 4;
    Accumulators<PASSED> weights, products;  // at first scores, and products of dy and values; then weights and ds
    uint32_t ds_factors[PASSED / MMA_K<bf16>][4];
    hold(dq);  // the zeros are there before the first products are under way
    issue_scores(weights, shared, consumer, 0);
    issue_products(products, shared, consumer, 0);
    for (int step = 0;; ++step) {
        const int stage = Ring::at(step).stage();
        wgmma_wait<1>(weights);
        const int key = step * PASSED + 2 * member;
        if ((step + 1) * PASSED > (task.causal ? min(task.keys, query - query % 8 + 1) : task.keys)) {
            mask_keys(weights, query, key, task.keys, task.causal);
        }
#pragma unroll
        for (int j = 0; j < PASSED / 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) weights[j][i] = weight_of(weights[j][i], task.scale, shift[i / 2]);
        wgmma_wait<0>(products);
        shared.value_ring().consumer_release(stage);
#pragma unroll
        for (int j = 0; j < PASSED / 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) products[j][i] = weights[j][i] * (products[j][i] - delta[i / 2]);
        pack_operand(ds_factors, products);
        issue_sums(dq, ds_factors, shared.keys(stage));
        if (step + 1 == task.tiles) break;
        issue_scores(weights, shared, consumer, step + 1);
        wgmma_wait<1>(dq);  // the registers of its factors are free for the next products
        hold(ds_factors);
        shared.key_ring().consumer_release(stage);
        issue_products(products, shared, consumer, step + 1);
    }
    wgmma_wait<0>(dq);
}

__device__ __forceinline__ Task find_task(int block, Columns columns, int tokens, const int* lengths, bool causal) {
    const int blocks = (tokens + BLOCK_M - 1) / BLOCK_M, tile = block % blocks;
    Task task;
    // Under the causal mask the last queries have most to do: they come first.
    task.first = (causal ? blocks - 1 - tile : tile) * BLOCK_M;
    task.heads = 1;
    task.first_head = block / blocks % columns.heads;
    task.kv_head = task.first_head / (columns.heads / columns.kv_heads);
    task.item = block / blocks / columns.heads;
    task.tokens = tokens;
    task.keys = key_length(lengths, task.item, tokens);
    task.stat_tiles = stat_tiles(tokens);
    task.causal = causal;
    task.first_tile = 0;
    task.tiles = ((causal ? min(task.keys, task.first + BLOCK_M) : task.keys) + PASSED - 1) / PASSED;
    return task;
}

__device__ __forceinline__ void init_barriers(const Layout& shared) {
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) mbarrier_init(shared.held_full(consumer), 1);
    shared.key_ring().init(CONSUMERS * WARPGROUP_WARPS);
    shared.value_ring().init(CONSUMERS * WARPGROUP_WARPS);
}

// All that a consumer does.
__device__ __forceinline__ void run(
    unsigned char* memory, const Layout& shared, const float* stats, bf16* dqkv, const Task& task, Columns columns,
    int consumer) {
    const int warp_row = threadIdx.x / WARP % WARPGROUP_WARPS * 16, group = threadIdx.x % WARP / 4;
    const int row = task.first + consumer * HELD + warp_row;
    Accumulators<HEAD_DIM> dq = {};
    if (task.tiles > 0) {
        // A tile of stats is a consumer's rows; the last consumer of an item may have none.
        float shift[2] = {INFINITY, INFINITY}, delta[2] = {};
        if (row < task.tokens) {
            const float* const stat = stats + warp_row + group +
                stat_index(task.item, task.first_head, columns.heads, task.stat_tiles, row / STAT_ROWS);
#pragma unroll
            for (int half = 0; half < 2; ++half) shift[half] = stat[8 * half], delta[half] = stat[STAT_ROWS + 8 * half];
        }
        mbarrier_wait(shared.held_full(consumer), 0);
        consume(dq, shared, task, consumer, row + group, shift, delta);
    }
    named_barrier_sync(NamedBarrier::CONSUMER, consumer, WARPGROUP);  // no warp's products read the queries any more
    const int stride = columns.packed();
    bf16* const to = dqkv + (static_cast<size_t>(task.item) * task.tokens + row) * stride + task.first_head * HEAD_DIM;
    store_sums(to, stride, task.tokens - row, memory + Layout::QUERIES + consumer * tile_bytes(HELD), warp_row, dq, task.factor);
}

}  // namespace queries_block

constexpr int SMEM_BYTES = keys_block::Layout::BYTES > queries_block::Layout::BYTES ? keys_block::Layout::BYTES
                                                                                        : queries_block::Layout::BYTES;

// packed: qkv [items, tokens, (heads + 2 kv_heads) * head_dim], gradient: dy [items, tokens, heads * head_dim], both by boxes
// of one item, BOX_ROWS tokens and PANEL columns; stats as in common/attention_backward.cuh; lengths [items] or null; dqkv
// like qkv; scale of the scores in powers of two, factor their natural one; as many blocks as tiles of BLOCK_M tokens of all
// key heads and then of all query heads of all items.
extern "C" __global__ __launch_bounds__(THREADS, 1) void attention_backward_hopper(
    const __grid_constant__ TensorMap packed, const __grid_constant__ TensorMap gradient, const float* stats,
    const int* lengths, bf16* dqkv, int items, int tokens, int heads, int kv_heads, int causal, float scale, float factor) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const keys_block::Layout keys_shared{shared_address(memory)};
    const queries_block::Layout queries_shared{shared_address(memory)};
    const Columns columns{heads, kv_heads};
    const int keys_blocks = (tokens + BLOCK_M - 1) / BLOCK_M * kv_heads * items, block = blockIdx.x;
    const bool holds_keys = block < keys_blocks;
    Task task = holds_keys ? keys_block::find_task(block, columns, tokens, lengths, causal != 0)
                           : queries_block::find_task(block - keys_blocks, columns, tokens, lengths, causal != 0);
    task.scale = scale;
    task.factor = factor;

    if (threadIdx.x == 0) {
        tma_prefetch(packed);
        tma_prefetch(gradient);
        if (holds_keys) keys_block::init_barriers(keys_shared);
        else queries_block::init_barriers(queries_shared);
        mbarrier_init_fence();
    }
    __syncthreads();  // the barriers are initialised before anybody uses them

    const int warp = uniform_warp();
    if (warp < WARPGROUP_WARPS) {
        warpgroup_reg_dealloc<PRODUCER_REGISTERS>();
        if (threadIdx.x > 0 || task.tiles == 0) return;
        if (holds_keys) keys_block::produce(packed, gradient, stats, keys_shared, task, columns);
        else queries_block::produce(packed, gradient, queries_shared, task, columns);
        return;
    }
    warpgroup_reg_alloc<CONSUMER_REGISTERS>();
    const int consumer = warp / WARPGROUP_WARPS - 1;
    if (holds_keys) keys_block::run(memory, keys_shared, dqkv, task, columns, consumer);
    else queries_block::run(memory, queries_shared, stats, dqkv, task, columns, consumer);
}
L2P_LAUNCH(attention_backward_hopper, THREADS, SMEM_BYTES, BLOCK_M, BOX_ROWS, PANEL)
#endif

