// Element types and their vectors: bf16 in memory, f32 in registers.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

#include "common/fault.cuh"

using bf16 = __nv_bfloat16;

constexpr int WARP = 32;
constexpr unsigned FULL_WARP = 0xffffffffu;

// What one access moves.
template <int BYTES>
struct WordOf;
template <>
struct WordOf<4> {
    using Type = uint32_t;
};
template <>
struct WordOf<8> {
    using Type = uint2;
};
template <>
struct WordOf<16> {
    using Type = uint4;
};

// Consecutive bf16 values, moved as one access. Left to itself the compiler copies pair by pair, since pairs are classes with an
// assignment of their own.
template <int COUNT>
struct alignas(COUNT * 2) Bf16Run {
    using Word = typename WordOf<COUNT * 2>::Type;
    __nv_bfloat162 pair[COUNT / 2];

    Bf16Run() = default;
    __device__ __forceinline__ Bf16Run(const Bf16Run& from) { *this = from; }
    __device__ __forceinline__ Bf16Run& operator=(const Bf16Run& from) {
        *reinterpret_cast<Word*>(pair) = *reinterpret_cast<const Word*>(from.pair);
        return *this;
    }
};
using Bf16x8 = Bf16Run<8>;

// Reads eight consecutive bf16 values at a 16-byte aligned address.
__device__ __forceinline__ void load8(float (&out)[8], const bf16* from) {
    const Bf16x8 packed = *reinterpret_cast<const Bf16x8*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = __bfloat1622float2(packed.pair[i]);
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
    }
}

// Writes eight values, rounded to nearest even, to a 16-byte aligned address.
__device__ __forceinline__ void store8(bf16* to, const float (&values)[8]) {
    Bf16x8 packed;
#pragma unroll
    for (int i = 0; i < 4; ++i) packed.pair[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
    *reinterpret_cast<Bf16x8*>(to) = packed;
}

// The same for f32 arrays at a 16-byte aligned address, so that templates need not care which they read.
__device__ __forceinline__ void load8(float (&out)[8], const float* from) {
    const float4 low = reinterpret_cast<const float4*>(from)[0];
    const float4 high = reinterpret_cast<const float4*>(from)[1];
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}

__device__ __forceinline__ void store8(float* to, const float (&values)[8]) {
    reinterpret_cast<float4*>(to)[0] = make_float4(values[0], values[1], values[2], values[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(values[4], values[5], values[6], values[7]);
}

__device__ __forceinline__ float to_float(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(float value) { return value; }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
    return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// One operation of the special function units; its error is a quarter of bf16's rounding.
__device__ __forceinline__ float fast_tanh(float x) {
    float tangent;
    asm("tanh.approx.f32 %0, %1;" : "=f"(tangent) : "f"(x));
    return tangent;
}

// silu by way of the tangent, to a fifth of bf16's rounding.
__device__ __forceinline__ float silu_by_tanh(float x) {
    const float half = 0.5f * x;
    return fmaf(half, fast_tanh(half), half);
}

// Transposes a matrix of 4 x 4 words of which each of four neighbouring lanes, `member` among them, holds a row: afterwards word i
// is what lane i had as word `member`. First within the quarters' 2 x 2 words, then the quarters.
__device__ __forceinline__ void exchange_words(uint32_t (&words)[4], int member) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = member & bit;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            if (t & bit) continue;
            const uint32_t received = __shfl_xor_sync(FULL_WARP, upper ? words[t] : words[t | bit], bit);
            if (upper) {
                words[t] = received;
            } else {
                words[t | bit] = received;
            }
        }
    }
}
