// Joins the stretches of a token's rows for sparse_mla.cu: where the CTAs of a token fit into a
// cluster, through their shared memory; else through global memory, by a second kernel.
#pragma once

#include <cooperative_groups.h>

#include "mla_tile.cuh"

namespace tidepool {

constexpr int kMaxSplits = 64;

// The mean of the parts that the CTAs of a cluster left, each CTA for its share of the heads;
// warpgroups that multiply call.
__device__ __forceinline__ void join_in_cluster(const MlaParams& p, MlaSmem& smem, int b, int head) {
    const auto cluster = cooperative_groups::this_cluster();
    const int num_parts = p.num_splits;
    const int rank = static_cast<int>(cluster.block_rank());
    const int share = (kHeads + num_parts - 1) / num_parts;
    const int first = rank * share;
    const int end = min(min(first + share, kHeads), p.num_heads - head);
    const int column = static_cast<int>(threadIdx.x) * 2;
    PartSmem& own = *reinterpret_cast<PartSmem*>(&smem);
    cluster_arrive_and_wait();
    if (static_cast<int>(threadIdx.x) < end - first) {
        const int h = first + static_cast<int>(threadIdx.x);
        float best = kLowest;
        for (int s = 0; s < num_parts; ++s) {
            best = fmaxf(best, cluster.map_shared_rank(own.lse, s)[h]);
        }
        float total = 0.0f;
        for (int s = 0; s < num_parts; ++s) {
            const float lse = cluster.map_shared_rank(own.lse, s)[h];
            const float weight = lse > kLowest ? exp2_fast(lse - best) : 0.0f;
            own.share[s][h] = weight;
            total += weight;
        }
        own.factor[h] = total > 0.0f ? 1.0f / total : 0.0f;
    }
    consumers_barrier();
#pragma unroll 4
    for (int h = first; h < end; ++h) {
        float2 sum = {0.0f, 0.0f};
#pragma unroll 2
        for (int s = 0; s < num_parts; ++s) {
            const float* part = cluster.map_shared_rank(own.part[h], s) + column;
            const float2 value = *reinterpret_cast<const float2*>(part);
            sum.x += value.x * own.share[s][h];
            sum.y += value.y * own.share[s][h];
        }
        __nv_bfloat16* out = p.out + b * p.out_stride_b + (head + h) * p.out_stride_h + column;
        *reinterpret_cast<__nv_bfloat162*>(out) =
            __floats2bfloat162_rn(sum.x * own.factor[h], sum.y * own.factor[h]);
    }
    cluster_arrive_and_wait();  // none reads another's memory any more
}

constexpr int kJoinThreads = kLatent / 4;

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
