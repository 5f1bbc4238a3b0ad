// The swap-in kernels and their launchers (a plain C interface, called through ctypes).
//
// | kernel                             | grid                 | does |
// |------------------------------------|----------------------|---------------------------------------|
// | load_cache_to_device_buffer_kernel | B rows x ranks       | resolve a row, copy its misses | |
// resolve_kernel                     | B rows               | resolve only: the plan | |
// copy_plan_kernel                   | as told              | copy a plan for one layer, in order |
//
// No kernel allocates or synchronises with the host. Launchers return a cudaError_t.
#include <cuda_runtime.h>

#include <type_traits>

#include "params.h"
#include "resolve.cuh"
#include "smem_layout.cuh"
#include "transfer_item.cuh"

namespace tidepool {

constexpr int kThreads = 512;
constexpr int kCopyThreads = 512;
constexpr size_t kMaxSmemBytes = SmemLayout(kMaxTopk, kMaxHotRows).bytes;

// Miss i of a row just resolved.
struct SharedPlan {
    const int32_t* miss_host;
    const uint16_t* victim;
    int64_t first_row;

    __device__ longlong2 operator()(int i) const { return {miss_host[i], first_row + victim[i]}; }
};

// The items of a warp's lanes: item i is in lane i.
struct LanePlan {
    int64_t host_slot;
    int64_t device_row;

    __device__ longlong2 operator()(int i) const {
        return {__shfl_sync(kFullMask, host_slot, i), __shfl_sync(kFullMask, device_row, i)};
    }
};

template <int kSlots, bool kWide>
__global__ void __launch_bounds__(kThreads, kSlots <= 8 ? 2 : 1)
    load_cache_to_device_buffer_kernel(const __grid_constant__ ResolveParams p,
                                       const __grid_constant__ CopyParams rows) {
    extern __shared__ __align__(16) char smem_raw[];
    const int num_ranks = 1 << p.rank_shift;
    const int rank = blockIdx.x & (num_ranks - 1);
    RowResolver<kThreads, kSlots> resolver(p, smem_raw, blockIdx.x >> p.rank_shift, rank);
    const int num_misses = resolver.run(rows.num_host_rows);
    // Of four and more ranks, rank 0 writes the tables while the others copy. Neighbours in the
    // plan, which are neighbours in memory, go to different ranks at one time.
    const int idle_ranks = num_ranks >= 4 ? 1 : 0;
    if (rank >= idle_ranks && resolver.warp < p.copy_warps) {
        const int copy_ranks = num_ranks - idle_ranks;
        const SharedPlan plan = {resolver.miss_host(), resolver.victim(), resolver.first_row};
        copy_items<kWide>(rows, plan, resolver.warp * copy_ranks + rank - idle_ranks,
                          p.copy_warps * copy_ranks, num_misses, resolver.lane);
    }
    if (rank != 0) {
        cluster_wait(resolver.has_arrived);
    }
}

template <int kSlots>
__global__ void __launch_bounds__(kThreads, kSlots <= 8 ? 2 : 1)
    resolve_kernel(const __grid_constant__ ResolveParams p) {
    extern __shared__ __align__(16) char smem_raw[];
    launch_dependents();
    RowResolver<kThreads, kSlots> resolver(p, smem_raw, blockIdx.x, 0);
    resolver.run(INT64_MAX);
}

// First index of list[0 .. count), ascending, whose value is not below `bound`.
__device__ __forceinline__ int lower_bound(const int64_t* list, int count, int64_t bound) {
    int low = 0;
#pragma unroll 1
    for (int high = count; low < high;) {
        const int middle = (low + high) / 2;
        if (list[middle] < bound) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// Plain: the misses of all rows are one flat list, dealt to the warps of the grid one by one; the
// work is even however the misses are spread over rows, and the grid reads one window at a time.
// Sliced, for rows scattered over a large pool, plans ascending: each CTA takes the misses of all
// rows that lie in its slice of the pool. An SM then needs the address translations of its slice
// only, not of the whole pool.
template <bool kWide, bool kSliced>
__global__ void __launch_bounds__(kCopyThreads, 2)
    copy_plan_kernel(const __grid_constant__ PlanParams p,
                     const __grid_constant__ CopyParams rows) {
    constexpr int kWarps = kCopyThreads / kWarpSize;
    __shared__ int last_of_row[kMaxBatch];   // misses to copy of rows 0 .. b
    __shared__ int start_of_row[kMaxBatch];  // first of them in row b's list
    __shared__ unsigned warp_words[kWarpSize];
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    wait_for_previous();
    const int b = threadIdx.x;
    int own = b < p.batch ? max(0, min(p.num_misses[b], p.topk)) : 0;
    if constexpr (kSliced) {
        const int64_t* list = p.miss_host_slot + static_cast<int64_t>(b) * p.topk;
        const int64_t first_slot = rows.num_host_rows * blockIdx.x / gridDim.x;
        const int64_t end_slot = rows.num_host_rows * (blockIdx.x + 1) / gridDim.x;
        const int start = lower_bound(list, own, first_slot);
        own = lower_bound(list, own, end_slot) - start;
        start_of_row[b] = start;
    }
    unsigned inclusive = warp_inclusive_sum(own, lane);
    if (lane == kWarpSize - 1) {
        warp_words[warp] = inclusive;
    }
    __syncthreads();
    const WarpWords words = {warp_words};
    const int total = static_cast<int>(words.total(kWarps, lane));
    if (total == 0) {
        return;
    }
    inclusive += words.before(warp, lane);
    last_of_row[b] = static_cast<int>(inclusive);
    __syncthreads();
    const int num_warps = kSliced ? kWarps : gridDim.x * kWarps;
    const int first = kSliced ? warp : warp * gridDim.x + blockIdx.x;
#pragma unroll 1
    for (int base = first; base < total; base += num_warps * kWarpSize) {
        const int item = base + lane * num_warps;
        LanePlan plan = {-1, -1};
        if (item < total) {
            int low = 0;  // first row whose misses end behind the item
            int high = p.batch - 1;
            while (low < high) {
                const int middle = (low + high) / 2;
                if (last_of_row[middle] > item) {
                    high = middle;
                } else {
                    low = middle + 1;
                }
            }
            const int before = low == 0 ? 0 : last_of_row[low - 1];
            const int64_t at = static_cast<int64_t>(low) * p.topk + item - before +
                               (kSliced ? start_of_row[low] : 0);
            plan.host_slot = p.miss_host_slot[at];
            plan.device_row = p.miss_device_row[at];
        }
        const int left = (total - base + num_warps - 1) / num_warps;
        copy_items<kWide>(rows, plan, 0, 1, min(left, kWarpSize), lane);
    }
}

template <class Kernel, class... Params>
cudaError_t launch(Kernel kernel, int grid, int threads, size_t smem_bytes, int cluster,
                   bool is_dependent, cudaStream_t stream, const Params&... params) {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = smem_bytes;
    config.stream = stream;
    config.attrs = attributes;
    if (cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
        ++config.numAttrs;
    }
    if (is_dependent) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
        ++config.numAttrs;
    }
    return cudaLaunchKernelEx(&config, kernel, params...);
}

// Runs `body` with the kernel whose slots a thread cover `hot_rows`.
template <class Body>
cudaError_t with_slots(int hot_rows, const Body& body) {
    if (hot_rows <= 8 * kThreads) {
        return body(std::integral_constant<int, 8>{});
    }
    if (hot_rows <= 16 * kThreads) {
        return body(std::integral_constant<int, 16>{});
    }
    return hot_rows <= kMaxHotRows ? body(std::integral_constant<int, kMaxHotRows / kThreads>{})
                                   : cudaErrorInvalidValue;
}

template <class Kernel>
cudaError_t prepare_kernel(Kernel kernel, bool may_cluster) {
    static_assert(kMaxSmemBytes <= 48 * 1024, "raise the kernels' dynamic shared memory limit");
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    return error != cudaSuccess || !may_cluster
               ? error
               : cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

template <int kSlots>
cudaError_t prepare_slots(bool may_cluster) {
    cudaError_t error =
        prepare_kernel(load_cache_to_device_buffer_kernel<kSlots, true>, may_cluster);
    if (error == cudaSuccess) {
        error = prepare_kernel(load_cache_to_device_buffer_kernel<kSlots, false>, may_cluster);
    }
    return error == cudaSuccess ? prepare_kernel(resolve_kernel<kSlots>, false) : error;
}

}  // namespace tidepool

extern "C" {

const char* tidepool_error_string(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Loads every kernel on the current device, so that a first launch may be inside a graph capture.
// may_cluster: the device has thread block clusters.
int tidepool_prepare(int may_cluster) {
    using namespace tidepool;
    cudaError_t error = prepare_kernel(copy_plan_kernel<true, false>, false);
    if (error == cudaSuccess) error = prepare_kernel(copy_plan_kernel<false, false>, false);
    if (error == cudaSuccess) error = prepare_kernel(copy_plan_kernel<true, true>, false);
    if (error == cudaSuccess) error = prepare_kernel(copy_plan_kernel<false, true>, false);
    if (error == cudaSuccess) error = prepare_slots<8>(may_cluster != 0);
    if (error == cudaSuccess) error = prepare_slots<16>(may_cluster != 0);
    if (error == cudaSuccess) error = prepare_slots<kMaxHotRows / kThreads>(may_cluster != 0);
    return error;
}

int tidepool_resolve(const tidepool::ResolveParams* p, cudaStream_t stream) {
    using namespace tidepool;
    return with_slots(p->hot_rows, [&](auto slots) {
        const size_t bytes = SmemLayout(p->topk, p->hot_rows).bytes;
        return launch(resolve_kernel<decltype(slots)::value>, p->batch, kThreads, bytes, 1, false,
                      stream, *p);
    });
}

int tidepool_swap_in(const tidepool::ResolveParams* p, const tidepool::CopyParams* rows,
                     cudaStream_t stream) {
    using namespace tidepool;
    return with_slots(p->hot_rows, [&](auto slots) {
        const size_t bytes = SmemLayout(p->topk, p->hot_rows).bytes;
        constexpr int kSlots = decltype(slots)::value;
        const auto kernel = can_copy_wide(*rows)
                                ? load_cache_to_device_buffer_kernel<kSlots, true>
                                : load_cache_to_device_buffer_kernel<kSlots, false>;
        return launch(kernel, p->batch << p->rank_shift, kThreads, bytes, 1 << p->rank_shift, false,
                      stream, *p, *rows);
    });
}

int tidepool_copy_plan(const tidepool::PlanParams* p, const tidepool::CopyParams* rows,
                       int num_ctas, int is_sliced, int is_dependent, cudaStream_t stream) {
    using namespace tidepool;
    const bool is_wide = can_copy_wide(*rows);
    const auto kernel =
        is_sliced != 0 ? (is_wide ? copy_plan_kernel<true, true> : copy_plan_kernel<false, true>)
                       : (is_wide ? copy_plan_kernel<true, false> : copy_plan_kernel<false, false>);
    return launch(kernel, num_ctas, kCopyThreads, 0, 1, is_dependent != 0, stream, *p, *rows);
}

}  // extern "C"
