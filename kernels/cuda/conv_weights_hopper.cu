// The gradients of a convolution's weight and bias by Hopper's warpgroup products; engine/src/ops/conv/backward holds the
// contract, conv_weights.cu the kernel that adds up what blocks leave here.
//
// The weight's gradient is, for each tap, the product over all pixels of the sum's gradient `ds` and the source x seen from
// that tap. Both stand in shared memory pixel by pixel, as bulk copies bring them, and pixels are what is summed: both are
// operands by columns. A tap shifts x against ds, and a shift is an address. A product therefore computes several taps at once:
// its right operand is TAPS_ALONG panels, the same pixels of x seen from one column further on each, which are the taps of a
// kernel row; its left operand, where there are less than 64 outputs, panels of ds seen from one row further on each, which are
// kernel rows. What remains of kernel rows is shared by the warpgroups, or there is none and these share the pixels.
//
// The convolution of an upsampled image has 2x2 taps for each parity of its output's rows and columns (conv_hopper.cu): the
// same on x's grid, for the pixels of ds of one parity. What belongs to which tap of 3x3 is sorted out when parts are added
// up.
//
// The bias's gradient is one more product, of ds and ones, in those blocks that have the first channels of x.
//
// A block takes one block of outputs, one of channels (and one parity) and a part of the pixels; it leaves its sums in f32.
// They are added in a fixed order afterwards. Bound by the tensor cores with 64 outputs and channels; with 16 of either by
// memory.
#include "common/launch.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "common/conv.cuh"
#include "common/conv_weights.cuh"
#include "common/pipeline.cuh"

constexpr int TILE_WIDTH = MMA_K<bf16>;  // pixels: one product takes a row of a tile

template <int OUTPUTS_, int CHANNELS_, int TAPS_ALONG_, int TILE_HEIGHT_, int STAGES_>
struct Plan {
    static constexpr int OUTPUTS = OUTPUTS_, CHANNELS = CHANNELS_;  // of a box
    static constexpr int TAPS_ALONG = TAPS_ALONG_;                  // 1, 3, or 2: of an upsampled image
    static constexpr int TILE_WIDTH = ::TILE_WIDTH, TILE_HEIGHT = TILE_HEIGHT_, STAGES = STAGES_;
    static constexpr int TURNS = TAPS_ALONG == 2 ? PARITIES : 1;

    // With one tap there are no shifts: products are wider by more boxes of both.
    static constexpr int OUTPUT_BOXES = TAPS_ALONG == 1 ? 2 : 1, CHANNEL_BOXES = TAPS_ALONG == 1 ? 2 : 1;
    static constexpr int OUTPUT_BLOCK = OUTPUT_BOXES * OUTPUTS, CHANNEL_BLOCK = CHANNEL_BOXES * CHANNELS;

    static constexpr int ROW_PANELS = MMA_M / OUTPUTS;  // kernel rows of one product
    static constexpr int ROW_GROUPS = (TAPS_ALONG + ROW_PANELS - 1) / ROW_PANELS;
    static constexpr int SHARES = ROW_GROUPS * OUTPUT_BOXES;  // of warpgroups with results of their own
    static constexpr int PIXEL_PARTS = SHARES == 1 ? 2 : 1;   // of warpgroups that share the pixels
    static constexpr int CONSUMERS = SHARES * PIXEL_PARTS;
    static constexpr int COLUMNS = TAPS_ALONG * CHANNEL_BLOCK;
    static constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;

    // Bytes. Rows of ds past the last that a kernel row needs are left out: panels there read what follows, for results of no
    // interest. Panels overlap; compute-sanitizer takes them to lie one behind the other, and of the last stage reports reads
    // past the end that there are not.
    static constexpr int DS_ROW = OUTPUTS * 2, X_ROW = CHANNELS * 2;  // of a pixel
    static constexpr int DS_PITCH = TILE_WIDTH * DS_ROW, X_PITCH = (TILE_WIDTH + TAPS_ALONG - 1) * X_ROW;
    static constexpr int DS_HEIGHT = TILE_HEIGHT + TAPS_ALONG - 1;
    static constexpr int DS_BOX = DS_HEIGHT * DS_PITCH, X_BOX = TILE_HEIGHT * X_PITCH;
    static constexpr int padded(int bytes) { return (bytes + SWIZZLE_ATOM_BYTES - 1) / SWIZZLE_ATOM_BYTES * SWIZZLE_ATOM_BYTES; }
    static constexpr int DS_TILE = padded(DS_BOX), X_TILE = padded(X_BOX);
    static constexpr int STAGE = OUTPUT_BOXES * DS_TILE + CHANNEL_BOXES * X_TILE;
    static constexpr int COPIED = OUTPUT_BOXES * DS_BOX + CHANNEL_BOXES * X_BOX;

    // Shared memory, as offsets from its start.
    static constexpr int ONES = STAGES * STAGE;  // eight columns of the bias's product
    static constexpr int ONES_BYTES = SWIZZLE_ATOM_BYTES;
    static constexpr int BARRIERS = ONES + ONES_BYTES;
    using Ring = Pipeline<STAGES>;
    static constexpr int BYTES = BARRIERS + Ring::BYTES;
    static_assert(BYTES <= MAX_SHARED_BYTES && TILE_HEIGHT % PIXEL_PARTS == 0 && CONSUMERS <= 3);

    using Sums = Accumulators<COLUMNS>;
};

template <class P>
struct Shared {
    uint32_t start;

    __device__ uint32_t ds(int stage, int box) const { return start + stage * P::STAGE + box * P::DS_TILE; }
    __device__ uint32_t x(int stage, int box) const { return start + stage * P::STAGE + P::OUTPUT_BOXES * P::DS_TILE + box * P::X_TILE; }
    __device__ uint32_t ones() const { return start + P::ONES; }
    __device__ typename P::Ring ring() const { return {start + P::BARRIERS}; }
};

struct Operands {
    float* weight_parts;       // [parts, turns, outputs, TAPS_ALONG^2, stride]
    float* bias_parts;         // [parts, turns, outputs]
    int items, height, width;  // of x
    int outputs, first_channels, second_channels;
    int stride;  // channels of both sources, rounded up
    int splits;  // of the pixels
};

// What a block works on.
struct Task : WeightsTask {
    int row_parity, column_parity;  // of ds, with TAPS_ALONG == 2

    __device__ __forceinline__ explicit Task(const WeightsTask& task)
        : WeightsTask(task), row_parity(turn / 2), column_parity(turn % 2) {}
};

template <class P>
__device__ __forceinline__ void produce(
    const TensorMap& ds, const TensorMap& source, const Operands& o, const Shared<P>& shared, const Task& task) {
    const int across = (o.width + TILE_WIDTH - 1) / TILE_WIDTH, down = (o.height + P::TILE_HEIGHT - 1) / P::TILE_HEIGHT;
    for (int unit = 0; unit < task.units; ++unit) {
        const typename P::Ring::State state = P::Ring::at(unit);
        const int stage = state.stage(), index = task.first_unit + unit;
        const int x = index % across * TILE_WIDTH, y = index / across % down * P::TILE_HEIGHT, item = index / across / down;
        const uint32_t full = shared.ring().producer_acquire(state, P::COPIED);
        for (int box = 0; box < P::OUTPUT_BOXES; ++box) {
            const int output = task.first_output + box * P::OUTPUTS;
            if constexpr (P::TAPS_ALONG == 2) {
                const int column = task.column_parity * o.outputs + output;
                tma_load(shared.ds(stage, box), ds, full, column, x, task.row_parity, y - task.row_parity, item);
            } else {
                tma_load(shared.ds(stage, box), ds, full, output, x, y - P::TAPS_ALONG / 2, item);
            }
        }
        // The leftmost tap's pixels: output column 2 x + parity meets input columns x + parity - 1 and x + parity.
        const int left = P::TAPS_ALONG == 2 ? 1 - task.column_parity : P::TAPS_ALONG / 2;
        for (int box = 0; box < P::CHANNEL_BOXES; ++box) {
            tma_load(shared.x(stage, box), source, full, task.first_channel + box * P::CHANNELS, x - left, y, item);
        }
    }
}

// What a warpgroup computes: one of OUTPUT_BOXES, one of ROW_GROUPS, one of PIXEL_PARTS.
template <class P>
struct Share {
    int box, group, part;

    __device__ explicit Share(int consumer) : box(consumer % P::OUTPUT_BOXES), group(consumer / P::OUTPUT_BOXES % P::ROW_GROUPS),
                                              part(consumer / P::SHARES) {}
};

// The sums over all pixels of the task. The last kernel row meets the first row of ds, and so on upwards.
template <class P, bool WITH_BIAS>
__device__ __forceinline__ void accumulate(
    typename P::Sums& sums, Accumulators<8>& bias, const Shared<P>& shared, const Task& task, const Share<P>& share) {
    constexpr int ROWS = P::TILE_HEIGHT / P::PIXEL_PARTS;
    const uint64_t ones = descriptor<128, SWIZZLE_ATOM_BYTES>(shared.ones());
    hold(sums);
    if constexpr (WITH_BIAS) hold(bias);
    int before = 0;
    for (int unit = 0; unit < task.units; ++unit) {
        const typename P::Ring::State state = P::Ring::at(unit);
        const int stage = state.stage(), first_row = share.part * ROWS;
        shared.ring().consumer_wait(state);
        const uint64_t left = descriptor<P::DS_ROW, 8 * P::DS_ROW, P::DS_PITCH>(
            shared.ds(stage, share.box) + (first_row + share.group * P::ROW_PANELS) * P::DS_PITCH);
        const uint64_t right = descriptor<P::X_ROW, 8 * P::X_ROW, P::TAPS_ALONG == 1 ? P::X_TILE : P::X_ROW>(
            shared.x(stage, 0) + first_row * P::X_PITCH);
        wgmma_fence();
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            const uint64_t a = advance(left, row * P::DS_PITCH);
            wgmma<bf16, Major::MN, Major::MN>(sums, a, advance(right, row * P::X_PITCH));
            if constexpr (WITH_BIAS) wgmma<bf16, Major::MN, Major::K>(bias, a, ones);
        }
        wgmma_commit();
        wgmma_wait<1>();  // all but this stage's
        if (unit > 0) shared.ring().consumer_release(before);
        before = stage;
    }
    wgmma_wait<0>();
    hold(sums);
    if constexpr (WITH_BIAS) hold(bias);
}

// Writes what a warpgroup has summed.
template <class P>
__device__ __forceinline__ void store(const typename P::Sums& sums, const Operands& o, const Task& task, const Share<P>& share) {
    constexpr int TAPS = P::TAPS_ALONG * P::TAPS_ALONG;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % WARPGROUP_WARPS;
    const int channels = task.second ? o.second_channels : o.first_channels;
    const size_t part = static_cast<size_t>(task.split * P::PIXEL_PARTS + share.part) * P::TURNS + task.turn;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = 16 * warp + 8 * half + lane / 4;
        const int output = task.first_output + share.box * P::OUTPUTS + row % P::OUTPUTS;
        const int kernel_row = P::TAPS_ALONG - 1 - (share.group * P::ROW_PANELS + row / P::OUTPUTS);
        if (output >= o.outputs || kernel_row < 0) continue;
        float* const to = o.weight_parts + ((part * o.outputs + output) * TAPS + kernel_row * P::TAPS_ALONG) * o.stride +
            (task.second ? o.first_channels : 0);
#pragma unroll
        for (int i = 0; i < P::COLUMNS / 8; ++i) {
            const int column = 8 * i + 2 * (lane % 4);
            const int tap = column / P::CHANNEL_BLOCK, channel = task.first_channel + column % P::CHANNEL_BLOCK;
            if (channel >= channels) continue;
            *reinterpret_cast<float2*>(to + tap * o.stride + channel) = make_float2(sums[i][2 * half], sums[i][2 * half + 1]);
        }
    }
}

// And of the bias: the rows of the panel in which ds stands unshifted.
template <class P>
__device__ __forceinline__ void store_bias(
    const Accumulators<8>& bias, const Operands& o, const Task& task, const Share<P>& share, int panel) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % WARPGROUP_WARPS;
    if (lane % 4 != 0) return;
    const size_t part = static_cast<size_t>(task.split * P::PIXEL_PARTS + share.part) * P::TURNS + task.turn;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = 16 * warp + 8 * half + lane / 4;
        const int output = task.first_output + share.box * P::OUTPUTS + row % P::OUTPUTS;
        if (row / P::OUTPUTS == panel && output < o.outputs) o.bias_parts[part * o.outputs + output] = bias[0][2 * half];
    }
}

template <class P>
__device__ __forceinline__ void consume(const Operands& o, const Shared<P>& shared, const Task& task, int consumer) {
    const Share<P> share(consumer);
    // The row of ds that meets x's own row, counted from the tile's first.
    const int own_row = P::TAPS_ALONG == 2 ? task.row_parity : L2P_FAULT_IF(24, 0, P::TAPS_ALONG / 2);
    typename P::Sums sums = {};
    Accumulators<8> bias = {};
    if (!task.second && task.first_channel == 0 && own_row / P::ROW_PANELS == share.group) {
        accumulate<P, true>(sums, bias, shared, task, share);
        store_bias<P>(bias, o, task, share, own_row % P::ROW_PANELS);
    } else {
        accumulate<P, false>(sums, bias, shared, task, share);
    }
    store<P>(sums, o, task, share);
}

template <class P>
__device__ __forceinline__ void run(
    const TensorMap& ds, const TensorMap& first, const TensorMap& second, const Operands& o) {
    // All registers of the multiprocessor: what the launch gives each thread, shared out anew.
    constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = P::CONSUMERS == 2 ? 240 : 160;
    static_assert((PRODUCER_REGISTERS + P::CONSUMERS * CONSUMER_REGISTERS) * WARPGROUP <= REGISTERS_OF_MULTIPROCESSOR);
    extern __shared__ __align__(1024) unsigned char memory[];
    const Shared<P> shared{shared_address(memory)};
    const Task task(find_task<P>(o.items, o.height, o.width, o.outputs, o.first_channels, o.second_channels, o.splits));
    if (threadIdx.x == 0) {
        tma_prefetch(ds);
        tma_prefetch(task.second ? second : first);
        shared.ring().init(P::CONSUMERS * WARPGROUP_WARPS);
        mbarrier_init_fence();
    }
    for (int i = threadIdx.x; i < P::ONES_BYTES / 4; i += P::THREADS) {
        reinterpret_cast<uint32_t*>(memory + P::ONES)[i] = pack_pair(1.0f, 1.0f);
    }
    async_proxy_fence();
    __syncthreads();  // barriers and ones are there before anybody uses them

    const int warp = uniform_warp();
    if (warp < WARPGROUP_WARPS) {
        warpgroup_reg_dealloc<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) produce<P>(ds, task.second ? second : first, o, shared, task);
        return;
    }
    warpgroup_reg_alloc<CONSUMER_REGISTERS>();
    consume<P>(o, shared, task, warp / WARPGROUP_WARPS - 1);
}

// ds: map of the sum's gradient [items, height, width, outputs] by boxes of OUTPUTS channels and TILE_WIDTH x DS_HEIGHT pixels;
// for an upsampled image of [items, height, 2, width, 2 outputs], its rows and columns by their parities. first, second: of
// the sources by boxes of CHANNELS channels and a tile of pixels with its margin on both sides (the first one's map where there
// is no second). As many blocks as turns, blocks of channels of each source, blocks of outputs and splits. The launch's tile:
// outputs and channels of a block, rows of a tile, parts of the pixels within a block.
#define WEIGHTS_KERNEL(name, ...)                                                                                          \
    using Plan_##name = Plan<__VA_ARGS__>;                                                                                 \
    extern "C" __global__ __launch_bounds__(Plan_##name::THREADS, 1) void name(                                            \
        const __grid_constant__ TensorMap ds, const __grid_constant__ TensorMap first,                                     \
        const __grid_constant__ TensorMap second, float* weight_parts, float* bias_parts, int items, int height, int width, \
        int outputs, int first_channels, int second_channels, int stride, int splits) {                                    \
        run<Plan_##name>(ds, first, second,                                                                                \
                         {weight_parts, bias_parts, items, height, width, outputs, first_channels, second_channels,        \
                          stride, splits});                                                                                \
    }                                                                                                                      \
    L2P_LAUNCH(name, Plan_##name::THREADS, Plan_##name::BYTES, Plan_##name::OUTPUT_BLOCK, Plan_##name::CHANNEL_BLOCK,      \
               Plan_##name::TILE_HEIGHT, Plan_##name::PIXEL_PARTS)

// weights_<kernel>_<outputs>x<channels> of a block
WEIGHTS_KERNEL(weights_3x3_16x16, 16, 16, 3, 16, 8)
WEIGHTS_KERNEL(weights_3x3_16x32, 16, 32, 3, 16, 6)
WEIGHTS_KERNEL(weights_3x3_16x64, 16, 64, 3, 8, 6)
WEIGHTS_KERNEL(weights_3x3_32x16, 32, 16, 3, 16, 6)
WEIGHTS_KERNEL(weights_3x3_32x32, 32, 32, 3, 16, 5)
WEIGHTS_KERNEL(weights_3x3_32x64, 32, 64, 3, 8, 6)
WEIGHTS_KERNEL(weights_3x3_64x16, 64, 16, 3, 8, 6)
WEIGHTS_KERNEL(weights_3x3_64x32, 64, 32, 3, 8, 6)
WEIGHTS_KERNEL(weights_3x3_64x64, 64, 64, 3, 8, 5)
WEIGHTS_KERNEL(weights_upsampled_16x16, 16, 16, 2, 16, 8)
WEIGHTS_KERNEL(weights_upsampled_32x32, 32, 32, 2, 16, 5)
WEIGHTS_KERNEL(weights_upsampled_64x64, 64, 64, 2, 8, 5)
WEIGHTS_KERNEL(weights_1x1_128x128, 64, 64, 1, 4, 6)
#endif
