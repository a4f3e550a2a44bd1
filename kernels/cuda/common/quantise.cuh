// Numbers of eight bits with a scale: what a row, or a group of 128 elements of it, is multiplied by to fit them.
// engine/src/ops/quantise.rs holds the contract.
//
// Integers are evenly spaced, so one large element takes the others' bits: each group of 128 is first rotated by a Hadamard
// matrix, which spreads it over the group. Its butterflies, one for each of the seven bits of an element's number, may be
// done in any order, hence wherever the elements are: in a thread's registers or in neighbouring lanes. The factor 1/√128 is
// left to the scale.
#pragma once
#include <cuda_fp8.h>

#include "common/types.cuh"

constexpr int SCALE_GROUP = 128;

// What a magnitude below this counts as, so that zeros have a scale.
constexpr float SMALLEST_MAGNITUDE = 0x1p-100f;

struct Int8 {
    static constexpr float LARGEST = 127.0f;
    static constexpr float SPREAD = 0.08838834764831845f;  // 1/√128: rotated
    static constexpr bool ROTATED = true;

    // Four values of at most LARGEST, rounded to nearest even, the first in the lowest byte.
    __device__ __forceinline__ static uint32_t pack(float a, float b, float c, float d) {
        uint32_t upper, all;
        asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(upper) : "r"(__float2int_rn(d)), "r"(__float2int_rn(c)), "r"(0));
        asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(all) : "r"(__float2int_rn(b)), "r"(__float2int_rn(a)), "r"(upper));
        return all;
    }
    __device__ __forceinline__ static float unpack(uint8_t code) { return static_cast<float>(static_cast<int8_t>(code)); }
};

struct Float8 {
    static constexpr float LARGEST = 448.0f;
    static constexpr float SPREAD = 1.0f;
    static constexpr bool ROTATED = false;

    __device__ __forceinline__ static uint32_t pack(float a, float b, float c, float d) {
        const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
        const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
        return high << 16 | low;
    }
    __device__ __forceinline__ static float unpack(uint8_t code) {
        const __half_raw half = __nv_cvt_fp8_to_halfraw(code, __NV_E4M3);
        return __half2float(half);
    }
};

// Magnitudes are compared as the bits of floats, by which NaN is the largest: it reaches the scale, and so the result.
__device__ __forceinline__ uint32_t magnitude(float value) { return __float_as_uint(value) & 0x7fffffffu; }

struct Scale {
    float scale;    // what a code is multiplied by
    float inverse;  // what a value, rotated without its factor, is multiplied by to give a code
};

template <class Coding>
__device__ __forceinline__ Scale scale_of(uint32_t largest) {
    float value = __uint_as_float(largest);
    if (value < SMALLEST_MAGNITUDE) value = SMALLEST_MAGNITUDE;
    return {value * (Coding::SPREAD / Coding::LARGEST), Coding::LARGEST / value};
}

// ---- butterflies ----

__device__ __forceinline__ void butterfly(float& first, float& second) {
    const float sum = first + second;
    second = first - second;
    first = sum;
}

// Of all COUNT values of a thread, over every bit of their numbers.
template <int COUNT>
__device__ __forceinline__ void rotate_own(float (&value)[COUNT]) {
#pragma unroll
    for (int bit = 1; bit < COUNT; bit *= 2)
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (!(i & bit)) butterfly(value[i], value[i | bit]);
        }
}

// With the lane whose number differs in one bit.
template <int COUNT>
__device__ __forceinline__ void rotate_lanes(float (&value)[COUNT], int bit) {
    const float sign = threadIdx.x & bit ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) value[i] = fmaf(sign, value[i], __shfl_xor_sync(FULL_WARP, value[i], bit));
}

// ---- groups whose elements stand one after the other, eight in each of sixteen lanes ----

constexpr int GROUP_LANES = SCALE_GROUP / 8;

__device__ __forceinline__ void rotate_run(float (&value)[8]) {
    rotate_own(value);
#pragma unroll
    for (int bit = 1; bit < GROUP_LANES; bit *= 2) rotate_lanes(value, bit);
}

__device__ __forceinline__ uint32_t largest_of(const float (&value)[8]) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = max(largest, magnitude(value[i]));
    return largest;
}

// The largest of LANES neighbouring lanes, in each of them.
template <int LANES>
__device__ __forceinline__ uint32_t largest_of_lanes(uint32_t largest) {
#pragma unroll
    for (int bit = 1; bit < LANES; bit *= 2) largest = max(largest, __shfl_xor_sync(FULL_WARP, largest, bit));
    return largest;
}

template <class Coding>
__device__ __forceinline__ uint2 pack_run(const float (&value)[8], float inverse) {
    return make_uint2(Coding::pack(value[0] * inverse, value[1] * inverse, value[2] * inverse, value[3] * inverse),
                      Coding::pack(value[4] * inverse, value[5] * inverse, value[6] * inverse, value[7] * inverse));
}

// ---- groups that are a row of accumulators: pairs of columns 8 t + 2 member for t < 16 in each of four lanes ----

// Writes a row's 128 codes; returns its scale, in all four lanes. Whole warps call it, whether their rows are `valid` or not.
template <class Coding>
__device__ __forceinline__ float store_row_of_codes(uint8_t* codes, float (&value)[2 * SCALE_GROUP / 8], int member, bool valid) {
    constexpr int TILES = SCALE_GROUP / 8;
    if constexpr (Coding::ROTATED) {
        rotate_own(value);
        rotate_lanes(value, 1);
        rotate_lanes(value, 2);
    }
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) largest = max(largest, magnitude(value[i]));
    const Scale scale = scale_of<Coding>(largest_of_lanes<4>(largest));
    // A word holds the pairs of two neighbouring tiles; exchanged, a lane has four lanes' words of the same tiles: 16 columns.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* const pairs = &value[16 * half + 4 * i];
            words[i] = Coding::pack(pairs[0] * scale.inverse, pairs[1] * scale.inverse, pairs[2] * scale.inverse, pairs[3] * scale.inverse);
        }
        exchange_words(words, member);
        const uint4 run = make_uint4(__byte_perm(words[0], words[1], 0x5410), __byte_perm(words[2], words[3], 0x5410),
                                     __byte_perm(words[0], words[1], 0x7632), __byte_perm(words[2], words[3], 0x7632));
        if (valid) *reinterpret_cast<uint4*>(codes + 64 * half + 16 * member) = run;
    }
    return scale.scale;
}
