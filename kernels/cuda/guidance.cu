// Classifier-free guidance and a sampler's step; engine/src/ops/guidance.rs holds the contract.
//
// Bound by memory: 8 bytes read and 4 written per element, 12 and 4 with guidance.
#include "common/launch.cuh"
#include "common/types.cuh"

constexpr int THREADS = 256;
constexpr int ELEMENTS_PER_BLOCK = THREADS * 4;

struct Step {
    float cfg, keep, add;
    bool guided;

    __device__ __forceinline__ float operator()(float x, float positive, float negative) const {
        // With a keep of 1 as x + prediction * add, rounded once.
        return fmaf(guided ? negative + cfg * (positive - negative) : positive, add, __fmul_rn(keep, x));
    }
};

// x, positive, negative [elements]; without guidance `negative` is null and `positive` is the prediction. factors: keep, add.
extern "C" __global__ __launch_bounds__(THREADS) void guided_euler_step(
    float* x, const float* positive, const float* negative, size_t elements, float cfg,
    const float* factors) {
    const bool guided = negative != nullptr;
    const Step step{cfg, factors[0], factors[1], guided};
    const size_t first = static_cast<size_t>(blockIdx.x) * ELEMENTS_PER_BLOCK;
    const size_t starts = reinterpret_cast<size_t>(x) | reinterpret_cast<size_t>(positive) | reinterpret_cast<size_t>(negative);
    if (starts % sizeof(float4) == 0 && elements % 4 == 0) {
        const size_t index = first + threadIdx.x * 4;
        if (index >= elements) return;
        float4 value = *reinterpret_cast<const float4*>(x + index);
        const float4 v = *reinterpret_cast<const float4*>(positive + index);
        const float4 away = guided ? *reinterpret_cast<const float4*>(negative + index) : v;
        value.x = step(value.x, v.x, away.x);
        value.y = step(value.y, v.y, away.y);
        value.z = step(value.z, v.z, away.z);
        value.w = step(value.w, v.w, away.w);
        *reinterpret_cast<float4*>(x + index) = value;
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const size_t index = first + i * THREADS + threadIdx.x;
            if (index < elements) x[index] = step(x[index], positive[index], guided ? negative[index] : 0.0f);
        }
    }
}
L2P_LAUNCH(guided_euler_step, THREADS, 0, ELEMENTS_PER_BLOCK)
