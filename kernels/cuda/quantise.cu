// Tokens and weights to numbers of eight bits and back, as passes of their own: for weights when they are loaded, and where what
// makes the tokens does not write codes itself; engine/src/ops/quantise.rs holds the contract.
//
// Bound by memory: 2 bytes read and 1 written per element, or the reverse.
#include "common/launch.cuh"
#include "common/quantise.cuh"
#include "common/row_part.cuh"

// One block per row, which it holds in registers. x, codes [rows, width]; scales [rows].
template <class Coding>
__device__ __forceinline__ void quantise_rows(const bf16* x, uint8_t* codes, float* scales, int width) {
    constexpr int VECTORS = 8;
    __shared__ uint32_t scratch[MAX_WARPS];
    const size_t row = blockIdx.x;
    const int vectors = width / 8;
    Packed<VECTORS> packed;
    read(packed, x + row * width, vectors);
    Part<VECTORS> part;
    unpack(part, packed);
    const float scale = store_codes<Coding>(codes + row * width, part, vectors, scratch);
    if (threadIdx.x == 0) scales[row] = scale;
}

// Sixteen lanes per group. x, codes [rows, width]; scales [width / SCALE_GROUP, rows].
constexpr int THREADS = 256;
constexpr int GROUPS = THREADS / GROUP_LANES;  // per block

template <class Coding>
__device__ __forceinline__ void quantise_groups(const bf16* x, uint8_t* codes, float* scales, int rows, int width) {
    const int of_row = width / SCALE_GROUP;
    const size_t group = static_cast<size_t>(blockIdx.x) * GROUPS + threadIdx.x / GROUP_LANES;
    const bool valid = group < static_cast<size_t>(rows) * of_row;  // the same for a group's lanes, all of which take part
    const size_t first = group * SCALE_GROUP + threadIdx.x % GROUP_LANES * 8;
    float value[8] = {};
    if (valid) load8(value, x + first);
    if constexpr (Coding::ROTATED) rotate_run(value);
    const Scale scale = scale_of<Coding>(largest_of_lanes<GROUP_LANES>(largest_of(value)));
    if (!valid) return;
    *reinterpret_cast<uint2*>(codes + first) = pack_run<Coding>(value, scale.inverse);
    if (threadIdx.x % GROUP_LANES == 0) scales[group % of_row * rows + group / of_row] = scale.scale;
}

// Values of codes; rotated back where `back` says so. `by_groups` says which of the two layouts the scales have. output
// [rows, width].
template <class Coding>
__device__ __forceinline__ void dequantise(
    const uint8_t* codes, const float* scales, bf16* output, int rows, int width, bool by_groups, bool back) {
    const int of_row = width / SCALE_GROUP;
    const size_t group = static_cast<size_t>(blockIdx.x) * GROUPS + threadIdx.x / GROUP_LANES;
    const bool valid = group < static_cast<size_t>(rows) * of_row;
    const size_t first = group * SCALE_GROUP + threadIdx.x % GROUP_LANES * 8;
    uint2 packed = make_uint2(0, 0);
    float scale = 0.0f;
    if (valid) {
        packed = *reinterpret_cast<const uint2*>(codes + first);
        scale = scales[by_groups ? group % of_row * rows + group / of_row : group / of_row];
    }
    float value[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = Coding::unpack((i < 4 ? packed.x : packed.y) >> 8 * (i % 4)) * scale;
    if (Coding::ROTATED && back) {
        rotate_run(value);
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] *= Coding::SPREAD;
    }
    if (valid) store8(output + first, value);
}

#define QUANTISE_KERNELS(Coding, suffix)                                                                                     \
    extern "C" __global__ __launch_bounds__(MAX_THREADS) void quantise_rows_##suffix(                                        \
        const bf16* x, uint8_t* codes, float* scales, int width) {                                                           \
        quantise_rows<Coding>(x, codes, scales, width);                                                                      \
    }                                                                                                                        \
    L2P_LAUNCH(quantise_rows_##suffix, MAX_THREADS, 0, MAX_THREADS * 8 * 8)                                                  \
    extern "C" __global__ __launch_bounds__(THREADS) void quantise_groups_##suffix(                                          \
        const bf16* x, uint8_t* codes, float* scales, int rows, int width) {                                                 \
        quantise_groups<Coding>(x, codes, scales, rows, width);                                                              \
    }                                                                                                                        \
    L2P_LAUNCH(quantise_groups_##suffix, THREADS, 0, GROUPS)                                                                 \
    extern "C" __global__ __launch_bounds__(THREADS) void dequantise_##suffix(                                               \
        const uint8_t* codes, const float* scales, bf16* output, int rows, int width, int by_groups, int back) {             \
        dequantise<Coding>(codes, scales, output, rows, width, by_groups != 0, back != 0);                                   \
    }                                                                                                                        \
    L2P_LAUNCH(dequantise_##suffix, THREADS, 0, GROUPS)

QUANTISE_KERNELS(Int8, s8)
QUANTISE_KERNELS(Float8, e4m3)
