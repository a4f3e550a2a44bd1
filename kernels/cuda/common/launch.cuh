// How a kernel tells its launcher what it needs.
//
// `L2P_LAUNCH(kernel, threads, smem, tile...)` defines a symbol `kernel_launch` in the image, which the engine reads once
// when it loads the kernel. Block size, dynamic shared memory and tile shape are thus written in one place only, beside
// the kernel, and may differ between the Hopper and the portable image of the same source.
#pragma once
#include <cstdint>

struct LaunchInfo {
    uint32_t threads;       // threads per block
    uint32_t dynamic_smem;  // bytes of dynamic shared memory per block
    uint32_t tile[4];       // rows, columns, ... that one block covers; the kernel's comment says which
};

#define L2P_LAUNCH(kernel, threads, smem, ...)                                                        \
    extern "C" {                                                                                      \
    __device__ LaunchInfo kernel##_launch = {static_cast<uint32_t>(threads), static_cast<uint32_t>(smem), {__VA_ARGS__}}; \
    }
