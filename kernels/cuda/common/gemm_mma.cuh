// The vocabulary of matrix products on tensor cores: asynchronous copies into shared memory, swizzled tiles, fragments and
// the m16n8k16 product. Everything here runs from Ampere on.
#pragma once
#include "common/types.cuh"

// Starts a copy of 16 bytes from global to shared memory (32-bit shared address), or writes 16 zero bytes there when `valid`
// is false; `from` is not read then, but must be a global address.
__device__ __forceinline__ void copy_async16(uint32_t to, const void* from, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Closes the group of copies that this thread started since the last call.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's youngest groups are unfinished.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// A tile of bf16 in shared memory: rows of COLUMNS elements, K innermost, in chunks of 16 bytes. Chunk c of row r lies at
// place c ^ key(r) of its row, so that the eight rows that ldmatrix reads at once, and the eight chunks that neighbouring
// threads write, fall into different banks.
template <int COLUMNS>
struct SwizzledTile {
    static_assert(COLUMNS == 32 || COLUMNS == 64);
    static constexpr int CHUNKS = COLUMNS / 8;
    static constexpr int ROW_BYTES = COLUMNS * 2;

    // Repeats every eight rows.
    __device__ static __forceinline__ int key(int row) { return CHUNKS == 8 ? row & 7 : (row >> 1) & 3; }

    // Offset in bytes of a chunk from the tile's start, which is a multiple of 128.
    __device__ static __forceinline__ uint32_t offset(int row, int chunk) {
        return row * ROW_BYTES + (chunk ^ key(row)) * 16;
    }
};

// Four 8x8 matrices of bf16; lane l gives the address of row l % 8 of matrix l / 8 and receives, of each matrix, columns
// 2 * (l % 4) and the next of row l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
}

// d += a * b for a [16, 16] and b [16, 8] in bf16, d [16, 8] in f32. Lane l holds of d the columns 2 * (l % 4) and the next, of
// row l / 4 in d[0], d[1] and of row l / 4 + 8 in d[2], d[3].
__device__ __forceinline__ void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
