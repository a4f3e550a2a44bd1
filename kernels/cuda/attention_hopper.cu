// Attention with heads of 128 on Hopper; engine/src/ops/attention holds the contract.
//
// One block takes 64 queries of one head for each of its CONSUMERS warpgroups. A further warpgroup, the producer, has one
// thread start bulk copies: the queries once, then keys and values, KEYS at a time, each through a ring of STAGES tiles. A
// consumer multiplies its queries with a tile of keys, turns the scores into weights in registers, and multiplies these, as
// the left operand out of registers, with the tile of values.
//
// The tensor cores must not wait for the exponentials, of which there are as many per tile as the special function units
// compute in about the time of one of the two products. Consumers take turns in issuing the product of queries and keys, so
// that they are apart in phase and while one computes weights the others multiply. With OVERLAP a consumer also issues the
// product of queries and the next keys before that of weights and values, which then runs under the next exponentials; this
// takes 32 more registers per thread, which two consumers have and three do not.
//
// Bound by the tensor cores: 4 * 128 operations per query and key. Three consumers read each key and value once per 192
// queries out of L2 (192 operations per byte), two once per 128.
#include "common/attention.cuh"
#include "common/launch.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "common/hopper.cuh"

constexpr int HEAD_DIM = 128;
constexpr int PANELS = HEAD_DIM / PANEL;
constexpr int ROWS = 64;    // queries of one consumer
constexpr int KEYS = 128;   // of one tile
constexpr int STAGES = 2;
constexpr int BOX_ROWS = 64;  // of the tensor map's box, which has PANEL columns
constexpr int BOX_BYTES = BOX_ROWS * PANEL_ROW_BYTES;
constexpr int QUERY_BYTES = ROWS * HEAD_DIM * sizeof(bf16);
constexpr int QUERY_PANEL_BYTES = QUERY_BYTES / PANELS;
constexpr int TILE_BYTES = KEYS * HEAD_DIM * sizeof(bf16);
constexpr int TILE_PANEL_BYTES = TILE_BYTES / PANELS;
constexpr int STEPS = KEYS / PRODUCT_DEPTH;  // of the product of weights and values
constexpr int WARPS = WARPGROUP / WARP;      // of one consumer

// Shared memory, as addresses from its start.
template <int CONSUMERS>
struct Layout {
    static constexpr int QUERIES = 0;
    static constexpr int KEY_RING = QUERIES + CONSUMERS * QUERY_BYTES;
    static constexpr int VALUE_RING = KEY_RING + STAGES * TILE_BYTES;
    static constexpr int BARRIERS = VALUE_RING + STAGES * TILE_BYTES;
    static constexpr int BYTES = BARRIERS + 8 * (CONSUMERS + 4 * STAGES);
    static constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;

    uint32_t start;

    __device__ uint32_t queries(int consumer) const { return start + QUERIES + consumer * QUERY_BYTES; }
    __device__ uint32_t keys(int stage) const { return start + KEY_RING + stage * TILE_BYTES; }
    __device__ uint32_t values(int stage) const { return start + VALUE_RING + stage * TILE_BYTES; }
    // `ready` barriers are the producer's word to the consumers, `free` ones their answer when a tile may be overwritten.
    __device__ uint32_t queries_ready(int consumer) const { return start + BARRIERS + 8 * consumer; }
    __device__ uint32_t keys_ready(int stage) const { return start + BARRIERS + 8 * (CONSUMERS + stage); }
    __device__ uint32_t keys_free(int stage) const { return start + BARRIERS + 8 * (CONSUMERS + STAGES + stage); }
    __device__ uint32_t values_ready(int stage) const { return start + BARRIERS + 8 * (CONSUMERS + 2 * STAGES + stage); }
    __device__ uint32_t values_free(int stage) const { return start + BARRIERS + 8 * (CONSUMERS + 3 * STAGES + stage); }
};

// What one block works on.
struct Task {
    int item, head, first;  // first query
    int tokens, keys;       // of the item; only the first `keys` tokens are keys
    int blocks;             // tiles of keys that some query of the block sees
    bool causal;
    float scale;            // in powers of two
};

// The tile of a block and how often its stage was used before, as the parity of a barrier's phase.
__device__ __forceinline__ int stage_of(int block) { return block % STAGES; }
__device__ __forceinline__ int parity_of(int block) { return block / STAGES % 2; }

// ---- producer ----

template <int ROW_COUNT>
__device__ __forceinline__ void copy_tile(
    uint32_t tile, const TensorMap& map, int column, int row, int item, uint32_t barrier) {
    barrier_arrive_expecting(barrier, ROW_COUNT * HEAD_DIM * sizeof(bf16));
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
        for (int box = 0; box < ROW_COUNT / BOX_ROWS; ++box) {
            copy_box_3d(tile + (panel * (ROW_COUNT / BOX_ROWS) + box) * BOX_BYTES, map, column + panel * PANEL,
                        row + box * BOX_ROWS, item, barrier);
        }
}

template <int CONSUMERS>
__device__ __forceinline__ void produce(
    const TensorMap& map, const Layout<CONSUMERS>& shared, const Task& task, int heads, int kv_heads) {
    const int key_column = (heads + task.head / (heads / kv_heads)) * HEAD_DIM;
    const int value_column = key_column + kv_heads * HEAD_DIM;
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) {
        copy_tile<ROWS>(shared.queries(consumer), map, task.head * HEAD_DIM, task.first + consumer * ROWS, task.item,
                        shared.queries_ready(consumer));
    }
    for (int block = 0; block < task.blocks; ++block) {
        const int stage = stage_of(block), before = parity_of(block) ^ 1;
        barrier_wait(shared.keys_free(stage), before);
        copy_tile<KEYS>(shared.keys(stage), map, key_column, block * KEYS, task.item, shared.keys_ready(stage));
        barrier_wait(shared.values_free(stage), before);
        copy_tile<KEYS>(shared.values(stage), map, value_column, block * KEYS, task.item, shared.values_ready(stage));
    }
}

// ---- consumers ----

// Named barriers: one for each consumer's own four warps, and one for each consumer's turn, at which the consumer before it
// arrives.
__device__ __forceinline__ int own_barrier(int consumer) { return 1 + consumer; }

template <int CONSUMERS>
struct Turns {
    int consumer;
    int left;  // turns that this consumer still has

    __device__ __forceinline__ static int barrier(int consumer) { return 1 + CONSUMERS + consumer; }
    // The last consumer lets the first begin.
    __device__ __forceinline__ void begin() const {
        if (left > 0 && consumer == CONSUMERS - 1) named_barrier_arrive(barrier(0), 2 * WARPGROUP);
    }
    __device__ __forceinline__ void wait() const { named_barrier_sync(barrier(consumer), 2 * WARPGROUP); }
    // Nobody waits for the last consumer's last turn.
    __device__ __forceinline__ void pass() {
        --left;
        if (consumer < CONSUMERS - 1) named_barrier_arrive(barrier(consumer + 1), 2 * WARPGROUP);
        else if (left > 0) named_barrier_arrive(barrier(0), 2 * WARPGROUP);
    }
};

// Tells the producer that this warp's part of the products that read the tile is complete.
__device__ __forceinline__ void release(uint32_t barrier) {
    if (threadIdx.x % WARP == 0) barrier_arrive(barrier);
}

// scores = queries keysᵀ, as one group.
__device__ __forceinline__ void issue_scores(Accumulators& scores, uint32_t queries, uint32_t keys) {
    product_fence(scores);
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
        for (int offset = 0; offset < PANEL_ROW_BYTES; offset += PRODUCT_DEPTH * sizeof(bf16)) {
            issue_product(scores, operand_by_rows(queries, panel * QUERY_PANEL_BYTES + offset),
                          operand_by_rows(keys, panel * TILE_PANEL_BYTES + offset), panel + offset > 0);
        }
    product_commit();
}

// result += weights values, as one group.
__device__ __forceinline__ void issue_result(Accumulators& result, uint32_t (&weights)[STEPS][4], uint32_t values) {
    hold(weights);
    product_fence(result);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int offset = step * PRODUCT_DEPTH * PANEL_ROW_BYTES;
        issue_product(result, weights[step], operand_by_columns<TILE_PANEL_BYTES>(values, offset));
    }
    product_commit();
}

// Turns the scores of a block into weights. Returns whether the result so far must be multiplied by `factor`.
__device__ __forceinline__ bool weigh_block(
    RowSoftmax& softmax, Accumulators& scores, float (&factor)[2], const Task& task, int block, int row) {
    const int member = threadIdx.x % 4, group = threadIdx.x % WARP / 4;
    if ((block + 1) * KEYS > (task.causal ? min(task.keys, row + 1) : task.keys)) {
        mask_keys(scores, row + group, block * KEYS + 2 * member, task.keys, task.causal);
    }
    float top[2];
    row_tops(top, scores);
    const bool raised = needs_raise(softmax, top, task.scale);
    if (raised) raise(softmax, top, task.scale, factor);
    weigh(softmax, scores, task.scale);
    return raised;
}

__device__ __forceinline__ void pack_weights(uint32_t (&weights)[STEPS][4], const Accumulators& scores) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) pack_fragment(weights[step], scores[2 * step], scores[2 * step + 1]);
}

// The loop over the keys without OVERLAP: scores, weights, result. `row` is the first query of this warp.
template <int CONSUMERS>
__device__ __forceinline__ void consume(
    Accumulators& result, RowSoftmax& softmax, const Layout<CONSUMERS>& shared, const Task& task, int consumer, int row) {
    Turns<CONSUMERS> turns{consumer, task.blocks};
    turns.begin();
    for (int block = 0; block < task.blocks; ++block) {
        const int stage = stage_of(block), parity = parity_of(block);
        Accumulators scores;
        barrier_wait(shared.keys_ready(stage), parity);
        turns.wait();
        issue_scores(scores, shared.queries(consumer), shared.keys(stage));
        turns.pass();
        product_wait<0>(scores);
        release(shared.keys_free(stage));
        float factor[2];
        if (weigh_block(softmax, scores, factor, task, block, row)) scale_rows(result, factor);
        uint32_t weights[STEPS][4];
        pack_weights(weights, scores);
        barrier_wait(shared.values_ready(stage), parity);
        issue_result(result, weights, shared.values(stage));
        product_wait<0>(result);
        release(shared.values_free(stage));
    }
}

// The same with OVERLAP: the scores of a block are under way before the result of the block before.
template <int CONSUMERS>
__device__ __forceinline__ void consume_overlapped(
    Accumulators& result, RowSoftmax& softmax, const Layout<CONSUMERS>& shared, const Task& task, int consumer, int row) {
    Turns<CONSUMERS> turns{consumer, task.blocks};
    turns.begin();
    if (task.blocks == 0) return;
    Accumulators scores;
    uint32_t weights[STEPS][4];
    float factor[2];
    barrier_wait(shared.keys_ready(0), 0);
    turns.wait();
    issue_scores(scores, shared.queries(consumer), shared.keys(0));
    turns.pass();
    product_wait<0>(scores);
    release(shared.keys_free(0));
    weigh_block(softmax, scores, factor, task, 0, row);  // there is no result yet to be multiplied
    pack_weights(weights, scores);
    if (task.blocks > 1) barrier_wait(shared.keys_ready(1), 0);
    for (int block = 1; block < task.blocks; ++block) {
        const int stage = stage_of(block), before = stage_of(block - 1);
        turns.wait();
        issue_scores(scores, shared.queries(consumer), shared.keys(stage));
        barrier_wait(shared.values_ready(before), parity_of(block - 1));
        issue_result(result, weights, shared.values(before));
        turns.pass();
        product_wait<1>(scores);
        release(shared.keys_free(stage));
        const bool raised = weigh_block(softmax, scores, factor, task, block, row);
        hold(scores);
        // Waiting for the next keys here, not where they are used, puts a branch between the exponentials and the wait
        // below: the assembler would otherwise move that wait up and compute them after the product, not under it.
        if (block + 1 < task.blocks) barrier_wait(shared.keys_ready(stage_of(block + 1)), parity_of(block + 1));
        product_wait<0>(result);
        release(shared.values_free(before));
        hold(scores);  // packed only now: until here the registers of the weights were the product's
        if (raised) scale_rows(result, factor);
        pack_weights(weights, scores);
    }
    const int last = task.blocks - 1;
    barrier_wait(shared.values_ready(stage_of(last)), parity_of(last));
    issue_result(result, weights, shared.values(stage_of(last)));
    product_wait<0>(result);
}

// Divides by the sums and writes the result, through the shared memory of this consumer's queries.
__device__ __forceinline__ void finish(
    Accumulators& result, const RowSoftmax& softmax, unsigned char* queries, bf16* output, float* log_sums,
    const Task& task, int heads, int consumer, int row) {
    const int group = threadIdx.x % WARP / 4, member = threadIdx.x % 4, warp = threadIdx.x / WARP % WARPS;
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float sum = group_sum(softmax.sum[half]);
        factor[half] = inverse_or_zero(sum);
        const int query = row + group + 8 * half;
        if (log_sums != nullptr && member == 0 && query < task.tokens) {
            log_sums[(static_cast<size_t>(task.item) * heads + task.head) * task.tokens + query] =
                log_sum_exp(softmax.reference[half], sum, task.scale);
        }
    }
    scale_rows(result, factor);
    named_barrier_sync(own_barrier(consumer), WARPGROUP);  // no warp's products read the queries any more
    const size_t stride = static_cast<size_t>(heads) * HEAD_DIM;
    bf16* to = output + (static_cast<size_t>(task.item) * task.tokens + row) * stride + task.head * HEAD_DIM;
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel) {
        unsigned char* tile = queries + panel * QUERY_PANEL_BYTES;
        const auto& tiles = reinterpret_cast<const float(&)[PANEL / 8][4]>(result[panel * (PANEL / 8)]);
        place_rows<PANEL / UNIT>(tile, 16 * warp, 0, tiles);
        __syncwarp();  // a warp stores the rows that it placed
        store_rows<PANEL / UNIT, 16>(to + panel * PANEL, stride, task.tokens - row, tile, 16 * warp);
    }
}

template <int CONSUMERS, bool OVERLAP>
__device__ __forceinline__ void attention(
    const TensorMap& map, const int* lengths, bf16* output, float* log_sums, int tokens, int heads, int kv_heads,
    bool causal, float scale) {
    // All registers of the multiprocessor: what the launch gives each thread, shared out anew.
    constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 24 : 32, CONSUMER_REGISTERS = CONSUMERS == 2 ? 240 : 160;
    static_assert((PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) * WARPGROUP <= 65536);
    extern __shared__ __align__(1024) unsigned char memory[];
    const Layout<CONSUMERS> shared{shared_address(memory)};

    Task task;
    // Under the causal mask the last queries have most to do: they come first.
    task.first = (causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x) * (CONSUMERS * ROWS);
    task.head = blockIdx.y;
    task.item = blockIdx.z;
    task.tokens = tokens;
    task.keys = key_length(lengths, task.item, tokens);
    const int seen = causal ? min(task.keys, task.first + CONSUMERS * ROWS) : task.keys;
    task.blocks = (seen + KEYS - 1) / KEYS;
    task.causal = causal;
    task.scale = scale;

    if (threadIdx.x == 0) {
        prefetch_map(map);
        for (int consumer = 0; consumer < CONSUMERS; ++consumer) barrier_init(shared.queries_ready(consumer), 1);
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(shared.keys_ready(stage), 1);
            barrier_init(shared.values_ready(stage), 1);
            barrier_init(shared.keys_free(stage), CONSUMERS * WARPS);
            barrier_init(shared.values_free(stage), CONSUMERS * WARPS);
        }
        barriers_ready();
    }
    __syncthreads();  // the barriers are initialised before anybody uses them

    // The same for all threads of a warp, and known to the compiler as such.
    const int warp = __shfl_sync(FULL_WARP, threadIdx.x / WARP, 0);
    if (warp < WARPS) {
        registers_give<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) produce(map, shared, task, heads, kv_heads);
        return;
    }
    registers_take<CONSUMER_REGISTERS>();
    const int consumer = warp / WARPS - 1;
    const int row = task.first + consumer * ROWS + warp % WARPS * 16;
    RowSoftmax softmax;
    Accumulators result = {};
    barrier_wait(shared.queries_ready(consumer), 0);
    if constexpr (OVERLAP) {
        consume_overlapped(result, softmax, shared, task, consumer, row);
    } else {
        consume(result, softmax, shared, task, consumer, row);
    }
    finish(result, softmax, memory + Layout<CONSUMERS>::QUERIES + consumer * QUERY_BYTES, output, log_sums, task, heads,
           consumer, row);
}

// map: qkv [items, tokens, (heads + 2 kv_heads) * head_dim] by boxes of one item, BOX_ROWS tokens and PANEL columns;
// lengths [items] or null; output [items, tokens, heads, head_dim]; log_sums [items, heads, tokens] or null; scale in
// powers of two; grid (query tiles, heads, items).
#define ATTENTION_KERNEL(name, consumers, overlap)                                                                     \
    extern "C" __global__ __launch_bounds__(Layout<consumers>::THREADS, 1) void name(                                  \
        const __grid_constant__ TensorMap map, const int* lengths, bf16* output, float* log_sums, int tokens,          \
        int heads, int kv_heads, int causal, float scale) {                                                            \
        attention<consumers, overlap>(map, lengths, output, log_sums, tokens, heads, kv_heads, causal != 0, scale);    \
    }                                                                                                                  \
    L2P_LAUNCH(name, Layout<consumers>::THREADS, Layout<consumers>::BYTES, consumers* ROWS, BOX_ROWS, PANEL)

ATTENTION_KERNEL(attention_hopper_128, 2, true)
ATTENTION_KERNEL(attention_hopper_192, 3, false)
#endif
