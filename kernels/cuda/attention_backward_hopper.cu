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
#include "common/hopper.cuh"

constexpr int HEAD_DIM = 128;
constexpr int PANELS = HEAD_DIM / PANEL;
constexpr int CONSUMERS = 2;
constexpr int HELD = 64;  // rows of one consumer
constexpr int ROWS = CONSUMERS * HELD;
constexpr int WARPS = WARPGROUP / WARP;
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int BOX_ROWS = 64;  // of the tensor maps' boxes, which have PANEL columns
constexpr int BOX_BYTES = BOX_ROWS * PANEL_ROW_BYTES;

// Bytes of a tile of so many rows, and of one of its panels.
constexpr int panel_bytes(int rows) { return rows * PANEL_ROW_BYTES; }
constexpr int tile_bytes(int rows) { return PANELS * panel_bytes(rows); }

// All registers of the multiprocessor: what the launch gives each thread, shared out anew.
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
static_assert(HELD == STAT_ROWS);
static_assert((PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) * WARPGROUP <= 65536);

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

// The stage of the tile that is passed over as number `step`, and how often it was used before, as the parity of a phase.
template <int STAGES>
struct Ring {
    __device__ static int stage(int step) { return step % STAGES; }
    __device__ static int parity(int step) { return step / STAGES % 2; }
};

// Starts copying a tile of ROW_COUNT rows, whose bytes the barrier already expects.
template <int ROW_COUNT>
__device__ __forceinline__ void copy_tile(
    uint32_t tile, const TensorMap& map, int column, int row, int item, uint32_t barrier) {
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
        for (int box = 0; box < ROW_COUNT / BOX_ROWS; ++box) {
            copy_box_3d(tile + panel * panel_bytes(ROW_COUNT) + box * BOX_BYTES, map, column + panel * PANEL,
                        row + box * BOX_ROWS, item, barrier);
        }
}

// d = held passedᵀ, as one group; the tiles have HELD and PASSED rows.
template <int PASSED, int TILES>
__device__ __forceinline__ void issue_rows(float (&d)[TILES][4], uint32_t held, uint32_t passed) {
    static_assert(TILES * 8 == PASSED);
    product_fence();
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
        for (int offset = 0; offset < PANEL_ROW_BYTES; offset += PRODUCT_DEPTH * sizeof(bf16)) {
            const uint64_t a = operand_by_rows(held, panel * panel_bytes(HELD) + offset);
            const uint64_t b = operand_by_rows(passed, panel * panel_bytes(PASSED) + offset);
            if (panel + offset == 0) issue_new_product(d, a, b);
            else issue_product(d, a, b);
        }
    product_commit();
}

// sums += factors passed, as one group; the tile has as many rows as there are factors in a row.
template <int STEPS>
__device__ __forceinline__ void issue_sums(Accumulators& sums, uint32_t (&factors)[STEPS][4], uint32_t passed) {
    hold(factors);
    product_fence(sums);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        issue_product(sums, factors[step],
                      operand_by_columns<panel_bytes(STEPS * PRODUCT_DEPTH)>(passed, step * PRODUCT_DEPTH * PANEL_ROW_BYTES));
    }
    product_commit();
}

template <int STEPS>
__device__ __forceinline__ void pack_factors(uint32_t (&factors)[STEPS][4], const float (&values)[2 * STEPS][4]) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) pack_fragment(factors[step], values[2 * step], values[2 * step + 1]);
}

// Tells the producer that this warp's part of the products that read the tile is complete.
__device__ __forceinline__ void release(uint32_t barrier) {
    if (threadIdx.x % WARP == 0) barrier_arrive(barrier);
}

// Writes the sums of a consumer times `factor`, through a tile of HELD rows that nobody else uses any more; `row` is the
// warp's first within it, `valid` how many of its 16 exist.
__device__ __forceinline__ void store_sums(
    bf16* to, int stride, int valid, unsigned char* tile, int row, Accumulators& sums, float factor) {
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
using Stages = Ring<STAGES>;

// Shared memory, as addresses from its start.
struct Layout {
    static constexpr int KEYS = 0;
    static constexpr int VALUES = KEYS + CONSUMERS * tile_bytes(HELD);
    static constexpr int QUERY_RING = VALUES + CONSUMERS * tile_bytes(HELD);
    static constexpr int DY_RING = QUERY_RING + STAGES * tile_bytes(PASSED);
    static constexpr int STAT_RING = DY_RING + STAGES * tile_bytes(PASSED);
    static constexpr int BARRIERS = STAT_RING + STAGES * STAT_BYTES;
    static constexpr int BYTES = BARRIERS + 8 * (CONSUMERS + 3 * STAGES);

    uint32_t start;

    __device__ uint32_t keys(int consumer) const { return start + KEYS + consumer * tile_bytes(HELD); }
    __device__ uint32_t values(int consumer) const { return start + VALUES + consumer * tile_bytes(HELD); }
    __device__ uint32_t queries(int stage) const { return start + QUERY_RING + stage * tile_bytes(PASSED); }
    __device__ uint32_t dy(int stage) const { return start + DY_RING + stage * tile_bytes(PASSED); }
    __device__ uint32_t stats(int stage) const { return start + STAT_RING + stage * STAT_BYTES; }
    // `ready` barriers are the producer's word to the consumers, `free` ones their answer when a stage may be overwritten.
    __device__ uint32_t held_ready(int consumer) const { return start + BARRIERS + 8 * consumer; }
    __device__ uint32_t queries_ready(int stage) const { return start + BARRIERS + 8 * (CONSUMERS + stage); }
    __device__ uint32_t dy_ready(int stage) const { return start + BARRIERS + 8 * (CONSUMERS + STAGES + stage); }
    __device__ uint32_t free(int stage) const { return start + BARRIERS + 8 * (CONSUMERS + 2 * STAGES + stage); }
};
static_assert(Layout::BYTES <= 227 << 10);

__device__ __forceinline__ void produce(
    const TensorMap& packed, const TensorMap& gradient, const float* stats, const Layout& shared, const Task& task,
    Columns columns) {
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) {
        const int row = task.first + consumer * HELD;
        const uint32_t ready = shared.held_ready(consumer);
        barrier_arrive_expecting(ready, 2 * tile_bytes(HELD));
        copy_tile<HELD>(shared.keys(consumer), packed, columns.key(task.kv_head), row, task.item, ready);
        copy_tile<HELD>(shared.values(consumer), packed, columns.value(task.kv_head), row, task.item, ready);
    }
    int step = 0;
    for (int head = task.first_head; head < task.first_head + task.heads; ++head) {
        const float* const stat = stats + stat_index(task.item, head, columns.heads, task.stat_tiles, 0);
        for (int tile = task.first_tile; tile < task.first_tile + task.tiles; ++tile, ++step) {
            const int stage = Stages::stage(step);
            barrier_wait(shared.free(stage), Stages::parity(step) ^ 1);
            barrier_arrive_expecting(shared.queries_ready(stage), tile_bytes(PASSED) + STAT_BYTES);
            copy_tile<PASSED>(shared.queries(stage), packed, head * HEAD_DIM, tile * PASSED, task.item,
                              shared.queries_ready(stage));
            copy_bytes(shared.stats(stage), stat + tile * 2 * STAT_ROWS, STAT_BYTES, shared.queries_ready(stage));
            barrier_arrive_expecting(shared.dy_ready(stage), tile_bytes(PASSED));
            copy_tile<PASSED>(shared.dy(stage), gradient, head * HEAD_DIM, tile * PASSED, task.item,
                              shared.dy_ready(stage));
        }
    }
}

// Issues the scores of a step.
__device__ __forceinline__ void issue_scores(HalfAccumulators& scores, const Layout& shared, int consumer, int step) {
    const int stage = Stages::stage(step);
    barrier_wait(shared.queries_ready(stage), Stages::parity(step));
    issue_rows<PASSED>(scores, shared.keys(consumer), shared.queries(stage));
}

// Issues the products of dy and values of a step.
__device__ __forceinline__ void issue_products(HalfAccumulators& products, const Layout& shared, int consumer, int step) {
    const int stage = Stages::stage(step);
    barrier_wait(shared.dy_ready(stage), Stages::parity(step));
    issue_rows<PASSED>(products, shared.values(consumer), shared.dy(stage));
}

// The loop over the queries. `key` is the first row of this thread's fragment.
__device__ __forceinline__ void consume(
    Accumulators& dk, Accumulators& dv, const unsigned char* memory, const Layout& shared, const Task& task, int consumer,
    int key) {
    const int member = threadIdx.x % 4, steps = task.heads * task.tiles;
    HalfAccumulators weights, products;  // at first scores, and products of dy and values; then weights and ds
    uint32_t weight_factors[PASSED / PRODUCT_DEPTH][4], ds_factors[PASSED / PRODUCT_DEPTH][4];
    int tile = 0;
    hold(dk);  // the zeros are there before the first products are under way
    hold(dv);
    issue_scores(weights, shared, consumer, 0);
    issue_products(products, shared, consumer, 0);
    for (int step = 0;; ++step) {
        const int stage = Stages::stage(step);
        const float* const shift = reinterpret_cast<const float*>(memory + Layout::STAT_RING + stage * STAT_BYTES) + 2 * member;
        const int query = (task.first_tile + tile) * PASSED + 2 * member;
        const bool masked = task.causal && query < key + HELD;  // some query of the tile may not see some key of the block
        if (++tile == task.tiles) tile = 0;

        product_wait<1>(weights);
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
        pack_factors(weight_factors, weights);
        issue_sums(dv, weight_factors, shared.dy(stage));

        product_wait<1>(products);
#pragma unroll
        for (int j = 0; j < PASSED / 8; ++j) {
            const float2 deltas = *reinterpret_cast<const float2*>(shift + STAT_ROWS + 8 * j);
#pragma unroll
            for (int i = 0; i < 4; ++i) products[j][i] = weights[j][i] * (products[j][i] - (i % 2 ? deltas.y : deltas.x));
        }
        pack_factors(ds_factors, products);
        issue_sums(dk, ds_factors, shared.queries(stage));
        if (step + 1 == steps) break;
        issue_scores(weights, shared, consumer, step + 1);
        product_wait<1>(dk);  // and with it dv: their factors' registers are free for the next products
        hold(dv);
        hold(weight_factors);
        hold(ds_factors);
        release(shared.free(stage));
        issue_products(products, shared, consumer, step + 1);
    }
    product_wait<0>(dk);
    product_wait<0>(dv);
}

__device__ __forceinline__ void finish(
    Accumulators& dk, Accumulators& dv, unsigned char* memory, bf16* dqkv, const Task& task, Columns columns, int consumer) {
    const int warp_row = threadIdx.x / WARP % WARPS * 16, row = task.first + consumer * HELD + warp_row;
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
               task.factor);
    store_sums(to + columns.value(task.kv_head), stride, valid, memory + Layout::VALUES + consumer * tile_bytes(HELD), warp_row,
               dv, 1.0f);
}

__device__ __forceinline__ Task find_task(int block, Columns columns, int tokens, const int* lengths, bool causal) {
    const int blocks = (tokens + ROWS - 1) / ROWS;
    Task task;
    task.first = block % blocks * ROWS;
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
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) barrier_init(shared.held_ready(consumer), 1);
    for (int stage = 0; stage < STAGES; ++stage) {
        barrier_init(shared.queries_ready(stage), 1);
        barrier_init(shared.dy_ready(stage), 1);
        barrier_init(shared.free(stage), CONSUMERS * WARPS);
    }
}

// All that a consumer does.
__device__ __forceinline__ void run(
    unsigned char* memory, const Layout& shared, bf16* dqkv, const Task& task, Columns columns, int consumer) {
    Accumulators dk = {}, dv = {};
    if (task.tiles > 0) {
        const int row = threadIdx.x / WARP % WARPS * 16 + threadIdx.x % WARP / 4;
        barrier_wait(shared.held_ready(consumer), 0);
        consume(dk, dv, memory, shared, task, consumer, task.first + consumer * HELD + row);
    }
    named_barrier_sync(1 + consumer, WARPGROUP);  // no warp's products read the keys and values any more
    finish(dk, dv, memory, dqkv, task, columns, consumer);
}

}  // namespace keys_block

// ---- blocks that hold queries ----

namespace queries_block {

constexpr int PASSED = 128;  // keys at a time
constexpr int STAGES = 2;
using Stages = Ring<STAGES>;

// Shared memory, as addresses from its start.
struct Layout {
    static constexpr int QUERIES = 0;
    static constexpr int DY = QUERIES + CONSUMERS * tile_bytes(HELD);
    static constexpr int KEY_RING = DY + CONSUMERS * tile_bytes(HELD);
    static constexpr int VALUE_RING = KEY_RING + STAGES * tile_bytes(PASSED);
    static constexpr int BARRIERS = VALUE_RING + STAGES * tile_bytes(PASSED);
    static constexpr int BYTES = BARRIERS + 8 * (CONSUMERS + 4 * STAGES);

    uint32_t start;

    __device__ uint32_t queries(int consumer) const { return start + QUERIES + consumer * tile_bytes(HELD); }
    __device__ uint32_t dy(int consumer) const { return start + DY + consumer * tile_bytes(HELD); }
    __device__ uint32_t keys(int stage) const { return start + KEY_RING + stage * tile_bytes(PASSED); }
    __device__ uint32_t values(int stage) const { return start + VALUE_RING + stage * tile_bytes(PASSED); }
    __device__ uint32_t held_ready(int consumer) const { return start + BARRIERS + 8 * consumer; }
    __device__ uint32_t keys_ready(int stage) const { return start + BARRIERS + 8 * (CONSUMERS + stage); }
    __device__ uint32_t keys_free(int stage) const { return start + BARRIERS + 8 * (CONSUMERS + STAGES + stage); }
    __device__ uint32_t values_ready(int stage) const { return start + BARRIERS + 8 * (CONSUMERS + 2 * STAGES + stage); }
    __device__ uint32_t values_free(int stage) const { return start + BARRIERS + 8 * (CONSUMERS + 3 * STAGES + stage); }
};
static_assert(Layout::BYTES <= 227 << 10);

__device__ __forceinline__ void produce(
    const TensorMap& packed, const TensorMap& gradient, const Layout& shared, const Task& task, Columns columns) {
    const int column = task.first_head * HEAD_DIM;
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) {
        const int row = task.first + consumer * HELD;
        const uint32_t ready = shared.held_ready(consumer);
        barrier_arrive_expecting(ready, 2 * tile_bytes(HELD));
        copy_tile<HELD>(shared.queries(consumer), packed, column, row, task.item, ready);
        copy_tile<HELD>(shared.dy(consumer), gradient, column, row, task.item, ready);
    }
    for (int step = 0; step < task.tiles; ++step) {
        const int stage = Stages::stage(step), before = Stages::parity(step) ^ 1;
        barrier_wait(shared.keys_free(stage), before);
        barrier_arrive_expecting(shared.keys_ready(stage), tile_bytes(PASSED));
        copy_tile<PASSED>(shared.keys(stage), packed, columns.key(task.kv_head), step * PASSED, task.item,
                          shared.keys_ready(stage));
        barrier_wait(shared.values_free(stage), before);
        barrier_arrive_expecting(shared.values_ready(stage), tile_bytes(PASSED));
        copy_tile<PASSED>(shared.values(stage), packed, columns.value(task.kv_head), step * PASSED, task.item,
                          shared.values_ready(stage));
    }
}

// Issues the scores of a step.
__device__ __forceinline__ void issue_scores(Accumulators& scores, const Layout& shared, int consumer, int step) {
    const int stage = Stages::stage(step);
    barrier_wait(shared.keys_ready(stage), Stages::parity(step));
    issue_rows<PASSED>(scores, shared.queries(consumer), shared.keys(stage));
}

// Issues the products of dy and values of a step.
__device__ __forceinline__ void issue_products(Accumulators& products, const Layout& shared, int consumer, int step) {
    const int stage = Stages::stage(step);
    barrier_wait(shared.values_ready(stage), Stages::parity(step));
    issue_rows<PASSED>(products, shared.dy(consumer), shared.values(stage));
}

// The loop over the keys. `query` is the first row of this thread's fragment; shift and delta are those of both its rows.
__device__ __forceinline__ void consume(
    Accumulators& dq, const Layout& shared, const Task& task, int consumer, int query, const float (&shift)[2],
    const float (&delta)[2]) {
    const int member = threadIdx.x % 4;
    Accumulators weights, products;  // at first scores, and products of dy and values; then weights and ds
    uint32_t ds_factors[PASSED / PRODUCT_DEPTH][4];
    hold(dq);  // the zeros are there before the first products are under way
    issue_scores(weights, shared, consumer, 0);
    issue_products(products, shared, consumer, 0);
    for (int step = 0;; ++step) {
        const int stage = Stages::stage(step);
        product_wait<1>(weights);
        const int key = step * PASSED + 2 * member;
        if ((step + 1) * PASSED > (task.causal ? min(task.keys, query - query % 8 + 1) : task.keys)) {
            mask_keys(weights, query, key, task.keys, task.causal);
        }
#pragma unroll
        for (int j = 0; j < PASSED / 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) weights[j][i] = weight_of(weights[j][i], task.scale, shift[i / 2]);
        product_wait<0>(products);
        release(shared.values_free(stage));
#pragma unroll
        for (int j = 0; j < PASSED / 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) products[j][i] = weights[j][i] * (products[j][i] - delta[i / 2]);
        pack_factors(ds_factors, products);
        issue_sums(dq, ds_factors, shared.keys(stage));
        if (step + 1 == task.tiles) break;
        issue_scores(weights, shared, consumer, step + 1);
        product_wait<1>(dq);  // the registers of its factors are free for the next products
        hold(ds_factors);
        release(shared.keys_free(stage));
        issue_products(products, shared, consumer, step + 1);
    }
    product_wait<0>(dq);
}

__device__ __forceinline__ Task find_task(int block, Columns columns, int tokens, const int* lengths, bool causal) {
    const int blocks = (tokens + ROWS - 1) / ROWS, tile = block % blocks;
    Task task;
    // Under the causal mask the last queries have most to do: they come first.
    task.first = (causal ? blocks - 1 - tile : tile) * ROWS;
    task.heads = 1;
    task.first_head = block / blocks % columns.heads;
    task.kv_head = task.first_head / (columns.heads / columns.kv_heads);
    task.item = block / blocks / columns.heads;
    task.tokens = tokens;
    task.keys = key_length(lengths, task.item, tokens);
    task.stat_tiles = stat_tiles(tokens);
    task.causal = causal;
    task.first_tile = 0;
    task.tiles = ((causal ? min(task.keys, task.first + ROWS) : task.keys) + PASSED - 1) / PASSED;
    return task;
}

__device__ __forceinline__ void init_barriers(const Layout& shared) {
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) barrier_init(shared.held_ready(consumer), 1);
    for (int stage = 0; stage < STAGES; ++stage) {
        barrier_init(shared.keys_ready(stage), 1);
        barrier_init(shared.values_ready(stage), 1);
        barrier_init(shared.keys_free(stage), CONSUMERS * WARPS);
        barrier_init(shared.values_free(stage), CONSUMERS * WARPS);
    }
}

// All that a consumer does.
__device__ __forceinline__ void run(
    unsigned char* memory, const Layout& shared, const float* stats, bf16* dqkv, const Task& task, Columns columns,
    int consumer) {
    const int warp_row = threadIdx.x / WARP % WARPS * 16, group = threadIdx.x % WARP / 4;
    const int row = task.first + consumer * HELD + warp_row;
    Accumulators dq = {};
    if (task.tiles > 0) {
        // A tile of stats is a consumer's rows; the last consumer of an item may have none.
        float shift[2] = {INFINITY, INFINITY}, delta[2] = {};
        if (row < task.tokens) {
            const float* const stat = stats + warp_row + group +
                stat_index(task.item, task.first_head, columns.heads, task.stat_tiles, row / STAT_ROWS);
#pragma unroll
            for (int half = 0; half < 2; ++half) shift[half] = stat[8 * half], delta[half] = stat[STAT_ROWS + 8 * half];
        }
        barrier_wait(shared.held_ready(consumer), 0);
        consume(dq, shared, task, consumer, row + group, shift, delta);
    }
    named_barrier_sync(1 + consumer, WARPGROUP);  // no warp's products read the queries any more
    const int stride = columns.packed();
    bf16* const to = dqkv + (static_cast<size_t>(task.item) * task.tokens + row) * stride + task.first_head * HEAD_DIM;
    store_sums(to, stride, task.tokens - row, memory + Layout::QUERIES + consumer * tile_bytes(HELD), warp_row, dq, task.factor);
}

}  // namespace queries_block

constexpr int SHARED_BYTES = keys_block::Layout::BYTES > queries_block::Layout::BYTES ? keys_block::Layout::BYTES
                                                                                        : queries_block::Layout::BYTES;

// packed: qkv [items, tokens, (heads + 2 kv_heads) * head_dim], gradient: dy [items, tokens, heads * head_dim], both by boxes
// of one item, BOX_ROWS tokens and PANEL columns; stats as in common/attention_backward.cuh; lengths [items] or null; dqkv
// like qkv; scale of the scores in powers of two, factor their natural one; as many blocks as tiles of ROWS tokens of all
// key heads and then of all query heads of all items.
extern "C" __global__ __launch_bounds__(THREADS, 1) void attention_backward_hopper(
    const __grid_constant__ TensorMap packed, const __grid_constant__ TensorMap gradient, const float* stats,
    const int* lengths, bf16* dqkv, int items, int tokens, int heads, int kv_heads, int causal, float scale, float factor) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const keys_block::Layout keys_shared{shared_address(memory)};
    const queries_block::Layout queries_shared{shared_address(memory)};
    const Columns columns{heads, kv_heads};
    const int keys_blocks = (tokens + ROWS - 1) / ROWS * kv_heads * items, block = blockIdx.x;
    const bool holds_keys = block < keys_blocks;
    Task task = holds_keys ? keys_block::find_task(block, columns, tokens, lengths, causal != 0)
                           : queries_block::find_task(block - keys_blocks, columns, tokens, lengths, causal != 0);
    task.scale = scale;
    task.factor = factor;

    if (threadIdx.x == 0) {
        prefetch_map(packed);
        prefetch_map(gradient);
        if (holds_keys) keys_block::init_barriers(keys_shared);
        else queries_block::init_barriers(queries_shared);
        barriers_ready();
    }
    __syncthreads();  // the barriers are initialised before anybody uses them

    // The same for all threads of a warp, and known to the compiler as such.
    const int warp = __shfl_sync(FULL_WARP, threadIdx.x / WARP, 0);
    if (warp < WARPS) {
        registers_give<PRODUCER_REGISTERS>();
        if (threadIdx.x > 0 || task.tiles == 0) return;
        if (holds_keys) keys_block::produce(packed, gradient, stats, keys_shared, task, columns);
        else queries_block::produce(packed, gradient, queries_shared, task, columns);
        return;
    }
    registers_take<CONSUMER_REGISTERS>();
    const int consumer = warp / WARPS - 1;
    if (holds_keys) keys_block::run(memory, keys_shared, dqkv, task, columns, consumer);
    else queries_block::run(memory, queries_shared, stats, dqkv, task, columns, consumer);
}
L2P_LAUNCH(attention_backward_hopper, THREADS, SHARED_BYTES, ROWS, BOX_ROWS, PANEL)
#endif

