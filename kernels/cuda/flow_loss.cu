// Training: the noisy image and the loss; engine/src/ops/flow_loss.rs holds the contract.
//
// Bound by memory: 8 bytes read and 2 written per element for the noisy image; 12 read and 2 written for the loss.
#include "common/launch.cuh"
#include "common/reduce.cuh"

constexpr int THREADS = 256;
constexpr int ELEMENTS_PER_BLOCK = THREADS * 8;

// noisy = mix.x * image + mix.y * noise, a mix per item of `item_elements` elements. Grid (blocks, items).
extern "C" __global__ __launch_bounds__(THREADS) void flow_noisy_image(
    const float* image, const float* noise, const float2* mixes, bf16* noisy, size_t item_elements) {
    const float2 mix = mixes[blockIdx.y];
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
        for (int i = 0; i < 8; ++i) clean[i] = mix.x * clean[i] + mix.y * added[i];
        store8(noisy + start + index, clean);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const size_t index = first + i * THREADS + threadIdx.x;
            if (index >= item_elements) continue;
            noisy[start + index] = from_float<bf16>(mix.x * image[start + index] + mix.y * noise[start + index]);
        }
    }
}
L2P_LAUNCH(flow_noisy_image, THREADS, 0, ELEMENTS_PER_BLOCK)

// With error = prediction - (target.x * image + target.y * noise), a target per item of `item_elements` elements:
// partial[block] = sum of error^2 over the block's elements; gradient = scale * error, unless null. Factors of 1 and -1 round nothing.
extern "C" __global__ __launch_bounds__(THREADS) void flow_loss(
    const float* prediction, const float* image, const float* noise, const float2* targets, bf16* gradient, float* partial,
    size_t elements, size_t item_elements, float scale) {
    __shared__ float scratch[THREADS / WARP];
    const size_t first = static_cast<size_t>(blockIdx.x) * ELEMENTS_PER_BLOCK;
    const size_t index = first + threadIdx.x * 8;
    float squares = 0.0f;
    const size_t starts = reinterpret_cast<size_t>(prediction) | reinterpret_cast<size_t>(image) | reinterpret_cast<size_t>(noise);
    if (first + ELEMENTS_PER_BLOCK <= elements && item_elements % 8 == 0 && starts % 16 == 0) {
        const float2 target = targets[index / item_elements];
        float error[8], clean[8], added[8];
        load8(error, prediction + index);
        load8(clean, image + index);
        load8(added, noise + index);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            error[i] -= target.x * clean[i] + target.y * added[i];
            squares += error[i] * error[i];
            error[i] *= scale;
        }
        if (gradient != nullptr) store8(gradient + index, error);
    } else {
        for (int i = 0; i < 8; ++i) {
            const size_t single = index + i;
            if (single >= elements) break;
            const float2 target = targets[single / item_elements];
            const float error = prediction[single] - (target.x * image[single] + target.y * noise[single]);
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
