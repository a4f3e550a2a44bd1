// The gate of a SwiGLU feed-forward layer and its gradient; engine/src/ops/swiglu.rs holds the contract.
//
// Eight outputs per thread. Bound by memory: 4 bytes read and 2 written per output; backward 6 and 4, and 2 more where the
// output is made again.
#include "common/launch.cuh"
#include "common/types.cuh"

constexpr int THREADS = 128;
constexpr int COLUMNS = THREADS * 8;  // per block

// x [rows, 2 * hidden] with the gate first, y [rows, hidden]; grid of rows * blocks_per_row blocks.
extern "C" __global__ __launch_bounds__(THREADS) void swiglu(const bf16* x, bf16* y, int hidden, int blocks_per_row) {
    const size_t row = blockIdx.x / blocks_per_row;
    const int column = (blockIdx.x % blocks_per_row) * COLUMNS + threadIdx.x * 8;
    if (column >= hidden) return;
    const bf16* gate_row = x + row * 2 * hidden + column;
    float gate[8], up[8];
    load8(gate, gate_row);
    load8(up, gate_row + hidden);
#pragma unroll
    for (int i = 0; i < 8; ++i) gate[i] = silu(gate[i]) * up[i];
    store8(y + row * hidden + column, gate);
}
L2P_LAUNCH(swiglu, THREADS, 0, COLUMNS)

// dy, y [rows, hidden]; x [rows, 2 * hidden] holds gate and up and becomes their gradients; y is the output made again, or
// null. Grid as above.
extern "C" __global__ __launch_bounds__(THREADS) void swiglu_backward(
    const bf16* dy, bf16* x, bf16* y, int hidden, int blocks_per_row) {
    const size_t row = blockIdx.x / blocks_per_row;
    const int column = (blockIdx.x % blocks_per_row) * COLUMNS + threadIdx.x * 8;
    if (column >= hidden) return;
    bf16* gate_row = x + row * 2 * hidden + column;
    float gradient[8], gate[8], up[8];
    load8(gradient, dy + row * hidden + column);
    load8(gate, gate_row);
    load8(up, gate_row + hidden);
    float output[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float sigmoid = 1.0f / (1.0f + __expf(-gate[i]));
        const float opened = gate[i] * sigmoid;
        output[i] = opened * up[i];
        gate[i] = gradient[i] * up[i] * (sigmoid + opened * (1.0f - sigmoid));
        up[i] = gradient[i] * opened;
    }
    store8(gate_row, gate);
    store8(gate_row + hidden, up);
    if (y != nullptr) store8(y + row * hidden + column, output);
}
L2P_LAUNCH(swiglu_backward, THREADS, 0, COLUMNS)
