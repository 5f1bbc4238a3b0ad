// Split-KV attention over selected bf16 rows of 512 + 64 values, for Hopper (sm_90a); a plain C
// interface, called by ctypes.
//
// A CTA takes 64 heads of one token and a stretch of its selected rows, 64 rows a tile:
//
// | warpgroup | does                                                                            |
// |-----------|---------------------------------------------------------------------------------|
// | 0, 1      | logits of 32 of the tile's rows each; weights exchanged through shared memory;  |
// |           | then half of the output's columns each, over all 64 rows                        |
// | 2         | gathers rows, one tile ahead (cp.async, a full and an empty barrier a tile)     |
//
// A tile serves as keys and as values from the same shared memory. The next tile's logits are queued
// behind this tile's output, so the tensor cores wait for the softmax alone. Where a token's rows are
// split, join_kernel takes the mean of the stretches, weighed by their sums of exponentials. No
// kernel allocates or synchronises with the host. Launchers return a cudaError_t.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "wgmma.cuh"

namespace tidepool {

constexpr int kHeads = 64;  // of a CTA
constexpr int kTileRows = 64;
constexpr int kLatent = 512;
constexpr int kRope = 64;
constexpr int kPanels = (kLatent + kRope) / 64;
constexpr int kPanelBytes = 64 * kPanelRowBytes;
constexpr int kTileBytes = kPanels * kPanelBytes;
constexpr int kStages = 2;
constexpr int kConsumers = 256;
constexpr int kProducers = 128;
constexpr int kHalfRows = kTileRows / 2;
constexpr int kHalfColumns = kLatent / 2;
constexpr float kNone = -3.0e38f;  // instead of -infinity, so that differences stay numbers

// kernels/cuda_sparse_mla.py mirrors this struct.
struct MlaParams {
    const __nv_bfloat16* q_latent;  // [B, H, 512]
    const __nv_bfloat16* q_rope;    // [B, H, 64]
    const char* rows;               // [N, row_stride bytes]
    const int32_t* row_idx;         // [B, K], -1 = none
    float* parts;                   // [B, S, H, 512]; written if S > 1
    float* lse;                     // [B, S, H], base 2; written if S > 1
    __nv_bfloat16* out;             // [B, H, 512]; written
    int64_t latent_stride_b;        // strides in values
    int64_t latent_stride_h;
    int64_t rope_stride_b;
    int64_t rope_stride_h;
    int64_t idx_stride_b;
    int64_t out_stride_b;
    int64_t out_stride_h;
    int64_t row_stride;    // bytes
    int32_t batch;         // B
    int32_t num_heads;     // H
    int32_t num_selected;  // K
    int32_t num_rows;      // N
    int32_t num_splits;    // S
    int32_t split_rows;    // of a stretch, a multiple of 64
    float scale_log2;      // softmax scale * log2(e)
};

struct MlaSmem {
    char query[kTileBytes];           // panels of 64 heads
    char tile[kStages][kTileBytes];   // panels of 64 rows
    char weight[kPanelBytes];         // 64 heads x 64 rows
    float best[2][kHeads];            // of a warpgroup's 32 rows
    float sum[2][kHeads];
    uint64_t full[kStages];
    uint64_t empty[kStages];
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count));
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives once all earlier cp.async of this thread have landed.
__device__ __forceinline__ void barrier_arrive_copied(uint64_t* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "wait:\n"
        "mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
        "@p bra done;\n"
        "bra wait;\n"
        "done:\n}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void fence_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void consumers_barrier() {
    asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
}

// 16 bytes; zeros if not `is_there`.
__device__ __forceinline__ void copy_word(uint32_t target, const char* source, bool is_there) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                 "r"(is_there ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ float exp2_fast(float value) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

// Rows of the CTA's stretch, tile after tile.
__device__ __forceinline__ void produce(const MlaParams& p, MlaSmem& smem, const int32_t* row_idx,
                                        int num_left, int num_tiles) {
    constexpr int kRowsAPass = kProducers / 8;
    constexpr int kRowPasses = kTileRows / kRowsAPass;
    const int thread = threadIdx.x - kConsumers;
    const int word = thread % 8;
    const int first = thread / 8;
    for (int t = 0; t < num_tiles; ++t) {
        const int stage = t % kStages;
        int row[kRowPasses];
#pragma unroll
        for (int i = 0; i < kRowPasses; ++i) {
            const int k = t * kTileRows + first + i * kRowsAPass;
            row[i] = k < num_left ? row_idx[k] : -1;
        }
        if (t >= kStages) {
            barrier_wait(&smem.empty[stage], (t / kStages - 1) % 2);
        }
        const uint32_t tile = shared_address(smem.tile[stage]);
#pragma unroll
        for (int i = 0; i < kRowPasses; ++i) {
            const bool is_there = row[i] >= 0 && row[i] < p.num_rows;
            const char* source = p.rows + (is_there ? row[i] * p.row_stride : 0) + word * 16;
            const uint32_t target = tile + swizzled(first + i * kRowsAPass, word);
#pragma unroll
            for (int panel = 0; panel < kPanels; ++panel) {
                copy_word(target + panel * kPanelBytes, source + panel * kPanelRowBytes, is_there);
            }
        }
        barrier_arrive_copied(&smem.full[stage]);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// Starts copying the CTA's heads into panels; heads past the last are zeros.
__device__ __forceinline__ void start_queries(const MlaParams& p, MlaSmem& smem, int b, int head) {
    const int word = threadIdx.x % 8;
    const uint32_t target = shared_address(smem.query);
#pragma unroll
    for (int pass = 0; pass < kHeads * 8 / kConsumers; ++pass) {
        const int h = static_cast<int>(threadIdx.x) / 8 + pass * (kConsumers / 8);
        const bool is_there = head + h < p.num_heads;
        const int64_t row = is_there ? head + h : head;
        const __nv_bfloat16* latent =
            p.q_latent + b * p.latent_stride_b + row * p.latent_stride_h + word * 8;
        const __nv_bfloat16* rope = p.q_rope + b * p.rope_stride_b + row * p.rope_stride_h + word * 8;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
            const __nv_bfloat16* source = panel < kLatent / 64 ? latent + panel * 64 : rope;
            copy_word(target + panel * kPanelBytes + swizzled(h, word),
                      reinterpret_cast<const char*>(source), is_there);
        }
    }
}

struct Consumer {
    const MlaParams& p;
    MlaSmem& smem;
    int group;  // warpgroup: which rows' logits, which half of the columns
    int lane;
    int top;    // the thread has heads `top` and `top` + 8
    float best[2];
    float sum[2];
    int next_row[kHalfRows / 4];
    float logits[kHalfRows / 2];
    float acc[kHalfColumns / 2];

    // Nothing but products may write their sums while some are in flight.
    __device__ __forceinline__ void clear_logits() {
#pragma unroll
        for (int i = 0; i < kHalfRows / 2; ++i) {
            logits[i] = 0.0f;
        }
        keep(logits);
    }

    // Queues the logits of this warpgroup's rows of a tile.
    __device__ __forceinline__ void start_logits(int stage) {
        const uint32_t query = shared_address(smem.query);
        const uint32_t tile =
            shared_address(smem.tile[stage]) + group * kHalfRows * kPanelRowBytes;
        wgmma_begin();
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                const int offset = panel * kPanelBytes + step * 32;
                wgmma_n32(logits, descriptor_along_rows(query + offset),
                          descriptor_along_rows(tile + offset), true);
            }
        }
        wgmma_commit();
    }

    // Queues weights * values for this warpgroup's columns of a tile.
    __device__ __forceinline__ void start_output(int stage) {
        const uint32_t weight = shared_address(smem.weight);
        const uint32_t tile =
            shared_address(smem.tile[stage]) + group * (kHalfColumns / 64) * kPanelBytes;
        wgmma_begin();
#pragma unroll
        for (int step = 0; step < kTileRows / 16; ++step) {
            wgmma_n256(acc, descriptor_along_rows(weight + step * 32),
                       descriptor_across_rows(tile + step * 16 * kPanelRowBytes, kPanelBytes), true);
        }
        wgmma_commit();
    }

    // Loads the numbers of this thread's rows of a tile, -1 past the end.
    __device__ __forceinline__ void load_rows(const int32_t* row_idx, int num_left, int t) {
        const int first = t * kTileRows + group * kHalfRows + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kHalfRows / 4; ++j) {
            const int k = first + j / 2 * 8 + j % 2;
            next_row[j] = k < num_left ? row_idx[k] : -1;
        }
    }

    // Which of them are there: a bit for each of the thread's columns of `logits`.
    __device__ __forceinline__ uint32_t rows_there() const {
        uint32_t there = 0;
#pragma unroll
        for (int j = 0; j < kHalfRows / 4; ++j) {
            there |= (next_row[j] >= 0 && next_row[j] < p.num_rows ? 1u : 0u) << j;
        }
        return there;
    }

    // Logits to weights in shared memory; running maximum and sum; scales what was summed before.
    __device__ __forceinline__ void softmax(uint32_t there) {
        float tile_best[2] = {kNone, kNone};
#pragma unroll
        for (int i = 0; i < kHalfRows / 2; ++i) {
            const int column = i / 4 * 2 + i % 2;
            logits[i] = (there >> column & 1) != 0 ? logits[i] * p.scale_log2 : kNone;
            tile_best[i / 2 % 2] = fmaxf(tile_best[i / 2 % 2], logits[i]);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            tile_best[r] = fmaxf(tile_best[r], __shfl_xor_sync(0xffffffffu, tile_best[r], 1));
            tile_best[r] = fmaxf(tile_best[r], __shfl_xor_sync(0xffffffffu, tile_best[r], 2));
        }
        if (lane % 4 == 0) {
            smem.best[group][top] = tile_best[0];
            smem.best[group][top + 8] = tile_best[1];
        }
        consumers_barrier();
        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float other = smem.best[1 - group][top + 8 * r];
            const float now = fmaxf(best[r], fmaxf(tile_best[r], other));
            factor[r] = exp2_fast(best[r] - now);
            best[r] = now;
            sum[r] *= factor[r];
        }
#pragma unroll
        for (int i = 0; i < kHalfRows / 2; i += 2) {
            const int r = i / 2 % 2;
            // A row that is not there counts for nothing even if none has been there so far.
            const bool first = logits[i] > kNone;
            const bool second = logits[i + 1] > kNone;
            const float low = first ? exp2_fast(logits[i] - best[r]) : 0.0f;
            const float high = second ? exp2_fast(logits[i + 1] - best[r]) : 0.0f;
            sum[r] += low + high;
            const int column = group * kHalfRows + i / 4 * 8 + lane % 4 * 2;
            const int at = swizzled(top + 8 * r, column / 8) + column % 8 * 2;
            *reinterpret_cast<__nv_bfloat162*>(smem.weight + at) = __floats2bfloat162_rn(low, high);
        }
        fence_async();
        // Maxima seldom grow after the first tiles.
        if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
            for (int i = 0; i < kHalfColumns / 2; ++i) {
                acc[i] *= factor[i / 2 % 2];
            }
        }
        consumers_barrier();
    }

    __device__ __forceinline__ void run(const int32_t* row_idx, int num_left, int num_tiles) {
        load_rows(row_idx, num_left, 0);
        barrier_wait(&smem.full[0], 0);
        fence_async();
        clear_logits();
        start_logits(0);
        for (int t = 0; t < num_tiles; ++t) {
            const int stage = t % kStages;
            const uint32_t there = rows_there();
            load_rows(row_idx, num_left, t + 1);
            wgmma_wait<0>();
            keep(logits);
            softmax(there);
            clear_logits();
            keep(acc);
            start_output(stage);
            if (t + 1 < num_tiles) {
                const int next = (t + 1) % kStages;
                barrier_wait(&smem.full[next], (t + 1) / kStages % 2);
                fence_async();
                start_logits(next);
                wgmma_wait<1>();
                keep(acc);
            } else {
                wgmma_wait<0>();
                keep(acc);
            }
            barrier_arrive(&smem.empty[stage]);
        }
    }

    __device__ __forceinline__ void finish(int b, int split, int head) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
            sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
        }
        if (lane % 4 == 0) {
            smem.sum[group][top] = sum[0];
            smem.sum[group][top + 8] = sum[1];
        }
        consumers_barrier();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int h = head + top + 8 * r;
            const float total = smem.sum[0][top + 8 * r] + smem.sum[1][top + 8 * r];
            const float factor = total > 0.0f ? 1.0f / total : 0.0f;
            if (h >= p.num_heads) {
                continue;
            }
            const int column = group * kHalfColumns + lane % 4 * 2;
            if (p.num_splits == 1) {
                __nv_bfloat16* out = p.out + b * p.out_stride_b + h * p.out_stride_h + column;
#pragma unroll
                for (int j = 0; j < kHalfColumns / 8; ++j) {
                    *reinterpret_cast<__nv_bfloat162*>(out + 8 * j) = __floats2bfloat162_rn(
                        acc[4 * j + 2 * r] * factor, acc[4 * j + 2 * r + 1] * factor);
                }
                continue;
            }
            const int64_t at = (int64_t{b} * p.num_splits + split) * p.num_heads + h;
            float* part = p.parts + at * kLatent + column;
#pragma unroll
            for (int j = 0; j < kHalfColumns / 8; ++j) {
                *reinterpret_cast<float2*>(part + 8 * j) =
                    make_float2(acc[4 * j + 2 * r] * factor, acc[4 * j + 2 * r + 1] * factor);
            }
            if (group == 0 && lane % 4 == 0) {
                p.lse[at] = total > 0.0f ? best[r] + log2f(total) : kNone;
            }
        }
    }
};

// Grid (blocks of 64 heads, splits, tokens).
__global__ void __launch_bounds__(kConsumers + kProducers, 1)
    sparse_mla_kernel(const __grid_constant__ MlaParams p) {
    extern __shared__ __align__(1024) char smem_raw[];
    MlaSmem& smem = *reinterpret_cast<MlaSmem*>(smem_raw);
    const int head = blockIdx.x * kHeads;
    const int split = blockIdx.y;
    const int b = blockIdx.z;
    const int first = split * p.split_rows;
    const int num_left = max(0, min(p.split_rows, p.num_selected - first));
    const int num_tiles = (num_left + kTileRows - 1) / kTileRows;
    const int32_t* row_idx = p.row_idx + b * p.idx_stride_b + first;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            barrier_init(&smem.full[stage], kProducers);
            barrier_init(&smem.empty[stage], kConsumers);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x >= kConsumers) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        produce(p, smem, row_idx, num_left, num_tiles);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        start_queries(p, smem, b, head);
        asm volatile("cp.async.wait_all;" ::: "memory");
        fence_async();
        consumers_barrier();
        const int lane = threadIdx.x % 32;
        Consumer consumer = {p,
                             smem,
                             static_cast<int>(threadIdx.x) / 128,
                             lane,
                             static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane / 4,
                             {kNone, kNone},
                             {},
                             {},
                             {},
                             {}};
        if (num_tiles > 0) {
            consumer.run(row_idx, num_left, num_tiles);
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
    float best = kNone;
    for (int s = 0; s < p.num_splits; ++s) {
        best = fmaxf(best, weight[s]);
    }
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    float total = 0.0f;
    const float* part = p.parts + first * kLatent + threadIdx.x * 4;
#pragma unroll 8
    for (int s = 0; s < p.num_splits; ++s) {
        const float share = weight[s] > kNone ? exp2_fast(weight[s] - best) : 0.0f;
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
    const cudaError_t error = cudaFuncSetAttribute(
        sparse_mla_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(MlaSmem));
    return error == cudaSuccess ? cudaFuncGetAttributes(&attributes, join_kernel) : error;
}

int tidepool_sparse_mla(const tidepool::MlaParams* p, cudaStream_t stream) {
    using namespace tidepool;
    const dim3 grid((p->num_heads + kHeads - 1) / kHeads, p->num_splits, p->batch);
    sparse_mla_kernel<<<grid, kConsumers + kProducers, sizeof(MlaSmem), stream>>>(*p);
    if (p->num_splits > 1) {
        join_kernel<<<dim3(p->num_heads, p->batch), kJoinThreads, 0, stream>>>(*p);
    }
    return cudaGetLastError();
}

}  // extern "C"
