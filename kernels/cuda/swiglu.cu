// The gate of a SwiGLU feed-forward layer; engine/src/ops/swiglu.rs holds the contract.
//
// Eight outputs per thread. Bound by memory: 4 bytes read and 2 written per output.
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
