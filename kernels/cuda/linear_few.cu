// Linear layers for 1 to 32 rows; engine/src/ops/linear_few.rs holds the contract.
//
// Bound by memory: 2 bytes per weight, each read once. Tensor cores do the arithmetic for any number of rows: A is 16 rows of weights,
// B the transposed rows of x. The order of the summed elements within a product is free as long
// as A and B agree on it, so a thread feeds its fragments with 16 consecutive bytes of a weight's row, straight from memory, and with
// the same 16 bytes of x: with CHUNK = 64 summed elements, member m of a group holds elements 8 m to 8 m + 7 and 32 more on. Columns of
// B past the last row of x are doubles of it, and their sums are dropped.
//
// A block makes a tile of 16 outputs (SwiGLU: 16 gates and the 16 factors that go with them). Its warps take chunks in turn, each with
// DEPTH of them on their way in registers, those of the next tile included; their sums meet in shared memory, in the order of the warps
// whatever the number of rows, so that a row's result does not depend on its neighbours.
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/overlap.cuh"
#include "common/reduce.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int TILE = 16;        // outputs
constexpr int CHUNK = 64;       // summed elements of one step of a warp: 128 bytes of each row of weights
constexpr int HALF = CHUNK / 2;
constexpr int MOST_NORMED = WARPS;  // rows that are normalised on the way: a warp each

struct Sizes {
    int rows;     // of x
    int depth;    // summed elements, a multiple of 8
    int outputs;  // of a row; SwiGLU: half of the weights' rows
};

// 16 bytes of weights, which nobody reads again.
__device__ __forceinline__ uint4 load_once(const bf16* from) {
    uint4 words;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(from));
    return words;
}

__device__ __forceinline__ uint4 zeros() { return make_uint4(0, 0, 0, 0); }

// A warp's step of the weights: rows `group` and `group` + 8 of each of PARTS tiles, both halves of the chunk.
template <int PARTS>
struct Weights {
    uint4 words[PARTS][2][2];

    // `first` is the tile's first output; part 1 lies `outputs` rows further on. Rows past the last are doubles of it and are not kept.
    __device__ __forceinline__ void load(const bf16* weight, const Sizes& sizes, int first, int element) {
        const int group = threadIdx.x % WARP / 4;
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const int output = min(first + group + 8 * row, sizes.outputs - 1) + part * sizes.outputs;
                const bf16* from = weight + static_cast<size_t>(output) * sizes.depth + element;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const bool inside = element + half * HALF < L2P_FAULT_IF(30, sizes.depth / CHUNK * CHUNK, sizes.depth);
                    words[part][row][half] = inside ? load_once(from + half * HALF) : zeros();
                }
            }
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
#pragma unroll
            for (int row = 0; row < 2; ++row) words[part][row][0] = words[part][row][1] = zeros();
    }
};

// x as it stands.
struct Plain {
    const bf16* x;  // [rows, depth]

    __device__ __forceinline__ void prepare(const Sizes&, float*) {}
    __device__ __forceinline__ uint4 at(int row, int element, const Sizes& sizes) const {
        return *reinterpret_cast<const uint4*>(x + (row * sizes.depth + element));  // 32 rows fit 32 bits
    }
};

// x normalised on the way: x / rms(x) * factor, rounded as by rms_norm. At most MOST_NORMED rows.
struct Normed {
    const bf16* x;       // [rows, depth]
    const bf16* factor;  // [depth]
    float epsilon;
    const float* inverse = nullptr;

    // 1 / rms of each row, by a warp each. `scratch` holds MOST_NORMED floats.
    __device__ __forceinline__ void prepare(const Sizes& sizes, float* scratch) {
        const int row = threadIdx.x / WARP;
        if (row < sizes.rows) {
            float squares = 0.0f;
            for (int i = threadIdx.x % WARP * 8; i < sizes.depth; i += WARP * 8) {
                float values[8];
                load8(values, x + static_cast<size_t>(row) * sizes.depth + i);
#pragma unroll
                for (int j = 0; j < 8; ++j) squares += values[j] * values[j];
            }
            squares = warp_sum(squares);
            if (threadIdx.x % WARP == 0) scratch[row] = rsqrtf(squares / sizes.depth + epsilon);
        }
        __syncthreads();  // all rows' factors are there
        inverse = scratch;
    }

    __device__ __forceinline__ uint4 at(int row, int element, const Sizes& sizes) const {
        float values[8], factors[8];
        load8(values, x + (row * sizes.depth + element));  // as above
        load8(factors, factor + element);
        const float scale = inverse[row];
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            packed[i] = pack_pair(values[2 * i] * (scale * factors[2 * i]), values[2 * i + 1] * (scale * factors[2 * i + 1]));
        }
        return make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
};

// ---- what becomes of a sum ----

template <class T>
struct Store {
    T* y;  // [rows, outputs]

    template <int PARTS>
    __device__ __forceinline__ void operator()(const float (&sums)[PARTS], size_t place) const {
        y[place] = from_float<T>(sums[0]);
    }
};

struct Add {
    bf16* y;  // [rows, outputs], added to

    template <int PARTS>
    __device__ __forceinline__ void operator()(const float (&sums)[PARTS], size_t place) const {
        y[place] = from_float<bf16>(to_float(y[place]) + sums[0]);
    }
};

struct SwiGlu {
    bf16* y;  // [rows, outputs]

    __device__ __forceinline__ void operator()(const float (&sums)[2], size_t place) const {
        y[place] = from_float<bf16>(silu(sums[0]) * sums[1]);
    }
};

// ---- the product ----

// The sums of a tile on their way from the warps: columns (rows of x) apart by as much as keeps their banks apart.
template <int PARTS, int COLUMNS>
struct Sums {
    static constexpr int STRIDE = PARTS * TILE + 4;
    float of_warp[WARPS][COLUMNS * STRIDE];
};

// weight [PARTS * outputs, depth]. BATCH is how many times eight rows there can be.
template <int PARTS, int BATCH, int DEPTH, class Input, class Output>
__device__ __forceinline__ void linear_few(Input input, const bf16* weight, Output output, Sizes sizes) {
    using Shared = Sums<PARTS, 8 * BATCH>;
    __shared__ Shared shared;
    __shared__ float scratch[MOST_NORMED];
    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, member = threadIdx.x % 4;
    const int tiles = (sizes.outputs + TILE - 1) / TILE;
    const int chunks = (sizes.depth + CHUNK - 1) / CHUNK;
    // The same for all warps and a multiple of DEPTH; chunks past the last are zeros that nobody reads.
    const int steps = ((chunks + WARPS - 1) / WARPS + DEPTH - 1) / DEPTH * DEPTH;
    const auto element_of = [&](int step) { return (step * WARPS + warp) * CHUNK + member * 8; };

    let_next_begin();
    Weights<PARTS> ring[DEPTH];
#pragma unroll
    for (int slot = 0; slot < DEPTH; ++slot) ring[slot].load(weight, sizes, blockIdx.x * TILE, element_of(slot));
    wait_for_previous();
    input.prepare(sizes, scratch);

    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float sums[PARTS][BATCH][4] = {};
        for (int step = 0; step < steps; step += DEPTH) {
            // Behind the tile's last steps come the next tile's first.
            const bool last = step + DEPTH >= steps;
            const int next_tile = last ? tile + static_cast<int>(gridDim.x) : tile;
#pragma unroll
            for (int slot = 0; slot < DEPTH; ++slot) {
                const int element = element_of(step + slot);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
#pragma unroll
                    for (int i = 0; i < BATCH; ++i) {
                        const bool inside = element + half * HALF < sizes.depth;
                        const uint4 row = inside ? input.at(min(8 * i + group, sizes.rows - 1), element + half * HALF, sizes) : zeros();
#pragma unroll
                        for (int part = 0; part < PARTS; ++part) {
                            const uint4 low = ring[slot].words[part][0][half], high = ring[slot].words[part][1][half];
                            const uint32_t first[4] = {low.x, high.x, low.y, high.y};
                            const uint32_t second[4] = {low.z, high.z, low.w, high.w};
                            mma(sums[part][i], first, row.x, row.y);
                            mma(sums[part][i], second, row.z, row.w);
                        }
                    }
                }
                if (next_tile < tiles) {
                    ring[slot].load(weight, sizes, next_tile * TILE, element_of(last ? slot : step + DEPTH + slot));
                } else {
                    ring[slot].clear();
                }
            }
        }
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
#pragma unroll
            for (int i = 0; i < BATCH; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int column = 8 * i + 2 * member + j % 2, row = part * TILE + group + j / 2 * 8;
                    shared.of_warp[warp][column * Shared::STRIDE + row] = sums[part][i][j];
                }
        __syncthreads();  // the warps' sums are written before they are added up
        for (int place = threadIdx.x; place < sizes.rows * TILE; place += THREADS) {
            const int column = place / TILE, row = place % TILE;
            float total[PARTS] = {};
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
#pragma unroll
                for (int from = L2P_FAULT_IF(31, 1, 0); from < WARPS; ++from) {
                    total[part] += shared.of_warp[from][column * Shared::STRIDE + part * TILE + row];
                }
            const int out = tile * TILE + row;
            if (out < sizes.outputs) output(total, static_cast<size_t>(column) * sizes.outputs + out);
        }
        __syncthreads();  // and read before the next tile's overwrite them
    }
}

// Every kernel: x [rows, depth]; weight [outputs, depth] (SwiGLU: [2 outputs, depth], gates first); y [rows, outputs]; any number of
// blocks, which share the tiles. The tile says how many outputs it has and how many rows the kernel takes at most.
#define L2P_LINEAR_FEW(BATCH, DEPTH, GATED)                                                                                   \
    extern "C" __global__ __launch_bounds__(THREADS, 2) void linear_few_##BATCH(                                         \
        const bf16* x, const bf16* weight, bf16* y, int rows, int depth, int outputs) {                                       \
        linear_few<1, BATCH, DEPTH>(Plain{x}, weight, Store<bf16>{y}, Sizes{rows, depth, outputs});                           \
    }                                                                                                                         \
    L2P_LAUNCH(linear_few_##BATCH, THREADS, 0, TILE, 8 * BATCH)                                                               \
    extern "C" __global__ __launch_bounds__(THREADS, 2) void linear_few_f32_##BATCH(                                     \
        const bf16* x, const bf16* weight, float* y, int rows, int depth, int outputs) {                                      \
        linear_few<1, BATCH, DEPTH>(Plain{x}, weight, Store<float>{y}, Sizes{rows, depth, outputs});                          \
    }                                                                                                                         \
    L2P_LAUNCH(linear_few_f32_##BATCH, THREADS, 0, TILE, 8 * BATCH)                                                           \
    extern "C" __global__ __launch_bounds__(THREADS, 2) void linear_few_add_##BATCH(                                     \
        const bf16* x, const bf16* weight, bf16* y, int rows, int depth, int outputs) {                                       \
        linear_few<1, BATCH, DEPTH>(Plain{x}, weight, Add{y}, Sizes{rows, depth, outputs});                                   \
    }                                                                                                                         \
    L2P_LAUNCH(linear_few_add_##BATCH, THREADS, 0, TILE, 8 * BATCH)                                                           \
    extern "C" __global__ __launch_bounds__(THREADS, 2) void linear_few_swiglu_##BATCH(                                       \
        const bf16* x, const bf16* weight, bf16* y, int rows, int depth, int outputs) {                                       \
        linear_few<2, BATCH, GATED>(Plain{x}, weight, SwiGlu{y}, Sizes{rows, depth, outputs});                                    \
    }                                                                                                                         \
    L2P_LAUNCH(linear_few_swiglu_##BATCH, THREADS, 0, TILE, 8 * BATCH)

L2P_LINEAR_FEW(1, 4, 2)
L2P_LINEAR_FEW(2, 2, 2)
L2P_LINEAR_FEW(4, 1, 1)

// The same of normalised x; factor [depth].
extern "C" __global__ __launch_bounds__(THREADS, 2) void linear_few_normed(
    const bf16* x, const bf16* factor, const bf16* weight, bf16* y, int rows, int depth, int outputs, float epsilon) {
    linear_few<1, 1, 4>(Normed{x, factor, epsilon}, weight, Store<bf16>{y}, Sizes{rows, depth, outputs});
}
L2P_LAUNCH(linear_few_normed, THREADS, 0, TILE, MOST_NORMED)

extern "C" __global__ __launch_bounds__(THREADS, 2) void linear_few_f32_normed(
    const bf16* x, const bf16* factor, const bf16* weight, float* y, int rows, int depth, int outputs, float epsilon) {
    linear_few<1, 1, 4>(Normed{x, factor, epsilon}, weight, Store<float>{y}, Sizes{rows, depth, outputs});
}
L2P_LAUNCH(linear_few_f32_normed, THREADS, 0, TILE, MOST_NORMED)

extern "C" __global__ __launch_bounds__(THREADS, 2) void linear_few_swiglu_normed(
    const bf16* x, const bf16* factor, const bf16* weight, bf16* y, int rows, int depth, int outputs, float epsilon) {
    linear_few<2, 1, 2>(Normed{x, factor, epsilon}, weight, SwiGlu{y}, Sizes{rows, depth, outputs});
}
L2P_LAUNCH(linear_few_swiglu_normed, THREADS, 0, TILE, MOST_NORMED)
