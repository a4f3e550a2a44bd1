// Warpgroup products whose summed elements are the rows of both tiles: d += aᵀ b, for 64 columns of a and COLUMNS of b; an
// addition to common/products.cuh, whose rules hold.
//
// Tiles are what bulk copies write: rows of ROW_BYTES bytes, which are at most the 64 columns of a swizzle's span. A product
// that needs more columns takes them from panels, each PANEL_BYTES after the one before. These are addresses and nothing else:
// panels may be different tiles, or the same tile seen from a row further on. As there the swizzle is a function of the
// address's bits alone.
#pragma once
#include "common/products.cuh"

// A tile seen from `start` on, for one product: 16 rows, of which eight are followed by the next eight `GROUP_BYTES` after the
// first ones' start.
template <int ROW_BYTES, int GROUP_BYTES, int PANEL_BYTES>
__device__ __forceinline__ uint64_t operand_columns(uint32_t start) {
    static_assert(GROUP_BYTES % 16 == 0 && GROUP_BYTES >> 4 < 1 << 14);
    static_assert(PANEL_BYTES % 16 == 0 && PANEL_BYTES >> 4 < 1 << 14);
    const uint32_t low = (start & DESCRIPTOR_ADDRESSES) >> 4 | PANEL_BYTES >> 4 << 16;
    return static_cast<uint64_t>(SWIZZLE_OF_ROWS<ROW_BYTES> | GROUP_BYTES >> 4) << 32 | low;
}

#define L2P_REGISTERS_8(d) L2P_TILE_REGISTERS(d, 0)
#define L2P_REGISTERS_48(d) L2P_REGISTERS_32(d), L2P_TILE_REGISTERS(d, 4), L2P_TILE_REGISTERS(d, 5)
#define L2P_REGISTERS_96(d)                                                                                     \
    L2P_REGISTERS_64(d), L2P_TILE_REGISTERS(d, 8), L2P_TILE_REGISTERS(d, 9), L2P_TILE_REGISTERS(d, 10), L2P_TILE_REGISTERS(d, 11)
#define L2P_REGISTERS_128(d)                                                                                    \
    L2P_REGISTERS_96(d), L2P_TILE_REGISTERS(d, 12), L2P_TILE_REGISTERS(d, 13), L2P_TILE_REGISTERS(d, 14), L2P_TILE_REGISTERS(d, 15)
#define L2P_REGISTERS_192(d)                                                                                    \
    L2P_REGISTERS_128(d), L2P_TILE_REGISTERS(d, 16), L2P_TILE_REGISTERS(d, 17), L2P_TILE_REGISTERS(d, 18),      \
        L2P_TILE_REGISTERS(d, 19), L2P_TILE_REGISTERS(d, 20), L2P_TILE_REGISTERS(d, 21), L2P_TILE_REGISTERS(d, 22), \
        L2P_TILE_REGISTERS(d, 23)

#define L2P_NAMES_8 "%0, %1, %2, %3"
#define L2P_NAMES_32 L2P_NAMES_8 ", %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define L2P_NAMES_48 L2P_NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define L2P_NAMES_64 L2P_NAMES_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define L2P_NAMES_96 L2P_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define L2P_NAMES_128 L2P_NAMES_96 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define L2P_NAMES_192                                                                                              \
    L2P_NAMES_128                                                                                                  \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
    "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

// A and B name the operands, which follow the registers; B_BY_COLUMNS is 1 where the rows of b are summed, 0 where its columns.
#define L2P_ISSUE_OUTER(NAME, COLUMNS, A, B, B_BY_COLUMNS)                                                          \
    __device__ __forceinline__ void NAME(Sums64<COLUMNS>& d, uint64_t a, uint64_t b) {                              \
        asm volatile(                                                                                               \
            "{\n\t.reg .pred adding;\n\tsetp.ne.b32 adding, 1, 0;\n\t"                                              \
            "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.bf16.bf16 {" L2P_NAMES_##COLUMNS "}, " A ", " B   \
            ", adding, 1, 1, 1, " #B_BY_COLUMNS ";\n\t}"                                                            \
            : L2P_REGISTERS_##COLUMNS(d)                                                                            \
            : "l"(a), "l"(b)                                                                                        \
            : "memory");                                                                                            \
    }

L2P_ISSUE_OUTER(issue_outer, 32, "%16", "%17", 1)
L2P_ISSUE_OUTER(issue_outer, 48, "%24", "%25", 1)
L2P_ISSUE_OUTER(issue_outer, 64, "%32", "%33", 1)
L2P_ISSUE_OUTER(issue_outer, 96, "%48", "%49", 1)
L2P_ISSUE_OUTER(issue_outer, 128, "%64", "%65", 1)
L2P_ISSUE_OUTER(issue_outer, 192, "%96", "%97", 1)
// The same with b given by its columns (`operand_rows`).
L2P_ISSUE_OUTER(issue_columns_by_rows, 8, "%4", "%5", 0)

// Keeps the compiler from moving what computes or uses these registers across this point.
__device__ __forceinline__ void hold(Sums64<8>& d) { asm volatile("" : L2P_REGISTERS_8(d)::"memory"); }
__device__ __forceinline__ void hold(Sums64<48>& d) { asm volatile("" : L2P_REGISTERS_48(d)::"memory"); }
__device__ __forceinline__ void hold(Sums64<96>& d) { asm volatile("" : L2P_REGISTERS_96(d)::"memory"); }
__device__ __forceinline__ void hold(Sums64<192>& d) { asm volatile("" : L2P_REGISTERS_192(d)::"memory"); }

// Makes what this thread wrote to shared memory visible to products; a barrier must follow.
__device__ __forceinline__ void writes_ready() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
