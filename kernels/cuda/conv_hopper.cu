// Convolutions over NHWC images by Hopper's warpgroup products; engine/src/ops/conv holds the contract and
// common/conv_hopper.cuh the machinery. Here are the ways in which a tile ends, and the arrangement of weights.
//
// Bound by the tensor cores from 64 channels on: 2 * taps * inputs * outputs operations per pixel; below that by shared memory,
// which a product of few columns reads faster than it multiplies.
#include "common/launch.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "common/conv_hopper.cuh"

constexpr int COLOURS = 3;

// A 1x1 convolution to three colours after the activation, instead of an output of channels.
struct Picture {
    const bf16* weights;  // [COLOURS, outputs]
    const bf16* bias;     // [COLOURS]
    float* colours;       // [items, height, width, COLOURS]
    const float* factors;  // with them, colours = factors[0] * colours + scale * factors[1] * result; without, scale * result
};

struct Operands : Problem {
    const bf16* bias;      // [outputs]
    const bf16* residual;  // like the output; added to the activated result; or null
    void* output;          // [items, height, width, outputs], twice height and width for UPSAMPLED; bf16 or f32; or null
    bf16* pooled;          // [items, height / 2, width / 2, outputs] or null
    unsigned flags;
    float scale;  // of an f32 output, of a picture
    Picture picture;
};

// ---- a tile's end ----

// The bias of a lane's channels; zeros past the last output.
template <int COUNT>
__device__ __forceinline__ void load_bias(float (&bias)[COUNT], const Operands& o, int channel) {
    Bf16Run<COUNT> packed = {};
    if (o.outputs % COUNT == 0) {
        if (channel < o.outputs) packed = *reinterpret_cast<const Bf16Run<COUNT>*>(o.bias + channel);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (channel + i < o.outputs) reinterpret_cast<bf16*>(&packed)[i] = o.bias[channel + i];
        }
    }
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) {
        const float2 pair = __bfloat1622float2(packed.pair[i / 2]);
        bias[i] = pair.x, bias[i + 1] = pair.y;
    }
}

// One square of a tile, in registers: this lane's two pixels, in rows `y` and y + 1 of the grid, column `x`.
template <class P>
__device__ __forceinline__ void finish_square(
    const Accumulators<P::BLOCK_N>& sums, const Operands& o, const Tile& tile, int y, int x, int member) {
    using Lane = Channels<P::BLOCK_N>;
    const int height = P::UPSAMPLE ? 2 * o.height : o.height, width = P::UPSAMPLE ? 2 * o.width : o.width;
    const int output_x = P::UPSAMPLE ? 2 * x + tile.column_parity : x;
#pragma unroll
    for (int group = 0; group < Lane::GROUPS; ++group) {
        const int channel = tile.output_block * P::BLOCK_N + group * Lane::GROUP + member * Lane::OF_LANE;
        const bool valid = channel < o.outputs;  // lanes without a channel take part in the exchange below
        float bias[Lane::OF_LANE];
        load_bias(bias, o, channel);
        Bf16Run<Lane::OF_LANE> packed[2];
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
                const Bf16Run<Lane::OF_LANE> added = *reinterpret_cast<const Bf16Run<Lane::OF_LANE>*>(o.residual + at);
#pragma unroll
                for (int i = 0; i < Lane::OF_LANE; i += 2) {
                    const float2 pair = __bfloat1622float2(added.pair[i / 2]);
                    value[i] += pair.x, value[i + 1] += pair.y;
                }
            }
#pragma unroll
            for (int i = 0; i < Lane::OF_LANE; i += 2) packed[half].pair[i / 2] = __floats2bfloat162_rn(value[i], value[i + 1]);
            if (o.output != nullptr && inside) {
                *reinterpret_cast<Bf16Run<Lane::OF_LANE>*>(static_cast<bf16*>(o.output) + at) = packed[half];
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
            *reinterpret_cast<Bf16Run<Lane::OF_LANE>*>(o.pooled + at + channel) = packed[0];
        }
    }
}

// Ends a tile whose sums become channels of the output.
template <class P>
struct ToChannels {
    __device__ __forceinline__ explicit ToChannels(const Operands&) {}

    __device__ __forceinline__ void operator()(const typename P::Sums& sums, const Operands& o, const Tile& tile) const {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % WARPGROUP_WARPS;
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
    static constexpr int DEPTHS = P::BLOCK_N / 16;
    uint32_t weights[DEPTHS][2];
    float bias[2];
    float factor, keep;  // of what is written or added, of what is there

    // A lane has, for the colour lane / 4, the weights of the channels that columns 2 m, 2 m + 1 and eight on stand for.
    __device__ __forceinline__ explicit ToPicture(const Operands& o) {
        using Lane = Channels<P::BLOCK_N>;
        const int colour = threadIdx.x % WARP / 4, member = threadIdx.x % 4;
        const auto weight = [&](int column) {
            const int channel = channel_of_column(column, Lane::GROUP);
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
        factor = o.picture.factors == nullptr ? o.scale : o.scale * o.picture.factors[1];
        keep = o.picture.factors == nullptr ? 0.0f : o.picture.factors[0];
    }

    __device__ __forceinline__ void operator()(const typename P::Sums& sums, const Operands& o, const Tile& tile) const {
        using Lane = Channels<P::BLOCK_N>;
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % WARPGROUP_WARPS, member = lane % 4;
        float channel_bias[P::BLOCK_N / 8][2];
#pragma unroll
        for (int i = 0; i < P::BLOCK_N / 8; ++i)
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
                mma(colours, left, weights[depth][0], weights[depth][1]);
            }
            const int y = tile.y + block / 2 * SIDE + 2 * warp, x = tile.x + block % 2 * SIDE + lane / 4;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int colour = 2 * member + i % 2, row = y + i / 2;
                if (colour >= COLOURS || row >= o.height || x >= o.width) continue;
                float* const at = o.picture.colours + ((static_cast<size_t>(tile.item) * o.height + row) * o.width + x) * COLOURS + colour;
                // With a keep of 1 as colours + factor * result, rounded once.
                *at = fmaf(factor, colours[i], o.picture.factors == nullptr ? 0.0f : __fmul_rn(keep, *at));
            }
        }
    }
};

// first, second: maps of the sources [items, height, width, channels] by boxes of BLOCK_K channels and BOX_WIDTH x BOX_HEIGHT
// pixels (the first one's map where there is no second). The launch's tile: outputs, channels of a chunk, rows of a tile,
// pieces of weights that fit (0: any number). Threads are fixed; the grid is as many blocks as the GPU has multiprocessors.
#define CONV_KERNEL(name, P)                                                                                              \
    extern "C" __global__ __launch_bounds__(THREADS, 1) void name(                                                        \
        const __grid_constant__ TensorMap first, const __grid_constant__ TensorMap second, const bf16* weights,           \
        const bf16* bias, const bf16* residual, void* output, bf16* pooled, int items, int height, int width,             \
        int outputs, int chunks, int first_chunks, unsigned flags, float scale) {                                         \
        const Operands operands = {{weights, items, height, width, outputs, chunks, first_chunks},                        \
                                   bias, residual, output, pooled, flags, scale, {}};                                     \
        convolve<P, ToChannels<P>>(first, second, operands);                                                              \
    }                                                                                                                     \
    L2P_LAUNCH(name, THREADS, P::BYTES, P::BLOCK_N, P::BLOCK_K, P::TILE_HEIGHT, P::RESIDENT ? P::WEIGHT_STAGES : 0)

#define CONV(name, ...)              \
    using Plan_##name = Plan<__VA_ARGS__>; \
    CONV_KERNEL(name, Plan_##name)

// The same for a convolution that goes on to a picture.
#define PICTURE_KERNEL(name, P)                                                                                           \
    extern "C" __global__ __launch_bounds__(THREADS, 1) void name(                                                        \
        const __grid_constant__ TensorMap first, const __grid_constant__ TensorMap second, const bf16* weights,           \
        const bf16* bias, const bf16* picture_weights, const bf16* picture_bias, float* colours, const float* factors,    \
        int items, int height, int width, int outputs, int chunks, int first_chunks, float scale) {                       \
        const Operands operands = {{weights, items, height, width, outputs, chunks, first_chunks},                        \
                                   bias, nullptr, nullptr, nullptr, SILU, scale,                                          \
                                   {picture_weights, picture_bias, colours, factors}};                                    \
        convolve<P, ToPicture<P>>(first, second, operands);                                                               \
    }                                                                                                                     \
    L2P_LAUNCH(name, THREADS, P::BYTES, P::BLOCK_N, P::BLOCK_K, P::TILE_HEIGHT, P::RESIDENT ? P::WEIGHT_STAGES : 0)

// <kernel>_<outputs>x<channels of a chunk>; _resident: all weights in shared memory.
CONV(conv3x3_128x64, 128, 2, 64, 3, SAME, false, 3, 9)
CONV(conv3x3_128x16, 128, 2, 16, 3, SAME, false, 4, 18)
CONV(conv3x3_64x64, 64, 4, 64, 3, SAME, false, 3, 12)
CONV(conv3x3_64x32_resident, 64, 4, 32, 3, SAME, true, 4, 27)
CONV(conv3x3_32x64_resident, 32, 4, 64, 3, SAME, true, 3, 18)
CONV(conv3x3_32x32_resident, 32, 4, 32, 3, SAME, true, 4, 36)
CONV(conv3x3_32x16_resident, 32, 4, 16, 3, SAME, true, 4, 36)
CONV(conv3x3_16x64_resident, 16, 4, 64, 3, SAME, true, 3, 36)
CONV(conv3x3_16x32_resident, 16, 4, 32, 3, SAME, true, 4, 36)
CONV(conv3x3_16x16_resident, 16, 4, 16, 3, SAME, true, 6, 36)
CONV(upsample_128x64, 128, 2, 64, 3, UPSAMPLED, false, 3, 9)
CONV(upsample_64x64_resident, 64, 4, 64, 3, UPSAMPLED, true, 2, 16)
CONV(upsample_32x32_resident, 32, 4, 32, 3, UPSAMPLED, true, 4, 48)
CONV(upsample_16x16_resident, 16, 4, 16, 3, UPSAMPLED, true, 6, 32)
PICTURE_KERNEL(picture_64x64, Plan_conv3x3_64x64)
PICTURE_KERNEL(picture_32x32_resident, Plan_conv3x3_32x32_resident)
CONV(conv1x1_128x64, 128, 2, 64, 1, SAME, false, 6, 6)

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
    const int output = output_block * columns + channel_of_column(column, columns < 32 ? columns : 32);
    float sum = 0.0f;
    if (output < outputs) {
        const bf16* from = weight + static_cast<size_t>(output) * taps_along * taps_along * inputs + input;
        if (!upsample) {
            sum = to_float(from[static_cast<size_t>(tap) * inputs]);
        } else {
            const KernelRows rows = upsampled_rows(tap / 2, parity / 2), along = upsampled_rows(tap % 2, parity % 2);
            for (int dy = rows.first; dy <= rows.last; ++dy)
                for (int dx = along.first; dx <= along.last; ++dx) sum += to_float(from[static_cast<size_t>(dy * 3 + dx) * inputs]);
        }
    }
    arranged[element] = __float2bfloat16_rn(sum);
}
L2P_LAUNCH(conv_arrange, 256, 0, 256)
#endif
