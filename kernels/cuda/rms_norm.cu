// RMS normalisation with its fusions; engine/src/ops/rms_norm.rs holds the contract.
//
// One block per row; each thread keeps up to ROW_VECTORS vectors of eight elements in registers, so every element is read
// and written once. Bound by memory: 2 bytes read and 2 written per element for rms_norm, 4 and 4 with the residual.
#include "common/launch.cuh"
#include "common/row.cuh"

__device__ __forceinline__ float inverse_rms(const Row& row, int dim, float epsilon, float* scratch) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < ROW_VECTORS; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) squares += row.value[i][j] * row.value[i][j];
    return rsqrtf(row_sum(squares, scratch) / dim + epsilon);
}

// output = row / rms * weight * (1 + scale); `scale` may be null.
__device__ __forceinline__ void store_normalised(
    bf16* output, const Row& row, float inverse, const bf16* weight, const float* scale, int vectors) {
#pragma unroll
    for (int i = 0; i < ROW_VECTORS; ++i) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector >= vectors) continue;
        float factor[8], result[8];
        load8(factor, weight + vector * 8);
#pragma unroll
        for (int j = 0; j < 8; ++j) result[j] = row.value[i][j] * inverse * factor[j];
        if (scale != nullptr) {
            load8(factor, scale + vector * 8);
#pragma unroll
            for (int j = 0; j < 8; ++j) result[j] *= 1.0f + factor[j];
        }
        store8(output + vector * 8, result);
    }
}

// x, output [rows, dim]; weight [dim]; scale: rows of `stride` elements, one per batch item of `tokens` rows, or null.
extern "C" __global__ void rms_norm_modulate(
    const bf16* x, const bf16* weight, const float* scale, bf16* output, int dim, int tokens, int stride, float epsilon) {
    __shared__ float scratch[MAX_WARPS];
    const size_t row_index = blockIdx.x;
    const int vectors = dim / 8;
    Row row;
    load_row(row, x + row_index * dim, vectors);
    const float inverse = inverse_rms(row, dim, epsilon, scratch);
    const float* row_scale = scale == nullptr ? nullptr : scale + row_index / tokens * stride;
    store_normalised(output + row_index * dim, row, inverse, weight, row_scale, vectors);
}
L2P_LAUNCH(rms_norm_modulate, 0, 0, ROW_VECTORS * 8)

// sum = x + tanh(gate) * rms_norm(y) * weight; normalised = rms_norm(sum) * next_weight * (1 + next_scale), unless null.
extern "C" __global__ void gated_residual_rms_norm(
    const bf16* x, const bf16* y, const bf16* weight, const float* gate, bf16* sum, const bf16* next_weight,
    const float* next_scale, bf16* normalised, int dim, int tokens, int stride, int next_stride, float epsilon) {
    __shared__ float scratch[MAX_WARPS];
    const size_t row_index = blockIdx.x;
    const size_t item = row_index / tokens;
    const int vectors = dim / 8;
    Row row;
    load_row(row, y + row_index * dim, vectors);
    const float inverse = inverse_rms(row, dim, epsilon, scratch);
#pragma unroll
    for (int i = 0; i < ROW_VECTORS; ++i) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector >= vectors) continue;
        float factor[8], residual[8];
        load8(factor, weight + vector * 8);
        load8(residual, x + row_index * dim + vector * 8);
#pragma unroll
        for (int j = 0; j < 8; ++j) row.value[i][j] *= inverse * factor[j];
        if (gate != nullptr) {
            load8(factor, gate + item * stride + vector * 8);
#pragma unroll
            for (int j = 0; j < 8; ++j) row.value[i][j] *= tanhf(factor[j]);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) row.value[i][j] += residual[j];
        store8(sum + row_index * dim + vector * 8, row.value[i]);
    }
    if (normalised == nullptr) return;
    const float next_inverse = inverse_rms(row, dim, epsilon, scratch);
    const float* row_scale = next_scale == nullptr ? nullptr : next_scale + item * next_stride;
    store_normalised(normalised + row_index * dim, row, next_inverse, next_weight, row_scale, vectors);
}
L2P_LAUNCH(gated_residual_rms_norm, 0, 0, ROW_VECTORS * 8)
