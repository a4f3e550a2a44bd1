// What is known of a picture, held while the rest of it is drawn; engine/src/ops/hold_known.rs holds the contract.
//
// Four values per thread, those of a warp side by side. Bound by memory: 12 bytes read and 4 written per value where something is held,
// and a byte of the mask.
#include "common/launch.cuh"
#include "common/types.cuh"

constexpr int THREADS = 256;
constexpr int VALUES = 4;

// x, noise [elements]; known [item]; mask [item / channels]; an item's values lie together, and those of a place within it.
extern "C" __global__ __launch_bounds__(THREADS) void hold_known(
    float* x, const float* known, const float* noise, const unsigned char* mask, size_t elements, size_t item, int channels, float a,
    float b) {
    const size_t first = static_cast<size_t>(blockIdx.x) * THREADS * VALUES + threadIdx.x;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
        const size_t index = first + i * THREADS;
        if (index >= elements) return;
        const size_t within = index % item;
        const unsigned char place = mask[within / channels];
        if (place == 255) continue;
        const float held = __fmaf_rn(a, known[within], __fmul_rn(b, noise[index]));
        x[index] = __fmaf_rn(__fdiv_rn(static_cast<float>(place), 255.0f), __fsub_rn(x[index], held), held);
    }
}
L2P_LAUNCH(hold_known, THREADS, 0, THREADS * VALUES)
