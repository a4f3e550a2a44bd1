// Residual sum and the normalisation after it; engine/src/ops/add_rms_norm.rs holds the contract.
//
// One block per row; the sum stays in registers, so every element is read and written once. Bound by memory: 4 bytes read and
// 2 written per element, 4 with the normalised sum.
#include "common/launch.cuh"
#include "common/row.cuh"

// x, y, sum, normalised [rows, dim]; weight [dim]. sum = x + y; normalised = sum / rms * weight, unless null; then `weight` is
// not read.
extern "C" __global__ void add_rms_norm(
    const bf16* x, const bf16* y, bf16* sum, const bf16* weight, bf16* normalised, int dim, float epsilon) {
    __shared__ float scratch[MAX_WARPS];
    const size_t start = static_cast<size_t>(blockIdx.x) * dim;
    const int vectors = dim / 8;
    Row row;
    load_row(row, x + start, vectors);
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < ROW_VECTORS; ++i) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector >= vectors) continue;
        float added[8];
        load8(added, y + start + vector * 8);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            row.value[i][j] += added[j];
            squares += row.value[i][j] * row.value[i][j];
        }
        store8(sum + start + vector * 8, row.value[i]);
    }
    if (normalised == nullptr) return;  // the same for all threads
    const float inverse = rsqrtf(row_sum(squares, scratch) / dim + epsilon);
#pragma unroll
    for (int i = 0; i < ROW_VECTORS; ++i) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector >= vectors) continue;
        float factor[8];
        load8(factor, weight + vector * 8);
#pragma unroll
        for (int j = 0; j < 8; ++j) row.value[i][j] *= inverse * factor[j];
        store8(normalised + start + vector * 8, row.value[i]);
    }
}
L2P_LAUNCH(add_rms_norm, 0, 0, ROW_VECTORS * 8)
