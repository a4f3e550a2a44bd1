// Normal noise from a counter-based generator; engine/src/ops/noise.rs holds the contract.
//
// Every result equals the CPU's in every bit: the `_rn` intrinsics round each operation on its own and are never fused, and
// the order of operations is that of the Rust source. One counter, four elements per thread. Bound by memory and integer
// arithmetic: 4 bytes written and about 40 instructions per element.
#include "common/launch.cuh"
#include "common/types.cuh"

constexpr int THREADS = 256;
constexpr int ELEMENTS_PER_BLOCK = THREADS * 4;

// Ten rounds of Philox 4x32.
__device__ __forceinline__ uint4 philox4x32(uint4 counter, uint2 key) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t low0 = 0xd2511f53u * counter.x, high0 = __umulhi(0xd2511f53u, counter.x);
        const uint32_t low1 = 0xcd9e8d57u * counter.z, high1 = __umulhi(0xcd9e8d57u, counter.z);
        counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
        key.x += 0x9e3779b9u;
        key.y += 0xbb67ae85u;
    }
    return counter;
}

template <int COUNT>
__device__ __forceinline__ float horner(const float (&coefficients)[COUNT], float x) {
    float value = coefficients[COUNT - 1];
#pragma unroll
    for (int i = COUNT - 2; i >= 0; --i) value = __fadd_rn(__fmul_rn(value, x), coefficients[i]);
    return value;
}

__device__ __forceinline__ float natural_logarithm(float x) {
    constexpr float COEFFICIENTS[9] = {0.3333333f, -0.2499998f, 0.20000689f, -0.16669151f, 0.14251156f,
                                       -0.123967f, 0.11634661f, -0.116599336f, 0.07332539f};
    constexpr float LN_2_HIGH = 0.69314575f, LN_2_LOW = 1.4286068e-6f;
    const uint32_t bits = __float_as_uint(x);
    const int exponent = static_cast<int>(bits - 0x3f3504f3u) >> 23;
    const float f = __fsub_rn(__uint_as_float(bits - (static_cast<uint32_t>(exponent) << 23)), 1.0f);
    const float power = __int2float_rn(exponent);
    const float square = __fmul_rn(f, f);
    const float cubic = __fmul_rn(__fmul_rn(horner(COEFFICIENTS, f), f), square);
    const float tail = __fadd_rn(__fsub_rn(cubic, __fmul_rn(0.5f, square)), __fmul_rn(power, LN_2_LOW));
    return __fadd_rn(__fadd_rn(tail, f), __fmul_rn(power, LN_2_HIGH));
}

// Cosine and sine of 2 pi * word / 2^32.
__device__ __forceinline__ float2 cos_sin_of_turn(uint32_t word) {
    constexpr float COS[5] = {1.0f, -1.2337005f, 0.2536692f, -0.020860072f, 0.0009036317f};
    constexpr float SIN[5] = {1.5707964f, -0.6459641f, 0.07969258f, -0.0046812664f, 0.00015820675f};
    const uint32_t quarter = (word + (1u << 29)) >> 30;
    const float t = __fmul_rn(__int2float_rn(static_cast<int>(word - (quarter << 30))), 1.0f / 1073741824.0f);
    const float square = __fmul_rn(t, t);
    const float cos = horner(COS, square), sin = __fmul_rn(horner(SIN, square), t);
    switch (quarter) {
        case 0: return make_float2(cos, sin);
        case 1: return make_float2(-sin, cos);
        case 2: return make_float2(-cos, -sin);
        default: return make_float2(sin, -cos);
    }
}

// Two independent normal numbers from two random words.
__device__ __forceinline__ float2 normal_pair(uint32_t radius_word, uint32_t angle_word) {
    constexpr float UNIT = 1.0f / 4294967296.0f;
    const float uniform = __fadd_rn(__fmul_rn(__uint2float_rn(radius_word), UNIT), 0.5f * UNIT);
    const float radius = __fsqrt_rn(__fmul_rn(-2.0f, natural_logarithm(uniform)));
    const float2 direction = cos_sin_of_turn(angle_word);
    return make_float2(__fmul_rn(radius, direction.x), __fmul_rn(radius, direction.y));
}

// Elements 4 * index to 4 * index + 3 of a stream.
__device__ __forceinline__ float4 four_normals(size_t index, uint2 key, uint2 stream) {
    const uint4 counter =
        make_uint4(static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), stream.x, stream.y);
    const uint4 random = philox4x32(counter, key);
    const float2 a = normal_pair(random.x, random.y), b = normal_pair(random.z, random.w);
    return make_float4(a.x, a.y, b.x, b.y);
}

// Writes the first `count` of four values one by one.
__device__ __forceinline__ void store_some(float* output, float4 values, size_t count) {
    output[0] = values.x;
    if (count > 1) output[1] = values.y;
    if (count > 2) output[2] = values.z;
    if (count > 3) output[3] = values.w;
}

// output [elements], 16-byte aligned.
extern "C" __global__ __launch_bounds__(THREADS) void normal_noise(
    float* output, size_t elements, unsigned long long seed, unsigned long long stream) {
    const size_t index = static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x;
    const size_t first = index * 4;
    if (first >= elements) return;
    const float4 values = four_normals(
        L2P_FAULT_IF(18, index + (first + 4 > elements), index), make_uint2(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)),
        make_uint2(static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)));
    if (first + 4 <= elements) {
        *reinterpret_cast<float4*>(output + first) = values;
    } else {
        store_some(output + first, values, elements - first);
    }
}
L2P_LAUNCH(normal_noise, THREADS, 0, ELEMENTS_PER_BLOCK)

// output [items, elements]; origins [items]: low and high word of each item's seed and stream. Grid: (blocks of an item,
// items).
extern "C" __global__ __launch_bounds__(THREADS) void normal_noise_items(
    float* output, const uint4* origins, size_t elements) {
    const size_t index = static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x;
    const size_t first = index * 4;
    if (first >= elements) return;
    const uint4 origin = origins[blockIdx.y];
    const float4 values = four_normals(index, make_uint2(origin.x, origin.y), make_uint2(origin.z, origin.w));
    float* target = output + blockIdx.y * elements + first;
    // An item of other than a multiple of four elements leaves those after it unaligned.
    if (elements % 4 == 0) {
        *reinterpret_cast<float4*>(target) = values;
    } else {
        store_some(target, values, elements - first);
    }
}
L2P_LAUNCH(normal_noise_items, THREADS, 0, ELEMENTS_PER_BLOCK)
