// The machinery of a convolution over NHWC images by Hopper's warpgroup products: everything but how a tile's sums end.
// Use inside `#if defined(__CUDA_ARCH_FEAT_SM90_ALL)`.
//
// An implicit GEMM. A tile is 16 pixels wide and holds BLOCKS squares of 8x8 pixels, each the 64 rows of a product (BLOCK_M
// pixels in all), by BLOCK_N output channels. Going over the input channels BLOCK_K at a time, a bulk copy brings the input
// tile with its margin (zeros outside the image) into a ring (common/pipeline.cuh) once per chunk; every tap of the kernel is
// then a product whose left operand is that same tile seen from a shifted start. The weights come as one piece per tap,
// arranged beforehand so that a piece is one plain copy: through a second ring, or, where all of them fit (RESIDENT), once
// for all tiles of a block.
//
// Blocks stay on their multiprocessor and take one tile after the other. The two consumer warpgroups take turns in tiles: while
// one of them ends a tile (bias, activation, maxima, stores) the other's products keep the tensor cores busy.
//
// Output channels are arranged within 32 so that a lane's results are eight consecutive ones: it stores 16 bytes, a group of
// four lanes 64.
#pragma once
#include "common/conv.cuh"
#include "common/pipeline.cuh"

constexpr int CONSUMERS = 2;
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int SIDE = 8;  // of a square of pixels
constexpr int TILE_WIDTH = 2 * SIDE;

enum class NamedBarrier {
    TURN = 1,  // one for each consumer's turn
};

// How a convolution sees its input.
enum Input {
    SAME,
    // At twice its height and width, nearest. A 3x3 kernel then meets only 2x2 pixels, in one way for each of the four parities
    // of output row and column; its weights are summed accordingly when they are arranged. Tiles are counted on the input's
    // grid, once for each parity: 4/9 of the products.
    UPSAMPLED,
    // The transpose of that: a pixel of the output gathers from 4x4 pixels of an input of twice its height and width, 2x2 of
    // each parity of the input's row and column, whose channels count as channels of one input on the output's grid.
    GATHERED,
};

// The sums to be computed.
struct Problem {
    const bf16* weights;       // arranged
    int items, height, width;  // of the grid that tiles are counted on
    int outputs;
    int chunks, first_chunks;  // in all, and those of the first source
};

template <int BLOCK_N_, int BLOCKS_, int BLOCK_K_, int KERNEL_, Input SEEN_, bool RESIDENT_, int INPUT_STAGES_, int WEIGHT_STAGES_>
struct Plan {
    static constexpr int BLOCK_M = BLOCKS_ * MMA_M, BLOCK_N = BLOCK_N_, BLOCK_K = BLOCK_K_, BLOCKS = BLOCKS_;
    static constexpr bool UPSAMPLE = SEEN_ == UPSAMPLED, GATHER = SEEN_ == GATHERED, RESIDENT = RESIDENT_;
    static constexpr int INPUT_STAGES = INPUT_STAGES_, WEIGHT_STAGES = WEIGHT_STAGES_;

    static constexpr int TILE_HEIGHT = BLOCKS / 2 * SIDE;
    static constexpr int TAPS_ALONG = SEEN_ == SAME ? KERNEL_ : 2;
    static constexpr int TAPS = TAPS_ALONG * TAPS_ALONG;
    static constexpr int TURNS = UPSAMPLE ? PARITIES : 1;  // tiles per place
    static constexpr int BOX_WIDTH = TILE_WIDTH + TAPS_ALONG - 1;
    static constexpr int BOX_HEIGHT = TILE_HEIGHT + TAPS_ALONG - 1;
    static constexpr int DEPTHS = BLOCK_K / MMA_K<bf16>;  // products per tap, square and chunk
    static_assert(BLOCK_M == TILE_WIDTH * TILE_HEIGHT);

    using InputRing = Pipeline<INPUT_STAGES, unsigned>;
    using WeightRing = Pipeline<WEIGHT_STAGES, unsigned>;

    // Bytes.
    static constexpr int ROW = BLOCK_K * 2;  // of a pixel, and of an output channel's weights
    static constexpr int BOX = BOX_WIDTH * BOX_HEIGHT * ROW;
    static constexpr int INPUT = (BOX + SWIZZLE_ATOM_BYTES - 1) / SWIZZLE_ATOM_BYTES * SWIZZLE_ATOM_BYTES;
    static constexpr int PIECE = BLOCK_N * ROW;  // the weights of one tap and chunk

    // Shared memory, as offsets from its start.
    static constexpr int WEIGHT_RING = INPUT_STAGES * INPUT;
    static constexpr int BARRIERS = WEIGHT_RING + WEIGHT_STAGES * PIECE;
    static constexpr int BYTES = BARRIERS + InputRing::BYTES + WeightRing::BYTES;

    static_assert(BLOCKS % 2 == 0 && BLOCK_K % MMA_K<bf16> == 0 && ROW <= 128);
    static_assert(WEIGHT_RING % SWIZZLE_ATOM_BYTES == 0 && (PIECE % SWIZZLE_ATOM_BYTES == 0 || ROW < 128));
    static_assert(BYTES <= MAX_SHARED_BYTES);

    using Sums = Accumulators<BLOCK_N>[BLOCKS];
};

template <class P>
struct Shared {
    uint32_t start;

    __device__ uint32_t input(int stage) const { return start + stage * P::INPUT; }
    __device__ uint32_t piece(int stage) const { return start + P::WEIGHT_RING + stage * P::PIECE; }
    __device__ typename P::InputRing inputs() const { return {start + P::BARRIERS}; }
    __device__ typename P::WeightRing pieces() const { return {start + P::BARRIERS + P::InputRing::BYTES}; }
    // All weights, where they stay.
    __device__ uint32_t resident_full() const { return pieces().full(0); }
};

// What a tile is: pixels of the grid from (y, x) on and channels from first_output on.
struct Tile {
    int item, y, x;
    int row_parity, column_parity;  // of the output, with UPSAMPLE
    int output_block;
};

// Tiles count output channels first, then parities, so that those that read the same pixels run together.
template <class P>
__device__ __forceinline__ Tile find_tile(const Problem& o, int index) {
    const auto next = [&index](int count) {
        const int here = index % count;
        index /= count;
        return here;
    };
    Tile tile;
    tile.output_block = next((o.outputs + P::BLOCK_N - 1) / P::BLOCK_N);
    const int turn = next(P::TURNS);
    tile.row_parity = turn / 2, tile.column_parity = turn % 2;
    tile.x = next((o.width + TILE_WIDTH - 1) / TILE_WIDTH) * TILE_WIDTH;
    tile.y = next((o.height + P::TILE_HEIGHT - 1) / P::TILE_HEIGHT) * P::TILE_HEIGHT;
    tile.item = index;
    return tile;
}

template <class P>
__device__ __forceinline__ int count_tiles(const Problem& o) {
    return (o.outputs + P::BLOCK_N - 1) / P::BLOCK_N * P::TURNS * ((o.width + TILE_WIDTH - 1) / TILE_WIDTH) *
           ((o.height + P::TILE_HEIGHT - 1) / P::TILE_HEIGHT) * o.items - L2P_FAULT_IF(13, 1, 0);
}

// ---- producer ----

template <class P>
__device__ __forceinline__ void produce(
    const TensorMap& first, const TensorMap& second, const Problem& o, const Shared<P>& shared) {
    typename P::InputRing::State input;
    typename P::WeightRing::State place;
    const auto piece = [&](int turn, int chunk) {
        const size_t pieces = (static_cast<size_t>(turn) * o.chunks + chunk) * P::TAPS;
        return reinterpret_cast<const unsigned char*>(o.weights) + pieces * P::PIECE;
    };
    if constexpr (P::RESIDENT) {
        const int count = P::TURNS * o.chunks * P::TAPS;
        mbarrier_arrive_expect_tx(shared.resident_full(), count * P::PIECE);
        for (int i = 0; i < count; ++i) bulk_load(shared.piece(i), piece(0, 0) + i * P::PIECE, shared.resident_full(), P::PIECE);
    }
    const int tiles = count_tiles<P>(o);
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile tile = find_tile<P>(o, index);
        const int turn = tile.output_block * P::TURNS + tile.row_parity * 2 + tile.column_parity;
        // With UPSAMPLE, output row 2 y + parity meets input rows y + parity - 1 and y + parity.
        const int y = tile.y + (P::UPSAMPLE ? tile.row_parity - 1 : -(P::TAPS_ALONG / 2));
        const int x = tile.x + (P::UPSAMPLE ? tile.column_parity - L2P_FAULT_IF(14, 0, 1) : -(P::TAPS_ALONG / 2));
        for (int chunk = 0; chunk < o.chunks; ++chunk) {
            const uint32_t full = shared.inputs().producer_acquire(input, P::BOX), to = shared.input(input.stage());
            if constexpr (P::GATHER) {
                // Output pixel (y, x) meets rows y - parity and the next of each parity's rows, and columns alike.
                const int of_parity = o.chunks / PARITIES, parity = chunk / of_parity, column = parity % 2;
                const int channel = (column * of_parity + chunk % of_parity) * P::BLOCK_K;
                tma_load(to, first, full, channel, tile.x - column, parity / 2, tile.y - L2P_FAULT_IF(25, 0, parity / 2), tile.item);
            } else if (chunk < o.first_chunks) {
                tma_load(to, first, full, chunk * P::BLOCK_K, x, y, tile.item);
            } else {
                tma_load(to, second, full, (chunk - o.first_chunks) * P::BLOCK_K, x, y, tile.item);
            }
            ++input.use;
            if constexpr (!P::RESIDENT) {
                const unsigned char* from = piece(turn, chunk);
                for (int tap = 0; tap < P::TAPS; ++tap, from += P::PIECE) {
                    const uint32_t piece_full = shared.pieces().producer_acquire(place, P::PIECE);
                    bulk_load(shared.piece(place.stage()), from, piece_full, P::PIECE);
                    ++place.use;
                }
            }
        }
    }
}

// ---- consumers ----

// A consumer waits for its turn; the other one gives it when it has met all stages of its own tile. Nobody may wait for a
// stage more than one use ahead: the parity of a phase does not tell it from the one before last.
constexpr int TURN_THREADS = CONSUMERS * WARPGROUP;
__device__ __forceinline__ void wait_turn(int consumer) { named_barrier_sync(NamedBarrier::TURN, consumer, TURN_THREADS); }
__device__ __forceinline__ void give_turn(int consumer) { named_barrier_arrive(NamedBarrier::TURN, consumer, TURN_THREADS); }

// Issues the products of one tap, of all squares: `input` and `piece` are operands at the start of their tiles.
template <class P>
__device__ __forceinline__ void issue_tap(typename P::Sums& sums, uint64_t input, uint64_t piece, int tap, bool add) {
#pragma unroll
    for (int depth = 0; depth < P::DEPTHS; ++depth)
#pragma unroll
        for (int block = 0; block < P::BLOCKS; ++block) {
            const int row = block / 2 * SIDE + tap / P::TAPS_ALONG, column = block % 2 * SIDE + tap % P::TAPS_ALONG;
            const int offset = (row * P::BOX_WIDTH + column) * P::ROW + depth * MMA_K<bf16> * 2;
            wgmma(sums[block], advance(input, offset), advance(piece, depth * MMA_K<bf16> * 2), add || depth > 0);
        }
}

template <class P>
__device__ __forceinline__ void hold_all(typename P::Sums& sums) {
#pragma unroll
    for (int block = 0; block < P::BLOCKS; ++block) hold(sums[block]);
}

// All products of a tile. The rings stand where the tile's first stages are. `issued` is called when all of them have been met.
template <class P, class Issued>
__device__ __forceinline__ void multiply(
    typename P::Sums& sums, const Problem& o, const Shared<P>& shared, int turn, typename P::InputRing::State input,
    typename P::WeightRing::State place, const Issued& issued) {
    constexpr int GROUP_BYTES = P::BOX_WIDTH * P::ROW;
    hold_all<P>(sums);
    int input_before = 0, piece_before = 0;
    for (int chunk = 0; chunk < o.chunks; ++chunk) {
        const int stage = input.stage();
        shared.inputs().consumer_wait(input);
        const uint64_t a = descriptor<P::ROW, GROUP_BYTES>(shared.input(stage));
        if constexpr (P::RESIDENT) {
            const int first = (turn * o.chunks + chunk) * P::TAPS;
            const uint64_t b = descriptor<P::ROW, 8 * P::ROW>(shared.piece(first));
            wgmma_fence();
#pragma unroll
            for (int tap = 0; tap < P::TAPS; ++tap) issue_tap<P>(sums, a, advance(b, tap * P::PIECE), tap, chunk > 0 || tap > 0);
            wgmma_commit();
            wgmma_wait<1>();
            if (chunk > 0) shared.inputs().consumer_release(input_before);
        } else {
#pragma unroll
            for (int tap = 0; tap < P::TAPS; ++tap) {
                const int piece = place.stage();
                shared.pieces().consumer_wait(place);
                wgmma_fence();
                issue_tap<P>(sums, a, descriptor<P::ROW, 8 * P::ROW>(shared.piece(piece)), tap, chunk > 0 || tap > 0);
                wgmma_commit();
                wgmma_wait<1>();  // all but this tap's
                if (chunk > 0 || tap > 0) shared.pieces().consumer_release(piece_before);
                if (chunk > 0 && tap == 0) shared.inputs().consumer_release(input_before);
                piece_before = piece;
                ++place.use;
            }
        }
        input_before = stage;
        ++input.use;
    }
    issued();
    wgmma_wait<0>();
    hold_all<P>(sums);
    if constexpr (!P::RESIDENT) shared.pieces().consumer_release(piece_before);
    shared.inputs().consumer_release(input_before);
}

// The whole of a kernel. `End` is made from the operands, once, and called with each tile's sums, the operands and the tile.
template <class P, class End, class Operands>
__device__ __forceinline__ void convolve(const TensorMap& first, const TensorMap& second, const Operands& o) {
    // All registers of the multiprocessor: what the launch gives each thread, shared out anew.
    constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
    static_assert((PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) * WARPGROUP <= REGISTERS_OF_MULTIPROCESSOR);
    extern __shared__ __align__(1024) unsigned char memory[];
    const Shared<P> shared{shared_address(memory)};
    if (threadIdx.x == 0) {
        tma_prefetch(first);
        tma_prefetch(second);
        shared.inputs().init(WARPGROUP_WARPS);  // a tile is one consumer's
        shared.pieces().init(WARPGROUP_WARPS);
        mbarrier_init_fence();
    }
    __syncthreads();  // the barriers are initialised before anybody uses them

    const int warp = uniform_warp();
    if (warp < WARPGROUP_WARPS) {
        warpgroup_reg_dealloc<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) produce<P>(first, second, o, shared);
        return;
    }
    warpgroup_reg_alloc<CONSUMER_REGISTERS>();
    const int consumer = warp / WARPGROUP_WARPS - 1;
    const End end(o);
    typename P::InputRing::State input;
    typename P::WeightRing::State piece;
    if constexpr (P::RESIDENT) mbarrier_wait(shared.resident_full(), 0);
    const int tiles = count_tiles<P>(o);
    // The tiles of the other consumer use the rings in between.
    input.use = consumer * o.chunks, piece.use = consumer * o.chunks * P::TAPS;
    if (consumer == 1) give_turn(0);
    for (int index = blockIdx.x + consumer * gridDim.x; index < tiles; index += CONSUMERS * gridDim.x) {
        const Tile tile = find_tile<P>(o, index);
        typename P::Sums sums;
        wait_turn(consumer);
        multiply<P>(sums, o, shared, tile.row_parity * 2 + tile.column_parity, input, piece, [&] {
            if (index + static_cast<int>(gridDim.x) < tiles) give_turn(1 - consumer);
        });
        end(sums, o, tile);
        input.use += CONSUMERS * o.chunks, piece.use += CONSUMERS * o.chunks * P::TAPS;
    }
}
