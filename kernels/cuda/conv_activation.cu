// What stands between a convolution's sum and its result, forward where the sum is kept and backward, and other passes over
// images that gradients of convolutions need; engine/src/ops/conv/backward holds the contract.
//
// A thread takes VECTOR channels of a pixel, or of a 2x2 window of pixels where maxima are concerned. Bound by memory: each
// image is read or written once.
#include "common/launch.cuh"
#include "common/types.cuh"

constexpr int THREADS = 256;

// Channels of a pixel that a thread takes, in f32.
template <int VECTOR>
__device__ __forceinline__ void load(float (&values)[VECTOR], const bf16* from) {
    if constexpr (VECTOR == 8) load8(values, from);
    else values[0] = to_float(*from);
}

template <int VECTOR>
__device__ __forceinline__ void store(bf16* to, const float (&values)[VECTOR]) {
    if constexpr (VECTOR == 8) store8(to, values);
    else *to = from_float<bf16>(values[0]);
}

// d(x * sigmoid(x)) / dx
__device__ __forceinline__ float silu_derivative(float x) {
    const float sigmoid = __fdividef(1.0f, 1.0f + __expf(-x));
    return sigmoid * fmaf(x, 1.0f - sigmoid, 1.0f);
}

// y = silu(sum), `count` vectors.
template <int VECTOR>
__device__ __forceinline__ void activate(const bf16* sum, bf16* y, size_t count) {
    const size_t index = static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (index >= count) return;
    float values[VECTOR];
    load(values, sum + index * VECTOR);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) values[i] = silu(values[i]);
    store(y + index * VECTOR, values);
}

// ds = dy * silu'(sum), in place of the sum; `count` vectors.
template <int VECTOR>
__device__ __forceinline__ void activate_backward(const bf16* dy, bf16* sum, size_t count) {
    const size_t index = static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (index >= count) return;
    float gradients[VECTOR], values[VECTOR];
    load(gradients, dy + index * VECTOR);
    load(values, sum + index * VECTOR);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) values[i] = gradients[i] * silu_derivative(values[i]);
    store(sum + index * VECTOR, values);
}

// The 2x2 window that a thread takes: of ceil(height / 2) x ceil(width / 2), of which those at an odd end are not whole.
struct Window {
    int item, y, x, channel;  // the window's place among the windows, its first channel
    bool inside;

    __device__ Window(int vector, int items, int height, int width, int channels) {
        const int vectors = channels / vector, across = (width + 1) / 2, down = (height + 1) / 2;
        size_t rest = static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x;
        inside = rest < static_cast<size_t>(items) * down * across * vectors;
        channel = static_cast<int>(rest % vectors) * vector;
        rest /= vectors;
        x = static_cast<int>(rest % across);
        rest /= across;
        y = static_cast<int>(rest % down);
        item = static_cast<int>(rest / down);
    }

    // Where the channel of pixel `place` (row-major) of the window stands in an image, and whether there is such a pixel.
    __device__ size_t pixel(int place, int height, int width, int channels) const {
        return ((static_cast<size_t>(item) * height + 2 * y + place / 2) * width + 2 * x + place % 2) * channels + channel;
    }
    __device__ bool has(int place, int height, int width) const {
        return 2 * y + place / 2 < height && 2 * x + place % 2 < width;
    }

    // The window's place in the image of maxima.
    __device__ size_t maximum(int height, int width, int channels) const {
        return ((static_cast<size_t>(item) * (height / 2) + y) * (width / 2) + x) * channels + channel;
    }
    __device__ bool whole(int height, int width) const { return y < height / 2 && x < width / 2; }
};

// Whether b comes after a in PyTorch's search for a maximum and replaces it: NaN wins.
__device__ __forceinline__ bool replaces(float a, float b) { return b > a || isnan(b); }

// full = silu(sum), and its maxima.
template <int VECTOR>
__device__ __forceinline__ void activate_pool(
    const bf16* sum, bf16* full, bf16* pooled, int items, int height, int width, int channels) {
    const Window window(VECTOR, items, height, width, channels);
    if (!window.inside) return;
    float best[VECTOR];
#pragma unroll
    for (int place = 0; place < 4; ++place) {
        if (!window.has(place, height, width)) continue;
        const size_t at = window.pixel(place, height, width, channels);
        float values[VECTOR];
        load(values, sum + at);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            values[i] = silu(values[i]);
            if (place == 0 || replaces(best[i], values[i])) best[i] = values[i];
        }
        store(full + at, values);
    }
    // Rounding keeps the order: the largest value's is the largest.
    if (window.whole(height, width)) store(pooled + window.maximum(height, width, channels), best);
}

// ds = (d_full, and d_pooled where the window's maximum came from) * silu'(sum), in place of the sum. The maximum came from the
// first of equal ones, or from the last NaN.
template <int VECTOR>
__device__ __forceinline__ void activate_pool_backward(
    const bf16* d_full, const bf16* d_pooled, const bf16* full, bf16* sum, int items, int height, int width, int channels) {
    const Window window(VECTOR, items, height, width, channels);
    if (!window.inside) return;
    float of_maximum[VECTOR] = {};
    int from[VECTOR] = {};
    if (window.whole(height, width)) {
        load(of_maximum, d_pooled + window.maximum(height, width, channels));
        float best[VECTOR];
        load(best, full + window.pixel(0, height, width, channels));
#pragma unroll
        for (int place = 1; place < 4; ++place) {
            float values[VECTOR];
            load(values, full + window.pixel(place, height, width, channels));
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                if (replaces(best[i], values[i])) best[i] = values[i], from[i] = place;
            }
        }
    }
#pragma unroll
    for (int place = 0; place < 4; ++place) {
        if (!window.has(place, height, width)) continue;
        const size_t at = window.pixel(place, height, width, channels);
        float gradients[VECTOR], values[VECTOR];
        load(gradients, d_full + at);
        load(values, sum + at);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            if (from[i] == place) gradients[i] += of_maximum[i];
            values[i] = gradients[i] * silu_derivative(values[i]);
        }
        store(sum + at, values);
    }
}

// dx = the sum over each 2x2 window of `copies`, of an even height and width.
template <int VECTOR>
__device__ __forceinline__ void gather_copies(const bf16* copies, bf16* dx, int items, int height, int width, int channels) {
    const Window window(VECTOR, items, height, width, channels);
    if (!window.inside) return;
    float sums[VECTOR] = {};
#pragma unroll
    for (int place = 0; place < 4; ++place) {
        float values[VECTOR];
        load(values, copies + window.pixel(place, height, width, channels));
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sums[i] += values[i];
    }
    store(dx + window.maximum(height, width, channels), sums);
}

// Vectors of 8 channels, or single ones: the launch's tile has how many threads a block has and a thread's channels.
#define FOR_BOTH(KERNEL) KERNEL(8, ) KERNEL(1, _single)

#define VECTORS_KERNELS(VECTOR, SUFFIX)                                                                                    \
    extern "C" __global__ __launch_bounds__(THREADS) void conv_silu##SUFFIX(const bf16* sum, bf16* y, size_t count) {      \
        activate<VECTOR>(sum, y, count);                                                                                   \
    }                                                                                                                      \
    L2P_LAUNCH(conv_silu##SUFFIX, THREADS, 0, THREADS, VECTOR)                                                             \
    extern "C" __global__ __launch_bounds__(THREADS) void conv_silu_backward##SUFFIX(                                      \
        const bf16* dy, bf16* sum, size_t count) {                                                                         \
        activate_backward<VECTOR>(dy, sum, count);                                                                         \
    }                                                                                                                      \
    L2P_LAUNCH(conv_silu_backward##SUFFIX, THREADS, 0, THREADS, VECTOR)

#define WINDOWS_KERNELS(VECTOR, SUFFIX)                                                                                    \
    extern "C" __global__ __launch_bounds__(THREADS) void conv_silu_pool##SUFFIX(                                          \
        const bf16* sum, bf16* full, bf16* pooled, int items, int height, int width, int channels) {                       \
        activate_pool<VECTOR>(sum, full, pooled, items, height, width, channels);                                          \
    }                                                                                                                      \
    L2P_LAUNCH(conv_silu_pool##SUFFIX, THREADS, 0, THREADS, VECTOR)                                                        \
    extern "C" __global__ __launch_bounds__(THREADS) void conv_silu_pool_backward##SUFFIX(                                 \
        const bf16* d_full, const bf16* d_pooled, const bf16* full, bf16* sum, int items, int height, int width,           \
        int channels) {                                                                                                    \
        activate_pool_backward<VECTOR>(d_full, d_pooled, full, sum, items, height, width, channels);                       \
    }                                                                                                                      \
    L2P_LAUNCH(conv_silu_pool_backward##SUFFIX, THREADS, 0, THREADS, VECTOR)                                               \
    extern "C" __global__ __launch_bounds__(THREADS) void conv_gather_copies##SUFFIX(                                      \
        const bf16* copies, bf16* dx, int items, int height, int width, int channels) {                                    \
        gather_copies<VECTOR>(copies, dx, items, height, width, channels);                                                 \
    }                                                                                                                      \
    L2P_LAUNCH(conv_gather_copies##SUFFIX, THREADS, 0, THREADS, VECTOR)

FOR_BOTH(VECTORS_KERNELS)
FOR_BOTH(WINDOWS_KERNELS)

// ds = scale * dy, rounded.
template <typename Element>
__device__ __forceinline__ void scale_gradient(const Element* dy, bf16* ds, size_t count, float scale) {
    const size_t index = static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (index < count) ds[index] = from_float<bf16>(scale * to_float(dy[index]));
}

extern "C" __global__ __launch_bounds__(THREADS) void conv_scale_f32(const float* dy, bf16* ds, size_t count, float scale) {
    scale_gradient(dy, ds, count, scale);
}
L2P_LAUNCH(conv_scale_f32, THREADS, 0, THREADS, 1)

extern "C" __global__ __launch_bounds__(THREADS) void conv_scale_bf16(const bf16* dy, bf16* ds, size_t count, float scale) {
    scale_gradient(dy, ds, count, scale);
}
L2P_LAUNCH(conv_scale_bf16, THREADS, 0, THREADS, 1)

// Weights [outputs, taps, inputs] as those of the convolution that gives the gradients of the inputs from `first` on, `count` of
// them: [count, taps, outputs], taps mirrored.
extern "C" __global__ __launch_bounds__(THREADS) void conv_mirror(
    const bf16* weight, bf16* mirrored, int outputs, int taps, int inputs, int first, int count) {
    const size_t index = static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (index >= static_cast<size_t>(count) * taps * outputs) return;
    const int output = static_cast<int>(index % outputs), tap = static_cast<int>(index / outputs % taps);
    const int input = static_cast<int>(index / outputs / taps);
    mirrored[index] = weight[(static_cast<size_t>(output) * taps + taps - 1 - tap) * inputs + first + input];
}
L2P_LAUNCH(conv_mirror, THREADS, 0, THREADS)
