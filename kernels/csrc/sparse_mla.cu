// Split-KV attention over selected rows of 512 + 64 values, bf16 or FP8, for Hopper (sm_90a); a plain C
// interface, called by ctypes.
//
// The selected rows of all tokens, 64 a tile, are a list of tiles that is dealt evenly to lanes. A CTA
// takes 64 heads and a lane: one token's, a stretch of them, or the end of one and the start of others.
//
// | warpgroup | does                                                                           |
// |-----------|--------------------------------------------------------------------------------|
// | 0, 1      | every second tile's logits and weights; half of the output's columns, over all |
// |           | tiles (mla_consumer.cuh)                                                       |
// | 2         | gathers rows, up to two tiles ahead, and widens FP8 to bf16 (mla_producer.cuh) |
//
// A tile serves as keys and as values from the same shared memory. Where lanes share a token, the mean
// of their parts, weighed by their sums of exponentials, is taken in a cluster or by a second kernel
// (mla_join.cuh). No kernel allocates or synchronises with the host. Launchers return a
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

template <bool kIsFp8>
__device__ __forceinline__ void start_barriers(MlaSmem& smem, int begin, int end) {
    if (threadIdx.x == 0) {
        smem.begin = begin;
        smem.end = end;
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
}

__device__ __forceinline__ void wait_queries() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    fence_async();
    consumers_barrier();
}

template <bool kIsFp8, class Rows>
__device__ __forceinline__ void produce(MlaSmem& smem, const Rows& rows, int num_tiles) {
    if constexpr (kIsFp8) {
        const int thread = threadIdx.x - kConsumers;
        Fp8Producer<Rows> producer = {smem, rows, thread / 4, thread % 4, -1, -1, -1, {}, {}, {}};
        producer.run(num_tiles);
    } else {
        produce_bf16(smem, rows, num_tiles);
    }
}

// What the warpgroups that multiply do: the tiles from `begin` to `end`, token after token.
template <bool kIsFp8, bool kShares>
__device__ __forceinline__ void consume(const MlaParams& p, MlaSmem& smem, int begin, int end) {
    const int head = blockIdx.x * kHeads;
    const int number = blockIdx.y;
    const int lane = threadIdx.x % 32;
    // From one lane, so that the compiler sees that a warp's branches are uniform.
    const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
    const int top = static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane / 4;
    Consumer<kIsFp8> consumer = {p, smem, group, lane, top, {}, {}, {}, {}, {}};
    int b = begin / p.num_tiles;
    start_queries(p, smem, b, head);
    for (int at = begin;;) {
        const int token_end = p.trims != 0 ? end : (b + 1) * p.num_tiles;
        const int stop = min(token_end, end);
        wait_queries();
        consumer.start();
        if (at < stop) {
            consumer.run(at - begin, stop - begin);
        }
        if (!kShares && p.cluster > 1) {
            consumer.leave_part();
            join_in_cluster(p, smem, b, head);
            return;
        }
        const bool is_start = at == b * p.num_tiles;
        const bool is_whole = is_start && stop == token_end;
        if (kShares && stop < end) {  // the next token's queries come while this one's result is written
            consumers_barrier();
            start_queries(p, smem, b + 1, head);
        }
        consumer.finish(b, is_whole ? -1 : part_of(number, is_start), head);
        if (!kShares || stop >= end) {
            return;
        }
        at = stop;
        ++b;
    }
}

// Grid (blocks of 64 heads, lanes). kShares: a lane may have rows of several tokens.
template <bool kIsFp8, bool kShares>
__global__ void __launch_bounds__(Roles<kIsFp8>::kThreads, 1)
    sparse_mla_kernel(const __grid_constant__ MlaParams p) {
    extern __shared__ __align__(1024) char smem_raw[];
    MlaSmem& smem = *reinterpret_cast<MlaSmem*>(smem_raw);
    const int begin = first_tile(p, blockIdx.y);
    int end = first_tile(p, blockIdx.y + 1);
    if (p.trims != 0) {
        const int left = trimmed(p.row_idx + blockIdx.y * p.idx_stride_b, p.num_selected);
        end = begin + (left + kTileRows - 1) / kTileRows;
    }
    start_barriers<kIsFp8>(smem, begin, end);
    asm volatile("griddepcontrol.launch_dependents;");  // join_kernel, once there is room
    if (threadIdx.x >= kConsumers) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Roles<kIsFp8>::kToProduce));
        if constexpr (kShares) {
            produce<kIsFp8>(smem, RowsOfMany{p, smem}, end - begin);
        } else {
            const int b = begin / p.num_tiles;
            const int first = (begin - b * p.num_tiles) * kTileRows;
            const int left = min(p.num_selected - first, (end - begin) * kTileRows);
            const RowsOfOne rows = {p, p.row_idx + b * p.idx_stride_b + first, left};
            produce<kIsFp8>(smem, rows, end - begin);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Roles<kIsFp8>::kToConsume));
        consume<kIsFp8, kShares>(p, smem, begin, end);
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
    cudaLaunchConfig_t config = launch_config<kIsFp8>(grid, p.cluster, &attribute);
    config.stream = stream;
    const bool shares = p.num_lanes % p.batch != 0;
    return cudaLaunchKernelEx(
        &config, shares ? sparse_mla_kernel<kIsFp8, true> : sparse_mla_kernel<kIsFp8, false>, p);
}

template <bool kIsFp8, bool kShares>
cudaError_t raise_limit() {
    return cudaFuncSetAttribute(sparse_mla_kernel<kIsFp8, kShares>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(MlaSmem));
}

// Launched so that it may start before the kernel in front of it, which is ours, has ended.
int launch_join(const MlaParams& p, cudaStream_t stream) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(p.num_heads, p.batch);
    config.blockDim = dim3(kJoinThreads);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, join_kernel, p);
}

}  // namespace tidepool

extern "C" {

const char* tidepool_error_string(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Loads every kernel on the current device and raises their limits of shared memory.
int tidepool_prepare() {
    using namespace tidepool;
    const cudaError_t errors[] = {raise_limit<false, false>(), raise_limit<false, true>(),
                                  raise_limit<true, false>(), raise_limit<true, true>()};
    for (const cudaError_t error : errors) {
        if (error != cudaSuccess) {
            return error;
        }
    }
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, join_kernel);
}

// Clusters of `size` CTAs that run at once; 0 where they cannot.
int tidepool_max_clusters(int size, int* count) {
    using namespace tidepool;
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config = launch_config<true>(dim3(1, size, 1), size, &attribute);
    *count = 0;
    return cudaOccupancyMaxActiveClusters(count, sparse_mla_kernel<true, false>, &config);
}

int tidepool_sparse_mla(const tidepool::MlaParams* p, int is_fp8, cudaStream_t stream) {
    using namespace tidepool;
    const dim3 grid((p->num_heads + kHeads - 1) / kHeads, p->num_lanes);
    const int error = is_fp8 != 0 ? launch<true>(*p, grid, stream) : launch<false>(*p, grid, stream);
    if (error == cudaSuccess && p->num_lanes != p->batch && p->cluster == 1) {
        return launch_join(*p, stream);
    }
    return error;
}

}  // extern "C"
