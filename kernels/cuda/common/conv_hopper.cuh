// The machinery of a convolution over NHWC images by Hopper's warpgroup products: everything but how a tile's sums end.
// Use inside `#if defined(__CUDA_ARCH_FEAT_SM90_ALL)`.
//
// A tile is 16 pixels wide and holds BLOCKS squares of 8x8 pixels, each the 64 rows of a product, by OUTPUTS channels. Going over
// the input channels CHUNK at a time, a bulk copy brings the input tile with its margin (zeros outside the image) into a ring
// once per chunk; every tap of the kernel is then a product whose left operand is that same tile seen from a shifted start. The
// weights come as one piece per tap, arranged beforehand so that a piece is one plain copy: through a second ring, or, where
// all of them fit (RESIDENT), once for all tiles of a block.
//
// Blocks stay on their multiprocessor and take one tile after the other. The two consumer warpgroups take turns in tiles: while
// one of them ends a tile (bias, activation, maxima, stores) the other's products keep the tensor cores busy.
//
// Output channels are arranged within 32 so that a lane's results are eight consecutive ones: it stores 16 bytes, a group of
// four lanes 64.
#pragma once
#include "common/products.cuh"

constexpr int CONSUMERS = 2;
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int WARPS = WARPGROUP / WARP;  // of one consumer
constexpr int SIDE = 8;                  // of a square of pixels
constexpr int TILE_WIDTH = 2 * SIDE;
constexpr int PARITIES = 4;

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

template <int OUTPUTS_, int BLOCKS_, int CHUNK_, int KERNEL_, Input SEEN_, bool RESIDENT_, int INPUT_STAGES_, int WEIGHT_STAGES_>
struct Plan {
    static constexpr int OUTPUTS = OUTPUTS_, BLOCKS = BLOCKS_, CHUNK = CHUNK_;
    static constexpr bool UPSAMPLE = SEEN_ == UPSAMPLED, GATHER = SEEN_ == GATHERED, RESIDENT = RESIDENT_;
    static constexpr int INPUT_STAGES = INPUT_STAGES_, WEIGHT_STAGES = WEIGHT_STAGES_;

    static constexpr int TILE_HEIGHT = BLOCKS / 2 * SIDE;
    static constexpr int TAPS_ALONG = SEEN_ == SAME ? KERNEL_ : 2;
    static constexpr int TAPS = TAPS_ALONG * TAPS_ALONG;
    static constexpr int TURNS = UPSAMPLE ? PARITIES : 1;  // tiles per place
    static constexpr int BOX_WIDTH = TILE_WIDTH + TAPS_ALONG - 1;
    static constexpr int BOX_HEIGHT = TILE_HEIGHT + TAPS_ALONG - 1;
    static constexpr int DEPTHS = CHUNK / PRODUCT_DEPTH;  // products per tap, square and chunk

    // Bytes.
    static constexpr int ROW = CHUNK * 2;  // of a pixel, and of an output channel's weights
    static constexpr int BOX = BOX_WIDTH * BOX_HEIGHT * ROW;
    static constexpr int INPUT = (BOX + SWIZZLE_ATOM_BYTES - 1) / SWIZZLE_ATOM_BYTES * SWIZZLE_ATOM_BYTES;
    static constexpr int PIECE = OUTPUTS * ROW;  // the weights of one tap and chunk

    // Shared memory, as offsets from its start.
    static constexpr int WEIGHT_RING = INPUT_STAGES * INPUT;
    static constexpr int BARRIERS = WEIGHT_RING + WEIGHT_STAGES * PIECE;
    static constexpr int BYTES = BARRIERS + 8 * 2 * (INPUT_STAGES + WEIGHT_STAGES);

    static_assert(BLOCKS % 2 == 0 && CHUNK % PRODUCT_DEPTH == 0 && ROW <= 128);
    static_assert(WEIGHT_RING % SWIZZLE_ATOM_BYTES == 0 && (PIECE % SWIZZLE_ATOM_BYTES == 0 || ROW < 128));
    static_assert(BYTES <= 227 << 10);

    using Sums = Sums64<OUTPUTS>[BLOCKS];
};

template <class P>
struct Shared {
    uint32_t start;

    __device__ uint32_t input(int stage) const { return start + stage * P::INPUT; }
    __device__ uint32_t piece(int stage) const { return start + P::WEIGHT_RING + stage * P::PIECE; }
    // `ready` barriers are the producer's word to a consumer, `free` ones the answer when a stage may be overwritten.
    __device__ uint32_t input_ready(int stage) const { return start + P::BARRIERS + 8 * stage; }
    __device__ uint32_t input_free(int stage) const { return input_ready(P::INPUT_STAGES + stage); }
    __device__ uint32_t piece_ready(int stage) const { return input_ready(2 * P::INPUT_STAGES + stage); }
    __device__ uint32_t piece_free(int stage) const { return input_ready(2 * P::INPUT_STAGES + P::WEIGHT_STAGES + stage); }
};

// How often a ring of STAGES was used: which stage comes next, and the parity of its barriers' phase.
template <int STAGES>
struct Ring {
    unsigned uses = 0;

    __device__ __forceinline__ int stage() const { return static_cast<int>(uses % STAGES); }
    __device__ __forceinline__ int parity() const { return static_cast<int>(uses / STAGES % 2); }
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
    tile.output_block = next((o.outputs + P::OUTPUTS - 1) / P::OUTPUTS);
    const int turn = next(P::TURNS);
    tile.row_parity = turn / 2, tile.column_parity = turn % 2;
    tile.x = next((o.width + TILE_WIDTH - 1) / TILE_WIDTH) * TILE_WIDTH;
    tile.y = next((o.height + P::TILE_HEIGHT - 1) / P::TILE_HEIGHT) * P::TILE_HEIGHT;
    tile.item = index;
    return tile;
}

template <class P>
__device__ __forceinline__ int count_tiles(const Problem& o) {
    return (o.outputs + P::OUTPUTS - 1) / P::OUTPUTS * P::TURNS * ((o.width + TILE_WIDTH - 1) / TILE_WIDTH) *
           ((o.height + P::TILE_HEIGHT - 1) / P::TILE_HEIGHT) * o.items;
}

// ---- producer ----

template <class P>
__device__ __forceinline__ void produce(
    const TensorMap& first, const TensorMap& second, const Problem& o, const Shared<P>& shared) {
    Ring<P::INPUT_STAGES> inputs;
    Ring<P::WEIGHT_STAGES> pieces;
    const auto piece = [&](int turn, int chunk) {
        return reinterpret_cast<const unsigned char*>(o.weights) + (static_cast<size_t>(turn) * o.chunks + chunk) * P::TAPS * P::PIECE;
    };
    if constexpr (P::RESIDENT) {
        const int count = P::TURNS * o.chunks * P::TAPS;
        barrier_arrive_expecting(shared.piece_ready(0), count * P::PIECE);
        for (int i = 0; i < count; ++i) copy_bytes(shared.piece(i), piece(0, 0) + i * P::PIECE, P::PIECE, shared.piece_ready(0));
    }
    const int tiles = count_tiles<P>(o);
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile tile = find_tile<P>(o, index);
        const int turn = tile.output_block * P::TURNS + tile.row_parity * 2 + tile.column_parity;
        // With UPSAMPLE, output row 2 y + parity meets input rows y + parity - 1 and y + parity.
        const int y = tile.y + (P::UPSAMPLE ? tile.row_parity - 1 : -(P::TAPS_ALONG / 2));
        const int x = tile.x + (P::UPSAMPLE ? tile.column_parity - 1 : -(P::TAPS_ALONG / 2));
        for (int chunk = 0; chunk < o.chunks; ++chunk) {
            const uint32_t ready = shared.input_ready(inputs.stage());
            barrier_wait(shared.input_free(inputs.stage()), inputs.parity() ^ 1);
            barrier_arrive_expecting(ready, P::BOX);
            if constexpr (P::GATHER) {
                // Output pixel (y, x) meets rows y - parity and the next of each parity's rows, and columns alike.
                const int of_parity = o.chunks / PARITIES, parity = chunk / of_parity, column = parity % 2;
                const int channel = (column * of_parity + chunk % of_parity) * P::CHUNK;
                copy_box_5d(shared.input(inputs.stage()), first, channel, tile.x - column, parity / 2, tile.y - parity / 2, tile.item, ready);
            } else if (chunk < o.first_chunks) {
                copy_box_4d(shared.input(inputs.stage()), first, chunk * P::CHUNK, x, y, tile.item, ready);
            } else {
                copy_box_4d(shared.input(inputs.stage()), second, (chunk - o.first_chunks) * P::CHUNK, x, y, tile.item, ready);
            }
            ++inputs.uses;
            if constexpr (!P::RESIDENT) {
                const unsigned char* from = piece(turn, chunk);
                for (int tap = 0; tap < P::TAPS; ++tap, from += P::PIECE) {
                    const int stage = pieces.stage();
                    barrier_wait(shared.piece_free(stage), pieces.parity() ^ 1);
                    barrier_arrive_expecting(shared.piece_ready(stage), P::PIECE);
                    copy_bytes(shared.piece(stage), from, P::PIECE, shared.piece_ready(stage));
                    ++pieces.uses;
                }
            }
        }
    }
}

// ---- consumers ----

// Named barriers at which a consumer waits for its turn; the other one arrives there when it has met all stages of its own tile.
// Nobody may wait for a stage more than one use ahead: the parity of a phase does not tell it from the one before last.
__device__ __forceinline__ int turn_barrier(int consumer) { return 1 + consumer; }
__device__ __forceinline__ void wait_turn(int consumer) { named_barrier_sync(turn_barrier(consumer), CONSUMERS * WARPGROUP); }
__device__ __forceinline__ void give_turn(int consumer) { named_barrier_arrive(turn_barrier(consumer), CONSUMERS * WARPGROUP); }

// Tells the producer that this warp's part of the products that read a stage is complete.
__device__ __forceinline__ void release(uint32_t barrier) {
    if (threadIdx.x % WARP == 0) barrier_arrive(barrier);
}

__device__ __forceinline__ uint64_t shifted(uint64_t operand, int bytes) { return operand + (bytes >> 4); }

// Issues the products of one tap, of all squares: `input` and `piece` are operands at the start of their tiles.
template <class P>
__device__ __forceinline__ void issue_tap(typename P::Sums& sums, uint64_t input, uint64_t piece, int tap, bool add) {
#pragma unroll
    for (int depth = 0; depth < P::DEPTHS; ++depth)
#pragma unroll
        for (int block = 0; block < P::BLOCKS; ++block) {
            const int row = block / 2 * SIDE + tap / P::TAPS_ALONG, column = block % 2 * SIDE + tap % P::TAPS_ALONG;
            const int offset = (row * P::BOX_WIDTH + column) * P::ROW + depth * PRODUCT_DEPTH * 2;
            issue_by_rows(sums[block], shifted(input, offset), shifted(piece, depth * PRODUCT_DEPTH * 2), add || depth > 0);
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
    typename P::Sums& sums, const Problem& o, const Shared<P>& shared, int turn, Ring<P::INPUT_STAGES> inputs,
    Ring<P::WEIGHT_STAGES> pieces, const Issued& issued) {
    constexpr int GROUP_BYTES = P::BOX_WIDTH * P::ROW;
    hold_all<P>(sums);
    int input_before = 0, piece_before = 0;
    for (int chunk = 0; chunk < o.chunks; ++chunk) {
        const int stage = inputs.stage();
        barrier_wait(shared.input_ready(stage), inputs.parity());
        const uint64_t input = operand_rows<P::ROW, GROUP_BYTES>(shared.input(stage));
        if constexpr (P::RESIDENT) {
            const int first = (turn * o.chunks + chunk) * P::TAPS;
            const uint64_t piece = operand_rows<P::ROW, 8 * P::ROW>(shared.piece(first));
            product_fence();
#pragma unroll
            for (int tap = 0; tap < P::TAPS; ++tap) issue_tap<P>(sums, input, shifted(piece, tap * P::PIECE), tap, chunk > 0 || tap > 0);
            product_commit();
            products_wait<1>();
            if (chunk > 0) release(shared.input_free(input_before));
        } else {
#pragma unroll
            for (int tap = 0; tap < P::TAPS; ++tap) {
                const int place = pieces.stage();
                barrier_wait(shared.piece_ready(place), pieces.parity());
                product_fence();
                issue_tap<P>(sums, input, operand_rows<P::ROW, 8 * P::ROW>(shared.piece(place)), tap, chunk > 0 || tap > 0);
                product_commit();
                products_wait<1>();  // all but this tap's
                if (chunk > 0 || tap > 0) release(shared.piece_free(piece_before));
                if (chunk > 0 && tap == 0) release(shared.input_free(input_before));
                piece_before = place;
                ++pieces.uses;
            }
        }
        input_before = stage;
        ++inputs.uses;
    }
    issued();
    products_wait<0>();
    hold_all<P>(sums);
    if constexpr (!P::RESIDENT) release(shared.piece_free(piece_before));
    release(shared.input_free(input_before));
}

// Consecutive channels of one pixel that a lane holds: LANE_CHANNELS of every CHANNEL_GROUP. Column n of a product stands for
// the channel that `conv_arrange` put there: lane member m has columns 8 t + 2 m and the next of each t, and channels
// from m * LANE_CHANNELS on.
template <int OUTPUTS>
struct Channels {
    static constexpr int GROUP = OUTPUTS < 32 ? OUTPUTS : 32;
    static constexpr int OF_LANE = GROUP / 4;
    static constexpr int GROUPS = OUTPUTS / GROUP;
};

// The whole of a kernel. `End` is made from the operands, once, and called with each tile's sums, the operands and the tile.
template <class P, class End, class Operands>
__device__ __forceinline__ void convolve(const TensorMap& first, const TensorMap& second, const Operands& o) {
    // All registers of the multiprocessor: what the launch gives each thread, shared out anew.
    constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
    static_assert((PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) * WARPGROUP <= 65536);
    extern __shared__ __align__(1024) unsigned char memory[];
    const Shared<P> shared{shared_address(memory)};
    if (threadIdx.x == 0) {
        prefetch_map(first);
        prefetch_map(second);
        for (int stage = 0; stage < P::INPUT_STAGES; ++stage) {
            barrier_init(shared.input_ready(stage), 1);
            barrier_init(shared.input_free(stage), WARPS);
        }
        for (int stage = 0; stage < P::WEIGHT_STAGES; ++stage) {
            barrier_init(shared.piece_ready(stage), 1);
            barrier_init(shared.piece_free(stage), WARPS);
        }
        barriers_ready();
    }
    __syncthreads();  // the barriers are initialised before anybody uses them

    // The same for all threads of a warp, and known to the compiler as such.
    const int warp = __shfl_sync(FULL_WARP, threadIdx.x / WARP, 0);
    if (warp < WARPS) {
        registers_give<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) produce<P>(first, second, o, shared);
        return;
    }
    registers_take<CONSUMER_REGISTERS>();
    const int consumer = warp / WARPS - 1;
    const End end(o);
    Ring<P::INPUT_STAGES> inputs;
    Ring<P::WEIGHT_STAGES> pieces;
    if constexpr (P::RESIDENT) barrier_wait(shared.piece_ready(0), 0);
    const int tiles = count_tiles<P>(o);
    // The tiles of the other consumer use the rings in between.
    inputs.uses = consumer * o.chunks, pieces.uses = consumer * o.chunks * P::TAPS;
    if (consumer == 1) give_turn(0);
    for (int index = blockIdx.x + consumer * gridDim.x; index < tiles; index += CONSUMERS * gridDim.x) {
        const Tile tile = find_tile<P>(o, index);
        typename P::Sums sums;
        wait_turn(consumer);
        multiply<P>(sums, o, shared, tile.row_parity * 2 + tile.column_parity, inputs, pieces, [&] {
            if (index + static_cast<int>(gridDim.x) < tiles) give_turn(1 - consumer);
        });
        end(sums, o, tile);
        inputs.uses += CONSUMERS * o.chunks, pieces.uses += CONSUMERS * o.chunks * P::TAPS;
    }
}
