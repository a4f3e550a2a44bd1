// RMS normalisation with its fusions; engine/src/ops/rms_norm.rs holds the contract.
//
// A block owns some rows of one batch item and takes them one after the other. What multiplies every row (weights, scale and
// gate) stays on the multiprocessor: in registers, or, where there are two such factors, in shared memory, which leaves registers
// for more blocks. Each element of a row is read and written once, and the next row is on its way while this one is reduced.
// Bound by memory: 2 bytes read and 2 written per element for rms_norm, 4 and 4 with the residual.
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

// A thread's part of a row in shared memory, where no other thread looks at it.
template <int VECTORS>
struct SharedPart {
    static constexpr int BYTES = VECTORS * 8 * sizeof(float) * MAX_THREADS;
    float4* own;

    __device__ __forceinline__ SharedPart(unsigned char* memory) : own(reinterpret_cast<float4*>(memory) + threadIdx.x) {}
    __device__ __forceinline__ void store(const Part<VECTORS>& part) {
#pragma unroll
        for (int i = 0; i < 2 * VECTORS; ++i) {
            const float* value = part.value[i / 2] + i % 2 * 4;
            own[i * MAX_THREADS] = make_float4(value[0], value[1], value[2], value[3]);
        }
    }
};

template <int VECTORS>
__device__ __forceinline__ void multiply(Part<VECTORS>& row, float inverse, const SharedPart<VECTORS>& factor) {
#pragma unroll
    for (int i = 0; i < 2 * VECTORS; ++i) {
        const float4 of_vector = factor.own[i * MAX_THREADS];
        float* value = row.value[i / 2] + i % 2 * 4;
        value[0] *= inverse * of_vector.x, value[1] *= inverse * of_vector.y;
        value[2] *= inverse * of_vector.z, value[3] *= inverse * of_vector.w;
    }
}

// ---- what becomes of a normalised row ----

// Rows in bf16; nowhere if null.
struct Values {
    bf16* output;  // [items, tokens, dim]

    __device__ __forceinline__ bool wanted() const { return output != nullptr; }
    template <int VECTORS>
    __device__ __forceinline__ void store(size_t row, Part<VECTORS>& part, int dim) {
        write(output + row * dim, part, dim / 8);
    }
};

// Rows in eight bits, with a scale each.
template <class Coding>
struct Codes {
    uint8_t* codes;     // [items, tokens, dim]
    float* scales;      // [items, tokens]
    uint32_t* scratch;  // MAX_WARPS in shared memory; between two rows there is a sum, and with it a barrier

    __device__ __forceinline__ bool wanted() const { return true; }
    template <int VECTORS>
    __device__ __forceinline__ void store(size_t row, Part<VECTORS>& part, int dim) {
        const float scale = store_codes<Coding>(codes + row * dim, part, dim / 8, scratch);
        if (threadIdx.x == 0) scales[row] = scale;
    }
};

// ---- the normalisations ----

// x, output [items, tokens, dim]; weight [dim]; scale: a row of `stride` floats per item, or null; grid (blocks, items).
template <int VECTORS, class Output>
__device__ __forceinline__ void rms_norm_modulate(
    const bf16* x, const bf16* weight, const float* scale, Output output, int dim, int tokens, int stride, float epsilon) {
    __shared__ float scratch[2][MAX_WARPS];
    RowSums sum{scratch};
    const size_t item = blockIdx.y;
    const int vectors = dim / 8;
    if (static_cast<int>(blockIdx.x) >= tokens) return;  // the same for all threads
    Packed<VECTORS> next;  // first, so that the first row is on its way while the factors are made
    read(next, x + (item * tokens + blockIdx.x) * dim, vectors);
    Part<VECTORS> factor;
    load_scaled(factor, weight, scale == nullptr ? nullptr : scale + item * stride, vectors);
    for (int token = blockIdx.x; token < tokens; token += gridDim.x) {
        Part<VECTORS> row;
        unpack(row, next);
        if (token + gridDim.x < tokens) read(next, x + (item * tokens + token + gridDim.x) * dim, vectors);
        multiply(row, inverse_rms(row, dim, epsilon, sum), factor);
        output.store(item * tokens + token, row, dim);
    }
}

// sum = x + tanh(gate) * rms_norm(y) * weight; normalised = rms_norm(sum) * next_weight * (1 + next_scale), unless null.
template <int VECTORS, class Output>
__device__ __forceinline__ void gated_residual_rms_norm(
    const bf16* x, const bf16* y, const bf16* weight, const float* gate, bf16* sum_out, const bf16* next_weight,
    const float* next_scale, Output normalised, int dim, int tokens, int stride, int next_stride, float epsilon) {
    __shared__ float scratch[2][MAX_WARPS];
    RowSums sum{scratch};
    const size_t item = blockIdx.y;
    const int vectors = dim / 8;
    if (static_cast<int>(blockIdx.x) >= tokens) return;  // the same for all threads
    Packed<VECTORS> next_x, next_y;  // first, so that the first row is on its way while the factors are made
    const size_t first = (item * tokens + blockIdx.x) * dim;
    read(next_y, y + first, vectors);
    read(next_x, x + first, vectors);
    extern __shared__ __align__(16) unsigned char factors[];
    SharedPart<VECTORS> gated(factors), scaled(factors + SharedPart<VECTORS>::BYTES);
    {
        Part<VECTORS> factor;
        load_gated(factor, weight, gate == nullptr ? nullptr : gate + item * stride, vectors);
        gated.store(factor);
        if (normalised.wanted()) {
            load_scaled(factor, next_weight, next_scale == nullptr ? nullptr : next_scale + item * next_stride, vectors);
            scaled.store(factor);
        }
    }
    for (int token = blockIdx.x; token < tokens; token += gridDim.x) {
        const size_t start = (item * tokens + token) * dim;
        Part<VECTORS> row;
        unpack(row, next_y);
        const Packed<VECTORS> residual = next_x;
        if (token + gridDim.x < tokens) {
            read(next_y, y + start + static_cast<size_t>(gridDim.x) * dim, vectors);
            read(next_x, x + start + static_cast<size_t>(gridDim.x) * dim, vectors);
        }
        multiply(row, inverse_rms(row, dim, epsilon, sum), L2P_FAULT_IF(27, normalised.wanted() ? scaled : gated, gated));
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            float added[8];
            load8(added, reinterpret_cast<const bf16*>(&residual.vector[i]));
#pragma unroll
            for (int j = 0; j < 8; ++j) row.value[i][j] += added[j];
        }
        write(sum_out + start, row, vectors);
        if (!normalised.wanted()) continue;  // the same for all threads
        multiply(row, inverse_rms(row, dim, epsilon, sum), scaled);
        normalised.store(item * tokens + token, row, dim);
    }
}

// One kernel per number of vectors that a thread holds; the tile says how many elements a thread covers. The registers are so few
// that a multiprocessor runs four blocks of the 160 threads that rows of 3840 elements take, each with a row on its way.
#define L2P_RMS_NORM(VECTORS)                                                                                             \
    extern "C" __global__ __launch_bounds__(MAX_THREADS) void rms_norm_modulate_##VECTORS(                                \
        const bf16* x, const bf16* weight, const float* scale, bf16* output, int dim, int tokens, int stride,             \
        float epsilon) {                                                                                                  \
        rms_norm_modulate<VECTORS>(x, weight, scale, Values{output}, dim, tokens, stride, epsilon);                       \
    }                                                                                                                     \
    L2P_LAUNCH(rms_norm_modulate_##VECTORS, MAX_THREADS, 0, VECTORS * 8)                                                  \
    extern "C" __global__ __maxnreg__(VECTORS == 1 ? 40 : 32 * VECTORS) void gated_residual_rms_norm_##VECTORS(            \
        const bf16* x, const bf16* y, const bf16* weight, const float* gate, bf16* sum, const bf16* next_weight,          \
        const float* next_scale, bf16* normalised, int dim, int tokens, int stride, int next_stride, float epsilon) {     \
        gated_residual_rms_norm<VECTORS>(                                                                                 \
            x, y, weight, gate, sum, next_weight, next_scale, Values{normalised}, dim, tokens, stride, next_stride,       \
            epsilon);                                                                                                     \
    }                                                                                                                     \
    L2P_LAUNCH(gated_residual_rms_norm_##VECTORS, MAX_THREADS, 2 * SharedPart<VECTORS>::BYTES, VECTORS * 8)

// The same with normalised rows in eight bits.
#define L2P_RMS_NORM_CODES(VECTORS, Coding, suffix)                                                                       \
    extern "C" __global__ __launch_bounds__(MAX_THREADS) void rms_norm_modulate_##VECTORS##_##suffix(                     \
        const bf16* x, const bf16* weight, const float* scale, uint8_t* codes, float* scales, int dim, int tokens,        \
        int stride, float epsilon) {                                                                                      \
        __shared__ uint32_t scratch[MAX_WARPS];                                                                           \
        rms_norm_modulate<VECTORS>(                                                                                       \
            x, weight, scale, Codes<Coding>{codes, scales, scratch}, dim, tokens, stride, epsilon);                       \
    }                                                                                                                     \
    L2P_LAUNCH(rms_norm_modulate_##VECTORS##_##suffix, MAX_THREADS, 0, VECTORS * 8)                                       \
    extern "C" __global__ __maxnreg__(VECTORS == 1 ? 40 : 32 * VECTORS) void                                              \
        gated_residual_rms_norm_##VECTORS##_##suffix(                                                                     \
            const bf16* x, const bf16* y, const bf16* weight, const float* gate, bf16* sum, const bf16* next_weight,      \
            const float* next_scale, uint8_t* codes, float* scales, int dim, int tokens, int stride, int next_stride,     \
            float epsilon) {                                                                                              \
        __shared__ uint32_t scratch[MAX_WARPS];                                                                           \
        gated_residual_rms_norm<VECTORS>(                                                                                 \
            x, y, weight, gate, sum, next_weight, next_scale, Codes<Coding>{codes, scales, scratch}, dim, tokens, stride, \
            next_stride, epsilon);                                                                                        \
    }                                                                                                                     \
    L2P_LAUNCH(gated_residual_rms_norm_##VECTORS##_##suffix, MAX_THREADS, 2 * SharedPart<VECTORS>::BYTES, VECTORS * 8)

#define L2P_RMS_NORMS(VECTORS)              \
    L2P_RMS_NORM(VECTORS)                   \
    L2P_RMS_NORM_CODES(VECTORS, Int8, s8)   \
    L2P_RMS_NORM_CODES(VECTORS, Float8, e4m3)

L2P_RMS_NORMS(1)
L2P_RMS_NORMS(2)
L2P_RMS_NORMS(3)
L2P_RMS_NORMS(4)
