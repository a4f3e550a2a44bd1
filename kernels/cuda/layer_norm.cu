// Layer normalisation without learned factors, and its gradient; engine/src/ops/layer_norm.rs holds the contract.
//
// Forward: one block per row, which stays in registers between the mean, the variance and the result. Bound by memory: 2 bytes read
// and 2 written per element.
#include "common/launch.cuh"
#include "common/row.cuh"

// x, output [rows, dim]; scale, shift: rows of `stride` elements, one per batch item of `tokens` rows, or null.
extern "C" __global__ void layer_norm_modulate(
    const bf16* x, const float* scale, const float* shift, bf16* output, int dim, int tokens, int stride, float epsilon) {
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
    const float* row_shift = shift == nullptr ? nullptr : shift + row_index / tokens * stride;
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
        if (row_shift != nullptr) {
            float summand[8];
            load8(summand, row_shift + vector * 8);
#pragma unroll
            for (int j = 0; j < 8; ++j) row.value[i][j] += summand[j];
        }
        store8(output + row_index * dim + vector * 8, row.value[i]);
    }
}
L2P_LAUNCH(layer_norm_modulate, 0, 0, ROW_VECTORS * 8)

constexpr int BACKWARD_THREADS = 256;  // at most

// dx for the gradient dy of the above; partial [items, blocks, dim] gets each block's sums over rows of dy * normalised, or
// is null. Grid (blocks, items), blocks <= tokens; a block takes every gridDim.x-th row of its item.
extern "C" __global__ __launch_bounds__(BACKWARD_THREADS) void layer_norm_modulate_backward(
    const bf16* dy, const bf16* x, const float* scale, bf16* dx, float* partial, int dim, int tokens, int stride, float epsilon) {
    __shared__ float scratch[MAX_WARPS];
    const size_t item = blockIdx.y;
    const int vectors = dim / 8;
    const float* row_scale = scale == nullptr ? nullptr : scale + item * stride;
    Row total = {};
    for (int token = blockIdx.x; token < tokens; token += gridDim.x) {
        const size_t start = (item * tokens + token) * dim;
        Row row;
        load_row(row, x + start, vectors);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < ROW_VECTORS; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) sum += row.value[i][j];
        const float mean = row_sum(sum, scratch) / dim;
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < ROW_VECTORS; ++i) {
            if (threadIdx.x + i * blockDim.x >= vectors) continue;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                row.value[i][j] -= mean;
                squares += row.value[i][j] * row.value[i][j];
            }
        }
        const float inverse = rsqrtf(row_sum(squares, scratch) / dim + epsilon);
        Row gradient;
        load_row(gradient, dy + start, vectors);
        float plain = 0.0f, along = 0.0f;
#pragma unroll
        for (int i = 0; i < ROW_VECTORS; ++i) {
            const int vector = threadIdx.x + i * blockDim.x;
            if (vector >= vectors) continue;
            float factor[8] = {};
            if (row_scale != nullptr) load8(factor, row_scale + vector * 8);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                row.value[i][j] *= inverse;
                total.value[i][j] += gradient.value[i][j] * row.value[i][j];
                gradient.value[i][j] *= 1.0f + factor[j];
                plain += gradient.value[i][j];
                along += gradient.value[i][j] * row.value[i][j];
            }
        }
        const float plain_mean = row_sum(plain, scratch) / dim;
        const float share = row_sum(along, scratch) / dim;
#pragma unroll
        for (int i = 0; i < ROW_VECTORS; ++i) {
            const int vector = threadIdx.x + i * blockDim.x;
            if (vector >= vectors) continue;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                gradient.value[i][j] = inverse * (gradient.value[i][j] - plain_mean - row.value[i][j] * share);
            }
            store8(dx + start + vector * 8, gradient.value[i]);
        }
    }
    if (partial == nullptr) return;
#pragma unroll
    for (int i = 0; i < ROW_VECTORS; ++i) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector < vectors) store8(partial + (item * gridDim.x + blockIdx.x) * dim + vector * 8, total.value[i]);
    }
}
L2P_LAUNCH(layer_norm_modulate_backward, BACKWARD_THREADS, 0, ROW_VECTORS * 8)
