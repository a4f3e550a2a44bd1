// Tensor-core products of 16-byte rows in shared memory, and asynchronous copies into it (compute capability 8.0 on).
#pragma once
#include "common/types.cuh"

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 bytes from global to shared memory, both 16-byte aligned; writes zeros instead, and reads nothing,
// when `valid` is false.
__device__ __forceinline__ void copy_16_bytes(uint32_t to, const void* from, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Waits for all copies that this thread has started; a barrier then shows them to the other threads.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }

// Reads four 8x8 matrices of bf16: lane l gives the address of row l % 8 of matrix l / 8 and gets, of each matrix, the
// elements 2 * (l % 4) and the next of row l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
}

// sum[16, 8] += a[16, 16] * b[16, 8]. With row = lane / 4 and column = 2 * (lane % 4), a lane holds, each with the next one:
//   a     (row, column), (row + 8, column), (row, column + 8), (row + 8, column + 8)
//   b     (column, row), (column + 8, row)
//   sum   (row, column), (row + 8, column)
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
