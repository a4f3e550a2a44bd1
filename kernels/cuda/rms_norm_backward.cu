// Gradients of the RMS normalisations and their fusions; engine/src/ops/rms_norm.rs holds the contract.
//
// As in the forward pass a block owns some rows of one batch item, keeps what multiplies every row in registers, and has the
// next row on its way while one is reduced. What parameters need is, for each norm, one sum over rows per item and channel,
// S = sum(gradient of the norm's result, before weight and vector, times the normalised input): it stays in registers, goes
// out once per block, and is added up in a second pass of fixed order. Bound by memory: 2 bytes per element and operand.
#include "common/launch.cuh"
#include "common/row_part.cuh"

template <int VECTORS>
__device__ __forceinline__ void write_sums(float* row, const Part<VECTORS>& part, int vectors) {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector < vectors) store8(row + vector * 8, part.value[i]);
    }
}

template <int VECTORS>
__device__ __forceinline__ void clear(Part<VECTORS>& part) {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) part.value[i][j] = 0.0f;
}

// dx = residual + d(x * inverse_rms(x) * factor), factor = weight * (1 + vector), or weight * tanh(vector) when gated.
// dy, x, residual, dx [items, tokens, dim]; vector: a row of `stride` floats per item, or null; residual may be null;
// partial [items, blocks, dim] or null. Grid (blocks, items), blocks <= tokens.
template <int VECTORS>
__device__ __forceinline__ void rms_norm_backward(
    const bf16* dy, const bf16* x, const bf16* weight, const float* vector, const bf16* residual, bf16* dx, float* partial,
    int dim, int tokens, int stride, int gated, float epsilon) {
    __shared__ float2 scratch[2][MAX_WARPS];
    RowSumPairs sums{scratch};
    const size_t item = blockIdx.y;
    const int vectors = dim / 8;
    const float* row_vector = vector == nullptr ? nullptr : vector + item * stride;
    Part<VECTORS> factor, total;
    if (gated) {
        load_gated(factor, weight, row_vector, vectors);
    } else {
        load_scaled(factor, weight, row_vector, vectors);
    }
    clear(total);
    Packed<VECTORS> next_x, next_dy;
    const size_t first = (item * tokens + blockIdx.x) * dim;
    read(next_x, x + first, vectors);
    read(next_dy, dy + first, vectors);
    for (int token = blockIdx.x; token < tokens; token += gridDim.x) {
        const size_t start = (item * tokens + token) * dim;
        Part<VECTORS> row, gradient;
        unpack(row, next_x);
        unpack(gradient, next_dy);
        Packed<VECTORS> passing;
        if (residual != nullptr) read(passing, residual + start, vectors);
        if (token + gridDim.x < tokens) {
            read(next_x, x + start + static_cast<size_t>(gridDim.x) * dim, vectors);
            read(next_dy, dy + start + static_cast<size_t>(gridDim.x) * dim, vectors);
        }
        float squares = 0.0f, along = 0.0f;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                squares += row.value[i][j] * row.value[i][j];
                along += gradient.value[i][j] * factor.value[i][j] * row.value[i][j];
            }
        const float2 sum = sums(squares, along);
        const float inverse = rsqrtf(sum.x / dim + epsilon);
        const float share = sum.y * inverse / dim;  // mean(gradient * factor * normalised)
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            float added[8] = {};
            if (residual != nullptr) load8(added, reinterpret_cast<const bf16*>(&passing.vector[i]));
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float normalised = row.value[i][j] * inverse;
                total.value[i][j] += gradient.value[i][j] * normalised;
                row.value[i][j] = added[j] + inverse * (gradient.value[i][j] * factor.value[i][j] - normalised * share);
            }
        }
        write(dx + start, row, vectors);
    }
    if (partial != nullptr) write_sums(partial + (item * gridDim.x + blockIdx.x) * dim, total, vectors);
}

// Of sum = x + rms_norm(y) * weight * tanh(gate) and normalised = rms_norm(sum) * next_weight * (1 + next_scale), given the
// gradients of both: dx = d_sum + what comes through the normalisation, dy = what dx sends through the branch. The sum is
// made again from x and y. partial and next_partial [items, blocks, dim] or null. Grid (blocks, items), blocks <= tokens.
template <int VECTORS>
__device__ __forceinline__ void gated_residual_rms_norm_backward(
    const bf16* d_sum, const bf16* d_normalised, const bf16* x, const bf16* y, const bf16* weight, const float* gate,
    const bf16* next_weight, const float* next_scale, bf16* dx, bf16* dy, float* partial, float* next_partial, int dim,
    int tokens, int stride, int next_stride, float epsilon) {
    __shared__ float2 scratch[2][MAX_WARPS];
    RowSumPairs sums{scratch};
    const size_t item = blockIdx.y;
    const int vectors = dim / 8;
    Part<VECTORS> gated, scaled, total, next_total;
    load_gated(gated, weight, gate == nullptr ? nullptr : gate + item * stride, vectors);
    load_scaled(scaled, next_weight, next_scale == nullptr ? nullptr : next_scale + item * next_stride, vectors);
    clear(total);
    clear(next_total);
    Packed<VECTORS> next_x, next_y;
    const size_t first = (item * tokens + blockIdx.x) * dim;
    read(next_y, y + first, vectors);
    read(next_x, x + first, vectors);
    for (int token = blockIdx.x; token < tokens; token += gridDim.x) {
        const size_t start = (item * tokens + token) * dim;
        Part<VECTORS> branch, sum;
        unpack(branch, next_y);
        unpack(sum, next_x);
        Packed<VECTORS> packed_normalised, packed_sum;
        read(packed_normalised, d_normalised + start, vectors);
        read(packed_sum, d_sum + start, vectors);
        if (token + gridDim.x < tokens) {
            read(next_y, y + start + static_cast<size_t>(gridDim.x) * dim, vectors);
            read(next_x, x + start + static_cast<size_t>(gridDim.x) * dim, vectors);
        }
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) squares += branch.value[i][j] * branch.value[i][j];
        const float inverse = rsqrtf(sums(squares, 0.0f).x / dim + epsilon);

        Part<VECTORS> gradient;
        unpack(gradient, packed_normalised);
        float sum_squares = 0.0f, along = 0.0f;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                branch.value[i][j] *= inverse;
                sum.value[i][j] += branch.value[i][j] * gated.value[i][j];
                sum_squares += sum.value[i][j] * sum.value[i][j];
                along += gradient.value[i][j] * scaled.value[i][j] * sum.value[i][j];
            }
        const float2 of_sum = sums(sum_squares, along);
        const float sum_inverse = rsqrtf(of_sum.x / dim + epsilon);
        const float share = of_sum.y * sum_inverse / dim;

        along = 0.0f;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            float passing[8];
            load8(passing, reinterpret_cast<const bf16*>(&packed_sum.vector[i]));
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float normalised = sum.value[i][j] * sum_inverse;
                next_total.value[i][j] += gradient.value[i][j] * normalised;
                const float through = gradient.value[i][j] * scaled.value[i][j] - normalised * share;
                gradient.value[i][j] = passing[j] + sum_inverse * through;
                along += gradient.value[i][j] * gated.value[i][j] * branch.value[i][j];
            }
        }
        write(dx + start, gradient, vectors);
        const float branch_share = sums(along, 0.0f).x / dim;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                total.value[i][j] += gradient.value[i][j] * branch.value[i][j];
                const float through = gradient.value[i][j] * gated.value[i][j] - branch.value[i][j] * branch_share;
                branch.value[i][j] = inverse * through;
            }
        write(dy + start, branch, vectors);
    }
    const size_t block = item * gridDim.x + blockIdx.x;
    if (partial != nullptr) write_sums(partial + block * dim, total, vectors);
    if (next_partial != nullptr) write_sums(next_partial + block * dim, next_total, vectors);
}

// One kernel per number of vectors that a thread holds; the tile says how many elements a thread covers.
#define L2P_RMS_NORM_BACKWARD(VECTORS)                                                                                    \
    extern "C" __global__ __launch_bounds__(MAX_THREADS) void rms_norm_backward_##VECTORS(                                \
        const bf16* dy, const bf16* x, const bf16* weight, const float* vector, const bf16* residual, bf16* dx,           \
        float* partial, int dim, int tokens, int stride, int gated, float epsilon) {                                      \
        rms_norm_backward<VECTORS>(                                                                                       \
            dy, x, weight, vector, residual, dx, partial, dim, tokens, stride, gated, epsilon);                           \
    }                                                                                                                     \
    L2P_LAUNCH(rms_norm_backward_##VECTORS, MAX_THREADS, 0, VECTORS * 8)                                                  \
    extern "C" __global__ __launch_bounds__(MAX_THREADS) void gated_residual_rms_norm_backward_##VECTORS(                 \
        const bf16* d_sum, const bf16* d_normalised, const bf16* x, const bf16* y, const bf16* weight, const float* gate, \
        const bf16* next_weight, const float* next_scale, bf16* dx, bf16* dy, float* partial, float* next_partial,        \
        int dim, int tokens, int stride, int next_stride, float epsilon) {                                                \
        gated_residual_rms_norm_backward<VECTORS>(                                                                        \
            d_sum, d_normalised, x, y, weight, gate, next_weight, next_scale, dx, dy, partial, next_partial, dim, tokens, \
            stride, next_stride, epsilon);                                                                                \
    }                                                                                                                     \
    L2P_LAUNCH(gated_residual_rms_norm_backward_##VECTORS, MAX_THREADS, 0, VECTORS * 8)

L2P_RMS_NORM_BACKWARD(1)
L2P_RMS_NORM_BACKWARD(2)

constexpr int FINISH_LANES = 32;  // blocks whose sums are read side by side, one warp each

// S[item, column] = sum over blocks of partial[item, block, column]. Writes the gradient of the item's vector: weight * S for
// a scale, weight * (1 - tanh(gate)^2) * S for a gate; and what the item adds to the gradient of the weight: (1 + scale) * S
// or tanh(gate) * S. A null weight stands for ones, a null vector for no vector; either result may be null. One block per
// WARP columns and item.
extern "C" __global__ __launch_bounds__(FINISH_LANES * WARP) void norm_item_sums(
    const float* partial, const bf16* weight, const float* vector, float* vector_gradient, float* weight_sums, int blocks,
    int dim, int stride, int gradient_stride, int gated) {
    __shared__ float sums[FINISH_LANES][WARP];
    const int lane = threadIdx.x / WARP;
    const int column = blockIdx.x * WARP + threadIdx.x % WARP;
    const size_t item = blockIdx.y;
    float total = 0.0f;
    if (column < dim) {
        for (int block = lane; block < blocks; block += FINISH_LANES) total += partial[(item * blocks + block) * dim + column];
    }
    sums[lane][threadIdx.x % WARP] = total;
    __syncthreads();  // every lane's sums are written before they are added up
    if (lane > 0 || column >= dim) return;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < FINISH_LANES; ++i) sum += sums[i][threadIdx.x];
    float opened = 1.0f, slope = 1.0f;
    if (vector != nullptr) {
        const float value = vector[item * stride + column];
        opened = gated ? tanhf(value) : 1.0f + value;
        slope = gated ? 1.0f - opened * opened : 1.0f;
    }
    if (vector_gradient != nullptr) {
        const float factor = weight == nullptr ? 1.0f : to_float(weight[column]);
        vector_gradient[item * gradient_stride + column] = factor * slope * sum;
    }
    if (weight_sums != nullptr) weight_sums[item * dim + column] = opened * sum;
}
L2P_LAUNCH(norm_item_sums, FINISH_LANES * WARP, 0, WARP)
