// Linear layers of numbers of eight bits by Hopper's warpgroup products; engine/src/ops/linear_quantised.rs holds the contract.
//
// The loop over tiles is common/linear_hopper.cuh's; a step of it is one group of 128 summed elements. A result is its sum of
// products of codes times the scales of its row and of its column. Rows have one scale, which waits until the end, or one for
// each group: then a step's sums are added to totals in f32, times that scale, while the other consumer multiplies.
//
// What follows the product:
//   Scaled        stored as bf16
//   ScaledSwiGlu  a tile's columns are 128 of gate and the same of up: silu(gate) * up, 128 columns, are a group of what the
//                 next layer takes, and are stored in eight bits with a scale of their own
//
// Bound by the tensor cores, which are twice as fast as for bf16.
#include "common/launch.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "common/linear_hopper.cuh"
#include "common/quantise.cuh"

template <class Coding>
struct OperandOf;
template <>
struct OperandOf<Int8> {
    using Type = s8;
};
template <>
struct OperandOf<Float8> {
    using Type = e4m3;
};

// Sums of one step each, times the scale of the row's group.
template <class Tiles>
struct ByGroups {
    using Totals = Accumulators<Tiles::BLOCK_N>;
    static_assert(Tiles::BLOCK_K == SCALE_GROUP);
    const float* scales;  // [depth / SCALE_GROUP, tokens]

    __device__ __forceinline__ void add_up(
        Totals& totals, typename Tiles::Ring::State& state, const Tiles& shared, const Problem& p, const Tile& tile, int consumer,
        int row) const {
#pragma unroll
        for (int t = 0; t < Tiles::BLOCK_N / 8; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) totals[t][i] = 0.0f;
        const float* of_rows[2];
        float next[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            of_rows[half] = scales + min(tile.token + row + 8 * half, p.tokens - 1);
            next[half] = *of_rows[half];
        }
        for (int element = 0; element < p.depth; element += Tiles::BLOCK_K, ++state.use) {
            const int stage = state.stage();
            typename Tiles::Sums sums;
            shared.ring().consumer_wait(state);
            wgmma_fence(sums);
            issue_step(sums, shared, stage, consumer, false);
            const float scale[2] = {next[0], next[1]};
            if (element + Tiles::BLOCK_K < p.depth) {
#pragma unroll
                for (int half = 0; half < 2; ++half) next[half] = *(of_rows[half] += p.tokens);
            }
            wgmma_wait<0>(sums);
            shared.ring().template consumer_release_cluster<CLUSTER>(stage);
#pragma unroll
            for (int t = 0; t < Tiles::BLOCK_N / 8; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) totals[t][i] = fmaf(static_cast<float>(sums[t][i]), scale[i / 2], totals[t][i]);
        }
    }
};

// ---- ends ----

// The scales of the rows of a lane, 8 apart; 1 where they are in the sums already.
__device__ __forceinline__ void load_row_scales(float (&scale)[2], const float* scales, const Problem& p, int token) {
#pragma unroll
    for (int half = 0; half < 2; ++half) scale[half] = scales == nullptr ? 1.0f : scales[min(token + 8 * half, p.tokens - 1)];
}

template <int BLOCK_N>
struct Scaled {
    bf16* output;                // [tokens, outputs]
    const float* row_scales;     // [tokens] or null
    const float* column_scales;  // [outputs]

    __device__ __forceinline__ int box_row(const Problem&, const Tile& tile, int box) const {
        return tile.column * BLOCK_N + box * ROWS;
    }

    template <class Totals>
    __device__ __forceinline__ void finish(const Totals& totals, const Problem& p, const Tile& tile, int row, int member) const {
        float of_row[2];
        load_row_scales(of_row, row_scales, p, tile.token + row);
#pragma unroll
        for (int group = 0; group < BLOCK_N / STORED_COLUMNS; ++group) {
            const int first = tile.column * BLOCK_N + group * STORED_COLUMNS;
            float2 of_column[4] = {};
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                const int column = first + 8 * t + 2 * member;
                if (column < p.outputs) of_column[t] = *reinterpret_cast<const float2*>(column_scales + column);
            }
            const int column = first + 8 * member;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = tile.token + row + 8 * half;
                __nv_bfloat162 pairs[4];
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    const auto* const total = &totals[group * 4 + t][2 * half];
                    pairs[t] = __floats2bfloat162_rn(static_cast<float>(total[0]) * of_row[half] * of_column[t].x,
                                                     static_cast<float>(total[1]) * of_row[half] * of_column[t].y);
                }
                const Bf16x8 run = exchange(pairs, member);
                if (token < p.tokens && column < p.outputs) {
                    *reinterpret_cast<Bf16x8*>(output + static_cast<size_t>(token) * p.outputs + column) = run;
                }
            }
        }
    }
};

template <class Coding>
struct ScaledSwiGlu {
    static constexpr int BLOCK_N = 2 * SCALE_GROUP, COLUMN_BOXES = BLOCK_N / ROWS;
    uint8_t* codes;              // [tokens, outputs]
    float* scales;               // [outputs / SCALE_GROUP, tokens]
    const float* row_scales;     // [tokens]
    const float* column_scales;  // [2 outputs]

    // Which row of the weights box `box` starts with: gate, then up.
    __device__ __forceinline__ int box_row(const Problem& p, const Tile& tile, int box) const {
        return tile.column * SCALE_GROUP + box % (COLUMN_BOXES / 2) * ROWS + box / (COLUMN_BOXES / 2) * p.outputs;
    }

    template <class Totals>
    __device__ __forceinline__ void finish(const Totals& totals, const Problem& p, const Tile& tile, int row, int member) const {
        if (tile.column >= p.column_tiles) return;  // the same for all threads: the last pair of an odd number
        float of_row[2];
        load_row_scales(of_row, row_scales, p, tile.token + row);
        const int first = tile.column * SCALE_GROUP;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float value[2 * SCALE_GROUP / 8];
#pragma unroll
            for (int t = 0; t < SCALE_GROUP / 8; ++t) {
                const float* const of_columns = column_scales + first + 8 * t + 2 * member;
                const float2 of_gate = *reinterpret_cast<const float2*>(of_columns);
                const float2 of_up = *reinterpret_cast<const float2*>(of_columns + p.outputs);
                const auto* const gate = &totals[t][2 * half];
                const auto* const up = &totals[SCALE_GROUP / 8 + t][2 * half];
                value[2 * t] = silu_by_tanh(static_cast<float>(gate[0]) * of_row[half] * of_gate.x) *
                               (static_cast<float>(up[0]) * of_row[half] * of_up.x);
                value[2 * t + 1] = silu_by_tanh(static_cast<float>(gate[1]) * of_row[half] * of_gate.y) *
                                   (static_cast<float>(up[1]) * of_row[half] * of_up.y);
            }
            const int token = tile.token + row + 8 * half;
            const bool valid = token < p.tokens;
            const float scale =
                store_row_of_codes<Coding>(codes + static_cast<size_t>(token) * p.outputs + first, value, member, valid);
            if (valid && member == 0) scales[static_cast<size_t>(tile.column) * p.tokens + token] = scale;
        }
    }
};

// ---- the kernels: outputs are multiples of 8, summed elements and the outputs of SwiGLU of SCALE_GROUP ----

template <class Tiles>
__device__ __forceinline__ Problem problem(int tokens, int outputs, int columns, int depth) {
    const int summed = L2P_FAULT_IF(29, max(depth - Tiles::BLOCK_K, Tiles::BLOCK_K), depth);
    return {tokens, outputs, summed, (columns + Tiles::BLOCK_N - 1) / Tiles::BLOCK_N};
}

// row_scales [tokens]; column_scales [outputs].
#define SCALED_BY_ROWS(name, Coding, N, STAGES)                                                                              \
    LINEAR_KERNEL name(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weights, bf16* output,         \
                       const float* row_scales, const float* column_scales, int tokens, int outputs, int depth) {            \
        using Tiles = Tiling<OperandOf<Coding>::Type, N, STAGES>;                                                            \
        linear<Tiles>(x, weights, problem<Tiles>(tokens, outputs, outputs, depth), MatrixRows{}, Whole<Tiles>{},             \
                      Scaled<N>{output, row_scales, column_scales});                                                         \
    }                                                                                                                        \
    LINEAR_LAUNCH(name, Tiling<OperandOf<Coding>::Type, N, STAGES>)

// row_scales [depth / SCALE_GROUP, tokens]; column_scales [outputs].
#define SCALED_BY_GROUPS(name, Coding, N, STAGES)                                                                            \
    LINEAR_KERNEL name(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weights, bf16* output,         \
                       const float* row_scales, const float* column_scales, int tokens, int outputs, int depth) {            \
        using Tiles = Tiling<OperandOf<Coding>::Type, N, STAGES>;                                                            \
        linear<Tiles>(x, weights, problem<Tiles>(tokens, outputs, outputs, depth), MatrixRows{}, ByGroups<Tiles>{row_scales}, \
                      Scaled<N>{output, nullptr, column_scales});                                                            \
    }                                                                                                                        \
    LINEAR_LAUNCH(name, Tiling<OperandOf<Coding>::Type, N, STAGES>)

// weights [2 outputs, depth]: gate, then up; row_scales [tokens]; column_scales [2 outputs].
#define SCALED_SWIGLU(name, Coding)                                                                                          \
    LINEAR_KERNEL name(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weights, uint8_t* codes,       \
                       float* scales, const float* row_scales, const float* column_scales, int tokens, int outputs,          \
                       int depth) {                                                                                          \
        using Tiles = Tiling<OperandOf<Coding>::Type, ScaledSwiGlu<Coding>::BLOCK_N, 4>;                                     \
        linear<Tiles>(x, weights, problem<Tiles>(tokens, outputs, 2 * outputs, depth), MatrixRows{}, Whole<Tiles>{},         \
                      ScaledSwiGlu<Coding>{codes, scales, row_scales, column_scales});                                       \
    }                                                                                                                        \
    LINEAR_LAUNCH(name, Tiling<OperandOf<Coding>::Type, ScaledSwiGlu<Coding>::BLOCK_N, 4>)

SCALED_BY_ROWS(linear_rows_256_s8, Int8, 256, 4)
SCALED_BY_ROWS(linear_rows_192_s8, Int8, 192, 5)
SCALED_BY_ROWS(linear_rows_256_e4m3, Float8, 256, 4)
SCALED_BY_ROWS(linear_rows_192_e4m3, Float8, 192, 5)
SCALED_BY_GROUPS(linear_groups_192_s8, Int8, 192, 5)
SCALED_BY_GROUPS(linear_groups_128_s8, Int8, 128, 6)
SCALED_BY_GROUPS(linear_groups_192_e4m3, Float8, 192, 5)
SCALED_BY_GROUPS(linear_groups_128_e4m3, Float8, 128, 6)
SCALED_SWIGLU(linear_swiglu_s8, Int8)
SCALED_SWIGLU(linear_swiglu_e4m3, Float8)
#endif
