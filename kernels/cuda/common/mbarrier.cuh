// Hopper's mbarriers, and what the blocks of a cluster do to each other's. Use inside `#if defined(__CUDA_ARCH_FEAT_SM90_ALL)`.
//
// An mbarrier is 8 bytes of shared memory that count. A phase of it ends when the expected threads have arrived and the
// expected bytes (`expect_tx`) have been copied; then the next begins. Who waits names a phase by its parity, counted from 0:
// it must never be more than one phase behind or ahead, since the parity does not tell a phase from the one before last.
//
// `barrier` is the barrier's shared address.
#pragma once
#include "common/types.cuh"

// By one thread, before anybody uses it; `mbarrier_init_fence` and __syncthreads() or `cluster_sync` must follow.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes what this thread wrote to shared memory visible to bulk copies and to wgmma, which read it through another proxy; a
// barrier among threads must follow.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Makes initialised barriers visible to the cluster and to bulk copies.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    async_proxy_fence();
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the phase wait for so many bytes of bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, int parity) {
    uint32_t done;
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, done;\n\t}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}

// Waits until the phase with this parity has ended. A barrier that was never used counts as past a phase of parity 1.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
    while (!mbarrier_try_wait(barrier, parity)) {
    }
}

// ---- clusters ----
//
// A block must not leave while others may copy into its memory or arrive at its barriers: end with `cluster_sync`.

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

// Arrives at the barrier that stands at this address in the memory of block `rank`, after what this thread waited for. Orders
// no other accesses: a release at the cluster's scope is a fence of the whole GPU, a thousand cycles.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier, int rank) {
    asm volatile(
        "{\n\t.reg .b32 there;\n\t"
        "mapa.shared::cluster.u32 there, %0, %1;\n\t"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}
