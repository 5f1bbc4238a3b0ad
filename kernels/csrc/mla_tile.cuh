// What the parts of sparse_mla.cu share: parameters, shared memory, barriers.
#pragma once

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
constexpr int kHalfColumns = kLatent / 2;
constexpr int kHalfPanels = kHalfColumns / 64;
constexpr int kGroups = 2;  // warpgroups that multiply, and tiles in shared memory
constexpr int kConsumers = 128 * kGroups;
constexpr int kProducers = 128;        // threads that bring bf16 rows
constexpr int kWideningProducers = 256;  // that bring FP8 rows and widen them
constexpr int kTilesAhead = 2;       // of the loads are FP8 rows asked into the L2
constexpr float kNone = -3.0e38f;    // logit of a row that is not there
constexpr float kLowest = -1.0e30f;  // maximum of no logits; over kNone, so that its weight is 0
constexpr int kMaxClusterSplits = 8;

// kernels/cuda_sparse_mla.py mirrors this struct.
struct MlaParams {
    const __nv_bfloat16* q_latent;  // [B, H, 512]
    const __nv_bfloat16* q_rope;    // [B, H, 64]
    const char* rows;               // [N, row_stride bytes], bf16 or FP8
    const int32_t* row_idx;         // [B, K], -1 = none
    float* parts;                   // [2 L, H, 512]; what lanes have of tokens they share
    float* lse;                     // [2 L, H], base 2
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
    int32_t num_tiles;     // of a token, of 64 rows
    int32_t tile_inverse;  // 2^32 / num_tiles, rounded up
    int32_t num_lanes;     // L, at most B * num_tiles; the tiles of all tokens are dealt to them evenly
    int32_t cluster;       // lanes of a token are a cluster of this size; no parts. 1: none
    int32_t trims;         // L = B, and a CTA looks first where its token's rows end
    float scale_log2;      // softmax scale * log2(e)
};

// The t-th tile of a CTA belongs to warpgroup t % 2 and lies in its place. Its first part is the panels of that
// group's output columns and the rope panel, its second part the other group's columns.
struct MlaSmem {
    char query[kTileBytes];           // panels of 64 heads
    char tile[kGroups][kTileBytes];   // panels of 64 rows
    char weight[kPanelBytes];         // 64 heads x 64 rows, from one group to the other
    float best[kGroups][kHeads];      // maximum over all tiles up to the group's last
    float sum[kGroups][kHeads];
    float bias[kGroups][kTileRows];   // of a row's logits: 0, or kNone if it is not there
    int begin;                        // the CTA's tiles of those of all tokens
    int end;
    uint64_t full[kGroups][2];
    uint64_t empty[kGroups][2];
    uint64_t biased[kGroups];         // `bias` of the group's tile is written
    uint64_t weighed[kGroups];        // `weight` and `best` of the group's tile are written
};

// Tiles of all tokens before those of a lane.
__device__ __forceinline__ int first_tile(const MlaParams& p, int lane) {
    return static_cast<int>(int64_t{lane} * p.batch * p.num_tiles / p.num_lanes);
}

// The token of a tile: exact while B * num_tiles^2 is below 2^32.
__device__ __forceinline__ int token_of(const MlaParams& p, int tile) {
    return p.num_tiles == 1 ? tile : __umulhi(tile, p.tile_inverse);
}

// The lane that has a tile.
__device__ __forceinline__ int lane_of(const MlaParams& p, int tile) {
    const int64_t all = int64_t{p.batch} * p.num_tiles;
    return static_cast<int>(((int64_t{tile} + 1) * p.num_lanes - 1) / all);
}

// Where a lane leaves its part of a token that it shares with others: two at most, one that goes on
// in the next lane and one that came from the last.
__device__ __forceinline__ int part_of(int lane, bool is_start) { return 2 * lane + is_start; }

static_assert(sizeof(MlaSmem) <= 232448 - 1024, "must fit into a processor's shared memory");

// What a CTA leaves for the others of its cluster, once its tiles are done; over MlaSmem's tiles.
struct PartSmem {
    static constexpr int kStride = kLatent + 8;  // so that 4 heads' columns lie in different banks
    float part[kHeads][kStride];
    float lse[kHeads];  // base 2
    float share[kMaxClusterSplits][kHeads];
    float factor[kHeads];
};
static_assert(sizeof(PartSmem) <= kTileBytes * (1 + kGroups), "must fit over queries and tiles");

__device__ __forceinline__ int first_panel(int group) { return group * kHalfPanels; }

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

__device__ __forceinline__ void prefetch_line(const char* source) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(source));
}

// All threads of the cluster that have not left; what was written before is seen after.
__device__ __forceinline__ void cluster_arrive_and_wait() {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;\n" ::
            : "memory");
}

// Threads of one warpgroup that multiplies.
__device__ __forceinline__ void group_barrier(int group) {
    asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory");
}

}  // namespace tidepool
