// Products of a warpgroup (wgmma), for operands of bf16, e4m3 and s8. Use inside `#if defined(__CUDA_ARCH_FEAT_SM90_ALL)`.
//
// A warpgroup, four warps of which the first is a multiple of four, issues d += a b for MMA_M = 64 rows, N columns and the
// summed elements in 32 bytes of each operand's row (MMA_K). The product runs on its own after it is issued: between the
// issue and `wgmma_wait` nobody may touch its registers or overwrite its tiles.
//
// Operands stand in shared memory as tiles that bulk copies wrote (common/tma.cuh) and are named by a descriptor; a may also
// come from registers. `Major` says what lies side by side in a tile's rows: the summed elements (K-major: a tile has a row
// for each row of a or column of b) or the others (MN-major: a row for each summed element). Operands of one byte are K-major
// only.
#pragma once
#include "common/mma.cuh"
#include "common/tma.cuh"

constexpr int WARPGROUP = 128;
constexpr int MMA_M = 64;
template <class Operand>
constexpr int MMA_K = 32 / sizeof(Operand);

using s8 = int8_t;
struct e4m3 {  // 1 sign, 4 exponent and 3 mantissa bits
    uint8_t bits;
};

enum class Major { K = 0, MN = 1 };

// The accumulators of 64 rows x N columns, f32, or s32 for operands of s8: warp w of the warpgroup holds rows 16 w to 16 w +
// 15, tile t the columns 8 t to 8 t + 7, as fragments of common/mma.cuh.
template <int N, class Sum = float>
using Accumulators = Sum[N / 8][4];

// ---- descriptors ----

constexpr uint32_t DESCRIPTOR_ADDRESSES = (1u << 18) - 1;  // without the bits that name a block of a cluster

// A tile of rows of SWIZZLE_BYTES bytes (128, 64 or 32), from `tile` on, as an operand whose 16 (MN-major) or 8 (K-major) first
// rows start `offset` bytes after it. Eight rows are followed by the next eight STRIDE_BYTES (SBO) after the first ones' start;
// MN-major columns that do not fit a row are found LEADING_BYTES (LBO) further on, in a tile or panel of their own.
//
// These are addresses and nothing else. The hardware undoes the swizzle by the address's bits, so that a tile may be seen
// from any row on, its groups of eight rows may be any distance apart, and panels may be different tiles or the same one seen
// from a row further on. Lower word: address and LBO; upper: SBO and swizzle; all in units of 16 bytes. Shared memory is too
// small for an offset to carry out of the address's 14 bits.
template <int SWIZZLE_BYTES, int STRIDE_BYTES, int LEADING_BYTES = 16>
__device__ __forceinline__ uint64_t descriptor(uint32_t tile, int offset = 0) {
    static_assert(SWIZZLE_BYTES == 128 || SWIZZLE_BYTES == 64 || SWIZZLE_BYTES == 32);
    static_assert(STRIDE_BYTES % 16 == 0 && STRIDE_BYTES >> 4 < 1 << 14);
    static_assert(LEADING_BYTES % 16 == 0 && LEADING_BYTES >> 4 < 1 << 14);
    constexpr uint32_t SWIZZLE = (SWIZZLE_BYTES == 128 ? 1u : SWIZZLE_BYTES == 64 ? 2u : 3u) << 30;
    const uint32_t low = ((tile & DESCRIPTOR_ADDRESSES) >> 4 | LEADING_BYTES >> 4 << 16) + (offset >> 4);
    return static_cast<uint64_t>(SWIZZLE | STRIDE_BYTES >> 4) << 32 | low;
}

// The same operand `bytes` further on.
__device__ __forceinline__ uint64_t advance(uint64_t operand, int bytes) { return operand + (bytes >> 4); }

// A panel of 64 columns of bf16 whose rows hold the summed elements: one product takes those that start 0, 32, 64 or 96 bytes
// into a row, the first of eight.
__device__ __forceinline__ uint64_t k_major_panel(uint32_t tile, int offset) {
    return descriptor<PANEL_ROW_BYTES, SWIZZLE_ATOM_BYTES>(tile, offset);
}

// A tile whose rows are the summed elements, its columns in panels that start PANEL_BYTES apart. One product takes the 16
// rows that start `offset` bytes after `tile`, a multiple of 1024.
template <int PANEL_BYTES>
__device__ __forceinline__ uint64_t mn_major_panels(uint32_t tile, int offset) {
    static_assert(PANEL_BYTES % SWIZZLE_ATOM_BYTES == 0);
    return descriptor<PANEL_ROW_BYTES, SWIZZLE_ATOM_BYTES, PANEL_BYTES>(tile, offset);
}

// ---- the table of N: registers of the accumulators ----

#define L2P_TILE(c, d, t) c(d[t][0]), c(d[t][1]), c(d[t][2]), c(d[t][3])
#define L2P_TILES_8(c, d, t) L2P_TILE(c, d, t)
#define L2P_TILES_16(c, d, t) L2P_TILE(c, d, t), L2P_TILE(c, d, t + 1)
#define L2P_TILES_32(c, d, t) L2P_TILES_16(c, d, t), L2P_TILES_16(c, d, t + 2)
#define L2P_TILES_48(c, d, t) L2P_TILES_32(c, d, t), L2P_TILES_16(c, d, t + 4)
#define L2P_TILES_64(c, d, t) L2P_TILES_32(c, d, t), L2P_TILES_32(c, d, t + 4)
#define L2P_TILES_96(c, d, t) L2P_TILES_64(c, d, t), L2P_TILES_32(c, d, t + 8)
#define L2P_TILES_128(c, d, t) L2P_TILES_64(c, d, t), L2P_TILES_64(c, d, t + 8)
#define L2P_TILES_192(c, d, t) L2P_TILES_128(c, d, t), L2P_TILES_64(c, d, t + 16)
#define L2P_TILES_256(c, d, t) L2P_TILES_128(c, d, t), L2P_TILES_128(c, d, t + 16)

// N, and the numbers of an instruction's operands behind the accumulators'.
#define L2P_FOR_EVERY_N(DO)                          \
    DO(8, 4, 5, 6, 7, 8, 9, 10)                      \
    DO(16, 8, 9, 10, 11, 12, 13, 14)                 \
    DO(32, 16, 17, 18, 19, 20, 21, 22)               \
    DO(48, 24, 25, 26, 27, 28, 29, 30)               \
    DO(64, 32, 33, 34, 35, 36, 37, 38)               \
    DO(96, 48, 49, 50, 51, 52, 53, 54)               \
    DO(128, 64, 65, 66, 67, 68, 69, 70)              \
    DO(192, 96, 97, 98, 99, 100, 101, 102)           \
    DO(256, 128, 129, 130, 131, 132, 133, 134)

// ---- the order of products and registers ----

// Before products of which none adds to registers that other instructions wrote.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of products issued since the last one.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING groups are under way; hold the accumulators afterwards.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// For accumulators of every N:
//   hold(d)                  keeps the compiler from moving what computes or uses these registers across this point
//   wgmma_fence(d)           before the first product that uses registers written by other instructions; after a `hold` of the left
//                            operand, if that is in registers
//   wgmma_wait<PENDING>(d)   as above; `d` are the accumulators that are then complete
#define L2P_ORDER(Sum, C, N, P0)                                                                                         \
    __device__ __forceinline__ void hold(Sum (&d)[N / 8][4]) { asm volatile("" : L2P_TILES_##N("+" C, d, 0)::"memory"); } \
    __device__ __forceinline__ void wgmma_fence(Sum (&d)[N / 8][4]) {                                                    \
        asm volatile("wgmma.fence.sync.aligned;" : L2P_TILES_##N("+" C, d, 0)::"memory");                                \
    }                                                                                                                    \
    template <int PENDING>                                                                                               \
    __device__ __forceinline__ void wgmma_wait(Sum (&d)[N / 8][4]) {                                                     \
        asm volatile("wgmma.wait_group.sync.aligned %" #P0 ";" : L2P_TILES_##N("+" C, d, 0) : "n"(PENDING) : "memory");  \
    }
#define L2P_ORDERS(N, P0, ...) L2P_ORDER(float, "f", N, P0) L2P_ORDER(int32_t, "r", N, P0)
L2P_FOR_EVERY_N(L2P_ORDERS)

// A left operand in registers.
template <int STEPS>
__device__ __forceinline__ void hold(uint32_t (&a)[STEPS][4]) {
#pragma unroll
    for (int i = 0; i < STEPS; ++i) asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
}

// ---- the products ----

// One instance per operand type and N, all from the table below: `from_tiles` d = a b or, if `add`, d += a b;
// `from_registers` the same with a as four registers, each warp its own 16 rows as a fragment of common/mma.cuh; `fresh` d =
// a b, which unlike a product that may add does not wait for what other instructions did with d before.
template <class Operand, int N>
struct Wgmma;

#define L2P_NAMES_8 "%0, %1, %2, %3"
#define L2P_NAMES_16 L2P_NAMES_8 ", %4, %5, %6, %7"
#define L2P_NAMES_32 L2P_NAMES_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define L2P_NAMES_48 L2P_NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define L2P_NAMES_64 L2P_NAMES_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define L2P_NAMES_96 L2P_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define L2P_NAMES_128 L2P_NAMES_96 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define L2P_NAMES_192                                                                                                    \
    L2P_NAMES_128                                                                                                        \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, "   \
    "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define L2P_NAMES_256                                                                                                    \
    L2P_NAMES_192                                                                                                        \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, "   \
    "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// Of one operand type and N: Sum and C are type and constraint of an accumulator, TYPES the instruction's types, SIGNS its
// factors of both operands, which integers have not, MAJORS its flags of major order where the type has a choice. P0 to P6
// number the operands behind the accumulators: descriptors, or four registers and a descriptor, then `add` and the majors.
#define L2P_WGMMA(Operand, N, Sum, C, TYPES, SIGNS, MAJORS_T, MAJORS_R, P0, P1, P2, P3, P4, P5, P6)                      \
    template <>                                                                                                          \
    struct Wgmma<Operand, N> {                                                                                           \
        template <Major A, Major B>                                                                                      \
        __device__ __forceinline__ static void from_tiles(Sum (&d)[N / 8][4], uint64_t a, uint64_t b, bool add) {        \
            asm volatile(                                                                                                \
                "{\n\t.reg .pred adding;\n\tsetp.ne.b32 adding, %" #P2 ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #N    \
                TYPES " {" L2P_NAMES_##N "}, %" #P0 ", %" #P1 ", adding" SIGNS MAJORS_T(P3, P4) ";\n\t}"                 \
                : L2P_TILES_##N("+" C, d, 0)                                                                             \
                : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(A)), "n"(static_cast<int>(B))         \
                : "memory");                                                                                             \
        }                                                                                                                \
        template <Major B>                                                                                               \
        __device__ __forceinline__ static void from_registers(                                                           \
            Sum (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool add) {                                          \
            asm volatile(                                                                                                \
                "{\n\t.reg .pred adding;\n\tsetp.ne.b32 adding, %" #P5 ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #N    \
                TYPES " {" L2P_NAMES_##N "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4                            \
                ", adding" SIGNS MAJORS_R(P6) ";\n\t}"                                                                   \
                : L2P_TILES_##N("+" C, d, 0)                                                                             \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),                        \
                  "n"(static_cast<int>(B))                                                                               \
                : "memory");                                                                                             \
        }                                                                                                                \
        template <Major A, Major B>                                                                                      \
        __device__ __forceinline__ static void fresh(Sum (&d)[N / 8][4], uint64_t a, uint64_t b) {                       \
            asm volatile(                                                                                                \
                "{\n\t.reg .pred adding;\n\tsetp.ne.b32 adding, 0, 0;\n\twgmma.mma_async.sync.aligned.m64n" #N           \
                TYPES " {" L2P_NAMES_##N "}, %" #P0 ", %" #P1 ", adding" SIGNS MAJORS_T(P2, P3) ";\n\t}"                 \
                : L2P_TILES_##N("=" C, d, 0)                                                                             \
                : "l"(a), "l"(b), "n"(static_cast<int>(A)), "n"(static_cast<int>(B))                                     \
                : "memory");                                                                                             \
        }                                                                                                                \
    };

#define L2P_BOTH_MAJORS(A, B) ", %" #A ", %" #B
#define L2P_ONE_MAJOR(B) ", %" #B
#define L2P_NO_MAJORS(...)
#define L2P_WGMMA_TYPES(N, ...)                                                                                          \
    L2P_WGMMA(bf16, N, float, "f", "k16.f32.bf16.bf16", ", 1, 1", L2P_BOTH_MAJORS, L2P_ONE_MAJOR, __VA_ARGS__)           \
    L2P_WGMMA(e4m3, N, float, "f", "k32.f32.e4m3.e4m3", ", 1, 1", L2P_NO_MAJORS, L2P_NO_MAJORS, __VA_ARGS__)             \
    L2P_WGMMA(s8, N, int32_t, "r", "k32.s32.s8.s8", "", L2P_NO_MAJORS, L2P_NO_MAJORS, __VA_ARGS__)

L2P_FOR_EVERY_N(L2P_WGMMA_TYPES)

// N follows from the accumulators; see `Wgmma`.
template <class Operand = bf16, Major A = Major::K, Major B = Major::K, class Sum, int TILES>
__device__ __forceinline__ void wgmma(Sum (&d)[TILES][4], uint64_t a, uint64_t b, bool add = true) {
    static_assert(sizeof(Operand) == 2 || (A == Major::K && B == Major::K));
    Wgmma<Operand, 8 * TILES>::template from_tiles<A, B>(d, a, b, add);
}

template <class Operand = bf16, Major B = Major::MN, class Sum, int TILES>
__device__ __forceinline__ void wgmma(Sum (&d)[TILES][4], const uint32_t (&a)[4], uint64_t b, bool add = true) {
    static_assert(sizeof(Operand) == 2 || B == Major::K);
    Wgmma<Operand, 8 * TILES>::template from_registers<B>(d, a, b, add);
}

template <class Operand = bf16, Major A = Major::K, Major B = Major::K, class Sum, int TILES>
__device__ __forceinline__ void wgmma_fresh(Sum (&d)[TILES][4], uint64_t a, uint64_t b) {
    static_assert(sizeof(Operand) == 2 || (A == Major::K && B == Major::K));
    Wgmma<Operand, 8 * TILES>::template fresh<A, B>(d, a, b);
}
