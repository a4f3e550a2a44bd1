// How the gradient of a convolution's weight is shared out among blocks.
#pragma once
#include "common/types.cuh"

// What a block works on: one block of outputs, one of channels, one turn and a part of the pixels.
struct WeightsTask {
    int split;                        // of the pixels
    int turn;                         // of P::TURNS
    int first_output, first_channel;  // of its blocks, the channel within its source
    bool second;                      // the source
    int first_unit, units;            // tiles of pixels
};

// Of a plan P with TURNS, blocks of OUTPUT_BLOCK outputs and CHANNEL_BLOCK channels, and tiles of TILE_WIDTH x TILE_HEIGHT
// pixels; `splits` blocks share the pixels. Turns count first, so that blocks that read the same pixels run together.
template <class P>
__device__ __forceinline__ WeightsTask find_task(
    int items, int height, int width, int outputs, int first_channels, int second_channels, int splits) {
    int rest = blockIdx.x;
    const auto next = [&rest](int count) {
        const int here = rest % count;
        rest /= count;
        return here;
    };
    const auto blocks = [](int extent, int of) { return (extent + of - 1) / of; };
    WeightsTask task;
    task.turn = next(P::TURNS);
    const int first_blocks = blocks(first_channels, P::CHANNEL_BLOCK);
    const int channel_block = next(first_blocks + blocks(second_channels, P::CHANNEL_BLOCK));
    task.second = channel_block >= first_blocks;
    task.first_channel = (channel_block - (task.second ? first_blocks : 0)) * P::CHANNEL_BLOCK;
    task.first_output = next(blocks(outputs, P::OUTPUT_BLOCK)) * P::OUTPUT_BLOCK;
    task.split = rest;
    const long long units = static_cast<long long>(blocks(width, P::TILE_WIDTH)) * blocks(height, P::TILE_HEIGHT) * items;
    task.first_unit = static_cast<int>(units * task.split / splits);
    task.units = static_cast<int>(units * (task.split + 1) / splits) - task.first_unit;
    return task;
}
