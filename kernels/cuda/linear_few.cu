// Linear layers for 1 to 32 rows; engine/src/ops/linear_few.rs holds the contract.
//
// Bound by memory: 2 bytes per weight, each read once. Tensor cores do the arithmetic for any number of rows: A is 16 rows of weights,
// B the transposed rows of x. The order of the summed elements within a product is free as long
// as A and B agree on it, so a thread feeds its fragments with 16 consecutive bytes of a weight's row, straight from memory, and with
// the same 16 bytes of x: with CHUNK = 64 summed elements, member m of a group holds elements 8 m to 8 m + 7 and 32 more on. Columns of
// B past the last row of x are doubles of it, and their sums are dropped.
//
// A unit of work is a tile of 16 outputs (SwiGLU: 16 gates and the 16 factors that go with them) times a step of 512 summed elements,
// a chunk for each warp. All blocks have the same number of units, which follow each other, whatever the sizes; so a tile may be shared
// by neighbours. A block goes from its last tile to its first: what it has of a tile that a later block ends is left in memory at
// the start, and long there when that block, at its own end, asks for it. The sums of the warps, then those of the blocks,
// are added in an order that does not depend on the number of rows, so that a row's result does not depend on its neighbours.
//
// A warp has DEPTH units on their way in registers, the first of them since before the kernel ahead has ended: weights are all that they
// need. Few rows of x are kept in shared memory, normalised if that is asked for.
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/overlap.cuh"
#include "common/reduce.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int TILE = 16;        // outputs
constexpr int CHUNK = 64;       // summed elements of one step of a warp: 128 bytes of each row of weights
constexpr int HALF = CHUNK / 2;
constexpr int STEP = WARPS * CHUNK;  // summed elements of a unit
constexpr int MOST_NORMED = 8;       // rows that are normalised on the way
constexpr int STAGED = 8 * 4096;     // elements of x that are kept in shared memory

struct Sizes {
    int rows;            // of x
    int depth;           // summed elements, a multiple of 8
    int outputs;         // of a row; SwiGLU: half of the weights' rows
    int each, rest;      // units of a block, and how many blocks have one more
    int reciprocal;      // of the steps of a tile, in units of 2^-31, rounded up

    __device__ __forceinline__ int steps() const { return (depth + STEP - 1) / STEP; }
    // The first of a block's units.
    __device__ __forceinline__ int first_of(int block) const { return block * each + min(block, rest); }
    // Where a unit is.
    __device__ __forceinline__ int tile_of(int unit) const { return depth <= STEP ? unit : static_cast<int>(__umulhi(2 * unit, reciprocal)); }
};

// A block's way through its units: from the last tile to the first, and within a tile from the first step on.
struct Way {
    int first, steps;       // of the block, of a tile
    int tile, step, end;    // where it is; the step behind the tile's last

    __device__ __forceinline__ Way(const Sizes& sizes) : first(sizes.first_of(blockIdx.x)), steps(sizes.steps()) {
        const int last = sizes.first_of(blockIdx.x + 1) - 1;
        tile = sizes.tile_of(last);
        end = last - tile * steps + 1;
        step = max(first - tile * steps, 0);
    }

    __device__ __forceinline__ void next() {
        if (++step < end) return;
        --tile;
        end = steps;
        step = max(first - tile * steps, 0);
    }

    // The first element of this thread's chunk.
    __device__ __forceinline__ int element() const { return step * STEP + threadIdx.x / WARP * CHUNK + threadIdx.x % 4 * 8; }
};

// What blocks leave for those after them.
struct Shares {
    float* sums;  // [blocks, 8 BATCH, TILE, PARTS]
    int* ready;   // [blocks], how many warps have left theirs; zeros between launches
};

// 16 bytes of weights, which nobody reads again.
__device__ __forceinline__ uint4 load_once(const bf16* from) {
    uint4 words;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(from));
    return words;
}

__device__ __forceinline__ int load_acquire(const int* from) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

__device__ __forceinline__ void add_release(int* to, int value) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

__device__ __forceinline__ uint4 zeros() { return make_uint4(0, 0, 0, 0); }

// A warp's step of the weights: rows `group` and `group` + 8 of each of PARTS tiles, both halves of the chunk.
template <int PARTS>
struct Weights {
    uint4 words[PARTS][2][2];

    // `rows` are where the rows of part 0 begin; part 1 lies `outputs` rows further on.
    __device__ __forceinline__ void load(const bf16* const (&rows)[2], const Sizes& sizes, int element) {
        const size_t apart = static_cast<size_t>(sizes.outputs) * sizes.depth;
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
#pragma unroll
            for (int row = 0; row < 2; ++row)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const bool inside = element + half * HALF < L2P_FAULT_IF(30, sizes.depth / CHUNK * CHUNK, sizes.depth);
                    words[part][row][half] = inside ? load_once(rows[row] + part * apart + element + half * HALF) : zeros();
                }
    }
};

// A way through the weights.
template <int PARTS>
struct Source {
    Way way;
    const bf16* rows[2];

    __device__ __forceinline__ Source(const bf16* weight, const Sizes& sizes) : way(sizes) { seek(weight, sizes); }

    // Rows past the last are doubles of it and are not kept.
    __device__ __forceinline__ void seek(const bf16* weight, const Sizes& sizes) {
        const int first = way.tile * TILE + threadIdx.x % WARP / 4;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            rows[row] = weight + static_cast<size_t>(min(first + 8 * row, sizes.outputs - 1)) * sizes.depth;
        }
    }

    // Loads where it is and goes on. Called no more often than there are units.
    __device__ __forceinline__ void load(Weights<PARTS>& weights, const bf16* weight, const Sizes& sizes) {
        weights.load(rows, sizes, way.element());
        const int tile = way.tile;
        way.next();
        if (way.tile != tile && way.tile >= 0) seek(weight, sizes);
    }
};

// ---- x ----

// x as it stands.
struct Plain {
    const bf16* x;  // [rows, depth]

    // Where x is to be read, and there already; `staged` holds STAGED elements.
    __device__ __forceinline__ const bf16* prepare(const Sizes& sizes, bf16* staged, float*) const {
        constexpr int TOGETHER = 4;  // loads of a thread that are under way
        const int vectors = sizes.rows * sizes.depth / 8;
        if (vectors * 8 > STAGED) return x;
        const uint4* from = reinterpret_cast<const uint4*>(x);
        uint4* to = reinterpret_cast<uint4*>(staged);
        for (int first = threadIdx.x; first < vectors; first += TOGETHER * THREADS) {
            uint4 values[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) values[i] = from[min(first + i * THREADS, vectors - 1)];
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                if (first + i * THREADS < vectors) to[first + i * THREADS] = values[i];
            }
        }
        __syncthreads();  // x is there
        return staged;
    }
};

// x of many rows, which stays where it is.
struct Far {
    const bf16* x;  // [rows, depth]

    __device__ __forceinline__ const bf16* prepare(const Sizes&, bf16*, float*) const { return x; }
};

// x normalised: x / rms(x) * factor, rounded as by rms_norm. At most MOST_NORMED rows of together STAGED elements.
struct Normed {
    const bf16* x;       // [rows, depth]
    const bf16* factor;  // [depth]
    float epsilon;

    // `scratch` holds WARPS * MOST_NORMED floats.
    __device__ __forceinline__ const bf16* prepare(const Sizes& sizes, bf16* staged, float* scratch) const {
        for (int row = 0; row < sizes.rows; ++row) {
            float squares = 0.0f;
            for (int i = threadIdx.x * 8; i < sizes.depth; i += THREADS * 8) {
                float values[8];
                load8(values, x + row * sizes.depth + i);
                store8(staged + row * sizes.depth + i, values);
#pragma unroll
                for (int j = 0; j < 8; ++j) squares += values[j] * values[j];
            }
            squares = warp_sum(squares);
            if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP * MOST_NORMED + row] = squares;
        }
        __syncthreads();  // the warps' sums are there
        for (int row = 0; row < sizes.rows; ++row) {
            float squares = 0.0f;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) squares += scratch[warp * MOST_NORMED + row];
            const float scale = rsqrtf(squares / sizes.depth + epsilon);
            for (int i = threadIdx.x * 8; i < sizes.depth; i += THREADS * 8) {  // what this thread has put there
                float values[8], factors[8];
                load8(values, staged + row * sizes.depth + i);
                load8(factors, factor + i);
#pragma unroll
                for (int j = 0; j < 8; ++j) values[j] *= scale * factors[j];
                store8(staged + row * sizes.depth + i, values);
            }
        }
        __syncthreads();  // x is there
        return staged;
    }
};

// ---- what becomes of a sum ----

template <class T>
struct Store {
    T* y;  // [rows, outputs]

    __device__ __forceinline__ float before(size_t) const { return 0.0f; }
    template <int PARTS>
    __device__ __forceinline__ void operator()(const float (&sums)[PARTS], float, size_t place) const {
        y[place] = from_float<T>(sums[0]);
    }
};

struct Add {
    bf16* y;  // [rows, outputs], added to

    __device__ __forceinline__ float before(size_t place) const { return to_float(y[place]); }
    template <int PARTS>
    __device__ __forceinline__ void operator()(const float (&sums)[PARTS], float before, size_t place) const {
        y[place] = from_float<bf16>(before + sums[0]);
    }
};

struct SwiGlu {
    bf16* y;  // [rows, outputs]

    __device__ __forceinline__ float before(size_t) const { return 0.0f; }
    __device__ __forceinline__ void operator()(const float (&sums)[2], float, size_t place) const {
        y[place] = from_float<bf16>(silu(sums[0]) * sums[1]);
    }
};

// ---- the product ----

// The sums of a tile on their way from the warps: columns (rows of x) apart by as much as keeps their banks apart.
template <int PARTS, int COLUMNS>
struct Sums {
    static constexpr int STRIDE = PARTS * TILE + 4;
    float of_warp[WARPS][COLUMNS * STRIDE];

    // What this thread has of the sum over the warps at a place of column and row.
    __device__ __forceinline__ void total(float (&total)[PARTS], int place) const {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            total[part] = 0.0f;
#pragma unroll
            for (int from = L2P_FAULT_IF(31, 1, 0); from < WARPS; ++from) {
                total[part] += of_warp[from][place / TILE * STRIDE + part * TILE + place % TILE];
            }
        }
    }
};

// What becomes of the sums of a tile. The block's last tile is its first one in order, which earlier blocks may have begun: what they have
// left, and what stands where the result goes, is asked for while the last weights are on their way.
template <int PARTS, int COLUMNS, class Output>
struct Finish {
    static constexpr int PLACES = (COLUMNS * TILE + THREADS - 1) / THREADS;  // of a thread
    static constexpr int SHARE = COLUMNS * TILE * PARTS;

    const Shares& shares;
    const Output& output;
    const Sizes& sizes;
    float others[PLACES][PARTS];
    float old[PLACES];

    __device__ __forceinline__ Finish(const Shares& shares, const Output& output, const Sizes& sizes)
        : shares(shares), output(output), sizes(sizes) {}

    // The first unit of the block's last tile.
    __device__ __forceinline__ int begin() const { return sizes.tile_of(sizes.first_of(blockIdx.x)) * sizes.steps(); }

    // Whether earlier blocks have some of it, and this one ends it.
    __device__ __forceinline__ bool joined() const {
        return sizes.first_of(blockIdx.x) > begin() && sizes.first_of(blockIdx.x + 1) >= begin() + sizes.steps();
    }

    __device__ __forceinline__ size_t place_of(int place, int tile) const {
        return static_cast<size_t>(place / TILE) * sizes.outputs + tile * TILE + place % TILE;
    }

    __device__ __forceinline__ bool inside(int place, int tile) const {
        return place < sizes.rows * TILE && tile * TILE + place % TILE < sizes.outputs;
    }

    // Asks for what the block's last tile needs beside its weights.
    __device__ __forceinline__ void fetch(int tile) {
        const int warps = min(WARPS, (sizes.rows * TILE + WARP - 1) / WARP);
#pragma unroll
        for (int i = 0; i < PLACES; ++i) {
            const int place = threadIdx.x + i * THREADS;
#pragma unroll
            for (int part = 0; part < PARTS; ++part) others[i][part] = 0.0f;
            old[i] = inside(place, tile) ? output.before(place_of(place, tile)) : 0.0f;
            if (!joined() || place >= sizes.rows * TILE) continue;
            for (int block = blockIdx.x; L2P_FAULT_IF(35, 0, sizes.first_of(block)) > begin(); --block) {
                while (load_acquire(shares.ready + block - 1) != warps) {
                }
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    others[i][part] += __ldcg(shares.sums + (block - 1) * SHARE + place * PARTS + part);
                }
            }
        }
    }

    // The warps' sums of a tile are in shared memory.
    __device__ __forceinline__ void operator()(const Sums<PARTS, COLUMNS>& sums, const Way& way) const {
        const bool ends = way.end == way.steps, last = way.tile == sizes.tile_of(way.first);
#pragma unroll
        for (int i = 0; i < PLACES; ++i) {
            const int place = threadIdx.x + i * THREADS;
            if (place >= sizes.rows * TILE) continue;
            float total[PARTS];
            sums.total(total, place);
            if (!ends) {
#pragma unroll
                for (int part = 0; part < PARTS; ++part) shares.sums[blockIdx.x * SHARE + place * PARTS + part] = total[part];
            } else if (inside(place, way.tile)) {
                const size_t to = place_of(place, way.tile);
                if (last) {
#pragma unroll
                    for (int part = 0; part < PARTS; ++part) total[part] += others[i][part];
                }
                output(total, last ? old[i] : output.before(to), to);
            }
        }
        if (!ends && threadIdx.x / WARP * WARP < sizes.rows * TILE) {
            __syncwarp();  // the warp's share is written
            if (threadIdx.x % WARP == 0) add_release(shares.ready + blockIdx.x, 1);
        }
        if (last && joined() && threadIdx.x == 0) {  // all have asked, for they have met at the barrier since
            for (int block = blockIdx.x; sizes.first_of(block) > begin(); --block) shares.ready[block - 1] = 0;
        }
    }
};

// weight [PARTS * outputs, depth]. BATCH is how many times eight rows there can be. No more blocks than units.
template <int PARTS, int BATCH, int DEPTH, class Input, class Output>
__device__ __forceinline__ void linear_few(Input input, const bf16* weight, Output output, Shares shares, Sizes sizes) {
    using Shared = Sums<PARTS, 8 * BATCH>;
    constexpr int BUFFERS = BATCH == 1 ? 2 : 1;
    __shared__ Shared shared[BUFFERS];
    __shared__ float scratch[WARPS * MOST_NORMED];
    extern __shared__ __align__(16) unsigned char staged[];
    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, member = threadIdx.x % 4;
    const int units = sizes.first_of(blockIdx.x + 1) - sizes.first_of(blockIdx.x);

    let_next_begin();
    Way way(sizes);
    Source<PARTS> source(weight, sizes);
    Weights<PARTS> ring[DEPTH];
#pragma unroll
    for (int slot = 0; slot < DEPTH; ++slot) {
        if (slot < units) source.load(ring[slot], weight, sizes);
    }
    wait_for_previous();
    const bf16* x = input.prepare(sizes, reinterpret_cast<bf16*>(staged), scratch);

    Finish<PARTS, 8 * BATCH, Output> finish(shares, output, sizes);
    // The last weights are on their way then, and what later blocks wait for is there.
    const int fetched = max(units - DEPTH, way.end < way.steps ? way.end - way.step : 0);
    float sums[PARTS][BATCH][4] = {};
    int buffer = 0;
    for (int unit = 0; unit < units; unit += DEPTH) {
#pragma unroll
        for (int slot = 0; slot < DEPTH; ++slot) {
            if (unit + slot >= units) break;
            if (unit + slot == fetched) finish.fetch(sizes.tile_of(way.first));
            const int element = way.element();
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int i = 0; i < BATCH; ++i) {
                    const bool inside = element + half * HALF < sizes.depth;
                    const int from = min(8 * i + group, sizes.rows - 1) * sizes.depth + element + half * HALF;  // 32 rows fit 32 bits
                    const uint4 row = inside ? *reinterpret_cast<const uint4*>(x + from) : zeros();
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
            if (unit + slot + DEPTH < units) source.load(ring[slot], weight, sizes);
            if (way.step + 1 == way.end) {
                Shared& mine = shared[buffer];
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
#pragma unroll
                    for (int i = 0; i < BATCH; ++i)
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            const int column = 8 * i + 2 * member + j % 2, row = part * TILE + group + j / 2 * 8;
                            mine.of_warp[warp][column * Shared::STRIDE + row] = sums[part][i][j];
                            sums[part][i][j] = 0.0f;
                        }
                __syncthreads();  // the warps' sums are written before they are added up
                finish(mine, way);
                // With two buffers, whoever writes one again has seen all others at the barrier of the tile between.
                if (BUFFERS == 1) __syncthreads();
                buffer = (buffer + 1) % BUFFERS;
            }
            way.next();
        }
    }
}

// Every kernel: x [rows, depth]; weight [outputs, depth] (SwiGLU: [2 outputs, depth], gates first); y [rows, outputs]; `sums` and
// `ready` as in Shares; no more blocks than units, and no more than run at the same time. The tile says how many outputs and summed
// elements a unit has, how many rows the kernel takes at most, and how many elements of x it keeps.
#define L2P_SIZES float *sums, int *ready, int rows, int depth, int outputs, int each, int rest, int reciprocal
#define L2P_KERNEL(NAME, PARTS, BATCH, DEPTH, INPUT, OUTPUT, T)                                                              \
    extern "C" __global__ __launch_bounds__(THREADS, 2) void NAME(const bf16* x, const bf16* weight, T* y, L2P_SIZES) { \
        linear_few<PARTS, BATCH, DEPTH>(                                                                              \
            INPUT{x}, weight, OUTPUT{y}, Shares{sums, ready}, Sizes{rows, depth, outputs, each, rest, reciprocal});                    \
    }                                                                                                                 \
    L2P_LAUNCH(NAME, THREADS, (BATCH == 1 ? STAGED * sizeof(bf16) : 0), TILE, STEP, 8 * BATCH, STAGED)
#define L2P_LINEAR_FEW(BATCH, DEPTH, GATED, INPUT)                                  \
    L2P_KERNEL(linear_few_##BATCH, 1, BATCH, DEPTH, INPUT, Store<bf16>, bf16)       \
    L2P_KERNEL(linear_few_f32_##BATCH, 1, BATCH, DEPTH, INPUT, Store<float>, float) \
    L2P_KERNEL(linear_few_add_##BATCH, 1, BATCH, DEPTH, INPUT, Add, bf16)           \
    L2P_KERNEL(linear_few_swiglu_##BATCH, 2, BATCH, GATED, INPUT, SwiGlu, bf16)

L2P_LINEAR_FEW(1, 4, 2, Plain)
L2P_LINEAR_FEW(2, 2, 2, Far)
L2P_LINEAR_FEW(4, 1, 1, Far)

// The same of normalised x; factor [depth].
#define L2P_NORMED_KERNEL(NAME, PARTS, DEPTH, OUTPUT, T)                                                          \
    extern "C" __global__ __launch_bounds__(THREADS, 2) void NAME(                                                \
        const bf16* x, const bf16* factor, const bf16* weight, T* y, L2P_SIZES, float epsilon) {                  \
        linear_few<PARTS, 1, DEPTH>(                                                                              \
            Normed{x, factor, epsilon}, weight, OUTPUT{y}, Shares{sums, ready}, Sizes{rows, depth, outputs, each, rest, reciprocal}); \
    }                                                                                                             \
    L2P_LAUNCH(NAME, THREADS, STAGED * sizeof(bf16), TILE, STEP, MOST_NORMED, STAGED)

L2P_NORMED_KERNEL(linear_few_normed, 1, 4, Store<bf16>, bf16)
L2P_NORMED_KERNEL(linear_few_f32_normed, 1, 4, Store<float>, float)
L2P_NORMED_KERNEL(linear_few_swiglu_normed, 2, 2, SwiGlu, bf16)
