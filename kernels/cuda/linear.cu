// A linear layer for a handful of f32 vectors, and its gradients; engine/src/ops/linear.rs holds the contract.
//
// Forward: one warp per output and vector: the weights stream through once, 16 bytes per lane and step. Bound by memory: 2 bytes
// per weight; further vectors find the weights in L2.
#include "common/launch.cuh"
#include "common/reduce.cuh"

constexpr int THREADS = 256;
constexpr int OUTPUTS_PER_BLOCK = THREADS / WARP;

// y[v, o] = sum_i activation(x[v, i]) * weight[o, i] + bias[o]; grid (output blocks, vectors).
extern "C" __global__ __launch_bounds__(THREADS) void linear_vectors(
    const float* x, const bf16* weight, const bf16* bias, float* y, int inputs, int outputs, int silu_input) {
    const int output = blockIdx.x * OUTPUTS_PER_BLOCK + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    if (output >= outputs) return;
    const float* vector = x + static_cast<size_t>(blockIdx.y) * inputs;
    const bf16* row = weight + static_cast<size_t>(output) * inputs;
    float sum = 0.0f;
    for (int i = lane * 8; i < inputs; i += WARP * 8) {
        float values[8], factors[8];
        load8(values, vector + i);
        load8(factors, row + i);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += (silu_input ? silu(values[j]) : values[j]) * factors[j];
    }
    sum = warp_sum(sum);
    if (lane == 0) {
        y[static_cast<size_t>(blockIdx.y) * outputs + output] = sum + (bias == nullptr ? 0.0f : to_float(bias[output]));
    }
}
L2P_LAUNCH(linear_vectors, THREADS, 0, OUTPUTS_PER_BLOCK)

// weight_gradient[o, i] += sum_v dy[v, o] * activation(x[v, i]), bias_gradient[o] += sum_v dy[v, o]; either may be null. One warp
// per output.
extern "C" __global__ __launch_bounds__(THREADS) void linear_vectors_weight_gradient(
    const float* dy, const float* x, bf16* weight_gradient, bf16* bias_gradient, int vectors, int inputs, int outputs,
    int silu_input) {
    const int output = blockIdx.x * OUTPUTS_PER_BLOCK + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    if (output >= outputs) return;
    if (weight_gradient != nullptr) {
        bf16* row = weight_gradient + static_cast<size_t>(output) * inputs;
        for (int i = lane * 8; i < inputs; i += WARP * 8) {
            float sum[8] = {};
            for (int v = 0; v < vectors; ++v) {
                float values[8];
                load8(values, x + static_cast<size_t>(v) * inputs + i);
                const float gradient = dy[static_cast<size_t>(v) * outputs + output];
#pragma unroll
                for (int j = 0; j < 8; ++j) sum[j] += gradient * (silu_input ? silu(values[j]) : values[j]);
            }
            float held[8];
            load8(held, row + i);
#pragma unroll
            for (int j = 0; j < 8; ++j) held[j] += sum[j];
            store8(row + i, held);
        }
    }
    if (bias_gradient != nullptr) {
        float sum = 0.0f;
        for (int v = lane; v < vectors; v += WARP) sum += dy[static_cast<size_t>(v) * outputs + output];
        sum = warp_sum(sum);
        if (lane == 0) bias_gradient[output] = from_float<bf16>(to_float(bias_gradient[output]) + sum);
    }
}
L2P_LAUNCH(linear_vectors_weight_gradient, THREADS, 0, OUTPUTS_PER_BLOCK)

constexpr int COLUMNS = WARP * 8;           // inputs per block
constexpr int ROW_LANES = THREADS / WARP;   // outputs that a block takes side by side

// partial[g, v, i] = sum of dy[v, o] * weight[o, i] over the outputs of group g. Grid (column tiles, groups, vectors).
extern "C" __global__ __launch_bounds__(THREADS) void linear_vectors_input_gradient(
    const float* dy, const bf16* weight, float* partial, int inputs, int outputs) {
    __shared__ alignas(16) float sums[ROW_LANES][COLUMNS];
    const int lane = threadIdx.x / WARP;
    const int in_tile = threadIdx.x % WARP * 8;
    const int column = blockIdx.x * COLUMNS + in_tile;
    const float* gradients = dy + static_cast<size_t>(blockIdx.z) * outputs;
    float total[8] = {};
    if (column < inputs) {
        for (int output = blockIdx.y * ROW_LANES + lane; output < outputs; output += gridDim.y * ROW_LANES) {
            float factors[8];
            load8(factors, weight + static_cast<size_t>(output) * inputs + column);
            const float gradient = gradients[output];
#pragma unroll
            for (int i = 0; i < 8; ++i) total[i] += gradient * factors[i];
        }
    }
    store8(&sums[lane][in_tile], total);
    __syncthreads();  // every lane's sums are written before they are added up
    static_assert(THREADS == COLUMNS, "one thread adds up one column");
    const int mine = blockIdx.x * COLUMNS + threadIdx.x;
    if (mine >= inputs) return;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < ROW_LANES; ++i) sum += sums[i][threadIdx.x];
    partial[(static_cast<size_t>(blockIdx.y) * gridDim.z + blockIdx.z) * inputs + mine] = sum;
}
L2P_LAUNCH(linear_vectors_input_gradient, THREADS, 0, COLUMNS, ROW_LANES)

// dx[n] += activation'(x[n]) * sum over groups of partial[g, n], n over vectors and inputs.
extern "C" __global__ __launch_bounds__(THREADS) void linear_vectors_add_input_gradient(
    const float* partial, const float* x, float* dx, int groups, int elements, int silu_input) {
    const int index = blockIdx.x * THREADS + threadIdx.x;
    if (index >= elements) return;
    float sum = 0.0f;
    for (int group = 0; group < groups; ++group) sum += partial[static_cast<size_t>(group) * elements + index];
    if (silu_input) {
        const float sigmoid = 1.0f / (1.0f + __expf(-x[index]));
        sum *= sigmoid * (1.0f + x[index] * (1.0f - sigmoid));
    }
    dx[index] += sum;
}
L2P_LAUNCH(linear_vectors_add_input_gradient, THREADS, 0, THREADS)
