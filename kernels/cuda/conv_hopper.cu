// Convolutions over NHWC images by Hopper's warpgroup products; engine/src/ops/conv holds the contract.
//
// A tile is 16 pixels wide and holds BLOCKS squares of 8x8 pixels, each the 64 rows of a product, by OUTPUTS channels. Going over
// the input channels CHUNK at a time, a bulk copy brings the input tile with its margin (zeros outside the image) into a ring
// once per chunk; every tap of the kernel is then a product whose left operand is that same tile seen from a shifted start. The
// weights come as one piece per tap, arranged beforehand (`conv_arrange` below) so that a piece is one plain copy: through
// a second ring, or, where all of them fit (RESIDENT), once for all tiles of a block.
//
// Blocks stay on their multiprocessor and take one tile after the other. The two consumer warpgroups take turns in tiles: while
// one of them finishes a tile (bias, activation, maxima, stores) the other's products keep the tensor cores busy.
//
// With UPSAMPLE the input is seen at twice its height and width, nearest. A 3x3 kernel then meets only 2x2 pixels, in one way for
// each of the four parities of output row and column; its weights are summed accordingly when they are arranged. Tiles are
// counted on the input's grid, once for each parity: 4/9 of the products.
//
// Output channels are arranged within 32 so that a lane's results are eight consecutive ones: it stores 16 bytes, a group of
// four lanes 64. Bound by the tensor cores from 64 channels on: 2 * taps * inputs * outputs operations per pixel; below that by
// shared memory, which a product of few columns reads faster than it multiplies.
#include "common/launch.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "common/products.cuh"

constexpr int CONSUMERS = 2;
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int WARPS = WARPGROUP / WARP;  // of one consumer
constexpr int SIDE = 8;                  // of a square of pixels
constexpr int TILE_WIDTH = 2 * SIDE;
constexpr int PARITIES = 4;

constexpr unsigned SILU = 1;        // the result is x * sigmoid(x) of the sum
constexpr unsigned F32_OUTPUT = 2;  // the output is f32, scaled

constexpr int COLOURS = 3;

// A 1x1 convolution to three colours after the activation, instead of an output of channels.
struct Picture {
    const bf16* weights;  // [COLOURS, outputs]
    const bf16* bias;     // [COLOURS]
    float* colours;       // [items, height, width, COLOURS]
    const float* delta;   // with it, scale * delta * result is added to `colours`; without, scale * result is written
};

struct Operands {
    const bf16* weights;   // arranged
    const bf16* bias;      // [outputs]
    const bf16* residual;  // like the output; added to the activated result; or null
    void* output;          // [items, height, width, outputs], twice height and width with UPSAMPLE; bf16 or f32; or null
    bf16* pooled;          // [items, height / 2, width / 2, outputs] or null
    int items, height, width;  // of the grid that tiles are counted on
    int outputs;
    int chunks, first_chunks;  // in all, and those of the first source
    unsigned flags;
    float scale;  // of an f32 output, of a picture
    Picture picture;
};

template <int OUTPUTS_, int BLOCKS_, int CHUNK_, int KERNEL_, bool UPSAMPLE_, bool RESIDENT_, int INPUT_STAGES_, int WEIGHT_STAGES_>
struct Plan {
    static constexpr int OUTPUTS = OUTPUTS_, BLOCKS = BLOCKS_, CHUNK = CHUNK_;
    static constexpr bool UPSAMPLE = UPSAMPLE_, RESIDENT = RESIDENT_;
    static constexpr int INPUT_STAGES = INPUT_STAGES_, WEIGHT_STAGES = WEIGHT_STAGES_;

    static constexpr int TILE_HEIGHT = BLOCKS / 2 * SIDE;
    static constexpr int TAPS_ALONG = UPSAMPLE ? 2 : KERNEL_;
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
__device__ __forceinline__ Tile find_tile(const Operands& o, int index) {
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
__device__ __forceinline__ int count_tiles(const Operands& o) {
    return (o.outputs + P::OUTPUTS - 1) / P::OUTPUTS * P::TURNS * ((o.width + TILE_WIDTH - 1) / TILE_WIDTH) *
           ((o.height + P::TILE_HEIGHT - 1) / P::TILE_HEIGHT) * o.items;
}

// ---- producer ----

template <class P>
__device__ __forceinline__ void produce(
    const TensorMap& first, const TensorMap& second, const Operands& o, const Shared<P>& shared) {
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
            if (chunk < o.first_chunks) {
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
    typename P::Sums& sums, const Operands& o, const Shared<P>& shared, int turn, Ring<P::INPUT_STAGES> inputs,
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

// ---- a tile's end ----

// x * sigmoid(x) by way of the tangent, which costs one operation of the special function units; its error is a fifth of
// bf16's rounding.
__device__ __forceinline__ float silu_by_tanh(float x) {
    const float half = 0.5f * x;
    float tangent;
    asm("tanh.approx.f32 %0, %1;" : "=f"(tangent) : "f"(half));
    return fmaf(half, tangent, half);
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

template <int COUNT>
struct alignas(COUNT * 2) Packed {
    __nv_bfloat162 pair[COUNT / 2];
};

// One square of a tile, in registers: this lane's two pixels, in rows `y` and y + 1 of the grid, column `x`.
template <class P>
__device__ __forceinline__ void finish_square(
    const Sums64<P::OUTPUTS>& sums, const Operands& o, const Tile& tile, int y, int x, int member) {
    using Lane = Channels<P::OUTPUTS>;
    const int height = P::UPSAMPLE ? 2 * o.height : o.height, width = P::UPSAMPLE ? 2 * o.width : o.width;
    const int output_x = P::UPSAMPLE ? 2 * x + tile.column_parity : x;
#pragma unroll
    for (int group = 0; group < Lane::GROUPS; ++group) {
        const int channel = tile.output_block * P::OUTPUTS + group * Lane::GROUP + member * Lane::OF_LANE;
        const bool valid = channel < o.outputs;  // lanes without a channel take part in the exchange below
        float bias[Lane::OF_LANE];
#pragma unroll
        for (int i = 0; i < Lane::OF_LANE; ++i) bias[i] = channel + i < o.outputs ? to_float(o.bias[channel + i]) : 0.0f;
        Packed<Lane::OF_LANE> packed[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int output_y = P::UPSAMPLE ? 2 * (y + half) + tile.row_parity : y + half;
            const bool inside = valid && y + half < o.height && x < o.width;
            const size_t at = ((static_cast<size_t>(tile.item) * height + output_y) * width + output_x) * o.outputs + channel;
            float value[Lane::OF_LANE];
#pragma unroll
            for (int i = 0; i < Lane::OF_LANE; ++i) {
                value[i] = sums[group * (Lane::GROUP / 8) + i / 2][2 * half + i % 2] + bias[i];
            }
            if (o.flags & SILU) {
#pragma unroll
                for (int i = 0; i < Lane::OF_LANE; ++i) value[i] = silu_by_tanh(value[i]);
            }
            if (o.flags & F32_OUTPUT) {
#pragma unroll
                for (int i = 0; i < Lane::OF_LANE; ++i) {
                    if (inside && channel + i < o.outputs) static_cast<float*>(o.output)[at + i] = value[i] * o.scale;
                }
                continue;
            }
            if (o.residual != nullptr && inside) {
                const Packed<Lane::OF_LANE> added = *reinterpret_cast<const Packed<Lane::OF_LANE>*>(o.residual + at);
#pragma unroll
                for (int i = 0; i < Lane::OF_LANE; i += 2) {
                    const float2 pair = __bfloat1622float2(added.pair[i / 2]);
                    value[i] += pair.x, value[i + 1] += pair.y;
                }
            }
#pragma unroll
            for (int i = 0; i < Lane::OF_LANE; i += 2) packed[half].pair[i / 2] = __floats2bfloat162_rn(value[i], value[i + 1]);
            if (o.output != nullptr && inside) {
                *reinterpret_cast<Packed<Lane::OF_LANE>*>(static_cast<bf16*>(o.output) + at) = packed[half];
            }
        }
        if (o.pooled == nullptr) continue;
        // The lane's two pixels lie one below the other; their right neighbours are four lanes on. NaN wins, as in PyTorch.
#pragma unroll
        for (int i = 0; i < Lane::OF_LANE / 2; ++i) {
            const __nv_bfloat162 best = __hmax2_nan(packed[0].pair[i], packed[1].pair[i]);
            const unsigned other = __shfl_xor_sync(FULL_WARP, *reinterpret_cast<const unsigned*>(&best), 4);
            packed[0].pair[i] = __hmax2_nan(best, *reinterpret_cast<const __nv_bfloat162*>(&other));
        }
        const int pooled_y = y / 2, pooled_x = x / 2;
        if (valid && x % 2 == 0 && pooled_y < o.height / 2 && pooled_x < o.width / 2) {
            const size_t at = ((static_cast<size_t>(tile.item) * (o.height / 2) + pooled_y) * (o.width / 2) + pooled_x) * o.outputs;
            *reinterpret_cast<Packed<Lane::OF_LANE>*>(o.pooled + at + channel) = packed[0];
        }
    }
}

// Ends a tile whose sums become channels of the output.
template <class P>
struct ToChannels {
    __device__ __forceinline__ explicit ToChannels(const Operands&) {}

    __device__ __forceinline__ void operator()(const typename P::Sums& sums, const Operands& o, const Tile& tile) const {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % WARPS;
#pragma unroll
        for (int block = 0; block < P::BLOCKS; ++block) {
            finish_square<P>(
                sums[block], o, tile, tile.y + block / 2 * SIDE + 2 * warp, tile.x + block % 2 * SIDE + lane / 4, lane % 4);
        }
    }
};

// Ends a tile whose activated sums, all channels of a pixel, go through a 1x1 convolution to the three colours of a picture.
// That is one more product, in registers: four neighbouring columns of sums are its left operand.
template <class P>
struct ToPicture {
    static constexpr int DEPTHS = P::OUTPUTS / 16;
    uint32_t weights[DEPTHS][2];
    float bias[2];
    float factor;  // of what is written or added

    // A lane has, for the colour lane / 4, the weights of the channels that columns 2 m, 2 m + 1 and eight on stand for.
    __device__ __forceinline__ explicit ToPicture(const Operands& o) {
        using Lane = Channels<P::OUTPUTS>;
        const int colour = threadIdx.x % WARP / 4, member = threadIdx.x % 4;
        const auto weight = [&](int column) {
            const int within = column % Lane::GROUP;
            const int channel = column / Lane::GROUP * Lane::GROUP + within % 8 / 2 * Lane::OF_LANE + within / 8 * 2 + within % 2;
            return colour < COLOURS && channel < o.outputs ? to_float(o.picture.weights[colour * o.outputs + channel]) : 0.0f;
        };
#pragma unroll
        for (int depth = 0; depth < DEPTHS; ++depth)
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const int column = 16 * depth + 8 * part + 2 * member;
                weights[depth][part] = pack_pair(weight(column), weight(column + 1));
            }
#pragma unroll
        for (int i = 0; i < 2; ++i) bias[i] = 2 * member + i < COLOURS ? to_float(o.picture.bias[2 * member + i]) : 0.0f;
        factor = o.picture.delta == nullptr ? o.scale : o.scale * *o.picture.delta;
    }

    __device__ __forceinline__ void operator()(const typename P::Sums& sums, const Operands& o, const Tile& tile) const {
        using Lane = Channels<P::OUTPUTS>;
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % WARPS, member = lane % 4;
        float channel_bias[P::OUTPUTS / 8][2];
#pragma unroll
        for (int i = 0; i < P::OUTPUTS / 8; ++i)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int channel = i / (Lane::GROUP / 8) * Lane::GROUP + member * Lane::OF_LANE + i % (Lane::GROUP / 8) * 2 + j;
                channel_bias[i][j] = channel < o.outputs ? to_float(o.bias[channel]) : 0.0f;
            }
#pragma unroll
        for (int block = 0; block < P::BLOCKS; ++block) {
            float colours[4] = {bias[0], bias[1], bias[0], bias[1]};
#pragma unroll
            for (int depth = 0; depth < DEPTHS; ++depth) {
                float activated[2][4];
#pragma unroll
                for (int part = 0; part < 2; ++part)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int column = 2 * depth + part;
                        activated[part][i] = silu_by_tanh(sums[block][column][i] + channel_bias[column][i % 2]);
                    }
                uint32_t left[4];
                pack_fragment(left, activated[0], activated[1]);
                multiply_add(colours, left, weights[depth][0], weights[depth][1]);
            }
            const int y = tile.y + block / 2 * SIDE + 2 * warp, x = tile.x + block % 2 * SIDE + lane / 4;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int colour = 2 * member + i % 2, row = y + i / 2;
                if (colour >= COLOURS || row >= o.height || x >= o.width) continue;
                float* const at = o.picture.colours + ((static_cast<size_t>(tile.item) * o.height + row) * o.width + x) * COLOURS + colour;
                *at = (o.picture.delta == nullptr ? 0.0f : *at) + factor * colours[i];
            }
        }
    }
};

template <class P, class End>
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

// first, second: maps of the sources [items, height, width, channels] by boxes of CHUNK channels and BOX_WIDTH x BOX_HEIGHT
// pixels (the first one's map where there is no second). The launch's tile: outputs, channels of a chunk, rows of a tile,
// pieces of weights that fit (0: any number). Threads are fixed; the grid is as many blocks as the GPU has multiprocessors.
#define CONV_KERNEL(name, P)                                                                                              \
    extern "C" __global__ __launch_bounds__(THREADS, 1) void name(                                                        \
        const __grid_constant__ TensorMap first, const __grid_constant__ TensorMap second, const bf16* weights,           \
        const bf16* bias, const bf16* residual, void* output, bf16* pooled, int items, int height, int width,             \
        int outputs, int chunks, int first_chunks, unsigned flags, float scale) {                                         \
        const Operands operands = {weights, bias,    residual, output,       pooled, items, height,                       \
                                   width,   outputs, chunks,   first_chunks, flags,  scale, {}};                          \
        convolve<P, ToChannels<P>>(first, second, operands);                                                              \
    }                                                                                                                     \
    L2P_LAUNCH(name, THREADS, P::BYTES, P::OUTPUTS, P::CHUNK, P::TILE_HEIGHT, P::RESIDENT ? P::WEIGHT_STAGES : 0)

#define CONV(name, ...)              \
    using Plan_##name = Plan<__VA_ARGS__>; \
    CONV_KERNEL(name, Plan_##name)

// The same for a convolution that goes on to a picture.
#define PICTURE_KERNEL(name, P)                                                                                           \
    extern "C" __global__ __launch_bounds__(THREADS, 1) void name(                                                        \
        const __grid_constant__ TensorMap first, const __grid_constant__ TensorMap second, const bf16* weights,           \
        const bf16* bias, const bf16* picture_weights, const bf16* picture_bias, float* colours, const float* delta,      \
        int items, int height, int width, int outputs, int chunks, int first_chunks, float scale) {                       \
        const Operands operands = {weights, bias,    nullptr, nullptr,      nullptr, items, height,                       \
                                   width,   outputs, chunks,  first_chunks, SILU,    scale,                               \
                                   {picture_weights, picture_bias, colours, delta}};                                      \
        convolve<P, ToPicture<P>>(first, second, operands);                                                               \
    }                                                                                                                     \
    L2P_LAUNCH(name, THREADS, P::BYTES, P::OUTPUTS, P::CHUNK, P::TILE_HEIGHT, P::RESIDENT ? P::WEIGHT_STAGES : 0)

// <kernel>_<outputs>x<channels of a chunk>; _resident: all weights in shared memory.
CONV(conv3x3_128x64, 128, 2, 64, 3, false, false, 3, 9)
CONV(conv3x3_128x16, 128, 2, 16, 3, false, false, 4, 18)
CONV(conv3x3_64x64, 64, 4, 64, 3, false, false, 3, 12)
CONV(conv3x3_64x32_resident, 64, 4, 32, 3, false, true, 4, 27)
CONV(conv3x3_32x64_resident, 32, 4, 64, 3, false, true, 3, 18)
CONV(conv3x3_32x32_resident, 32, 4, 32, 3, false, true, 4, 36)
CONV(conv3x3_32x16_resident, 32, 4, 16, 3, false, true, 4, 36)
CONV(conv3x3_16x64_resident, 16, 4, 64, 3, false, true, 3, 36)
CONV(conv3x3_16x32_resident, 16, 4, 32, 3, false, true, 4, 36)
CONV(upsample_128x64, 128, 2, 64, 3, true, false, 3, 9)
CONV(upsample_64x64_resident, 64, 4, 64, 3, true, true, 2, 16)
CONV(upsample_32x32_resident, 32, 4, 32, 3, true, true, 4, 48)
PICTURE_KERNEL(picture_64x64, Plan_conv3x3_64x64)
PICTURE_KERNEL(picture_32x32_resident, Plan_conv3x3_32x32_resident)
CONV(conv1x1_128x64, 128, 2, 64, 1, false, false, 6, 6)

// Arranges weights [outputs, taps, inputs] for the kernels above: pieces of `columns` x `chunk`, by output block, parity (with
// `upsample`), chunk and tap; swizzled as the products want them. One thread per element of the result.
extern "C" __global__ __launch_bounds__(256) void conv_arrange(
    const bf16* weight, bf16* arranged, size_t elements, int outputs, int inputs, int columns, int chunk, int taps_along, int upsample) {
    const size_t element = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (element >= elements) return;
    const int met = upsample ? 2 : taps_along;  // taps that a pixel of the output meets, along each axis
    size_t rest = element;
    const auto next = [&rest](int count) {
        const int here = static_cast<int>(rest % count);
        rest /= count;
        return here;
    };
    const int place = next(columns * chunk);
    const int tap = next(met * met), chunk_index = next(inputs / chunk), parity = next(upsample ? PARITIES : 1);
    const int output_block = static_cast<int>(rest);
    // Which row and column stand at this place: units of 16 bytes are exchanged by the address's bits 7 to 9.
    const int bytes = place * 2, row_bytes = chunk * 2;
    const int exchanged = bytes ^ ((bytes >> 7 & (row_bytes / 16 - 1)) << 4);
    const int column = exchanged / row_bytes, input = chunk_index * chunk + exchanged % row_bytes / 2;
    // Column 8 t + 2 m + j of a group is channel m * (group / 4) + 2 t + j.
    const int group = columns < 32 ? columns : 32, within = column % group;
    const int channel = column / group * group + within % 8 / 2 * (group / 4) + within / 8 * 2 + within % 2;
    const int output = output_block * columns + channel;
    float sum = 0.0f;
    if (output < outputs) {
        const bf16* from = weight + static_cast<size_t>(output) * taps_along * taps_along * inputs + input;
        if (!upsample) {
            sum = to_float(from[static_cast<size_t>(tap) * inputs]);
        } else {
            // Of an even row the first pixel meets kernel row 0 and the second one rows 1 and 2; of an odd row the first meets
            // rows 0 and 1, the second one row 2. Columns alike.
            const int ty = tap / 2, tx = tap % 2, py = parity / 2, px = parity % 2;
            for (int dy = ty == 0 ? 0 : 1 + py; dy <= (ty == 0 ? py : 2); ++dy)
                for (int dx = tx == 0 ? 0 : 1 + px; dx <= (tx == 0 ? px : 2); ++dx) sum += to_float(from[static_cast<size_t>(dy * 3 + dx) * inputs]);
        }
    }
    arranged[element] = __float2bfloat16_rn(sum);
}
L2P_LAUNCH(conv_arrange, 256, 0, 256)
#endif
