// Group normalisation over NHWC images, optionally with SiLU; engine/src/ops/group_norm.rs holds the contract.
//
// Three launches: moments of slabs of pixels, their combination to one factor and offset per item and channel, and the
// result. Bound by memory: 4 bytes read and 2 written per element. A thread always holds the same eight channels and steps
// over pixels; a block covers `slab` pixels of one item. Sums are of differences to the slab's first pixel, so that a large
// mean cancels before it is squared, and slabs are combined by mean and squared deviation, in a fixed order.
#include "common/launch.cuh"
#include "common/reduce.cuh"

constexpr int THREADS = 256;
constexpr int VECTOR = 8;
constexpr int MAX_CHANNELS = THREADS * VECTOR;
constexpr int COMBINE_THREADS = 128;

// The number of values, their mean, and the sum of their squared deviations from it.
template <typename T>
struct Moments {
    T count, mean, deviation;
};

template <typename T>
__device__ __forceinline__ Moments<T> combine(const Moments<T>& a, const Moments<T>& b) {
    const T count = a.count + b.count;
    if (count == T(0)) return a;
    const T distance = b.mean - a.mean, share = b.count / count;
    return {count, a.mean + distance * share, a.deviation + b.deviation + distance * distance * a.count * share};
}

// moments[item, block, group] = (mean, squared deviation) over the group's channels of `slab` pixels; grid (blocks, items).
extern "C" __global__ __launch_bounds__(THREADS) void group_norm_moments(
    const bf16* x, float2* moments, size_t pixels, int channels, int groups, int slab) {
    __shared__ __align__(16) float sums[MAX_CHANNELS];
    __shared__ __align__(16) float squares[MAX_CHANNELS];
    const int vectors = channels / VECTOR, rows = THREADS / vectors;  // rows: pixels that the block reads at once
    const int vector = threadIdx.x % vectors, row = threadIdx.x / vectors;
    const size_t start = static_cast<size_t>(blockIdx.x) * slab;
    const int count = static_cast<int>(min(static_cast<size_t>(slab), pixels - start));
    const bf16* const from = x + (blockIdx.y * pixels + start) * channels;

    float sum[VECTOR] = {}, square[VECTOR] = {};
    if (row < rows) {
        float pivot[VECTOR];
        load8(pivot, from + vector * VECTOR);
#pragma unroll 4
        for (int pixel = row; pixel < count; pixel += rows) {
            float values[VECTOR];
            load8(values, from + static_cast<size_t>(pixel) * channels + vector * VECTOR);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                const float difference = values[i] - pivot[i];
                sum[i] += difference;
                square[i] += difference * difference;
            }
        }
    }
    // [rows, channels], which is at most MAX_CHANNELS.
    if (row < rows) {
        store8(sums + row * channels + vector * VECTOR, sum);
        store8(squares + row * channels + vector * VECTOR, square);
    }
    __syncthreads();  // all rows' sums are there
    for (int channel = threadIdx.x; channel < channels; channel += THREADS) {
        float total = 0.0f, total_square = 0.0f;
        for (int i = 0; i < rows; ++i) {
            total += sums[i * channels + channel];
            total_square += squares[i * channels + channel];
        }
        // Only this thread has read and only it writes this channel's first entries.
        sums[channel] = to_float(from[channel]) + total / count;
        squares[channel] = fmaxf(total_square - total * total / count, 0.0f);
    }
    __syncthreads();  // every channel's mean and deviation are there
    const int width = channels / groups;
    for (int group = threadIdx.x; group < groups; group += THREADS) {
        Moments<float> whole = {0.0f, 0.0f, 0.0f};
        for (int channel = group * width; channel < (group + 1) * width; ++channel) {
            whole = combine(whole, {static_cast<float>(count), sums[channel], squares[channel]});
        }
        moments[(static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x) * groups + group] = make_float2(whole.mean, whole.deviation);
    }
}
L2P_LAUNCH(group_norm_moments, THREADS, 0, MAX_CHANNELS)

// factors[item, 0, channel] = weight / standard deviation, factors[item, 1, channel] = bias - mean * that; grid (groups, items).
extern "C" __global__ __launch_bounds__(COMBINE_THREADS) void group_norm_factors(
    const float2* moments, const bf16* weight, const bf16* bias, float* factors, size_t pixels, int channels, int slab,
    int blocks, float epsilon) {
    __shared__ Moments<double> partial[COMBINE_THREADS];
    const int group = blockIdx.x, groups = gridDim.x, width = channels / groups;
    Moments<double> mine = {0.0, 0.0, 0.0};
    for (int block = threadIdx.x; block < blocks; block += COMBINE_THREADS) {
        const size_t start = static_cast<size_t>(block) * slab;
        const double count = static_cast<double>(min(static_cast<size_t>(slab), pixels - start)) * width;
        const float2 moment = moments[(static_cast<size_t>(blockIdx.y) * blocks + block) * groups + group];
        mine = combine(mine, {count, static_cast<double>(moment.x), static_cast<double>(moment.y)});
    }
    partial[threadIdx.x] = mine;
    __syncthreads();  // all threads' moments are there
    for (int half = COMBINE_THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) partial[threadIdx.x] = combine(partial[threadIdx.x], partial[threadIdx.x + half]);
        __syncthreads();  // this half is combined before the next is
    }
    const double mean = partial[0].mean, variance = partial[0].deviation / partial[0].count;
    const double inverse = 1.0 / sqrt(variance + epsilon);
    float* const item = factors + static_cast<size_t>(blockIdx.y) * 2 * channels;
    for (int channel = group * width + threadIdx.x; channel < (group + 1) * width; channel += COMBINE_THREADS) {
        const double factor = inverse * to_float(weight[channel]);
        item[channel] = static_cast<float>(factor);
        item[channels + channel] = static_cast<float>(to_float(bias[channel]) - mean * factor);
    }
}
L2P_LAUNCH(group_norm_factors, COMBINE_THREADS, 0, 0)

// y = x * factors[item, 0] + factors[item, 1], through SiLU if asked for; grid (blocks, items).
extern "C" __global__ __launch_bounds__(THREADS) void group_norm_apply(
    const bf16* x, const float* factors, bf16* y, size_t pixels, int channels, int slab, int with_silu) {
    const int vectors = channels / VECTOR, rows = THREADS / vectors;
    const int vector = threadIdx.x % vectors, row = threadIdx.x / vectors;
    if (row >= rows) return;
    const size_t start = static_cast<size_t>(blockIdx.x) * slab;
    const int count = static_cast<int>(min(static_cast<size_t>(slab), pixels - start));
    const size_t base = (blockIdx.y * pixels + start) * channels + vector * VECTOR;
    const float* const item = factors + static_cast<size_t>(blockIdx.y) * 2 * channels;
    float factor[VECTOR], offset[VECTOR];
    load8(factor, item + vector * VECTOR);
    load8(offset, item + channels + vector * VECTOR);
#pragma unroll 4
    for (int pixel = row; pixel < count; pixel += rows) {
        const size_t at = base + static_cast<size_t>(pixel) * channels;
        float values[VECTOR];
        load8(values, x + at);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            values[i] = values[i] * factor[i] + offset[i];
            if (with_silu) values[i] = silu(values[i]);
        }
        store8(y + at, values);
    }
}
L2P_LAUNCH(group_norm_apply, THREADS, 0, 0)
