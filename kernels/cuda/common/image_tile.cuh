// A tile of a three-channel image in shared memory, as the left operand of a 3x3 convolution's products.
//
// The nine values that one kernel row meets (three pixels, three colours) lie next to each other in an image, so a product of
// depth 32 takes them as three runs of five pairs, the tenth value of each run with weight zero, and two pairs that
// are not used. A run starts at an odd element for every other pixel; a second copy of the tile, one element
// further on, keeps all pairs on addresses that are multiples of four.
#pragma once
#include "common/mma.cuh"

constexpr int COLOURS = 3;
constexpr int RUN_PAIRS = 5;
constexpr int IMAGE_DEPTH = 32;  // summed elements, unused ones included
constexpr int IMAGE_STEPS = IMAGE_DEPTH / 16;

// Whether place k of the summed elements is a tap, and which: row-major in the kernel, colours fastest.
__device__ __forceinline__ bool is_image_tap(int k) { return k / (2 * RUN_PAIRS) < 3 && k % (2 * RUN_PAIRS) < 9; }
__device__ __forceinline__ int image_tap(int k) { return k / (2 * RUN_PAIRS) * 9 + k % (2 * RUN_PAIRS); }

// A tile of WIDTH x HEIGHT pixels; WIDTH is even.
template <int WIDTH, int HEIGHT>
struct ImageTile {
    static constexpr int WORDS = WIDTH * COLOURS / 2;  // of a row; a word is a pair of elements
    static constexpr int PITCH = WORDS + 1;            // words; the run of the last pixel but one ends in the word after the row
    static constexpr int COPY = HEIGHT * PITCH;        // words
    static constexpr int BYTES = 2 * COPY * 4;
    static_assert(WIDTH % 2 == 0);

    uint32_t* words;

    // The words of a tile on their way to shared memory, those of one of THREADS threads.
    template <int THREADS>
    struct Words {
        static constexpr int COUNT = (COPY + THREADS - 1) / THREADS;
        uint32_t here[COUNT], next[COUNT];  // a pair, and the one after it
    };

    // Starts reading the tile whose first pixel is (y, x) of image `item`, x even; zeros outside.
    template <int THREADS, class Element>
    __device__ __forceinline__ static void fetch(
        Words<THREADS>& to, const Element* image, int item, int y, int x, int height, int width) {
        const int length = width * COLOURS;  // elements of a row of the image
#pragma unroll
        for (int i = 0; i < Words<THREADS>::COUNT; ++i) {
            const int index = threadIdx.x + i * THREADS;
            const int row = index / PITCH, word = index % PITCH;
            const int at_y = y + row, element = x * COLOURS + 2 * word;
            const Element* const from = image + (static_cast<size_t>(item) * height + at_y) * length + element;
            const bool inside = index < COPY && static_cast<unsigned>(at_y) < static_cast<unsigned>(height);
            to.here[i] = inside ? pair_of(from, element, length) : 0;
            to.next[i] = inside ? pair_of(from + 2, element + 2, length) : 0;
        }
    }

    // Puts what was read in its place. Barriers must come before and after.
    template <int THREADS>
    __device__ __forceinline__ void put(const Words<THREADS>& from) const {
#pragma unroll
        for (int i = 0; i < Words<THREADS>::COUNT; ++i) {
            const int index = threadIdx.x + i * THREADS;
            if (index >= COPY) break;
            words[index] = from.here[i];
            words[COPY + index] = __byte_perm(from.here[i], from.next[i], 0x5432);  // the second of a pair, the first of the next
        }
    }

    // The pair from `element` on of a row of `length` elements, an even number apart from its start; zeros outside.
    template <class Element>
    __device__ __forceinline__ static uint32_t pair_of(const Element* from, int element, int length) {
        if (element < 0 || element >= length) return 0;
        if (length % 2 == 0) return load_pair(from);
        return pack_pair(to_float(from[0]), element + 1 < length ? to_float(from[1]) : 0.0f);
    }

    __device__ __forceinline__ static uint32_t load_pair(const bf16* from) { return *reinterpret_cast<const uint32_t*>(from); }
    __device__ __forceinline__ static uint32_t load_pair(const float* from) {
        const float2 pair = *reinterpret_cast<const float2*>(from);
        return pack_pair(pair.x, pair.y);
    }

    // Where this lane finds its pairs: relative to a pixel's run, those of the summed elements 2 m, 2 m + 1 and eight on of both
    // steps. The unused pairs read the first one.
    struct Offsets {
        int pair[2 * IMAGE_STEPS];

        __device__ __forceinline__ Offsets() {
#pragma unroll
            for (int i = 0; i < 2 * IMAGE_STEPS; ++i) {
                const int at = i * 4 + threadIdx.x % 4;
                pair[i] = at < 3 * RUN_PAIRS ? at / RUN_PAIRS * PITCH + at % RUN_PAIRS : 0;
            }
        }
    };

    // The run of the pixel in column `column`, 1 to WIDTH - 2, whose neighbourhood's first row is `row`.
    __device__ __forceinline__ const uint32_t* run(int row, int column) const {
        const int first = (column - 1) * COLOURS;
        return words + (first % 2) * COPY + row * PITCH + first / 2;
    }

    // Left operands for 16 pixels from `column` on, both steps.
    __device__ __forceinline__ void operands(uint32_t (&a)[IMAGE_STEPS][4], const Offsets& offsets, int row, int column) const {
        const int group = threadIdx.x % WARP / 4;
        const uint32_t* const first = run(row, column + group);
        const uint32_t* const second = run(row, column + group + 8);
#pragma unroll
        for (int step = 0; step < IMAGE_STEPS; ++step) {
            a[step][0] = first[offsets.pair[2 * step]];
            a[step][1] = second[offsets.pair[2 * step]];
            a[step][2] = first[offsets.pair[2 * step + 1]];
            a[step][3] = second[offsets.pair[2 * step + 1]];
        }
    }
};

// Weights [outputs, 27] as right operands: of the eight columns `tile`, both steps. Column 2 m + j of tile t stands for the
// output that `output_of` gives.
template <class OutputOf>
__device__ __forceinline__ void load_image_weights(
    uint32_t (&b)[IMAGE_STEPS][2], const bf16* weights, int outputs, const OutputOf& output_of) {
    const int column = threadIdx.x % WARP / 4, member = threadIdx.x % 4;
    const int output = output_of(column);
    const auto weight = [&](int k) {
        return output < outputs && is_image_tap(k) ? to_float(weights[output * 27 + image_tap(k)]) : 0.0f;
    };
#pragma unroll
    for (int step = 0; step < IMAGE_STEPS; ++step)
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const int k = 16 * step + 8 * part + 2 * member;
            b[step][part] = pack_pair(weight(k), weight(k + 1));
        }
}
