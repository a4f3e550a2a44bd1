// The part of a row that a thread holds, for normalisations whose blocks take rows one after the other.
#pragma once
#include "common/quantise.cuh"
#include "common/reduce.cuh"

constexpr int MAX_THREADS = 256;
constexpr int MAX_WARPS = MAX_THREADS / WARP;

// The part of a row that one thread holds: vector i is vector threadIdx.x + i * blockDim.x of the row.
template <int VECTORS>
struct Part {
    float value[VECTORS][8];
};
template <int VECTORS>
struct Packed {
    uint4 vector[VECTORS];
};

template <int VECTORS>
__device__ __forceinline__ void read(Packed<VECTORS>& packed, const bf16* row, int vectors) {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int vector = threadIdx.x + i * blockDim.x;
        packed.vector[i] = vector < vectors ? reinterpret_cast<const uint4*>(row)[vector] : make_uint4(0, 0, 0, 0);
    }
}

template <int VECTORS>
__device__ __forceinline__ void unpack(Part<VECTORS>& part, const Packed<VECTORS>& packed) {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) load8(part.value[i], reinterpret_cast<const bf16*>(&packed.vector[i]));
}

template <int VECTORS>
__device__ __forceinline__ void write(bf16* row, const Part<VECTORS>& part, int vectors) {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector < vectors) store8(row + vector * 8, part.value[i]);
    }
}

// weight * map(vector), or the weight alone where there is no vector. Both are on their way before either is waited for.
template <int VECTORS, class Map>
__device__ __forceinline__ void load_factor(Part<VECTORS>& factor, const bf16* weight, const float* from, int vectors, const Map& map) {
    Packed<VECTORS> packed;
    read(packed, weight, vectors);
    if (from == nullptr) {
        unpack(factor, packed);
        return;
    }
    float values[VECTORS][8] = {};
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector < vectors) load8(values[i], from + vector * 8);
    }
    unpack(factor, packed);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) factor.value[i][j] *= map(values[i][j]);
}

// weight * (1 + scale).
template <int VECTORS>
__device__ __forceinline__ void load_scaled(Part<VECTORS>& factor, const bf16* weight, const float* scale, int vectors) {
    load_factor(factor, weight, scale, vectors, [](float value) { return 1.0f + value; });
}

// weight * tanh(gate).
template <int VECTORS>
__device__ __forceinline__ void load_gated(Part<VECTORS>& factor, const bf16* weight, const float* gate, int vectors) {
    load_factor(factor, weight, gate, vectors, [](float value) { return fast_tanh(value); });
}

// Sums over the block, two in flight: the scratch of one is free again once every thread has passed the barrier of the next.
struct RowSums {
    float (*scratch)[MAX_WARPS];
    int turn = 0;

    __device__ __forceinline__ float operator()(float value) {
        float* sums = scratch[turn];
        turn ^= 1;
        value = warp_sum(value);
        if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = value;
        __syncthreads();  // all warps' sums are written before they are read
        float total = 0.0f;
        for (int warp = L2P_FAULT_IF(12, 1, 0); warp < blockDim.x / WARP; ++warp) total += sums[warp];
        return total;
    }
};

// The same for two sums at once.
struct RowSumPairs {
    float2 (*scratch)[MAX_WARPS];
    int turn = 0;

    __device__ __forceinline__ float2 operator()(float first, float second) {
        float2* sums = scratch[turn];
        turn ^= 1;
        first = warp_sum(first);
        second = warp_sum(second);
        if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = make_float2(first, second);
        __syncthreads();  // all warps' sums are written before they are read
        float2 total = make_float2(0.0f, 0.0f);
        for (int warp = 0; warp < blockDim.x / WARP; ++warp) total.x += sums[warp].x, total.y += sums[warp].y;
        return total;
    }
};

// ---- rows in eight bits ----

// The largest of all threads of the block, to each of them; whoever uses the scratch again passes another barrier first.
__device__ __forceinline__ uint32_t row_largest(uint32_t value, uint32_t* scratch) {
    value = __reduce_max_sync(FULL_WARP, value);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();  // all warps' are written before they are read
    uint32_t largest = 0;
    for (int warp = 0; warp < blockDim.x / WARP; ++warp) largest = max(largest, scratch[warp]);
    return largest;
}

// Writes a row's codes; returns its one scale. A row is whole groups of SCALE_GROUP elements; all threads of the block call it.
template <class Coding, int VECTORS>
__device__ __forceinline__ float store_codes(uint8_t* codes, Part<VECTORS>& part, int vectors, uint32_t* scratch) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        if constexpr (Coding::ROTATED) rotate_run(part.value[i]);
        largest = max(largest, largest_of(part.value[i]));
    }
    const Scale scale = scale_of<Coding>(row_largest(largest, scratch));
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int vector = threadIdx.x + i * blockDim.x;
        if (vector < vectors) reinterpret_cast<uint2*>(codes)[vector] = pack_run<Coding>(part.value[i], scale.inverse);
    }
    return scale.scale;
}
