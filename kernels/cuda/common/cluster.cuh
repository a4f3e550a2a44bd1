// What the blocks of a Hopper cluster do to each other; an addition to common/hopper.cuh. Use inside
// `#if defined(__CUDA_ARCH_FEAT_SM90_ALL)`.
//
// A block must not leave while others may copy into its memory or arrive at its barriers: end with `cluster_sync`.
#pragma once
#include "common/hopper.cuh"

// This block's number within its cluster.
__device__ __forceinline__ int cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

// Waits for all threads of the cluster that have not left; orders their accesses to each other's memory.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Arrives at the barrier that stands at this address in the memory of block `rank`, after what this thread waited for. Orders no
// other accesses: a release at the cluster's scope is a fence of the whole GPU, a thousand cycles.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, int rank) {
    asm volatile(
        "{\n\t.reg .b32 there;\n\t"
        "mapa.shared::cluster.u32 there, %0, %1;\n\t"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// As copy_box_3d, of a map of two dimensions.
__device__ __forceinline__ void copy_box_2d(uint32_t to, const TensorMap& map, int x, int y, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(&map), "r"(x), "r"(y), "r"(barrier)
        : "memory");
}

// As copy_box_3d, of a map of two or four dimensions, to the same place in the memory of each block that has its bit in
// `blocks`; the bytes count on the barrier at the same place there.
__device__ __forceinline__ void copy_box_2d_to(uint32_t to, const TensorMap& map, int x, int y, uint32_t barrier, uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(x), "r"(y), "r"(barrier), "h"(blocks)
        : "memory");
}

__device__ __forceinline__ void copy_box_4d_to(
    uint32_t to, const TensorMap& map, int x, int y, int z, int w, uint32_t barrier, uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
        "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier), "h"(blocks)
        : "memory");
}
