// RMS normalisation with its fusions; engine/src/ops/rms_norm.rs holds the contract.
//
// A block owns some rows of one batch item and takes them one after the other. What multiplies every row (weights, scale and
// gate) stays in registers, each element of a row is read and written once, and the next row is on its way while this one is
// reduced. Bound by memory: 2 bytes read and 2 written per element for rms_norm, 4 and 4 with the residual.
#include "common/launch.cuh"
#include "common/row_part.cuh"

template <int VECTORS>
__device__ __forceinline__ float inverse_rms(const Part<VECTORS>& row, int dim, float epsilon, RowSums& sum) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) squares += row.value[i][j] * row.value[i][j];
    return rsqrtf(sum(squares) / dim + epsilon);
}

template <int VECTORS>
__device__ __forceinline__ void multiply(Part<VECTORS>& row, float inverse, const Part<VECTORS>& factor) {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) row.value[i][j] *= inverse * factor.value[i][j];
}

// x, output [items, tokens, dim]; weight [dim]; scale: a row of `stride` floats per item, or null; grid (blocks, items).
template <int VECTORS>
__device__ __forceinline__ void rms_norm_modulate(
    const bf16* x, const bf16* weight, const float* scale, bf16* output, int dim, int tokens, int stride, float epsilon) {
    __shared__ float scratch[2][MAX_WARPS];
    RowSums sum{scratch};
    const size_t item = blockIdx.y;
    const int vectors = dim / 8;
    if (static_cast<int>(blockIdx.x) >= tokens) return;  // the same for all threads
    Part<VECTORS> factor;
    load_scaled(factor, weight, scale == nullptr ? nullptr : scale + item * stride, vectors);
    Packed<VECTORS> next;
    read(next, x + (item * tokens + blockIdx.x) * dim, vectors);
    for (int token = blockIdx.x; token < tokens; token += gridDim.x) {
        Part<VECTORS> row;
        unpack(row, next);
        if (token + gridDim.x < tokens) read(next, x + (item * tokens + token + gridDim.x) * dim, vectors);
        multiply(row, inverse_rms(row, dim, epsilon, sum), factor);
        write(output + (item * tokens + token) * dim, row, vectors);
    }
}

// sum = x + tanh(gate) * rms_norm(y) * weight; normalised = rms_norm(sum) * next_weight * (1 + next_scale), unless null.
template <int VECTORS>
__device__ __forceinline__ void gated_residual_rms_norm(
    const bf16* x, const bf16* y, const bf16* weight, const float* gate, bf16* sum_out, const bf16* next_weight,
    const float* next_scale, bf16* normalised, int dim, int tokens, int stride, int next_stride, float epsilon) {
    __shared__ float scratch[2][MAX_WARPS];
    RowSums sum{scratch};
    const size_t item = blockIdx.y;
    const int vectors = dim / 8;
    if (static_cast<int>(blockIdx.x) >= tokens) return;  // the same for all threads
    Part<VECTORS> gated, scaled;
    load_gated(gated, weight, gate == nullptr ? nullptr : gate + item * stride, vectors);
    if (normalised != nullptr) {
        load_scaled(scaled, next_weight, next_scale == nullptr ? nullptr : next_scale + item * next_stride, vectors);
    }
    Packed<VECTORS> next_x, next_y;
    const size_t first = (item * tokens + blockIdx.x) * dim;
    read(next_y, y + first, vectors);
    read(next_x, x + first, vectors);
    for (int token = blockIdx.x; token < tokens; token += gridDim.x) {
        const size_t start = (item * tokens + token) * dim;
        Part<VECTORS> row;
        unpack(row, next_y);
        const Packed<VECTORS> residual = next_x;
        if (token + gridDim.x < tokens) {
            read(next_y, y + start + static_cast<size_t>(gridDim.x) * dim, vectors);
            read(next_x, x + start + static_cast<size_t>(gridDim.x) * dim, vectors);
        }
        multiply(row, inverse_rms(row, dim, epsilon, sum), gated);
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            float added[8];
            load8(added, reinterpret_cast<const bf16*>(&residual.vector[i]));
#pragma unroll
            for (int j = 0; j < 8; ++j) row.value[i][j] += added[j];
        }
        write(sum_out + start, row, vectors);
        if (normalised == nullptr) continue;  // the same for all threads
        multiply(row, inverse_rms(row, dim, epsilon, sum), scaled);
        write(normalised + start, row, vectors);
    }
}

// One kernel per number of vectors that a thread holds; the tile says how many elements a thread covers.
#define L2P_RMS_NORM(VECTORS)                                                                                             \
    extern "C" __global__ __launch_bounds__(MAX_THREADS) void rms_norm_modulate_##VECTORS(                                \
        const bf16* x, const bf16* weight, const float* scale, bf16* output, int dim, int tokens, int stride,             \
        float epsilon) {                                                                                                  \
        rms_norm_modulate<VECTORS>(x, weight, scale, output, dim, tokens, stride, epsilon);                               \
    }                                                                                                                     \
    L2P_LAUNCH(rms_norm_modulate_##VECTORS, MAX_THREADS, 0, VECTORS * 8)                                                  \
    extern "C" __global__ __launch_bounds__(MAX_THREADS) void gated_residual_rms_norm_##VECTORS(                          \
        const bf16* x, const bf16* y, const bf16* weight, const float* gate, bf16* sum, const bf16* next_weight,          \
        const float* next_scale, bf16* normalised, int dim, int tokens, int stride, int next_stride, float epsilon) {     \
        gated_residual_rms_norm<VECTORS>(                                                                                 \
            x, y, weight, gate, sum, next_weight, next_scale, normalised, dim, tokens, stride, next_stride, epsilon);     \
    }                                                                                                                     \
    L2P_LAUNCH(gated_residual_rms_norm_##VECTORS, MAX_THREADS, 0, VECTORS * 8)

L2P_RMS_NORM(1)
L2P_RMS_NORM(2)
L2P_RMS_NORM(3)
L2P_RMS_NORM(4)
