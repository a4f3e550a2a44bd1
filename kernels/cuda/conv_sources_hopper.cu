// The gradients of a convolution's sources by Hopper's warpgroup products; engine/src/ops/conv/backward holds the contract and
// common/conv_hopper.cuh the machinery.
//
// The gradient of the sources is a convolution of the sum's gradient, with mirrored taps and inputs and outputs exchanged; that
// of an upsampled source is one that gathers (GATHERED). Both sources of a convolution are one convolution's outputs, which go
// to two images when they are stored. Bounds as in conv_hopper.cu.
#include "common/launch.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "common/conv_hopper.cuh"

struct Operands : Problem {
    bf16* first;   // [items, height, width, first_outputs]
    bf16* second;  // the rest of the outputs, or null if there is none
    int first_outputs;
};

// Ends a tile whose sums are the gradients of up to two images.
template <class P>
struct ToSources {
    using Lane = Channels<P::BLOCK_N>;

    __device__ __forceinline__ explicit ToSources(const Operands&) {}

    __device__ __forceinline__ void operator()(const typename P::Sums& sums, const Operands& o, const Tile& tile) const {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % WARPGROUP_WARPS;
#pragma unroll
        for (int group = 0; group < Lane::GROUPS; ++group) {
            int channel = tile.output_block * P::BLOCK_N + group * Lane::GROUP + lane % 4 * Lane::OF_LANE;
            if (channel >= o.outputs) continue;
            const bool in_first = channel < o.first_outputs;
            bf16* const image = in_first ? o.first : o.second;
            const int channels = in_first ? o.first_outputs : o.outputs - o.first_outputs;
            if (!in_first) channel -= o.first_outputs;
#pragma unroll
            for (int block = 0; block < P::BLOCKS; ++block)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int y = tile.y + block / 2 * SIDE + 2 * warp + half, x = tile.x + block % 2 * SIDE + lane / 4;
                    if (y >= o.height || x >= o.width) continue;
                    Bf16Run<Lane::OF_LANE> packed;
#pragma unroll
                    for (int i = 0; i < Lane::OF_LANE; i += 2) {
                        const float(&pair)[4] = sums[block][group * (Lane::GROUP / 8) + i / 2];
                        packed.pair[i / 2] = __floats2bfloat162_rn(pair[2 * half], pair[2 * half + 1]);
                    }
                    const size_t pixel = (static_cast<size_t>(tile.item) * o.height + y) * o.width + x;
                    *reinterpret_cast<Bf16Run<Lane::OF_LANE>*>(image + pixel * channels + channel) = packed;
                }
        }
    }
};

// map: of the sum's gradient [items, height, width, channels] by boxes of BLOCK_K channels and BOX_WIDTH x BOX_HEIGHT pixels; for
// GATHERED of [items, height, 2, width, 2 channels], the rows and columns of the image by their parities. The launch's tile as
// in conv_hopper.cu.
#define SOURCES_KERNEL(name, ...)                                                                                          \
    using Plan_##name = Plan<__VA_ARGS__>;                                                                                 \
    extern "C" __global__ __launch_bounds__(THREADS, 1) void name(                                                         \
        const __grid_constant__ TensorMap map, const bf16* weights, bf16* first, bf16* second, int items, int height,      \
        int width, int outputs, int first_outputs, int chunks) {                                                           \
        const Operands operands = {{weights, items, height, width, outputs, chunks, chunks}, first, second, first_outputs}; \
        convolve<Plan_##name, ToSources<Plan_##name>>(map, map, operands);                                                 \
    }                                                                                                                      \
    L2P_LAUNCH(name, THREADS, Plan_##name::BYTES, Plan_##name::BLOCK_N, Plan_##name::BLOCK_K, Plan_##name::TILE_HEIGHT,      \
               Plan_##name::RESIDENT ? Plan_##name::WEIGHT_STAGES : 0)

// <kernel>_<outputs>x<channels of a chunk>; _resident: all weights in shared memory.
SOURCES_KERNEL(mirrored3x3_128x64, 128, 2, 64, 3, SAME, false, 3, 9)
SOURCES_KERNEL(mirrored3x3_128x32, 128, 2, 32, 3, SAME, false, 4, 12)
SOURCES_KERNEL(mirrored3x3_128x16, 128, 2, 16, 3, SAME, false, 4, 18)
SOURCES_KERNEL(mirrored3x3_64x64, 64, 4, 64, 3, SAME, false, 3, 12)
SOURCES_KERNEL(mirrored3x3_64x32_resident, 64, 4, 32, 3, SAME, true, 4, 27)
SOURCES_KERNEL(mirrored3x3_64x16_resident, 64, 4, 16, 3, SAME, true, 6, 27)
SOURCES_KERNEL(mirrored3x3_32x64_resident, 32, 4, 64, 3, SAME, true, 3, 18)
SOURCES_KERNEL(mirrored3x3_32x32_resident, 32, 4, 32, 3, SAME, true, 4, 36)
SOURCES_KERNEL(mirrored3x3_32x16_resident, 32, 4, 16, 3, SAME, true, 6, 36)
SOURCES_KERNEL(mirrored3x3_16x64_resident, 16, 4, 64, 3, SAME, true, 3, 36)
SOURCES_KERNEL(mirrored3x3_16x32_resident, 16, 4, 32, 3, SAME, true, 4, 36)
SOURCES_KERNEL(mirrored3x3_16x16_resident, 16, 4, 16, 3, SAME, true, 6, 36)
SOURCES_KERNEL(gathered_128x64, 128, 2, 64, 3, GATHERED, false, 3, 9)
SOURCES_KERNEL(gathered_64x64_resident, 64, 4, 64, 3, GATHERED, true, 2, 16)
SOURCES_KERNEL(gathered_32x32_resident, 32, 4, 32, 3, GATHERED, true, 4, 32)
SOURCES_KERNEL(gathered_16x16_resident, 16, 4, 16, 3, GATHERED, true, 6, 32)
SOURCES_KERNEL(mirrored1x1_128x64, 128, 2, 64, 1, SAME, false, 6, 6)

// Arranges weights [outputs, taps, inputs] for the gradients of the inputs from `first` on, `count` of them: pieces of
// `columns` inputs x `chunk` outputs, by block of inputs, chunk and tap; with `gather` chunks count all outputs of one parity
// after the other. One thread per 16 bytes of the result: neighbours take neighbouring inputs, which lie side by side.
extern "C" __global__ __launch_bounds__(256) void conv_arrange_sources(
    const bf16* weight, bf16* arranged, size_t units, int outputs, int inputs, int first, int count, int columns, int chunk,
    int taps_along, int gather) {
    const size_t thread = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (thread >= units) return;
    const int met = gather ? 2 : taps_along;  // taps that a pixel of the result meets, along each axis, of one parity
    size_t rest = thread;
    const auto next = [&rest](int extent) {
        const int here = static_cast<int>(rest % extent);
        rest /= extent;
        return here;
    };
    const int row_units = chunk / UNIT;
    const int within_block = next(columns), unit = next(row_units), tap = next(met * met);
    const int chunk_index = next(outputs / chunk), parity = next(gather ? PARITIES : 1), block = static_cast<int>(rest);
    // Neighbours are one channel apart. Column 8 t + 2 m + j of a group is channel m * (group / 4) + 2 t + j.
    const int group = columns < 32 ? columns : 32, channel = within_block % group;
    const int in_quarter = channel % (group / 4), quarter = channel / (group / 4);
    const int column = within_block / group * group + in_quarter / 2 * 8 + quarter * 2 + in_quarter % 2;
    const int input = block * columns + within_block;
    Bf16x8 packed = {};
    if (input < count) {
        const bf16* const from = weight + static_cast<size_t>(chunk_index * chunk + unit * UNIT) * taps_along * taps_along * inputs + first + input;
        float sums[UNIT] = {};
        // Kernel rows and columns that lead here: the mirrored tap, or those whose weights were summed for the pixel.
        KernelRows rows = {met - 1 - tap / met, met - 1 - tap / met}, along = {met - 1 - tap % met, met - 1 - tap % met};
        if (gather) {
            rows = upsampled_rows(rows.first, parity / 2);
            along = upsampled_rows(along.first, parity % 2);
        }
        for (int row = rows.first; row <= rows.last; ++row)
            for (int at = along.first; at <= along.last; ++at)
#pragma unroll
                for (int i = 0; i < UNIT; ++i) {
                    sums[i] += to_float(from[(static_cast<size_t>(i) * taps_along * taps_along + row * taps_along + at) * inputs]);
                }
        store8(reinterpret_cast<bf16*>(&packed), sums);
    }
    // Units of 16 bytes are exchanged by the address's bits 7 to 9.
    const int place = column * row_units + unit, exchanged = place ^ (place >> 3 & (row_units - 1));
    const size_t piece = ((static_cast<size_t>(block) * (gather ? PARITIES : 1) + parity) * (outputs / chunk) + chunk_index) * met * met + tap;
    reinterpret_cast<Bf16x8*>(arranged)[piece * columns * row_units + exchanged] = packed;
}
L2P_LAUNCH(conv_arrange_sources, 256, 0, 256)
#endif
