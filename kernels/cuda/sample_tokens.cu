// The next token of each row of logits; engine/src/ops/sample_tokens.rs holds the contract.
//
// A block takes a row and walks over it several times: for the largest logit; for each bound on what may be drawn three times, which
// find the last admitted distance from it by its bits; and twice to draw. Weights are whole numbers, so that no sum depends on an order.
// The row stays in L2: what counts is how long one multiprocessor takes to read it.
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / WARP;
constexpr int BINS = 2048;
constexpr int BINS_OF_THREAD = BINS / THREADS;
constexpr int KEY_BITS = 26;     // behind the point of a distance
constexpr int WEIGHT_BITS = 28;  // the largest weight is 2^28; a distance of 28 powers of two or more has none
constexpr int LOW_BITS = 14;     // of a weight that are summed by themselves
constexpr unsigned NO_KEY = ~0u;
constexpr float LOG2_E = 1.4426950408889634f;

using Sum = unsigned long long;

// A row of logits and which of them may be drawn.
struct Row {
    const float* logits;
    const uint32_t* allowed;  // a bit per token, or null
    int vocabulary;
    float top;      // the largest logit that may be drawn
    float inverse;  // of the temperature, in powers of two

    __device__ __forceinline__ bool may(int token) const {
        return allowed == nullptr || (allowed[token / 32] >> token % 32 & 1);
    }

    // How far a token is below the largest one, in powers of two with KEY_BITS behind the point; NO_KEY without weight.
    __device__ __forceinline__ unsigned key(int token) const {
        const float distance = (top - logits[token]) * inverse;
        return distance < WEIGHT_BITS && may(token) ? static_cast<unsigned>(distance * (1 << KEY_BITS)) : NO_KEY;
    }
};

__device__ __forceinline__ unsigned weight_of(unsigned key) {
    const float power = exp2_approximate(static_cast<float>(key) * (-1.0f / (1 << KEY_BITS)));
    return static_cast<unsigned>(power * (1 << WEIGHT_BITS));
}

struct Shared {
    unsigned counts[BINS], low[BINS], high[BINS];
    Sum of_warp[2][WARPS];
    float tops[WARPS];
    int places[WARPS];
    unsigned bin;
    Sum before[2];
    int chosen;
};

__device__ __forceinline__ Sum warp_total(Sum value) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(FULL_WARP, value, offset);
    return value;
}

// The sum over this and all lower lanes.
__device__ __forceinline__ Sum warp_prefix(Sum value) {
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        const Sum other = __shfl_up_sync(FULL_WARP, value, offset);
        if (threadIdx.x % WARP >= offset) value += other;
    }
    return value;
}

// The largest allowed logit and the first token that has it, -1 where there is none; the same for all threads.
__device__ __forceinline__ int find_top(Row& row, Shared& shared) {
    float top = -INFINITY;
    int place = -1;
    for (int token = threadIdx.x; token < row.vocabulary; token += THREADS) {
        const float logit = row.logits[token];
        if (logit > top && row.may(token)) top = logit, place = token;
    }
    const auto better = [&](float other, int its_place) {
        if (its_place >= 0 && (other > top || place < 0 || (other == top && its_place < place))) top = other, place = its_place;
    };
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        const float other = __shfl_xor_sync(FULL_WARP, top, offset);
        better(other, __shfl_xor_sync(FULL_WARP, place, offset));
    }
    if (threadIdx.x % WARP == 0) shared.tops[threadIdx.x / WARP] = top, shared.places[threadIdx.x / WARP] = place;
    __syncthreads();
    for (int warp = 0; warp < WARPS; ++warp) better(shared.tops[warp], shared.places[warp]);
    row.top = top;
    return place;
}

// Sums counts and weights of the tokens whose key is at most `limit` and agrees with `prefix` above `shift` + 10 bits, by the bits
// from `shift` on; then finds the bin in which the tokens so far, `before` included, reach what `target` makes of the weight of all.
// Moves `before` up to that bin.
template <class Target>
__device__ __forceinline__ unsigned find_bin(
    const Row& row, Shared& shared, unsigned limit, unsigned prefix, int shift, bool counts, Sum (&before)[2], Target target) {
    __syncthreads();  // nobody reads the last bins any more
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) shared.counts[bin] = shared.low[bin] = shared.high[bin] = 0;
    __syncthreads();
    const int above = shift + 10 + (shift == 20);  // the first digit has eleven bits
    for (int token = threadIdx.x; token < row.vocabulary; token += THREADS) {
        const unsigned key = row.key(token);
        if (key > limit || (shift < 20 && key >> above != prefix)) continue;
        const unsigned bin = shift == 20 ? key >> 20 : key >> shift & 1023, weight = weight_of(key);
        atomicAdd(shared.counts + bin, 1);
        atomicAdd(shared.low + bin, weight & ((1 << LOW_BITS) - 1));
        atomicAdd(shared.high + bin, weight >> LOW_BITS);
    }
    __syncthreads();
    Sum mine[2][BINS_OF_THREAD], prefixes[2];
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
        Sum total = 0;
#pragma unroll
        for (int i = 0; i < BINS_OF_THREAD; ++i) {
            const int bin = threadIdx.x * BINS_OF_THREAD + i;
            const Sum weight = (static_cast<Sum>(shared.high[bin]) << LOW_BITS) + shared.low[bin];
            total += mine[kind][i] = kind == 0 ? shared.counts[bin] : weight;
        }
        prefixes[kind] = warp_prefix(total);
        if (threadIdx.x % WARP == WARP - 1) shared.of_warp[kind][threadIdx.x / WARP] = prefixes[kind];
        prefixes[kind] -= total;
    }
    if (threadIdx.x == 0) shared.bin = BINS;
    __syncthreads();
    Sum all = before[1];
    for (int warp = 0; warp < WARPS; ++warp) {
        all += shared.of_warp[1][warp];
        if (warp >= static_cast<int>(threadIdx.x / WARP)) continue;
        prefixes[0] += shared.of_warp[0][warp], prefixes[1] += shared.of_warp[1][warp];
    }
    const Sum wanted = target(all);
    Sum reached[2] = {before[0] + prefixes[0], before[1] + prefixes[1]};
    const int kind = counts ? 0 : 1;
#pragma unroll
    for (int i = 0; i < BINS_OF_THREAD; ++i) {
        const Sum next[2] = {reached[0] + mine[0][i], reached[1] + mine[1][i]};
        if (reached[kind] < wanted && next[kind] >= wanted) {  // of one thread at most
            shared.bin = threadIdx.x * BINS_OF_THREAD + i;
            shared.before[0] = reached[0], shared.before[1] = reached[1];
        }
        reached[0] = next[0], reached[1] = next[1];
    }
    __syncthreads();
    if (shared.bin < BINS) before[0] = shared.before[0], before[1] = shared.before[1];
    return shared.bin;
}

// The smallest key so that the tokens up to it, by number or by weight, reach the target; `limit` where all do not.
template <class Target>
__device__ __forceinline__ unsigned bound(const Row& row, Shared& shared, unsigned limit, bool counts, Target target) {
    Sum before[2] = {0, 0}, wanted = 0;
    const unsigned first = find_bin(row, shared, limit, 0, 20, counts, before, [&](Sum all) { return wanted = target(all); });
    if (first == BINS) return limit;
    const auto same = [&](Sum) { return wanted; };
    const unsigned second = find_bin(row, shared, limit, first, 10, counts, before, same);
    const unsigned third = find_bin(row, shared, limit, first << 10 | second, 0, counts, before, same);
    return min(limit, first << 20 | second << 10 | third);
}

// Draws among the tokens whose key is at most `limit`, in the order of the vocabulary, by 32 random bits.
__device__ __forceinline__ int draw(const Row& row, Shared& shared, unsigned limit, unsigned random) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int segment = (row.vocabulary + THREADS - 1) / THREADS * WARP;
    const int first = warp * segment, end = min(row.vocabulary, first + segment);
    Sum sum = 0;
    for (int token = first + lane; token < end; token += WARP) {
        const unsigned key = row.key(token);
        if (key <= limit && key != NO_KEY) sum += weight_of(key);
    }
    sum = warp_total(sum);
    __syncthreads();  // nobody reads what was there before
    if (lane == 0) shared.of_warp[0][warp] = sum;
    if (threadIdx.x == 0) shared.chosen = -1;
    __syncthreads();
    Sum all = 0, before = 0;
    for (int i = 0; i < WARPS; ++i) {
        if (i == warp) before = all;
        all += shared.of_warp[0][i];
    }
    const Sum wanted = __umul64hi(all, static_cast<Sum>(random) << 32);  // below `all`
    if (wanted >= before && wanted < before + sum) {  // of one warp
        for (int start = first; start < end; start += WARP) {
            const int token = start + lane;
            const unsigned key = token < end ? row.key(token) : NO_KEY;
            const Sum weight = key <= limit && key != NO_KEY ? weight_of(key) : 0;
            const Sum reached = before + warp_prefix(weight);
            if (wanted < reached && wanted >= reached - weight) shared.chosen = token;
            before = __shfl_sync(FULL_WARP, reached, WARP - 1);
            if (wanted < before) break;
        }
    }
    __syncthreads();
    return shared.chosen;
}

// logits [rows, vocabulary]; choices [rows, 4]: temperature and share of the probability as bits of floats, number of tokens, random
// bits; allowed [rows, (vocabulary + 31) / 32] or null; tokens [rows], -1 where no token may be drawn. One block per row.
extern "C" __global__ __launch_bounds__(THREADS) void sample_tokens(
    const float* logits, const int* choices, const int* allowed, int* tokens, int vocabulary) {
    __shared__ Shared shared;
    const size_t index = blockIdx.x;
    const int* choice = choices + 4 * index;
    const float temperature = __int_as_float(choice[0]), share = __int_as_float(choice[1]);
    const uint32_t* mask = allowed == nullptr ? nullptr : reinterpret_cast<const uint32_t*>(allowed) + index * ((vocabulary + 31) / 32);
    Row row{logits + index * vocabulary, mask, vocabulary, 0.0f, LOG2_E / temperature};
    int token = find_top(row, shared);
    if (temperature > 0.0f && token >= 0) {
        unsigned limit = NO_KEY - 1;
        if (choice[2] > 0) {
            const Sum most = static_cast<Sum>(choice[2]);
            limit = bound(row, shared, limit, true, [=](Sum) { return most; });
        }
        if (share < 1.0f) {
            const double part = share;
            limit = bound(row, shared, limit, false, [=](Sum all) {
                const Sum wanted = static_cast<Sum>(part * static_cast<double>(all));
                return L2P_FAULT_IF(34, all, wanted > 0 ? wanted : 1);
            });
        }
        token = draw(row, shared, limit, static_cast<unsigned>(choice[3]));
    }
    if (threadIdx.x == 0) tokens[index] = token;
}
L2P_LAUNCH(sample_tokens, THREADS, 0, 1)
