// Warpgroup products of 64 rows with 16, 32, 64, 128 or 256 columns, both operands in shared memory by rows; an addition to
// common/hopper.cuh, whose rules hold: between the issue and the wait nobody may touch registers or tiles.
//
// Operand A may start at any row of a tile and have any distance between its groups of eight rows: the swizzle is a function
// of the address's bits alone, as long as the tile was written so (bulk copies do). A convolution's operand for one tap is
// therefore the input tile itself, seen from a shifted start.
#pragma once
#include "common/hopper.cuh"

// Accumulators of 64 rows x COLUMNS: as Accumulators in common/hopper.cuh.
template <int COLUMNS>
using Sums64 = float[COLUMNS / 8][4];

// What a descriptor says of the swizzle of rows of ROW_BYTES bytes (128, 64 or 32), in its upper word.
template <int ROW_BYTES>
constexpr uint32_t SWIZZLE_OF_ROWS = (ROW_BYTES == 128 ? 1u : ROW_BYTES == 64 ? 2u : 3u) << 30;

// A tile of rows of ROW_BYTES as an operand by rows, seen from `start` bytes on (its first element); eight rows are followed
// by the next eight `GROUP_BYTES` after the first ones' start.
template <int ROW_BYTES, int GROUP_BYTES>
__device__ __forceinline__ uint64_t operand_rows(uint32_t start) {
    static_assert(GROUP_BYTES % 16 == 0 && GROUP_BYTES >> 4 < 1 << 14);
    constexpr uint32_t UNUSED = 1;  // the distance between panels: one product stays within one
    const uint32_t low = (start & DESCRIPTOR_ADDRESSES) >> 4 | UNUSED << 16;
    return static_cast<uint64_t>(SWIZZLE_OF_ROWS<ROW_BYTES> | GROUP_BYTES >> 4) << 32 | low;
}

#define L2P_REGISTERS_16(d) L2P_TILE_REGISTERS(d, 0), L2P_TILE_REGISTERS(d, 1)
#define L2P_REGISTERS_32(d) L2P_REGISTERS_16(d), L2P_TILE_REGISTERS(d, 2), L2P_TILE_REGISTERS(d, 3)
#define L2P_REGISTERS_64(d)                                                                                               \
    L2P_REGISTERS_32(d), L2P_TILE_REGISTERS(d, 4), L2P_TILE_REGISTERS(d, 5), L2P_TILE_REGISTERS(d, 6), L2P_TILE_REGISTERS(d, 7)

#define L2P_REGISTERS_256(d)                                                                                              \
    L2P_REGISTERS(d), L2P_TILE_REGISTERS(d, 16), L2P_TILE_REGISTERS(d, 17), L2P_TILE_REGISTERS(d, 18),                    \
        L2P_TILE_REGISTERS(d, 19), L2P_TILE_REGISTERS(d, 20), L2P_TILE_REGISTERS(d, 21), L2P_TILE_REGISTERS(d, 22),       \
        L2P_TILE_REGISTERS(d, 23), L2P_TILE_REGISTERS(d, 24), L2P_TILE_REGISTERS(d, 25), L2P_TILE_REGISTERS(d, 26),       \
        L2P_TILE_REGISTERS(d, 27), L2P_TILE_REGISTERS(d, 28), L2P_TILE_REGISTERS(d, 29), L2P_TILE_REGISTERS(d, 30),       \
        L2P_TILE_REGISTERS(d, 31)

#define L2P_ISSUE_BY_ROWS(COLUMNS, NAMES, A, B, ADD)                                                                      \
    __device__ __forceinline__ void issue_by_rows(Sums64<COLUMNS>& d, uint64_t a, uint64_t b, bool add) {                 \
        asm volatile(                                                                                                     \
            "{\n\t.reg .pred adding;\n\tsetp.ne.b32 adding, " ADD                                                         \
            ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.bf16.bf16 " NAMES ", " A ", " B                  \
            ", adding, 1, 1, 0, 0;\n\t}"                                                                                  \
            : L2P_REGISTERS_##COLUMNS(d)                                                                                  \
            : "l"(a), "l"(b), "r"(static_cast<int>(add))                                                                  \
            : "memory");                                                                                                  \
    }

L2P_ISSUE_BY_ROWS(16, "{%0, %1, %2, %3, %4, %5, %6, %7}", "%8", "%9", "%10")
L2P_ISSUE_BY_ROWS(32, "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}", "%16", "%17", "%18")
L2P_ISSUE_BY_ROWS(
    64,
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
    "%24, %25, %26, %27, %28, %29, %30, %31}",
    "%32", "%33", "%34")

L2P_ISSUE_BY_ROWS(
    256,
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
    "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
    "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
    "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, "
    "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "
    "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}",
    "%128", "%129", "%130")

// d = a b or, if `add`, d += a b for 64 x COLUMNS and 16 summed elements.
__device__ __forceinline__ void issue_by_rows(Sums64<128>& d, uint64_t a, uint64_t b, bool add) { issue_product(d, a, b, add); }

// Keeps the compiler from moving what computes or uses these registers across this point.
__device__ __forceinline__ void hold(Sums64<16>& d) { asm volatile("" : L2P_REGISTERS_16(d)::"memory"); }
__device__ __forceinline__ void hold(Sums64<32>& d) { asm volatile("" : L2P_REGISTERS_32(d)::"memory"); }
__device__ __forceinline__ void hold(Sums64<256>& d) { asm volatile("" : L2P_REGISTERS_256(d)::"memory"); }

// Waits until at most PENDING groups are under way; hold the accumulators afterwards.
template <int PENDING>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// ---- bulk copies beyond those of common/hopper.cuh ----

// As copy_box_3d, of a map of four dimensions.
__device__ __forceinline__ void copy_box_4d(uint32_t to, const TensorMap& map, int x, int y, int z, int w, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
        "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
        : "memory");
}

// And of five.
__device__ __forceinline__ void copy_box_5d(
    uint32_t to, const TensorMap& map, int x, int y, int z, int w, int v, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(to),
        "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v), "r"(barrier)
        : "memory");
}
