// The parts of a tensor-core convolution over NHWC images: loading a tile with its margin, products, and the tile's end.
//
// A block computes OUTPUTS channels of TILE_HEIGHT x 16 output pixels. It goes over the input channels CHUNK at a time: a
// chunk of the input tile with its margin lies in shared memory once, as one row of CHUNK channels per pixel, and every tap
// of the kernel reads it from there, shifted. The 16 pixels of a tile's row are the 16 rows of a product. Rows in shared
// memory are 16 bytes longer than their data: eight consecutive ones then start in different banks, so that ldmatrix has no
// conflicts, and a tap's shift is a constant.
#pragma once
#include "common/conv.cuh"
#include "common/mma.cuh"

constexpr int THREADS = 256;
constexpr int TILE_WIDTH = 16;
constexpr int ROW_PAD = 16;  // bytes

// What a convolution reads and writes. Channels of `x` come first, then those of `second`, whose grid may differ.
struct Operands {
    const bf16* x;         // [batch, height, width, channels]; half the height and width when upsampling
    const void* second;    // [batch, second_height, second_width, second_channels], bf16, or f32 for an image
    const bf16* weight;    // [outputs, taps, channels + second_channels]
    const bf16* bias;      // [outputs]
    const bf16* residual;  // added to the activated result: like the output, an even number of channels; or null
    void* output;          // [batch, height, width, outputs], bf16 or f32
    bf16* pooled;          // [batch, height / 2, width / 2, outputs] or null
    int height, width;     // of the output
    int channels, second_channels, second_height, second_width, outputs;
    unsigned flags;
    float scale;                     // of an f32 output
    float row_ratio, column_ratio;  // second's grid over x's
};

template <int KERNEL_, bool UPSAMPLE_, int TILE_HEIGHT_, int OUTPUTS_, int CHUNK_, int TAPS_, int BUFFERS_, int WARP_ROWS_, int BLOCKS_>
struct Plan {
    static constexpr int KERNEL = KERNEL_;         // 1 or 3
    static constexpr bool UPSAMPLE = UPSAMPLE_;    // the input is seen at twice its height and width
    static constexpr int TILE_HEIGHT = TILE_HEIGHT_;
    static constexpr int OUTPUTS = OUTPUTS_;
    static constexpr int CHUNK = CHUNK_;
    static constexpr int TAPS = TAPS_;             // whose weights are loaded in one step
    static constexpr int BUFFERS = BUFFERS_;       // 2: the next step is loaded during this one
    static constexpr int BLOCKS = BLOCKS_;         // per multiprocessor, by shared memory

    static constexpr int WARP_ROWS = WARP_ROWS_;
    static constexpr int WARP_COLUMNS = THREADS / WARP / WARP_ROWS;
    static constexpr int M_TILES = TILE_HEIGHT / WARP_ROWS;          // of 16 pixels, per warp
    static constexpr int N_TILES = OUTPUTS / 8 / WARP_COLUMNS;       // of 8 channels, per warp
    static constexpr int PIXELS = TILE_HEIGHT * TILE_WIDTH;

    static constexpr int MARGIN = KERNEL / 2;
    static constexpr int INPUT_HEIGHT = TILE_HEIGHT / (UPSAMPLE ? 2 : 1) + 2 * MARGIN;
    static constexpr int INPUT_WIDTH = TILE_WIDTH / (UPSAMPLE ? 2 : 1) + 2 * MARGIN;
    static constexpr int STEPS_PER_CHUNK = KERNEL * KERNEL / TAPS;
    // Unrolled, the taps of a kernel row overlap better; where three blocks share the registers they would not fit.
    static constexpr int UNROLLED_TAPS = OUTPUTS == 32 ? 1 : KERNEL;

    // Bytes.
    static constexpr int ROW = CHUNK * 2 + ROW_PAD;
    static constexpr int INPUT = INPUT_HEIGHT * INPUT_WIDTH * ROW;
    static constexpr int WEIGHTS = TAPS * OUTPUTS * ROW;
    static constexpr int STAGED_ROW = OUTPUTS * 2 + ROW_PAD;
    static constexpr int STAGED = PIXELS * STAGED_ROW;
    static constexpr int LOADED = BUFFERS * (INPUT + WEIGHTS);
    static constexpr int SHARED = LOADED > STAGED ? LOADED : STAGED;

    static_assert(KERNEL == 3 ? TAPS == 3 || TAPS == 9 : KERNEL == 1 && TAPS == 1 && !UPSAMPLE);
    static_assert(M_TILES % 2 == 0 && N_TILES % 2 == 0 && CHUNK % 16 == 0);
    static_assert(INPUT % 16 == 0 && WEIGHTS % 16 == 0);

    using Sums = float[M_TILES][N_TILES][4];
};

// Where a block works.
struct Tile {
    int item, y, x;       // batch item and first output pixel
    int first_output;     // channel
    int warp_row, warp_column, lane;
};

// Blocks run over output channels first, so that those that read the same pixels run together.
template <class P>
__device__ __forceinline__ Tile find_tile(const Operands& o) {
    unsigned block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));  // volatile: found anew for the tile's end rather than kept
    const auto next = [&block](int extent, int step) {
        const unsigned count = (extent + step - 1) / step;
        const int start = static_cast<int>(block % count) * step;
        block /= count;
        return start;
    };
    Tile tile;
    tile.first_output = next(o.outputs, P::OUTPUTS);
    tile.x = next(o.width, TILE_WIDTH);
    tile.y = next(o.height, P::TILE_HEIGHT);
    tile.item = static_cast<int>(block);
    tile.lane = threadIdx.x % WARP;
    tile.warp_row = threadIdx.x / WARP % P::WARP_ROWS;
    tile.warp_column = threadIdx.x / WARP / P::WARP_ROWS;
    return tile;
}

// The pixel of the second source that stands at (y, x) of the first one's grid.
__device__ __forceinline__ size_t second_pixel(const Operands& o, int item, int y, int x) {
    const int row = nearest(y, o.row_ratio, o.second_height), column = nearest(x, o.column_ratio, o.second_width);
    return (static_cast<size_t>(item) * o.second_height + row) * o.second_width + column;
}

// Starts loading channels [first_channel, first_channel + CHUNK) of the input tile; zeros outside the image and past `channels`.
template <class P>
__device__ __forceinline__ void load_input(const Operands& o, const Tile& tile, int channels, int first_channel, uint32_t to) {
    constexpr int PARTS = P::CHUNK / 8;
    constexpr int VECTORS = P::INPUT_HEIGHT * P::INPUT_WIDTH * PARTS;
    constexpr int SHRINK = P::UPSAMPLE ? 2 : 1;
    const int height = o.height / SHRINK, width = o.width / SHRINK;
    const int first_y = tile.y / SHRINK - P::MARGIN, first_x = tile.x / SHRINK - P::MARGIN;
#pragma unroll 1  // addresses are cheap to find anew, and too many to keep
    for (int vector = threadIdx.x; vector < VECTORS; vector += THREADS) {
        const int part = vector % PARTS, position = vector / PARTS;
        const int y = first_y + position / P::INPUT_WIDTH, x = first_x + position % P::INPUT_WIDTH;
        const int channel = first_channel + part * 8;
        const bool valid = static_cast<unsigned>(y) < static_cast<unsigned>(height) &&
                           static_cast<unsigned>(x) < static_cast<unsigned>(width) && channel < channels;
        const bf16* from = o.x;
        if (valid && channel < o.channels) {
            from += ((static_cast<size_t>(tile.item) * height + y) * width + x) * o.channels + channel;
        } else if (valid) {
            from = static_cast<const bf16*>(o.second) + second_pixel(o, tile.item, y, x) * o.second_channels + (channel - o.channels);
        }
        cp_async16(to + position * P::ROW + part * 16, from, valid);
    }
}

// Starts loading the weights of TAPS taps from `first_tap` on for the same channels; zeros past the last output and channel.
template <class P>
__device__ __forceinline__ void load_weights(const Operands& o, const Tile& tile, int first_tap, int first_channel, uint32_t to) {
    constexpr int PARTS = P::CHUNK / 8;
    constexpr int VECTORS = P::TAPS * P::OUTPUTS * PARTS;
    const int channels = o.channels + o.second_channels;
#pragma unroll 1  // addresses are cheap to find anew, and too many to keep
    for (int vector = threadIdx.x; vector < VECTORS; vector += THREADS) {
        const int part = vector % PARTS, row = vector / PARTS;
        const int output = tile.first_output + row % P::OUTPUTS, tap = first_tap + row / P::OUTPUTS;
        const int channel = first_channel + part * 8;
        const bool valid = output < o.outputs && channel < channels;
        const size_t at = (static_cast<size_t>(output) * (P::KERNEL * P::KERNEL) + tap) * channels + channel;
        cp_async16(to + row * P::ROW + part * 16, o.weight + (valid ? at : 0), valid);
    }
}

// Adds the products of one row of kernel taps with the input tile at `input`; the taps' weights lie at `weights`.
template <class P>
__device__ __forceinline__ void multiply_row(typename P::Sums& sums, const Tile& tile, int kernel_row, uint32_t input, uint32_t weights) {
    constexpr int INPUT_ROW = P::INPUT_WIDTH * P::ROW;
    constexpr int SHRINK = P::UPSAMPLE ? 2 : 1;
    const int pixel = tile.lane % 16;  // of the 16 in a product, whose row this lane addresses
    const int output = tile.warp_column * P::N_TILES * 8 + tile.lane % 8 + tile.lane / 16 * 8;
    const uint32_t input_lane = input + tile.warp_row * P::M_TILES / SHRINK * INPUT_ROW + tile.lane / 16 * 16;
    const uint32_t weights_lane = weights + output * P::ROW + tile.lane / 8 % 2 * 16;
    // With upsampling, output row r and kernel row dy meet input row (r + dy - 1) >> 1, which is row (r + dy + 1) >> 1 of the
    // tile with its margin; r counts from an even row. Columns alike.
    const uint32_t even_row = input_lane + (P::UPSAMPLE ? (kernel_row + 1) >> 1 : kernel_row) * INPUT_ROW;
    const uint32_t odd_row = input_lane + (P::UPSAMPLE ? (kernel_row + 2) >> 1 : kernel_row + 1) * INPUT_ROW;
#pragma unroll(P::UNROLLED_TAPS)
    for (int dx = 0; dx < P::KERNEL; ++dx) {
        const uint32_t column = (P::UPSAMPLE ? (pixel + dx + 1) >> 1 : pixel + dx) * P::ROW;
#pragma unroll
        for (int k = 0; k < P::CHUNK; k += 16) {
            uint32_t b[P::N_TILES / 2][4];
#pragma unroll
            for (int n = 0; n < P::N_TILES / 2; ++n) {
                ldmatrix(b[n], weights_lane + (dx * P::OUTPUTS + n * 16) * P::ROW + k * 2);
            }
#pragma unroll
            for (int m = 0; m < P::M_TILES; ++m) {
                uint32_t a[4];
                ldmatrix(a, (m % 2 == 0 ? even_row : odd_row) + m / 2 * 2 / SHRINK * INPUT_ROW + column + k * 2);
#pragma unroll
                for (int n = 0; n < P::N_TILES; ++n) {
                    mma(sums[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
                }
            }
        }
    }
}

// Adds the products of one step's taps, whose first one is in kernel row `kernel_row`.
template <class P>
__device__ __forceinline__ void multiply_step(typename P::Sums& sums, const Tile& tile, int kernel_row, uint32_t input, uint32_t weights) {
#pragma unroll 1  // unrolled further, the addresses would not fit the registers
    for (int row = 0; row < P::TAPS / P::KERNEL; ++row) {
        multiply_row<P>(sums, tile, kernel_row + row, input, weights + row * P::KERNEL * P::OUTPUTS * P::ROW);
    }
}

// The tile's results go from the lanes' registers to shared memory, rounded, or straight to an f32 output.
template <class P>
__device__ __forceinline__ void stage_results(const Operands& o, const Tile& tile, const typename P::Sums& sums, unsigned char* staged) {
    const int column = tile.warp_column * P::N_TILES * 8 + tile.lane % 4 * 2, first_output = tile.first_output + column;
    __nv_bfloat162 bias[P::N_TILES];
#pragma unroll
    for (int n = 0; n < P::N_TILES; ++n) {
        const int output = first_output + n * 8;
        bias[n].x = output < o.outputs ? o.bias[output] : bf16();
        bias[n].y = output + 1 < o.outputs ? o.bias[output + 1] : bf16();
    }
#pragma unroll
    for (int part = 0; part < P::M_TILES * 2; ++part) {
        const int tile_y = tile.warp_row * P::M_TILES + part / 2, tile_x = tile.lane / 4 + part % 2 * 8;
        const int y = tile.y + tile_y, x = tile.x + tile_x;
        const size_t at = ((static_cast<size_t>(tile.item) * o.height + y) * o.width + x) * o.outputs + first_output;
        const bool inside = y < o.height && x < o.width;
        unsigned char* const row = staged + (tile_y * TILE_WIDTH + tile_x) * P::STAGED_ROW + column * 2;
#pragma unroll
        for (int n = 0; n < P::N_TILES; ++n) {
            float2 value = __bfloat1622float2(bias[n]);
            value.x += sums[part / 2][n][part % 2 * 2], value.y += sums[part / 2][n][part % 2 * 2 + 1];
            if (o.flags & SILU) value = make_float2(silu(value.x), silu(value.y));
            const int output = first_output + n * 8;
            if (o.residual != nullptr && inside && output < o.outputs) {
                const float2 added = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(o.residual + at + n * 8));
                value.x += added.x, value.y += added.y;
            }
            if (!(o.flags & F32_OUTPUT)) {
                *reinterpret_cast<__nv_bfloat162*>(row + n * 16) = __floats2bfloat162_rn(value.x, value.y);
            } else if (inside) {
                float* const to = static_cast<float*>(o.output) + at + n * 8;
                if (output < o.outputs) to[0] = value.x * o.scale;
                if (output + 1 < o.outputs) to[1] = value.y * o.scale;
            }
        }
    }
}

// Calls store(offset in the plane, pointer to the staged channels) for each vector of `step` channels of each pixel of a grid
// that has one pixel per SHRINK x SHRINK pixels of the tile.
template <class P, int SHRINK, int STEP, class Store>
__device__ __forceinline__ void for_each_vector(const Operands& o, const Tile& tile, const unsigned char* staged, const Store& store) {
    constexpr int WIDTH = TILE_WIDTH / SHRINK, PARTS = P::OUTPUTS / STEP;
    constexpr int VECTORS = P::PIXELS / (SHRINK * SHRINK) * PARTS;
    const int height = o.height / SHRINK, width = o.width / SHRINK;
    for (int vector = threadIdx.x; vector < VECTORS; vector += THREADS) {
        const int part = vector % PARTS, tile_x = vector / PARTS % WIDTH, tile_y = vector / PARTS / WIDTH;
        const int y = tile.y / SHRINK + tile_y, x = tile.x / SHRINK + tile_x, output = tile.first_output + part * STEP;
        if (y >= height || x >= width || output >= o.outputs) continue;
        store(((static_cast<size_t>(tile.item) * height + y) * width + x) * o.outputs + output,
              staged + (tile_y * TILE_WIDTH + tile_x) * SHRINK * P::STAGED_ROW + part * STEP * 2);
    }
}

// Like fmaxf on each half, but NaN wins, as in PyTorch's pooling.
__device__ __forceinline__ __nv_bfloat162 maximum(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2_nan(a, b); }

// Writes the staged tile, and its 2x2 maxima where they are asked for.
template <class P>
__device__ __forceinline__ void store_results(const Operands& o, const Tile& tile, const unsigned char* staged) {
    bf16* const output = static_cast<bf16*>(o.output);
    constexpr int RIGHT = P::STAGED_ROW, BELOW = TILE_WIDTH * P::STAGED_ROW;
    if (o.outputs % 8 == 0) {
        for_each_vector<P, 1, 8>(o, tile, staged, [&](size_t at, const unsigned char* from) {
            *reinterpret_cast<uint4*>(output + at) = *reinterpret_cast<const uint4*>(from);
        });
        if (o.pooled == nullptr) return;
        for_each_vector<P, 2, 8>(o, tile, staged, [&](size_t at, const unsigned char* from) {
            Bf16x8 best = *reinterpret_cast<const Bf16x8*>(from);
#pragma unroll
            for (const int neighbour : {RIGHT, BELOW, BELOW + RIGHT}) {
                const Bf16x8 other = *reinterpret_cast<const Bf16x8*>(from + neighbour);
#pragma unroll
                for (int i = 0; i < 4; ++i) best.pair[i] = maximum(best.pair[i], other.pair[i]);
            }
            *reinterpret_cast<Bf16x8*>(o.pooled + at) = best;
        });
        return;
    }
    for_each_vector<P, 1, 1>(o, tile, staged, [&](size_t at, const unsigned char* from) {
        output[at] = *reinterpret_cast<const bf16*>(from);
    });
    if (o.pooled == nullptr) return;
    for_each_vector<P, 2, 1>(o, tile, staged, [&](size_t at, const unsigned char* from) {
        bf16 best = *reinterpret_cast<const bf16*>(from);
        for (const int neighbour : {RIGHT, BELOW, BELOW + RIGHT}) {
            best = __hmax_nan(best, *reinterpret_cast<const bf16*>(from + neighbour));
        }
        o.pooled[at] = best;
    });
}

// The tile's end. All operands in shared memory have been read and a barrier passed since.
template <class P>
__device__ __forceinline__ void finish(const Operands& o, const typename P::Sums& sums, unsigned char* shared) {
    const Tile tile = find_tile<P>(o);
    stage_results<P>(o, tile, sums, shared);
    if (o.flags & F32_OUTPUT) return;
    __syncthreads();  // the whole tile is staged before it is written out
    store_results<P>(o, tile, shared);
}
