// Tensor-core products of bf16 fragments and what feeds them on every GPU from Ampere on: asynchronous copies to shared
// memory, swizzled tiles, ldmatrix and mma.sync.
//
// A fragment belongs to a warp. With `group = lane / 4` and `member = lane % 4`, a thread holds
//   of an accumulator, 16 rows x 8 columns:   d[0..1] row group, columns 2 member + {0, 1};  d[2..3] row group + 8
//   of A, 16 rows x 16 of the summed extent:  the accumulators of two neighbouring 8-column tiles, packed in pairs, so that
//                                             a product's result is the next product's left operand (`pack_fragment`).
#pragma once
#include "common/types.cuh"

constexpr int UNIT = 8;  // bf16 elements in 16 bytes: what one copy and one row of an 8 x 8 ldmatrix tile hold

// The address of shared memory as the instructions below take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// What the places of a row's units are exchanged by in a tile of rows of UNITS units (a power of two, 4 at least): within
// each 128 bytes by the row, so that eight consecutive rows of one unit lie in eight different groups of four banks.
template <int UNITS>
__device__ __forceinline__ int swizzle_key(int row) {
    static_assert(UNITS >= 4 && (UNITS & (UNITS - 1)) == 0);
    return UNITS >= 8 ? row & 7 : (row >> 1) & 3;
}

// Where unit `unit` of row `row` stands in such a tile, counted in units from its start.
template <int UNITS>
__device__ __forceinline__ int swizzled(int row, int unit) {
    return row * UNITS + (unit ^ swizzle_key<UNITS>(row));
}

// Starts copying 16 bytes from global to shared memory; zeros are written where `valid` is false, and nothing is read.
__device__ __forceinline__ void cp_async16(uint32_t to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

// Closes this thread's group of copies started since the last one.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's groups are under way; a barrier must follow before others read.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Waits for all copies that this thread has started.
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Loads four 8 x 8 tiles; lane l gives the address of row l % 8 of tile l / 8. A thread gets of each tile row `group`,
// columns 2 member and 2 member + 1; of the transposed load row 2 member and 2 member + 1, column `group`.
__device__ __forceinline__ void ldmatrix(uint32_t (&tile)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_trans(uint32_t (&tile)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
                 : "r"(address)
                 : "memory");
}

// A from a tile of rows of UNITS units: rows `row` to row + 15, units `unit` (an even number, here and below) and unit + 1.
template <int UNITS>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], uint32_t tile, int row, int unit) {
    const int lane = threadIdx.x % WARP;
    ldmatrix(a, tile + 16 * swizzled<UNITS>(row + lane % 16, unit ^ lane / 16));
}

// Two B operands from a tile that holds one column of B per row: b[0..1] columns `row` to row + 7 of B, b[2..3] the next
// eight, both for the 16 summed elements in units `unit` and unit + 1.
template <int UNITS>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], uint32_t tile, int row, int unit) {
    const int lane = threadIdx.x % WARP;
    ldmatrix(b, tile + 16 * swizzled<UNITS>(row + lane % 8 + lane / 16 * 8, unit ^ lane / 8 % 2));
}

// Two B operands from a tile that holds B row by row: b[0..1] the eight columns in unit `unit`, b[2..3] those in unit + 1,
// both for the 16 summed elements in rows `row` to row + 15.
template <int UNITS>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b)[4], uint32_t tile, int row, int unit) {
    const int lane = threadIdx.x % WARP;
    ldmatrix_trans(b, tile + 16 * swizzled<UNITS>(row + lane % 16, unit ^ lane / 16));
}

// d += a b for 16 rows, 8 columns and 16 summed elements.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// Two values rounded to bf16, the first in the low half.
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// The A fragment that two neighbouring accumulator tiles make.
__device__ __forceinline__ void pack_fragment(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack_pair(left[0], left[1]);
    a[1] = pack_pair(left[2], left[3]);
    a[2] = pack_pair(right[0], right[1]);
    a[3] = pack_pair(right[2], right[3]);
}

// 2^x to about two units in the last place; results below the smallest normal number are zero.
__device__ __forceinline__ float exp2_approximate(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
