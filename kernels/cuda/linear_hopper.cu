// Linear layers by Hopper's warpgroup products, with what follows them done in registers; engine/src/ops/linear_swiglu.rs
// and patch_embed.rs hold the contracts.
//
// The loop over tiles is common/linear_hopper.cuh's.
//
// A lane's pairs of columns are exchanged within groups of four lanes before they are stored, 16 bytes a lane.
//
// What follows the product:
//   SwiGLU        a tile's columns are 128 of gate and the same of up: silu(gate) * up, half as many columns stored
//   Bias          added; the rows are patches of an image, gathered by the bulk copies themselves
//
// Bound by the tensor cores; 32 bytes per clock come out of L2.
#include "common/launch.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "common/linear_hopper.cuh"

using Tiles = Tiling<bf16, 256, 4>;
using Sums = Tiles::Sums;
constexpr int BLOCK_N = Tiles::BLOCK_N, BLOCK_K = Tiles::BLOCK_K, COLUMN_BOXES = Tiles::COLUMN_BOXES;

// The summed elements of a problem.
__device__ __forceinline__ int summed(int depth) { return L2P_FAULT_IF(9, max(depth - BLOCK_K, BLOCK_K), depth); }

// ---- what follows the product, and where its columns come from ----

struct SwiGlu {
    bf16* output;  // [tokens, outputs]

    // Which row of the weights box `box` starts with: gate, then up.
    __device__ __forceinline__ int box_row(const Problem& p, const Tile& tile, int box) const {
        return tile.column * (BLOCK_N / 2) + box % (COLUMN_BOXES / 2) * ROWS + box / (COLUMN_BOXES / 2) * p.outputs;
    }

    __device__ __forceinline__ void finish(const Sums& sums, const Problem& p, const Tile& tile, int row, int member) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = tile.token + row + 8 * half;
#pragma unroll
            for (int group = 0; group < BLOCK_N / 2 / STORED_COLUMNS; ++group) {
                __nv_bfloat162 pairs[4];
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    const float* const gate = &sums[group * 4 + t][2 * half];
                    const float* const up = &sums[BLOCK_N / 16 + group * 4 + t][2 * half];
                    pairs[t] = __floats2bfloat162_rn(silu_by_tanh(gate[0]) * up[0], silu_by_tanh(gate[1]) * up[1]);
                }
                const Bf16x8 run = exchange(pairs, member);
                const int output = tile.column * (BLOCK_N / 2) + group * STORED_COLUMNS + 8 * member;
                if (token < p.tokens && output < p.outputs) {
                    *reinterpret_cast<Bf16x8*>(this->output + static_cast<size_t>(token) * p.outputs + output) = run;
                }
            }
        }
    }
};

struct Bias {
    bf16* output;      // [tokens, outputs]
    const bf16* bias;  // [outputs]

    __device__ __forceinline__ int box_row(const Problem&, const Tile& tile, int box) const {
        return tile.column * BLOCK_N + box * ROWS;
    }

    __device__ __forceinline__ void finish(const Sums& sums, const Problem& p, const Tile& tile, int row, int member) const {
#pragma unroll
        for (int group = 0; group < BLOCK_N / STORED_COLUMNS; ++group) {
            const int first = tile.column * BLOCK_N + group * STORED_COLUMNS;
            float2 added[4] = {};
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                const int column = first + 8 * t + 2 * member;
                if (column < p.outputs) added[t] = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(bias + column));
            }
            const int column = first + 8 * member;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = tile.token + row + 8 * half;
                __nv_bfloat162 pairs[4];
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    const float* const sum = &sums[group * 4 + t][2 * half];
                    pairs[t] = __floats2bfloat162_rn(sum[0] + added[t].x, sum[1] + added[t].y);
                }
                const Bf16x8 run = exchange(pairs, member);
                if (token < p.tokens && column < p.outputs) {
                    *reinterpret_cast<Bf16x8*>(output + static_cast<size_t>(token) * p.outputs + column) = run;
                }
            }
        }
    }
};

// ---- where the rows come from ----

// Patches of an image: the map's dimensions are the elements of a patch's row, patches across, rows of a patch, patches down. A
// block of ROWS tokens lies in one row of patches: there are a multiple of ROWS across.
struct PatchRows {
    int steps_per_row;  // BLOCK_K elements each
    int across;

    __device__ __forceinline__ void load(uint32_t to, const TensorMap& map, uint32_t full, int element, int token) const {
        const int step = element / BLOCK_K;
        const int column = step % steps_per_row * BLOCK_K, row = step / steps_per_row;
        tma_load_multicast(to, map, full, ALL, column, token % across, row, token / across);
    }
};

// ---- the kernels; outputs are multiples of 8 ----

// weights [2 outputs, depth]: gate, then up; outputs are multiples of STORED_COLUMNS.
LINEAR_KERNEL linear_swiglu(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weights, bf16* output, int tokens, int outputs, int depth) {
    const Problem p = {tokens, outputs, summed(depth), (2 * outputs + BLOCK_N - 1) / BLOCK_N};
    linear<Tiles>(x, weights, p, MatrixRows{}, Whole<Tiles>{}, SwiGlu{output});
}
LINEAR_LAUNCH(linear_swiglu, Tiles)

LINEAR_KERNEL linear_patches(
    const __grid_constant__ TensorMap image, const __grid_constant__ TensorMap weights, bf16* output, const bf16* bias, int tokens,
    int outputs, int depth, int steps_per_row, int across) {
    const Problem p = {tokens, outputs, summed(depth), (outputs + BLOCK_N - 1) / BLOCK_N};
    linear<Tiles>(image, weights, p, PatchRows{steps_per_row, across}, Whole<Tiles>{}, Bias{output, bias});
}
LINEAR_LAUNCH(linear_patches, Tiles)
#endif
