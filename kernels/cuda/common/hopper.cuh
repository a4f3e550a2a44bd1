// Hopper's own instructions under the names of what they do here. Use inside `#if defined(__CUDA_ARCH_FEAT_SM90_ALL)`.
//
// The vocabulary of a warp-specialised kernel:
//   transaction barrier   an mbarrier in shared memory: a phase ends when the expected threads have arrived and the
//                         expected bytes have been copied. Who waits names the phase by its parity, counted from 0.
//   bulk copy             one thread has a box of a tensor copied into shared memory; the copy arrives on a barrier.
//   warpgroup             four warps, the first of them a multiple of four, that issue a product together.
//   warpgroup product     d += a b for 64 rows; runs on its own after it is issued. Between the issue and `product_wait`
//                         nobody may touch its registers or overwrite its tiles.
//   register hand-over    a warpgroup that only issues copies gives registers up, those that compute take them.
//
// Tiles are what bulk copies with a 128-byte swizzle write: panels of 64 bf16 columns, one row of a panel being 128 bytes
// and its 16-byte units exchanged by the row's number modulo 8 (`swizzled<8>` of common/mma.cuh). Tiles start at multiples
// of 1024.
#pragma once
#include "common/mma.cuh"

constexpr int WARPGROUP = 128;
constexpr int PANEL = 64;                                    // columns
constexpr int PANEL_ROW_BYTES = PANEL * sizeof(bf16);        // 128
constexpr int SWIZZLE_ATOM_BYTES = 8 * PANEL_ROW_BYTES;      // the pattern repeats after eight rows
constexpr int PRODUCT_DEPTH = 16;                            // summed elements of one product of bf16

// What `TensorMap` on the Rust side encodes: a parameter `const __grid_constant__ TensorMap map`.
struct alignas(128) TensorMap {
    uint64_t words[16];
};

// ---- transaction barriers; `barrier` is the shared address of 8 bytes ----

// By one thread, before anybody uses it; `barriers_ready` and __syncthreads() must follow.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to bulk copies.
__device__ __forceinline__ void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the phase wait for so many bytes of bulk copies.
__device__ __forceinline__ void barrier_arrive_expecting(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ bool barrier_try_wait(uint32_t barrier, int parity) {
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
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
    while (!barrier_try_wait(barrier, parity)) {
    }
}

// ---- bulk copies ----

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Starts copying the map's box at (x, y, z), x innermost, to shared memory; what lies outside the tensor becomes zeros. All
// bytes of the box count on the barrier.
__device__ __forceinline__ void copy_box_3d(uint32_t to, const TensorMap& map, int x, int y, int z, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
        "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier)
        : "memory");
}

// ---- barriers among warps ----

// Arrives at a barrier that `named_barrier_sync` of other warps waits for; `threads` counts both.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- register hand-over, by all warps of a warpgroup; REGISTERS per thread, a multiple of 8 ----

template <int REGISTERS>
__device__ __forceinline__ void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- warpgroup products ----

// What stands in a tile's descriptor: its address and the distance between panels in the lower word, the distance from
// eight rows to the next eight and the swizzle in the upper, all in units of 16 bytes. Shared memory is too small for an
// offset to carry out of the address's 14 bits.
constexpr uint32_t SWIZZLE_128_BYTES = 1u << 30;
constexpr uint32_t DESCRIPTOR_ADDRESSES = (1u << 18) - 1;  // without the bits that name a block of a cluster

// A tile as a product's operand whose rows hold the summed elements (A, and B given by columns). One product takes the 16
// summed elements that start `offset` bytes after `tile`: 0, 32, 64 or 96 bytes into a row, the first of eight.
__device__ __forceinline__ uint64_t operand_by_rows(uint32_t tile, int offset) {
    constexpr uint32_t UNUSED = 1;  // the distance between panels: one product stays within one
    const uint32_t low = ((tile & DESCRIPTOR_ADDRESSES) >> 4 | UNUSED << 16) + (offset >> 4);
    return static_cast<uint64_t>(SWIZZLE_128_BYTES | SWIZZLE_ATOM_BYTES >> 4) << 32 | low;
}

// A tile as operand B given row by row: its rows are the summed elements, its columns those of the product, in panels that
// start PANEL_BYTES apart. One product takes the 16 rows that start `offset` bytes after `tile`, a multiple of 1024.
template <int PANEL_BYTES>
__device__ __forceinline__ uint64_t operand_by_columns(uint32_t tile, int offset) {
    static_assert(PANEL_BYTES % SWIZZLE_ATOM_BYTES == 0 && PANEL_BYTES < 1 << 18);
    constexpr uint32_t PANEL_DISTANCE = PANEL_BYTES >> 4;
    const uint32_t low = ((tile & DESCRIPTOR_ADDRESSES) >> 4 | PANEL_DISTANCE << 16) + (offset >> 4);
    return static_cast<uint64_t>(SWIZZLE_128_BYTES | SWIZZLE_ATOM_BYTES >> 4) << 32 | low;
}

// The accumulators of 64 rows x 128 columns: warp w of the warpgroup holds rows 16 w to 16 w + 15, tile t the columns 8 t
// to 8 t + 7, as fragments of common/mma.cuh.
using Accumulators = float[16][4];

#define L2P_TILE_REGISTERS(d, t) "+f"(d[t][0]), "+f"(d[t][1]), "+f"(d[t][2]), "+f"(d[t][3])
#define L2P_REGISTERS(d)                                                                                                  \
    L2P_TILE_REGISTERS(d, 0), L2P_TILE_REGISTERS(d, 1), L2P_TILE_REGISTERS(d, 2), L2P_TILE_REGISTERS(d, 3),               \
        L2P_TILE_REGISTERS(d, 4), L2P_TILE_REGISTERS(d, 5), L2P_TILE_REGISTERS(d, 6), L2P_TILE_REGISTERS(d, 7),           \
        L2P_TILE_REGISTERS(d, 8), L2P_TILE_REGISTERS(d, 9), L2P_TILE_REGISTERS(d, 10), L2P_TILE_REGISTERS(d, 11),         \
        L2P_TILE_REGISTERS(d, 12), L2P_TILE_REGISTERS(d, 13), L2P_TILE_REGISTERS(d, 14), L2P_TILE_REGISTERS(d, 15)
#define L2P_REGISTER_NAMES                                                                                                \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "      \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "       \
    "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

// Keeps the compiler from moving the computation and the uses of these registers across this point.
__device__ __forceinline__ void hold(Accumulators& d) { asm volatile("" : L2P_REGISTERS(d)::"memory"); }

template <int FRAGMENTS>
__device__ __forceinline__ void hold(uint32_t (&a)[FRAGMENTS][4]) {
#pragma unroll
    for (int i = 0; i < FRAGMENTS; ++i) {
        asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
    }
}

// Before the first product that uses registers written by other instructions; after a `hold` of the left operand, if that
// is in registers.
__device__ __forceinline__ void product_fence(Accumulators& d) {
    asm volatile("wgmma.fence.sync.aligned;" : L2P_REGISTERS(d)::"memory");
}

// Closes the group of products issued since the last one.
__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING groups are under way; `d` are the accumulators that are then complete.
template <int PENDING>
__device__ __forceinline__ void product_wait(Accumulators& d) {
    asm volatile("wgmma.wait_group.sync.aligned %64;" : L2P_REGISTERS(d) : "n"(PENDING) : "memory");
}

// d = a b or, if `add`, d += a b for 64 x 128 and 16 summed elements; a and b by rows (`operand_by_rows`).
__device__ __forceinline__ void issue_product(Accumulators& d, uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{\n\t.reg .pred adding;\n\tsetp.ne.b32 adding, %66, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " L2P_REGISTER_NAMES ", %64, %65, adding, 1, 1, 0, 0;\n\t}"
        : L2P_REGISTERS(d)
        : "l"(a), "l"(b), "r"(static_cast<int>(add))
        : "memory");
}

// d += a b with a in registers, each warp its own 16 rows as a fragment of common/mma.cuh, and b by columns.
__device__ __forceinline__ void issue_product(Accumulators& d, const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n\t.reg .pred adding;\n\tsetp.ne.b32 adding, 1, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " L2P_REGISTER_NAMES
        ", {%64, %65, %66, %67}, %68, adding, 1, 1, 1;\n\t}"
        : L2P_REGISTERS(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
        : "memory");
}

// Starts copying `bytes` consecutive bytes, a multiple of 16, between addresses that are too; they count on the barrier.
__device__ __forceinline__ void copy_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
        "r"(bytes), "r"(barrier)
        : "memory");
}

// ---- the same products with half as many columns ----

// The accumulators of 64 rows x 64 columns.
using HalfAccumulators = float[8][4];

#define L2P_HALF_REGISTERS(d)                                                                               \
    L2P_TILE_REGISTERS(d, 0), L2P_TILE_REGISTERS(d, 1), L2P_TILE_REGISTERS(d, 2), L2P_TILE_REGISTERS(d, 3), \
        L2P_TILE_REGISTERS(d, 4), L2P_TILE_REGISTERS(d, 5), L2P_TILE_REGISTERS(d, 6), L2P_TILE_REGISTERS(d, 7)
#define L2P_HALF_REGISTER_NAMES                                                                            \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"

__device__ __forceinline__ void hold(HalfAccumulators& d) { asm volatile("" : L2P_HALF_REGISTERS(d)::"memory"); }

__device__ __forceinline__ void product_fence(HalfAccumulators& d) {
    asm volatile("wgmma.fence.sync.aligned;" : L2P_HALF_REGISTERS(d)::"memory");
}

template <int PENDING>
__device__ __forceinline__ void product_wait(HalfAccumulators& d) {
    asm volatile("wgmma.wait_group.sync.aligned %32;" : L2P_HALF_REGISTERS(d) : "n"(PENDING) : "memory");
}

// Before products of which none adds to registers that other instructions wrote.
__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

#define L2P_TILE_OUTPUTS(d, t) "=f"(d[t][0]), "=f"(d[t][1]), "=f"(d[t][2]), "=f"(d[t][3])
#define L2P_HALF_OUTPUTS(d)                                                                         \
    L2P_TILE_OUTPUTS(d, 0), L2P_TILE_OUTPUTS(d, 1), L2P_TILE_OUTPUTS(d, 2), L2P_TILE_OUTPUTS(d, 3), \
        L2P_TILE_OUTPUTS(d, 4), L2P_TILE_OUTPUTS(d, 5), L2P_TILE_OUTPUTS(d, 6), L2P_TILE_OUTPUTS(d, 7)

// d += a b for 64 x 64 and 16 summed elements; a and b by rows.
__device__ __forceinline__ void issue_product(HalfAccumulators& d, uint64_t a, uint64_t b) {
    asm volatile(
        "{\n\t.reg .pred adding;\n\tsetp.ne.b32 adding, 1, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " L2P_HALF_REGISTER_NAMES
        ", %32, %33, adding, 1, 1, 0, 0;\n\t}"
        : L2P_HALF_REGISTERS(d)
        : "l"(a), "l"(b)
        : "memory");
}

// d = a b. Unlike a product that may add, it does not wait for what other instructions did with d before.
__device__ __forceinline__ void issue_new_product(HalfAccumulators& d, uint64_t a, uint64_t b) {
    asm volatile(
        "{\n\t.reg .pred adding;\n\tsetp.ne.b32 adding, 0, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " L2P_HALF_REGISTER_NAMES
        ", %32, %33, adding, 1, 1, 0, 0;\n\t}"
        : L2P_HALF_OUTPUTS(d)
        : "l"(a), "l"(b)
        : "memory");
}

// The same for 64 x 128.
__device__ __forceinline__ void issue_new_product(Accumulators& d, uint64_t a, uint64_t b) {
    asm volatile(
        "{\n\t.reg .pred adding;\n\tsetp.ne.b32 adding, 0, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " L2P_REGISTER_NAMES ", %64, %65, adding, 1, 1, 0, 0;\n\t}"
        : L2P_HALF_OUTPUTS(d), L2P_TILE_OUTPUTS(d, 8), L2P_TILE_OUTPUTS(d, 9), L2P_TILE_OUTPUTS(d, 10),
          L2P_TILE_OUTPUTS(d, 11), L2P_TILE_OUTPUTS(d, 12), L2P_TILE_OUTPUTS(d, 13), L2P_TILE_OUTPUTS(d, 14),
          L2P_TILE_OUTPUTS(d, 15)
        : "l"(a), "l"(b)
        : "memory");
}

__device__ __forceinline__ void issue_product(Accumulators& d, uint64_t a, uint64_t b) { issue_product(d, a, b, true); }
