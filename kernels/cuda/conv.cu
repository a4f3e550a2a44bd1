// Convolutions over NHWC images on tensor cores, with their fusions; engine/src/ops/conv.rs holds the contract.
//
// One block per tile of output pixels and channels; common/conv_tile.cuh has the parts. Tiles differ in how many output
// channels they hold and in how the weights arrive:
//   * few channels: all weights lie beside the input tile and the block has one step. Bound by memory: an image of C channels
//     is read once, plus a margin of a quarter from L2, and written once. Several blocks per multiprocessor overlap loading
//     with products.
//   * many channels: steps of three taps, two buffers. Bound by the tensor cores: 18 * C * outputs operations per pixel.
// The image itself (at most three channels) has rows too short to be copied 16 bytes at a time. It is loaded element by
// element, and its 3x3 neighbourhoods, 27 values and 5 zeros of weight, make two products of their own.
#include "common/conv_tile.cuh"
#include "common/launch.cuh"

template <class P>
__device__ __forceinline__ void convolve(const Operands& o) {
    extern __shared__ __align__(16) unsigned char shared[];
    const Tile tile = find_tile<P>(o);
    const uint32_t inputs = shared_address(shared), weights = inputs + P::BUFFERS * P::INPUT;
    const int channels = o.channels + o.second_channels;
    const int all_steps = (channels + P::CHUNK - 1) / P::CHUNK * P::STEPS_PER_CHUNK;
    const int steps = L2P_FAULT_IF(26, max(all_steps - 1, 1), all_steps);
    const auto load_step = [&](int step) {
        const int chunk = step / P::STEPS_PER_CHUNK, group = step % P::STEPS_PER_CHUNK;
        const int first_channel = chunk * P::CHUNK;
        if (group == 0) load_input<P>(o, tile, channels, first_channel, inputs + chunk % P::BUFFERS * P::INPUT);
        load_weights<P>(o, tile, group * P::TAPS, first_channel, weights + step % P::BUFFERS * P::WEIGHTS);
    };
    typename P::Sums sums = {};
    load_step(0);
    for (int step = 0; step < steps; ++step) {
        const int chunk = step / P::STEPS_PER_CHUNK, group = step % P::STEPS_PER_CHUNK;
        cp_async_wait_all();
        __syncthreads();  // this step's operands are there, and the buffers of the step before are no longer read
        if (P::BUFFERS == 2 && step + 1 < steps) load_step(step + 1);
        multiply_step<P>(sums, tile, group, inputs + chunk % P::BUFFERS * P::INPUT, weights + step % P::BUFFERS * P::WEIGHTS);
        if (P::BUFFERS == 1 && step + 1 < steps) {
            __syncthreads();  // the only buffers are no longer read
            load_step(step + 1);
        }
    }
    __syncthreads();  // all products are done before their operands' memory holds the results
    finish<P>(o, sums, shared);
}

// Shared memory of a convolution that also has an image source, in bytes: the image tile's margin included, and the image's
// weights as rows of 32 values, k = tap * channels + channel.
template <class P>
struct ImagePlan {
    static constexpr int MAX_CHANNELS = 3;
    static constexpr int DEPTH = 32;
    static constexpr int WEIGHT_ROW = DEPTH * 2 + ROW_PAD;
    static constexpr int WEIGHTS = P::INPUT + P::WEIGHTS;
    static constexpr int IMAGE = WEIGHTS + P::OUTPUTS * WEIGHT_ROW;
    static constexpr int LOADED = IMAGE + P::INPUT_HEIGHT * P::INPUT_WIDTH * MAX_CHANNELS * 2;
    static constexpr int SHARED = LOADED > P::STAGED ? LOADED : P::STAGED;
};

// The weights of one chunk of the first source, element by element: rows of 9 * (channels + image channels) values need not
// be aligned.
template <class P>
__device__ __forceinline__ void load_unaligned_weights(const Operands& o, const Tile& tile, int first_channel, unsigned char* to) {
    const int channels = o.channels + o.second_channels;
    for (int element = threadIdx.x; element < 9 * P::OUTPUTS * P::CHUNK; element += THREADS) {
        const int column = element % P::CHUNK, row = element / P::CHUNK;
        const int output = tile.first_output + row % P::OUTPUTS, tap = row / P::OUTPUTS, channel = first_channel + column;
        const bool valid = output < o.outputs && channel < o.channels;
        const size_t at = (static_cast<size_t>(output) * 9 + tap) * channels + channel;
        *reinterpret_cast<bf16*>(to + row * P::ROW + column * 2) = valid ? o.weight[at] : bf16();
    }
}

template <class P>
__device__ __forceinline__ void load_image_weights(const Operands& o, const Tile& tile, unsigned char* to) {
    using Image = ImagePlan<P>;
    const int channels = o.channels + o.second_channels;
    for (int element = threadIdx.x; element < P::OUTPUTS * Image::DEPTH; element += THREADS) {
        const int k = element % Image::DEPTH, row = element / Image::DEPTH;
        const int output = tile.first_output + row, tap = k / o.second_channels;
        const bool valid = output < o.outputs && tap < 9;
        const size_t at = (static_cast<size_t>(output) * 9 + tap) * channels + o.channels + k % o.second_channels;
        *reinterpret_cast<bf16*>(to + row * Image::WEIGHT_ROW + k * 2) = valid ? o.weight[at] : bf16();
    }
}

// The image tile with its margin, packed: [INPUT_HEIGHT, INPUT_WIDTH, image channels], zeros outside the image.
template <class P>
__device__ __forceinline__ void load_image(const Operands& o, const Tile& tile, bf16* to) {
    const int elements = P::INPUT_HEIGHT * P::INPUT_WIDTH * o.second_channels;
    for (int element = threadIdx.x; element < elements; element += THREADS) {
        const int channel = element % o.second_channels, position = element / o.second_channels;
        const int y = tile.y - 1 + position / P::INPUT_WIDTH, x = tile.x - 1 + position % P::INPUT_WIDTH;
        bf16 value = bf16();
        if (static_cast<unsigned>(y) < static_cast<unsigned>(o.height) && static_cast<unsigned>(x) < static_cast<unsigned>(o.width)) {
            const size_t at = second_pixel(o, tile.item, y, x) * o.second_channels + channel;
            value = o.flags & F32_IMAGE ? from_float<bf16>(static_cast<const float*>(o.second)[at])
                                        : static_cast<const bf16*>(o.second)[at];
        }
        to[element] = value;
    }
}

// Adds the products of the image's neighbourhoods. The rows of the left operand are gathered from the packed tile; where k has
// no tap the last one stands in, whose weight there is zero.
template <class P>
__device__ __forceinline__ void multiply_image(
    const Operands& o, const Tile& tile, typename P::Sums& sums, const bf16* image, uint32_t weights) {
    using Image = ImagePlan<P>;
    const int channels = o.second_channels;
    const int output = tile.warp_column * P::N_TILES * 8 + tile.lane % 8 + tile.lane / 16 * 8;
    const uint32_t weights_lane = weights + output * Image::WEIGHT_ROW + tile.lane / 8 % 2 * 16;
    const bf16* const pixel = image + (tile.warp_row * P::M_TILES * P::INPUT_WIDTH + tile.lane / 4) * channels;
#pragma unroll 1
    for (int k = 0; k < Image::DEPTH; k += 16) {
        int offset[4];  // of k + column, column + 1, column + 8, column + 9 in the tile, column = 2 * (lane % 4)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = min(k + tile.lane % 4 * 2 + i / 2 * 8 + i % 2, 9 * channels - 1);
            const int tap = at / channels;
            offset[i] = (tap / 3 * P::INPUT_WIDTH + tap % 3) * channels + at % channels;
        }
        uint32_t b[P::N_TILES / 2][4];
#pragma unroll
        for (int n = 0; n < P::N_TILES / 2; ++n) ldmatrix(b[n], weights_lane + n * 16 * Image::WEIGHT_ROW + k * 2);
#pragma unroll
        for (int m = 0; m < P::M_TILES; ++m) {
            uint32_t a[4];
#pragma unroll
            for (int part = 0; part < 4; ++part) {  // (row, column), (row + 8, column), (row, column + 8), (row + 8, column + 8)
                const bf16* const from = pixel + (m * P::INPUT_WIDTH + part % 2 * 8) * channels;
                const __nv_bfloat162 pair = {from[offset[part / 2 * 2]], from[offset[part / 2 * 2 + 1]]};
                a[part] = *reinterpret_cast<const uint32_t*>(&pair);
            }
#pragma unroll
            for (int n = 0; n < P::N_TILES; ++n) mma(sums[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
    }
}

// As convolve, with the image as second source: 3x3, no upsampling. There may be no first source.
template <class P>
__device__ __forceinline__ void convolve_image(const Operands& o) {
    static_assert(P::KERNEL == 3 && P::TAPS == 9 && P::BUFFERS == 1 && !P::UPSAMPLE);
    using Image = ImagePlan<P>;
    extern __shared__ __align__(16) unsigned char shared[];
    const Tile tile = find_tile<P>(o);
    const uint32_t base = shared_address(shared);
    bf16* const image = reinterpret_cast<bf16*>(shared + Image::IMAGE);
    typename P::Sums sums = {};
    load_image<P>(o, tile, image);
    load_image_weights<P>(o, tile, shared + Image::WEIGHTS);
    for (int channel = 0; channel < o.channels; channel += P::CHUNK) {
        load_input<P>(o, tile, o.channels, channel, base);
        load_unaligned_weights<P>(o, tile, channel, shared + P::INPUT);
        cp_async_wait_all();
        __syncthreads();  // the chunk's operands are there
        multiply_step<P>(sums, tile, 0, base, base + P::INPUT);
        __syncthreads();  // and no longer read, before the next chunk's overwrite them
    }
    __syncthreads();  // the image and its weights are there
    multiply_image<P>(o, tile, sums, image, base + Image::WEIGHTS);
    __syncthreads();  // all products are done before their operands' memory holds the results
    finish<P>(o, sums, shared);
}

#define CONV_KERNEL(name, P, SHARED, convolve)                                                                             \
    extern "C" __global__ __launch_bounds__(THREADS, P::BLOCKS) void name(                                                 \
        const bf16* x, const void* second, const bf16* weight, const bf16* bias, const bf16* residual, void* output,       \
        bf16* pooled, int height, int width, int channels, int second_channels, int second_height, int second_width,       \
        int outputs, unsigned flags, float scale, float row_ratio, float column_ratio) {                                   \
        const Operands operands = {x,        second,          weight,        bias,         residual, output,               \
                                   pooled,   height,          width,         channels,     second_channels, second_height, \
                                   second_width, outputs,     flags,         scale,        row_ratio, column_ratio};       \
        convolve<P>(operands);                                                                                             \
    }                                                                                                                      \
    L2P_LAUNCH(name, THREADS, SHARED, P::TILE_HEIGHT, TILE_WIDTH, P::OUTPUTS)

// conv3x3_OxC: O output channels per tile, all of up to C input channels in one step; _chunked: any number of channels.
#define CONV_3X3(name, HEIGHT, OUTPUTS, CHUNK, TAPS, BUFFERS, WARP_ROWS, BLOCKS)                                           \
    using Plan_##name = Plan<3, false, HEIGHT, OUTPUTS, CHUNK, TAPS, BUFFERS, WARP_ROWS, BLOCKS>;                          \
    using UpsamplePlan_##name = Plan<3, true, HEIGHT, OUTPUTS, CHUNK, TAPS, BUFFERS, WARP_ROWS, BLOCKS>;                   \
    CONV_KERNEL(conv3x3_##name, Plan_##name, Plan_##name::SHARED, convolve)                                                \
    CONV_KERNEL(upsample_conv3x3_##name, UpsamplePlan_##name, UpsamplePlan_##name::SHARED, convolve)

CONV_3X3(16x16, 16, 16, 16, 9, 1, 8, 4)
CONV_3X3(16x32, 16, 16, 32, 9, 1, 8, 4)
CONV_3X3(16x32_chunked, 16, 16, 32, 3, 2, 8, 3)
CONV_3X3(32x16, 16, 32, 16, 9, 1, 8, 3)
CONV_3X3(32x32, 16, 32, 32, 9, 1, 8, 3)
CONV_3X3(32x32_chunked, 16, 32, 32, 3, 2, 8, 3)
CONV_3X3(64x32_chunked, 16, 64, 32, 3, 2, 4, 2)
CONV_3X3(128x32_chunked, 8, 128, 32, 3, 2, 2, 2)

using Pointwise = Plan<1, false, 8, 128, 64, 1, 2, 2, 2>;
CONV_KERNEL(conv1x1, Pointwise, Pointwise::SHARED, convolve)

using Image16 = Plan<3, false, 16, 16, 16, 9, 1, 8, 3>;
using Image32 = Plan<3, false, 16, 32, 16, 9, 1, 8, 2>;
CONV_KERNEL(conv3x3_image_16, Image16, ImagePlan<Image16>::SHARED, convolve_image)
CONV_KERNEL(conv3x3_image_32, Image32, ImagePlan<Image32>::SHARED, convolve_image)

constexpr int PICTURE_CHANNELS = 3;
constexpr int MAX_INPUTS = 512;

// output[pixel] = scale * (weight . x[pixel] + bias), three f32 values per pixel; channels a multiple of 8, at most MAX_INPUTS.
// One thread per pixel. Bound by memory: 2 bytes per input channel and 12 bytes per pixel.
extern "C" __global__ __launch_bounds__(THREADS) void conv1x1_picture(
    const bf16* x, const bf16* weight, const bf16* bias, float* output, size_t pixels, int channels, float scale) {
    __shared__ float4 weights[MAX_INPUTS];  // the three weights of a channel side by side, read by all lanes at once
    __shared__ float results[THREADS * PICTURE_CHANNELS];
    for (int channel = threadIdx.x; channel < channels; channel += THREADS) {
        weights[channel] = make_float4(
            to_float(weight[channel]), to_float(weight[channels + channel]), to_float(weight[2 * channels + channel]), 0.0f);
    }
    __syncthreads();  // all weights are there
    const size_t first = static_cast<size_t>(blockIdx.x) * THREADS, pixel = first + threadIdx.x;
    float sum[PICTURE_CHANNELS] = {to_float(bias[0]), to_float(bias[1]), to_float(bias[2])};
    if (pixel < pixels) {
        for (int channel = 0; channel < channels; channel += 8) {
            float values[8];
            load8(values, x + pixel * channels + channel);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float4 factors = weights[channel + i];
                sum[0] += values[i] * factors.x, sum[1] += values[i] * factors.y, sum[2] += values[i] * factors.z;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < PICTURE_CHANNELS; ++i) results[threadIdx.x * PICTURE_CHANNELS + i] = sum[i] * scale;
    __syncthreads();  // the block's results are there, to be written in order of addresses
#pragma unroll
    for (int i = 0; i < PICTURE_CHANNELS; ++i) {
        const int at = i * THREADS + threadIdx.x;
        if (first * PICTURE_CHANNELS + at < pixels * PICTURE_CHANNELS) output[first * PICTURE_CHANNELS + at] = results[at];
    }
}
L2P_LAUNCH(conv1x1_picture, THREADS, 0, THREADS, MAX_INPUTS)
