// What convolutions share whatever they run on: flags, the order of channels, the taps of an upsampled image.
#pragma once
#include "common/types.cuh"

constexpr unsigned SILU = 1;        // the result is x * sigmoid(x) of the sum
constexpr unsigned F32_OUTPUT = 2;  // the output is f32, scaled
constexpr unsigned F32_IMAGE = 4;   // the image source is f32

// Of an image's rows and columns, even and odd.
constexpr int PARITIES = 4;

// Consecutive channels of one pixel that a lane holds: OF_LANE of every GROUP. Column 8 t + 2 m + j of a group stands for
// channel m * OF_LANE + 2 t + j, so that of a product's columns lane member m holds channels from m * OF_LANE on.
template <int OUTPUTS>
struct Channels {
    static constexpr int GROUP = OUTPUTS < 32 ? OUTPUTS : 32;
    static constexpr int OF_LANE = GROUP / 4;
    static constexpr int GROUPS = OUTPUTS / GROUP;
};

__device__ __forceinline__ int channel_of_column(int column, int group) {
    const int within = column % group;
    return column / group * group + within % 8 / 2 * (group / 4) + within / 8 * 2 + within % 2;
}

// Rows (or columns) first to last of a 3x3 kernel.
struct KernelRows {
    int first, last;
};

// A 3x3 kernel on an image of twice the height and width, nearest, meets two of the image's rows. Of an even row of the
// output the first of them meets kernel row 0 and the second one rows 1 and 2; of an odd row the first meets rows 0 and 1,
// the second one row 2. Columns alike.
__device__ __forceinline__ KernelRows upsampled_rows(int which, int parity) {
    return {which == 0 ? 0 : 1 + parity, which == 0 ? parity : 2};
}

// PyTorch's choice of the source index in a nearest resize.
__device__ __forceinline__ int nearest(int index, float ratio, int extent) {
    return min(static_cast<int>(static_cast<float>(index) * ratio), extent - 1);
}
