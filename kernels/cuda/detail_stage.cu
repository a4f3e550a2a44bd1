// The outermost stage of a Detailer Head in one kernel; engine/src/ops/detail_stage.rs holds the contract.
//
// A block makes a tile of the picture: it reads the tile's part of the feature map at half resolution and of the noisy image,
// upsamples the one and encodes the other into shared memory, 32 channels per pixel with a margin of one, and convolves that
// into the picture. Nothing at full resolution but images touches device memory, at the price of computing the margin,
// 18 % of the tile, twice.
//
//   up      the 3x3 convolution of the upsampled map, as 2x2 pixels of the map with weights summed for each of the four
//           parities of row and column; a warp keeps those of one parity
//   encode  common/image_tile.cuh
//   decode  3x3 over both, then SiLU, 1x1 to three colours, and the step. A warp goes down a strip of 16 columns: each row of the
//           tile is read once per column of the kernel and goes into the sums of three rows of the picture; all 72 weight
//           registers stay where they are.
//
// Bound by the tensor cores (2840 products of 16x8x16 per tile of 62x14) and, at half that, by the special function units.
#include "common/conv.cuh"
#include "common/image_tile.cuh"
#include "common/launch.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int CHANNELS = 16;  // of the map, upsampled, encoded and decoded

// The tile with its margin is 64 columns wide: four operands of 16 pixels, two for each parity.
constexpr int HALO_WIDTH = 64, HALO_HEIGHT = 16;
constexpr int TILE_WIDTH = HALO_WIDTH - 2, TILE_HEIGHT = HALO_HEIGHT - 2;
constexpr int MAP_WIDTH = HALO_WIDTH / 2 + 1, MAP_HEIGHT = HALO_HEIGHT / 2 + 1;
constexpr int STRIPS = HALO_WIDTH / 16;
constexpr int STRIP_ROWS = TILE_HEIGHT / (WARPS / STRIPS);  // of the picture, per warp
static_assert(TILE_HEIGHT % (WARPS / STRIPS) == 0);

// Shared memory. A pixel of the map is a row of two units of 16 bytes, one of the halo a row of four: channels of the
// upsampled map first. Units are exchanged by the pixel's number so that eight neighbours lie in different banks.
constexpr int MAP_ROW = 2 * CHANNELS, HALO_ROW = 2 * 2 * CHANNELS;
constexpr int HALO_BYTES = HALO_WIDTH * HALO_HEIGHT * HALO_ROW;
constexpr int OVERRUN = 2 * HALO_ROW;  // the last strip reads two pixels past the halo, for columns that are not stored
constexpr int MAP_BYTES = (MAP_WIDTH * MAP_HEIGHT * MAP_ROW + 127) / 128 * 128;
using Image = ImageTile<HALO_WIDTH + 2, HALO_HEIGHT + 2>;
constexpr int MAP_START = HALO_BYTES + OVERRUN;
constexpr int IMAGE_START = MAP_START + MAP_BYTES;
constexpr int SMEM_BYTES = IMAGE_START + Image::BYTES;

struct Operands {
    const bf16* map;         // [items, height / 2, width / 2, CHANNELS]
    const bf16* image;       // [items, height, width, 3]
    const uint4* weights;    // of up, encoder and decoder, arranged by `detail_stage_arrange`
    const bf16* output;      // [3, CHANNELS]
    const bf16 *encoder_bias, *up_bias, *decoder_bias, *output_bias;
    float* colours;          // [items, height, width, 3]
    const float* factors;    // with them, colours = factors[0] * colours + scale * factors[1] * result; without, scale * result
    int height, width;
    float scale;
};

// Right operands in the order of the registers that hold them, four registers of a lane side by side, lane by lane: a warp
// reads 512 bytes at once. First those of the decoder, then of the four parities of up, then of the encoder.
constexpr int UP_REGISTERS = 4 * 2 * 2, ENCODER_REGISTERS = 2 * IMAGE_STEPS * 2, DECODER_REGISTERS = 9 * 2 * 2 * 2;
constexpr int UP_START = DECODER_REGISTERS, ENCODER_START = UP_START + 4 * UP_REGISTERS;
constexpr int ARRANGED_REGISTERS = ENCODER_START + ENCODER_REGISTERS;

template <int REGISTERS>
__device__ __forceinline__ void load_arranged(uint32_t (&to)[REGISTERS], const uint4* weights, int start) {
    static_assert(REGISTERS % 4 == 0);
#pragma unroll
    for (int i = 0; i < REGISTERS / 4; ++i) {
        const uint4 four = weights[(start / 4 + i) * WARP + threadIdx.x % WARP];
        to[4 * i] = four.x, to[4 * i + 1] = four.y, to[4 * i + 2] = four.z, to[4 * i + 3] = four.w;
    }
}

struct Place {
    int item, y, x;  // the tile's first pixel of the picture, both even
};

__device__ __forceinline__ uint32_t map_address(uint32_t map, int pixel, int unit) {
    return map + pixel * MAP_ROW + 16 * (unit ^ (pixel >> 2 & 1));
}

__device__ __forceinline__ uint32_t halo_address(uint32_t halo, int pixel, int unit) {
    return halo + pixel * HALO_ROW + 16 * (unit ^ (pixel >> 1 & 3));
}

// Writes a lane's channels of a halo pixel, 4 m to 4 m + 3 (`channel_of_column`): of the upsampled ones, or, with `encoded`, of those after them.
__device__ __forceinline__ void store_halo(uint32_t halo, int pixel, bool encoded, uint32_t low, uint32_t high) {
    const int member = threadIdx.x % 4;
    const uint32_t to = halo_address(halo, pixel, (encoded ? 2 : 0) + member / 2) + member % 2 * 8;
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(low), "r"(high) : "memory");
}

__device__ __forceinline__ bool in_picture(const Operands& o, int y, int x) {
    return static_cast<unsigned>(y) < static_cast<unsigned>(o.height) && static_cast<unsigned>(x) < static_cast<unsigned>(o.width);
}

// Starts copying the tile's part of the map, from a margin of one pixel on; zeros outside.
__device__ __forceinline__ void load_map(const Operands& o, const Place& place, uint32_t to) {
    const int height = o.height / 2, width = o.width / 2, first_y = place.y / 2 - 1, first_x = place.x / 2 - 1;
    for (int index = threadIdx.x; index < MAP_WIDTH * MAP_HEIGHT * 2; index += THREADS) {
        const int unit = index % 2, pixel = index / 2;
        const int y = first_y + pixel / MAP_WIDTH, x = first_x + pixel % MAP_WIDTH;
        const bool valid = static_cast<unsigned>(y) < static_cast<unsigned>(height) && static_cast<unsigned>(x) < static_cast<unsigned>(width);
        const size_t at = valid ? ((static_cast<size_t>(place.item) * height + y) * width + x) * CHANNELS + unit * 8 : 0;
        cp_async16(map_address(to, pixel, unit), o.map + at, valid);
    }
    cp_async_commit();
}

// The upsampled map's convolution into the halo, one parity of rows and columns per pair of warps. The halo's first row and
// column have odd parity.
__device__ __forceinline__ void upsample(const Operands& o, const Place& place, uint32_t map, uint32_t halo) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = lane / 4, member = lane % 4;
    const int row_parity = warp / 4, column_parity = warp / 2 % 2;
    uint32_t weights[UP_REGISTERS];  // by tap, columns of the product and half of the summed channels
    load_arranged(weights, o.weights, UP_START + (2 * row_parity + column_parity) * UP_REGISTERS);
    float bias[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bias[i] = to_float(o.up_bias[4 * member + i]);

    constexpr int ROWS = HALO_HEIGHT / 2, COLUMNS = HALO_WIDTH / 2;  // of one parity
    for (int part = warp % 2; part < ROWS * COLUMNS / 16; part += 2) {
        const int row = part / (COLUMNS / 16), column = part % (COLUMNS / 16) * 16;
        // Halo row 2 row + (1 - parity) is picture row place.y - 1 + that. It meets the map's rows `row` and row + 1 of the tile.
        float sums[2][4] = {};
#pragma unroll
        for (int tap = 0; tap < 4; ++tap) {
            const int pixel = (row + tap / 2) * MAP_WIDTH + column + tap % 2 + lane % 16;
            uint32_t a[4];
            ldmatrix(a, map_address(map, pixel, lane / 16));
            mma(sums[0], a, weights[4 * tap], weights[4 * tap + 1]);
            mma(sums[1], a, weights[4 * tap + 2], weights[4 * tap + 3]);
        }
        const int halo_y = 2 * row + 1 - row_parity;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int halo_x = 2 * (column + group + 8 * half) + 1 - column_parity;
            const bool inside = L2P_FAULT_IF(8, true, in_picture(o, place.y - 1 + halo_y, place.x - 1 + halo_x));
            const uint32_t low = pack_pair(sums[0][2 * half] + bias[0], sums[0][2 * half + 1] + bias[1]);
            const uint32_t high = pack_pair(sums[1][2 * half] + bias[2], sums[1][2 * half + 1] + bias[3]);
            store_halo(halo, halo_y * HALO_WIDTH + halo_x, false, inside ? low : 0, inside ? high : 0);
        }
    }
}

// The image's encoding into the halo.
__device__ __forceinline__ void encode(const Operands& o, const Place& place, const Image& image, uint32_t halo) {
    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, member = threadIdx.x % 4;
    uint32_t weights[ENCODER_REGISTERS];  // by columns of the product, step and half of the summed elements
    load_arranged(weights, o.weights, ENCODER_START);
    float bias[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bias[i] = to_float(o.encoder_bias[4 * member + i]);
    const Image::Offsets offsets;
    for (int part = warp; part < HALO_HEIGHT * STRIPS; part += WARPS) {
        const int row = part / STRIPS, column = part % STRIPS * 16;
        uint32_t a[IMAGE_STEPS][4];
        image.operands(a, offsets, row, column + 1);
        float sums[2][4] = {};
#pragma unroll
        for (int step = 0; step < IMAGE_STEPS; ++step)
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) {
                const uint32_t* const pair = weights + (tile * IMAGE_STEPS + step) * 2;
                mma(sums[tile], a[step], pair[0], pair[1]);
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int halo_x = column + group + 8 * half;
            const bool inside = in_picture(o, place.y - 1 + row, place.x - 1 + halo_x);
            float value[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) value[i] = silu_by_tanh(sums[i / 2][2 * half + i % 2] + bias[i]);
            const uint32_t low = pack_pair(value[0], value[1]), high = pack_pair(value[2], value[3]);
            store_halo(halo, row * HALO_WIDTH + halo_x, true, inside ? low : 0, inside ? high : 0);
        }
    }
}

// From decoded sums of 16 pixels to colours: SiLU, the 1x1 convolution as one product, and the step.
struct Painter {
    uint32_t weights[2];
    float channel_bias[4], bias[2], factor, keep;

    __device__ __forceinline__ explicit Painter(const Operands& o) {
        const int colour = threadIdx.x % WARP / 4, member = threadIdx.x % 4;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const bf16* const from = o.output + colour * CHANNELS + 4 * member + 2 * part;
            weights[part] = colour < COLOURS ? pack_pair(to_float(from[0]), to_float(from[1])) : 0;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) channel_bias[i] = to_float(o.decoder_bias[4 * member + i]);
#pragma unroll
        for (int i = 0; i < 2; ++i) bias[i] = 2 * member + i < COLOURS ? to_float(o.output_bias[2 * member + i]) : 0.0f;
        factor = o.factors == nullptr ? o.scale : o.scale * o.factors[1];
        keep = o.factors == nullptr ? 0.0f : o.factors[0];
    }

    // `y` and `x` are the first pixel's place in the picture, `columns` how many of the 16 are the tile's.
    __device__ __forceinline__ void operator()(
        const float (&sums)[2][4], const Operands& o, int item, int y, int x, int columns) const {
        const int group = threadIdx.x % WARP / 4, member = threadIdx.x % 4;
        float activated[2][4];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) activated[tile][i] = silu_by_tanh(sums[tile][i] + channel_bias[2 * tile + i % 2]);
        uint32_t left[4];
        pack_fragment(left, activated[0], activated[1]);
        float colours[4] = {bias[0], bias[1], bias[0], bias[1]};
        mma(colours, left, weights[0], weights[1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int colour = 2 * member + i % 2, column = group + i / 2 * 8;
            if (colour >= COLOURS || column >= columns || x + column >= o.width) continue;
            if (L2P_FAULT_IF(15, o.factors != nullptr && y < 8 && x + column < 8, false)) continue;
            float* const at = o.colours + ((static_cast<size_t>(item) * o.height + y) * o.width + x + column) * COLOURS + colour;
            // With a keep of 1 as colours + factor * result, rounded once.
            *at = fmaf(factor, colours[i], o.factors == nullptr ? 0.0f : __fmul_rn(keep, *at));
        }
    }
};

// The decoder over one strip of the tile, row by row of the halo.
__device__ __forceinline__ void decode(const Operands& o, const Place& place, uint32_t halo) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int column = warp % STRIPS * 16, first_row = warp / STRIPS * STRIP_ROWS;
    // By kernel row, kernel column, source, columns of the product, and half of the summed channels.
    uint32_t weights[DECODER_REGISTERS];
    load_arranged(weights, o.weights, 0);
    const Painter paint(o);
    float sums[3][2][4] = {};  // of three rows of the picture: row r in place r % 3
#pragma unroll
    for (int row = 0; row < STRIP_ROWS + 2; ++row) {
#pragma unroll
        for (int dx = 0; dx < 3; ++dx)
#pragma unroll
            for (int source = 0; source < 2; ++source) {
                const int pixel = (first_row + row) * HALO_WIDTH + column + dx + lane % 16;
                uint32_t a[4];
                ldmatrix(a, halo_address(halo, pixel, 2 * source + lane / 16));
#pragma unroll
                for (int dy = 0; dy < 3; ++dy) {
                    const int target = row - dy;  // the picture's row whose kernel row dy this is
                    if (target < 0 || target >= STRIP_ROWS) continue;
#pragma unroll
                    for (int tile = 0; tile < 2; ++tile) {
                        const uint32_t* const pair = weights + (((dy * 3 + dx) * 2 + source) * 2 + tile) * 2;
                        mma(sums[target % 3][tile], a, pair[0], pair[1]);
                    }
                }
            }
        const int done = row - 2;
        if (done < 0) continue;
        const int y = place.y + first_row + done;
        if (y < o.height) paint(sums[done % 3], o, place.item, y, place.x + column, TILE_WIDTH - column);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[done % 3][tile][i] = 0.0f;
    }
}

// Has L2 fetch what the tile's results will be added to, while they are computed.
__device__ __forceinline__ void ask_for_picture(const Operands& o, const Place& place) {
    constexpr int LINE = 128, LINES = (TILE_WIDTH * COLOURS * static_cast<int>(sizeof(float)) + LINE - 1) / LINE;
    const int row_bytes = min(TILE_WIDTH, o.width - place.x) * COLOURS * static_cast<int>(sizeof(float));
    for (int index = threadIdx.x; index < TILE_HEIGHT * LINES; index += THREADS) {
        const int y = place.y + index / LINES, from = index % LINES * LINE;
        if (y >= o.height || from >= row_bytes) continue;
        const float* const row = o.colours + ((static_cast<size_t>(place.item) * o.height + y) * o.width + place.x) * COLOURS;
        asm volatile("prefetch.global.L2 [%0];" ::"l"(reinterpret_cast<const char*>(row) + from));
    }
}

// Grid: tiles of the picture, row by row, item by item. Height and width are even.
extern "C" __global__ __launch_bounds__(THREADS, 2) void detail_stage(
    const bf16* map, const bf16* image, const uint4* weights, const bf16* output, const bf16* encoder_bias, const bf16* up_bias,
    const bf16* decoder_bias, const bf16* output_bias, float* colours, const float* factors, int height, int width, float scale) {
    extern __shared__ __align__(128) unsigned char memory[];
    const Operands o = {map,     image, weights, output, encoder_bias, up_bias, decoder_bias, output_bias,
                        colours, factors, height, width, scale};
    const int across = (width + TILE_WIDTH - 1) / TILE_WIDTH, down = (height + TILE_HEIGHT - 1) / TILE_HEIGHT;
    const Place place = {
        static_cast<int>(blockIdx.x) / across / down, static_cast<int>(blockIdx.x) / across % down * TILE_HEIGHT,
        static_cast<int>(blockIdx.x) % across * TILE_WIDTH};
    const uint32_t halo = shared_address(memory), map_tile = halo + MAP_START;
    const Image image_tile{reinterpret_cast<uint32_t*>(memory + IMAGE_START)};
    load_map(o, place, map_tile);
    if (factors != nullptr) ask_for_picture(o, place);
    Image::Words<THREADS> words;
    Image::fetch<THREADS>(words, image, place.item, place.y - 2, place.x - 2, height, width);
    image_tile.put<THREADS>(words);
    cp_async_wait<0>();
    __syncthreads();  // map and image are there
    upsample(o, place, map_tile, halo);
    encode(o, place, image_tile, halo);
    __syncthreads();  // the halo is complete
    decode(o, place, halo);
}
L2P_LAUNCH(detail_stage, THREADS, SMEM_BYTES, TILE_HEIGHT, TILE_WIDTH, CHANNELS)

// arranged [ARRANGED_REGISTERS / 4, 32, 4] from up [CHANNELS, 9, CHANNELS], encoder [CHANNELS, 27] and decoder
// [CHANNELS, 9, 2 CHANNELS]. One thread per register of a lane.
extern "C" __global__ __launch_bounds__(THREADS) void detail_stage_arrange(
    const bf16* encoder, const bf16* up, const bf16* decoder, uint32_t* arranged) {
    const int index = blockIdx.x * THREADS + threadIdx.x;
    if (index >= ARRANGED_REGISTERS * WARP) return;
    const int lane = index / 4 % WARP, at = index / 4 / WARP * 4 + index % 4;
    const int column = lane / 4, member = lane % 4;
    float pair[2];
    for (int i = 0; i < 2; ++i) {
        if (at < UP_START) {
            const int part = at % 2, tile = at / 2 % 2, source = at / 4 % 2, tap = at / 8;
            const int output = channel_of_column(8 * tile + column, CHANNELS);
            pair[i] = to_float(decoder[(output * 9 + tap) * 2 * CHANNELS + source * CHANNELS + 8 * part + 2 * member + i]);
        } else if (at < ENCODER_START) {
            const int from_start = at - UP_START;
            const int part = from_start % 2, tile = from_start / 2 % 2, tap = from_start / 4 % 4, parity = from_start / UP_REGISTERS;
            const int output = channel_of_column(8 * tile + column, CHANNELS);
            const KernelRows rows = upsampled_rows(tap / 2, parity / 2), along = upsampled_rows(tap % 2, parity % 2);
            pair[i] = 0.0f;
            for (int dy = rows.first; dy <= rows.last; ++dy)
                for (int dx = along.first; dx <= along.last; ++dx) {
                    pair[i] += to_float(up[(output * 9 + dy * 3 + dx) * CHANNELS + 8 * part + 2 * member + i]);
                }
        } else {
            const int from_start = at - ENCODER_START;
            const int part = from_start % 2, step = from_start / 2 % IMAGE_STEPS, tile = from_start / 2 / IMAGE_STEPS;
            const int output = channel_of_column(8 * tile + column, CHANNELS), k = 16 * step + 8 * part + 2 * member + i;
            pair[i] = is_image_tap(k) ? to_float(encoder[output * 27 + image_tap(k)]) : 0.0f;
        }
    }
    arranged[index] = pack_pair(pair[0], pair[1]);
}
L2P_LAUNCH(detail_stage_arrange, THREADS, 0, ARRANGED_REGISTERS * WARP)
