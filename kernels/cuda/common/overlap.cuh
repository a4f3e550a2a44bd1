// Kernels that begin while the one ahead of them still runs (Hopper's programmatic dependent launch).
//
// The engine launches such a kernel by `launch_overlapped`. Its blocks come onto multiprocessors as soon as every block of the kernel
// ahead has called `let_next_begin` and there is room; what that kernel leaves may be read, and anything written, only after
// `wait_for_previous`. Since each kernel waits, those ahead of the previous one are done by then as well. Weights, which nothing
// writes, may be read at once. Before Hopper both do nothing, and kernels follow one another as usual.
#pragma once

__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
