// Attention with heads of 128 on Hopper; engine/src/ops/attention holds the contract.
//
// One block takes 64 queries of one head for each of its CONSUMERS warpgroups. A further warpgroup, the producer, has one
// thread start bulk copies: the queries once, then keys and values, BLOCK_N at a time, each through a ring of STAGES tiles
// (common/pipeline.cuh). A consumer multiplies its queries with a tile of keys, turns the scores into weights in registers (an
// online softmax), and multiplies these, as the left operand out of registers, with the tile of values.
//
// The tensor cores must not wait for the exponentials, of which there are as many per tile as the special function units
// compute in about the time of one of the two products. Consumers take turns in issuing the product of queries and keys, so
// that they are apart in phase and while one computes weights the others multiply. With OVERLAP a consumer also issues the
// product of queries and the next keys before that of weights and values, which then runs under the next exponentials; this
// takes 32 more registers per thread, which two consumers have and three do not.
//
// Bound by the tensor cores: 4 * 128 operations per query and key. Three consumers read each key and value once per 192
// queries out of L2 (192 operations per byte), two once per 128.
#include "common/launch.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "common/attention_hopper.cuh"
#include "common/quantise.cuh"

constexpr int BLOCK_N = 128;  // keys of a tile
constexpr int STAGES = 2;
constexpr int QUERY_BYTES = tile_bytes(MMA_M);  // of one consumer
constexpr int TILE_BYTES = tile_bytes(BLOCK_N);
constexpr int STEPS = BLOCK_N / MMA_K<bf16>;  // of the product of weights and values
using Ring = Pipeline<STAGES>;

// Shared memory, as addresses from its start.
template <int CONSUMERS>
struct Layout {
    static constexpr int BLOCK_M = CONSUMERS * MMA_M;  // queries
    static constexpr int QUERIES = 0;
    static constexpr int KEY_RING = QUERIES + CONSUMERS * QUERY_BYTES;
    static constexpr int VALUE_RING = KEY_RING + STAGES * TILE_BYTES;
    static constexpr int BARRIERS = VALUE_RING + STAGES * TILE_BYTES;
    static constexpr int BYTES = BARRIERS + 8 * CONSUMERS + 2 * Ring::BYTES;
    static constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;

    uint32_t start;

    __device__ uint32_t queries(int consumer) const { return start + QUERIES + consumer * QUERY_BYTES; }
    __device__ uint32_t keys(int stage) const { return start + KEY_RING + stage * TILE_BYTES; }
    __device__ uint32_t values(int stage) const { return start + VALUE_RING + stage * TILE_BYTES; }
    __device__ uint32_t queries_full(int consumer) const { return start + BARRIERS + 8 * consumer; }
    __device__ Ring key_ring() const { return {start + BARRIERS + 8 * CONSUMERS}; }
    __device__ Ring value_ring() const { return {start + BARRIERS + 8 * CONSUMERS + Ring::BYTES}; }
};

// What one block works on.
struct Task {
    int item, head, first;  // first query
    int tokens, keys;       // of the item; only the first `keys` tokens are keys
    int blocks;             // tiles of keys that some query of the block sees
    bool causal;
    float scale;            // in powers of two
};

// ---- producer ----

template <int CONSUMERS>
__device__ __forceinline__ void produce(
    const TensorMap& map, const Layout<CONSUMERS>& shared, const Task& task, int heads, int kv_heads) {
    const int kv_head = L2P_FAULT_IF(4, task.head % kv_heads, task.head / (heads / kv_heads));
    const int key_column = (heads + kv_head) * HEAD_DIM;
    const int value_column = key_column + kv_heads * HEAD_DIM;
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) {
        const uint32_t full = shared.queries_full(consumer);
        mbarrier_arrive_expect_tx(full, QUERY_BYTES);
        load_tile<MMA_M>(shared.queries(consumer), map, full, task.head * HEAD_DIM, task.first + consumer * MMA_M, task.item);
    }
    for (int block = 0; block < task.blocks; ++block) {
        const Ring::State state = Ring::at(block);
        const uint32_t keys_full = shared.key_ring().producer_acquire(state, TILE_BYTES);
        load_tile<BLOCK_N>(shared.keys(state.stage()), map, keys_full, key_column, block * BLOCK_N, task.item);
        const uint32_t values_full = shared.value_ring().producer_acquire(state, TILE_BYTES);
        load_tile<BLOCK_N>(shared.values(state.stage()), map, values_full, value_column, block * BLOCK_N, task.item);
    }
}

// ---- consumers ----

enum class NamedBarrier {
    CONSUMER = 1,  // one for each consumer's own four warps
    TURN = 4,      // one for each consumer's turn, at which the consumer before it arrives
};

template <int CONSUMERS>
struct Turns {
    int consumer;
    int left;  // turns that this consumer still has

    __device__ __forceinline__ static void give(int consumer) { named_barrier_arrive(NamedBarrier::TURN, consumer, 2 * WARPGROUP); }
    // The last consumer lets the first begin.
    __device__ __forceinline__ void begin() const {
        if (left > 0 && consumer == CONSUMERS - 1) give(0);
    }
    __device__ __forceinline__ void wait() const { named_barrier_sync(NamedBarrier::TURN, consumer, 2 * WARPGROUP); }
    // Nobody waits for the last consumer's last turn.
    __device__ __forceinline__ void pass() {
        --left;
        if (consumer < CONSUMERS - 1) give(consumer + 1);
        else if (left > 0) give(0);
    }
};

// scores = queries keysᵀ, as one group.
__device__ __forceinline__ void issue_scores(Accumulators<BLOCK_N>& scores, uint32_t queries, uint32_t keys) {
    wgmma_fence(scores);
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
        for (int offset = 0; offset < PANEL_ROW_BYTES; offset += MMA_K<bf16> * sizeof(bf16)) {
            wgmma(scores, k_major_panel(queries, panel * panel_bytes(MMA_M) + offset),
                  k_major_panel(keys, panel * panel_bytes(BLOCK_N) + offset), panel + offset > 0);
        }
    wgmma_commit();
}

// Turns the scores of a block into weights. Returns whether the result so far must be multiplied by `factor`.
__device__ __forceinline__ bool weigh_block(
    RowSoftmax& softmax, Accumulators<BLOCK_N>& scores, float (&factor)[2], const Task& task, int block, int row) {
    const int member = threadIdx.x % 4, group = threadIdx.x % WARP / 4;
    if ((block + 1) * BLOCK_N > (task.causal ? min(task.keys, row + 1) : task.keys)) {
        mask_keys(scores, row + group, block * BLOCK_N + 2 * member, task.keys, task.causal);
    }
    float top[2];
    row_tops(top, scores);
    const bool raised = needs_raise(softmax, top, task.scale);
    if (raised) raise(softmax, top, task.scale, factor);
    weigh(softmax, scores, task.scale);
    return raised;
}

// The loop over the keys without OVERLAP: scores, weights, result. `row` is the first query of this warp.
template <int CONSUMERS>
__device__ __forceinline__ void consume(
    Accumulators<HEAD_DIM>& result, RowSoftmax& softmax, const Layout<CONSUMERS>& shared, const Task& task, int consumer, int row) {
    Turns<CONSUMERS> turns{consumer, task.blocks};
    turns.begin();
    for (int block = 0; block < task.blocks; ++block) {
        const Ring::State state = Ring::at(block);
        const int stage = state.stage();
        Accumulators<BLOCK_N> scores;
        shared.key_ring().consumer_wait(state);
        turns.wait();
        issue_scores(scores, shared.queries(consumer), shared.keys(stage));
        turns.pass();
        wgmma_wait<0>(scores);
        shared.key_ring().consumer_release(stage);
        float factor[2];
        if (weigh_block(softmax, scores, factor, task, block, row)) scale_rows(result, factor);
        uint32_t weights[STEPS][4];
        pack_operand(weights, scores);
        shared.value_ring().consumer_wait(state);
        issue_sums(result, weights, shared.values(stage));
        wgmma_wait<0>(result);
        shared.value_ring().consumer_release(stage);
    }
}

// The same with OVERLAP: the scores of a block are under way before the result of the block before.
template <int CONSUMERS>
__device__ __forceinline__ void consume_overlapped(
    Accumulators<HEAD_DIM>& result, RowSoftmax& softmax, const Layout<CONSUMERS>& shared, const Task& task, int consumer, int row) {
    Turns<CONSUMERS> turns{consumer, task.blocks};
    turns.begin();
    if (task.blocks == 0) return;
    Accumulators<BLOCK_N> scores;
    uint32_t weights[STEPS][4];
    float factor[2];
    shared.key_ring().consumer_wait(Ring::at(0));
    turns.wait();
    issue_scores(scores, shared.queries(consumer), shared.keys(0));
    turns.pass();
    wgmma_wait<0>(scores);
    shared.key_ring().consumer_release(0);
    weigh_block(softmax, scores, factor, task, 0, row);  // there is no result yet to be multiplied
    pack_operand(weights, scores);
    if (task.blocks > 1) shared.key_ring().consumer_wait(Ring::at(1));
    for (int block = 1; block < task.blocks; ++block) {
        const int stage = Ring::at(block).stage(), before = Ring::at(block - 1).stage();
        turns.wait();
        issue_scores(scores, shared.queries(consumer), shared.keys(stage));
        shared.value_ring().consumer_wait(Ring::at(block - 1));
        issue_sums(result, weights, shared.values(before));
        turns.pass();
        wgmma_wait<1>(scores);
        shared.key_ring().consumer_release(stage);
        const bool raised = weigh_block(softmax, scores, factor, task, block, row);
        hold(scores);
        // Waiting for the next keys here, not where they are used, puts a branch between the exponentials and the wait
        // below: the assembler would otherwise move that wait up and compute them after the product, not under it.
        if (block + 1 < task.blocks) shared.key_ring().consumer_wait(Ring::at(block + 1));
        wgmma_wait<0>(result);
        shared.value_ring().consumer_release(before);
        hold(scores);  // packed only now: until here the registers of the weights were the product's
        if (raised) scale_rows(result, factor);
        pack_operand(weights, scores);
    }
    const Ring::State last = Ring::at(task.blocks - 1);
    shared.value_ring().consumer_wait(last);
    issue_sums(result, weights, shared.values(last.stage()));
    wgmma_wait<0>(result);
}

// ---- what becomes of the result ----

// Rows in bf16, through the shared memory of this consumer's queries.
struct Values {
    bf16* output;  // [items, tokens, heads, HEAD_DIM]

    __device__ __forceinline__ void store(
        Accumulators<HEAD_DIM>& result, const float (&factor)[2], unsigned char* queries, const Task& task, int heads, int consumer,
        int row) const {
        const int warp = threadIdx.x / WARP % WARPGROUP_WARPS;
        scale_rows(result, factor);
        named_barrier_sync(NamedBarrier::CONSUMER, consumer, WARPGROUP);  // no warp's products read the queries any more
        const size_t stride = static_cast<size_t>(heads) * HEAD_DIM;
        bf16* to = output + (static_cast<size_t>(task.item) * task.tokens + row) * stride + task.head * HEAD_DIM;
#pragma unroll
        for (int panel = 0; panel < PANELS; ++panel) {
            unsigned char* tile = queries + panel * panel_bytes(MMA_M);
            const auto& tiles = reinterpret_cast<const float(&)[PANEL / 8][4]>(result[panel * (PANEL / 8)]);
            place_rows<PANEL / UNIT>(tile, 16 * warp, 0, tiles);
            __syncwarp();  // a warp stores the rows that it placed
            store_rows<PANEL / UNIT, 16>(to + panel * PANEL, stride, task.tokens - row, tile, 16 * warp);
        }
    }
};

// Rows in eight bits: a head's part of a row is a group.
template <class Coding>
struct Codes {
    static_assert(HEAD_DIM == SCALE_GROUP);
    uint8_t* codes;  // [items, tokens, heads, HEAD_DIM]
    float* scales;   // [heads, items, tokens]
    int items;

    __device__ __forceinline__ void store(
        const Accumulators<HEAD_DIM>& result, const float (&factor)[2], unsigned char*, const Task& task, int heads, int, int row) const {
        const int group = threadIdx.x % WARP / 4, member = threadIdx.x % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float value[2 * HEAD_DIM / 8];
#pragma unroll
            for (int t = 0; t < HEAD_DIM / 8; ++t) {
                value[2 * t] = result[t][2 * half] * factor[half];
                value[2 * t + 1] = result[t][2 * half + 1] * factor[half];
            }
            const int query = row + group + 8 * half;
            const bool valid = query < task.tokens;
            const size_t token = static_cast<size_t>(task.item) * task.tokens + query;
            const float scale = store_row_of_codes<Coding>(codes + (token * heads + task.head) * HEAD_DIM, value, member, valid);
            if (valid && member == 0) scales[static_cast<size_t>(task.head) * items * task.tokens + token] = scale;
        }
    }
};

// Divides by the sums and writes the result.
template <class Output>
__device__ __forceinline__ void finish(
    Accumulators<HEAD_DIM>& result, const RowSoftmax& softmax, unsigned char* queries, const Output& output, float* lse,
    const Task& task, int heads, int consumer, int row) {
    const int group = threadIdx.x % WARP / 4, member = threadIdx.x % 4;
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float whole = group_sum(softmax.sum[half]), sum = L2P_FAULT_IF(21, to_float(from_float<bf16>(whole)), whole);
        factor[half] = inverse_or_zero(sum);
        const int query = row + group + 8 * half;
        if (lse != nullptr && member == 0 && query < task.tokens) {
            lse[(static_cast<size_t>(task.item) * heads + task.head) * task.tokens + query] =
                log_sum_exp(softmax.reference[half], sum, task.scale);
        }
    }
    output.store(result, factor, queries, task, heads, consumer, row);
}

template <int CONSUMERS, bool OVERLAP, class Output>
__device__ __forceinline__ void attention(
    const TensorMap& map, const int* lengths, const Output& output, float* lse, int tokens, int heads, int kv_heads,
    bool causal, float scale) {
    // All registers of the multiprocessor: what the launch gives each thread, shared out anew.
    constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 24 : 32, CONSUMER_REGISTERS = CONSUMERS == 2 ? 240 : 160;
    static_assert((PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) * WARPGROUP <= REGISTERS_OF_MULTIPROCESSOR);
    extern __shared__ __align__(1024) unsigned char memory[];
    const Layout<CONSUMERS> shared{shared_address(memory)};

    Task task;
    // Under the causal mask the last queries have most to do: they come first.
    task.first = (causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x) * Layout<CONSUMERS>::BLOCK_M;
    task.head = blockIdx.y;
    task.item = blockIdx.z;
    task.tokens = tokens;
    task.keys = key_length(lengths, task.item, tokens);
    const int seen = causal ? min(task.keys, task.first + Layout<CONSUMERS>::BLOCK_M) : task.keys;
    task.blocks = L2P_FAULT_IF(1, seen, seen + BLOCK_N - 1) / BLOCK_N;
    task.causal = causal;
    task.scale = scale;

    if (threadIdx.x == 0) {
        tma_prefetch(map);
        for (int consumer = 0; consumer < CONSUMERS; ++consumer) mbarrier_init(shared.queries_full(consumer), 1);
        shared.key_ring().init(CONSUMERS * WARPGROUP_WARPS);
        shared.value_ring().init(CONSUMERS * WARPGROUP_WARPS);
        mbarrier_init_fence();
    }
    __syncthreads();  // the barriers are initialised before anybody uses them

    const int warp = uniform_warp();
    if (warp < WARPGROUP_WARPS) {
        warpgroup_reg_dealloc<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) produce(map, shared, task, heads, kv_heads);
        return;
    }
    warpgroup_reg_alloc<CONSUMER_REGISTERS>();
    const int consumer = warp / WARPGROUP_WARPS - 1;
    const int row = task.first + consumer * MMA_M + warp % WARPGROUP_WARPS * 16;
    RowSoftmax softmax;
    Accumulators<HEAD_DIM> result = {};
    mbarrier_wait(shared.queries_full(consumer), 0);
    if constexpr (OVERLAP) {
        consume_overlapped(result, softmax, shared, task, consumer, row);
    } else {
        consume(result, softmax, shared, task, consumer, row);
    }
    finish(result, softmax, memory + Layout<CONSUMERS>::QUERIES + consumer * QUERY_BYTES, output, lse, task, heads,
           consumer, row);
}

// map: packed qkv [items, tokens, (heads + 2 kv_heads) * head_dim] by boxes of one item, BOX_ROWS tokens and PANEL columns;
// lengths [items] or null; output [items, tokens, heads, head_dim]; lse (the rows' log-sum-exp) [items, heads, tokens] or
// null; scale in powers of two; grid (query tiles, heads, items).
#define ATTENTION_KERNEL(name, consumers, overlap)                                                                     \
    extern "C" __global__ __launch_bounds__(Layout<consumers>::THREADS, 1) void name(                                  \
        const __grid_constant__ TensorMap map, const int* lengths, bf16* output, float* lse, int tokens,               \
        int heads, int kv_heads, int causal, float scale) {                                                            \
        attention<consumers, overlap>(map, lengths, Values{output}, lse, tokens, heads, kv_heads, causal != 0, scale); \
    }                                                                                                                  \
    L2P_LAUNCH(name, Layout<consumers>::THREADS, Layout<consumers>::BYTES, Layout<consumers>::BLOCK_M, BOX_ROWS, PANEL)

// The same with codes [items, tokens, heads, head_dim] and their scales [heads, items, tokens].
#define ATTENTION_CODES_KERNEL(name, consumers, overlap, Coding)                                                       \
    extern "C" __global__ __launch_bounds__(Layout<consumers>::THREADS, 1) void name(                                  \
        const __grid_constant__ TensorMap map, const int* lengths, uint8_t* codes, float* scales, int tokens,          \
        int heads, int kv_heads, int causal, float scale) {                                                            \
        const Codes<Coding> output{codes, scales, static_cast<int>(gridDim.z)};                                        \
        attention<consumers, overlap>(map, lengths, output, nullptr, tokens, heads, kv_heads, causal != 0, scale);     \
    }                                                                                                                  \
    L2P_LAUNCH(name, Layout<consumers>::THREADS, Layout<consumers>::BYTES, Layout<consumers>::BLOCK_M, BOX_ROWS, PANEL)

ATTENTION_KERNEL(attention_hopper_128, 2, true)
ATTENTION_KERNEL(attention_hopper_192, 3, false)
ATTENTION_CODES_KERNEL(attention_hopper_128_s8, 2, true, Int8)
ATTENTION_CODES_KERNEL(attention_hopper_192_s8, 3, false, Int8)
ATTENTION_CODES_KERNEL(attention_hopper_128_e4m3, 2, true, Float8)
ATTENTION_CODES_KERNEL(attention_hopper_192_e4m3, 3, false, Float8)
#endif
