// Every instance of common/wgmma.cuh, so that those no kernel uses yet compile too. Never launched.
#include "common/launch.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "common/pipeline.cuh"

// All three forms of one instance, in each order of the operands that the type allows.
template <class Operand, class Sum, int N, Major... ORDERS>
__device__ __forceinline__ void use(Sum* out, uint32_t tile, const uint32_t (&registers)[4], bool add) {
    const uint64_t a = k_major_panel(tile, 0), b = k_major_panel(tile + SWIZZLE_ATOM_BYTES, 0);
    Accumulators<N, Sum> d = {};
    wgmma_fence(d);
    wgmma_fresh<Operand>(d, a, b);
    (wgmma<Operand, ORDERS, ORDERS>(d, a, b, add), ...);
    (wgmma<Operand, ORDERS>(d, registers, b, add), ...);
    wgmma_commit();
    wgmma_wait<0>(d);
    hold(d);
#pragma unroll
    for (int i = 0; i < N / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) out[(4 * i + j) * WARPGROUP + threadIdx.x] = d[i][j];
}

#define INSTANCE(name, Operand, Sum, N, ...)                                                                             \
    extern "C" __global__ __launch_bounds__(WARPGROUP, 1) void wgmma_##name##_##N(Sum* out, const uint32_t* a, int add) { \
        extern __shared__ __align__(1024) unsigned char memory[];                                                        \
        const uint32_t registers[4] = {a[0], a[1], a[2], a[3]};                                                          \
        use<Operand, Sum, N, __VA_ARGS__>(out, shared_address(memory), registers, add != 0);                             \
    }
#define INSTANCES(N, ...)                                      \
    INSTANCE(bf16, bf16, float, N, Major::K, Major::MN)        \
    INSTANCE(e4m3, e4m3, float, N, Major::K)                   \
    INSTANCE(s8, s8, int32_t, N, Major::K)
L2P_FOR_EVERY_N(INSTANCES)
#endif
