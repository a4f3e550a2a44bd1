// Barriers among some of a block's warps, of which there are sixteen.
//
// A kernel names its own in one enum `NamedBarrier`, from 1 on (0 is __syncthreads()); a name may stand for several, of which
// an `index` picks one.
#pragma once
#include "common/types.cuh"

// Waits until `threads` threads, a multiple of 32, have come to the barrier; it orders their accesses to shared memory.
template <class NamedBarrier>
__device__ __forceinline__ void named_barrier_sync(NamedBarrier barrier, int index, int threads) {
    static_assert(__is_enum(NamedBarrier));
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(static_cast<int>(barrier) + index), "r"(threads) : "memory");
}

// Arrives at a barrier that `named_barrier_sync` of other warps waits for; `threads` counts both.
template <class NamedBarrier>
__device__ __forceinline__ void named_barrier_arrive(NamedBarrier barrier, int index, int threads) {
    static_assert(__is_enum(NamedBarrier));
    asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(static_cast<int>(barrier) + index), "r"(threads) : "memory");
}
