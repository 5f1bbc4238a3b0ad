// Sums over a block, cluster barriers, programmatic launch: the small tools of the kernels.
#pragma once

#include <climits>
#include <cstdint>

#include "transfer_item.cuh"

namespace tidepool {

__device__ __forceinline__ unsigned warp_sum(unsigned value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return __reduce_add_sync(kFullMask, value);
#else
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
        value += __shfl_xor_sync(kFullMask, value, step);
    }
    return value;
#endif
}

__device__ __forceinline__ unsigned warp_min(unsigned value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return __reduce_min_sync(kFullMask, value);
#else
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
        value = min(value, __shfl_xor_sync(kFullMask, value, step));
    }
    return value;
#endif
}

// Unsigned of the same order as the floats, which are not NaN; and back.
__device__ __forceinline__ unsigned ordered_bits(float value) {
    const int bits = __float_as_int(value);
    return static_cast<unsigned>(bits ^ (bits >> 31 | INT_MIN));
}

__device__ __forceinline__ float from_ordered_bits(unsigned bits) {
    const int value = static_cast<int>(bits);
    return __int_as_float(value ^ (~value >> 31 | INT_MIN));
}

// Inclusive sum over the lanes up to the caller's.
__device__ __forceinline__ unsigned warp_inclusive_sum(unsigned value, int lane) {
    for (int step = 1; step < kWarpSize; step *= 2) {
        const unsigned below = __shfl_up_sync(kFullMask, value, step);
        value += lane >= step ? below : 0;
    }
    return value;
}

// One word a warp, read by all warps after a barrier. A buffer is written again only after another
// barrier has passed since it was read.
struct WarpWords {
    uint32_t* words;  // [32]

    __device__ void put(int warp, int lane, unsigned value) const {
        if (lane == 0) {
            words[warp] = value;
        }
    }
    __device__ unsigned get(int num_warps, int lane) const {
        return lane < num_warps ? words[lane] : 0u;
    }
    __device__ unsigned total(int num_warps, int lane) const {
        return warp_sum(get(num_warps, lane));
    }
    __device__ unsigned before(int warp, int lane) const { return warp_sum(get(warp, lane)); }
};

// All CTAs of a batch row have read the tables: `cluster_arrive` after the last value read has been
// used, `cluster_wait` before the first write. Nothing is passed between CTAs, so the arrival needs
// no fence (a releasing one waits for every store before it, a microsecond).
__device__ __forceinline__ void cluster_arrive(bool is_cluster) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (is_cluster) {
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    }
#endif
}

__device__ __forceinline__ void cluster_wait(bool is_cluster) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (is_cluster) {
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    }
#endif
}

// Programmatic dependent launch: the next kernel may be set up now; it waits before it reads.
__device__ __forceinline__ void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace tidepool
