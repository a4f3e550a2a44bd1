// A linear layer for a handful of f32 vectors; engine/src/ops/linear.rs holds the contract.
//
// One warp per output and vector: the weights stream through once, 16 bytes per lane and step. Bound by memory: 2 bytes
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
