// The gradients of a 1x1 convolution to a picture, of source, weight and bias in one pass; engine/src/ops/conv/backward holds the
// contract. It has at most COLOURS outputs, too few for tensor cores, and the picture's gradient may be f32.
//
// A thread has 8 channels, their weights and the sums of their gradients in registers, and passes over pixels. A block leaves its
// sums in f32 as the kernels of conv_weights.cu do, whose conv_weights_sum adds them. Bound by memory: the source is read once,
// its gradient written once.
#include "common/launch.cuh"
#include "common/types.cuh"

constexpr int THREADS = 256;
constexpr int COLOURS = 3;
constexpr int CHANNELS = 8;  // of a thread
constexpr int BATCH = 4;     // pixels that a thread reads before it uses them

struct Operands {
    const bf16* x;        // [pixels, inputs]
    const bf16* weight;   // [outputs, inputs]
    bf16* dx;             // like x, or null
    float* weight_parts;  // [blocks, outputs, inputs], or null
    float* bias_parts;    // [blocks, outputs]
    size_t pixels;
    int inputs, outputs;
    float scale;
};

// What a thread sums: the gradients of the weights of its channels, and of the biases.
struct Sums {
    float weight[COLOURS][CHANNELS];
    float bias[COLOURS];
};

template <typename Element>
__device__ __forceinline__ void run(const Element* __restrict__ dy, const Operands& o) {
    __shared__ float left[THREADS][COLOURS * CHANNELS + COLOURS];
    const int vectors = o.inputs / CHANNELS;               // threads per pixel
    const int slots = THREADS / vectors;                   // pixels that a block has at a time
    const int vector = threadIdx.x % vectors, slot = threadIdx.x / vectors;
    float weights[COLOURS][CHANNELS] = {};
#pragma unroll
    for (int colour = 0; colour < COLOURS; ++colour) {
        if (colour < o.outputs) load8(weights[colour], o.weight + colour * o.inputs + vector * CHANNELS);
    }
    Sums sums = {};
    const size_t step = static_cast<size_t>(gridDim.x) * slots;
    for (size_t first = blockIdx.x * static_cast<size_t>(slots) + slot; slot < slots && first < o.pixels; first += BATCH * step) {
        float values[BATCH][CHANNELS], gradients[BATCH][COLOURS] = {};
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const size_t pixel = first + i * step;
            if (pixel >= o.pixels) continue;
            load8(values[i], o.x + pixel * o.inputs + vector * CHANNELS);
#pragma unroll
            for (int colour = 0; colour < COLOURS; ++colour) {
                if (colour < o.outputs) gradients[i][colour] = o.scale * to_float(dy[pixel * o.outputs + colour]);
            }
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const size_t pixel = first + i * step;
            if (pixel >= o.pixels) continue;
            float dx[CHANNELS] = {};
#pragma unroll
            for (int colour = 0; colour < COLOURS; ++colour) {
                sums.bias[colour] += gradients[i][colour];
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) {
                    dx[c] += weights[colour][c] * gradients[i][colour];
                    sums.weight[colour][c] += values[i][c] * gradients[i][colour];
                }
            }
            if (o.dx != nullptr) store8(o.dx + pixel * o.inputs + vector * CHANNELS, dx);
        }
    }
    if (o.weight_parts == nullptr) return;
#pragma unroll
    for (int colour = 0; colour < COLOURS; ++colour) {
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) left[threadIdx.x][colour * CHANNELS + c] = sums.weight[colour][c];
        left[threadIdx.x][COLOURS * CHANNELS + colour] = sums.bias[colour];
    }
    __syncthreads();  // the threads' sums are there
    for (int index = threadIdx.x; index < o.outputs * (o.inputs + 1); index += THREADS) {
        // Weights first, then biases, which the first thread of every pixel has.
        const bool of_weight = index < o.outputs * o.inputs;
        const int colour = of_weight ? index / o.inputs : index - o.outputs * o.inputs;
        const int channel = of_weight ? index % o.inputs : 0;
        const int place = of_weight ? colour * CHANNELS + channel % CHANNELS : COLOURS * CHANNELS + colour;
        float sum = 0.0f;
        for (int i = 0; i < slots; ++i) sum += left[i * vectors + channel / CHANNELS][place];
        if (of_weight) o.weight_parts[static_cast<size_t>(blockIdx.x) * o.outputs * o.inputs + index] = sum;
        else o.bias_parts[static_cast<size_t>(blockIdx.x) * o.outputs + colour] = sum;
    }
}

// Any number of blocks; inputs are a multiple of 8. The launch's tile: the most outputs and inputs.
#define PICTURE_KERNEL(name, Element)                                                                                      \
    extern "C" __global__ __launch_bounds__(THREADS, 2) void name(                                                         \
        const Element* dy, const bf16* x, const bf16* weight, bf16* dx, float* weight_parts, float* bias_parts,            \
        size_t pixels, int inputs, int outputs, float scale) {                                                             \
        run(dy, {x, weight, dx, weight_parts, bias_parts, pixels, inputs, outputs, scale});                                \
    }                                                                                                                      \
    L2P_LAUNCH(name, THREADS, 0, COLOURS, THREADS* CHANNELS)

PICTURE_KERNEL(conv_picture_backward_f32, float)
PICTURE_KERNEL(conv_picture_backward_bf16, bf16)
