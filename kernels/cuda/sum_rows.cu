// Sums over rows in two stages of fixed order; engine/src/ops/sum_rows.rs holds the contract.
//
// Bound by memory: 2 bytes read per element; the partial sums of a few hundred groups of rows stay in L2.
#include "common/launch.cuh"
#include "common/reduce.cuh"

constexpr int LANES = 8;  // rows that a block reads side by side, one warp each
constexpr int THREADS = LANES * WARP;
constexpr int COLUMNS = WARP * 8;  // per block

// x [rows, dim]; partial [groups, dim], group g takes rows g * LANES + lane, then every groups * LANES further. With `lengths`
// only rows whose index within their item of `tokens` rows is at least the item's length count. Grid (column tiles, groups).
extern "C" __global__ __launch_bounds__(THREADS) void sum_rows(
    const bf16* x, const int* lengths, float* partial, int rows, int dim, int tokens) {
    __shared__ alignas(16) float sums[LANES][COLUMNS];
    const int lane = threadIdx.x / WARP;
    const int in_tile = threadIdx.x % WARP * 8;
    const int column = blockIdx.x * COLUMNS + in_tile;
    float total[8] = {};
    if (column < dim) {
        for (int row = blockIdx.y * LANES + lane; row < rows; row += gridDim.y * LANES) {
            if (lengths != nullptr && row % tokens < lengths[row / tokens]) continue;
            float values[8];
            load8(values, x + static_cast<size_t>(row) * dim + column);
#pragma unroll
            for (int i = 0; i < 8; ++i) total[i] += values[i];
        }
    }
    store8(&sums[lane][in_tile], total);
    __syncthreads();  // every lane's sums are written before they are added up
    const int mine = blockIdx.x * COLUMNS + threadIdx.x;
    static_assert(THREADS == COLUMNS, "one thread adds up one column");
    if (mine >= dim) return;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < LANES; ++i) sum += sums[i][threadIdx.x];
    partial[static_cast<size_t>(blockIdx.y) * dim + mine] = sum;
}
L2P_LAUNCH(sum_rows, THREADS, 0, COLUMNS, LANES)

constexpr int FINISH_LANES = 32;  // parts that a block reads side by side, one warp each

// target[column] += sum over parts of partial[part, column]; one block per WARP columns.
extern "C" __global__ __launch_bounds__(FINISH_LANES * WARP) void add_partial_sums(
    const float* partial, bf16* target, int parts, int dim) {
    __shared__ float sums[FINISH_LANES][WARP];
    const int lane = threadIdx.x / WARP;
    const int column = blockIdx.x * WARP + threadIdx.x % WARP;
    float total = 0.0f;
    if (column < dim) {
        for (int part = lane; part < parts; part += FINISH_LANES) total += partial[static_cast<size_t>(part) * dim + column];
    }
    sums[lane][threadIdx.x % WARP] = total;
    __syncthreads();  // every lane's sums are written before they are added up
    if (lane > 0 || column >= dim) return;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < FINISH_LANES; ++i) sum += sums[i][threadIdx.x];
    target[column] = from_float<bf16>(to_float(target[column]) + sum);
}
L2P_LAUNCH(add_partial_sums, FINISH_LANES * WARP, 0, WARP)
