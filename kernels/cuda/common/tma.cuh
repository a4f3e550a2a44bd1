// Hopper's bulk copies (TMA, the tensor memory accelerator). Use inside `#if defined(__CUDA_ARCH_FEAT_SM90_ALL)`.
//
// One thread has a box of a tensor copied into shared memory and goes on; the copy's bytes count on an mbarrier
// (common/mbarrier.cuh). A tensor map says where the tensor lies and how large the box is; what of a box lies outside the
// tensor becomes zeros, and counts.
//
// Tiles are what copies with a swizzle write: rows of 128 bytes, whose 16-byte units are exchanged by the row's number modulo 8
// (`swizzled<8>` of common/mma.cuh); a box of more columns than that is copied panel by panel. The swizzle is a function of the
// address's bits, so tiles start at multiples of 1024, where the pattern repeats.
#pragma once
#include "common/types.cuh"

constexpr int PANEL = 64;                                // columns of bf16
constexpr int PANEL_ROW_BYTES = PANEL * sizeof(bf16);    // 128
constexpr int SWIZZLE_ATOM_BYTES = 8 * PANEL_ROW_BYTES;  // the pattern repeats after eight rows

// What `TensorMap` on the Rust side encodes: a parameter `const __grid_constant__ TensorMap map`.
struct alignas(128) TensorMap {
    uint64_t words[16];
};

__device__ __forceinline__ void tma_prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Starts copying the map's box at (x, y, ...), x innermost, to shared memory. All bytes of the box count on the barrier.
__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(&map), "r"(x), "r"(y), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
        "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y, int z, int w) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
        "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y, int z, int w, int v) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(to),
        "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v), "r"(barrier)
        : "memory");
}

// The same to the same place in the memory of each block of the cluster that has its bit in `blocks`; the bytes count on the
// barrier at the same place there.
__device__ __forceinline__ void tma_load_multicast(
    uint32_t to, const TensorMap& map, uint32_t barrier, uint16_t blocks, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(x), "r"(y), "r"(barrier), "h"(blocks)
        : "memory");
}

__device__ __forceinline__ void tma_load_multicast(
    uint32_t to, const TensorMap& map, uint32_t barrier, uint16_t blocks, int x, int y, int z, int w) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
        "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier), "h"(blocks)
        : "memory");
}

// Starts copying `bytes` consecutive bytes, a multiple of 16, between addresses that are too, without a map.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, uint32_t barrier, int bytes) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
        "r"(bytes), "r"(barrier)
        : "memory");
}
