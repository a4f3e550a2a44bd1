// Layer normalisation without learned factors; engine/src/ops/layer_norm.rs holds the contract.
//
// One block per row, which stays in registers between the mean, the variance and the result. Bound by memory: 2 bytes read
// and 2 written per element.
#include "common/launch.cuh"
#include "common/row.cuh"

// x, output [rows, dim]; scale: rows of `stride` elements, one per batch item of `tokens` rows, or null.
extern "C" __global__ void layer_norm_modulate(
    const bf16* x, const float* scale, bf16* output, int dim, int tokens, int stride, float epsilon) {
    __shared__ float scratch[MAX_WARPS];
    const size_t row_index = blockIdx.x;
    const int vectors = dim / 8;
    Row row;
    load_row(row, x + row_index * dim, vectors);

    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < ROW_VECTORS; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += row.value[i][j];
    const float mean = row_sum(sum, scratch) / dim;

    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < ROW_VECTORS; ++i) {
        if (threadIdx.x + i * blockDim.x >= vectors) continue;  // the zeros past the end are no elements
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            row.value[i][j] -= mean;
            squares += row.value[i][j] * row.value[i][j];
        }
    }
    const float inverse = rsqrtf(row_sum(squares, scratch) / dim + epsilon);

    const float* row_scale = scale == nullptr ? nullptr : scale + row_index / tokens * stride;
#pragma unroll
    for (int i = 0; i < ROW_VECTORS; ++i) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector >= vectors) continue;
#pragma unroll
        for (int j = 0; j < 8; ++j) row.value[i][j] *= inverse;
        if (row_scale != nullptr) {
            float factor[8];
            load8(factor, row_scale + vector * 8);
#pragma unroll
            for (int j = 0; j < 8; ++j) row.value[i][j] *= 1.0f + factor[j];
        }
        store8(output + row_index * dim + vector * 8, row.value[i]);
    }
}
L2P_LAUNCH(layer_norm_modulate, 0, 0, ROW_VECTORS * 8)
