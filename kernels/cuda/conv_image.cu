// 3x3 convolution of a three-channel image with SiLU and 2x2 maxima; engine/src/ops/conv holds the contract.
//
// A warp takes two rows of 16 pixels at a time (common/image_tile.cuh), so that a window of the maxima lies in one lane and its
// neighbour. Bound by memory and by the special function units: 6 or 12 bytes read per pixel, 2 bytes and one tangent per
// output channel, half a byte more for the maxima.
#include "common/conv.cuh"
#include "common/image_tile.cuh"
#include "common/launch.cuh"

constexpr int THREADS = 256;
constexpr int TILE_WIDTH = 64;
constexpr int TILE_HEIGHT = 16;
constexpr int SQUARES = TILE_WIDTH / 16;  // pairs of rows of 16 pixels, side by side
// With a margin of one pixel, and a further one on the left and right so that rows start at an even pixel.
using Image = ImageTile<TILE_WIDTH + 4, TILE_HEIGHT + 2>;

struct Operands {
    const bf16* weight;  // [outputs, 27]
    const bf16* bias;    // [outputs]
    bf16* output;        // [items, height, width, outputs] or null
    bf16* pooled;        // [items, height / 2, width / 2, outputs] or null
    int items, height, width, outputs;
    unsigned flags;
};

template <int OUTPUTS, class Element>
__device__ __forceinline__ void convolve(const Element* image, const Operands& o) {
    using Lane = Channels<OUTPUTS>;
    constexpr int TILES = OUTPUTS / 8;
    __shared__ uint32_t words[Image::BYTES / 4];
    const Image tile{words};
    const int first = static_cast<int>(blockIdx.y) * OUTPUTS;
    uint32_t weights[TILES][IMAGE_STEPS][2];
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        load_image_weights(weights[i], o.weight, o.outputs, [&](int column) {
            return first + channel_of_column(8 * i + column, Lane::GROUP);
        });
    }
    const int lane = threadIdx.x % WARP, group = lane / 4, member = lane % 4;
    float bias[Lane::GROUPS][Lane::OF_LANE];
#pragma unroll
    for (int i = 0; i < Lane::GROUPS; ++i)
#pragma unroll
        for (int j = 0; j < Lane::OF_LANE; ++j) {
            const int channel = first + i * Lane::GROUP + member * Lane::OF_LANE + j;
            bias[i][j] = channel < o.outputs ? to_float(o.bias[channel]) : 0.0f;
        }
    const Image::Offsets offsets;
    const int across = (o.width + TILE_WIDTH - 1) / TILE_WIDTH, down = (o.height + TILE_HEIGHT - 1) / TILE_HEIGHT;
    const int tiles = across * down * o.items;
    const auto fetch = [&](Image::Words<THREADS>& to, int index) {
        Image::fetch<THREADS>(
            to, image, index / across / down, index / across % down * TILE_HEIGHT - 1, index % across * TILE_WIDTH - 2, o.height, o.width);
    };
    Image::Words<THREADS> next;
    if (static_cast<int>(blockIdx.x) < tiles) fetch(next, blockIdx.x);
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const int x = index % across * TILE_WIDTH, y = index / across % down * TILE_HEIGHT, item = index / across / down;
        __syncthreads();  // the tile before is no longer read
        tile.put<THREADS>(next);
        __syncthreads();  // the tile is there
        if (index + static_cast<int>(gridDim.x) < tiles) fetch(next, index + gridDim.x);  // under this tile's products
        for (int square = threadIdx.x / WARP; square < SQUARES * TILE_HEIGHT / 2; square += THREADS / WARP) {
            const int row = square / SQUARES * 2, column = square % SQUARES * 16;
            if (y + row >= o.height || x + column >= o.width) continue;
            float sums[2][TILES][4] = {};
#pragma unroll
            for (int below = 0; below < 2; ++below) {
                uint32_t a[IMAGE_STEPS][4];
                tile.operands(a, offsets, row + below, column + 2);
#pragma unroll
                for (int step = 0; step < IMAGE_STEPS; ++step)
#pragma unroll
                    for (int i = 0; i < TILES; ++i) {
                        mma(sums[below][i], a[step], weights[i][step][0], weights[i][step][1]);
                    }
            }
#pragma unroll
            for (int part = 0; part < 2; ++part) {  // pixels `group` and eight on
                const int at_x = x + column + group + 8 * part;
#pragma unroll
                for (int i = 0; i < Lane::GROUPS; ++i) {
                    const int channel = first + i * Lane::GROUP + member * Lane::OF_LANE;
                    const bool valid = channel < o.outputs && at_x < o.width;
                    Bf16Run<Lane::OF_LANE> packed[2];
#pragma unroll
                    for (int below = 0; below < 2; ++below) {
#pragma unroll
                        for (int j = 0; j < Lane::OF_LANE; j += 2) {
                            const float* const pair = &sums[below][i * (Lane::GROUP / 8) + j / 2][2 * part];
                            float low = pair[0] + bias[i][j], high = pair[1] + bias[i][j + 1];
                            if (o.flags & SILU) low = silu_by_tanh(low), high = silu_by_tanh(high);
                            packed[below].pair[j / 2] = __floats2bfloat162_rn(low, high);
                        }
                        const int at_y = y + row + below;
                        const size_t at = ((static_cast<size_t>(item) * o.height + at_y) * o.width + at_x) * o.outputs + channel;
                        if (o.output != nullptr && valid && at_y < o.height) {
                            *reinterpret_cast<Bf16Run<Lane::OF_LANE>*>(o.output + at) = packed[below];
                        }
                    }
                    if (o.pooled == nullptr) continue;
                    // The right neighbours are four lanes on. NaN wins, as in PyTorch.
#pragma unroll
                    for (int j = 0; j < Lane::OF_LANE / 2; ++j) {
                        const __nv_bfloat162 best = __hmax2_nan(packed[0].pair[j], packed[1].pair[j]);
                        const unsigned other = __shfl_xor_sync(FULL_WARP, *reinterpret_cast<const unsigned*>(&best), 4);
                        packed[0].pair[j] = __hmax2_nan(best, *reinterpret_cast<const __nv_bfloat162*>(&other));
                    }
                    const int pooled_y = (y + row) / 2, pooled_x = at_x / 2;
                    if (valid && at_x % 2 == 0 && pooled_y < o.height / 2 && pooled_x < o.width / 2) {
                        const size_t at = ((static_cast<size_t>(item) * (o.height / 2) + pooled_y) * (o.width / 2) + pooled_x) * o.outputs;
                        *reinterpret_cast<Bf16Run<Lane::OF_LANE>*>(o.pooled + at + channel) = packed[0];
                    }
                }
            }
        }
    }
}

// image [items, height, width, 3] in bf16 or f32; grid (any number of blocks, which share the tiles;
// blocks of OUTPUTS channels). Outputs are a multiple of 8.
#define CONV_IMAGE(name, Element, OUTPUTS)                                                                                \
    extern "C" __global__ __launch_bounds__(THREADS) void name(                                                           \
        const Element* image, const bf16* weight, const bf16* bias, bf16* output, bf16* pooled, int items, int height,    \
        int width, int outputs, unsigned flags) {                                                                         \
        convolve<OUTPUTS>(image, Operands{weight, bias, output, pooled, items, height, width, outputs, flags});           \
    }                                                                                                                     \
    L2P_LAUNCH(name, THREADS, 0, TILE_HEIGHT, TILE_WIDTH, OUTPUTS)

CONV_IMAGE(conv_image_16, bf16, 16)
CONV_IMAGE(conv_image_32, bf16, 32)
CONV_IMAGE(conv_image_16_f32, float, 16)
CONV_IMAGE(conv_image_32_f32, float, 32)
