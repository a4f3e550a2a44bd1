// Rows of a table by their ids; engine/src/ops/embedding.rs holds the contract.
//
// One block per id, 16 bytes per thread and step. Bound by memory: every output row is read once and written once.
#include "common/launch.cuh"
#include "common/types.cuh"

constexpr int THREADS = 128;

// table [rows, 8 * vectors], ids [gridDim.x], output [gridDim.x, 8 * vectors]; NaN where an id lies outside the table.
extern "C" __global__ __launch_bounds__(THREADS) void embedding(
    const bf16* table, const int* ids, bf16* output, long long rows, long long vectors) {
    const int id = ids[blockIdx.x];
    const bool in_table = id >= 0 && id < rows;
    const uint4* source = reinterpret_cast<const uint4*>(table) + (in_table ? id * vectors : 0);
    uint4* target = reinterpret_cast<uint4*>(output) + blockIdx.x * vectors;
    const uint4 nan = make_uint4(~0u, ~0u, ~0u, ~0u);  // all bits set make a NaN of each bf16
    for (long long vector = threadIdx.x; vector < vectors; vector += THREADS) {
        target[vector] = in_table ? source[vector] : nan;
    }
}
L2P_LAUNCH(embedding, THREADS, 0, THREADS)
