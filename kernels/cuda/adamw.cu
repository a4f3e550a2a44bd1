// AdamW over all trained tensors at once; engine/src/train/adamw.rs holds the contract.
//
// Every tensor, or the part of it that a rank keeps the state of, is cut into chunks, one per block; a table says which tensor a chunk
// is of. Master weights, moments and averages of all tensors lie one behind the other in one array each. Bound by memory: 2 bytes read
// per element for the norm; 14 read and 16 written for the step (16 and 14 where gradients are sums over ranks), 4 and 4 more with an
// average.
#include "common/launch.cuh"
#include "common/reduce.cuh"

constexpr int THREADS = 256;
constexpr int CHUNK = THREADS * 32;  // elements

// As in adamw.rs: where a tensor's weight and gradient are, its place in the state, its size, and the number of its first chunk. G is
// bf16 where gradients are gathered in place, and f32 where they are sums over ranks.
template <typename G>
struct Segment {
    bf16* weight;
    G* gradient;
    unsigned long long offset, elements, first_chunk;
};

// Squares of one chunk's gradients: partial[chunk].
extern "C" __global__ __launch_bounds__(THREADS) void gradient_squares(
    const Segment<bf16>* segments, const int* segment_of_chunk, float* partial) {
    __shared__ float scratch[THREADS / WARP];
    const Segment<bf16> segment = segments[segment_of_chunk[blockIdx.x]];
    const unsigned long long first = (blockIdx.x - segment.first_chunk) * CHUNK;
    float squares = 0.0f;
#pragma unroll
    for (int step = 0; step < CHUNK / (THREADS * 8); ++step) {
        const unsigned long long index = first + (step * THREADS + threadIdx.x) * 8;
        if (index + 8 <= segment.elements) {
            float values[8];
            load8(values, segment.gradient + index);
#pragma unroll
            for (int i = 0; i < 8; ++i) squares += values[i] * values[i];
        } else {
            for (unsigned long long single = index; single < segment.elements; ++single) {
                const float value = to_float(segment.gradient[single]);
                squares += value * value;
            }
        }
    }
    squares = block_sum<THREADS>(squares, scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = squares;
}
L2P_LAUNCH(gradient_squares, THREADS, 0, CHUNK)

constexpr int FINISH_THREADS = 1024;

// control = {norm, 1 if it is not finite, what gradients are multiplied by}, from the chunks' sums in an order that their number
// alone decides; `largest` is the norm to clip to, or infinity. One block.
extern "C" __global__ __launch_bounds__(FINISH_THREADS) void gradient_norm(
    const float* partial, float* control, int chunks, float largest) {
    __shared__ double scratch[FINISH_THREADS];
    const double squares = block_sum_f64<FINISH_THREADS>(partial, chunks, scratch);
    if (threadIdx.x > 0) return;
    const float norm = static_cast<float>(sqrt(squares));
    control[0] = norm;
    control[1] = isfinite(norm) ? 0.0f : 1.0f;
    control[2] = fminf(largest / (norm + 1e-6f), 1.0f);
}
L2P_LAUNCH(gradient_norm, FINISH_THREADS, 0, FINISH_THREADS)

// The decay of a running mean, and 1 minus it.
struct Decay {
    float keep, take;
    __device__ __forceinline__ float mix(float mean, float value) const { return keep * mean + take * value; }
};

// The scalars of a step.
struct Step {
    float keep;  // 1 - learning rate * weight decay
    Decay first, second;
    float rate, second_scale, epsilon;  // learning rate / (1 - beta1^t); 1 / sqrt(1 - beta2^t)
    Decay average;
};

__device__ __forceinline__ void update(float& weight, float& first, float& second, float gradient, const Step& step) {
    weight *= step.keep;
    first = step.first.mix(first, gradient);
    second = step.second.mix(second, gradient * gradient);
    weight -= step.rate * first / (sqrtf(second) * L2P_FAULT_IF(17, 1.0f, step.second_scale) + step.epsilon);
}

// One step for a chunk, unless control says that the norm is not finite. Gradients that were gathered in place become zero either way;
// sums are made anew for every step. `average` may be null.
template <typename G>
__device__ __forceinline__ void step_chunk(
    const Segment<G>& segment, unsigned chunk, const float* control, float* master, float* first_moment, float* second_moment,
    float* average, const Step& step) {
    constexpr bool IN_PLACE = sizeof(G) == sizeof(bf16);
    const unsigned long long chunk_start = (chunk - segment.first_chunk) * CHUNK;
    const bool skip = control[1] != 0.0f;
    const float factor = control[2];
#pragma unroll 1
    for (int part = 0; part < CHUNK / (THREADS * 8); ++part) {
        const unsigned long long index = chunk_start + (part * THREADS + threadIdx.x) * 8;
        if (index >= segment.elements) return;
        const unsigned long long at = segment.offset + index;
        if (index + 8 <= segment.elements) {
            constexpr float ZEROS[8] = {};
            float gradient[8];
            load8(gradient, segment.gradient + index);
            if constexpr (IN_PLACE) store8(segment.gradient + index, ZEROS);
            if (skip) continue;
            float weight[8], first[8], second[8];
            load8(weight, master + at);
            load8(first, first_moment + at);
            load8(second, second_moment + at);
#pragma unroll
            for (int i = 0; i < 8; ++i) update(weight[i], first[i], second[i], gradient[i] * factor, step);
            store8(master + at, weight);
            store8(first_moment + at, first);
            store8(second_moment + at, second);
            store8(segment.weight + index, weight);
            if (average == nullptr) continue;
            float mean[8];
            load8(mean, average + at);
#pragma unroll
            for (int i = 0; i < 8; ++i) mean[i] = step.average.mix(mean[i], weight[i]);
            store8(average + at, mean);
        } else {
            for (unsigned long long single = index; single < segment.elements; ++single) {
                const unsigned long long place = segment.offset + single;
                const float gradient = to_float(segment.gradient[single]) * factor;
                if constexpr (IN_PLACE) segment.gradient[single] = from_float<G>(0.0f);
                if (skip) continue;
                update(master[place], first_moment[place], second_moment[place], gradient, step);
                segment.weight[single] = from_float<bf16>(master[place]);
                if (average == nullptr) continue;
                average[place] = step.average.mix(average[place], master[place]);
            }
        }
    }
}

// Both kinds of gradients take the same arguments; blocks handle the chunks from `first_chunk` on.
#define ADAMW_STEP(NAME, G)                                                                                                        \
    extern "C" __global__ __launch_bounds__(THREADS) void NAME(                                                                    \
        const Segment<G>* segments, const int* segment_of_chunk, int first_chunk, const float* control, float* master,             \
        float* first_moment, float* second_moment, float* average, float keep, float first_keep, float first_take,                 \
        float second_keep, float second_take, float rate, float second_scale, float epsilon, float average_keep,                   \
        float average_take) {                                                                                                      \
        const Step step{keep,         {first_keep, first_take}, {second_keep, second_take}, rate, second_scale, epsilon,           \
                        {average_keep, average_take}};                                                                             \
        const unsigned chunk = first_chunk + blockIdx.x;                                                                           \
        step_chunk(segments[segment_of_chunk[chunk]], chunk, control, master, first_moment, second_moment, average, step);         \
    }                                                                                                                              \
    L2P_LAUNCH(NAME, THREADS, 0, CHUNK)

ADAMW_STEP(adamw_step, bf16)
ADAMW_STEP(adamw_step_sums, float)
