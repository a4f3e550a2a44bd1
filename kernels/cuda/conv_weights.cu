// The gradients of a convolution's weight and bias on every GPU from Ampere on; engine/src/ops/conv/backward holds the contract.
//
//   weights_*         sums over a part of the pixels, left in f32; conv_weights_hopper.cu leaves the same
//   conv_weights_sum* add the parts, in a fixed order, to the gradients: two runs give the same bits
//
// The weight's gradient is, for each tap, the product over all pixels of the sum's gradient `ds` and the source x seen from that
// tap. A block takes up to 16 ROW_TILES outputs, CHANNELS channels of one source and a part of the pixels. Tiles of ds and x lie
// in shared memory pixel by pixel; pixels are what is summed, so both are operands that ldmatrix transposes. A warp has all
// outputs, 8 channels and all taps; where channels are few, warps share the rows of a tile and each leaves its own sums. Rows in
// shared memory are 16 bytes longer than their data, so that eight consecutive ones start in different banks. Several blocks per
// multiprocessor overlap loading with products. Bound by the tensor cores, with few channels by memory.
#include "common/conv.cuh"
#include "common/conv_weights.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int TILE_WIDTH = 16;  // pixels: one product takes a row of a tile
constexpr int ROW_PAD = 16;     // bytes

template <int KERNEL_, bool UPSAMPLE_, int ROW_TILES_, int CHANNELS_, int TILE_HEIGHT_>
struct Plan {
    static constexpr int KERNEL = KERNEL_, TAPS = KERNEL * KERNEL;
    static constexpr bool UPSAMPLE = UPSAMPLE_;  // x is seen at twice its height and width
    static constexpr int ROW_TILES = ROW_TILES_, OUTPUTS = 16 * ROW_TILES, CHANNELS = CHANNELS_;
    static constexpr int TILE_WIDTH = ::TILE_WIDTH, TILE_HEIGHT = TILE_HEIGHT_;
    static constexpr int TURNS = 1, OUTPUT_BLOCK = OUTPUTS, CHANNEL_BLOCK = CHANNELS;

    static constexpr int CHANNEL_WARPS = CHANNELS / 8, PIXEL_PARTS = WARPS / CHANNEL_WARPS;
    static constexpr int SHRINK = UPSAMPLE ? 2 : 1, MARGIN = KERNEL / 2;
    static constexpr int X_WIDTH = TILE_WIDTH / SHRINK + 2 * MARGIN, X_HEIGHT = TILE_HEIGHT / SHRINK + 2 * MARGIN;

    // Bytes.
    static constexpr int DS_ROW = OUTPUTS * 2 + ROW_PAD;
    static constexpr int X_ROW = CHANNELS == 8 ? 16 : CHANNELS * 2 + ROW_PAD;  // eight rows of 16 bytes have no conflict
    static constexpr int X = TILE_HEIGHT * TILE_WIDTH * DS_ROW;
    static constexpr int BYTES = X + X_HEIGHT * X_WIDTH * X_ROW;
    static_assert(WARPS % CHANNEL_WARPS == 0 && TILE_HEIGHT % PIXEL_PARTS == 0 && TILE_HEIGHT % SHRINK == 0);

    using Sums = float[TAPS][ROW_TILES][4];
};

constexpr unsigned F32_FIRST = 1, F32_SECOND = 2;  // the source is an image in f32

// A source of the convolution.
struct Source {
    const void* values;  // [items, height, width, channels]
    int height, width, channels;
    bool f32;
};

struct Operands {
    const bf16* ds;       // [items, height, width, outputs]
    Source first, second;  // the second on another grid perhaps, or of no channels
    float* weight_parts;  // [parts, outputs, TAPS, stride]
    float* bias_parts;    // [parts, outputs]
    int items, height, width, outputs;  // of ds
    int stride;           // channels of both sources, rounded up
    int splits;           // of the pixels
    float row_ratio, column_ratio;  // second's grid over the first one's
};

using Task = WeightsTask;

// Starts loading a tile of WIDTH pixels in a row and COLUMNS channels from `first` on; `pixel(row, column)` is the index of a
// pixel in memory, negative outside the image. What is outside the image or past the last channel becomes zeros.
template <int WIDTH, int HEIGHT, int COLUMNS, int ROW, class Pixel>
__device__ __forceinline__ void load_tile(
    unsigned char* to, const void* values, int channels, int first, bool f32, const Pixel& pixel) {
    constexpr int UNITS = COLUMNS / 8;
    const bool whole = channels % 8 == 0;  // else rows are not aligned, and are read one element at a time
#pragma unroll 1  // addresses are cheap to find anew, and too many to keep
    for (int index = threadIdx.x; index < WIDTH * HEIGHT * UNITS; index += THREADS) {
        const int unit = index % UNITS, position = index / UNITS, channel = first + unit * 8;
        const long long at = pixel(position / WIDTH, position % WIDTH);
        const bool valid = at >= 0 && channel < channels;
        const size_t element = valid ? at * channels + channel : 0;
        unsigned char* const place = to + position * ROW + unit * 16;
        if (whole) {
            cp_async16(shared_address(place), static_cast<const bf16*>(values) + element, valid);
            continue;
        }
        float gathered[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const bool there = valid && channel + i < channels;
            if (f32) gathered[i] = there ? static_cast<const float*>(values)[element + i] : 0.0f;
            else gathered[i] = there ? to_float(static_cast<const bf16*>(values)[element + i]) : 0.0f;
        }
        store8(reinterpret_cast<bf16*>(place), gathered);
    }
}

template <class P>
__device__ __forceinline__ void load(unsigned char* memory, const Operands& o, const Task& task, int unit) {
    const int across = (o.width + TILE_WIDTH - 1) / TILE_WIDTH, down = (o.height + P::TILE_HEIGHT - 1) / P::TILE_HEIGHT;
    const int x = unit % across * TILE_WIDTH, y = unit / across % down * P::TILE_HEIGHT, item = unit / across / down;
    const auto index = [item](int y, int x, int height, int width) {
        return (static_cast<long long>(item) * height + y) * width + x;
    };
    load_tile<TILE_WIDTH, P::TILE_HEIGHT, P::OUTPUTS, P::DS_ROW>(
        memory, o.ds, o.outputs, task.first_output, false, [&](int row, int column) {
            return y + row < o.height && x + column < o.width ? index(y + row, x + column, o.height, o.width) : -1;
        });
    const Source source = task.second ? o.second : o.first;
    const int height = o.height / P::SHRINK, width = o.width / P::SHRINK;
    load_tile<P::X_WIDTH, P::X_HEIGHT, P::CHANNELS, P::X_ROW>(
        memory + P::X, source.values, source.channels, task.first_channel, source.f32, [&](int row, int column) -> long long {
            row += y / P::SHRINK - P::MARGIN, column += x / P::SHRINK - P::MARGIN;
            if (static_cast<unsigned>(row) >= static_cast<unsigned>(height) || static_cast<unsigned>(column) >= static_cast<unsigned>(width)) return -1;
            if (task.second) {
                row = nearest(row, o.row_ratio, source.height), column = nearest(column, o.column_ratio, source.width);
            }
            return index(row, column, source.height, source.width);
        });
}

// Two 8x8 matrices, transposed; lane l < 16 gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_pair_trans(uint32_t (&tile)[2], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(tile[0]), "=r"(tile[1])
                 : "r"(address)
                 : "memory");
}

// Adds the products of one row of a tile: 16 pixels of ds, and of x from every tap.
template <class P>
__device__ __forceinline__ void multiply_row(
    typename P::Sums& sums, float (&bias)[P::ROW_TILES][4], bool with_bias, uint32_t ds, uint32_t x, int row) {
    const int lane = threadIdx.x % WARP, pixel = lane % 16;
    uint32_t a[P::ROW_TILES][4];
#pragma unroll
    for (int tile = 0; tile < P::ROW_TILES; ++tile) {
        // Of the four matrices the first two have the first eight pixels, the second of each pair the last eight outputs.
        const int from = row * TILE_WIDTH + lane % 8 + lane / 16 * 8;
        ldmatrix_trans(a[tile], ds + from * P::DS_ROW + tile * 32 + lane / 8 % 2 * 16);
    }
    if (with_bias) {
        constexpr uint32_t ONES = 0x3f803f80;
#pragma unroll
        for (int tile = 0; tile < P::ROW_TILES; ++tile) mma(bias[tile], a[tile], ONES, ONES);
    }
#pragma unroll
    for (int tap = 0; tap < P::TAPS; ++tap) {
        // With upsampling, row r and kernel row k meet input row (r + k - 1) >> 1, which is row (r + k + 1) >> 1 of the tile with
        // its margin; r counts from an even row. Columns alike.
        const int down = row + tap / P::KERNEL, right = pixel + tap % P::KERNEL;
        const int x_row = P::UPSAMPLE ? (down + 1) >> 1 : down, x_column = P::UPSAMPLE ? (right + 1) >> 1 : right;
        uint32_t b[2];
        ldmatrix_pair_trans(b, x + (x_row * P::X_WIDTH + x_column) * P::X_ROW);
#pragma unroll
        for (int tile = 0; tile < P::ROW_TILES; ++tile) mma(sums[tap][tile], a[tile], b[0], b[1]);
    }
}

template <class P>
__device__ __forceinline__ void store(
    const typename P::Sums& sums, const float (&bias)[P::ROW_TILES][4], bool with_bias, const Operands& o, const Task& task,
    int first_channel, int part) {
    const int lane = threadIdx.x % WARP, channel = first_channel + lane % 4 * 2;
    const int channels = task.second ? o.second.channels : o.first.channels;
#pragma unroll
    for (int tile = 0; tile < P::ROW_TILES; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int output = task.first_output + tile * 16 + half * 8 + lane / 4;
            if (output >= o.outputs) continue;
            const size_t row = static_cast<size_t>(part) * o.outputs + output;
            if (with_bias && lane % 4 == 0) o.bias_parts[row] = bias[tile][2 * half];
            if (channel >= channels) continue;
            // A pair past the last channel is still within the stride.
            float* const to = o.weight_parts + row * P::TAPS * o.stride + (task.second ? o.first.channels : 0) + channel;
#pragma unroll
            for (int tap = 0; tap < P::TAPS; ++tap) {
                *reinterpret_cast<float2*>(to + tap * o.stride) = make_float2(sums[tap][tile][2 * half], sums[tap][tile][2 * half + 1]);
            }
        }
}

template <class P>
__device__ __forceinline__ void run(const Operands& o) {
    extern __shared__ __align__(16) unsigned char memory[];
    const Task task = find_task<P>(o.items, o.height, o.width, o.outputs, o.first.channels, o.second.channels, o.splits);
    const int warp = threadIdx.x / WARP, channel = warp % P::CHANNEL_WARPS * 8, part = warp / P::CHANNEL_WARPS;
    const bool with_bias = !task.second && task.first_channel + channel == 0;
    const uint32_t ds = shared_address(memory), x = ds + P::X + channel * 2;
    typename P::Sums sums = {};
    float bias[P::ROW_TILES][4] = {};
    for (int unit = 0; unit < task.units; ++unit) {
        __syncthreads();  // the tile before is no longer read
        load<P>(memory, o, task, task.first_unit + unit);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();  // the tile is there
#pragma unroll 1
        for (int row = part; row < P::TILE_HEIGHT; row += P::PIXEL_PARTS) multiply_row<P>(sums, bias, with_bias, ds, x, row);
    }
    store<P>(sums, bias, with_bias, o, task, task.first_channel + channel, task.split * P::PIXEL_PARTS + part);
}

// As many blocks as blocks of channels of each source, blocks of outputs and splits. The launch's tile: outputs and channels of
// a block, rows of a tile, parts of the pixels within a block.
#define WEIGHTS_KERNEL(name, BLOCKS, ...)                                                                                  \
    using Plan_##name = Plan<__VA_ARGS__>;                                                                                 \
    extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void name(                                                    \
        const bf16* ds, const void* first, const void* second, float* weight_parts, float* bias_parts, int items,          \
        int height, int width, int outputs, int first_height, int first_width, int first_channels, int second_height,      \
        int second_width, int second_channels, int stride, int splits, unsigned flags, float row_ratio,                    \
        float column_ratio) {                                                                                              \
        run<Plan_##name>({ds, {first, first_height, first_width, first_channels, (flags & F32_FIRST) != 0},                \
                          {second, second_height, second_width, second_channels, (flags & F32_SECOND) != 0}, weight_parts, \
                          bias_parts, items, height, width, outputs, stride, splits, row_ratio, column_ratio});            \
    }                                                                                                                      \
    L2P_LAUNCH(name, THREADS, Plan_##name::BYTES, Plan_##name::OUTPUTS, Plan_##name::CHANNELS, Plan_##name::TILE_HEIGHT,   \
               Plan_##name::PIXEL_PARTS)

// weights_<kernel>_<outputs>x<channels> of a block
WEIGHTS_KERNEL(weights_3x3_16x8, 3, 3, false, 1, 8, 16)
WEIGHTS_KERNEL(weights_3x3_16x16, 3, 3, false, 1, 16, 16)
WEIGHTS_KERNEL(weights_3x3_16x64, 2, 3, false, 1, 64, 8)
WEIGHTS_KERNEL(weights_3x3_32x8, 2, 3, false, 2, 8, 16)
WEIGHTS_KERNEL(weights_3x3_32x16, 2, 3, false, 2, 16, 16)
WEIGHTS_KERNEL(weights_3x3_32x64, 2, 3, false, 2, 64, 8)
WEIGHTS_KERNEL(weights_upsampled_16x16, 3, 3, true, 1, 16, 16)
WEIGHTS_KERNEL(weights_upsampled_32x64, 2, 3, true, 2, 64, 8)
WEIGHTS_KERNEL(weights_1x1_32x64, 3, 1, false, 2, 64, 8)

// ---- the sum of all parts ----

// Adds to `weight` [outputs, taps, inputs] and `bias` [outputs] the sums of weight_parts [parts, turns, outputs, taps_of_part,
// stride] and bias_parts [parts, turns, outputs]. With one turn the taps are those of the weight; with four, taps of 3x3 are
// summed from what the four parities of an upsampled image's rows and columns met with their 2x2. SHARERS threads share an
// element's parts.
template <int SHARERS>
__device__ __forceinline__ void sum_parts(
    const float* weight_parts, const float* bias_parts, bf16* weight, bf16* bias, int parts, int turns, int outputs, int taps,
    int inputs, int stride) {
    constexpr int ELEMENTS = THREADS / SHARERS;
    const int element = threadIdx.x % ELEMENTS, sharer = threadIdx.x / ELEMENTS;
    const size_t weights = static_cast<size_t>(outputs) * taps * inputs, index = static_cast<size_t>(blockIdx.x) * ELEMENTS + element;
    const bool of_weight = index < weights, valid = index < weights + outputs;
    const int taps_of_part = turns == 1 ? taps : 4;
    const int input = static_cast<int>(index % inputs), tap = static_cast<int>(index / inputs % taps);
    const int output = of_weight ? static_cast<int>(index / inputs / taps) : static_cast<int>(index - weights);
    float sum = 0.0f;
    for (int turn = 0; valid && turn < turns; ++turn) {
        // Of an even row the first pixel met kernel row 0 and the second one rows 1 and 2; of an odd row the first met rows 0 and
        // 1, the second one row 2. Columns alike.
        const int part_tap = turns == 1 ? tap : (tap / 3 > turn / 2) * 2 + (tap % 3 > turn % 2);
        const size_t row = static_cast<size_t>(turn) * outputs + output;
        const float* const from = of_weight ? weight_parts + (row * taps_of_part + part_tap) * stride + input : bias_parts + row;
        const size_t step = static_cast<size_t>(turns) * outputs * (of_weight ? static_cast<size_t>(taps_of_part) * stride : 1);
#pragma unroll 4
        for (int part = sharer; part < parts; part += SHARERS) sum += from[part * step];
    }
    if constexpr (SHARERS > 1) {
        __shared__ float sums[SHARERS][ELEMENTS];
        sums[sharer][element] = sum;
        __syncthreads();  // the sharers' sums are there
        if (sharer > 0) return;
#pragma unroll
        for (int i = 1; i < SHARERS; ++i) sum += sums[i][element];
    }
    if (!valid) return;
    bf16* const to = of_weight ? weight + index : bias + output;
    *to = from_float<bf16>(L2P_FAULT_IF(7, 0.0f, to_float(*to)) + sum);
}

// One block per THREADS / SHARERS weights and biases. The launch's tile: those, and threads that share an element's parts.
#define SUM_KERNEL(name, SHARERS)                                                                                         \
    extern "C" __global__ __launch_bounds__(THREADS) void name(                                                           \
        const float* weight_parts, const float* bias_parts, bf16* weight, bf16* bias, int parts, int turns, int outputs,  \
        int taps, int inputs, int stride) {                                                                               \
        sum_parts<SHARERS>(weight_parts, bias_parts, weight, bias, parts, turns, outputs, taps, inputs, stride);          \
    }                                                                                                                     \
    L2P_LAUNCH(name, THREADS, 0, THREADS / (SHARERS), SHARERS)

SUM_KERNEL(conv_weights_sum, 8)
SUM_KERNEL(conv_weights_sum_few, 1)
