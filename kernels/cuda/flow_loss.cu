// Flow matching: the noisy image and the loss; engine/src/ops/flow_loss.rs holds the contract.
//
// Bound by memory: 8 bytes read and 2 written per element for the noisy image; 12 read and 2 written for the loss.
#include "common/launch.cuh"
#include "common/reduce.cuh"

constexpr int THREADS = 256;
constexpr int ELEMENTS_PER_BLOCK = THREADS * 8;

// noisy = (1 - sigma) * image + sigma * noise, sigma one per item of `item_elements` elements. Grid (blocks, items).
extern "C" __global__ __launch_bounds__(THREADS) void flow_noisy_image(
    const float* image, const float* noise, const float* sigmas, bf16* noisy, size_t item_elements) {
    const float sigma = sigmas[blockIdx.y];
    const size_t start = blockIdx.y * item_elements;
    const size_t first = static_cast<size_t>(blockIdx.x) * ELEMENTS_PER_BLOCK;
    const size_t starts = reinterpret_cast<size_t>(image) | reinterpret_cast<size_t>(noise);  // of views, which may be odd
    if (item_elements % 8 == 0 && starts % 16 == 0) {
        const size_t index = first + threadIdx.x * 8;
        if (index >= item_elements) return;
        float clean[8], added[8];
        load8(clean, image + start + index);
        load8(added, noise + start + index);
#pragma unroll
        for (int i = 0; i < 8; ++i) clean[i] = (1.0f - sigma) * clean[i] + sigma * added[i];
        store8(noisy + start + index, clean);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const size_t index = first + i * THREADS + threadIdx.x;
            if (index >= item_elements) continue;
            noisy[start + index] = from_float<bf16>((1.0f - sigma) * image[start + index] + sigma * noise[start + index]);
        }
    }
}
L2P_LAUNCH(flow_noisy_image, THREADS, 0, ELEMENTS_PER_BLOCK)

// partial[block] = sum of (velocity - (noise - image))^2 over the block's elements; gradient = scale * (velocity - (noise - image)),
// unless null.
extern "C" __global__ __launch_bounds__(THREADS) void flow_loss(
    const float* velocity, const float* image, const float* noise, bf16* gradient, float* partial, size_t elements, float scale) {
    __shared__ float scratch[THREADS / WARP];
    const size_t first = static_cast<size_t>(blockIdx.x) * ELEMENTS_PER_BLOCK;
    const size_t index = first + threadIdx.x * 8;
    float squares = 0.0f;
    const size_t starts = reinterpret_cast<size_t>(velocity) | reinterpret_cast<size_t>(image) | reinterpret_cast<size_t>(noise);
    if (first + ELEMENTS_PER_BLOCK <= elements && starts % 16 == 0) {
        float error[8], clean[8], added[8];
        load8(error, velocity + index);
        load8(clean, image + index);
        load8(added, noise + index);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            error[i] -= added[i] - clean[i];
            squares += error[i] * error[i];
            error[i] *= scale;
        }
        if (gradient != nullptr) store8(gradient + index, error);
    } else {
        for (int i = 0; i < 8; ++i) {
            const size_t single = index + i;
            if (single >= elements) break;
            const float error = velocity[single] - (noise[single] - image[single]);
            squares += error * error;
            if (gradient != nullptr) gradient[single] = from_float<bf16>(scale * error);
        }
    }
    const float sum = block_sum<THREADS>(squares, scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
L2P_LAUNCH(flow_loss, THREADS, 0, ELEMENTS_PER_BLOCK)

constexpr int FINISH_THREADS = 1024;

// loss[0] = factor * sum of the partial sums, in an order that their number alone decides; one block.
extern "C" __global__ __launch_bounds__(FINISH_THREADS) void flow_loss_mean(
    const float* partial, float* loss, int parts, float factor) {
    __shared__ float scratch[FINISH_THREADS / WARP];
    float sum = 0.0f;
    for (int part = threadIdx.x; part < parts; part += FINISH_THREADS) sum += partial[part];
    sum = block_sum<FINISH_THREADS>(sum, scratch);
    if (threadIdx.x == 0) loss[0] = factor * sum;
}
L2P_LAUNCH(flow_loss_mean, FINISH_THREADS, 0, FINISH_THREADS)
