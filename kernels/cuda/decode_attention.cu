// Attention of one new token of each item to all that came before it; engine/src/ops/decode_attention.rs holds the contract.
//
// A block takes the query heads of one key/value head and a run of keys, which it reads once for all of them. The runs of an item are
// as long as its own number of keys asks for, so that a recorded launch serves every length. Half a warp reads a key with 16 bytes per
// lane; a half keeps its own maximum and sums. The block whose run ends the item makes the new key, puts it and the new value into the
// cache and reads them from there. Earlier tokens' keys have stood there since the steps before this one, so that a block's first ones
// are under way before the kernel ahead has ended. Runs leave what they found in memory, and the last block of an item's key head to
// arrive puts it together, in the order of the runs. Bound by memory: 4 bytes per key, value and element, once for all heads of a group.
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/overlap.cuh"
#include "common/reduce.cuh"

constexpr int HEAD_DIM = 128;
constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr int LANES = HEAD_DIM / 8;       // that read a key
constexpr int HALVES = WARP / LANES;      // keys that a warp reads side by side
constexpr int KEYS = 4;                   // of a half in one step
constexpr int STEP = WARPS * HALVES * KEYS;  // keys of a block in one step
constexpr int MOST_RUNS = 16;  // that an item's keys are divided into; more would take longer to put together than they save
static_assert(THREADS == HEAD_DIM, "a thread of the last block puts one element of each head together");

// One head's row, normalised and turned, of which this lane gets elements 2 lane, 2 lane + 1 and those 64 further on.
__device__ __forceinline__ void norm_and_turn(
    float (&out)[4], const bf16* row, const bf16* factor, const float* angles, float epsilon) {
    const int lane = threadIdx.x % WARP;
    float2 value[2], weight[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        value[i] = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(row + 2 * lane + i * HEAD_DIM / 2));
        weight[i] = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(factor + 2 * lane + i * HEAD_DIM / 2));
    }
    const float squares = value[0].x * value[0].x + value[0].y * value[0].y + value[1].x * value[1].x + value[1].y * value[1].y;
    const float inverse = rsqrtf(warp_sum(squares) / HEAD_DIM + epsilon);
    const float4 turn = *reinterpret_cast<const float4*>(angles + 4 * lane);  // cosine and sine of both pairs
    const float a0 = value[0].x * inverse * weight[0].x, a1 = value[0].y * inverse * weight[0].y;
    const float b0 = value[1].x * inverse * weight[1].x, b1 = value[1].y * inverse * weight[1].y;
    out[0] = a0 * turn.x - b0 * turn.y, out[1] = a1 * turn.z - b1 * turn.w;
    out[2] = a0 * turn.y + b0 * turn.x, out[3] = a1 * turn.w + b1 * turn.z;
}

// What a group of heads has of some keys: the largest score, the sum of weights relative to it, and the weighted sum of values.
template <int GROUP>
struct Found {
    float top[GROUP];
    float sum[GROUP];
    float result[GROUP][8];
};

// GROUP query heads at most share a key head.
template <int GROUP>
__device__ __forceinline__ void decode_attention(
    const bf16* qkv, const bf16* q_factor, const bf16* k_factor, const float* table, const int* positions, bf16* cache, bf16* output,
    float* partial, int* arrived, int heads, int kv_heads, int capacity, int table_rows, float epsilon, float scale) {
    __shared__ __align__(16) float queries[GROUP][HEAD_DIM];
    __shared__ __align__(16) float results[WARPS][GROUP][HEAD_DIM];
    __shared__ float tops[WARPS][GROUP], sums[WARPS][GROUP];
    __shared__ bool is_last;
    const int run = blockIdx.x, kv_head = blockIdx.y, item = blockIdx.z;
    const int group = heads / kv_heads;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int half = lane / LANES, part = lane % LANES * 8;
    let_next_begin();
    const int position = positions[item];  // there since before the step, as is the cache
    bf16* to = output + (static_cast<size_t>(item) * heads + kv_head * group) * HEAD_DIM;
    if (position < 0 || position >= min(capacity, table_rows)) {  // the same for all threads: nobody is there
        wait_for_previous();
        if (run == 0) {
            for (int head = 0; head < group; ++head) to[head * HEAD_DIM + threadIdx.x] = from_float<bf16>(0.0f);
        }
        return;
    }
    const int keys = position + 1;
    const int run_keys = ((keys + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x) + STEP - 1) / STEP * STEP;
    const int runs = (keys + run_keys - 1) / run_keys;
    if (run >= runs) return;
    const int first = run * run_keys, end = min(keys, first + run_keys);

    // Keys come first in the cache, [2, items, kv_heads, capacity, HEAD_DIM].
    bf16* key_rows = cache + (static_cast<size_t>(item) * kv_heads + kv_head) * capacity * HEAD_DIM;
    bf16* value_rows = key_rows + static_cast<size_t>(gridDim.z) * kv_heads * capacity * HEAD_DIM;
    const bf16* row = qkv + static_cast<size_t>(item) * (heads + 2 * kv_heads) * HEAD_DIM;
    const float* angles = table + static_cast<size_t>(position) * HEAD_DIM;
    const int own = (warp * HALVES + half) * KEYS;
    Bf16x8 keys_now[KEYS], values[KEYS];
    const auto load = [&](int i, int key) {
        const size_t place = static_cast<size_t>(key) * HEAD_DIM + part;
        keys_now[i] = *reinterpret_cast<const Bf16x8*>(key_rows + place);
        values[i] = *reinterpret_cast<const Bf16x8*>(value_rows + place);
    };
#pragma unroll
    for (int i = 0; i < KEYS; ++i) load(i, min(first + own + i, end - 1));
    wait_for_previous();
    for (int head = warp; head < group; head += WARPS) {
        float turned[4];
        norm_and_turn(turned, row + (kv_head * group + head) * HEAD_DIM, q_factor, angles, epsilon);
#pragma unroll
        for (int i = 0; i < 4; ++i) queries[head][2 * lane + i % 2 + i / 2 * HEAD_DIM / 2] = turned[i] * scale;
    }
    if (end == keys && warp == WARPS - 1) {
        float turned[4];
        norm_and_turn(turned, row + (heads + kv_head) * HEAD_DIM, k_factor, angles, epsilon);
        bf16* key = key_rows + static_cast<size_t>(position) * HEAD_DIM + 2 * lane;
        *reinterpret_cast<__nv_bfloat162*>(key) = __floats2bfloat162_rn(turned[0], turned[1]);
        *reinterpret_cast<__nv_bfloat162*>(key + HEAD_DIM / 2) = __floats2bfloat162_rn(turned[2], turned[3]);
        const uint2 value = reinterpret_cast<const uint2*>(row + (heads + kv_heads + kv_head) * HEAD_DIM)[lane];
        reinterpret_cast<uint2*>(value_rows + static_cast<size_t>(position) * HEAD_DIM)[lane] = value;
    }
    __syncthreads();  // queries, and the new key and value, are there

    Found<GROUP> found;
    float query[GROUP][8];
#pragma unroll
    for (int head = 0; head < GROUP; ++head) {
        found.top[head] = -INFINITY, found.sum[head] = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) found.result[head][i] = 0.0f;
        load8(query[head], &queries[head < group ? head : 0][part]);
    }
    for (int start = first; start < end; start += STEP) {
        const int mine = start + own;
        float scores[KEYS][GROUP];
#pragma unroll
        for (int i = 0; i < KEYS; ++i) {
            // Keys past the end are doubles of the last one and get no weight. The new one was not there yet for the first loads.
            const int key = min(mine + i, end - 1);
            if (start > first || key == position) load(i, key);
            float elements[8];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float2 pair = __bfloat1622float2(keys_now[i].pair[j]);
                elements[2 * j] = pair.x, elements[2 * j + 1] = pair.y;
            }
#pragma unroll
            for (int head = 0; head < GROUP; ++head) {
                float product = 0.0f;
#pragma unroll
                for (int j = 0; j < 8; ++j) product += query[head][j] * elements[j];
                scores[i][head] = product;
            }
        }
#pragma unroll
        for (int i = 0; i < KEYS; ++i)
#pragma unroll
            for (int head = 0; head < GROUP; ++head) {
#pragma unroll
                for (int offset = LANES / 2; offset > 0; offset /= 2) {
                    scores[i][head] += __shfl_xor_sync(FULL_WARP, scores[i][head], offset);
                }
                if (mine + i >= L2P_FAULT_IF(32, keys + 1, end)) scores[i][head] = -INFINITY;
            }
#pragma unroll
        for (int head = 0; head < GROUP; ++head) {
            float top = found.top[head];
#pragma unroll
            for (int i = 0; i < KEYS; ++i) top = fmaxf(top, scores[i][head]);
            if (top == -INFINITY) continue;  // the half has met no key yet
            const float factor = exp2_approximate(found.top[head] - top);
            found.top[head] = top;
            found.sum[head] *= factor;
#pragma unroll
            for (int j = 0; j < 8; ++j) found.result[head][j] *= factor;
#pragma unroll
            for (int i = 0; i < KEYS; ++i) {
                const float weight = exp2_approximate(scores[i][head] - top);
                found.sum[head] += weight;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float2 pair = __bfloat1622float2(values[i].pair[j]);
                    found.result[head][2 * j] += weight * pair.x;
                    found.result[head][2 * j + 1] += weight * pair.y;
                }
            }
        }
    }

    // The halves of a warp, then the warps.
#pragma unroll
    for (int head = 0; head < GROUP; ++head) {
        const float other = __shfl_xor_sync(FULL_WARP, found.top[head], LANES);
        const float top = fmaxf(found.top[head], other);
        const float factor = top == -INFINITY ? 0.0f : exp2_approximate(found.top[head] - top);
        float sum = found.sum[head] * factor;
        sum += __shfl_xor_sync(FULL_WARP, sum, LANES);
        float result[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            result[j] = found.result[head][j] * factor;
            result[j] += __shfl_xor_sync(FULL_WARP, result[j], LANES);
        }
        if (half == 0) store8(&results[warp][head][part], result);
        if (lane == 0) tops[warp][head] = top, sums[warp][head] = sum;
    }
    __syncthreads();  // the warps' parts are there

    // partial: of every run of an item's key head, for each head of the group, HEAD_DIM results, the sum and the top.
    constexpr int PARTIAL = HEAD_DIM + 4;  // a multiple of 16 bytes
    const size_t of_item = (static_cast<size_t>(item) * kv_heads + kv_head) * gridDim.x;
#pragma unroll
    for (int head = 0; head < GROUP; ++head) {
        if (head >= group) break;
        float top = tops[0][head];
#pragma unroll
        for (int i = 1; i < WARPS; ++i) top = fmaxf(top, tops[i][head]);
        float sum = 0.0f, result = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) {
            const float factor = exp2_approximate(tops[i][head] - top);  // 0 of a warp without keys: some warp has one
            sum += sums[i][head] * factor;
            result += results[i][head][threadIdx.x] * factor;
        }
        if (runs == 1) {
            to[head * HEAD_DIM + threadIdx.x] = from_float<bf16>(result / sum);
            continue;
        }
        float* mine = partial + ((of_item + run) * group + head) * PARTIAL;
        mine[threadIdx.x] = result;
        if (threadIdx.x == 0) mine[HEAD_DIM] = sum, mine[HEAD_DIM + 1] = top;
    }
    if (runs == 1) return;
    __threadfence();  // this run's part is seen before its arrival
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(arrived + item * kv_heads + kv_head, 1) == runs - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();  // and the others' parts after theirs
    // A warp takes a head: a lane four of its elements of every run, and the sum and top of one run.
    for (int head = warp; head < group; head += WARPS) {
        const float* parts = partial + (of_item * group + head) * PARTIAL;
        const auto of_run = [&](int i) { return parts + i * group * PARTIAL; };
        float4 values[MOST_RUNS];
#pragma unroll
        for (int i = 0; i < MOST_RUNS; ++i) {
            if (i < runs) values[i] = __ldcg(reinterpret_cast<const float4*>(of_run(i)) + lane);
        }
        const bool counts = lane >= L2P_FAULT_IF(33, 1, 0) && lane < runs;
        const float its_sum = counts ? __ldcg(of_run(lane) + HEAD_DIM) : 0.0f;
        const float its_top = counts ? __ldcg(of_run(lane) + HEAD_DIM + 1) : -INFINITY;
        const float top = warp_max(its_top);
        const float factor = counts ? exp2_approximate(its_top - top) : 0.0f;
        const float inverse = 1.0f / warp_sum(its_sum * factor);
        float result[4] = {};
#pragma unroll
        for (int i = 0; i < MOST_RUNS; ++i) {
            if (i >= runs) break;
            const float its = __shfl_sync(FULL_WARP, factor, i);
            result[0] += values[i].x * its, result[1] += values[i].y * its;
            result[2] += values[i].z * its, result[3] += values[i].w * its;
        }
        __nv_bfloat162* out = reinterpret_cast<__nv_bfloat162*>(to + head * HEAD_DIM + 4 * lane);
        out[0] = __floats2bfloat162_rn(result[0] * inverse, result[1] * inverse);
        out[1] = __floats2bfloat162_rn(result[2] * inverse, result[3] * inverse);
    }
    if (threadIdx.x == 0) arrived[item * kv_heads + kv_head] = 0;  // for the next launch
}

// qkv [items, (heads + 2 kv_heads) HEAD_DIM]; factors [HEAD_DIM]; table [table_rows, HEAD_DIM / 2, 2]; positions [items]; cache
// [2, items, kv_heads, capacity, HEAD_DIM]; output [items, heads HEAD_DIM]; partial [items, kv_heads, runs, heads / kv_heads,
// HEAD_DIM + 4]; arrived [items, kv_heads], zeros; scale in powers of two; grid (runs, kv_heads, items). The tile says how many heads
// may share a key head, how many keys a run has at least, and how many runs there are at most.
#define L2P_DECODE_ATTENTION(GROUP)                                                                                          \
    extern "C" __global__ __launch_bounds__(THREADS) void decode_attention_##GROUP(                                          \
        const bf16* qkv, const bf16* q_factor, const bf16* k_factor, const float* table, const int* positions, bf16* cache,  \
        bf16* output, float* partial, int* arrived, int heads, int kv_heads, int capacity, int table_rows, float epsilon,    \
        float scale) {                                                                                                       \
        decode_attention<GROUP>(                                                                                             \
            qkv, q_factor, k_factor, table, positions, cache, output, partial, arrived, heads, kv_heads, capacity,           \
            table_rows, epsilon, scale);                                                                                     \
    }                                                                                                                        \
    L2P_LAUNCH(decode_attention_##GROUP, THREADS, 0, GROUP, STEP, MOST_RUNS)

L2P_DECODE_ATTENTION(2)
L2P_DECODE_ATTENTION(4)
L2P_DECODE_ATTENTION(8)

// Puts the keys and values of `tokens` tokens into the cache of one item, from its first position on. qkv [tokens, heads + 2 kv_heads,
// HEAD_DIM], keys normalised and turned; cache as above; one block per token, 16 bytes per thread.
extern "C" __global__ __launch_bounds__(THREADS) void keep_keys(
    const bf16* qkv, bf16* cache, int item, int items, int heads, int kv_heads, int capacity, int vectors_of_head) {
    const int token = blockIdx.x;
    const size_t width = static_cast<size_t>(heads + 2 * kv_heads) * vectors_of_head;
    const uint4* from = reinterpret_cast<const uint4*>(qkv) + token * width + static_cast<size_t>(heads) * vectors_of_head;
    uint4* to = reinterpret_cast<uint4*>(cache);
    for (int i = threadIdx.x; i < 2 * kv_heads * vectors_of_head; i += THREADS) {
        const int head = i / vectors_of_head, vector = i % vectors_of_head;
        const int kind = head / kv_heads, kv_head = head % kv_heads;
        const size_t row = ((static_cast<size_t>(kind) * items + item) * kv_heads + kv_head) * capacity + token;
        to[row * vectors_of_head + vector] = from[i];
    }
}
L2P_LAUNCH(keep_keys, THREADS, 0, 1)
