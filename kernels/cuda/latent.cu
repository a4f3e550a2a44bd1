// Latents as the autoencoder's decoder takes them; engine/src/ops/latent.rs holds the contract.
#include "common/launch.cuh"
#include "common/types.cuh"

constexpr int THREADS = 256;

// y = x / scaling_factor + shift_factor. A few megabytes at most: one element per thread will do.
extern "C" __global__ __launch_bounds__(THREADS) void denormalize_latent(
    const float* x, bf16* y, size_t elements, float scaling_factor, float shift_factor) {
    const size_t at = static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (at < elements) y[at] = from_float<bf16>(x[at] / scaling_factor + shift_factor);
}
L2P_LAUNCH(denormalize_latent, THREADS, 0, THREADS)
