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
// A tile serves as keys and as values from the same shared memory. Where a token's rows are split,
// join_kernel takes the mean of the stretches, weighed by their sums of exponentials. No kernel
// allocates or synchronises with the host. Launchers return a cudaError_t.
#include "mla_consumer.cuh"
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
        RowList list = {p, row_idx, num_left, -1};
        if constexpr (kIsFp8) {
            Fp8Producer producer = {smem, list, thread, thread / 4, thread % 4, -1, -1, {}, {}, {}};
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
        consumer.finish(b, split, head);
    }
}

constexpr int kJoinThreads = kLatent / 4;
constexpr int kMaxSplits = 64;

// Grid (heads, tokens); 4 columns a thread.
__global__ void __launch_bounds__(kJoinThreads) join_kernel(const __grid_constant__ MlaParams p) {
    __shared__ float weight[kMaxSplits];  // the stretches' sums of exponentials, base 2
    const int h = blockIdx.x;
    const int b = blockIdx.y;
    const int64_t first = int64_t{b} * p.num_splits * p.num_heads + h;
    if (threadIdx.x < p.num_splits) {
        weight[threadIdx.x] = p.lse[first + int64_t{threadIdx.x} * p.num_heads];
    }
    __syncthreads();
    float best = kLowest;
    for (int s = 0; s < p.num_splits; ++s) {
        best = fmaxf(best, weight[s]);
    }
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    float total = 0.0f;
    const float* part = p.parts + first * kLatent + threadIdx.x * 4;
#pragma unroll 8
    for (int s = 0; s < p.num_splits; ++s) {
        const float share = weight[s] > kLowest ? exp2_fast(weight[s] - best) : 0.0f;
        const float4 value =
            *reinterpret_cast<const float4*>(part + int64_t{s} * p.num_heads * kLatent);
        sum.x += value.x * share;
        sum.y += value.y * share;
        sum.z += value.z * share;
        sum.w += value.w * share;
        total += share;
    }
    const float factor = total > 0.0f ? 1.0f / total : 0.0f;
    __nv_bfloat162* out = reinterpret_cast<__nv_bfloat162*>(
        p.out + b * p.out_stride_b + h * p.out_stride_h + threadIdx.x * 4);
    out[0] = __floats2bfloat162_rn(sum.x * factor, sum.y * factor);
    out[1] = __floats2bfloat162_rn(sum.z * factor, sum.w * factor);
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

int tidepool_sparse_mla(const tidepool::MlaParams* p, int is_fp8, cudaStream_t stream) {
    using namespace tidepool;
    const dim3 grid((p->num_heads + kHeads - 1) / kHeads, p->num_splits, p->batch);
    if (is_fp8 != 0) {
        sparse_mla_kernel<true><<<grid, Roles<true>::kThreads, sizeof(MlaSmem), stream>>>(*p);
    } else {
        sparse_mla_kernel<false><<<grid, Roles<false>::kThreads, sizeof(MlaSmem), stream>>>(*p);
    }
    if (p->num_splits > 1) {
        join_kernel<<<dim3(p->num_heads, p->batch), kJoinThreads, 0, stream>>>(*p);
    }
    return cudaGetLastError();
}

}  // extern "C"
