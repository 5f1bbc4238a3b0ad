// Split-KV attention over selected rows of 512 + 64 values, bf16 or FP8, for Hopper (sm_90a); a plain C
// interface, called by ctypes.
//
// A CTA takes 64 heads of one token and a stretch of its selected rows, 64 rows a tile:
//
// | warpgroup | does                                                                           |
// |-----------|--------------------------------------------------------------------------------|
// | 0, 1      | every second tile's logits and weights; half of the output's columns, over all |
// |           | tiles (mla_consumer.cuh)                                                       |
// | 2         | gathers rows, up to two tiles ahead, and widens FP8 to bf16 (mla_producer.cuh) |
//
// A tile serves as keys and as values from the same shared memory. Where a token's rows are split, the
// mean of the stretches, weighed by their sums of exponentials, is taken in a cluster or by a second
// kernel (mla_join.cuh). No kernel allocates or synchronises with the host. Launchers return a
// cudaError_t.
#include "mla_consumer.cuh"
#include "mla_join.cuh"
#include "mla_producer.cuh"

namespace tidepool {

// Sizes of a CTA. Registers are given to all threads alike at the start, then shared out anew by
// role; asking for more than that in all would wait for ever.
template <bool kIsFp8>
struct Roles {
    static constexpr int kProducing = kIsFp8 ? kWideningProducers : kProducers;
    static constexpr int kThreads = kConsumers + kProducing;
    static constexpr int kAtStart = 65536 / kThreads / 8 * 8;
    static constexpr int kToProduce = 56;
    static constexpr int kToConsume = kAtStart + (kAtStart - kToProduce) * kProducing / kConsumers;
    static_assert(kToConsume % 8 == 0, "registers are given by eights");
};

// Selected rows up to the last that is there; all threads call.
__device__ __forceinline__ int trimmed(const int32_t* row_idx, int num_left) {
    __shared__ int end;
    if (threadIdx.x == 0) {
        end = 0;
    }
    __syncthreads();
    int last = 0;
    for (int k = threadIdx.x; k < num_left; k += blockDim.x) {
        last = row_idx[k] >= 0 ? k + 1 : last;
    }
    last = __reduce_max_sync(0xffffffffu, last);
    if (threadIdx.x % 32 == 0) {
        atomicMax(&end, last);
    }
    __syncthreads();
    return end;
}

// Grid (blocks of 64 heads, splits, tokens).
template <bool kIsFp8>
__global__ void __launch_bounds__(Roles<kIsFp8>::kThreads, 1)
    sparse_mla_kernel(const __grid_constant__ MlaParams p) {
    extern __shared__ __align__(1024) char smem_raw[];
    MlaSmem& smem = *reinterpret_cast<MlaSmem*>(smem_raw);
    const int head = blockIdx.x * kHeads;
    const int split = blockIdx.y;
    const int b = blockIdx.z;
    const int first = split * p.split_rows;
    const int32_t* row_idx = p.row_idx + b * p.idx_stride_b + first;
    int num_left = max(0, min(p.split_rows, p.num_selected - first));
    if (p.trims != 0) {
        num_left = trimmed(row_idx, num_left);
    }
    const int num_tiles = (num_left + kTileRows - 1) / kTileRows;
    if (threadIdx.x == 0) {
        for (int group = 0; group < kGroups; ++group) {
            for (int part = 0; part < 2; ++part) {
                barrier_init(&smem.full[group][part], Roles<kIsFp8>::kProducing);
                barrier_init(&smem.empty[group][part], kConsumers / kGroups);
            }
            barrier_init(&smem.biased[group], Roles<kIsFp8>::kProducing);
            barrier_init(&smem.weighed[group], kConsumers / kGroups);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x >= kConsumers) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Roles<kIsFp8>::kToProduce));
        const int thread = threadIdx.x - kConsumers;
        const RowList list = {p, row_idx, num_left};
        if constexpr (kIsFp8) {
            Fp8Producer producer = {smem, list, thread / 4, thread % 4, -1, -1, -1, {}, {}, {}};
            producer.run(num_tiles);
        } else {
            produce_bf16(smem, list, num_tiles);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Roles<kIsFp8>::kToConsume));
        start_queries(p, smem, b, head);
        asm volatile("cp.async.wait_all;" ::: "memory");
        fence_async();
        consumers_barrier();
        const int lane = threadIdx.x % 32;
        // From one lane, so that the compiler sees that a warp's branches are uniform.
        const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
        Consumer<kIsFp8> consumer = {p,
                                     smem,
                                     group,
                                     lane,
                                     static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane / 4,
                                     {kLowest, kLowest},
                                     {},
                                     {},
                                     {},
                                     {}};
        if (num_tiles > 0) {
            consumer.run(num_tiles);
        }
        if (p.joins_in_cluster != 0) {
            consumer.leave_part();
            join_in_cluster(p, smem, b, head);
        } else {
            consumer.finish(b, split, head);
        }
    }
}

template <bool kIsFp8>
cudaLaunchConfig_t launch_config(dim3 grid, int cluster, cudaLaunchAttribute* attribute) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(Roles<kIsFp8>::kThreads);
    config.dynamicSmemBytes = sizeof(MlaSmem);
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim = {1, static_cast<unsigned>(cluster), 1};
    config.attrs = attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    return config;
}

template <bool kIsFp8>
int launch(const MlaParams& p, dim3 grid, cudaStream_t stream) {
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config =
        launch_config<kIsFp8>(grid, p.joins_in_cluster != 0 ? p.num_splits : 1, &attribute);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, sparse_mla_kernel<kIsFp8>, p);
}

}  // namespace tidepool

extern "C" {

const char* tidepool_error_string(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Loads every kernel on the current device and raises their limits of shared memory.
int tidepool_prepare() {
    using namespace tidepool;
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncSetAttribute(
        sparse_mla_kernel<false>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(MlaSmem));
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(
            sparse_mla_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(MlaSmem));
    }
    return error == cudaSuccess ? cudaFuncGetAttributes(&attributes, join_kernel) : error;
}

// Clusters of num_splits CTAs that run at once; 0 where they cannot.
int tidepool_max_clusters(int num_splits, int* count) {
    using namespace tidepool;
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config = launch_config<true>(dim3(1, num_splits, 1), num_splits, &attribute);
    *count = 0;
    return cudaOccupancyMaxActiveClusters(count, sparse_mla_kernel<true>, &config);
}

int tidepool_sparse_mla(const tidepool::MlaParams* p, int is_fp8, cudaStream_t stream) {
    using namespace tidepool;
    const dim3 grid((p->num_heads + kHeads - 1) / kHeads, p->num_splits, p->batch);
    const int error = is_fp8 != 0 ? launch<true>(*p, grid, stream) : launch<false>(*p, grid, stream);
    if (error == cudaSuccess && p->num_splits > 1 && p->joins_in_cluster == 0) {
        join_kernel<<<dim3(p->num_heads, p->batch), kJoinThreads, 0, stream>>>(*p);
        return cudaGetLastError();
    }
    return error;
}

}  // extern "C"
