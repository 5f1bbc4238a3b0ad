// Joins the parts of a token's rows for sparse_mla.cu: where the lanes of a token are a cluster, through
// their shared memory; else through global memory, by a second kernel.
#pragma once

#include <cooperative_groups.h>

#include "mla_tile.cuh"

namespace tidepool {

__device__ __forceinline__ void store_four(__nv_bfloat16* out, const float4& sum, float factor) {
    __nv_bfloat162* pair = reinterpret_cast<__nv_bfloat162*>(out);
    pair[0] = __floats2bfloat162_rn(sum.x * factor, sum.y * factor);
    pair[1] = __floats2bfloat162_rn(sum.z * factor, sum.w * factor);
}

// The mean of the parts that the CTAs of a cluster left, each CTA for its share of the heads;
// warpgroups that multiply call.
__device__ __forceinline__ void join_in_cluster(const MlaParams& p, MlaSmem& smem, int b, int head) {
    const auto cluster = cooperative_groups::this_cluster();
    const int num_parts = p.cluster;
    const int rank = static_cast<int>(cluster.block_rank());
    const int share = (kHeads + num_parts - 1) / num_parts;
    const int first = rank * share;
    const int end = min(min(first + share, kHeads), p.num_heads - head);
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
    constexpr int kAtOnce = 8;  // heads of a thread, so that as many loads are in flight
    const int column = static_cast<int>(threadIdx.x) % 128 * 4;
    for (int h = first + static_cast<int>(threadIdx.x) / 128; h < end; h += 2 * kAtOnce) {
        float4 sum[kAtOnce] = {};
        for (int s = 0; s < num_parts; ++s) {
            const float* part = cluster.map_shared_rank(own.part[0], s) + column;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int at = min(h + 2 * i, end - 1);
                const float4 value = *reinterpret_cast<const float4*>(part + at * PartSmem::kStride);
                const float weight = own.share[s][at];
                sum[i].x += value.x * weight;
                sum[i].y += value.y * weight;
                sum[i].z += value.z * weight;
                sum[i].w += value.w * weight;
            }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int at = h + 2 * i;
            if (at < end) {
                const int64_t row = b * p.out_stride_b + (head + at) * p.out_stride_h;
                store_four(p.out + row + column, sum[i], own.factor[at]);
            }
        }
    }
    cluster_arrive_and_wait();  // none reads another's memory any more
}

constexpr int kJoinThreads = kLatent / 4;

// Grid (heads, tokens); 4 columns a thread. Starts while the parts are still being made. Tokens that
// one lane has are there already.
__global__ void __launch_bounds__(kJoinThreads) join_kernel(const __grid_constant__ MlaParams p) {
    constexpr int kAtOnce = 8;  // parts, so that as many loads are in flight
    const int h = blockIdx.x;
    const int b = blockIdx.y;
    const int lane = lane_of(p, b * p.num_tiles);
    const int num_parts = lane_of(p, (b + 1) * p.num_tiles - 1) - lane + 1;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    float total = 0.0f;
    float best = kLowest;
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (num_parts == 1) {
        return;
    }
    for (int first = 0; first < num_parts; first += kAtOnce) {
        float lse[kAtOnce];
        float4 value[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int s = first + i;
            lse[i] = kLowest;
            value[i] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (s < num_parts) {
                const int64_t row = int64_t{part_of(lane + s, s == 0)} * p.num_heads + h;
                lse[i] = p.lse[row];
                value[i] = *reinterpret_cast<const float4*>(p.parts + row * kLatent + threadIdx.x * 4);
            }
        }
        float now = best;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            now = fmaxf(now, lse[i]);
        }
        const float factor = exp2_fast(best - now);
        best = now;
        sum = {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor};
        total *= factor;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const float share = lse[i] > kLowest ? exp2_fast(lse[i] - now) : 0.0f;
            sum.x += value[i].x * share;
            sum.y += value[i].y * share;
            sum.z += value[i].z * share;
            sum.w += value[i].w * share;
            total += share;
        }
    }
    store_four(p.out + b * p.out_stride_b + h * p.out_stride_h + threadIdx.x * 4, sum,
               total > 0.0f ? 1.0f / total : 0.0f);
}

}  // namespace tidepool
