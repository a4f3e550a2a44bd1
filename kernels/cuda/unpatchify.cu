// From tokens back to an image, and from an image to tokens; engine/src/ops/unpatchify.rs holds the contract.
//
// One block per image row, eight values per thread and step: a row of a patch is contiguous in the token and in the image.
// Bound by memory: 2 bytes read and 4 written per value.
#include "common/launch.cuh"
#include "common/types.cuh"

constexpr int THREADS = 128;

// tokens [items, tokens, patch * patch_row], image [items, height, columns * patch_row]; `columns` patches lie side by side
// and a row of a patch has `row_vectors` vectors of eight values. Grid of items * height blocks.
extern "C" __global__ __launch_bounds__(THREADS) void unpatchify(
    const bf16* tokens, float* image, int tokens_per_item, int height, int columns, int patch, int row_vectors, float sign) {
    const int item = blockIdx.x / height, y = blockIdx.x % height;
    const size_t first_token = static_cast<size_t>(item) * tokens_per_item + static_cast<size_t>(y / patch) * columns;
    const size_t token_vectors = static_cast<size_t>(patch) * row_vectors;
    const int patch_row = L2P_FAULT_IF(16, min(y % patch, max(patch - 2, 0)), y % patch);
    const bf16* source = tokens + (first_token * token_vectors + static_cast<size_t>(patch_row) * row_vectors) * 8;
    const int vectors = columns * row_vectors;
    float* target = image + static_cast<size_t>(blockIdx.x) * vectors * 8;
    for (int vector = threadIdx.x; vector < vectors; vector += THREADS) {
        const int column = vector / row_vectors;
        float values[8];
        load8(values, source + (column * token_vectors + vector % row_vectors) * 8);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] *= sign;
        store8(target + static_cast<size_t>(vector) * 8, values);
    }
}
L2P_LAUNCH(unpatchify, THREADS, 0, THREADS)

// The reverse: what stands in a token becomes factor times the image's value.
template <typename T>
__device__ __forceinline__ void take_patches(
    const T* image, bf16* tokens, int tokens_per_item, int height, int columns, int patch, int row_vectors, float factor) {
    const int item = blockIdx.x / height, y = blockIdx.x % height;
    const size_t first_token = static_cast<size_t>(item) * tokens_per_item + static_cast<size_t>(y / patch) * columns;
    const size_t token_vectors = static_cast<size_t>(patch) * row_vectors;
    bf16* target = tokens + (first_token * token_vectors + static_cast<size_t>(y % patch) * row_vectors) * 8;
    const int vectors = columns * row_vectors;
    const T* source = image + static_cast<size_t>(blockIdx.x) * vectors * 8;
    for (int vector = threadIdx.x; vector < vectors; vector += THREADS) {
        const int column = vector / row_vectors;
        float values[8];
        load8(values, source + static_cast<size_t>(vector) * 8);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] *= factor;
        store8(target + (column * token_vectors + vector % row_vectors) * 8, values);
    }
}

extern "C" __global__ __launch_bounds__(THREADS) void patchify_f32(
    const float* image, bf16* tokens, int tokens_per_item, int height, int columns, int patch, int row_vectors, float factor) {
    take_patches(image, tokens, tokens_per_item, height, columns, patch, row_vectors, factor);
}
L2P_LAUNCH(patchify_f32, THREADS, 0, THREADS)

extern "C" __global__ __launch_bounds__(THREADS) void patchify_bf16(
    const bf16* image, bf16* tokens, int tokens_per_item, int height, int columns, int patch, int row_vectors, float factor) {
    take_patches(image, tokens, tokens_per_item, height, columns, patch, row_vectors, factor);
}
L2P_LAUNCH(patchify_bf16, THREADS, 0, THREADS)
