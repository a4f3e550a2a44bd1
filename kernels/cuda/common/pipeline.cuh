// The ring through which a producer hands tiles to consumers, and the roles of a warp-specialised kernel. Use inside
// `#if defined(__CUDA_ARCH_FEAT_SM90_ALL)`.
//
// One thread of a producer warpgroup starts bulk copies; consumer warpgroups multiply. Between them stands shared memory for
// STAGES tiles. Each stage has two mbarriers: `full`, at which the producer's copies arrive, and `empty`, at which consumers
// say that they have read it. Tile number `use` goes to stage use % STAGES and is that stage's use / STAGES-th; that number's
// parity is the phase which both barriers are then in.
#pragma once
#include "common/mbarrier.cuh"
#include "common/named_barrier.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"

constexpr int WARPGROUP_WARPS = WARPGROUP / WARP;
constexpr int MAX_SHARED_BYTES = 227 << 10;  // of one block
constexpr int REGISTERS_OF_MULTIPROCESSOR = 65536;

// This warp's number, the same for all its threads and known to the compiler as such.
__device__ __forceinline__ int uniform_warp() { return __shfl_sync(FULL_WARP, threadIdx.x / WARP, 0); }

// Registers per thread, by all warps of a warpgroup, a multiple of 8: a producer gives up what the launch gave it, those that
// compute take it.
template <int REGISTERS>
__device__ __forceinline__ void warpgroup_reg_dealloc() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void warpgroup_reg_alloc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Where a producer or consumer stands in a ring of STAGES. Count is what its kernel counts tiles in: `unsigned` where the
// count runs on over everything that a block does, `int` where it is a loop's index.
template <int STAGES, class Count>
struct PipelineState {
    Count use = 0;  // tiles before this one

    __device__ __forceinline__ int stage() const { return static_cast<int>(use % STAGES); }
    __device__ __forceinline__ int phase() const { return static_cast<int>(use / STAGES % 2); }
};

// The barriers of a ring. A stage may be filled in PARTS, which consumers wait for one by one and leave together.
template <int STAGES, class Count = int, int PARTS = 1>
struct Pipeline {
    static constexpr int BYTES = 8 * (PARTS + 1) * STAGES;
    using State = PipelineState<STAGES, Count>;

    uint32_t barriers;  // shared address of BYTES bytes

    __device__ __forceinline__ static State at(Count use) { return {use}; }

    __device__ __forceinline__ uint32_t full(int stage, int part = 0) const { return barriers + 8 * (part * STAGES + stage); }
    __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + 8 * (PARTS * STAGES + stage); }

    // By one thread; as `mbarrier_init`. So many warps leave a stage.
    __device__ __forceinline__ void init(int consumer_warps) const {
        for (int stage = 0; stage < STAGES; ++stage) {
            for (int part = 0; part < PARTS; ++part) mbarrier_init(full(stage, part), 1);
            mbarrier_init(empty(stage), consumer_warps);
        }
    }

    // The producer waits until the stage may be overwritten; at first it may.
    __device__ __forceinline__ void producer_wait(const State& state) const {
        mbarrier_wait(empty(state.stage()), state.phase() ^ 1);
    }

    // It says how many bytes a part has, and gets the barrier on which they count.
    __device__ __forceinline__ uint32_t producer_expect(const State& state, int bytes, int part = 0) const {
        const uint32_t barrier = full(state.stage(), part);
        mbarrier_arrive_expect_tx(barrier, bytes);
        return barrier;
    }

    // Both.
    __device__ __forceinline__ uint32_t producer_acquire(const State& state, int bytes) const {
        producer_wait(state);
        return producer_expect(state, bytes);
    }

    // A consumer waits until a part has arrived.
    __device__ __forceinline__ void consumer_wait(const State& state, int part = 0) const {
        mbarrier_wait(full(state.stage(), part), L2P_FAULT_IF(10, state.use / (STAGES + 1) % 2, state.phase()));
    }

    // This warp's part of the products that read the stage is complete.
    __device__ __forceinline__ void consumer_release(int stage) const {
        if (threadIdx.x % WARP == 0) mbarrier_arrive(empty(stage));
    }

    // The same, said to the producers of a whole cluster, whose copies reach this block too.
    template <int CLUSTER>
    __device__ __forceinline__ void consumer_release_cluster(int stage) const {
        const int lane = threadIdx.x % WARP;
        if (lane < CLUSTER) mbarrier_arrive_cluster(empty(stage), lane);
    }
};
