// What attention with heads of 128 and its gradient share on Hopper: tiles of packed qkv in shared memory. Use inside
// `#if defined(__CUDA_ARCH_FEAT_SM90_ALL)`.
#pragma once
#include "common/attention.cuh"
#include "common/pipeline.cuh"

constexpr int HEAD_DIM = 128;
constexpr int PANELS = HEAD_DIM / PANEL;
constexpr int BOX_ROWS = 64;  // of the tensor maps' boxes, which have PANEL columns
constexpr int BOX_BYTES = BOX_ROWS * PANEL_ROW_BYTES;

// Bytes of a tile of so many rows of one head, and of one of its panels.
constexpr int panel_bytes(int rows) { return rows * PANEL_ROW_BYTES; }
constexpr int tile_bytes(int rows) { return PANELS * panel_bytes(rows); }

// Starts copying a tile of ROWS rows, whose bytes the barrier already expects.
template <int ROWS>
__device__ __forceinline__ void load_tile(uint32_t tile, const TensorMap& map, uint32_t full, int column, int row, int item) {
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
        for (int box = 0; box < ROWS / BOX_ROWS; ++box) {
            tma_load(tile + panel * panel_bytes(ROWS) + box * BOX_BYTES, map, full, column + panel * PANEL, row + box * BOX_ROWS,
                     item);
        }
}

// The left operand that accumulators make, rounded to bf16.
template <int STEPS>
__device__ __forceinline__ void pack_operand(uint32_t (&a)[STEPS][4], const float (&values)[2 * STEPS][4]) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) pack_fragment(a[step], values[2 * step], values[2 * step + 1]);
}

// sums += a b, as one group, for a tile b that has as many rows as there are summed elements in a.
template <int STEPS>
__device__ __forceinline__ void issue_sums(Accumulators<HEAD_DIM>& sums, uint32_t (&a)[STEPS][4], uint32_t b) {
    hold(a);
    wgmma_fence(sums);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int offset = step * MMA_K<bf16> * PANEL_ROW_BYTES;
        wgmma(sums, a[step], mn_major_panels<panel_bytes(STEPS * MMA_K<bf16>)>(b, offset));
    }
    wgmma_commit();
}
