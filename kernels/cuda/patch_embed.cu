// Patch embedding straight from the image; engine/src/ops/patch_embed.rs holds the contract.
//
// A product [tokens, K] x [dim, K]^T with K = patch * patch * channels (an implicit GEMM), whose first operand is gathered
// from the image while it is copied to shared memory: a row of a patch is contiguous there, so every 16-byte chunk of K is
// too. Tiles of BLOCK_M x BLOCK_N, eight warps of 64x64 each, STAGES blocks of BLOCK_K in flight. Bound by the tensor cores
// for the pixel patches (K from 768), by writing the tokens for the latent patch (K of 64).
#include "common/mma.cuh"
#include "common/launch.cuh"

constexpr int THREADS = 256;
constexpr int BLOCK_M = 128;  // tokens
constexpr int BLOCK_N = 256;  // outputs
constexpr int WARP_TILE = 64;  // in both directions
constexpr int WARPS_ALONG_DIM = BLOCK_N / WARP_TILE;
constexpr int STAGES = 4;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr int BLOCK_K = 64;  // 192 KB in all, of Hopper's 227
#else
constexpr int BLOCK_K = 32;  // 96 KB in all, which every GPU since Ampere has
#endif
constexpr int CHUNKS = BLOCK_K / UNIT;  // of 16 bytes, of a row of a stage
constexpr int ROW_BYTES = BLOCK_K * sizeof(bf16);

constexpr int STEPS_PER_BLOCK = BLOCK_K / 16;  // of the m16n8k16 product
constexpr int IMAGE_BYTES = BLOCK_M * ROW_BYTES;
constexpr int STAGE_BYTES = IMAGE_BYTES + BLOCK_N * ROW_BYTES;
constexpr int COPY_ROWS = THREADS / CHUNKS;  // rows that one chunk per thread covers
constexpr int IMAGE_COPIES = BLOCK_M / COPY_ROWS;
constexpr int WEIGHT_COPIES = BLOCK_N / COPY_ROWS;
constexpr int OUTPUT_STRIDE = BLOCK_N + 8;  // elements; the shift keeps the result's rows in different banks
constexpr int SMEM_BYTES = STAGES * STAGE_BYTES;

static_assert(BLOCK_M / WARP_TILE * WARPS_ALONG_DIM * WARP == THREADS);
static_assert(COPY_ROWS % 8 == 0, "a thread's chunks share one swizzle key");
static_assert(STEPS_PER_BLOCK % 2 == 0, "fragments alternate between two buffers");
static_assert(BLOCK_M * OUTPUT_STRIDE * 2 <= SMEM_BYTES);

// Where a chunk of a row stands in a stage, in bytes.
__device__ __forceinline__ uint32_t tile_offset(int row, int chunk) { return row * ROW_BYTES + (chunk ^ swizzle_key<CHUNKS>(row)) * 16; }

// The sizes of the problem, in chunks of eight elements where that is said.
struct Sizes {
    int tokens, dim;
    int chunks;             // of K
    int patch_row_chunks;   // of one row of a patch
    int image_row_chunks;   // of one row of the image
    int patch, columns, patches_per_item;
};

// Copies the chunks of K, stage by stage. A thread copies the same place `chunk` of every stage, for several tokens and
// several rows of the weights.
struct Loader {
    const uint4* image;
    const uint4* weight;
    unsigned token_start[IMAGE_COPIES];  // chunk of the image at which a token's patch begins
    unsigned token_valid;                // one bit per token
    unsigned weight_start;               // chunk of the weights at which this thread's first row begins
    int first_output;
    int chunk;         // of K, the next to copy
    int column;        // the same within its row of the patch
    unsigned in_patch;  // the same as a distance in the image from the patch's first chunk

    __device__ __forceinline__ Loader(
        const bf16* image, const bf16* weight, const Sizes& sizes, int first_token, int first_dim)
        : image(reinterpret_cast<const uint4*>(image)), weight(reinterpret_cast<const uint4*>(weight)), token_valid(0) {
        const int row = threadIdx.x / CHUNKS;
#pragma unroll
        for (int i = 0; i < IMAGE_COPIES; ++i) {
            const int token = first_token + row + i * COPY_ROWS;
            const bool valid = token < sizes.tokens;
            const unsigned item = valid ? token / sizes.patches_per_item : 0;
            const unsigned place = valid ? token % sizes.patches_per_item : 0;
            const unsigned patch_row = place / sizes.columns, patch_column = place % sizes.columns;
            const unsigned rows_above = (item * (sizes.patches_per_item / sizes.columns) + patch_row) * sizes.patch;
            token_start[i] = rows_above * sizes.image_row_chunks + patch_column * sizes.patch_row_chunks;
            token_valid |= static_cast<unsigned>(valid) << i;
        }
        first_output = first_dim + row;
        weight_start = static_cast<unsigned>(first_output) * sizes.chunks;
        chunk = threadIdx.x % CHUNKS;
        column = chunk;
        in_patch = chunk;
        enter_row(sizes);
    }

    // Goes on to the patch row that `column` has run into.
    __device__ __forceinline__ void enter_row(const Sizes& sizes) {
        while (column >= sizes.patch_row_chunks) {
            column -= sizes.patch_row_chunks;
            in_patch += sizes.image_row_chunks - sizes.patch_row_chunks;
        }
    }

    // Starts the copies of the next BLOCK_K elements of K into the stage at `stage`; zeros where there is no token, no
    // output or no more K.
    __device__ __forceinline__ void copy_next(uint32_t stage, const Sizes& sizes) {
        const bool in_range = chunk < sizes.chunks;
        const uint32_t target = stage + tile_offset(threadIdx.x / CHUNKS, threadIdx.x % CHUNKS);
#pragma unroll
        for (int i = 0; i < IMAGE_COPIES; ++i) {
            const bool valid = in_range && (token_valid >> i & 1);
            const unsigned from = valid ? token_start[i] + in_patch : 0;
            cp_async16(target + i * COPY_ROWS * ROW_BYTES, image + from, valid);
        }
#pragma unroll
        for (int i = 0; i < WEIGHT_COPIES; ++i) {
            const bool valid = in_range && first_output + i * COPY_ROWS < sizes.dim;
            const unsigned from = valid ? weight_start + i * COPY_ROWS * sizes.chunks + chunk : 0;
            cp_async16(target + IMAGE_BYTES + i * COPY_ROWS * ROW_BYTES, weight + from, valid);
        }
        chunk += CHUNKS;
        column += CHUNKS;
        in_patch += CHUNKS;
        enter_row(sizes);
    }
};

constexpr int TOKEN_FRAGMENTS = WARP_TILE / 16;  // of 16 tokens
constexpr int DIM_FRAGMENTS = WARP_TILE / 8;     // of 8 outputs

// One step's operands of a warp: 64 tokens and 64 outputs by 16 elements of K.
struct Fragments {
    uint32_t tokens[TOKEN_FRAGMENTS][4];
    uint32_t weights[DIM_FRAGMENTS / 2][4];  // two fragments of 8 outputs each

    // `token_address` and `weight_address` point at this lane's row and half of step 0, in the swizzled tiles of a stage; a
    // step is two chunks further, which the swizzle turns into an exclusive or.
    __device__ __forceinline__ void load(uint32_t token_address, uint32_t weight_address, int step) {
#pragma unroll
        for (int i = 0; i < TOKEN_FRAGMENTS; ++i) {
            ldmatrix(tokens[i], (token_address ^ (step * 32)) + i * 16 * ROW_BYTES);
        }
#pragma unroll
        for (int i = 0; i < DIM_FRAGMENTS / 2; ++i) {
            ldmatrix(weights[i], (weight_address ^ (step * 32)) + i * 16 * ROW_BYTES);
        }
    }

    __device__ __forceinline__ void multiply(float (&sums)[TOKEN_FRAGMENTS][DIM_FRAGMENTS][4]) const {
#pragma unroll
        for (int i = 0; i < TOKEN_FRAGMENTS; ++i) {
#pragma unroll
            for (int j = 0; j < DIM_FRAGMENTS; ++j) {
                mma(sums[i][j], tokens[i], weights[j / 2][j % 2 * 2], weights[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
};

// image [items, rows * patch, columns * patch, channels], weight [dim, K], bias [dim], output [tokens, dim]; one block per
// tile, the tiles along dim first.
extern "C" __global__ __launch_bounds__(THREADS, 1) void patch_embed(
    const bf16* image, const bf16* weight, const bf16* bias, bf16* output, int tokens, int dim, int chunks,
    int patch_row_chunks, int image_row_chunks, int patch, int columns, int patches_per_item) {
    extern __shared__ __align__(128) unsigned char smem[];
    const Sizes sizes{tokens, dim, chunks, patch_row_chunks, image_row_chunks, patch, columns, patches_per_item};
    const int tiles_along_dim = (dim + BLOCK_N - 1) / BLOCK_N;
    const int first_token = blockIdx.x / tiles_along_dim * BLOCK_M;
    const int first_dim = blockIdx.x % tiles_along_dim * BLOCK_N;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int warp_token = warp / WARPS_ALONG_DIM * WARP_TILE, warp_dim = warp % WARPS_ALONG_DIM * WARP_TILE;
    const uint32_t stages = shared_address(smem);
    const int all_blocks = (chunks + CHUNKS - 1) / CHUNKS, blocks = L2P_FAULT_IF(19, max(all_blocks - 1, 1), all_blocks);

    Loader loader(image, weight, sizes, first_token, first_dim);
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (stage < blocks) loader.copy_next(stages + stage * STAGE_BYTES, sizes);
        cp_async_commit();  // also when empty, so that the groups count the stages
    }

    // Rows of ldmatrix: tokens 0-7, 8-15 at chunk 0, then the same at chunk 1; outputs 0-7 at chunks 0 and 1, then 8-15.
    const uint32_t token_lane = tile_offset(warp_token + lane % 16, lane / 16);
    const uint32_t weight_lane = IMAGE_BYTES + tile_offset(warp_dim + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    float sums[TOKEN_FRAGMENTS][DIM_FRAGMENTS][4] = {};
    Fragments fragments[2];

    cp_async_wait<STAGES - 2>();
    __syncthreads();  // the first stage has arrived, from all threads
    fragments[0].load(stages + token_lane, stages + weight_lane, 0);
    uint32_t stage = stages;
    int free_stage = STAGES - 1;  // index of the stage that is copied to next
    for (int block = 0; block < blocks; ++block) {
        uint32_t next_stage = stage + STAGE_BYTES;
        if (next_stage == stages + SMEM_BYTES) next_stage = stages;
#pragma unroll
        for (int step = 0; step < STEPS_PER_BLOCK; ++step) {
            if (step + 1 < STEPS_PER_BLOCK) {
                fragments[(step + 1) % 2].load(stage + token_lane, stage + weight_lane, step + 1);
            } else {
                cp_async_wait<STAGES - 2>();
                __syncthreads();  // the next stage has arrived from all threads, and all have read this one
                if (block + 1 < blocks) fragments[0].load(next_stage + token_lane, next_stage + weight_lane, 0);
            }
            if (step == 0) {
                // Into the stage that was read before this one; the last barrier came after those reads.
                if (block + STAGES - 1 < blocks) loader.copy_next(stages + free_stage * STAGE_BYTES, sizes);
                cp_async_commit();
                free_stage = free_stage + 1 == STAGES ? 0 : free_stage + 1;
            }
            fragments[step % 2].multiply(sums);
        }
        stage = next_stage;
    }

    // Through shared memory, so that the result leaves in whole rows. The last barrier of the loop came after all reads of
    // the stages, and no copy is under way: all of them were waited for before it, or were empty.
    bf16* result = reinterpret_cast<bf16*>(smem);
#pragma unroll
    for (int j = 0; j < DIM_FRAGMENTS; ++j) {
        const int column = warp_dim + j * 8 + lane % 4 * 2;
        float2 offset = make_float2(0.0f, 0.0f);
        if (first_dim + column < dim) {
            offset = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(bias + first_dim + column));
        }
#pragma unroll
        for (int i = 0; i < TOKEN_FRAGMENTS; ++i) {
            bf16* row = result + (warp_token + i * 16 + lane / 4) * OUTPUT_STRIDE + column;
            *reinterpret_cast<__nv_bfloat162*>(row) =
                __floats2bfloat162_rn(sums[i][j][0] + offset.x, sums[i][j][1] + offset.y);
            *reinterpret_cast<__nv_bfloat162*>(row + 8 * OUTPUT_STRIDE) =
                __floats2bfloat162_rn(sums[i][j][2] + offset.x, sums[i][j][3] + offset.y);
        }
    }
    __syncthreads();  // the result is complete before it is read by rows
    constexpr int VECTORS = BLOCK_N / 8;
    for (int index = threadIdx.x; index < BLOCK_M * VECTORS; index += THREADS) {
        const int row = index / VECTORS, column = index % VECTORS * 8;
        const int token = first_token + row;
        if (token >= tokens || first_dim + column >= dim) continue;
        *reinterpret_cast<uint4*>(output + static_cast<size_t>(token) * dim + first_dim + column) =
            *reinterpret_cast<const uint4*>(result + row * OUTPUT_STRIDE + column);
    }
}
L2P_LAUNCH(patch_embed, THREADS, SMEM_BYTES, BLOCK_M, BLOCK_N)
